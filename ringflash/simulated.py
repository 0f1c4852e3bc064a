"""SimulatedWorld: all ranks of a context in one process. Same plans, same loops, no processes."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from ringflash.api import check, demand, kernel_for, row_major
from ringflash.autograd import Attention, Job
from ringflash.mask import Mask
from ringflash.parallel.layout import Layout
from ringflash.parallel.schedule import Schedule
from ringflash.parallel.sharding import Sharding, take
from ringflash.parallel.transport.simulated import Mailbox, Simulated


class SimulatedWorld(Sharding):
    """A whole world in this process, for tests, planning and debugging.

    Arguments as for ContextParallel, with the number of ranks in place of the mesh. There is no symmetric memory, so "auto" is a
    ring in training too.
    """

    def __init__(
        self,
        world: int,
        layout: str | Layout = "zigzag",
        schedule: str | Schedule = "auto",
        *,
        ulysses: int = 1,
        inner: int | None = None,
        memory_budget: int | str | None = None,
    ) -> None:
        super().__init__(world, layout, schedule, ulysses, inner)
        self.keep_within(memory_budget)

    def for_mask(self, mask: Mask) -> SimulatedWorld:
        """A view for a mask, as of ContextParallel."""
        view = copy.copy(self)
        view.mask = mask
        return view

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Mask | None = None,
        scale: float | None = None,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
        backend: str = "auto",
        deterministic: bool = False,
        return_lse: bool = False,
        mailbox: Mailbox | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`ringflash.attention` of FULL tensors (B, S, H, D), computed by all ranks in turn; returns full tensors.

        Arguments, returns and errors as there; differentiable. ``mailbox`` records the traffic.
        """
        mask = self.bound(mask)
        call = check(q, k, v, mask, scale, softcap, sinks, backend, deterministic, return_lse)
        mask.check(q.shape[1], k.shape[1])
        mailbox = mailbox or Mailbox()
        sizes = (mask, q.shape[1], k.shape[1], q.shape[2], k.shape[2])
        choice = 0
        if self.memory_budget is not None:
            kernels = [kernel_for(call, self.plan(rank, *sizes)) for rank in range(self.world)]
            choice = self.common([self.affordable(demand(call, kernel), rank, *sizes) for rank, kernel in enumerate(kernels)])
        way = self.frugalities(self.plan(0, *sizes))[choice]
        jobs = []
        for rank in range(self.world):
            plan = self.plan(rank, *sizes, way.rows)
            rest = (call.scale, call.softcap, deterministic, return_lse, call.needs_grad, way.groups)
            jobs.append(Job(plan, kernel_for(call, plan), Simulated(mailbox, rank), *rest))
        pieces = zip(*(self.shards(row_major(x)) for x in (q, k, v)), strict=True)
        results = Attention.apply(tuple(jobs), *(x for rank in pieces for x in (*rank, sinks)))  # type: ignore[no-untyped-call]
        mailbox.assert_empty()
        out = self.unshards(results[0::2])
        return (out, self.unshards(results[1::2], dim=2)) if return_lse else out

    def shards(self, x: Tensor, dim: int = 1) -> list[Tensor]:
        """The rows of every rank."""
        layout = self.layout_of(x.shape[dim])
        return [take(x, layout, rank, dim) for rank in range(self.world)]

    def unshards(self, pieces: Sequence[Tensor], dim: int = 1) -> Tensor:
        """The full tensor from the rows of every rank."""
        layout = self.layout_of(sum(p.shape[dim] for p in pieces))
        full = torch.cat(list(pieces), dim)
        return full.index_select(dim, torch.from_numpy(layout.inverse).to(full.device))
