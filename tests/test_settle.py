"""Rows that a forward call completes are written once, in their final dtype, and nobody looks at them again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from ringflash import Mask, SimulatedWorld, kernels
from ringflash.kernels import Settle, cpu
from ringflash.kernels.reference import Reference
from ringflash.slices import Slices, settled_rows


class Poisoned(Reference):
    """The reference, which spoils the running output wherever the contract leaves it unspecified, and counts settled rows."""

    def __init__(self, settle_rows: int) -> None:
        self.extras = replace(Reference.extras, settle_rows=settle_rows)
        self.settled = 0

    def forward(self, *args: Any, settle: Settle | None = None, **kwargs: Any) -> kernels.State:
        out, lse = super().forward(*args, settle=settle, **kwargs)
        for begin, end in settle.rows if settle is not None else ():
            out[:, begin:end] = torch.nan
            self.settled += end - begin
        return out, lse


@pytest.mark.parametrize("mask", [Mask.documents([7, 60, 3, 0, 20, 38]), Mask.causal(window=9), Mask.causal(), Mask.prefix(30)])
@pytest.mark.parametrize("layout, schedule", [("contiguous", "ring"), ("zigzag", "ring"), ("balanced", "staged:2")])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("settle_rows", [1, 8])
def test_same_results_as_without(
    monkeypatch: pytest.MonkeyPatch, mask: Mask, layout: str, schedule: str, sinks: bool, settle_rows: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 128, h, 8, generator=generator, dtype=torch.float64) for h in (4, 2, 2))
    sink = torch.linspace(-1, 1, 4, dtype=torch.float64) if sinks else None

    def outputs(kernel: Reference) -> tuple[torch.Tensor, ...]:
        monkeypatch.setattr("ringflash.api.choose", lambda backend, problem: kernel)
        world = SimulatedWorld(4, layout=layout, schedule=schedule)
        if layout == "balanced":
            world = world.for_mask(mask)
        return tuple(world.attention(q, k, v, mask=mask, sinks=sink, return_lse=True))

    settling, plain = Poisoned(settle_rows), Poisoned(0)
    for a, b in zip(outputs(settling), outputs(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    assert plain.settled == 0
    if "documents" in repr(mask) or "window" in repr(mask):  # else a rank's rows may all wait for its last call
        assert settling.settled > 0


@pytest.mark.parametrize("kernel", [Reference(), cpu.KERNEL], ids=lambda k: k.name)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_kernels_settle_rows(kernel: Any, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(5)
    q, k, v = (torch.randn(1, 40, 2, 8, dtype=dtype) for _ in range(3))
    cuts = np.sort(rng.integers(0, 41, (3, 2)))
    calls = [Slices.from_rows([(a, b, n * 13, n * 13 + 13, -100, 100)]) for n, (a, b) in enumerate(cuts.tolist())]
    final = torch.full_like(q, torch.nan)
    carry = None
    for slices, rows in zip(calls, settled_rows(calls, 40, kernel.extras.settle_rows), strict=True):
        before = None if carry is None else (carry[0].clone(), carry[1].clone())
        carry = kernel.forward(q, k, v, slices, scale=0.3, carry=carry, finish=False, settle=Settle(final, rows))
        if before is not None:
            still = torch.ones(40, dtype=torch.bool)
            for begin, end in [(s.q0, s.q1) for s in slices] + list(rows):
                still[begin:end] = False
            assert torch.equal(carry[0][:, still], before[0][:, still])
            assert torch.equal(carry[1][:, :, still], before[1][:, :, still])
    wanted = None
    for n, slices in enumerate(calls):
        wanted = kernel.forward(q, k, v, slices, scale=0.3, carry=wanted, finish=n == 2)
    assert wanted is not None and carry is not None
    assert torch.equal(final, wanted[0])
    assert torch.equal(carry[1], wanted[1])
