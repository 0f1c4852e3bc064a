"""ringflash::delta without a GPU: its reference, its fake, its errors; and what the Hopper backward refuses."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ringflash.kernels import Problem, hopper_backward


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_dlse", [False, True])
def test_delta_is_the_row_sum_less_dlse(dtype: torch.dtype, with_dlse: bool) -> None:
    out, dout = (torch.randn(2, 5, 3, 7, dtype=torch.float64).to(dtype) for _ in range(2))
    dlse = torch.randn(2, 3, 5, dtype=torch.float64) if with_dlse else None
    expected = torch.einsum("bshd,bshd->bhs", out.double(), dout.double())
    expected = expected if dlse is None else expected - dlse
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    given = hopper_backward.delta(dout, out, None if dlse is None else dlse.to(acc))
    assert given.dtype == acc and given.is_contiguous()
    torch.testing.assert_close(given.double(), expected, rtol=1e-6, atol=1e-5)


def test_the_fake_of_delta_has_its_shape_and_dtype() -> None:
    out = torch.randn(2, 5, 3, 8, dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.ringflash.delta.default, (out, out, torch.randn(2, 3, 5)))


def test_delta_says_what_does_not_fit() -> None:
    out = torch.randn(2, 5, 3, 8)
    with pytest.raises(ValueError, match="one shape"):
        hopper_backward.delta(out, out[:, :4])
    with pytest.raises(ValueError, match=r"must have the shape \(B, H, S\)"):
        hopper_backward.delta(out, out, torch.randn(2, 5, 3))


def test_head_dims_that_the_backward_refuses() -> None:
    problem = Problem("cuda", (9, 0), torch.bfloat16, head_dim=128, head_dim_v=128, heads=2, kv_heads=1, needs_grad=True)
    assert hopper_backward.refuses(problem) is None
    for change in ({"head_dim": 100}, {"head_dim_v": 264}):
        reason = hopper_backward.refuses(dataclasses.replace(problem, **change))  # type: ignore[arg-type]
        assert reason is not None and "multiple of 8 up to 256" in reason
