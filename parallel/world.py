"""What all ranks of a world share: who needs what of whom, and when it travels.

Plans of single ranks (plan.py, where the words are explained) are cut from it, so what one rank sends is what another awaits.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ringflash.mask import Bands, Mask
from ringflash.parallel.layout import Layout
from ringflash.parallel.lower import Lowered, Ranges, Runs, lower, reach, runs_of
from ringflash.parallel.schedule import GROUP_ROWS, MOST_GROUPS, Schedule
from ringflash.slices import IntArray, area

TILE = 128
"""Rows and keys of most kernels' tiles."""


MAX_GAP = TILE
"""A message costs some 20 us, in which a link moves thousands of rows; one kernel tile keeps the waste invisible."""


PIECE_ROWS, MOST_PIECES = 8192, 4
"""A double ring cuts chunks into up to four pieces of at least so many rows: the slow link then carries one while another is
computed. Smaller pieces would only be more kernel calls."""


BACKWARD_PIECE_ROWS, MOST_BACKWARD_PIECES = 2048, 8
"""The same for a backward pass, where a piece's gradients cannot leave before the piece has come: the link is idle meanwhile. 64k
tokens over two emulated hosts of two H200, 8 Gbit/s between them, over the time of the bytes, with 8 and 32 key heads: 4 pieces
1.14 to 1.15 and 1.10 to 1.11, 8 (so many rows) 1.10 to 1.11 and 1.06 to 1.13, 16 1.06 and 1.04 to 1.06. But a rank's kernels take
2 to 5 % longer in 8 pieces than in 4, the same with few heads, and 6 to 16 % in 16."""


KNOWN_UP_TO = 1 << 20
"""Bands between everybody and everybody that are worth working out, to know what other ranks need and when (0.3 s of numpy)."""


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

    @property
    def groups(self) -> int:
        """Groups of heads, one after the other, if no memory budget asks for more. Raises ValueError if that many cannot be."""
        schedule = self.schedule
        schedule.check_groups(self.heads, self.kv_heads)
        if schedule.head_groups:
            return schedule.head_groups
        if schedule.ulysses == 1 or schedule.ulysses < self.world or self.kv_heads % schedule.ulysses:
            return 1
        rows = self.q_layout.seqlen * (self.heads // schedule.ulysses)
        own = self.kv_heads // schedule.ulysses
        return max(n for n in range(1, MOST_GROUPS + 1) if n == 1 or (own % n == 0 and rows // n >= GROUP_ROWS))

    def of_one_group(self, groups: int) -> PlanKey:
        """The key of a part of the heads."""
        assert self.heads % groups == 0 == self.kv_heads % groups
        schedule = replace(self.schedule, head_groups=1)
        return replace(self, heads=self.heads // groups, kv_heads=self.kv_heads // groups, schedule=schedule)

    def moving(self) -> tuple[Layout, Layout]:
        """The layouts, over the ring's ranks, of what stays and of what travels."""
        q, k = (layout.merged(self.schedule.ulysses) for layout in (self.q_layout, self.k_layout))
        return (q, k) if self.travels == "kv" else (k, q)


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


def _double_ring(world: World) -> tuple[list[list[list[int]]], list[Way]]:
    """The stages of every rank, and the ways of their steps: blocks in which what crosses the slow links is followed by what the
    neighbours pass on, and steps on what the neighbours own, as far as the rank itself sees it. Blocks that nobody of a group
    needs do not exist."""
    inner, everyone, n, returns, spare = world.together, range(world.rings), world.parts, world.key.returns, world.spares_step

    def pieces_of(owner: int) -> range:
        return range(owner * world.pieces, (owner + 1) * world.pieces)

    @cache
    def parts(group: int, owner: int) -> list[list[int]]:
        return _evenly(pieces_of(owner), n, world.rows(group * inner))

    def seen(rank: int, owner: int) -> list[list[int]]:
        return _evenly([piece for piece in pieces_of(owner) if world.sees(rank, piece)], n, world.rows(rank))

    def neighbours(rank: int) -> list[int]:
        return [rank // inner * inner + (rank - hop) % inner for hop in range(1, inner)]

    near = [[part for owner in neighbours(rank) for part in seen(rank, owner)] for rank in everyone]
    if spare:  # of the last but one: cut into more parts throughout, neighbours would not be done with each at the same time
        near = [[*of[:-2], of[-2][: len(of[-2]) // 2], of[-2][len(of[-2]) // 2 :], of[-1]] for of in near]
    far: list[list[list[int]]] = []
    for rank in everyone:
        far.append([])
        for group in ((rank // inner - d) % (world.rings // inner) for d in range(1, world.rings // inner)):
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
class World:
    """What the plans of all ranks have in common. ``key`` is that of rank 0."""

    key: PlanKey
    rings: int
    together: int
    """Ring ranks that take the same rows of a piece, all that any of them needs, so that they can pass them on unchanged."""
    pieces: int
    parts: int
    """In which a double ring takes what it needs of a chunk: twice as many pieces, since some need but half of them."""
    bands: Bands
    low: Lowered | None
    """Bands between everybody and everybody, where these were worth working out."""
    takes: dict[int, Ranges] | None
    """What is taken, by group of receivers times number of pieces plus piece; None if whole chunks are, or if it is not known."""

    @cached_property
    def itineraries(self) -> tuple[list[list[list[int]]], list[Way]]:
        """By ring rank and step - 1: the pieces of a stage. By step - 1: its way, the same for all ranks."""
        schedule = self.key.schedule
        if schedule.name == "double_ring":
            return _double_ring(self)
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
    def spares_step(self) -> bool:
        """Whether a double ring computes one more step on what a neighbour owns while its last gradients cross slow links."""
        return self.key.returns and self.parts > 1 and 1 < self.together < self.rings and not self.keeps_local

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

    def lowered(self, stay: Sequence[int], move: Sequence[int]) -> Lowered:
        """The bands between what stays on some ranks and what travels from some."""
        low = bands_between(self.key, self.bands, stay, move, self.pieces)
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


def bands_between(
    key: PlanKey, bands: Bands, stay: Sequence[int], move: Sequence[int], pieces: int, at_most: int | None = None
) -> Lowered | None:
    """The bands between what stays on some ranks and what travels from some, cut into pieces; None if there are too many."""
    q_layout, k_layout = (layout.merged(key.schedule.ulysses) for layout in (key.q_layout, key.k_layout))
    if key.travels == "kv":
        q_runs, k_runs = runs_of(q_layout, stay, key.shift), runs_of(k_layout, move, 0, pieces)
    else:
        q_runs, k_runs = runs_of(q_layout, move, key.shift, pieces), runs_of(k_layout, stay)
    if at_most is not None and not _few(bands, q_runs, k_runs, at_most):
        return None
    low = lower(bands, q_runs, k_runs)
    return low if key.travels == "kv" else low.transposed()


def _few(bands: Bands, q_runs: Runs, k_runs: Runs, at_most: int) -> bool:
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
    """What does not depend on when things travel: see World."""

    bands: Bands
    low: Lowered | None
    takes: dict[int, Ranges] | None


@lru_cache(maxsize=64)
def world_of(key: PlanKey) -> World:
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
    return World(key, stay.world, together, pieces, parts, *_needs(timeless, together, pieces))


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
    low = bands_between(key, bands, everyone, everyone, pieces, KNOWN_UP_TO)
    if low is None:
        return _Needs(bands, None, None)
    groups = low.q_piece // together * (stay.world * pieces)
    return _Needs(bands, low, reach(low, groups + low.k_piece, key.max_gap))
