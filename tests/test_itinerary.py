"""Where a transfer's rows stand at either end, against the whole plans of both ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest

from ringflash.mask import Mask
from ringflash.parallel import plan as planner
from ringflash.parallel import world as world_module
from ringflash.parallel.lower import Ranges
from ringflash.parallel.plan import Plan, Transfer, make_plan
from ringflash.parallel.transport import itinerary, place
from ringflash.simulated import SimulatedWorld
from ringflash.testing import Case, draw


def forget_plans() -> None:
    for cached in (world_module._needs, world_module.world_of, planner.make_plan, planner._backward, planner.traffic):
        cached.cache_clear()


@pytest.fixture
def unknown(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Worlds of which nobody knows what the others take, as if they had too many bands."""
    forget_plans()
    monkeypatch.setattr(world_module, "KNOWN_UP_TO", 0)
    yield
    monkeypatch.undo()
    forget_plans()


def plans_of(case: Case) -> Iterator[Plan]:
    """All ranks' plans of both passes."""
    world = SimulatedWorld(case.world, case.build_layout(), case.build_schedule(), ulysses=case.ulysses, inner=case.inner)
    world.trim, world.max_gap = case.trim, case.max_gap
    mask = case.build_mask()
    view = world.for_mask(mask)
    for rank in range(case.world):
        plan = view.plan(rank, mask, case.q_len, case.k_len, case.heads, case.kv_heads)
        yield from dict.fromkeys((plan, plan.backward(case.head_dim, case.head_dim_v, 4)))


def in_full(plan: Plan, t: Transfer, rank: int) -> tuple[int, Ranges]:
    """`place`, looked up in the steps of the rank's own plan."""
    if t.owner == rank:
        return 0, t.ranges
    held = [
        (n, chunk.offset)
        for n, step in enumerate(make_plan(replace(plan.key, rank=plan.peer(rank))).steps)
        for chunk in step.chunks
        if n and (chunk.owner, chunk.ranges) == (t.owner, t.ranges)
    ]
    ((step, row),) = held
    rows = []
    for start, stop in t.ranges:
        rows.append((row, row + stop - start))
        row += stop - start
    return step, tuple(rows)


def kinds_of(plan: Plan, t: Transfer) -> set[str]:
    key, world = plan.key, world_module.world_of(replace(plan.key, rank=0))
    runs = [run for layout in key.moving() for rank in layout.ranks for run in rank]
    kinds = {
        "relayed": t.owner not in (t.source, t.dest),
        "untrimmed": not key.trim,
        "strided": any(run.stride > 1 for run in runs) and key.trim,
        "in pieces": world.pieces > 1,
        "several ranges": len(t.ranges) > 1,
        "turned": key.travels == "q",
        "backward": key.returns,
        "several chunks a stage": len(plan.steps[t.step].chunks) > 1,
        "unknown": world.takes is None and key.trim and world.together == 1,
        "unknown in a double ring": world.takes is None and key.trim and world.together > 1,
    }
    return {kind for kind, found in kinds.items() if found} | {key.schedule.name}


def seen(first: int, n: int) -> Counter[str]:
    """Compares all transfers of so many drawn cases; how many there were, by kind."""
    found: Counter[str] = Counter()
    for case in (draw(seed, max_len=60) for seed in range(first, first + n)):
        for plan in plans_of(case):
            for t in (t for slots in (plan.posts, plan.homes) for slot in slots for post in slot for t in post.transfers):
                for rank in (t.source, t.dest):
                    assert place(plan, t, rank) == in_full(plan, t, rank), (case, t, rank)
                found.update(kinds_of(plan, t))
    return found


def test_rows_stand_where_the_other_ranks_plan_has_them() -> None:
    found = seen(0, 160)
    kinds = {"relayed", "untrimmed", "strided", "in pieces", "several ranges", "turned", "backward", "several chunks a stage"}
    kinds |= {"unknown", "unknown in a double ring", "ring", "allgather", "staged", "double_ring"}
    assert not {kind for kind in kinds if found[kind] < 50}, found


def test_also_where_the_world_does_not_know_what_ranks_take(unknown: None) -> None:
    found = seen(250, 80)
    assert found["unknown"] > 1000 and found["unknown in a double ring"] > 100, found


def test_a_plan_that_pulls_makes_no_plan_of_a_peer() -> None:
    world = SimulatedWorld(48, "zigzag")
    plan = world.plan(17, Mask.causal(), 48 * 1000, 48 * 1000, 4, 2)
    for one in (plan, plan.backward()):
        made = make_plan.cache_info().misses
        legs = [leg for slots in itinerary(one, pulls=True)[:2] for slot in slots for moves in slot for leg in moves.receives]
        assert any(leg.row for leg in legs) and make_plan.cache_info().misses == made
