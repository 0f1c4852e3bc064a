"""Heads in groups, one after the other: the same numbers with less memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ringflash import Mask
from ringflash.autograd import Attention, Job
from ringflash.kernels import load
from ringflash.parallel.transport.simulated import Mailbox, Simulated
from ringflash.simulated import SimulatedWorld


def run(groups: int, schedule: str, mask: Mask, sinks: bool, dlse: bool) -> list[Tensor]:
    """Out, lse and all gradients of four simulated ranks, those of the sinks summed over them."""
    make = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=make, dtype=torch.float64)

    world = SimulatedWorld(4, "zigzag", schedule, ulysses=2 if schedule == "hybrid" else 1)
    kernel = load("reference")
    mailbox = Mailbox()
    assert kernel is not None
    jobs, tensors = [], []
    sink = normal(8) if sinks else None
    for rank in range(4):
        plan = world.plan(rank, mask, 50, 50, 8, 4)
        jobs.append(Job(plan, kernel, Simulated(mailbox, rank), 0.3, 0.0, False, dlse, groups=groups))
        n = plan.q_lengths[plan.member]
        tensors += [normal(2, n, 8, 6), normal(2, n, 4, 6), normal(2, n, 4, 5)]
        tensors.append(sink)  # type: ignore[arg-type]
    leaves: list[Any] = [x if x is None else x.requires_grad_() for x in tensors]
    results = [x for x in Attention.apply(tuple(jobs), *leaves) if x is not None]  # type: ignore[no-untyped-call]
    mailbox.assert_empty()
    roots = results if dlse or len(results) == 4 else results[::2]
    wanted = list(dict.fromkeys(x for x in leaves if x is not None))
    grads = torch.autograd.grad(roots, wanted, [normal(*x.shape) for x in roots])
    mailbox.assert_empty()
    return [*results, *grads]


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("schedule", ["ring", "allgather", "ulysses", "hybrid"])
@pytest.mark.parametrize(("sinks", "dlse"), [(False, False), (True, True)])
def test_groups_of_heads_give_the_same(groups: int, schedule: str, sinks: bool, dlse: bool) -> None:
    for mask in (Mask.causal(), Mask.dilated(3)):
        expected = run(1, schedule, mask, sinks, dlse)
        for a, b in zip(run(groups, schedule, mask, sinks, dlse), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_groups_keep_a_ratio_of_heads() -> None:
    job = Job(SimulatedWorld(1).plan(0, Mask.full(), 4, 4, 6, 3), load("reference"), None, 1.0, 0.0, False)  # type: ignore[arg-type]
    with pytest.raises(AssertionError):
        Attention.apply((replace(job, groups=2),), *(torch.zeros(1, 4, h, 2) for h in (6, 3, 3)), None)  # type: ignore[no-untyped-call]
