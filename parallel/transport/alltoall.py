"""One all-to-all a post: what goes to a peer travels as one flat message. For networks where collectives beat point to point."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ringflash.parallel.transport import Label, Message, Pending, Transport
from ringflash.parallel.transport.p2p import failure
from ringflash.parallel.watchdog import reached, watch


class AllToAll(Transport):
    """all_to_all_single with the plan's sizes. Every rank takes part in every post."""

    name = "alltoall"
    collective = True

    def __init__(
        self, group: dist.ProcessGroup, timeout_s: float, device: torch.device, ask: Callable[[int], str] = lambda peer: ""
    ) -> None:
        self.group, self.timeout_s, self.device, self.ask = group, timeout_s, device, ask
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)

    def post(self, label: Label, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        outgoing, send_sizes = _flat(sends, self.world, self.device)
        sizes = [0] * self.world
        for m in receives:
            sizes[m.peer] += m.tensor.numel() * m.tensor.element_size()
        incoming = torch.empty(sum(sizes), dtype=torch.uint8, device=self.device)
        work = dist.all_to_all_single(incoming, outgoing, sizes, send_sizes, group=self.group, async_op=True)
        starts = [sum(sizes[:peer]) for peer in range(self.world)]
        return Collective(self, label, work, [outgoing], incoming, starts, receives)


class Collective:
    """A collective under way; after it, messages are read out of one flat buffer of bytes."""

    def __init__(
        self,
        transport: AllToAll,
        label: Label,
        work: dist.Work,
        kept: list[Tensor],
        incoming: Tensor,
        starts: list[int],
        receives: Sequence[Message],
    ) -> None:
        self.transport, self.label, self.work, self.kept = transport, label, work, kept
        self.incoming, self.starts, self.receives = incoming, list(starts), receives

    def wait(self) -> None:
        t, begin = self.transport, time.monotonic()
        others = [p for p in range(t.world) if p != t.rank]
        try:
            if self.incoming.is_cuda:
                begun = reached()
                self.work.wait()
                watch(t.group, t.rank, self.label, others, t.timeout_s, begun)
            else:
                self.work.wait(timedelta(seconds=t.timeout_s))
        except RuntimeError as error:
            raise failure(t.rank, self.label, others, t.timeout_s, time.monotonic() - begin, error, t.ask) from error
        for m in self.receives:
            size = m.tensor.numel() * m.tensor.element_size()
            start = self.starts[m.peer]
            m.tensor.view(torch.uint8).view(-1).copy_(self.incoming[start : start + size])
            self.starts[m.peer] = start + size
        self.kept = []


def _flat(messages: Sequence[Message], world: int, device: torch.device) -> tuple[Tensor, list[int]]:
    """All messages as bytes, ordered by peer, and the bytes for each peer."""
    ordered = [m for peer in range(world) for m in messages if m.peer == peer]
    pieces = [m.tensor.reshape(-1).view(torch.uint8) for m in ordered]
    sizes = [sum(m.tensor.numel() * m.tensor.element_size() for m in ordered if m.peer == peer) for peer in range(world)]
    return (torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.uint8, device=device)), sizes
