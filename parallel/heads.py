"""Ulysses: before the ring, neighbouring ranks trade heads for sequence, and back afterwards (DeepSpeed Ulysses, 2309.14509).

Query heads are cut as evenly as they go, also when the ranks do not divide them; every member gets the key heads that its query
heads use, so fewer key heads than ranks work too (the gradients of a shared key head are summed at home, in float32).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Generator, Iterator, Sequence

import torch
from torch import Tensor

from ringflash.parallel.plan import HeadShare, Plan
from ringflash.parallel.transport import Label, Message, Pending, Transport

Turns = Generator[None, None, list[Tensor]]
"""A piece of the running code that yields wherever a simulated world must let the other ranks catch up."""


class HeadExchange:
    """The exchange of one plan. With one member it hands tensors through untouched."""

    def __init__(self, plan: Plan, transport: Transport) -> None:
        self.plan, self.transport = plan, transport
        self.members = len(plan.shares)
        self.first = plan.rank * self.members

    def _rows(self, keys: bool) -> list[slice]:
        lengths = self.plan.k_lengths if keys else self.plan.q_lengths
        starts = [sum(lengths[:i]) for i in range(self.members)]
        return [slice(a, a + n) for a, n in zip(starts, lengths, strict=True)]

    def enter(self, tensors: Sequence[tuple[Tensor, bool]]) -> Turns:
        """All heads of the own rows -> the own heads of all members' rows.

        tensors: (x, keys) with x (B, S_rank, H or Hkv, D); keys says which lengths and heads count. Returns (B, S, h, D).
        """
        if self.members == 1:
            return [x for x, _ in tensors]
        results, sends, receives = [], [], []
        for x, keys in tensors:
            x, mine = x.transpose(0, 1), self.plan.share.span(keys)
            rows = self._rows(keys)
            out = x.new_empty((rows[-1].stop, x.shape[1], mine.stop - mine.start, x.shape[3]))
            out[rows[self.plan.member]] = x[:, :, mine]
            for peer, share in self._others():
                sends.append(Message(self.first + peer, x[:, :, share.span(keys)].contiguous()))
                receives.append(Message(self.first + peer, out[rows[peer]]))
            results.append(out)
        pending = self._post(0, sends, receives)
        yield
        pending.wait()
        return [self._spread(out, keys).transpose(0, 1) for out, (_, keys) in zip(results, tensors, strict=True)]

    def leave(self, tensors: Sequence[tuple[Tensor, bool]], heads: Sequence[int]) -> Turns:
        """The reverse: own heads of all members' rows -> all ``heads`` of the own rows; shared key heads add up."""
        results, sends, receives, arrivals = [], [], [], []
        for (x, keys), n_heads in zip(tensors, heads, strict=True):
            x = self._folded(x, keys).transpose(0, 1)
            rows = self._rows(keys)
            own = x[rows[self.plan.member]]
            out = x.new_zeros((own.shape[0], own.shape[1], n_heads, own.shape[3]))
            parts = {self.plan.member: own}
            for peer, share in self._others():
                span = share.span(keys)
                sends.append(Message(self.first + peer, x[rows[peer]].contiguous()))
                parts[peer] = x.new_empty((*out.shape[:2], span.stop - span.start, out.shape[3]))
                receives.append(Message(self.first + peer, parts[peer]))
            results.append(out)
            arrivals.append((parts, keys))
        pending = self._post(len(self.plan.steps), sends, receives)
        yield
        pending.wait()
        for out, (parts, keys) in zip(results, arrivals, strict=True):
            for member, share in enumerate(self.plan.shares):  # in the members' order on every rank: the sum is reproducible
                out[:, :, share.span(keys)] += parts[member]
        return [out.transpose(0, 1) for out in results]

    def _spread(self, x: Tensor, keys: bool) -> Tensor:
        """Keys laid out once per query head, where the shares keep no ratio."""
        index = self.plan.share.k_index
        if not keys or index is None:
            return x
        return torch.cat([x[:, :, k : k + 1].expand(-1, -1, len(heads), -1) for k, heads in enumerate(_served(index))], 2)

    def _folded(self, x: Tensor, keys: bool) -> Tensor:
        """Gradients of such keys summed back to one per key head, always in the same order."""
        index = self.plan.share.k_index
        if not keys or index is None:
            return x
        out = x.new_empty((*x.shape[:2], self.plan.share.traded(keys), x.shape[3]))
        for k, heads in enumerate(_served(index)):
            torch.sum(x[:, :, heads.start : heads.stop], 2, out=out[:, :, k])
        return out

    def _others(self) -> Iterator[tuple[int, HeadShare]]:
        return ((i, share) for i, share in enumerate(self.plan.shares) if i != self.plan.member)

    def _post(self, step: int, sends: list[Message], receives: list[Message]) -> Pending:
        return self.transport.post(Label("heads", step), _filled(sends), _filled(receives))


def _served(k_index: Sequence[int]) -> list[range]:
    """By key head: the query heads that use it, which stand side by side."""
    return [range(bisect_left(k_index, k), bisect_right(k_index, k)) for k in range(k_index[-1] + 1)]


def _filled(messages: list[Message]) -> list[Message]:
    """Messages with something in them: both sides know the sizes, so empty ones need not travel."""
    return [m for m in messages if m.tensor.numel()]
