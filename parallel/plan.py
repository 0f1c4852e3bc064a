"""Plans: for one mask, layout, world and shape, what one rank computes and what it moves, step by step.

A plan is pure integer arithmetic on the host: it holds no tensors and sends nothing. The running code (autograd.py and the
transports) has no ifs about mask, layout or schedule; it does what the plan says.

Words. A *rank* here is a rank of the ring: with Ulysses of degree U, every U neighbouring ranks of the group first trade heads
for sequence and then act as one ring rank per head share (section "heads" below). A *chunk* is what one rank owns of K and V.
A *step* computes on one *stage*: one or several arrived chunks side by side in one key buffer. Step 0 is the local chunk.
A *slot* is a moment at which transfers are posted: slot n comes after step n's chunks have arrived and before step n is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from ringflash.mask import Bands, Mask, overlaps
from ringflash.parallel.layout import Layout
from ringflash.slices import UNBOUNDED, IntArray, Slices, area, tighten

SCHEDULES = ("auto", "ring", "allgather", "staged", "ulysses", "hybrid", "double_ring")


MAX_GAP = 128
"""A message costs some 20 us, in which a link moves thousands of rows; one kernel tile keeps the waste invisible."""


COALESCE_UP_TO = 4096
"""Slices of a stage that are worth joining. Longer tables (thousands of documents, striped) hardly shrink and cost seconds."""


@dataclass(frozen=True)
class Schedule:
    """In which order and grouping chunks arrive.

    name      ring: one remote chunk a step. allgather: all remote chunks in one step. staged: ``stage`` chunks a step.
              double_ring: rings of ``inner`` fast-linked neighbours, inside a ring of such groups: every chunk crosses the slow
              links once per group and then travels inside it (BurstEngine, LoongTrain).
    stage     remote chunks per step.
    ulysses   ranks that trade heads for sequence before the ring (DeepSpeed Ulysses; with a ring: USP, Fang & Zhao 2024).
    inner     ranks of a fast-linked group (double_ring).
    """

    name: str = "ring"
    stage: int = 1
    ulysses: int = 1
    inner: int = 1

    def __str__(self) -> str:
        extra = [f"{key}={value}" for key in ("stage", "ulysses", "inner") if (value := getattr(self, key)) != 1]
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
    if schedule.stage < 1:
        raise ValueError(f"a stage needs at least one chunk, got stage={schedule.stage}")
    return schedule


class Route(NamedTuple):
    """How a rank gets a chunk: posted at ``slot`` by ``source``, computed in ``step``; its gradient leaves at ``home_slot``."""

    step: int
    slot: int
    source: int
    home_slot: int


def route(schedule: Schedule, rings: int, rank: int, owner: int) -> Route:
    """The way of ``owner``'s chunk to ``rank`` (different ring ranks). Gradients go back to ``source`` at ``home_slot``."""
    if schedule.name != "double_ring":
        step = -(-((rank - owner) % rings) // schedule.stage)
        return Route(step, step - 1, owner, step)
    inner = schedule.inner
    outer_hops = (rank // inner - owner // inner) % (rings // inner)
    inner_hops = (rank - owner) % inner
    step = outer_hops * inner + inner_hops
    if inner_hops == 0:  # over the slow links, straight from the owner, with a whole inner ring to hide behind
        return Route(step, step - inner, owner, step + inner if inner > 1 else step)
    return Route(step, step - 1, rank // inner * inner + owner % inner, step)


Ranges = tuple[tuple[int, int], ...]
"""Disjoint ascending row ranges ``[start, stop)`` of an owner's key buffer."""


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
    """What is posted together: the transfers of all chunks that are computed in one step (by whoever receives them)."""

    step: int
    transfers: tuple[Transfer, ...]


class Chunk(NamedTuple):
    """Where a chunk's ``ranges`` stand in a stage's key buffer: one after the other from row ``offset``."""

    owner: int
    offset: int
    ranges: Ranges


class View(NamedTuple):
    """Rows ``start::step`` of a buffer; dilated masks are bands only between such views."""

    start: int
    step: int


@dataclass(frozen=True)
class Part:
    """One kernel call: the Slices between a view of the query buffer and a view of the stage's key buffer (in view indices)."""

    q_view: View
    k_view: View
    slices: Slices


@dataclass(frozen=True)
class Step:
    """One stage: ``rows`` keys in its buffer, the chunks in it, and what to compute on it."""

    rows: int
    chunks: tuple[Chunk, ...]
    parts: tuple[Part, ...]

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

    @property
    def world(self) -> int:
        return self.q_layout.world


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
    posts: tuple[tuple[Post, ...], ...]  # by slot: this rank's sends and receives of K, V
    homes: tuple[tuple[Transfer, ...], ...]  # by slot, one more than steps: sends and receives of dK, dV

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

    def explain(self, device: str = "cuda", batch: int = 1, head_dim: int = 128, dtype_bytes: int = 2) -> str:
        """The plan with its predicted times, bytes and memory on "cuda" or "cpu", as text (see cost.py)."""
        from ringflash.parallel.cost import explain, predict
        from ringflash.parallel.tables import measured

        tables = measured(device)
        forecast = predict(self, tables.device, tables.link, batch=batch, head_dim=head_dim, dtype_bytes=dtype_bytes)
        return explain(self, forecast, source=tables.source)

    def of_peer(self, rank: int) -> Plan:
        """The plan of another ring rank."""
        return make_plan(replace(self.key, rank=self.peer(rank)))

    @cached_property
    def area(self) -> int:
        """Visible pairs of this rank, per head."""
        return sum(step.area for step in self.steps)

    def rows_received(self) -> int:
        """Key rows that reach this rank in a forward pass."""
        return sum(
            b - a for slot in self.posts for post in slot for t in post.transfers if t.dest == self.rank for a, b in t.ranges
        )

    def rows_sent(self) -> int:
        """Key rows this rank sends in a forward pass."""
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
    """Runs of several ranks as columns; ``offset`` is a run's first row in its rank's buffer."""

    start: IntArray
    length: IntArray
    stride: IntArray
    offset: IntArray
    rank: IntArray


def _runs(layout: Layout, ranks: list[int], shift: int = 0) -> _Runs:
    rows = []
    for rank in ranks:
        offset = 0
        for run in layout.ranks[rank]:
            rows.append((run.start + shift, run.length, run.stride, offset, rank))
            offset += run.length
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


class _Lowered(NamedTuple):
    """Bands in buffer rows: ``rows`` (n, 6) of q0, q1, k0, k1, lo, hi; ``residue`` of j - i modulo ``modulus``; owners."""

    rows: IntArray
    residue: IntArray
    modulus: int
    q_rank: IntArray
    k_rank: IntArray


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
    return _Lowered(tight, residue[pick], modulus, q_runs.rank[iq[pick]], k_runs.rank[ik[pick]])


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


def _stage(low: _Lowered, by_owner: dict[int, IntArray], chunks: list[tuple[int, Ranges]]) -> Step:
    """A stage of the given chunks: ranges side by side in one buffer, and the bands (``by_owner``: their rows) moved there."""
    placed, rows, residue, offset = [], [], [], 0
    for owner, ranges in chunks:
        placed.append(Chunk(owner, offset, ranges))
        starts, stops = np.array(ranges, dtype=np.int64).reshape(-1, 2).T
        mine = by_owner.get(owner, np.empty(0, np.int64))
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


@lru_cache(maxsize=512)
def make_plan(key: PlanKey) -> Plan:
    """The plan of one rank. Cached: every layer and every pass with the same key uses the same object."""
    schedule, ulysses = key.schedule, key.schedule.ulysses
    q_layout, k_layout = key.q_layout.merged(ulysses), key.k_layout.merged(ulysses)
    rings = q_layout.world
    rank, member = divmod(key.rank, ulysses)
    shift = key.k_layout.seqlen - key.q_layout.seqlen
    bands = key.mask.bands((shift, key.k_layout.seqlen), (0, key.k_layout.seqlen))
    everyone = list(range(rings))
    # With a double ring all ranks of a fast-linked group take what any of them needs, so that they can pass it on unchanged.
    together = schedule.inner if schedule.name == "double_ring" else 1
    group = list(range(rank // together * together, rank // together * together + together))
    # Between strided runs every rank needs nearly everything, so a union of needs is not worth computing.
    trim = key.trim and (together == 1 or all(run.stride == 1 for runs in k_layout.ranks for run in runs))
    keys = _runs(k_layout, everyone)
    low = lower(bands, _runs(q_layout, [rank], shift), keys)
    if trim:
        mine = low if together == 1 else lower(bands, _runs(q_layout, group, shift), keys)
        theirs = lower(bands, _runs(q_layout, everyone, shift), _runs(k_layout, [rank]))
        by_owner, by_group = _reach(mine, mine.k_rank, key.max_gap), _reach(theirs, theirs.q_rank // together, key.max_gap)
        wanted = {owner: by_owner.get(owner, ()) for owner in everyone if owner != rank}
        asked = {dest: by_group.get(dest // together, ()) for dest in everyone if dest != rank}
    else:
        whole: list[Ranges] = [((0, n),) if n else () for n in k_layout.lengths]
        wanted = {owner: whole[owner] for owner in everyone if owner != rank}
        asked = {dest: whole[rank] for dest in everyone if dest != rank}
    # The same steps and slots on every rank, also where a rank has nothing to move: collective transports need all to take part.
    ways = sorted({route(schedule, rings, rank, owner)[:2] for owner in wanted})
    n_steps = 1 + max((step for step, _ in ways), default=0)
    posts: list[dict[int, list[Transfer]]] = [{step: [] for step, at in ways if at == slot} for slot in range(n_steps)]
    homes: list[list[Transfer]] = [[] for _ in range(n_steps + 1)]
    stages: list[list[tuple[int, Ranges]]] = [[] for _ in range(n_steps)]

    def add(dest: int, owner: int, rows: Ranges) -> None:
        if rows:
            way = route(schedule, rings, dest, owner)
            posts[way.slot][way.step].append(Transfer(way.step, owner, way.source, dest, rows))
            homes[way.home_slot].append(Transfer(way.step, owner, dest, way.source, rows))

    # Receives in the order of the ring, so that the nearest predecessor's chunk comes first in a stage.
    for distance in range(1, rings):
        owner = (rank - distance) % rings
        add(rank, owner, wanted[owner])
        if wanted[owner]:
            stages[route(schedule, rings, rank, owner).step].append((owner, wanted[owner]))
    for distance in range(1, rings):
        dest = (rank + distance) % rings
        if route(schedule, rings, dest, rank).source == rank:
            add(dest, rank, asked[dest])
    for owner in everyone if together > 1 else ():  # chunks of other groups that this rank passes on inside its own
        if owner % together == rank % together and owner // together != rank // together:
            for dest in group:
                if dest != rank:
                    add(dest, owner, wanted[owner])
    order = np.argsort(low.k_rank, kind="stable")
    owners, first = np.unique(low.k_rank[order], return_index=True)
    rows_of = dict(zip(owners.tolist(), np.split(order, first)[1:], strict=True))
    stages[0] = [(rank, ((0, k_layout.lengths[rank]),))]
    members = slice(rank * ulysses, (rank + 1) * ulysses)
    return Plan(
        key=key,
        rank=rank,
        member=member,
        rings=rings,
        q_lengths=key.q_layout.lengths[members],
        k_lengths=key.k_layout.lengths[members],
        shares=head_shares(key.heads, key.kv_heads, ulysses),
        steps=tuple(_stage(low, rows_of, chunks) for chunks in stages),
        posts=tuple(tuple(Post(step, tuple(sorted(ts))) for step, ts in sorted(slot.items())) for slot in posts),
        homes=tuple(tuple(sorted(slot)) for slot in homes),
    )


def plans(key: PlanKey) -> Iterator[Plan]:
    """The plans of all ranks of a world."""
    return (make_plan(replace(key, rank=rank)) for rank in range(key.world))
