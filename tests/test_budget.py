"""A memory budget: what it chooses, that results stay the same, and what it says when nothing fits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ringflash import ContextParallel, Mask, SimulatedWorld, attention
from ringflash.api import check, demand, kernel_for
from ringflash.kernels import hopper
from ringflash.parallel.memory import (
    Demand,
    Frugality,
    Shape,
    extra_bytes,
    frugalities,
    lean_bytes,
    symmetric_bytes,
    tensor_bytes,
)
from ringflash.testing import Idle, RankPool

GIB = 2**30
Ranks = Callable[[int], RankPool]


HEADS = {"auto": (8, 4), "ulysses": (16, 16), "hybrid": (8, 8)}
"""Query heads and key heads by schedule: members of a head exchange have several of the latter."""


def tensors_of(seqlen: int, kv_heads: int, heads: int = 8) -> list[Tensor]:
    make = torch.Generator().manual_seed(0)
    return [torch.randn(1, seqlen, n, 8, generator=make).requires_grad_() for n in (heads, kv_heads, kv_heads)]


def tensors(schedule: str = "auto") -> list[Tensor]:
    heads, kv_heads = HEADS[schedule]
    return tensors_of(64, kv_heads, heads)


def test_smaller_stages_come_before_groups_of_heads() -> None:
    assert frugalities(100, 4, 64, 4, 1, True) == (
        Frugality(100, 1), Frugality(1, 1), Frugality(100, 2), Frugality(1, 2), Frugality(100, 4), Frugality(1, 4)
    )  # fmt: skip
    assert frugalities(100, 4, 64, 6, 1, False) == tuple(Frugality(100, n) for n in (1, 2, 3, 6))
    assert frugalities(100, 2, 64, 6, 2, True) == (Frugality(100, 1), Frugality(100, 3)), "each has a head of every group"
    assert frugalities(100, 1, 64, 6, 4, True) == (Frugality(100, 1),), "of six heads four members do not"
    assert frugalities(100, 1, 64, 32, 4, True, 2) == tuple(Frugality(100, n) for n in (2, 4, 8))
    assert [c.rows for c in frugalities(1000, 16, 1600, 1, 1, True)] == [1000, 601, 201, 1]


def plan_of(world: SimulatedWorld, seqlen: int, rows: int | None = None) -> Any:
    sizes = (0, Mask.causal(), seqlen, seqlen, 32, 8)
    return world.plan(*sizes) if rows is None else world.plan(*sizes, rows)


def test_a_quarter_of_a_million_tokens_within_a_tenth_of_tensors_and_two_stages() -> None:
    """4 ranks, 32 and 8 heads of 128: q, k, v, out, log-sum-exp and gradients, and two stages of two chunks, and 10 %."""
    world = SimulatedWorld(4, "zigzag")
    plan, demand = plan_of(world, 262_144), Demand(symmetric=True)
    tensors, stage = tensor_bytes(plan, Shape()), max(s.rows for s in plan.steps[1:]) * 8 * 256 * 2
    bound = 1.1 * (tensors + 2 * stage) - tensors
    assert extra_bytes(plan, demand) > 2 * bound
    world.keep_within(int(bound))
    sizes = (0, Mask.causal(), 262_144, 262_144, 32, 8)
    rows, groups = world.frugalities(plan)[world.affordable(demand, *sizes)[0]]
    lean = world.plan(*sizes, rows)
    assert extra_bytes(lean, demand, groups) <= bound
    assert groups <= 4


def test_lean_is_that_budget_and_no_bound() -> None:
    world, demand = SimulatedWorld(4, "zigzag", memory_budget="lean"), Demand(symmetric=True)
    for seqlen in (262_144, 1_048_576):
        plan = plan_of(world, seqlen)
        tensors, stage = tensor_bytes(plan, Shape()), max(s.rows for s in plan.steps[1:]) * 8 * 256 * 2
        for rank in range(4):  # allowed alike, though three have shorter stages
            own = world.plan(rank, Mask.causal(), seqlen, seqlen, 32, 8)
            assert lean_bytes(own, demand) == (tensors + 22 * stage) // 10
        first = world.frugalities(plan)[world.affordable(demand, 0, Mask.causal(), seqlen, seqlen, 32, 8)[0]]
        assert extra_bytes(plan_of(world, seqlen, first.rows), demand, first.groups) <= lean_bytes(plan, demand)
    q, k, v = tensors_of(16, 1)
    assert isinstance(world.attention(q, k, v, mask=Mask.causal()), Tensor)


def test_more_groups_and_smaller_stages_take_less() -> None:
    world = SimulatedWorld(4, "zigzag")
    for symmetric in (False, True):
        demand = Demand(symmetric=symmetric)
        by_groups = [extra_bytes(plan_of(world, 65_536), demand, n) for n in (1, 2, 4, 8)]
        by_stage = [extra_bytes(plan_of(world, 32_768, rows), demand) for rows in (10**6, 8_193, 1)]
        assert by_groups == sorted(by_groups, reverse=True) and by_groups[3] < by_groups[0] / 6
        assert by_stage == sorted(by_stage, reverse=True) and by_stage[2] < by_stage[0]
    assert symmetric_bytes(plan_of(SimulatedWorld(1), 64), Shape()) == 0


def test_more_groups_of_traded_heads_take_less() -> None:
    """Two groups do not: both are under way at once, beside the results of all."""
    world = SimulatedWorld(4, "zigzag", "ulysses")
    plan = world.plan(0, Mask.causal(), 65_536, 65_536, 32, 32)
    assert plan.key.groups == 2
    for symmetric in (False, True):
        needs = [extra_bytes(plan, Demand(symmetric=symmetric), n) for n in (1, 4, 8)]
        assert needs == sorted(needs, reverse=True)
        assert extra_bytes(plan, Demand(symmetric=symmetric), 2) == extra_bytes(plan, Demand(symmetric=symmetric))
    held = [symmetric_bytes(plan, Shape(), groups=n) for n in (1, 2, 4)]
    # One step, so nothing but what members pack for each other: most of it gradients, of three others' rows and the own heads.
    assert held == [2 * (3 * 16_384) * (8 // n) * (3 * 128 * 2) for n in (1, 2, 4)]
    kept, portions = tensor_bytes(plan, Shape(), backward=False), 256 << 20
    assert lean_bytes(plan, Demand()) == tensor_bytes(plan, Shape()) // 10 + portions + kept


@pytest.mark.parametrize(("schedule", "share"), [*(("auto", x) for x in (1.0, 0.7, 0.4, 0.3)), ("ulysses", 0.8), ("hybrid", 0.8)])
def test_results_do_not_depend_on_the_budget(schedule: str, share: float) -> None:
    heads, kv_heads = HEADS[schedule]
    q, k, v = tensors(schedule)
    options: Any = {"layout": "zigzag", "schedule": schedule, "ulysses": 2 if schedule == "hybrid" else 1}
    free, sizes = SimulatedWorld(4, **options), (Mask.causal(), 64, 64, heads, kv_heads)
    call = Demand(Shape(1, 8, 8, 4, one_call=False))  # of kernels on the CPU
    needs = [extra_bytes(free.plan(r, *sizes), call) for r in range(4)]
    bound = SimulatedWorld(4, **options, memory_budget=int(share * max(needs)))
    if share < 1:
        affordable = bound.affordable(call, needs.index(max(needs)), *sizes)
        assert 0 not in affordable
        assert schedule == "auto" or bound.frugalities(free.plan(0, *sizes))[affordable[0]].groups == 4
    dout = torch.randn(1, 64, heads, 8, generator=torch.Generator().manual_seed(1))
    expected, found = (world.attention(q, k, v, mask=Mask.causal()) for world in (free, bound))
    assert isinstance(expected, Tensor) and isinstance(found, Tensor)
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad(found, (q, k, v), dout), torch.autograd.grad(expected, (q, k, v), dout), strict=True):
        torch.testing.assert_close(a, b)


def test_a_budget_is_of_the_kernel_that_computes() -> None:
    q, k, v = tensors()
    call = check(q, k, v, Mask.causal(), None, 0.0, None, "auto", False, False)
    plan = SimulatedWorld(4, "zigzag").plan(0, Mask.causal(), 64, 64, 8, 4)
    for kernel in (Idle(), kernel_for(call, plan)):
        shape = demand(call, kernel).shape
        assert (shape.takes_delta, shape.settle_rows) == (kernel.extras.delta, kernel.extras.settle_rows)
    assert (Shape().takes_delta, Shape().settle_rows) == (hopper.EXTRAS.delta, hopper.EXTRAS.settle_rows)
    assert (Shape().portion_bytes, Shape().turn_rows) == (hopper.EXTRAS.portion_bytes, hopper.EXTRAS.turn_rows)
    assert Shape().one_call == hopper.EXTRAS.one_call


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_budget_counts_what_the_kernel_sums_deterministic_gradients_in(deterministic: bool) -> None:
    q, k, v = (torch.empty(1, 8, heads, 96, dtype=torch.bfloat16, requires_grad=True) for heads in (32, 8, 8))
    call = check(q, k, v, Mask.causal(), None, 0.0, None, "auto", deterministic, False)
    ours, none = demand(call, hopper.KERNEL), demand(call, Idle())
    assert ours.shape.deterministic == deterministic and ours.shape.portions(False) == (192 << 20) * deterministic
    assert none.shape.portions(True) == none.shape.turns(8, 32) == 0
    assert ours.shape.turns(129, 32) == 3 * 32 * 8 * deterministic
    # Only a pass of one call, which writes dk and dv, sums otherwise.
    alone = SimulatedWorld(1).plan(0, Mask.causal(), 8, 8, 32, 8)
    assert extra_bytes(alone, ours) > 192 << 20 and extra_bytes(alone, none) < 1 << 20


def test_determinism_may_be_what_a_budget_is_too_small_for() -> None:
    world = SimulatedWorld(4, "zigzag")
    sizes = (0, Mask.causal(), 65_536, 65_536, 32, 8)
    free, exact = Demand(), Demand(Shape(deterministic=True))
    needs = [extra_bytes(world.plan(*sizes), call) for call in (free, exact)]
    # All of it beside the running state, but less than the results that come later take there.
    assert 0 < needs[1] - needs[0] < (256 << 20) + (1 << 20)
    world.keep_within(needs[0])
    assert world.affordable(free, *sizes)[0] == 0 < world.affordable(exact, *sizes)[0]
    world.keep_within(200 << 20)
    assert world.affordable(free, *sizes)
    with pytest.raises(ValueError, match=r"memory_budget=209715200 bytes is too small"):
        world.affordable(exact, *sizes)


def test_lean_allows_what_no_choice_lowers() -> None:
    world = SimulatedWorld(4, "zigzag", memory_budget="lean")
    sizes = (0, Mask.causal(), 262_144, 262_144, 32, 8)
    free, exact = Demand(), Demand(Shape(deterministic=True))
    plan = world.plan(*sizes)
    assert lean_bytes(plan, exact) - lean_bytes(plan, free) == 256 << 20
    assert lean_bytes(plan, Demand(Shape(deterministic=True), backward=False)) == lean_bytes(plan, Demand(backward=False))
    assert world.affordable(exact, *sizes)[0] == world.affordable(free, *sizes)[0]


def test_what_cannot_be_is_refused_with_the_numbers() -> None:
    with pytest.raises(
        ValueError, match=r"memory_budget=1000 bytes is too small: .* takes \d+ bytes on rank 0 .* and \d+ at full"
    ):
        SimulatedWorld(4, memory_budget=1000).attention(*tensors(), mask=Mask.causal())
    for wrong in (0, -1, 2.5, "2GiB"):
        with pytest.raises(ValueError, match="positive number of bytes"):
            SimulatedWorld(4, memory_budget=wrong)  # type: ignore[arg-type]


def attend(rank: int, budgets: list[int | None], schedule: str = "auto") -> tuple[str, str]:
    """The schedule and groups of a call under a rank's budget, or its error and what it says."""
    cp = ContextParallel(schedule=schedule, memory_budget=budgets[rank], timeout_s=60.0)
    q, k, v = (cp.shard(x.detach()).requires_grad_() for x in tensors(schedule))
    try:
        out = attention(q, k, v, mask=Mask.causal(), cp=cp)
    except ValueError as error:
        return "ValueError", str(error)
    torch.autograd.grad(out, (q, k, v), out.detach())
    (job,) = cp.jobs.values()
    full = attention(*tensors(schedule), mask=Mask.causal())
    assert (cp.unshard(out.detach()) - full).abs().max() < 1e-5
    return str(job.plan.key.schedule), str(job.groups)


def explained(rank: int) -> str:
    cp = ContextParallel(timeout_s=60.0)
    before = cp.explain(64, 8, 4, Mask.causal(), "cpu")
    attention(*(cp.shard(x.detach()) for x in tensors()), mask=Mask.causal(), cp=cp)
    assert before.endswith("transport    auto")
    return cp.explain(64, 8, 4, Mask.causal(), "cpu")


def test_a_context_explains_its_transport(ranks: Ranks) -> None:
    for text in ranks(2).run(explained):
        assert text.endswith("transport    p2p (auto: symmetric memory needs CUDA, not cpu)")


def test_ranks_choose_together(ranks: Ranks) -> None:
    roomy, tight = (set(ranks(3).run(attend, [n] * 3)) for n in (GIB, 15_000))
    assert len(roomy) == len(tight) == 1
    assert roomy.pop()[1] == "1" and tight.pop()[1] in ("2", "4")


def test_ranks_that_trade_heads_choose_together(ranks: Ranks) -> None:
    plan = SimulatedWorld(2, schedule="ulysses").plan(0, Mask.causal(), 64, 64, *HEADS["ulysses"])
    most, least = (extra_bytes(plan, Demand(Shape(1, 8, 8, 4)), n) for n in (1, 8))
    roomy, tight = (set(ranks(2).run(attend, [n] * 2, "ulysses")) for n in (GIB, (most + least) // 2))
    assert len(roomy) == len(tight) == 1
    assert roomy.pop()[1] == "1" and tight.pop()[1] in ("4", "8")


def test_ranks_that_differ_in_their_budget_are_told(ranks: Ranks) -> None:
    answers = ranks(3).run(attend, [GIB, GIB, 2 * GIB])
    assert {kind for kind, _ in answers} == {"ValueError"}
    assert all("disagree on memory_budget" in text and "rank 2: 2147483648" in text for _, text in answers)
    assert {kind for kind, _ in ranks(3).run(attend, [GIB, None, GIB])} == {"ValueError"}
    answers = ranks(3).run(attend, [100] * 3)
    assert all("memory_budget=100 bytes is too small" in text for _, text in answers)
