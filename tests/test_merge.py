"""The laws of merging partial results: associative, commutative, unit (0, -inf), and no overflow or NaN at any log-sum-exp."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ringflash.merge import merge_

State = tuple[Tensor, Tensor]

B, S, H, DV = 2, 11, 3, 5
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6}


def state(seed: int, dtype: torch.dtype, spread: float = 3.0) -> State:
    generator = torch.Generator().manual_seed(seed)
    out = torch.randn(B, S, H, DV, generator=generator, dtype=torch.float64)
    lse = torch.randn(B, H, S, generator=generator, dtype=torch.float64) * spread
    return out.to(dtype), lse.to(dtype)


def unit(dtype: torch.dtype) -> State:
    return torch.zeros(B, S, H, DV, dtype=dtype), torch.full((B, H, S), -torch.inf, dtype=dtype)


def merged(a: State, b: State) -> State:
    out, lse = a[0].clone(), a[1].clone()
    merge_(out, lse, *b)
    return out, lse


def assert_same(a: State, b: State, tolerance: float) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
class TestLaws:
    def test_is_the_sum_of_weighted_outputs(self, dtype: torch.dtype) -> None:
        (out_a, lse_a), (out_b, lse_b) = a, b = state(1, dtype), state(2, dtype)
        w_a, w_b = (x.double().exp().transpose(1, 2).unsqueeze(-1) for x in (lse_a, lse_b))
        out = (w_a * out_a.double() + w_b * out_b.double()) / (w_a + w_b)
        lse = (lse_a.double().exp() + lse_b.double().exp()).log()
        assert_same(merged(a, b), (out.to(dtype), lse.to(dtype)), TOLERANCE[dtype])

    def test_commutative(self, dtype: torch.dtype) -> None:
        a, b = state(1, dtype), state(2, dtype)
        assert_same(merged(a, b), merged(b, a), TOLERANCE[dtype])

    def test_associative(self, dtype: torch.dtype) -> None:
        a, b, c = (state(n, dtype) for n in (1, 2, 3))
        assert_same(merged(merged(a, b), c), merged(a, merged(b, c)), TOLERANCE[dtype])

    def test_unit_changes_nothing_bitwise(self, dtype: torch.dtype) -> None:
        a = state(1, dtype)
        for result in (merged(a, unit(dtype)), merged(unit(dtype), a)):
            assert torch.equal(result[0], a[0]) and torch.equal(result[1], a[1])

    def test_two_empty_rows_stay_empty(self, dtype: torch.dtype) -> None:
        out, lse = merged(unit(dtype), unit(dtype))
        assert torch.equal(out, unit(dtype)[0]) and torch.equal(lse, unit(dtype)[1])

    @pytest.mark.parametrize("level", [1e4, -1e4])
    def test_any_level_of_lse(self, dtype: torch.dtype, level: float) -> None:
        """Adding a constant to every log-sum-exp changes no output (the level is exact in float32 beside these values)."""
        a, b = state(1, dtype), state(2, dtype)
        lse_a, lse_b = (x.mul(8).round().div(8) for x in (a[1], b[1]))  # so that adding the level rounds nothing away
        plain = merged((a[0], lse_a), (b[0], lse_b))
        shifted = merged((a[0], lse_a + level), (b[0], lse_b + level))
        assert_same((plain[0], plain[1] + level), shifted, TOLERANCE[dtype])

    def test_the_heavier_side_wins(self, dtype: torch.dtype) -> None:
        a, b = state(1, dtype, spread=0.0), state(2, dtype, spread=0.0)
        for heavy, light in ((1e4, -1e4), (1e4, 0.0), (0.0, -1e4)):
            result = merged((a[0], a[1] + heavy), (b[0], b[1] + light))
            assert torch.equal(result[0], a[0]) and torch.equal(result[1], a[1] + heavy)
            result = merged((a[0], a[1] + light), (b[0], b[1] + heavy))
            assert torch.equal(result[0], b[0]) and torch.equal(result[1], b[1] + heavy)

    def test_strided_views(self, dtype: torch.dtype) -> None:
        """State and part may be every second row of longer buffers; rows between are left alone."""
        a, b = state(1, dtype), state(2, dtype)
        out, lse = torch.full((B, 2 * S, H, DV), 7.0, dtype=dtype), torch.full((B, H, 2 * S), 7.0, dtype=dtype)
        out[:, 1::2], lse[:, :, 1::2] = a
        part = b[0].transpose(1, 2).contiguous().transpose(1, 2), b[1].transpose(1, 2).contiguous().transpose(1, 2)
        merge_(out[:, 1::2], lse[:, :, 1::2], *part)
        assert_same((out[:, 1::2], lse[:, :, 1::2]), merged(a, b), TOLERANCE[dtype])
        assert torch.equal(out[:, ::2], torch.full_like(a[0], 7.0)) and torch.equal(lse[:, :, ::2], torch.full_like(a[1], 7.0))

    def test_nan_stays_in_its_row(self, dtype: torch.dtype) -> None:
        a, b = state(1, dtype), state(2, dtype)
        b[0][0, 3, 1], b[1][0, 1, 3] = torch.nan, torch.nan
        out, lse = merged(a, b)
        assert out[0, 3, 1].isnan().all() and lse[0, 1, 3].isnan()
        assert int(out.isnan().sum()) == DV and int(lse.isnan().sum()) == 1

    def test_the_output_of_an_empty_side_is_not_read(self, dtype: torch.dtype) -> None:
        a, empty = state(1, dtype), unit(dtype)
        empty[0].fill_(torch.nan)
        out, lse = merged(a, empty)
        assert torch.equal(out, a[0]) and torch.equal(lse, a[1])
        out, lse = merged(empty, a)
        assert torch.equal(out, a[0]) and torch.equal(lse, a[1])
        out, lse = merged(empty, empty)
        assert not out.any() and bool(lse.isneginf().all())


@pytest.mark.parametrize("part_dtype", [torch.bfloat16, torch.float16])
def test_parts_of_low_precision(part_dtype: torch.dtype) -> None:
    a, (out_part, lse_part) = state(1, torch.float32), state(2, torch.float32)
    rounded = out_part.to(part_dtype)
    assert_same(merged(a, (rounded, lse_part)), merged(a, (rounded.float(), lse_part)), TOLERANCE[torch.float32])


def test_many_small_parts() -> None:
    """A softmax cut into 64 parts: weights of all sizes add up to 1 to the last digits."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(B, H, S, 64, generator=generator, dtype=torch.float64) * 30
    values = torch.randn(64, DV, generator=generator, dtype=torch.float64)
    out, lse = unit(torch.float32)
    for j in range(64):
        merge_(out, lse, values[j].float().expand(B, S, H, DV), scores[..., j].float())
    exact = (scores.float().double().softmax(-1) @ values.float().double()).transpose(1, 2)
    assert (out.double() - exact).abs().max() < 2e-6
    assert (lse.double() - scores.float().double().logsumexp(-1)).abs().max() < 2e-5
