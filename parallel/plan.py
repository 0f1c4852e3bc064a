"""Plans: for one mask, layout, world and shape, what one rank computes and what it moves, step by step.

A plan is pure integer arithmetic on the host: it holds no tensors and sends nothing. The running code (autograd.py and the
transports) has no ifs about mask, layout or schedule; it does what the plan says.

Words. A *rank* here is a rank of the ring: with Ulysses of degree U, every U neighbouring ranks of the group first trade heads
for sequence and then act as one ring rank per head share (heads.py). A *chunk* is what one rank owns of what
travels: of K and V or, in a backward pass where that is fewer bytes, of Q and what belongs to its rows. A chunk may travel in
*pieces*.
A *step* computes on one *stage*: one or several arrived chunks side by side in one buffer. Step 0 is the local chunk.
A *slot* is a moment at which transfers are posted: slot n comes after step n's chunks have arrived and before step n is computed.
Steps and slots are the same on all ranks, but a rank has only what it needs in them, as early as its schedule allows.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from ringflash.parallel.lower import Lowered, Part, Ranges, parts_of, reach
from ringflash.parallel.world import TILE, PlanKey, Way, World, bands_between, world_of
from ringflash.slices import IntArray, area, tighten

LATE = 1 / 2
"""Nobody waits for gradients that cross slow links before as many steps are over as so much of a chunk takes in blocks of a
double ring, near steps between them not counted. The other side may have to wait for this one's pieces first, and kernels that
wait for it hold up what it is waiting for. Causal, two nodes of two ranks, over the time that the bytes take on the slow link
(gloo, sleeping kernels, a shaped link; 8 or 32 key heads; all near steps last): 4 pieces and one block 1.14, 1.19, two blocks
1.12, 1.16; 8 pieces and one block 1.15, 1.14, four blocks 1.06, 1.09. What has not arrived takes memory."""


BACKWARD_ROWS = (16_384, 32_768)


BACKWARD_BYTES = 256 << 20
"""Rows to which "auto" fills stages of a backward pass: gradients leave stage by stage, and the last ones should not be all of
them. The larger number where a rank's gradients of so many rows, of one batch entry, are no more bytes than this. Fewer, larger
calls have fewer ends at which multiprocessors run out of work: on 4 H200 at 64k tokens and 8 key heads two remote stages
instead of three took 50.8 instead of 52.2 ms."""


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

    @cached_property
    def shares_keys(self) -> bool:
        """Whether some key head's gradient is a sum over Ulysses members, as it is wherever one of them lays keys out per query
        head."""
        return sum(share.traded(keys=True) for share in self.shares) > self.key.kv_heads

    def of_one_group(self, groups: int | None = None) -> Plan:
        """The plan that each of so many groups of heads goes through; None: as many as the key says."""
        return _of_one_group(self, self.key.groups if groups is None else groups)

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
        from ringflash.parallel.cost import predict
        from ringflash.parallel.explain import explain
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
        world = world_of(replace(self.key, rank=0))
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
        return world_of(replace(self.key, rank=0)).longest_stage

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
        return max(int(LATE * world_of(replace(self.key, rank=0)).parts), 1)

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


class _Load(NamedTuple):
    """What a stage takes of one chunk, and which bands lie in it."""

    owner: int
    ranges: Ranges
    bands: IntArray


def _stage(low: Lowered, loads: Sequence[_Load]) -> Step:
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
    return Step(offset, tuple(placed), parts_of(np.concatenate(rows), np.concatenate(residue), low.modulus))


def _rows_taken(world: World, rank: int, pieces: Sequence[int]) -> int:
    """Of these pieces: the rows that a ring rank's stages hold, also where the world does not know them."""
    if world.takes is not None or not world.key.trim or world.together > 1:
        return int(world.rows(rank)[pieces].sum())
    if not pieces:
        return 0
    low = world.lowered([rank], sorted({piece // world.pieces for piece in pieces}))
    found = reach(low, low.k_piece, world.key.max_gap)
    return sum([b - a for piece in pieces for a, b in found.get(piece, ())])


@lru_cache(maxsize=1024)
def _of_one_group(plan: Plan, groups: int) -> Plan:
    return plan if groups == 1 else make_plan(plan.key.of_one_group(groups))


def steps_of(key: PlanKey) -> IntArray:
    """(rings, rings): the last step in which a rank computes on an owner's chunk; 0 for its own, and for what it needs not."""
    world = world_of(replace(key, rank=0))
    steps = np.zeros((world.rings, world.rings), np.int64)
    for rank, found in enumerate(world.steps):
        for piece, step in found.items():
            steps[rank, piece // world.pieces] = max(step, steps[rank, piece // world.pieces])
    return steps


@lru_cache(maxsize=512)
def make_plan(key: PlanKey) -> Plan:
    """The plan of one rank. Cached: every layer and every pass with the same key uses the same object."""
    ulysses, _ = key.schedule.ulysses, key.groups  # which raises
    rank, member = divmod(key.rank, ulysses)
    world = world_of(replace(key, rank=0))
    rings, together, pieces = world.rings, world.together, world.pieces
    everyone, own = range(rings), range(rank * pieces, (rank + 1) * pieces)
    group = range(rank // together * together, rank // together * together + together)
    if world.low is not None:
        low = world.low.where(world.low.q_piece == rank)
        assert world.takes is not None
        takes = world.takes
    elif key.trim and together == 1:
        low, theirs = world.lowered([rank], everyone), world.lowered(everyone, [rank])
        takes = reach(low, rank * (rings * pieces) + low.k_piece, key.max_gap)
        takes |= reach(theirs, theirs.q_piece * (rings * pieces) + theirs.k_piece, key.max_gap)
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


def _steps(world: World, low: Lowered, rank: int, taken: Callable[[int, int], Ranges]) -> list[Step]:
    """A rank's steps: the local one, and one for every stage."""
    order = np.argsort(low.k_piece, kind="stable")
    found, first = np.unique(low.k_piece[order], return_index=True)
    bands = dict(zip(found.tolist(), np.split(order, first)[1:], strict=True))
    nothing = np.empty(0, np.int64)
    own = ((0, world.key.moving()[1].lengths[rank]),)
    local = low.where(low.k_piece == rank)
    if world.pieces > 1:
        uncut = bands_between(world.key, world.bands, [rank], [rank], 1)
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


def _cut(low: Lowered, share: float, keys_travel: bool) -> tuple[Lowered, Lowered]:
    """The bands below a key row and those from it on, such that about that share of the pairs lies below. In all but short
    chunks the row is on the edge of a kernel's tile, or of two, which a pair of CTAs takes.

    By key rows also where queries travel: a kernel adds a tile's dk and dv once per call, so both calls should not have the same
    tiles of keys. Cut by query rows, the local work of MHA at 64k tokens on four ranks takes 3 % longer (by its work lists).
    """
    begin, end = (2, 3) if keys_travel else (0, 1)

    def clipped(column: int, row: int) -> Lowered:
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
    world = world_of(replace(plan.key, rank=0, travels=travels, returns=plan.rings > 1))
    row = row_bytes(plan, travels, head_dim, head_dim_v, dtype_bytes)
    return Traffic(world.rows_moved * (row.out + row.home), world.busiest)


def ring_bytes(plan: Plan, head_dim: int, head_dim_v: int, dtype_bytes: int, takes_delta: bool) -> int:
    """Bytes that all ranks receive in a forward and a backward pass of a ring."""
    forward = world_of(replace(plan.key, rank=0)).rows_moved * row_bytes(plan, "kv", head_dim, head_dim_v, dtype_bytes).out
    back = plan.backward(head_dim, head_dim_v, dtype_bytes, takes_delta)
    return forward + traffic(plan, back.key.travels, head_dim, head_dim_v, dtype_bytes).nbytes


def exchange_bytes(plan: Plan, head_dim: int, head_dim_v: int, dtype_bytes: int) -> int:
    """The same where all ranks trade heads and share none: q, k, v and dO on the way in, out and dq, dk, dv on the way home."""
    key, dims = plan.key, head_dim + head_dim_v
    elements = 2 * dims * (key.q_layout.seqlen * key.heads + key.k_layout.seqlen * key.kv_heads)
    return elements * dtype_bytes * (key.world - 1) // key.world


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
