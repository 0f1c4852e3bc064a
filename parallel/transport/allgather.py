"""Chunks by all-gather: one collective brings every rank's whole chunk to everybody (schedule "allgather" only).

Gradients and heads, which differ by destination, go by all-to-all; gradients are then summed by their owner in float32 and in
a fixed order, which moves the same bytes as a reduce-scatter and does not depend on the collective's own order of adding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from ringflash.parallel.transport import Label, Message, Pending
from ringflash.parallel.transport.alltoall import AllToAll, Collective

# torch 2.13 renamed it and warns at every call of the old name
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class AllGather(AllToAll):
    """all_gather_into_tensor for chunks, padded to the longest; all_to_all_single for the rest."""

    name = "allgather"

    def post(self, label: Label, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        if label.what != "chunks":
            return super().post(label, sends, receives)
        # Untrimmed plans send one and the same chunk to all, and every rank knows every length, so all agree on the padding.
        own = sends[0].tensor.reshape(-1).view(torch.uint8) if sends else torch.empty(0, dtype=torch.uint8, device=self.device)
        longest = max([own.numel(), *(m.tensor.numel() * m.tensor.element_size() for m in receives)])
        padded = own if own.numel() == longest else torch.cat([own, own.new_zeros(longest - own.numel())])
        everything = torch.empty(self.world * longest, dtype=torch.uint8, device=self.device)
        work = _all_gather(everything, padded, group=self.group, async_op=True)
        assert work is not None
        return Collective(self, label, work, [padded], everything, [peer * longest for peer in range(self.world)], receives)
