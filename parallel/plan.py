"""Plans: for one mask, layout, world and shape, what one rank computes and what it moves, step by step.

A plan is pure integer arithmetic on the host: it holds no tensors and sends nothing. The running code (autograd.py and the
transports) has no ifs about mask, layout or schedule; it does what the plan says.

Words. A *rank* here is a rank of the ring: with Ulysses of degree U, every U neighbouring ranks of the group first trade heads
for sequence and then act as one ring rank per head share (section "heads" below). A *chunk* is what one rank owns of what
travels: of K and V or, in a backward pass where that is fewer bytes, of Q and what belongs to its rows. A chunk may travel in
*pieces*.
A *step* computes on one *stage*: one or several arrived chunks side by side in one buffer. Step 0 is the local chunk.
A *slot* is a moment at which transfers are posted: slot n comes after step n's chunks have arrived and before step n is computed.
Steps and slots are the same on all ranks, but a rank has only what it needs in them, as early as its schedule allows.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property, lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ringflash.mask import Bands, Mask, overlaps
from ringflash.parallel.layout import Layout
from ringflash.slices import UNBOUNDED, IntArray, Slices, area, tighten

SCHEDULES = ("auto", "ring", "allgather", "staged", "ulysses", "hybrid", "double_ring")


TILE = 128
"""Rows and keys of most kernels' tiles."""


MAX_GAP = TILE
"""A message costs some 20 us, in which a link moves thousands of rows; one kernel tile keeps the waste invisible."""


PIECE_ROWS, MOST_PIECES = 8192, 4
"""A double ring cuts chunks into up to four pieces of at least so many rows: the slow link then carries one while another is
computed. Smaller pieces would only be more kernel calls."""
BACKWARD_PIECE_ROWS, MOST_BACKWARD_PIECES = 4096, 8
"""The same for a backward pass, where a piece's gradients cannot leave before the piece has come: the link is idle meanwhile."""
LATE = 1 / 2
"""Nobody waits for gradients that cross slow links before as many steps are over as so much of a chunk takes in blocks of a
double ring, near steps between them not counted. The other side may have to wait for this one's pieces first, and kernels that
wait for it hold up what it is waiting for. Causal, two nodes of two ranks, over the time that the bytes take on the slow link
(gloo, sleeping kernels, a shaped link; 8 or 32 key heads; all near steps last): 4 pieces and one block 1.14, 1.19, two blocks
1.12, 1.16; 8 pieces and one block 1.15, 1.14, four blocks 1.06, 1.09. What has not arrived takes memory."""


LOCAL_LAST = 8192
"""Rows of a chunk from which a part of the local work is kept for the end of a backward pass. Less is over before it hides
anything. Measured on 4 H200 without it: 10 of 50 ms waiting for the last gradients (64k tokens, 32 heads, all-gather)."""


BACKWARD_ROWS = (16_384, 32_768)
BACKWARD_BYTES = 256 << 20
"""Rows to which "auto" fills stages of a backward pass: gradients leave stage by stage, and the last ones should not be all of
them. The larger number where a rank's gradients of so many rows, of one batch entry, are no more bytes than this. Fewer, larger
calls have fewer ends at which multiprocessors run out of work: on 4 H200 at 64k tokens and 8 key heads two remote stages
instead of three took 50.8 instead of 52.2 ms."""


KNOWN_UP_TO = 1 << 20
"""Bands between everybody and everybody that are worth working out, to know what other ranks need and when (0.3 s of numpy)."""


COALESCE_UP_TO = 4096
"""Slices of a stage that are worth joining. Longer tables (thousands of documents, striped) hardly shrink and cost seconds."""


TRAVELS = ("auto", "kv", "q")


@dataclass(frozen=True)
class Schedule:
    """In which order and grouping chunks arrive.

    name      ring: one remote chunk a step. allgather: all remote chunks in one step. staged: ``stage`` chunks a step.
              double_ring: rings of ``inner`` fast-linked neighbours, inside a ring of such groups: every chunk crosses the slow
              links once per group and then travels inside it (BurstEngine, LoongTrain).
    stage     remote chunks per step, at least.
    rows      a stage takes further chunks until it holds so many rows: small parts of chunks share a step. Ranks that need less
              than others cut it into as many steps.
    ulysses   ranks that trade heads for sequence before the ring (DeepSpeed Ulysses; with a ring: USP, Fang & Zhao 2024).
    inner     ranks of a fast-linked group (double_ring).
    pieces    in which chunks travel, one after the other, each a step of its own; 0 decides by size (double_ring, else 1).
    local_last  in a backward pass a part of the local chunk is computed last, while the last gradients travel home, where chunks
              have at least so many rows.
    travels   in the backward pass: "kv" (K and V, and their gradients home), "q" (Q, dO and what belongs to their rows, and dQ
              home), or "auto": whichever is fewer bytes.
    """

    name: str = "ring"
    stage: int = 1
    ulysses: int = 1
    inner: int = 1
    rows: int = 0
    pieces: int = 0
    local_last: int = LOCAL_LAST
    travels: str = "auto"

    def __post_init__(self) -> None:
        if self.travels not in TRAVELS:
            raise ValueError(f"travels must be one of {', '.join(TRAVELS)}, got {self.travels!r}")

    def __str__(self) -> str:
        extra = [f"{f.name}={value}" for f in fields(self)[1:] if (value := getattr(self, f.name)) != f.default]
        return f"{self.name}({', '.join(extra)})" if extra else self.name


def make_schedule(spec: str | Schedule, world: int, ulysses: int = 1, inner: int | None = None) -> Schedule:
    """The schedule of a name ("ring", "allgather", "staged:3", "ulysses", "hybrid", "double_ring", "auto") for a world.

    ulysses: degree of the head exchange for "hybrid" (and, if above 1, for any other). inner: group size of "double_ring".
    Raises ValueError for unknown names and for degrees that do not divide the world.
    """
    if isinstance(spec, Schedule):
        schedule = spec
    else:
        name, _, argument = spec.partition(":")
        if name not in SCHEDULES or (argument and (name != "staged" or not argument.isdigit() or int(argument) < 1)):
            raise ValueError(f'unknown schedule {spec!r}; allowed are {", ".join(SCHEDULES)}, "staged:K" or a Schedule object')
        if name == "ulysses":
            if ulysses not in (1, world):
                raise ValueError(
                    f'schedule "ulysses" uses all {world} ranks, got ulysses={ulysses}; use schedule="hybrid" for a part of them'
                )
            ulysses = world
        if name == "hybrid" and not 1 < ulysses < world:
            raise ValueError(f'schedule "hybrid" needs ulysses between 2 and {world - 1}, got {ulysses}')
        rings = world // max(ulysses, 1)
        if name == "double_ring":
            if inner is None or not 1 <= inner <= rings:
                raise ValueError(
                    f'schedule "double_ring" needs inner=, the ranks of one fast-linked group, 1 to {rings}; got {inner}'
                )
        elif inner not in (None, 1):
            raise ValueError(f'inner={inner} is for schedule "double_ring", got schedule {spec!r}')
        stage = {"allgather": max(rings - 1, 1), "staged": int(argument or 2)}.get(name, 1)
        kind = name if name in ("allgather", "staged", "double_ring") else "ring"
        schedule = Schedule(kind, stage, ulysses, inner if name == "double_ring" and inner else 1)
    if schedule.ulysses < 1 or world % schedule.ulysses:
        raise ValueError(f"ulysses={schedule.ulysses} does not divide the {world} ranks")
    if schedule.inner < 1 or (world // schedule.ulysses) % schedule.inner:
        raise ValueError(f"inner={schedule.inner} does not divide the {world // schedule.ulysses} ranks of the ring")
    if schedule.stage < 1 or schedule.rows < 0 or schedule.pieces < 0:
        raise ValueError(f"a stage needs at least one chunk; rows and pieces cannot be negative; got {schedule}")
    return schedule


Ranges = tuple[tuple[int, int], ...]
"""Disjoint ascending row ranges ``[start, stop)`` of an owner's buffer."""


class Transfer(NamedTuple):
    """Rows ``ranges`` of ``owner``'s chunk (or of its gradient) go from ring rank ``source`` to ring rank ``dest``.

    ``step`` is the one in which the chunk is computed by the rank that is not its owner's side of the transfer.
    """

    step: int
    owner: int
    source: int
    dest: int
    ranges: Ranges


class Post(NamedTuple):
    """What is posted together: the transfers of all chunks that are computed in one step (by whoever is not their owner)."""

    step: int
    transfers: tuple[Transfer, ...]


class Chunk(NamedTuple):
    """Where ``ranges`` of an owner's chunk stand in a stage's buffer: one after the other from row ``offset``."""

    owner: int
    offset: int
    ranges: Ranges


class View(NamedTuple):
    """Rows ``start::step`` of a buffer; dilated masks are bands only between such views."""

    start: int
    step: int


@dataclass(frozen=True)
class Part:
    """One kernel call: the Slices between a view of the query buffer and a view of the key buffer (in view indices).

    One of the two is the stage's buffer, the other is the own one: that of what does not travel.
    """

    q_view: View
    k_view: View
    slices: Slices

    def transposed(self) -> Part:
        """With queries and keys in each other's place."""
        return Part(self.k_view, self.q_view, Slices(_transposed(self.slices.table)))


@dataclass(frozen=True)
class Step:
    """One stage: ``rows`` in its buffer, the chunks in it, and what to compute on it.

    local: on the own chunk, which is there already: step 0 and, in a backward pass, what is left of it for the end.
    """

    rows: int
    chunks: tuple[Chunk, ...]
    parts: tuple[Part, ...]
    local: bool = False

    @cached_property
    def area(self) -> int:
        """Visible pairs, per head."""
        return sum(part.slices.area() for part in self.parts)


class HeadShare(NamedTuple):
    """Heads one Ulysses member works on: query heads ``[q0, q1)``, key heads ``[k0, k1)``, and which of these a query head uses.

    ``k_index`` is None where the shares keep a whole ratio (plain GQA); else one key head per query head, as an index into
    ``[k0, k1)``, and the keys are laid out once per query head.
    """

    q0: int
    q1: int
    k0: int
    k1: int
    k_index: tuple[int, ...] | None

    @property
    def q_heads(self) -> int:
        return self.q1 - self.q0

    @property
    def kv_heads(self) -> int:
        """Key heads as they are laid out to be computed with."""
        return self.k1 - self.k0 if self.k_index is None else len(self.k_index)

    def span(self, keys: bool) -> slice:
        """The key heads or the query heads that are traded for it."""
        return slice(self.k0, self.k1) if keys else slice(self.q0, self.q1)

    def traded(self, keys: bool) -> int:
        """How many these are."""
        return self.k1 - self.k0 if keys else self.q_heads


@dataclass(frozen=True)
class PlanKey:
    """What a plan is made from. Equal on all ranks but for ``rank``."""

    mask: Mask
    q_layout: Layout
    k_layout: Layout
    schedule: Schedule
    heads: int
    kv_heads: int
    rank: int
    trim: bool = True
    """Whether only needed rows of a chunk travel, or whole chunks (collectives that send everybody the same)."""
    max_gap: int = MAX_GAP
    """Rows nobody needs that travel along rather than split a message in two."""
    travels: str = "kv"
    """What travels: "kv" or, in a backward pass, "q"."""
    returns: bool = False
    """Whether gradients travel home. Then something is left to compute while the last of them do: a part of the local chunk,
    and before it, in a double ring, the last of what neighbours own."""

    @property
    def world(self) -> int:
        return self.q_layout.world

    @property
    def shift(self) -> int:
        """The position of the first query: queries stand at the end of the keys."""
        return self.k_layout.seqlen - self.q_layout.seqlen

    def moving(self) -> tuple[Layout, Layout]:
        """The layouts, over the ring's ranks, of what stays and of what travels."""
        q, k = (layout.merged(self.schedule.ulysses) for layout in (self.q_layout, self.k_layout))
        return (q, k) if self.travels == "kv" else (k, q)


@dataclass(frozen=True, eq=False)
class Plan:
    """What one rank does. ``rank`` is its ring rank, ``member`` its place in the Ulysses group."""

    key: PlanKey
    rank: int
    member: int
    rings: int
    q_lengths: tuple[int, ...]  # of the Ulysses members of this ring rank, in order
    k_lengths: tuple[int, ...]
    shares: tuple[HeadShare, ...]  # of the Ulysses members
    steps: tuple[Step, ...]
    far: tuple[bool, ...]  # by step: whether what it computes on crosses the slow links of a double ring
    posts: tuple[tuple[Post, ...], ...]  # by slot: this rank's sends and receives of what travels
    homes: tuple[tuple[Post, ...], ...]  # by slot, one more than steps: sends and receives of its gradients

    @property
    def q_len(self) -> int:
        """Rows of the ring rank's query buffer (all members' rows)."""
        return sum(self.q_lengths)

    @property
    def k_len(self) -> int:
        return sum(self.k_lengths)

    @property
    def share(self) -> HeadShare:
        return self.shares[self.member]

    def peer(self, rank: int) -> int:
        """The group rank of a ring rank: the one with the same heads."""
        return rank * self.key.schedule.ulysses + self.member

    def explain(
        self,
        device: str = "cuda",
        batch: int = 1,
        head_dim: int = 128,
        dtype_bytes: int = 2,
        takes_delta: bool = True,
        deterministic: bool = False,
    ) -> str:
        """The plan with its predicted times, bytes and memory on "cuda" or "cpu", as text (see cost.py).

        takes_delta: of the kernel, as for ``backward``; the text says so where it matters. deterministic: of the call; the memory
        is that of such gradients.
        """
        from ringflash.parallel.cost import explain, predict
        from ringflash.parallel.tables import measured

        tables = measured(device)
        shape = {"batch": batch, "head_dim": head_dim, "dtype_bytes": dtype_bytes}
        forecast = predict(self, tables.device, tables.link, takes_delta=takes_delta, deterministic=deterministic, **shape)
        return explain(self, forecast, source=tables.source)

    def row_at(self, rank: int, owner: int, ranges: Ranges) -> tuple[int, int]:
        """Where a ring rank holds what it takes of another's chunk: the step in whose buffer, and the first row there.

        ranges: of a transfer, so all that is taken of a piece. Another rank's plan, with its Slices, is not made for it: those of
        1,024 ranks took minutes.
        """
        world = _world(replace(self.key, rank=0))
        rows = world.key.moving()[1].lengths[owner]
        cuts = [rows * p // world.pieces for p in range(1, world.pieces)]
        piece = owner * world.pieces + bisect_right(cuts, ranges[0][0])
        step = world.steps[rank][piece]
        if rank == self.rank:
            return step, next(chunk.offset for chunk in self.steps[step].chunks if chunk[::2] == (owner, ranges))
        stage = world.stages[rank][step - 1]
        return step, _rows_taken(world, rank, stage[: stage.index(piece)])

    def backward(self, head_dim: int = 128, head_dim_v: int = 128, dtype_bytes: int = 2, takes_delta: bool = True) -> Plan:
        """The plan of the backward pass. What travels in it is what the schedule says, or what moves fewer bytes.

        takes_delta: whether the kernel is content with delta in place of out, which does not travel (our own and the CPU's are);
        else "auto" means "kv".
        """
        return _backward(self, head_dim, head_dim_v, dtype_bytes, takes_delta)

    def longest_chunk(self) -> int:
        """Rows of the longest chunk of any rank."""
        return max(self.key.moving()[1].lengths)

    def longest_stage(self) -> int:
        """Rows of the longest remote stage of any rank; of all ranks' whole stages where what they take is not known here."""
        return _world(replace(self.key, rank=0)).longest_stage

    def most_heads(self) -> int:
        """Heads of what travels, at the rank that has most of them."""
        return max(self.heads_of(share) for share in self.shares)

    def heads_of(self, share: HeadShare) -> int:
        """Heads of what travels that one Ulysses member works on."""
        return share.q_heads if self.key.travels == "q" else share.kv_heads

    def due(self, slot: int, step: int) -> int:
        """The slot at which gradients that arrive in a post of ``slot`` are added: the next one, but what crosses slow links
        has the steps of some blocks."""
        return slot + (self.blocks_late * self.key.schedule.inner if self.far[step] else 1)

    @cached_property
    def blocks_late(self) -> int:
        """Blocks of a double ring in whose steps gradients over slow links are not waited for."""
        return max(int(LATE * _world(replace(self.key, rank=0)).parts), 1)

    @cached_property
    def area(self) -> int:
        """Visible pairs of this rank, per head."""
        return sum(step.area for step in self.steps)

    def rows_received(self) -> int:
        """Rows that reach this rank before they are computed on."""
        return sum(
            b - a for slot in self.posts for post in slot for t in post.transfers if t.dest == self.rank for a, b in t.ranges
        )

    def rows_sent(self) -> int:
        """Rows that this rank sends to be computed on."""
        return sum(
            b - a for slot in self.posts for post in slot for t in post.transfers if t.source == self.rank for a, b in t.ranges
        )


def head_shares(heads: int, kv_heads: int, members: int) -> tuple[HeadShare, ...]:
    """Query heads cut as evenly as they go; a member gets the key heads its query heads use, shared ones several times."""
    group = heads // kv_heads
    shares = []
    for member in range(members):
        q0, q1 = member * heads // members, (member + 1) * heads // members
        if q0 == q1:
            shares.append(HeadShare(q0, q1, 0, 0, None))
            continue
        used = [h // group for h in range(q0, q1)]
        k0, k1 = used[0], used[-1] + 1
        ratio = (q1 - q0) // (k1 - k0)
        even = (q1 - q0) % (k1 - k0) == 0 and all(u - k0 == i // ratio for i, u in enumerate(used))
        shares.append(HeadShare(q0, q1, k0, k1, None if even else tuple(u - k0 for u in used)))
    return tuple(shares)


class _Runs(NamedTuple):
    """Runs of several ranks as columns; ``offset`` is a run's first row in its rank's buffer, ``piece`` its rank or its rank's
    piece: piece p of rank r is number ``r * pieces + p``."""

    start: IntArray
    length: IntArray
    stride: IntArray
    offset: IntArray
    piece: IntArray


def _runs(layout: Layout, ranks: Sequence[int], shift: int = 0, pieces: int = 1) -> _Runs:
    """The runs of ranks, cut where their pieces begin."""
    rows = []
    for rank in ranks:
        offset, cuts = 0, [layout.lengths[rank] * p // pieces for p in range(1, pieces + 1)]
        piece = 0
        for run in layout.ranks[rank]:
            done = 0
            while done < run.length:
                while cuts[piece] <= offset:
                    piece += 1
                n = min(run.length - done, cuts[piece] - offset)
                rows.append((run.start + shift + done * run.stride, n, run.stride, offset, rank * pieces + piece))
                done, offset = done + n, offset + n
    return _Runs(*np.array(rows, dtype=np.int64).reshape(-1, 5).T)


def _ceil_div(a: IntArray, b: IntArray) -> IntArray:
    return -(-a // b)


def _join(runs: _Runs, b0: IntArray, b1: IntArray) -> tuple[IntArray, IntArray]:
    """Pairs (run, interval) that may share a position."""
    order = np.argsort(b0, kind="stable")
    i, j = overlaps(runs.start, runs.start + (runs.length - 1) * runs.stride + 1, b0[order], b1[order])
    return i, order[j]


def _to_rows(x: IntArray, runs: _Runs, i: IntArray) -> IntArray:
    """First row of run i, counted in the run, at or after position x; clipped to the run."""
    return np.clip(_ceil_div(x - runs.start[i], runs.stride[i]), 0, runs.length[i])


def _transposed(rows: IntArray) -> IntArray:
    """Bands (n, 6) with queries and keys in each other's place."""
    q0, q1, k0, k1, lo, hi = rows.T
    return np.stack([k0, k1, q0, q1, -hi, -lo], axis=1)


class _Lowered(NamedTuple):
    """Bands in buffer rows: ``rows`` (n, 6) of q0, q1, k0, k1, lo, hi; ``residue`` of j - i modulo ``modulus``; and the pieces
    of their queries and keys. Transposed where queries travel: so the planner always moves "keys"."""

    rows: IntArray
    residue: IntArray
    modulus: int
    q_piece: IntArray
    k_piece: IntArray

    def transposed(self) -> _Lowered:
        return _Lowered(_transposed(self.rows), -self.residue % self.modulus, self.modulus, self.k_piece, self.q_piece)

    def where(self, pick: npt.NDArray[np.bool_]) -> _Lowered:
        return _Lowered(self.rows[pick], self.residue[pick], self.modulus, self.q_piece[pick], self.k_piece[pick])


def lower(bands: Bands, q_runs: _Runs, k_runs: _Runs) -> _Lowered:
    """Bands of positions -> bands between the buffers of the runs' ranks. Vectorised; the smaller side is joined first.

    For q = a + s*i and k = b + s*j, ``lo <= k - q <= hi`` is ``ceil((lo + a - b)/s) <= j - i <= floor((hi + a - b)/s)``, and
    ``(k - q) % m == 0`` is ``s*(j - i) = a - b (mod m)``: solvable iff gcd(s, m) divides a - b, and then one residue of j - i.
    """
    r = bands.rows
    if len(q_runs.start) <= len(k_runs.start):
        iq, band = _join(q_runs, r[:, 0], r[:, 1])
        first = np.maximum(q_runs.start[iq], r[band, 0])
        last = np.minimum(q_runs.start[iq] + (q_runs.length[iq] - 1) * q_runs.stride[iq] + 1, r[band, 1])
        ik, pair = _join(k_runs, np.maximum(r[band, 2], first + r[band, 4]), np.minimum(r[band, 3], last + r[band, 5]))
        iq, band = iq[pair], band[pair]
    else:
        ik, band = _join(k_runs, r[:, 2], r[:, 3])
        first = np.maximum(k_runs.start[ik], r[band, 2])
        last = np.minimum(k_runs.start[ik] + (k_runs.length[ik] - 1) * k_runs.stride[ik] + 1, r[band, 3])
        iq, pair = _join(q_runs, np.maximum(r[band, 0], first - r[band, 5]), np.minimum(r[band, 1], last - r[band, 4]))
        ik, band = ik[pair], band[pair]
    b = r[band]
    # A run of one position has any stride; it takes its partner's.
    stride = np.where(q_runs.length[iq] > 1, q_runs.stride[iq], k_runs.stride[ik])
    gap = q_runs.start[iq] - k_runs.start[ik]
    q_offset, k_offset = q_runs.offset[iq], k_runs.offset[ik]
    shift = k_offset - q_offset
    rows = np.stack(
        [
            q_offset + _to_rows(b[:, 0], q_runs, iq),
            q_offset + _to_rows(b[:, 1], q_runs, iq),
            k_offset + _to_rows(b[:, 2], k_runs, ik),
            k_offset + _to_rows(b[:, 3], k_runs, ik),
            np.where(b[:, 4] <= -UNBOUNDED, -UNBOUNDED, _ceil_div(b[:, 4] + gap, stride) + shift),
            np.where(b[:, 5] >= UNBOUNDED, UNBOUNDED, (b[:, 5] + gap) // stride + shift),
        ],
        axis=1,
    )
    residue = np.zeros(len(rows), np.int64)
    modulus = 1
    solvable = np.ones(len(rows), dtype=np.bool_)
    if bands.modulus > 1:
        # One stride per layout makes one modulus per table (a lone position in the pair takes any).
        common = int(stride.max(initial=1))
        assert (stride == common).all() or (stride[stride != common] == 1).all()
        g = int(np.gcd(common, bands.modulus))
        modulus = bands.modulus // g
        solvable = gap % g == 0
        residue = ((gap // g) * pow(common // g, -1, modulus) + shift) % modulus if modulus > 1 else residue
    tight, keep = tighten(rows[solvable])
    pick = np.flatnonzero(solvable)[keep]
    if modulus > 1:  # every j - i in [lo, hi] occurs in a tight band; those of the right residue are all that counts
        tight[:, 4] += (residue[pick] - tight[:, 4]) % modulus
        tight[:, 5] -= (tight[:, 5] - residue[pick]) % modulus
        tight, keep = tighten(tight)
        pick = pick[keep]
    return _Lowered(tight, residue[pick], modulus, q_runs.piece[iq[pick]], k_runs.piece[ik[pick]])


def _reach(low: _Lowered, pair: IntArray, max_gap: int) -> dict[int, Ranges]:
    """For every value of ``pair`` (one per band), the key rows its bands reach: disjoint ranges, joined over short gaps."""
    if not len(pair):
        return {}
    order = np.lexsort((low.rows[:, 2], pair))
    who, start, stop = pair[order], low.rows[order, 2], low.rows[order, 3]
    # A running maximum of the ends that starts anew at every value of pair: ends are lifted by a step per value.
    lift = np.cumsum(np.concatenate([[0], who[1:] != who[:-1]])) * (int(stop.max()) + 1)
    reached = np.maximum.accumulate(stop + lift) - lift
    first = np.concatenate([[True], (who[1:] != who[:-1]) | (start[1:] > reached[:-1] + max_gap)])
    head = np.flatnonzero(first)
    tail = np.concatenate([head[1:], [len(who)]]) - 1
    found: dict[int, list[tuple[int, int]]] = {}
    for key, a, b in zip(who[head].tolist(), start[head].tolist(), reached[tail].tolist(), strict=True):
        found.setdefault(key, []).append((a, b))
    return {key: tuple(ranges) for key, ranges in found.items()}


def _coalesce(rows: IntArray) -> IntArray:
    """Joins Slices into larger ones wherever two of them are exactly one band: fewer, larger kernel calls.

    So the local step of zigzag (causal, full, causal) becomes one causal Slice, and its other steps one full Slice each.
    """
    rows, _ = tighten(rows)
    while len(rows) <= COALESCE_UP_TO:
        before = len(rows)
        rows = _join_neighbours(rows, np.lexsort((rows[:, 2], rows[:, 1], rows[:, 0])))  # same rows, keys side by side
        rows = _join_neighbours(rows, np.lexsort((rows[:, 0], rows[:, 2])))  # same first key, rows one below the other
        rows = _join_neighbours(rows, np.lexsort((rows[:, 2], rows[:, 0])))
        if len(rows) == before:
            break
    return rows


def _join_neighbours(rows: IntArray, order: IntArray) -> IntArray:
    """One pass over pairs that follow each other in the given order; Slices are disjoint, so equal area means equal sets."""
    rows = rows[order]
    if len(rows) < 2:
        return rows
    a, b = rows[:-1], rows[1:]
    union = np.where(np.array([True, False, True, False, True, False]), np.minimum(a, b), np.maximum(a, b))
    joins = area(union) == area(a) + area(b)
    # Of pairs in a row every second one: a Slice joins one neighbour a pass.
    index = np.arange(len(joins))
    begins = joins & ~np.concatenate([[False], joins[:-1]])
    begin = np.maximum.accumulate(np.where(begins, index, 0))
    joins &= (index - begin) % 2 == 0
    joined = rows.copy()
    joined[:-1][joins] = union[joins]
    kept: IntArray = joined[~np.concatenate([[False], joins])]
    return kept


def _parts(rows: IntArray, residue: IntArray, modulus: int) -> tuple[Part, ...]:
    """Kernel calls for a stage's bands: one, or for a dilated mask one per pair of residues."""
    if modulus == 1:
        slices = Slices(_coalesce(rows))
        return (Part(View(0, 1), View(0, 1), slices),) if len(slices) else ()
    parts = []
    for c in np.unique(residue).tolist():
        band = rows[residue == c]
        for q_start in range(min(modulus, int(band[:, 1].max()))):
            k_start = (q_start + c) % modulus
            q0, q1, k0, k1, lo, hi = band.T
            view = np.stack(
                [
                    -((q_start - q0) // modulus),
                    -((q_start - q1) // modulus),
                    -((k_start - k0) // modulus),
                    -((k_start - k1) // modulus),
                    np.where(lo <= -UNBOUNDED, lo, -((k_start - q_start - lo) // modulus)),
                    np.where(hi >= UNBOUNDED, hi, (hi - k_start + q_start) // modulus),
                ],
                axis=1,
            )
            slices = Slices(_coalesce(view))
            if len(slices):
                parts.append(Part(View(q_start, modulus), View(k_start, modulus), slices))
    return tuple(parts)


class _Load(NamedTuple):
    """What a stage takes of one chunk, and which bands lie in it."""

    owner: int
    ranges: Ranges
    bands: IntArray


def _stage(low: _Lowered, loads: Sequence[_Load]) -> Step:
    """A stage of the given chunks: ranges side by side in one buffer, and their bands moved there."""
    placed, rows, residue, offset = [], [], [], 0
    for owner, ranges, mine in loads:
        placed.append(Chunk(owner, offset, ranges))
        starts, stops = np.array(ranges, dtype=np.int64).reshape(-1, 2).T
        if len(mine):
            moves = offset + np.cumsum(stops - starts) - stops  # of each range; a band lies in one of them
            shift = moves[np.searchsorted(starts, low.rows[mine, 2], side="right") - 1]
            moved = low.rows[mine].copy()
            moved[:, 2:6] += shift[:, None]  # keys, and with them the bounds on j - i
            rows.append(moved)
            residue.append((low.residue[mine] + shift) % low.modulus)
        offset += int((stops - starts).sum())
    if not rows:
        return Step(offset, tuple(placed), ())
    return Step(offset, tuple(placed), _parts(np.concatenate(rows), np.concatenate(residue), low.modulus))


# What all ranks of a world share: who needs what, and when


class Way(NamedTuple):
    """What is computed in a step is posted at ``slot``, and its gradient leaves at ``home``; over slow links if ``far``."""

    slot: int
    home: int
    far: bool


def _ring(schedule: Schedule, rank: int, rings: int, pieces: int, rows: IntArray) -> list[list[int]]:
    """The pieces of every stage of a rank, nearest predecessor first; stages it has no need of do not exist."""
    owners = (rank - np.arange(1, rings)) % rings
    nearest = (owners[:, None] * pieces + np.arange(pieces)).ravel()
    order = nearest[rows[nearest] > 0]
    needed, held = order.tolist(), [0, *np.cumsum(rows[order]).tolist()]
    stages: list[list[int]] = []
    begin = 0
    while begin < len(needed):
        end = max(begin + schedule.stage, bisect_left(held, held[begin] + schedule.rows, begin))
        stages.append(needed[begin:end])
        begin = end
    return stages


def _evenly(pieces: Sequence[int], n: int, rows: IntArray) -> list[list[int]]:
    """Those of the pieces that have rows, in their order, in n stages of about as many rows: ranks that need less are not done
    with a step before others, who would wait for them in the next."""
    order = np.array(pieces, np.int64)
    order = order[rows[order] > 0]
    held = np.cumsum(rows[order])
    stage = (2 * held - rows[order]) * n // (2 * held[-1:])
    cuts, needed = np.searchsorted(stage, np.arange(n + 1)).tolist(), order.tolist()
    return [needed[a:b] for a, b in pairwise(cuts)]


def _double_ring(
    schedule: Schedule,
    rings: int,
    pieces: int,
    n: int,
    returns: bool,
    spare: bool,
    rows: Callable[[int], IntArray],
    sees: Callable[[int, int], bool],
) -> tuple[list[list[list[int]]], list[Way]]:
    """The stages of every rank, and the ways of their steps: blocks in which what crosses the slow links is followed by what the
    neighbours pass on, and steps on what the neighbours own, as far as the rank itself sees it. A chunk is taken in n parts,
    a neighbour's in one more if there is to be one to spare for the end. Blocks that nobody of a group needs do not exist."""
    inner, everyone = schedule.inner, range(rings)

    def pieces_of(owner: int) -> range:
        return range(owner * pieces, (owner + 1) * pieces)

    @cache
    def parts(group: int, owner: int) -> list[list[int]]:
        return _evenly(pieces_of(owner), n, rows(group * inner))

    def seen(rank: int, owner: int) -> list[list[int]]:
        return _evenly([piece for piece in pieces_of(owner) if sees(rank, piece)], n + spare, rows(rank))

    def neighbours(rank: int) -> list[int]:
        return [rank // inner * inner + (rank - hop) % inner for hop in range(1, inner)]

    near = [[part for owner in neighbours(rank) for part in seen(rank, owner)] for rank in everyone]
    far: list[list[list[int]]] = []
    for rank in everyone:
        far.append([])
        for group in ((rank // inner - d) % (rings // inner) for d in range(1, rings // inner)):
            taken = [parts(rank // inner, group * inner + (rank - hop) % inner) for hop in range(inner)]
            blocks = [[of_owner[i] for of_owner in taken] for i in range(n)]
            far[-1] += [stage for block in blocks if any(block) for stage in block]
    n_far = max(len(stages) for stages in far)
    far = [stages + [[]] * (n_far - len(stages)) for stages in far]
    n_near, n_blocks = len(near[0]), n_far // inner
    # Backward, the steps on what neighbours own stand between the blocks: a slow link lets these come that far apart. The last
    # block's gradients leave a step after it; one to spare is computed while they cross.
    until = [max(min(n_near * block // n_blocks, n_near - 2 * spare), 0) for block in range(n_blocks)] + [n_near]
    order = [] if returns and n_blocks else [(near, i) for i in range(n_near)]
    begins = []
    for block in range(n_blocks):
        begins.append(len(order) + 1)
        order += [(far, block * inner + i) for i in range(inner)]
        if returns:
            order += [(near, i) for i in range(until[block], until[block + 1])]
    # Forward, blocks are posted at even distances, at most a chunk ahead of what is computed: the slow link is never idle for
    # long. Backward two blocks ahead: what was posted earlier would go before gradients that are ready, and of a causal mask's
    # chunks and gradients more go one way or the other, so that the link is only full with both under way.
    if returns and inner > 1:
        slots = [begins[i - 2] if i >= 2 else 0 for i in range(n_blocks)]
    else:
        slots = [max(s - max(inner * n, 1), s * i // n_blocks, 0) for i, s in enumerate(begins)]
    # A block's gradients are complete with its last step, but for those that neighbours still send then.
    ways = {s: Way(slot, s + inner if inner > 1 else s, inner > 1) for s, slot in zip(begins, slots, strict=True)}
    stages = [[of[rank][i] for of, i in order] for rank in everyone]
    return stages, [ways.get(s, Way(s - 1, s, False)) for s in range(1, len(order) + 1)]


@dataclass(frozen=True, eq=False)
class _World:
    """What the plans of all ranks have in common. ``key`` is that of rank 0."""

    key: PlanKey
    rings: int
    together: int
    """Ring ranks that take the same rows of a piece, all that any of them needs, so that they can pass them on unchanged."""
    pieces: int
    parts: int
    """In which a double ring takes what it needs of a chunk: twice as many pieces, since some need but half of them."""
    bands: Bands
    low: _Lowered | None
    """Bands between everybody and everybody, where these were worth working out."""
    takes: dict[int, Ranges] | None
    """What is taken, by group of receivers times number of pieces plus piece; None if whole chunks are, or if it is not known."""

    @cached_property
    def itineraries(self) -> tuple[list[list[list[int]]], list[Way]]:
        """By ring rank and step - 1: the pieces of a stage. By step - 1: its way, the same for all ranks."""
        schedule = self.key.schedule
        if schedule.name == "double_ring":
            returns = self.key.returns
            spare = returns and self.parts > 1 and not self.keeps_local
            return _double_ring(schedule, self.rings, self.pieces, self.parts, returns, spare, self.rows, self.sees)
        stages = [_ring(schedule, rank, self.rings, self.pieces, self.rows(rank)) for rank in range(self.rings)]
        if schedule.rows:
            most = max(len(s) for s in stages)
            even = (_evenly([p for stage in s for p in stage], most, self.rows(rank)) for rank, s in enumerate(stages))
            stages = [[stage for stage in s if stage] for s in even]
        return stages, [Way(n - 1, n, False) for n in range(1, 1 + max(len(s) for s in stages))]

    @cached_property
    def ends_local(self) -> bool:
        """Whether the last step is a part of the local chunk; the same on all ranks."""
        return self.keeps_local and self.key.returns and bool(self.ways)

    @property
    def keeps_local(self) -> bool:
        """Whether chunks are long enough for local work to be kept for the end of a backward pass."""
        return max(self.key.moving()[1].lengths) >= self.key.schedule.local_last

    @property
    def stages(self) -> list[list[list[int]]]:
        return self.itineraries[0]

    @property
    def ways(self) -> list[Way]:
        return self.itineraries[1]

    def lowered(self, stay: Sequence[int], move: Sequence[int]) -> _Lowered:
        """The bands between what stays on some ranks and what travels from some."""
        low = _bands_between(self.key, self.bands, stay, move, self.pieces)
        assert low is not None
        return low

    def sees(self, rank: int, piece: int) -> bool:
        """Whether a ring rank computes on a piece of its own group; True where that is not known."""
        return self._seen is None or (rank, piece) in self._seen

    @cached_property
    def _seen(self) -> set[tuple[int, int]] | None:
        """Ring ranks and pieces of their own groups that meet."""
        if self.low is None:
            return None
        q, k = self.low.q_piece, self.low.k_piece
        inside = q // self.together == k // (self.pieces * self.together)
        return set(zip(q[inside].tolist(), k[inside].tolist(), strict=True))

    def rows(self, rank: int) -> IntArray:
        """By piece: how many of its rows a ring rank takes, if it takes it (in a double ring what all of its group needs), or
        where that is not known, how many it has."""
        row: IntArray = self._rows[rank // self.together]
        return row

    @cached_property
    def _rows(self) -> IntArray:
        """By group of receivers and piece."""
        groups, n_pieces = self.rings // self.together, self.rings * self.pieces
        if self.takes is None:
            cuts = ([n * p // self.pieces for p in range(self.pieces + 1)] for n in self.key.moving()[1].lengths)
            whole = np.array([b - a for cut in cuts for a, b in pairwise(cut)], np.int64)
            return np.broadcast_to(whole, (groups, n_pieces))
        table = np.zeros((groups, n_pieces), np.int64)
        for at, ranges in self.takes.items():
            table[divmod(at, n_pieces)] = sum([b - a for a, b in ranges])
        return table

    @cached_property
    def longest_stage(self) -> int:
        ranks = ((self.rows(rank).tolist(), stages) for rank, stages in enumerate(self.stages))
        return max((sum([rows[piece] for piece in stage]) for rows, stages in ranks for stage in stages), default=0)

    @cached_property
    def steps(self) -> list[dict[int, int]]:
        """By ring rank and piece: the step in which it is computed."""
        return [{piece: n for n, stage in enumerate(stages, 1) for piece in stage} for stages in self.stages]

    @cached_property
    def rows_moved(self) -> int:
        """Rows that all ranks receive before they are computed on."""
        # Every rank of a group takes them, but for the owner itself, and for neighbours who see nothing of a piece.
        own, total = self.together * self.pieces, int(self.together * self._rows.sum())
        for group, rows in enumerate(self._rows):
            for piece, n in enumerate(rows[group * own : (group + 1) * own].tolist(), group * own):
                owner = piece // self.pieces
                ranks = range(group * self.together, (group + 1) * self.together)
                total -= n * sum(rank == owner or not self.sees(rank, piece) for rank in ranks)
        return total

    @cached_property
    def busiest(self) -> int:
        """Visible pairs of the busiest ring rank; 0 where that was not worked out (layouts that are balanced either way)."""
        if self.low is None or not len(self.low.rows):
            return 0
        return int(np.bincount(self.low.q_piece, weights=area(self.low.rows)).max())

    def source(self, rank: int, piece: int) -> int:
        """Who sends a piece to a rank: its owner or, inside a group, the neighbour that got it from there."""
        owner = piece // self.pieces
        if self.together == 1 or rank // self.together == owner // self.together or (rank - owner) % self.together == 0:
            return owner
        return rank // self.together * self.together + owner % self.together


def _bands_between(
    key: PlanKey, bands: Bands, stay: Sequence[int], move: Sequence[int], pieces: int, at_most: int | None = None
) -> _Lowered | None:
    """The bands between what stays on some ranks and what travels from some, cut into pieces; None if there are too many."""
    q_layout, k_layout = (layout.merged(key.schedule.ulysses) for layout in (key.q_layout, key.k_layout))
    if key.travels == "kv":
        q_runs, k_runs = _runs(q_layout, stay, key.shift), _runs(k_layout, move, 0, pieces)
    else:
        q_runs, k_runs = _runs(q_layout, move, key.shift, pieces), _runs(k_layout, stay)
    if at_most is not None and not _few(bands, q_runs, k_runs, at_most):
        return None
    low = lower(bands, q_runs, k_runs)
    return low if key.travels == "kv" else low.transposed()


def _few(bands: Bands, q_runs: _Runs, k_runs: _Runs, at_most: int) -> bool:
    """Whether there are at most so many bands between the runs; counted from above, without making them."""
    r = bands.rows
    if len(r) > at_most:
        return False
    count = np.ones(len(r), np.int64)
    for runs, side in ((q_runs, 0), (k_runs, 2)):
        start = np.sort(runs.start)
        count *= 1 + np.searchsorted(start, r[:, side + 1]) - np.searchsorted(start, r[:, side])
    return int(count.sum()) <= at_most


class _Needs(NamedTuple):
    """What does not depend on when things travel: see _World."""

    bands: Bands
    low: _Lowered | None
    takes: dict[int, Ranges] | None


@lru_cache(maxsize=64)
def _world(key: PlanKey) -> _World:
    """The world of a key whose rank is 0."""
    schedule = key.schedule
    stay, move = key.moving()
    together = schedule.inner if schedule.name == "double_ring" else 1
    timeless = replace(key, schedule=Schedule(ulysses=schedule.ulysses), returns=False)
    parts = schedule.pieces or 1
    if not schedule.pieces and 1 < together < stay.world:
        rows, most = (BACKWARD_PIECE_ROWS, MOST_BACKWARD_PIECES) if key.returns else (PIECE_ROWS, MOST_PIECES)
        parts = min(max(max(move.lengths) // rows, 1), most)
        # No more pieces than that it is still known what is needed of them, if it is of whole chunks.
        known = (n for n in range(parts, 0, -1) if _needs(timeless, together, _halved(n, together)).low is not None)
        parts = next(known, parts)
    pieces = _halved(parts, together)
    return _World(key, stay.world, together, pieces, parts, *_needs(timeless, together, pieces))


def _halved(parts: int, together: int) -> int:
    """The pieces of which a double ring makes so many parts."""
    return 2 * parts if together > 1 and parts > 1 else parts


@lru_cache(maxsize=64)
def _needs(key: PlanKey, together: int, pieces: int) -> _Needs:
    stay, move = key.moving()
    everyone = range(stay.world)
    bands = key.mask.bands((key.shift, key.k_layout.seqlen), (0, key.k_layout.seqlen))
    # Between strided runs every rank needs nearly everything, so working that out is not worth it.
    if not key.trim or any(run.stride > 1 for layout in (stay, move) for runs in layout.ranks for run in runs):
        return _Needs(bands, None, None)
    low = _bands_between(key, bands, everyone, everyone, pieces, KNOWN_UP_TO)
    if low is None:
        return _Needs(bands, None, None)
    groups = low.q_piece // together * (stay.world * pieces)
    return _Needs(bands, low, _reach(low, groups + low.k_piece, key.max_gap))


def _rows_taken(world: _World, rank: int, pieces: Sequence[int]) -> int:
    """Of these pieces: the rows that a ring rank's stages hold, also where the world does not know them."""
    if world.takes is not None or not world.key.trim or world.together > 1:
        return int(world.rows(rank)[pieces].sum())
    if not pieces:
        return 0
    low = world.lowered([rank], sorted({piece // world.pieces for piece in pieces}))
    found = _reach(low, low.k_piece, world.key.max_gap)
    return sum([b - a for piece in pieces for a, b in found.get(piece, ())])


def steps_of(key: PlanKey) -> IntArray:
    """(rings, rings): the last step in which a rank computes on an owner's chunk; 0 for its own, and for what it needs not."""
    world = _world(replace(key, rank=0))
    steps = np.zeros((world.rings, world.rings), np.int64)
    for rank, found in enumerate(world.steps):
        for piece, step in found.items():
            steps[rank, piece // world.pieces] = max(step, steps[rank, piece // world.pieces])
    return steps


@lru_cache(maxsize=512)
def make_plan(key: PlanKey) -> Plan:
    """The plan of one rank. Cached: every layer and every pass with the same key uses the same object."""
    ulysses = key.schedule.ulysses
    rank, member = divmod(key.rank, ulysses)
    world = _world(replace(key, rank=0))
    rings, together, pieces = world.rings, world.together, world.pieces
    everyone, own = range(rings), range(rank * pieces, (rank + 1) * pieces)
    group = range(rank // together * together, rank // together * together + together)
    if world.low is not None:
        low = world.low.where(world.low.q_piece == rank)
        assert world.takes is not None
        takes = world.takes
    elif key.trim and together == 1:
        low, theirs = world.lowered([rank], everyone), world.lowered(everyone, [rank])
        takes = _reach(low, rank * (rings * pieces) + low.k_piece, key.max_gap)
        takes |= _reach(theirs, theirs.q_piece * (rings * pieces) + theirs.k_piece, key.max_gap)
    else:
        low = world.lowered([rank], everyone)
        lengths = key.moving()[1].lengths
        whole = [(n * p // pieces, n * (p + 1) // pieces) for n in lengths for p in range(pieces)]
        takes = {g * len(whole) + i: (a,) for g in range(rings // together) for i, a in enumerate(whole) if a[0] < a[1]}
    nowhere = Way(-1, -1, False)
    ways = [nowhere, *world.ways, *([nowhere] if world.ends_local else [])]
    n_steps = len(ways)
    # The same slots on every rank, also where a rank has nothing to move: collective transports need all to take part.
    posts: list[dict[int, list[Transfer]]] = [{s: [] for s in range(1, n_steps) if ways[s].slot == at} for at in range(n_steps)]
    homes: list[dict[int, list[Transfer]]] = [
        {s: [] for s in range(1, n_steps) if ways[s].home == at} for at in range(n_steps + 1)
    ]

    def taken(dest: int, piece: int) -> Ranges:
        return takes.get(dest // together * (rings * pieces) + piece, ())

    def add(dest: int, piece: int, rows: Ranges) -> None:
        if rows and (step := world.steps[dest].get(piece)) is not None:
            source = world.source(dest, piece)
            posts[ways[step].slot][step].append(Transfer(step, piece // pieces, source, dest, rows))
            homes[ways[step].home][step].append(Transfer(step, piece // pieces, dest, source, rows))

    for piece in world.steps[rank]:
        add(rank, piece, taken(rank, piece))
    for dest in everyone:
        for piece in own:
            if dest != rank and world.source(dest, piece) == rank:
                add(dest, piece, taken(dest, piece))
    for dest in group if together > 1 else ():  # chunks of other groups that this rank passes on inside its own
        for piece in range(rings * pieces) if dest != rank else ():
            if piece // pieces // together != rank // together and world.source(dest, piece) == rank:
                add(dest, piece, taken(dest, piece))
    steps = _steps(world, low, rank, taken)
    members = slice(rank * ulysses, (rank + 1) * ulysses)
    if key.travels == "q":
        steps = [replace(step, parts=tuple(part.transposed() for part in step.parts)) for step in steps]
    in_order, at_home = (
        tuple(tuple(Post(step, tuple(sorted(ts))) for step, ts in sorted(slot.items())) for slot in slots)
        for slots in (posts, homes)
    )
    return Plan(
        key=key,
        rank=rank,
        member=member,
        rings=rings,
        q_lengths=key.q_layout.lengths[members],
        k_lengths=key.k_layout.lengths[members],
        shares=head_shares(key.heads, key.kv_heads, ulysses),
        steps=tuple(steps),
        far=tuple(way.far for way in ways),
        posts=in_order,
        homes=at_home,
    )


def _steps(world: _World, low: _Lowered, rank: int, taken: Callable[[int, int], Ranges]) -> list[Step]:
    """A rank's steps: the local one, and one for every stage."""
    order = np.argsort(low.k_piece, kind="stable")
    found, first = np.unique(low.k_piece[order], return_index=True)
    bands = dict(zip(found.tolist(), np.split(order, first)[1:], strict=True))
    nothing = np.empty(0, np.int64)
    own = ((0, world.key.moving()[1].lengths[rank]),)
    local = low.where(low.k_piece == rank)
    if world.pieces > 1:
        uncut = _bands_between(world.key, world.bands, [rank], [rank], 1)
        assert uncut is not None
        local = uncut
    last: list[Step] = []
    if world.ends_local:
        local, rest = _cut(local, LOCAL_FIRST[world.key.travels], keys_travel=world.key.travels == "kv")
        last = [replace(_stage(rest, [_Load(rank, own, np.arange(len(rest.rows)))]), rows=0, chunks=(), local=True)]
    steps = [replace(_stage(local, [_Load(rank, own, np.arange(len(local.rows)))]), local=True)]
    for pieces in [*world.stages[rank], *[[]] * (len(world.ways) - len(world.stages[rank]))]:
        loads = [_Load(p // world.pieces, taken(rank, p), bands.get(p, nothing)) for p in pieces]
        steps.append(_stage(low, [load for load in loads if load.ranges]))
    return steps + last


LOCAL_FIRST = {"kv": 1 / 3, "q": 2 / 3}
"""The part of the local work that hides the first arrival; the rest hides the last gradients on their way home. Of K and V in 16
bits the gradients are twice as much, of Q and dO half as much."""


def _cut(low: _Lowered, share: float, keys_travel: bool) -> tuple[_Lowered, _Lowered]:
    """The bands below a key row and those from it on, such that about that share of the pairs lies below. In all but short
    chunks the row is on the edge of a kernel's tile, or of two, which a pair of CTAs takes.

    By key rows also where queries travel: a kernel adds a tile's dk and dv once per call, so both calls should not have the same
    tiles of keys. Cut by query rows, the local work of MHA at 64k tokens on four ranks takes 3 % longer (by its work lists).
    """
    begin, end = (2, 3) if keys_travel else (0, 1)

    def clipped(column: int, row: int) -> _Lowered:
        rows = low.rows.copy()
        rows[:, column] = np.minimum(rows[:, end], row) if column == end else np.maximum(rows[:, begin], row)
        tight, keep = tighten(rows)
        return low.where(keep)._replace(rows=tight)

    n = int(low.rows[:, end].max(initial=0))
    tile = next((tile for tile in (2 * TILE, TILE) if n >= 8 * tile), 1)
    first, last = 0, -(-n // tile)
    wanted = share * float(area(low.rows).sum())
    while first < last:
        middle = (first + last) // 2
        first, last = (first, middle) if area(clipped(end, middle * tile).rows).sum() >= wanted else (middle + 1, last)
    return clipped(end, first * tile), clipped(begin, first * tile)


def plans(key: PlanKey) -> Iterator[Plan]:
    """The plans of all ranks of a world."""
    return (make_plan(replace(key, rank=rank)) for rank in range(key.world))


# The backward pass


class RowBytes(NamedTuple):
    """Bytes of one row of what travels in a backward pass, over all heads of a ring rank: on its way out, and home."""

    out: int
    home: int


def row_bytes(plan: Plan, travels: str, head_dim: int, head_dim_v: int, dtype_bytes: int) -> RowBytes:
    """K and V, and their gradients in float32; or Q, dO, log-sum-exp and delta, and dQ in float32."""
    acc = 8 if dtype_bytes == 8 else 4
    if travels == "kv":
        heads = sum(share.kv_heads for share in plan.shares)
        return RowBytes(heads * (head_dim + head_dim_v) * dtype_bytes, heads * (head_dim + head_dim_v) * acc)
    heads = plan.key.heads
    return RowBytes(heads * query_row_bytes(head_dim + head_dim_v, dtype_bytes), heads * head_dim * acc)


ROW_TAIL = 16
"""Bytes behind a row of Q and dO: log-sum-exp and delta, with what keeps rows aligned."""


def query_row_bytes(dims: int, dtype_bytes: int) -> int:
    """Bytes of one row and head of Q, dO, log-sum-exp and delta side by side. dims: elements of Q and dO."""
    return (-(-dims * dtype_bytes // ROW_TAIL) + 1) * ROW_TAIL


UNEVEN = 1.02
"""With what travels, it changes which rank computes what. So much more work for the busiest one is not worth fewer bytes."""


class Traffic(NamedTuple):
    """A backward pass with one thing travelling: bytes that all ranks receive, and the busiest ring rank's pairs."""

    nbytes: int
    busiest: int


@lru_cache(maxsize=512)
def traffic(plan: Plan, travels: str, head_dim: int, head_dim_v: int, dtype_bytes: int) -> Traffic:
    """What a backward pass of the whole world would move, if K and V travelled ("kv") or Q ("q")."""
    world = _world(replace(plan.key, rank=0, travels=travels, returns=plan.rings > 1))
    row = row_bytes(plan, travels, head_dim, head_dim_v, dtype_bytes)
    return Traffic(world.rows_moved * (row.out + row.home), world.busiest)


@lru_cache(maxsize=512)
def _backward(plan: Plan, head_dim: int, head_dim_v: int, dtype_bytes: int, takes_delta: bool) -> Plan:
    travels = plan.key.schedule.travels
    if travels == "auto":
        travels = "kv"
        if takes_delta and plan.rings > 1:
            kv, q = (traffic(plan, travels, head_dim, head_dim_v, dtype_bytes) for travels in ("kv", "q"))
            travels = "q" if q.nbytes < kv.nbytes and q.busiest <= UNEVEN * kv.busiest else "kv"
    home = row_bytes(plan, travels, head_dim, head_dim_v, dtype_bytes).home // len(plan.shares)
    few, many = BACKWARD_ROWS
    rows = min(plan.key.schedule.rows, many if many * home <= BACKWARD_BYTES else few)
    schedule = replace(plan.key.schedule, rows=rows)
    return make_plan(replace(plan.key, schedule=schedule, travels=travels, returns=plan.rings > 1))
