"""Ulysses: before the ring, neighbouring ranks trade heads for sequence, and back afterwards (DeepSpeed Ulysses, 2309.14509).

Query heads are cut as evenly as they go, also when the ranks do not divide them; every member gets the key heads that its query
heads use, so fewer key heads than ranks work too (the gradients of a shared key head are summed at home, in float32).

Where heads are computed in groups, one group is on its way while another is computed: see autograd.py.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Generator, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ringflash.parallel import trace
from ringflash.parallel.plan import Plan
from ringflash.parallel.transport import Label, Message, Pending, Transport, copy_rows

POSTED = True
"""What a loop yields where an exchange of heads has just been posted: who drives it may have other heads to compute meanwhile."""

T = TypeVar("T")
Turns = Generator[Any, None, T]
"""A piece of the running code: yields POSTED, and None wherever else it is about to wait for others, which a simulated world must
let catch up."""

ALIGNMENT = 16
"""Of blocks in memory that others read, bytes."""

Blocks = tuple[range, Tensor]
"""Members side by side whose blocks are alike, and these blocks as one tensor: (members, rows, B, heads, D)."""


class Traded(NamedTuple):
    """A tensor of an exchange: bytes of one row of one head, all batch entries together, and whether its heads are key heads."""

    unit: int
    keys: bool


def block_bytes(plan: Plan, entering: bool, source: int, dest: int, what: Traded) -> int:
    """What one member packs for another of a tensor: its own rows of the other's heads, or on the way back the other's rows of
    its own heads."""
    lengths = plan.k_lengths if what.keys else plan.q_lengths
    rows, share = (lengths[source], plan.shares[dest]) if entering else (lengths[dest], plan.shares[source])
    return _aligned(rows * share.traded(what.keys) * what.unit)


@lru_cache(maxsize=1024)
def largest_pack(plan: Plan, entering: bool, tensors: tuple[Traded, ...]) -> int:
    """The most bytes that any rank of the world packs for the others of its group: the same on all ranks."""
    rows = {False: max(plan.key.q_layout.lengths), True: max(plan.key.k_layout.lengths)}

    def packed(source: int) -> int:
        others = [share for m, share in enumerate(plan.shares) if m != source]
        shares = others if entering else [plan.shares[source]] * len(others)
        return sum(_aligned(rows[x.keys] * share.traded(x.keys) * x.unit) for share in shares for x in tensors)

    return max(map(packed, range(len(plan.shares))))


class _Route(NamedTuple):
    """An exchange through memory that others read."""

    largest: int
    """Bytes of a buffer: `largest_pack`."""
    end: int
    """Bytes that this member packs."""
    begins: dict[tuple[int, int], int]
    """Where in these a block begins, by tensor and receiver."""
    readers: tuple[int, ...]
    reads: tuple[tuple[int, int, int], ...]
    """Member, tensor, and where its block for this one begins in what that member packs."""


@lru_cache(maxsize=1024)
def _route(plan: Plan, entering: bool, tensors: tuple[Traded, ...]) -> _Route:
    def begins(source: int) -> tuple[dict[tuple[int, int], int], int]:
        found, at = {}, 0
        for i, what in enumerate(tensors):
            for dest in (m for m in range(len(plan.shares)) if m != source):
                found[i, dest] = at
                at += block_bytes(plan, entering, source, dest, what)
        return found, at

    def some(source: int, dest: int, what: Traded) -> bool:
        return block_bytes(plan, entering, source, dest, what) > 0

    (mine, end), me = begins(plan.member), plan.member
    others = _others(plan)
    readers = tuple(m for m in others if any(some(me, m, what) for what in tensors))
    reads = tuple((m, i, begins(m)[0][i, me]) for m in others for i, what in enumerate(tensors) if some(m, me, what))
    return _Route(largest_pack(plan, entering, tensors), end, mine, readers, reads)


def _others(plan: Plan) -> tuple[int, ...]:
    """The other members, the next one first, so that every one is read by one other at a time."""
    members = len(plan.shares)
    return tuple((plan.member + hop) % members for hop in range(1, members))


class _Cut(NamedTuple):
    """How members share a tensor's rows and heads; the other members, together as far as their rows, or heads, are equal and side
    by side: one copy does for all of them."""

    rows: tuple[slice, ...]
    heads: tuple[slice, ...]
    by_rows: tuple[range, ...]
    by_heads: tuple[range, ...]


@lru_cache(maxsize=1024)
def _cut(plan: Plan, keys: bool) -> _Cut:
    ends = list(accumulate(plan.k_lengths if keys else plan.q_lengths))
    rows = tuple(slice(a, b) for a, b in pairwise([0, *ends]))
    heads = tuple(share.span(keys) for share in plan.shares)

    def runs(slices: Sequence[slice]) -> tuple[range, ...]:
        found: list[range] = []
        for m in (m for m in range(len(slices)) if m != plan.member):
            before, mine = slices[m - 1], slices[m]
            if (
                found
                and found[-1].stop == m
                and (before.stop, before.stop - before.start) == (mine.start, mine.stop - mine.start)
            ):
                found[-1] = range(found[-1].start, m + 1)
            else:
                found.append(range(m, m + 1))
        return tuple(found)

    return _Cut(rows, heads, runs(rows), runs(heads))


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _parts(x: Tensor, dim: int, slices: Sequence[slice], run: range) -> Tensor:
    """Equal slices of a dim side by side, as a view: (members, rows, B, heads, D) of x (rows, B, heads, D)."""
    first = slices[run[0]]
    size = first.stop - first.start
    parts: Tensor = x.narrow(dim, first.start, size * len(run)).unflatten(dim, (len(run), size))
    return parts.movedim(dim, 0)


class HeadExchange:
    """The exchange of one plan. With one member it hands tensors through untouched."""

    def __init__(self, plan: Plan, transport: Transport) -> None:
        self.plan, self.transport = plan, transport
        self.members = len(plan.shares)
        self.first = plan.rank * self.members

    def enter(self, tensors: Sequence[tuple[Tensor, bool]]) -> Turns[list[Tensor]]:
        """All heads of the own rows -> the own heads of all members' rows.

        tensors: (x, keys) with x (B, S_rank, H or Hkv, D); keys says which lengths and heads count. Returns (B, S, h, D).
        """
        if self.members == 1:
            return [x for x, _ in tensors]
        me, results, leaves, arrives = self.plan.member, [], [], []
        for x, keys in tensors:
            x, cut = x.transpose(0, 1), _cut(self.plan, keys)
            out = x.new_empty((cut.rows[-1].stop, x.shape[1], cut.heads[me].stop - cut.heads[me].start, x.shape[3]))
            copy_rows(out[cut.rows[me]], x[:, :, cut.heads[me]])
            leaves.append([(run, _parts(x, 2, cut.heads, run)) for run in cut.by_heads])
            arrives.append({peer: out[cut.rows[peer]] for peer in _others(self.plan)})
            results.append(out)
        pending = self._post(0, [keys for _, keys in tensors], leaves, arrives)
        yield POSTED
        self._wait(0, pending)
        return [self._spread(out, keys).transpose(0, 1) for out, (_, keys) in zip(results, tensors, strict=True)]

    def leave(self, tensors: Sequence[tuple[Tensor, bool]], into: Sequence[Tensor]) -> Turns[list[Tensor]]:
        """The reverse: own heads of all members' rows -> all heads of the own rows; shared key heads add up.

        into: (B, S_rank, H or Hkv, D), which are filled and returned.
        """
        me, step = self.plan.member, len(self.plan.steps)
        owns, homes, leaves, arrives = [], [], [], []
        for x, keys in tensors:
            x, cut = self._folded(x, keys).transpose(0, 1), _cut(self.plan, keys)
            own = x[cut.rows[me]]
            leaves.append([(run, _parts(x, 0, cut.rows, run)) for run in cut.by_rows])
            n_heads = [cut.heads[run[0]].stop - cut.heads[run[0]].start for run in cut.by_heads]
            sizes = [(len(run), *own.shape[:2], n, own.shape[3]) for run, n in zip(cut.by_heads, n_heads, strict=True)]
            homes.append([(run, x.new_empty(size)) for run, size in zip(cut.by_heads, sizes, strict=True)])
            arrives.append({m: part for run, parts in homes[-1] for m, part in zip(run, parts, strict=True)})
            owns.append(own)
        pending = self._post(step, [keys for _, keys in tensors], leaves, arrives)
        yield POSTED
        self._wait(step, pending)
        for (_, keys), own, home, of, whole in zip(tensors, owns, homes, arrives, into, strict=True):
            target, spans = whole.transpose(0, 1), _cut(self.plan, keys).heads
            if keys and self.plan.shares_keys:
                target.zero_()
                for member, span in enumerate(spans):  # in the members' order on every rank: the sum is reproducible
                    target[:, :, span] += of.get(member, own)
                continue
            copy_rows(target[:, :, spans[me]], own)
            for run, parts in home:
                copy_rows(_parts(target, 2, spans, run), parts)
        return list(into)

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

    def _post(
        self, step: int, keys: Sequence[bool], leaves: Sequence[Sequence[Blocks]], arrives: Sequence[dict[int, Tensor]]
    ) -> Pending:
        """Of each tensor: what leaves, strided, and by member what arrives, contiguous."""
        label, first = Label("heads", step), self.first
        if not self.transport.pulls:
            sends = [Message(first + m, x.contiguous()) for of in leaves for m, x in _one_by_one(of)]
            receives = [Message(first + m, x) for of in arrives for m, x in of.items() if x.numel()]
            return self.transport.post(label, sends, receives)
        some = [next(iter(of.values())) for of in arrives]
        traded = tuple(Traded(x.shape[1] * x.shape[3] * x.element_size(), of) for x, of in zip(some, keys, strict=True))
        route = _route(self.plan, step == 0, traded)
        self.transport.open("heads", self.plan, route.largest)
        buffer = self.transport.lease(label, (route.end,), torch.uint8, some[0].device)
        trace.begin(trace.PACK, step)
        for i, of in enumerate(leaves):
            for run, x in of:
                if x.numel():
                    stride = block_bytes(self.plan, step == 0, self.plan.member, run[0], traded[i])
                    there = buffer.narrow(0, route.begins[i, run[0]], stride * len(run)).view(len(run), stride)
                    there = there[:, : x[0].numel() * x.element_size()].view(x.dtype)
                    copy_rows(there.unflatten(1, x.shape[1:]), x)
        trace.end(trace.PACK, step)
        # Of what leaves a transport that is read needs to know by whom.
        sends = [Message(first + m, buffer) for m in route.readers]
        receives = [Message(first + m, arrives[i][m].view(torch.uint8).view(-1), begin) for m, i, begin in route.reads]
        return self.transport.post(label, sends, receives)

    def _wait(self, step: int, pending: Pending) -> None:
        trace.begin(trace.WAIT, step, trace.FOR_HEADS)
        pending.wait()
        trace.end(trace.WAIT, step, trace.FOR_HEADS)


def _one_by_one(runs: Sequence[Blocks]) -> Iterator[tuple[int, Tensor]]:
    """The blocks of all members in some runs. Both sides know the sizes, so empty ones need not travel."""
    return ((m, x) for run, blocks in runs if blocks.numel() for m, x in zip(run, blocks, strict=True))


def _served(k_index: Sequence[int]) -> list[range]:
    """By key head: the query heads that use it, which stand side by side."""
    return [range(bisect_left(k_index, k), bisect_right(k_index, k)) for k in range(k_index[-1] + 1)]
