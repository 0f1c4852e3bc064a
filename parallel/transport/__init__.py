"""Transports move messages between the ranks of a group; `Stages` turns a plan's transfers into messages.

A transport knows nothing of attention: it posts sends and receives of contiguous tensors and hands back something to wait for.
What is moved when is in the plan, so every schedule runs on every transport. All of them start moving at ``post`` and let the
caller compute meanwhile.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ringflash.parallel.plan import Plan, Ranges, Transfer


class TransportError(RuntimeError):
    """A rank died or stalled; names rank, step and peers."""


@dataclass(frozen=True)
class Label:
    """What a post moves, for errors and logs. ``what``: "chunks", "gradients" or "heads"."""

    what: str
    step: int = 0

    def __str__(self) -> str:
        words = {"chunks": "keys and values", "gradients": "gradients of keys and values", "heads": "exchange of heads"}
        return f"step {self.step}, {words[self.what]}"


@dataclass(frozen=True)
class Message:
    """A contiguous tensor to send to, or to fill from, a rank of the group.

    ``row`` is for transports that pull: the row of the peer's leased buffer at which a receive begins.
    """

    peer: int
    tensor: Tensor
    row: int = 0


class Pending(Protocol):
    """Messages under way."""

    def wait(self) -> None:
        """Returns when the receives are filled (on CUDA: when the current stream is made to wait for them).

        Raises TransportError when a peer died or did not answer in time.
        """


class Transport(ABC):
    """Moves messages between the ranks of a group."""

    name: str
    collective = False
    """Whether every rank must take part in every post, even with nothing to move."""
    pulls = False
    """Whether receivers read a sender's leased buffers themselves, and so need to be told where (``Message.row``)."""

    def open(self, what: str, plan: Plan, row: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        """Begins a pass that will lease buffers of ``what`` ("chunks" or "gradients"); all ranks call it in the same order.

        row: batch and width of a buffer's row, which has one entry per key head: (rows, batch, heads, width).
        """

    def lease(self, label: Label, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory, of any content, for what this rank will send; pulling transports place it where peers can read it."""
        return torch.empty(shape, dtype=dtype, device=device)

    @abstractmethod
    def post(self, label: Label, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        """Starts moving. Messages between two ranks are matched in order. ``label`` is the same on all ranks.

        The caller keeps sent tensors unchanged until ``wait`` of this post has returned on this rank.
        """


class Stages:
    """The stages of one pass: posts a plan's transfers slot by slot and hands out each step's keys and values.

    K and V travel as one buffer, sequence first: (S, B, Hkv, D + Dv). Any row range of it is contiguous, whatever the batch, so
    nothing is packed per message, and half as many messages are sent. Kernels read it as strided views.
    """

    def __init__(self, plan: Plan, transport: Transport, k: Tensor, v: Tensor) -> None:
        self.plan, self.transport = plan, transport
        self.local = (k, v)
        self.split = (k.shape[-1], v.shape[-1])
        self.packed: Tensor | None = None
        self.buffers: dict[int, Tensor] = {}  # by step
        self.pending: dict[int, Pending] = {}  # by the step that needs it
        if len(plan.steps) > 1:
            transport.open("chunks", plan, (k.shape[0], sum(self.split)), k.dtype, k.device)

    def _stage(self, step: int) -> Tensor:
        if step not in self.buffers:
            k = self.local[0]
            shape = (self.plan.steps[step].rows, k.shape[0], k.shape[2], sum(self.split))
            self.buffers[step] = k.new_empty(shape)
        return self.buffers[step]

    def _own(self) -> Tensor:
        if self.packed is None:
            k = self.local[0]
            shape = (k.shape[1], k.shape[0], k.shape[2], sum(self.split))
            self.packed = self.transport.lease(Label("chunks"), shape, k.dtype, k.device)
            torch.cat([x.transpose(0, 1) for x in self.local], dim=-1, out=self.packed)
        return self.packed

    def post(self, slot: int) -> None:
        """Posts what leaves and what is to arrive at this slot."""
        for step, transfers in self.plan.posts[slot]:
            sends: list[Message] = []
            receives: list[Message] = []
            for t in transfers:
                if t.dest == self.plan.rank:
                    receives += self._receives(t)
                else:
                    held = 0 if t.owner == self.plan.rank else _step_of(self.plan, t.owner)
                    buffer = self._stage(held) if held else self._own()
                    sends += _messages(self.plan, t.dest, buffer, place(self.plan, held, t))
            if transfers or self.transport.collective:
                self.pending[step] = self.transport.post(Label("chunks", step), sends, receives)

    def _receives(self, t: Transfer) -> list[Message]:
        messages = _messages(self.plan, t.source, self._stage(t.step), place(self.plan, t.step, t))
        if not self.transport.pulls:
            return messages
        there = self.plan.of_peer(t.source)
        rows = place(there, 0 if t.owner == t.source else _step_of(there, t.owner), t)
        return [replace(m, row=start) for m, (start, _) in zip(messages, rows, strict=True)]

    def arrive(self, step: int) -> tuple[Tensor, Tensor]:
        """K and V of a step's stage, (B, rows, Hkv, D or Dv): views of the arrived buffer, or for step 0 the local tensors."""
        if step == 0:
            return self.local
        if step in self.pending:
            self.pending.pop(step).wait()
        k, v = self._stage(step).transpose(0, 1).split(self.split, dim=-1)
        return k, v

    def release(self, step: int) -> None:
        """Forgets a stage's buffer unless it is still to be passed on."""
        passed_on = any(
            t.source == self.plan.rank and t.owner != self.plan.rank and _step_of(self.plan, t.owner) == step
            for slot in self.plan.posts[step + 1 :]
            for post in slot
            for t in post.transfers
        )
        if not passed_on:
            self.buffers.pop(step, None)

    def finish(self) -> None:
        """Waits for whatever is still under way: sends whose step this rank has nothing to compute in."""
        for step in sorted(self.pending):
            self.pending.pop(step).wait()


class Homecoming:
    """Brings dK and dV of every stage home to their owners, in float32, as one buffer (S, B, Hkv, D + Dv) a chunk."""

    def __init__(self, plan: Plan, transport: Transport, k: Tensor, v: Tensor, dtype: torch.dtype) -> None:
        self.plan, self.transport = plan, transport
        self.shape = (k.shape[0], k.shape[2], k.shape[3] + v.shape[3])
        self.split = (k.shape[3], v.shape[3])
        self.dtype, self.device = dtype, k.device
        self.buffers: dict[int, Tensor] = {}  # by step; 0 is the own chunk
        self.arriving: list[tuple[Pending, list[tuple[Tensor, Tensor]]]] = []
        if len(plan.steps) > 1:
            transport.open("gradients", plan, (k.shape[0], sum(self.split)), dtype, self.device)

    def _stage(self, step: int) -> Tensor:
        if step not in self.buffers:
            shape = (self.plan.steps[step].rows, *self.shape)
            if step:  # leaves for its owners
                self.buffers[step] = self.transport.lease(Label("gradients", step), shape, self.dtype, self.device).zero_()
            else:
                self.buffers[step] = torch.zeros(shape, dtype=self.dtype, device=self.device)
        return self.buffers[step]

    def gradients(self, step: int) -> tuple[Tensor, Tensor]:
        """dK and dV of a stage to add into: (B, rows, Hkv, D or Dv) views of the stage's buffer."""
        dk, dv = self._stage(step).transpose(0, 1).split(self.split, dim=-1)
        return dk, dv

    def receive(self) -> None:
        """Waits for what was posted last and adds it to the chunks it belongs to, in a fixed order."""
        for pending, additions in self.arriving:
            pending.wait()
            for target, source in additions:
                target.add_(source)
        self.arriving.clear()

    def post(self, slot: int) -> None:
        """Posts the gradients that leave at this slot, and the receives of what others send now."""
        transfers = self.plan.homes[slot]
        if not transfers and not (slot and self.transport.collective):
            return
        sends: list[Message] = []
        receives: list[Message] = []
        additions = []
        for t in transfers:
            step = 0 if t.owner == self.plan.rank else _step_of(self.plan, t.owner)
            rows = place(self.plan, step, t)
            if t.source == self.plan.rank:
                sends += _messages(self.plan, t.dest, self._stage(step), rows)
            else:
                there = place(self.plan.of_peer(t.source), t.step, t) if self.transport.pulls else rows
                for (start, stop), (row, _) in zip(rows, there, strict=True):
                    target = self._stage(step)[start:stop]
                    source = torch.empty_like(target)
                    receives.append(Message(self.plan.peer(t.source), source, row))
                    additions.append((target, source))
        self.arriving.append((self.transport.post(Label("gradients", slot), sends, receives), additions))

    def release(self, step: int) -> None:
        """Forgets a stage's gradients once they have left (the transport keeps what it still sends)."""
        if step and not any(t.owner in _owners(self.plan, step) for slot in self.plan.homes[step + 1 :] for t in slot):
            self.buffers.pop(step, None)


def place(plan: Plan, step: int, transfer: Transfer) -> Ranges:
    """Rows of a step's buffer (0: the own chunk) where a transfer's ranges stand."""
    if step == 0:
        return transfer.ranges
    chunk = next(c for c in plan.steps[step].chunks if c.owner == transfer.owner)
    rows, offset = [], chunk.offset
    for start, stop in chunk.ranges:
        rows.append((offset, offset + stop - start))
        offset += stop - start
    assert chunk.ranges == transfer.ranges
    return tuple(rows)


def _messages(plan: Plan, rank: int, buffer: Tensor, rows: Ranges) -> list[Message]:
    return [Message(plan.peer(rank), buffer[start:stop]) for start, stop in rows]


def _owners(plan: Plan, step: int) -> set[int]:
    return {chunk.owner for chunk in plan.steps[step].chunks}


def _step_of(plan: Plan, owner: int) -> int:
    """The step in which this rank computes an owner's chunk."""
    return next(n for n, step in enumerate(plan.steps) if n and owner in _owners(plan, n))
