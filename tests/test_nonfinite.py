"""NaN and infinities reach the rows that see them, as on one device, and no other rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from ringflash.testing import Case, Inputs, RankPool, Results, make_inputs, objections_on_ranks, simulate, visibility
from ringflash.testing.oracle import dense_results

Ranks = Callable[[int], RankPool]

S = 24
MASKS = ("full()", "causal()", "causal(window=7)", "documents([5, 0, 12, 7])", "dilated(3)", 'blocks(["101", "010", "110"], 8)')
WORLDS = [
    Case(world=1, layout="contiguous"),
    Case(world=4, layout="zigzag", schedule="ring"),
    Case(world=4, layout="striped", schedule="allgather"),
    Case(world=4, layout="contiguous", schedule="double_ring", inner=2),
    Case(world=4, layout="zigzag", schedule="hybrid", ulysses=2),
]


@dataclass(frozen=True)
class Poison:
    """A value put into one row of one tensor (all heads, one feature)."""

    tensor: str
    row: int
    value: float

    def into(self, inputs: Inputs) -> Inputs:
        spoilt = getattr(inputs, self.tensor).clone()
        spoilt[:, self.row, :, 1] = self.value
        return replace(inputs, **{self.tensor: spoilt})


POISONS = [Poison(tensor, row, value) for tensor in ("q", "k", "v") for row in (0, 10) for value in (math.nan, math.inf)]


def case_of(world: Case, mask: str, dtype: str) -> Case:
    return replace(world, mask=mask, dtype=dtype, q_len=S, k_len=S, heads=4, kv_heads=2, dlse=False)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("poison", POISONS, ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_a_bad_value_reaches_the_rows_that_see_it_and_no_others(mask: str, poison: Poison, dtype: str) -> None:
    for world in WORLDS:
        case = case_of(world, mask, dtype)
        clean = make_inputs(case)
        visible = visibility(case.build_mask(), S, S)
        # Rows of the output that the poisoned row can reach at all.
        reached = torch.arange(S) == poison.row if poison.tensor == "q" else visible[:, poison.row]
        before, after = simulate(case, clean), simulate(case, poison.into(clean))
        # Not bitwise: a backend may hand a call with bad values to another one.
        rtol, atol = (1e-12, 1e-12) if dtype == "float64" else (2**-7, 1e-2)
        for name, dim in (("out", 1), ("lse", 2)):
            was, now = (getattr(r, name).index_select(dim, torch.nonzero(~reached)[:, 0]) for r in (before, after))
            assert torch.allclose(was, now, rtol=rtol, atol=atol), f"other rows of {name} changed: {case!r}"
        if math.isnan(poison.value):
            seeing = reached & visible.any(-1)
            assert after.out[:, seeing].isnan().any(-1).all(), f"a NaN was lost: {case!r}"


def pattern(results: Results) -> dict[str, torch.Tensor]:
    """Which elements are NaN, +inf, -inf or finite."""
    return {name: x.isnan() + 2 * x.isposinf() + 4 * x.isneginf() for name, x in results.items()}


@pytest.mark.parametrize("poison", POISONS, ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_outputs_are_those_of_one_device(mask: str, poison: Poison) -> None:
    alone = case_of(WORLDS[0], mask, "float64")
    spoilt = poison.into(make_inputs(alone))
    expected = pattern(simulate(alone, spoilt))
    for world in WORLDS[1:]:
        case = case_of(world, mask, "float64")
        found = pattern(simulate(case, spoilt))
        for name in ("out", "lse"):
            assert torch.equal(found[name], expected[name]), f"{name}: {case!r}"


@pytest.mark.parametrize("poison", [p for p in POISONS if math.isnan(p.value)], ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_gradients_of_rows_that_see_nothing_bad_stay_finite(mask: str, poison: Poison) -> None:
    """A bad key spoils dq of the rows that see it, and through their NaN weights dk, dv of what these see; nothing else."""
    for world in WORLDS:
        case = case_of(world, mask, "float64")
        visible = visibility(case.build_mask(), S, S)
        bad_rows = torch.arange(S) == poison.row if poison.tensor == "q" else visible[:, poison.row]
        bad_keys = visible[bad_rows].any(0)
        results = simulate(case, poison.into(make_inputs(case)))
        assert results.dq[:, ~bad_rows].isfinite().all(), repr(case)
        assert results.dk[:, ~bad_keys].isfinite().all() and results.dv[:, ~bad_keys].isfinite().all(), repr(case)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_large_scores_do_not_overflow(dtype: str) -> None:
    """Scores of thousands: exp of them overflows in any dtype unless the largest is taken off first."""
    for world in WORLDS:
        case = replace(case_of(world, "causal()", dtype), scale=300.0)
        inputs = make_inputs(case)
        exact = dense_results(inputs, visibility(case.build_mask(), S, S), dtype=torch.float64, scale=300.0)
        found = simulate(case, inputs)
        assert all(x.isfinite().all() for _, x in found.items()), repr(case)
        assert torch.allclose(found.lse.double(), exact.lse, rtol=1e-5 if dtype != "float64" else 1e-12), repr(case)


def test_minus_infinity_as_a_key_hides_it() -> None:
    """Scores of -inf are keys that no row sees; a row with nothing else is empty."""
    case = Case(world=2, layout="contiguous", mask="causal()", q_len=8, k_len=8, heads=1, kv_heads=1, head_dim=8, dlse=False)
    inputs = make_inputs(case)
    q, k = inputs.q.abs(), inputs.k.clone()
    k[:, 0] = -math.inf
    results = simulate(case, replace(inputs, q=q, k=k))
    assert torch.equal(results.lse[:, :, 0], torch.full_like(results.lse[:, :, 0], -math.inf))
    assert results.lse[:, :, 1:].isfinite().all()


def test_real_ranks_too(ranks: Ranks) -> None:
    """The worlds of this file are right on clean inputs as real processes (bad values travel as any bits do)."""
    cases = [case_of(world, mask, "float64") for world in WORLDS if world.world == 4 for mask in MASKS]
    assert objections_on_ranks(ranks(4), cases) == []
