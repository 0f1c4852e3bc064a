"""A backward pass that is one kernel call takes the kernel's short way, and no other pass does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ringflash import Mask, SimulatedWorld
from ringflash.kernels.reference import Reference
from ringflash.slices import Slices


class Short(Reference):
    """The reference with a short way, which it counts."""

    name = "short"
    extras = replace(Reference.extras, one_call=True)

    def __init__(self) -> None:
        self.taken = self.made_delta = 0

    def gradients(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        delta: Tensor | None,
        slices: Slices,
        *,
        scale: float,
        softcap: float = 0.0,
        deterministic: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        self.taken += 1
        self.made_delta += delta is None
        delta = (dout * out).sum(-1).transpose(1, 2) if delta is None else delta
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        self.backward(dout, q, k, v, out, lse, delta, slices, scale=scale, softcap=softcap, dq=dq, dk=dk, dv=dv)
        return dq, dk, dv


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Short:
    kernel = Short()
    monkeypatch.setattr("ringflash.api.choose", lambda backend, problem: kernel)
    return kernel


def inputs(seqlen: int = 50) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(2, seqlen, heads, 8) for heads in (4, 2, 2)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


@pytest.mark.parametrize("dlse", [False, True])
@pytest.mark.parametrize("sinks", [False, True])
def test_same_gradients(short: Short, sinks: bool, dlse: bool) -> None:
    tensors = inputs()
    sink = torch.linspace(-1, 1, 4, dtype=torch.float64).requires_grad_() if sinks else None
    wanted = [*tensors, *([] if sink is None else [sink])]

    def gradients() -> tuple[Tensor, ...]:
        out, lse = SimulatedWorld(1).attention(*tensors, mask=Mask.causal(window=20), sinks=sink, return_lse=True)
        loss = out.square().sum() + (lse.sin().sum() if dlse else 0.0)
        return torch.autograd.grad(loss, wanted)

    there = gradients()
    assert short.taken == 1
    assert short.made_delta == (not sinks and not dlse)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ringflash.api.choose", lambda backend, problem: Reference())
        back = gradients()
    for a, b in zip(there, back, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("world, mask", [(1, Mask.dilated(3)), (2, Mask.causal()), (2, Mask.documents([25, 25]))])
def test_every_other_pass_takes_the_loop(short: Short, world: int, mask: Mask) -> None:
    """Strided views, several steps; also one step on this rank, since others may send it gradients."""
    tensors = inputs()
    out = SimulatedWorld(world).attention(*tensors, mask=mask)
    assert isinstance(out, Tensor)
    torch.autograd.grad(out.sum(), tensors)
    assert short.taken == 0
