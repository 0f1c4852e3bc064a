"""The planner as arithmetic, by brute force on small sizes: what is computed, what moves, in which order, and how little."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from ringflash.mask import Dilated, Mask
from ringflash.parallel import world as world_module
from ringflash.parallel.heads import block_bytes
from ringflash.parallel.layout import Layout, make_layout
from ringflash.parallel.lower import Ranges
from ringflash.parallel.memory import Shape, traded_tensors
from ringflash.parallel.plan import (
    LOCAL_FIRST,
    Plan,
    Step,
    Transfer,
    exchange_bytes,
    head_shares,
    make_plan,
    plans,
    ring_bytes,
    row_bytes,
    traffic,
)
from ringflash.parallel.schedule import Schedule, make_schedule
from ringflash.parallel.world import PlanKey
from ringflash.simulated import SimulatedWorld
from ringflash.slices import Slices
from ringflash.testing import Case, draw, visibility


@dataclass(frozen=True)
class World:
    """All ranks' plans of a pass of a case, and what the mask shows pair by pair."""

    case: Case
    backward: bool = False

    @cached_property
    def mask(self) -> Mask:
        return self.case.build_mask()

    @cached_property
    def layouts(self) -> tuple[Layout, Layout]:
        case, layout = self.case, self.case.build_layout()
        if isinstance(layout, Layout):
            return layout, layout
        return make_layout(layout, case.q_len, case.world, self.mask), make_layout(layout, case.k_len, case.world, self.mask)

    @cached_property
    def plans(self) -> list[Plan]:
        """Of one Ulysses member of each ring rank: the members differ only in their heads."""
        case = self.case
        schedule = make_schedule(case.build_schedule(), case.world, case.ulysses, case.inner)
        key = PlanKey(self.mask, *self.layouts, schedule, case.heads, case.kv_heads, 0, case.trim, case.max_gap)
        found = [plan for plan in plans(key) if plan.member == 0]
        return [plan.backward(case.head_dim, case.head_dim_v, 4) for plan in found] if self.backward else found

    @property
    def turned(self) -> bool:
        """Whether queries travel."""
        return self.plans[0].key.travels == "q"

    @cached_property
    def visible(self) -> np.ndarray:
        return visibility(self.mask, self.case.q_len, self.case.k_len).numpy()

    @cached_property
    def undilated(self) -> np.ndarray:
        """What the mask would show without the strides of its dilated parts."""
        parts = [m for m in self.mask.parts() if not isinstance(m, Dilated)]
        reach = [Mask.window(m.size * m.stride - 1, m.size * m.stride - 1) for m in self._dilated if m.size is not None]
        seen = np.ones_like(self.visible)
        for mask in (*parts, *reach):
            seen &= visibility(mask, self.case.q_len, self.case.k_len).numpy()
        return seen

    @property
    def _dilated(self) -> list[Dilated]:
        return [m for m in self.mask.parts() if isinstance(m, Dilated)]

    @property
    def together(self) -> int:
        """Ring ranks that receive the same rows, to pass them on."""
        schedule = self.plans[0].key.schedule
        return schedule.inner if schedule.name == "double_ring" else 1

    def q_positions(self, rank: int) -> np.ndarray:
        return self.layouts[0].merged(self.plans[0].key.schedule.ulysses).positions(rank)

    def k_positions(self, rank: int) -> np.ndarray:
        return self.layouts[1].merged(self.plans[0].key.schedule.ulysses).positions(rank)

    def stays(self, rank: int) -> np.ndarray:
        return self.k_positions(rank) if self.turned else self.q_positions(rank)

    def travels(self, rank: int) -> np.ndarray:
        return self.q_positions(rank) if self.turned else self.k_positions(rank)

    def pairs(self, seen: np.ndarray, stays: np.ndarray, travels: np.ndarray) -> np.ndarray:
        """Of a matrix over queries and keys, what stays in rows and what travels in columns."""
        return seen.T[stays][:, travels] if self.turned else seen[stays][:, travels]

    def rows_of_stage(self, rank: int, step: Step) -> np.ndarray:
        """Positions of the rows of a step's buffer."""
        if step.local:
            return self.travels(rank)
        rows = np.full(step.rows, -1)
        for chunk in step.chunks:
            offset = chunk.offset
            for start, stop in chunk.ranges:
                rows[offset : offset + stop - start] = self.travels(chunk.owner)[start:stop]
                offset += stop - start
        assert (rows >= 0).all(), "every row of a stage's buffer is filled"
        return rows

    def painted(self, rank: int, step: Step) -> np.ndarray:
        """How often a step computes each (query position, key position) pair of the whole sequence."""
        seen = np.zeros_like(self.visible, dtype=int)
        q_all, k_all = self.stays(rank), self.rows_of_stage(rank, step)
        q_all, k_all = (k_all, q_all) if self.turned else (q_all, k_all)
        for part in step.parts:
            q, k = (x[v.start :: v.step] for x, v in ((q_all, part.q_view), (k_all, part.k_view)))
            i, j = np.arange(len(q))[:, None], np.arange(len(k))[None, :]
            for q0, q1, k0, k1, lo, hi in part.slices:
                assert 0 <= q0 < q1 <= len(q) and 0 <= k0 < k1 <= len(k), "a Slice stays inside its buffers"
                band = (q0 <= i) & (i < q1) & (k0 <= j) & (j < k1) & (lo <= j - i) & (j - i <= hi)
                np.add.at(seen, np.ix_(q, k), band)
        return seen


def sent(plan: Plan) -> Iterator[tuple[int, Transfer]]:
    """(slot, transfer) of everything a rank posts in a forward pass, sends and receives."""
    return ((slot, t) for slot, posts in enumerate(plan.posts) for post in posts for t in post.transfers)


def rows_of(ranges: tuple[tuple[int, int], ...]) -> set[int]:
    return {row for start, stop in ranges for row in range(start, stop)}


def filled(rows: set[int], max_gap: int) -> set[int]:
    """The rows and the gaps of at most max_gap between them."""
    ordered = sorted(rows)
    gaps = [range(a, b) for a, b in pairwise(ordered) if b - a - 1 <= max_gap]
    return rows.union(*gaps)


@cache
def drawn_world(seed: int, backward: bool) -> World:
    return World(draw(seed, max_len=48), backward)


def worlds(first: int, n: int) -> Iterator[World]:
    """Drawn worlds, half of them in their backward pass."""
    return (drawn_world(seed, seed % 2 == 1) for seed in range(first, first + n))


BATCHES = pytest.mark.parametrize("first", range(0, 600, 60))


@BATCHES
def test_every_visible_pair_is_computed_exactly_once(first: int) -> None:
    for world in worlds(first, 60):
        seen = sum(world.painted(p.rank, step) for p in world.plans for step in p.steps)
        assert np.array_equal(seen, world.visible.astype(int)), repr(world.case)
        assert sum(p.area for p in world.plans) == world.visible.sum(), repr(world.case)


@BATCHES
def test_nothing_empty_is_computed_or_moved(first: int) -> None:
    for world in worlds(first, 60):
        for plan in world.plans:
            for n, step in enumerate(plan.steps):
                for part in step.parts:
                    assert len(part.slices), "a kernel call without Slices"
                    assert Slices(part.slices.table) == part.slices, "Slices are tight"
                assert len(set(step.chunks)) == len(step.chunks), repr(world.case)
                assert n == 0 or plan.rank not in {chunk.owner for chunk in step.chunks}, repr(world.case)
                assert all(chunk.ranges and all(a < b for a, b in chunk.ranges) for chunk in step.chunks if n), repr(world.case)
            for _, t in sent(plan):
                assert t.source != t.dest and t.ranges and all(a < b for a, b in t.ranges), repr(world.case)
                assert list(t.ranges) == sorted(t.ranges)
                assert all(a[1] < b[0] for a, b in pairwise(t.ranges)), "touching ranges are one range"


@BATCHES
def test_sends_and_receives_meet_in_order(first: int) -> None:
    """Messages between two ranks are matched by their order alone."""
    for world in worlds(first, 60):
        lists = {
            "chunks": [[(slot, t) for slot, t in sent(p)] for p in world.plans],
            "gradients": [
                [(slot, t) for slot, posts in enumerate(p.homes) for post in posts for t in post.transfers] for p in world.plans
            ],
        }
        for what, of_rank in lists.items():
            for a in range(len(of_rank)):
                assert all(a in (t.source, t.dest) for _, t in of_rank[a]), (what, repr(world.case))
                for b in range(len(of_rank)):
                    a_sends = [x for x in of_rank[a] if (x[1].source, x[1].dest) == (a, b)]
                    b_receives = [x for x in of_rank[b] if (x[1].source, x[1].dest) == (a, b)]
                    assert a_sends == b_receives, (what, a, b, repr(world.case))


@BATCHES
def test_all_ranks_post_at_the_same_slots(first: int) -> None:
    """Collective transports need every rank in every post, even with nothing to move."""
    for world in worlds(first, 60):
        for what in ("posts", "homes"):
            slots = {tuple(tuple(post.step for post in slot) for slot in getattr(plan, what)) for plan in world.plans}
            assert len(slots) == 1, repr(world.case)
        assert len({(len(plan.steps), len(plan.homes)) for plan in world.plans}) == 1, repr(world.case)


@BATCHES
def test_chunks_are_held_before_they_are_sent_and_arrive_before_they_are_needed(first: int) -> None:
    for world in worlds(first, 60):
        held = [
            {(c.owner, row): n for n, s in enumerate(p.steps) for c in s.chunks for row in rows_of(c.ranges)} for p in world.plans
        ]
        for plan in world.plans:
            arrived: dict[tuple[int, int], int] = {}
            for slot, t in sent(plan):
                for row in rows_of(t.ranges):
                    if t.source == plan.rank:
                        assert held[plan.rank][t.owner, row] <= slot, f"sent before it is there: {world.case!r}"
                    else:
                        assert (t.owner, row) not in arrived, f"a row arrives twice: {world.case!r}"
                        arrived[t.owner, row] = slot
            for (owner, row), n in held[plan.rank].items():
                if n:
                    assert arrived.pop((owner, row)) < n, f"computed before it is posted: {world.case!r}"
            assert not arrived, f"rows that arrive and are in no step: {world.case!r}"


@BATCHES
def test_only_rows_that_are_seen_travel(first: int) -> None:
    """The keys some query of the receiver sees (in a double ring: of its fast-linked group, which passes them on, but no piece of
    a neighbour's of which the receiver itself sees nothing); or, where queries travel, the queries that see some key of the
    receiver.

    With max_gap 0 these and no others; else gaps of up to max_gap rows between them may come along. Ranges have no stride, so
    of a dilated mask the rows between the visible ones may come along. A double ring of a striped layout moves whole chunks,
    and so do plans that are not to be trimmed.
    """
    for world in worlds(first, 60):
        for plan in world.plans:
            group = plan.rank // world.together * world.together
            stays = np.concatenate([world.stays(r) for r in range(group, group + world.together)])
            pieces = max(world.case.pieces, 1)
            pieces *= 2 if world.together > 1 and pieces > 1 else 1
            got: dict[tuple[int, int], Ranges] = {}
            for t in (t for _, t in sent(plan) if t.dest == plan.rank):
                n = len(world.travels(t.owner))
                piece = next(p for p in range(pieces) if t.ranges[0][0] < n * (p + 1) // pieces)
                assert (t.owner, piece) not in got and t.ranges[-1][1] <= n * (piece + 1) // pieces, "a piece comes at once"
                got[t.owner, piece] = t.ranges
            for owner, piece in ((owner, piece) for owner in range(len(world.plans)) for piece in range(pieces)):
                if owner != plan.rank:
                    rows = world.travels(owner)
                    first, last = (len(rows) * p // pieces for p in (piece, piece + 1))
                    rows = rows[first:last]
                    needed = set((first + np.flatnonzero(world.pairs(world.visible, stays, rows).any(axis=0))).tolist())
                    loose = world.pairs(world.undilated, stays, rows)
                    allowed = set((first + np.flatnonzero(loose.any(axis=0))).tolist()) if needed else set()
                    ranges = got.get((owner, piece), ())
                    if not world.case.trim or (world.together > 1 and world.case.layout == "striped"):
                        assert rows_of(ranges) == set(range(first, last)), repr(world.case)
                        continue
                    if owner in range(group, group + world.together):
                        seen = bool(world.pairs(world.visible, world.stays(plan.rank), rows).any())
                        assert bool(ranges) == seen, repr(world.case)
                        if not seen:
                            continue
                    assert needed <= rows_of(ranges) <= filled(allowed, world.case.max_gap), (plan.rank, owner, repr(world.case))
                    assert all({start, stop - 1} <= allowed for start, stop in ranges), "ranges begin and end with a needed row"
                    gaps = [b[0] - a[1] for a, b in pairwise(ranges)]
                    assert all(gap > world.case.max_gap for gap in gaps), "short gaps are filled: fewer messages"


@BATCHES
def test_every_gradient_comes_home_once(first: int) -> None:
    """Counts instead of gradients: each row's count at home is the number of pairs it is in. What arrives is added when it is
    due, and not passed on before."""
    for world in worlds(first, 60):
        n = len(world.plans)
        held = [[np.zeros(len(world.travels(owner)), dtype=int) for owner in range(n)] for _ in range(n)]
        under_way: list[tuple[int, Transfer, list[int], np.ndarray]] = []
        for slot in range(len(world.plans[0].homes)):
            last = slot == len(world.plans[0].homes) - 1
            for plan in world.plans:
                if slot < len(plan.steps):
                    counts = world.painted(plan.rank, plan.steps[slot]).sum(axis=1 if world.turned else 0)
                    for owner in range(n):
                        held[plan.rank][owner] += counts[world.travels(owner)]
            for due, t, rows, counts in under_way:
                if due <= slot:
                    held[t.dest][t.owner][rows] += counts
            under_way = [mail for mail in under_way if mail[0] > slot]
            for plan in world.plans:
                for post in plan.homes[slot]:
                    for t in post.transfers:
                        if t.source == plan.rank:
                            rows = sorted(rows_of(t.ranges))
                            under_way.append((plan.due(slot, post.step), t, rows, held[t.source][t.owner][rows]))
                            held[t.source][t.owner][rows] = 0
            for _, t, rows, counts in under_way if last else []:
                held[t.dest][t.owner][rows] += counts
        visible = world.visible.sum(axis=1 if world.turned else 0)
        for rank in range(n):
            for owner in range(n):
                expected = visible[world.travels(owner)] if rank == owner else 0
                assert (held[rank][owner] == expected).all(), (rank, owner, repr(world.case))


@BATCHES
def test_counts_of_rows_agree(first: int) -> None:
    for world in worlds(first, 60):
        assert sum(p.rows_sent() for p in world.plans) == sum(p.rows_received() for p in world.plans)
        for plan in world.plans:
            assert plan.rows_received() == sum(step.rows for step in plan.steps[1:]), repr(world.case)
            assert plan.q_len == len(world.q_positions(plan.rank)) and plan.k_len == len(world.k_positions(plan.rank))


@pytest.mark.parametrize("heads", range(1, 13))
def test_head_shares_cover_every_head_once(heads: int) -> None:
    for kv_heads in (n for n in range(1, heads + 1) if heads % n == 0):
        for members in range(1, 9):
            shares = head_shares(heads, kv_heads, members)
            assert [h for s in shares for h in range(s.q0, s.q1)] == list(range(heads))
            assert max(s.q_heads for s in shares) - min(s.q_heads for s in shares) <= 1
            for share in shares:
                for i, head in enumerate(range(share.q0, share.q1)):
                    local = i // (share.q_heads // share.kv_heads)
                    used = share.k0 + (local if share.k_index is None else share.k_index[local])
                    assert used == head // (heads // kv_heads), (share, head)


def test_a_ring_takes_one_chunk_a_step_and_an_allgather_all_at_once() -> None:
    def remote_chunks(schedule: str, **axes: int) -> list[int]:
        world = World(Case(mask="full()", layout="contiguous", schedule=schedule, world=8, q_len=64, k_len=64, **axes))
        return [len(step.chunks) for step in world.plans[-1].steps[1:]]

    assert remote_chunks("ring") == [1] * 7
    assert remote_chunks("allgather") == [7]
    assert remote_chunks("staged:3") == [3, 3, 1]
    assert remote_chunks("hybrid", ulysses=2) == [1] * 3
    assert remote_chunks("ulysses", ulysses=8) == []
    assert remote_chunks("double_ring", inner=4) == [1] * 7


def test_a_double_ring_crosses_the_slow_links_once_per_group() -> None:
    world = World(Case(mask="full()", layout="contiguous", schedule="double_ring", inner=4, world=8, q_len=64, k_len=64))
    crossing = Counter(
        (t.owner, t.dest // 4) for p in world.plans for _, t in sent(p) if t.dest == p.rank and t.source // 4 != t.dest // 4
    )
    assert set(crossing.values()) == {1} and len(crossing) == 8


def test_distant_chunks_of_a_window_are_neither_sent_nor_waited_for() -> None:
    world = World(Case(mask="causal(window=9)", layout="contiguous", schedule="ring", world=8, q_len=64, k_len=64))
    for plan in world.plans:
        assert plan.rows_received() == (8 if plan.rank else 0), "a window of chunk + 1 reaches one chunk back"


CAUSAL = Mask.causal()


def window_on_64(schedule: Schedule, rank: int = 5) -> Plan:
    where = make_layout("zigzag", 1 << 20, 64)
    return make_plan(PlanKey(Mask.causal(window=4096), where, where, schedule, 32, 8, rank))


def test_ranks_do_not_walk_past_chunks_they_do_not_need() -> None:
    """A zigzag rank's two pieces need one predecessor each: those of ranks 4 and 6, the second 63 hops away."""
    ring = window_on_64(make_schedule("ring", 64))
    assert [[chunk.owner for chunk in step.chunks] for step in ring.steps] == [[5], [4], [6]]
    assert [[t.owner for t in post.transfers if t.dest == 5] for slot in ring.posts for post in slot] == [[4], [6]]
    together = window_on_64(Schedule("staged", rows=98_304))
    assert [[chunk.owner for chunk in step.chunks] for step in together.steps] == [[5], [4, 6]]
    assert [len(slot) for slot in together.posts] == [1, 0], "all that is needed is posted before the local step"
    assert {len(window_on_64(make_schedule("ring", 64), rank).steps) for rank in (0, 31, 63)} == {3}, "the same on all ranks"


def test_stages_are_filled_by_rows() -> None:
    where = make_layout("contiguous", 1 << 20, 64)
    key = PlanKey(Mask.full(), where, where, Schedule("staged", rows=98_304), 8, 8, 0)
    assert [len(step.chunks) for step in make_plan(key).steps[1:]] == [6, 5, 6, 6, 6, 5, 6, 6, 6, 5, 6]  # of 16,384 rows each
    zigzag = make_layout("zigzag", 65_536, 4)
    keys = [PlanKey(CAUSAL, zigzag, zigzag, Schedule("staged", rows=16_384), 8, 8, rank) for rank in range(4)]
    needs = [[step.rows for step in make_plan(key).steps[1:]] for key in keys]
    assert needs == [[16_384] * 3, [8_192, 16_384, 16_384], [8_192, 8_192, 16_384], [8_192] * 3], "as many steps on all ranks"


DOUBLE = Schedule("double_ring", inner=2, pieces=2)


def test_a_backward_pass_ends_with_a_part_of_the_local_work() -> None:
    """A third first, to hide the first arrival; two thirds last, to hide the last gradients, which are twice as many bytes."""
    where = make_layout("zigzag", 131_072, 4)
    forward = make_plan(PlanKey(CAUSAL, where, where, Schedule("staged", rows=98_304), 32, 8, 1))
    assert [(step.local, len(step.chunks)) for step in forward.steps] == [(True, 1), (False, 3)]
    plan = forward.backward()
    assert [(step.local, len(step.chunks)) for step in plan.steps] == [(True, 1), (False, 1), (False, 1), (False, 1), (True, 0)]
    local = forward.steps[0].area
    assert plan.steps[0].area + plan.steps[-1].area == local and plan.steps[0].area == pytest.approx(local / 3, rel=0.02)
    assert plan.steps[0].parts[0].slices.table[:, 3].max() % 256 == 0, "cut on the edge of a pair's tile"
    # The last gradients leave after the last remote step, and are waited for after the local work that follows.
    (slot,) = (n for n, posts in enumerate(plan.homes) if any(post.step == 3 for post in posts))
    assert (slot, plan.due(slot, 3)) == (3, 4) and not plan.homes[4]
    short = make_layout("zigzag", 4 * 8191, 4)
    key = PlanKey(CAUSAL, short, short, Schedule("staged", rows=98_304), 32, 8, 1)
    assert [step.local for step in make_plan(key).backward().steps] == [True, False]


def test_local_work_is_divided_by_keys_whatever_travels() -> None:
    """A kernel adds up the gradients of a tile of keys once per call."""
    where = make_layout("zigzag", 131_072, 4)
    key = PlanKey(CAUSAL, where, where, Schedule("staged", rows=98_304, travels="q"), 32, 32, 1)
    plan = make_plan(key).backward()
    assert plan.key.travels == "q" and [step.local for step in plan.steps] == [True, False, False, False, True]
    first, last = (plan.steps[n].parts[0].slices.table for n in (0, -1))
    assert first[:, 3].max() == last[:, 2].min() and first[:, 3].max() % 256 == 0
    assert plan.steps[0].area == pytest.approx(LOCAL_FIRST["q"] * make_plan(key).steps[0].area, rel=0.02)


def double_ring(schedule: Schedule, backward: bool, world: int = 6) -> Plan:
    where = make_layout("contiguous", 48, world)
    plan = make_plan(PlanKey(Mask.full(), where, where, schedule, 8, 2, 0))
    return plan.backward() if backward else plan


def test_slow_links_are_never_idle_in_a_forward_pass() -> None:
    """Blocks of the far ring are posted at even distances, at most a chunk ahead of what is computed."""
    plan = double_ring(DOUBLE, backward=False)
    assert [step.chunks[0].owner for step in plan.steps] == [0, 1, 1, 4, 5, 4, 5, 2, 3, 2, 3]
    assert [n for n, far in enumerate(plan.far) if far] == [3, 5, 7, 9]
    assert [slot for slot, posts in enumerate(plan.posts) for post in posts if plan.far[post.step]] == [0, 1, 3, 6]


def test_gradients_cross_slow_links_while_the_next_block_is_computed() -> None:
    """In a backward pass neighbours' chunks are computed between far blocks, which are posted two blocks ahead."""
    plan = double_ring(replace(DOUBLE, local_last=1), backward=True)
    assert [step.chunks[0].owner for step in plan.steps[:-1]] == [0, 4, 5, 4, 5, 1, 2, 3, 2, 3, 1] and plan.steps[-1].local
    assert [n for n, far in enumerate(plan.far) if far] == [1, 3, 6, 8]
    assert [slot for slot, posts in enumerate(plan.posts) for post in posts if plan.far[post.step]] == [0, 0, 1, 3]
    leaves = [(slot, plan.due(slot, post.step)) for slot, posts in enumerate(plan.homes) for post in posts if plan.far[post.step]]
    assert leaves == [(3, 5), (5, 7), (8, 10), (10, 12)]


def test_without_local_work_at_the_end_a_double_ring_keeps_a_step_to_spare() -> None:
    """The last gradients over slow links leave after one step on a neighbour's chunk and cross during another."""
    plan = double_ring(DOUBLE, backward=True)
    assert [step.chunks[0].owner for step in plan.steps] == [0, 4, 5, 4, 5, 1, 2, 3, 2, 3, 1, 1]
    assert sum(step.rows for step in plan.steps[1:]) == 5 * 8, "nothing is computed twice"
    leaves = [(slot, plan.due(slot, post.step)) for slot, posts in enumerate(plan.homes) for post in posts if plan.far[post.step]]
    assert leaves[-1] == (10, 12) and len(plan.steps) == 12
    whole = double_ring(replace(DOUBLE, pieces=1), backward=True)
    assert [step.chunks[0].owner for step in whole.steps] == [0, 4, 5, 2, 3, 1], "short chunks stay whole"


@pytest.mark.parametrize(("pieces", "blocks"), [(1, 1), (2, 1), (4, 2), (8, 4)])
def test_gradients_over_slow_links_may_be_half_a_chunk_late(pieces: int, blocks: int) -> None:
    assert double_ring(replace(DOUBLE, pieces=pieces), backward=True).blocks_late == blocks


@pytest.mark.parametrize("layout", ["zigzag", "contiguous", "zigzag:2"])
@pytest.mark.parametrize(
    "schedule", [Schedule("ring"), DOUBLE, Schedule("double_ring", inner=3), Schedule("ring", ulysses=2)], ids=str
)
@pytest.mark.parametrize("mask", [Mask.causal(), Mask.causal(window=9), Mask.documents([20, 0, 31, 45])], ids=str)
def test_traffic_is_what_backward_plans_move(
    mask: Mask, schedule: Schedule, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world_module, "BACKWARD_PIECE_ROWS", 4)  # more pieces back than forth
    world = SimulatedWorld(6, layout, schedule)
    key = world.plan(0, mask, 96, 96, 8, 2).key
    for travels in ("kv", "q"):
        plans = [make_plan(replace(key, rank=rank, travels=travels, returns=True)) for rank in range(6)]
        row = row_bytes(plans[0], travels, 16, 16, 2)
        moved = sum(plan.rows_received() for plan in plans) // len(plans[0].shares)
        assert traffic(world.plan(0, mask, 96, 96, 8, 2), travels, 16, 16, 2).nbytes == moved * (row.out + row.home)


def test_a_world_too_large_to_know_for_many_pieces_is_known_for_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world_module, "BACKWARD_PIECE_ROWS", 4)
    layout = make_layout("zigzag", 6 * 32, 6)
    key = PlanKey(Mask.causal(), layout, layout, Schedule("double_ring", inner=2), 8, 2, 0, returns=True)

    def parts(known: int) -> tuple[int, bool]:
        monkeypatch.setattr(world_module, "KNOWN_UP_TO", known)
        world_module.world_of.cache_clear()
        world_module._needs.cache_clear()
        world = world_module.world_of(key)
        return world.parts, world.low is not None

    found = [parts(known) for known in (1 << 20, 1000, 400, 1)]
    world_module.world_of.cache_clear()
    world_module._needs.cache_clear()
    assert found[0] == (8, True) and found[-1] == (8, False)
    assert all(1 <= n < 8 and known for n, known in found[1:-1]), found


@pytest.mark.parametrize(("seqlen", "forward", "backward"), [(16_384, 1, 2), (65_536, 2, 8), (131_072, 4, 8), (1 << 20, 4, 8)])
def test_a_double_ring_cuts_longer_chunks_into_more_pieces(seqlen: int, forward: int, backward: int) -> None:
    where = make_layout("zigzag", seqlen, 4)
    key = PlanKey(CAUSAL, where, where, Schedule("double_ring", inner=2), 32, 8, 0)
    assert [world_module.world_of(replace(key, returns=returns)).parts for returns in (False, True)] == [forward, backward]


def test_both_sides_of_a_slow_link_have_as_many_blocks() -> None:
    """Of a causal zigzag the first host needs all keys of the second, which needs half of its: in as many parts."""
    where = make_layout("zigzag", 131_072, 4)
    for rank, rows in ((0, 8192), (2, 4096)):
        key = PlanKey(CAUSAL, where, where, Schedule("double_ring", inner=2, pieces=4), 32, 8, rank)
        assert [step.rows for step in make_plan(key).steps[5:]] == [rows] * 8


def test_chunks_of_a_double_ring_travel_in_pieces_of_many_rows() -> None:
    for seqlen, pieces in ((4 * 8191, 1), (4 * 16384, 2), (1 << 20, 4)):
        where = make_layout("contiguous", seqlen, 4)
        plan = make_plan(PlanKey(Mask.full(), where, where, Schedule("double_ring", inner=2), 8, 2, 0))
        assert len(plan.steps) == 1 + 3 * pieces


def test_what_travels_is_what_is_fewer_bytes() -> None:
    """Of 128 dims in 16 bits a row of a key head is 512 bytes and 1,024 home; of a query head 528, and 512 home."""

    def travels(kv_heads: int, mask: Mask = CAUSAL, layout: str = "zigzag", lengths: tuple[int, int] = (64, 64)) -> str:
        q_layout, k_layout = (make_layout(layout, n, 4) for n in lengths)
        plan = make_plan(PlanKey(mask, q_layout, k_layout, make_schedule("ring", 4), 12, kv_heads, 0))
        assert plan.key.travels == "kv", "forward passes move keys"
        assert plan.backward(takes_delta=False).key.travels == "kv"
        return plan.backward().key.travels

    assert [travels(kv_heads) for kv_heads in (12, 6, 1)] == ["q", "kv", "kv"]
    assert travels(1, Mask.full(), "contiguous", (4, 64)) == "q", "few queries to many keys"
    assert travels(12, Mask.documents([16, 4, 44], causal=False), "contiguous") == "q"
    # All see the keys of rank 0 alone: if queries came to them, it would compute everything.
    assert travels(12, Mask.blocks(np.eye(4, dtype=bool)[[0] * 4], 16), "contiguous") == "kv"


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "balanced"])
def test_a_million_tokens_of_ten_thousand_documents_on_64_ranks(layout: str) -> None:
    """The size the planner is made for. The bound only keeps a quadratic planner out; benchmarks measure."""
    rng = np.random.default_rng(0)
    world, seqlen = 64, 1_000_000
    cuts = np.sort(rng.choice(np.arange(1, seqlen), size=9_999, replace=False))
    mask = Mask.documents(np.diff(np.concatenate([[0], cuts, [seqlen]])))
    where = make_layout(layout, seqlen, world, mask)
    ranks = (0, 31, 63)
    started = time.monotonic()
    found = [make_plan(PlanKey(mask, where, where, make_schedule("ring", world), 8, 8, rank)) for rank in ranks]
    assert time.monotonic() - started < 5 * len(ranks)
    lengths = np.array(mask.lengths)  # type: ignore[attr-defined]
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    for rank, plan in zip(ranks, found, strict=True):
        rows = where.positions(rank)
        assert plan.area == (rows - starts[rows] + 1).sum(), "a causal row sees its document up to itself"


def test_plans_are_cached() -> None:
    where = make_layout("zigzag", 64, 4)
    key = PlanKey(Mask.causal(), where, where, make_schedule("ring", 4), 2, 2, 1)
    again = PlanKey(Mask.causal(), make_layout("zigzag", 64, 4), where, make_schedule("ring", 4), 2, 2, 1)
    assert make_plan(key) is make_plan(again)


@pytest.mark.parametrize(
    ("spec", "world", "ulysses", "inner", "message"),
    [
        ("spiral", 4, 1, None, "unknown schedule 'spiral'.*ring"),
        ("staged:0", 4, 1, None, "unknown schedule"),
        ("staged:\u0663", 4, 1, None, "unknown schedule"),
        (3, 4, 1, None, "unknown schedule '3'"),
        ("ring:2", 4, 1, None, "unknown schedule"),
        ("double_ring:", 4, 1, 2, "unknown schedule.*double_ring:K"),
        ("double_ring:8", 4, 1, None, "inner="),
        ("ulysses:0", 4, 1, None, "unknown schedule.*ulysses:K"),
        ("ulysses", 4, 2, None, "hybrid"),
        ("hybrid", 4, 1, None, "between 2 and 3"),
        ("hybrid", 4, 4, None, "between 2 and 3"),
        ("hybrid", 6, 4, None, "does not divide"),
        ("ring", 4, 3, None, "ulysses=3 does not divide"),
        ("double_ring", 4, 1, None, "inner="),
        ("double_ring", 4, 1, 3, "inner=3 does not divide"),
        ("ring", 4, 1, 2, "inner=2 is for"),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused(spec: Any, world: int, ulysses: int, inner: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_schedule(spec, world, ulysses, inner)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("staged:3", Schedule("staged", 3)),
        ("ulysses:2", Schedule(ulysses=4, head_groups=2)),
        ("double_ring:16", Schedule("double_ring", inner=2, pieces=16)),
        ("double_ring", Schedule("double_ring", inner=2)),
    ],
)
def test_a_number_says_how_many(spec: str, expected: Schedule) -> None:
    assert make_schedule(spec, 4, inner=2 if "double" in spec else None) == expected


@pytest.mark.parametrize(("world", "ulysses", "kv_heads", "rows"), [(4, 1, 8, 32_768), (4, 1, 32, 16_384), (8, 2, 32, 32_768)])
def test_backward_stages_are_larger_where_their_gradients_are_few_bytes(
    world: int, ulysses: int, kv_heads: int, rows: int
) -> None:
    """256 MiB a rank: 32k rows of 8 key heads, or of 16 query heads that travel."""
    tokens = world * 16_384
    plan = SimulatedWorld(world, "zigzag", "auto", ulysses=ulysses).plan(0, Mask.causal(), tokens, tokens, 32, kv_heads)
    assert plan.backward().key.travels == ("kv" if kv_heads == 8 else "q")
    assert plan.backward().key.schedule.rows == rows


@pytest.mark.parametrize(
    ("spec", "seqlen", "heads", "kv_heads", "groups"),
    [
        ("ulysses", 65_536, 32, 32, 2),
        ("ulysses", 65_536, 32, 8, 2),
        ("ulysses", 65_536, 32, 4, 1),  # of more, members would share key heads
        ("ulysses", 16_384, 32, 32, 2),
        ("ulysses", 8_192, 32, 32, 1),
        ("ulysses:8", 64, 32, 32, 8),
        ("hybrid", 65_536, 32, 32, 1),
        ("auto", 65_536, 32, 32, 1),
    ],
)
def test_traded_heads_go_in_as_many_groups_as_leave_each_rank_enough(
    spec: str, seqlen: int, heads: int, kv_heads: int, groups: int
) -> None:
    world = SimulatedWorld(4, "zigzag", spec, ulysses=2 if spec == "hybrid" else 1)
    key = world.plan(1, Mask.causal(), seqlen, seqlen, heads, kv_heads).key
    assert key.groups == groups
    part = make_plan(key.of_one_group(groups))
    assert part.key.groups == 1 and part.share.q_heads * groups == make_plan(key).share.q_heads


@pytest.mark.parametrize(
    ("groups", "heads", "message"),
    [(3, 32, "3 groups of heads do not divide the 8 key heads"), (8, 16, "none of a group's 2 query")],
)
def test_groups_that_do_not_fit_are_refused(groups: int, heads: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SimulatedWorld(4, "zigzag", f"ulysses:{groups}").plan(0, Mask.causal(), 64, 64, heads, 8)


@pytest.mark.parametrize(("world", "q_len", "k_len"), [(2, 64, 64), (4, 61, 61), (4, 13, 70)])
def test_bytes_of_an_exchange_are_those_of_its_blocks(world: int, q_len: int, k_len: int) -> None:
    shape = Shape(1, 8, 16, 2)
    plan = SimulatedWorld(world, "zigzag", "ulysses").plan(0, Mask.full(), q_len, k_len, 8, 8)
    found = sum(
        block_bytes(plan, entering, source, dest, what)
        for backward in (False, True)
        for entering in (True, False)
        for what in traded_tensors(plan, shape, entering, backward)
        for source in range(world)
        for dest in range(world)
        if source != dest
    )
    assert exchange_bytes(plan, shape.head_dim, shape.head_dim_v, shape.dtype_bytes) == found


@pytest.mark.parametrize("takes_delta", [True, False])
@pytest.mark.parametrize("kv_heads", [2, 8])
def test_bytes_of_a_ring_are_those_of_its_transfers(kv_heads: int, takes_delta: bool) -> None:
    world, found = SimulatedWorld(4, "zigzag", "ring"), 0
    dims = 8, 16, 2
    for rank in range(4):
        there = world.plan(rank, Mask.causal(), 61, 61, 8, kv_heads)
        back = there.backward(*dims, takes_delta)
        row = row_bytes(back, back.key.travels, *dims)
        found += there.rows_received() * row_bytes(there, "kv", *dims).out + back.rows_received() * (row.out + row.home)
    assert ring_bytes(there, *dims, takes_delta) == found
