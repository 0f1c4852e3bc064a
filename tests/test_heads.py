"""What ranks that trade heads for sequence send each other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ringflash import Mask, SimulatedWorld
from ringflash.parallel.transport.simulated import Mailbox


def sent(schedule: str, ulysses: int, return_lse: bool) -> tuple[int, list[Tensor]]:
    """Bytes that all of four ranks send in a forward pass, and its output and gradients."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 40, h, 8, generator=generator, dtype=torch.float64).requires_grad_() for h in (6, 3, 3))
    mailbox = Mailbox()
    world = SimulatedWorld(4, "contiguous", schedule, ulysses=ulysses)
    found = world.attention(q, k, v, mask=Mask.causal(), return_lse=return_lse, mailbox=mailbox)
    out = found[0] if isinstance(found, tuple) else found
    nbytes = mailbox.bytes_sent.total()
    return nbytes, [out.detach(), *torch.autograd.grad(out.square().sum(), (q, k, v))]


@pytest.mark.parametrize(("schedule", "ulysses"), [("ulysses", 1), ("hybrid", 2), ("ring", 1)])
def test_the_log_sum_exp_is_traded_where_it_is_asked_for_and_nowhere_else(schedule: str, ulysses: int) -> None:
    members = 4 if schedule == "ulysses" else ulysses
    (with_lse, expected), (without, found) = (sent(schedule, ulysses, return_lse) for return_lse in (True, False))
    # Every float64 of it but those that are at home already: one member's share of six heads on its own ten rows.
    assert with_lse - without == 8 * 2 * 40 * 6 * (members - 1) // members
    assert torch.equal(found[0], expected[0])
    for a, b in zip(found, expected, strict=True):  # where it is traded, so is its gradient, a zero here, and added elsewhere
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
