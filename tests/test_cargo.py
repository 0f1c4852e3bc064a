"""What travels side by side: rows packed into one buffer and read back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ringflash import Mask, SimulatedWorld
from ringflash.parallel.schedule import Schedule
from ringflash.parallel.transport import Cargo, Label, Transport, _in_words, copy_rows, itinerary


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


def test_rows_of_usual_head_dims_are_copied_by_words() -> None:
    target, source = (torch.zeros(shape, dtype=torch.bfloat16) for shape in ((7, 2, 5, 264), (2, 7, 5, 128)))
    target = target[..., 128:256]
    assert _in_words(target, 4) and _in_words(source.transpose(0, 1), 4)
    assert not _in_words(target[..., 1:], 4) and not _in_words(source.transpose(2, 3), 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("widths", [(64, 64), (24, 8), (5, 3), (5, 2)])
@pytest.mark.parametrize("narrow", [0, 1, 2])
def test_what_was_packed_is_unpacked(dtype: torch.dtype, widths: tuple[int, ...], narrow: int) -> None:
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    wide = [torch.randn(2, 9, 3, width).to(dtype) for width in widths]
    thin = [torch.randn(2, 3, 9, dtype=acc) for _ in range(narrow)]
    cargo = Cargo(wide, thin)
    buffer = torch.full(cargo.shape(9), torch.nan, dtype=dtype)
    cargo.pack(buffer, ((2, 5), (7, 8)))
    assert [bool(row.isnan().any()) for row in buffer.flatten(1)[:, :1]] == [row not in (2, 3, 4, 7) for row in range(9)]
    cargo.pack(buffer, ((0, 9),))
    assert all(torch.equal(a, b) for a, b in zip(cargo.unpack(buffer), (*wide, *thin), strict=True))


def poisoned(self: Transport, label: Label, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype, device=device)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("mask", [Mask.causal(window=9), Mask.causal(), Mask.window(20, 3), Mask.documents([50, 3, 75])], ids=str)
@pytest.mark.parametrize(
    "schedule", [Schedule("ring"), Schedule("allgather", travels="q"), Schedule("double_ring", inner=2, pieces=2)], ids=str
)
def test_all_rows_that_leave_are_packed(schedule: Schedule, mask: Mask, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where leased memory is NaN until it is written, a world's results are those of one device."""
    monkeypatch.setattr(Transport, "lease", poisoned)
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(1, 128, h, 8, generator=generator, dtype=torch.float64) for h in (4, 2, 2, 4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    outs = [world.attention(*leaves, mask=mask) for world in (SimulatedWorld(4, layout, schedule), SimulatedWorld(1))]
    found, expected = ((out, *torch.autograd.grad(out, leaves, dout)) for out in outs if isinstance(out, Tensor))
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(found, expected, strict=True))


def test_a_window_sends_and_packs_the_edge_only() -> None:
    world = SimulatedWorld(4, "contiguous", "allgather")
    plans = [world.plan(rank, Mask.causal(window=300), 8192, 8192, 2, 2) for rank in range(4)]
    assert [itinerary(p).leaving for p in plans] == [((2048 - 299, 2048),)] * 3 + [()]
    everything = world.plan(0, Mask.causal(), 8192, 8192, 2, 2)
    assert itinerary(everything).leaving == ((0, 2048),)
