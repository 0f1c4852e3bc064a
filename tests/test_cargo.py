"""What travels side by side: rows packed into one buffer and read back."""

from __future__ import annotations

import pytest
import torch

from ringflash.parallel.transport import Cargo, copy_rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [3, 8, 12, 64])
def test_rows_are_copied_whatever_their_place(dtype: torch.dtype, dim: int) -> None:
    buffer = torch.zeros(7, 2, 5, 2 * dim + 8, dtype=dtype)
    whole = torch.randn(2, 7, 6, dim + 1).to(dtype)
    for source in (
        whole[:, :, 1:, :dim],
        whole[:, :, 1:, 1:],
        whole[:, :, :5, :dim].transpose(2, 3).contiguous().transpose(2, 3),
    ):
        buffer.zero_()
        copy_rows(buffer[..., dim : 2 * dim], source.transpose(0, 1))
        assert torch.equal(buffer[..., dim : 2 * dim], source.transpose(0, 1))
        assert not buffer[..., :dim].any() and not buffer[..., 2 * dim :].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("widths", [(64, 64), (24, 8), (5, 3), (5, 2)])
@pytest.mark.parametrize("narrow", [0, 1, 2])
def test_what_was_packed_is_unpacked(dtype: torch.dtype, widths: tuple[int, ...], narrow: int) -> None:
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    wide = [torch.randn(2, 9, 3, width).to(dtype) for width in widths]
    thin = [torch.randn(2, 3, 9, dtype=acc) for _ in range(narrow)]
    cargo = Cargo(wide, thin)
    buffer = torch.full(cargo.shape(9), torch.nan, dtype=dtype)
    cargo.pack(buffer)
    assert all(torch.equal(a, b) for a, b in zip(cargo.unpack(buffer), (*wide, *thin), strict=True))
