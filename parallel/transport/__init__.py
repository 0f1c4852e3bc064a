"""Transports move messages between the ranks of a group; `Stages` turns a plan's transfers into messages.

A transport knows nothing of attention: it posts sends and receives of contiguous tensors and hands back something to wait for.
What is moved when is in the plan, so every schedule runs on every transport. All of them start moving at ``post`` and let the
caller compute meanwhile.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ringflash.parallel import trace
from ringflash.parallel.lower import Ranges
from ringflash.parallel.plan import ROW_TAIL, Plan, Post, Transfer, query_row_bytes


class TransportError(RuntimeError):
    """A rank died or stalled; names rank, step and peers."""


class Label(NamedTuple):
    """What a post moves, for errors and logs. ``what``: "chunks", "gradients" or "heads"; leased are also "relays", for chunks
    that will be passed on. ``far``: over the slow links of a double ring, where nothing on the fast ones should wait for it."""

    what: str
    step: int = 0
    far: bool = False

    def __str__(self) -> str:
        words = {
            "chunks": "chunks",
            "gradients": "gradients of chunks",
            "heads": "exchange of heads",
            "relays": "chunks to pass on",
        }
        return f"step {self.step}, {words[self.what]}"


class Message(NamedTuple):
    """A contiguous tensor to send to, or to fill from, a rank of the group.

    For transports that pull: ``row`` of the sender's leased buffer at which a receive begins, and the ``step`` whose buffer that
    is, if it is not that of the sender's own chunk.
    """

    peer: int
    tensor: Tensor
    row: int = 0
    step: int = 0


class Pending(Protocol):
    """Messages under way."""

    def wait(self) -> None:
        """Returns when the receives are filled (on CUDA: when the current stream is made to wait for them).

        Raises TransportError when a peer died or did not answer in time.
        """


class Several:
    """Posts of one kind, as one."""

    def __init__(self, parts: Sequence[Pending]) -> None:
        self.parts = parts

    def wait(self) -> None:
        for part in self.parts:
            part.wait()


class Transport(ABC):
    """Moves messages between the ranks of a group."""

    name: str
    collective = False
    """Whether every rank must take part in every post, even with nothing to move."""
    pulls = False
    """Whether receivers read a sender's leased buffers themselves, and so need to be told where (``Message.row``)."""

    def open(self, what: str, plan: Plan, nbytes: int) -> None:
        """Begins a pass that will lease buffers of ``what`` ("chunks", "relays" or "gradients"), or an exchange that will lease
        one ("heads"); all ranks call it in the same order. nbytes: of a buffer, at most on any rank; the same on all.
        """

    def lease(self, label: Label, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory, of any content, for what this rank will send; pulling transports place it where peers can read it.

        What is written to it before the first post that sends it must be on the current stream, or waited for there.
        """
        return torch.empty(shape, dtype=dtype, device=device)

    def multiprocessors(self, plan: Plan) -> int:
        """How many multiprocessors the kernels of a pass should leave to its transfers. Copy engines and hosts need none."""
        return 0

    @abstractmethod
    def post(self, label: Label, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        """Starts moving. Messages between two ranks are matched in order. ``label`` is the same on all ranks.

        The caller keeps sent tensors unchanged until ``wait`` of this post has returned on this rank.
        """


def copy_rows(target: Tensor, source: Tensor) -> None:
    """``target.copy_(source)``, by words of 8 bytes where both can be read so: torch's kernel for strided rows moves one element
    at a time, whatever its size."""
    size = source.element_size()
    if target.dtype == source.dtype and 8 % size == 0 and _in_words(target, 8 // size) and _in_words(source, 8 // size):
        target, source = target.view(torch.int64), source.view(torch.int64)
    target.copy_(source)


def _in_words(x: Tensor, elements: int) -> bool:
    sizes = (x.shape[-1], x.storage_offset(), *x.stride()[:-1])
    return x.stride(-1) == 1 and x.data_ptr() % 8 == 0 and all(n % elements == 0 for n in sizes)


class Cargo:
    """Tensors that travel side by side as one buffer, sequence first: (rows, B, heads, columns).

    Any row range of it is contiguous, whatever the batch, so nothing is packed per message, and half as many messages are sent.
    Kernels read it as strided views.

    wide: (B, S, heads, width), of one dtype: K and V, or Q and dO. narrow: at most two (B, heads, S) of running state's dtype, at
    the end of a row in ROW_TAIL bytes: rows stay aligned to 16 bytes where those of the wide ones alone are.
    """

    def __init__(self, wide: Sequence[Tensor], narrow: Sequence[Tensor] = ()) -> None:
        self.wide, self.narrow = tuple(wide), tuple(narrow)
        self.own = (*self.wide, *self.narrow)
        self.like = self.wide[0]
        self.widths = [x.shape[3] for x in wide]
        size, dims = self.like.element_size(), sum(self.widths)
        self.columns = query_row_bytes(dims, size) // size if narrow else dims

    def shape(self, rows: int) -> tuple[int, int, int, int]:
        """Of the buffer for so many rows."""
        return rows, self.like.shape[0], self.like.shape[2], self.columns

    def pack(self, buffer: Tensor, rows: Ranges) -> None:
        """Fills these rows of the buffer of the own ones."""
        for start, stop in rows:
            part = buffer[start:stop]
            wide = [x[:, start:stop].transpose(0, 1) for x in self.wide]
            if self.narrow:
                # cat is slow into a part of a row: 0.55 instead of 0.21 ms for Q and dO of 16k tokens and 32 heads on an H200
                for x, target in zip(wide, part[..., : sum(self.widths)].split(self.widths, dim=-1), strict=True):
                    copy_rows(target, x)
            else:
                torch.cat(wide, dim=-1, out=part)
            for i, x in enumerate(self.narrow):
                self._tail(part, x.dtype)[..., i] = x[..., start:stop].permute(2, 0, 1)

    def unpack(self, buffer: Tensor) -> tuple[Tensor, ...]:
        """The tensors of a buffer's rows, shaped as the own ones; wide ones as views."""
        if not self.narrow:
            return tuple(buffer.transpose(0, 1).split(self.widths, dim=-1))
        wide = buffer[..., : sum(self.widths)].transpose(0, 1).split(self.widths, dim=-1)
        narrow = (self._tail(buffer, x.dtype)[..., i].permute(1, 2, 0).contiguous() for i, x in enumerate(self.narrow))
        return (*wide, *narrow)

    def _tail(self, buffer: Tensor, dtype: torch.dtype) -> Tensor:
        return buffer[..., self.columns - ROW_TAIL // self.like.element_size() :].view(dtype)


class Leg(NamedTuple):
    """One message of a post, with a rank of the group: rows of the buffer of ``step`` (0: the own chunk).

    ``whole``: whether these are all its rows. For transports that pull: ``there``, the step of the sender's buffer, and the row
    of it at which a receive begins.
    """

    peer: int
    step: int
    start: int
    stop: int
    whole: bool
    row: int = 0
    there: int = 0


class Moves(NamedTuple):
    """A post of one rank, resolved to buffers and rows. ``step`` as in plan.Post; ``due``: when what arrives is added."""

    label: Label
    sends: tuple[Leg, ...]
    receives: tuple[Leg, ...]
    due: int


class Itinerary(NamedTuple):
    """A plan's posts and homes by slot, resolved once; the steps whose buffers nobody needs after a slot; the own rows that
    leave, all of them unless it is worth packing fewer; and the steps whose chunks are passed on."""

    posts: tuple[tuple[Moves, ...], ...]
    homes: tuple[tuple[Moves, ...], ...]
    stages_end: tuple[tuple[int, ...], ...]
    gradients_end: tuple[tuple[int, ...], ...]
    leaving: Ranges
    relayed: frozenset[int]


@lru_cache(maxsize=1024)
def itinerary(plan: Plan, pulls: bool = False) -> Itinerary:
    """pulls: whether receives are told where their rows stand at the peer."""
    posts = tuple(tuple(_moves(plan, "chunks", n, post, pulls) for post in slot) for n, slot in enumerate(plan.posts))
    homes = tuple(tuple(_moves(plan, "gradients", n, post, pulls) for post in slot) for n, slot in enumerate(plan.homes))
    stages, gradients = list(range(len(plan.steps))), list(range(len(plan.steps)))  # a stage is needed until it is computed
    for last, slots in ((stages, posts), (gradients, homes)):
        for n, slot in enumerate(slots):
            for leg in (leg for moves in slot for leg in moves.sends):
                last[leg.step] = max(last[leg.step], n)

    def ends(last: list[int]) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(step for step, end in enumerate(last) if step and end == n) for n in range(len(plan.homes)))

    sent = [leg for slot in posts for moves in slot for leg in moves.sends]
    own = sorted((leg.start, leg.stop) for leg in sent if leg.step == 0)
    relayed = frozenset(leg.step for leg in sent if leg.step)
    return Itinerary(posts, homes, ends(stages), ends(gradients), _worth_packing(own, plan.steps[0].rows), relayed)


PACKED_APART = 4
"""Ranges of rows that are packed one by one, if they are at most half of all. A window over long chunks sends their edges only:
1.1 of 110 ms went into packing the rest (4,096 keys, 1M tokens, four H200)."""


def _worth_packing(legs: Sequence[tuple[int, int]], rows: int) -> Ranges:
    joined: list[tuple[int, int]] = []
    for start, stop in legs:
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(stop, joined[-1][1])
        else:
            joined.append((start, stop))
    few = len(joined) <= PACKED_APART and 2 * sum(b - a for a, b in joined) <= rows
    return tuple(joined) if few else ((0, rows),)


def _moves(plan: Plan, what: str, slot: int, post: Post, pulls: bool) -> Moves:
    sends: list[Leg] = []
    receives: list[Leg] = []
    for t in post.transfers:
        step, rows = place(plan, t, plan.rank)
        whole = rows == ((0, plan.steps[step].rows),)
        if t.source == plan.rank:
            sends += [Leg(plan.peer(t.dest), step, *ab, whole, there=step) for ab in rows]
        else:
            there, begins = place(plan, t, t.source) if pulls else (0, ((0, 0),) * len(rows))
            receives += [Leg(plan.peer(t.source), step, *ab, whole, at, there) for ab, (at, _) in zip(rows, begins, strict=True)]
    label = Label(what, post.step, plan.far[post.step])
    return Moves(label, tuple(sends), tuple(receives), plan.due(slot, post.step))


def place(plan: Plan, transfer: Transfer, rank: int) -> tuple[int, Ranges]:
    """The step (0: the own chunk) in whose buffer a rank at an end of a transfer holds its ranges, and their rows there."""
    if transfer.owner == rank:
        return 0, transfer.ranges
    step, offset = plan.row_at(rank, transfer.owner, transfer.ranges)
    rows = []
    for start, stop in transfer.ranges:
        rows.append((offset, offset + stop - start))
        offset += stop - start
    return step, tuple(rows)


@lru_cache(maxsize=1024)
def relay_buffers(plan: Plan) -> int:
    """Buffers for chunks that a double ring passes on, taken in turn, so that one is free again when its turn comes: computed and
    sent to the last neighbour in slots before. The same on all ranks; 0 for other schedules."""
    inner = plan.key.schedule.inner
    far = [step for step, crosses in enumerate(plan.far) if crosses]
    if inner == 1 or not far:
        return 0
    slots = {post.step: n for n, slot in enumerate(plan.posts) for post in slot}
    ends = [max(step, *(slots[step + hop] for hop in range(1, inner))) for step in far]
    return max(1 + sum(slots[later] <= end for later in far[i + 1 :]) for i, end in enumerate(ends))


@lru_cache(maxsize=1024)
def buffer_bytes(plan: Plan, what: str, row: tuple[int, int], itemsize: int) -> int:
    """Bytes of a buffer of what a rank sends, at most, the same on all ranks: the longest chunk, or the longest remote stage.

    row: batch and width of a row, which has one entry per head that travels.
    """
    rows = plan.longest_chunk() if what == "chunks" else plan.longest_stage()
    heads = plan.most_heads()
    return -(-rows * row[0] * heads * row[1] * itemsize // 1024) * 1024


class Stages:
    """The stages of one pass: posts a plan's transfers slot by slot and hands out each step's tensors."""

    def __init__(self, plan: Plan, transport: Transport, *wide: Tensor, narrow: Sequence[Tensor] = ()) -> None:
        """wide, narrow: what travels, as Cargo takes it."""
        self.plan, self.transport = plan, transport
        self.cargo = cargo = Cargo(wide, narrow)
        self.itinerary = itinerary(plan, transport.pulls)
        self.packed: Tensor | None = None
        self.buffers: dict[int, Tensor] = {}  # by step
        self.pending: dict[int, Pending] = {}  # by the step that needs it
        if len(plan.steps) > 1:
            like = cargo.like
            for what in ("chunks", *(["relays"] if relay_buffers(plan) else [])):
                transport.open(what, plan, buffer_bytes(plan, what, (like.shape[0], cargo.columns), like.element_size()))

    def _buffer(self, step: int) -> Tensor:
        if step == 0:
            return self._own()
        if step not in self.buffers:
            like, shape = self.cargo.like, self.cargo.shape(self.plan.steps[step].rows)
            relayed = step in self.itinerary.relayed
            self.buffers[step] = self._lease("relays", step, shape) if relayed else like.new_empty(shape)
        return self.buffers[step]

    def _lease(self, what: str, step: int, shape: tuple[int, ...]) -> Tensor:
        return self.transport.lease(Label(what, step), shape, self.cargo.like.dtype, self.cargo.like.device)

    def _own(self) -> Tensor:
        if self.packed is None:
            self.packed = self._lease("chunks", 0, self.cargo.shape(self.cargo.like.shape[1]))
            trace.begin(trace.PACK)
            self.cargo.pack(self.packed, self.itinerary.leaving)
            trace.end(trace.PACK)
        return self.packed

    def post(self, slot: int) -> None:
        """Posts what leaves and what is to arrive at this slot."""
        for label, sends, receives, _ in self.itinerary.posts[slot]:
            if sends or receives or self.transport.collective:
                arriving = _messages(self._buffer, receives)
                self.pending[label.step] = self.transport.post(label, _messages(self._buffer, sends), arriving)

    def arrive(self, step: int) -> tuple[Tensor, ...]:
        """The tensors of a step's stage, views of the arrived buffer, or the local ones."""
        if self.plan.steps[step].local:
            return self.cargo.own
        if step in self.pending:
            self.pending.pop(step).wait()
        return self.cargo.unpack(self._buffer(step))

    def release(self, slot: int) -> None:
        """Forgets the buffers that are neither computed on nor passed on after this slot."""
        for step in self.itinerary.stages_end[slot]:
            self.buffers.pop(step, None)

    def finish(self) -> None:
        """Waits for whatever is still under way: sends whose step this rank has nothing to compute in."""
        trace.begin(trace.WAIT, -1)
        for step in sorted(self.pending):
            self.pending.pop(step).wait()
        trace.end(trace.WAIT, -1)


class Homecoming:
    """Brings the gradients of every stage home to their owners, in running state's dtype, as one buffer a stage: (rows, B, heads,
    columns), the tensors of ``widths`` side by side."""

    def __init__(self, plan: Plan, transport: Transport, like: Tensor, widths: Sequence[int], dtype: torch.dtype) -> None:
        self.plan, self.transport, self.widths = plan, transport, list(widths)
        self.itinerary = itinerary(plan, transport.pulls)
        self.shape = (like.shape[0], like.shape[2], sum(widths))
        self.dtype, self.device = dtype, like.device
        self.buffers: dict[int, Tensor] = {}  # by step; 0 is the own chunk
        self.arriving: list[tuple[int, Pending, list[tuple[Tensor, Tensor]]]] = []  # due, and what is added to what
        if len(plan.steps) > 1:
            transport.open("gradients", plan, buffer_bytes(plan, "gradients", (like.shape[0], sum(widths)), dtype.itemsize))

    def _buffer(self, step: int) -> Tensor:
        if step not in self.buffers:
            shape = (self.plan.steps[step].rows, *self.shape)
            if step:  # leaves for its owners
                label = Label("gradients", step, self.plan.far[step])
                self.buffers[step] = self.transport.lease(label, shape, self.dtype, self.device).zero_()
            else:
                self.buffers[step] = torch.zeros(shape, dtype=self.dtype, device=self.device)
        return self.buffers[step]

    def gradients(self, step: int) -> tuple[Tensor, ...]:
        """The gradients of a stage to add into: (B, rows, heads, width) views of the stage's buffer."""
        buffer = self._buffer(0 if self.plan.steps[step].local else step)
        return tuple(buffer.transpose(0, 1).split(self.widths, dim=-1))

    def receive(self, slot: int | None = None) -> None:
        """Waits for what is due by a slot (None: for all) and adds it to the chunks it belongs to, in a fixed order."""
        due = [mail for mail in self.arriving if slot is None or mail[0] <= slot]
        self.arriving = [mail for mail in self.arriving if slot is not None and mail[0] > slot]
        for n, pending, additions in due:
            trace.begin(trace.WAIT, n, trace.FOR_GRADIENTS)
            pending.wait()
            trace.end(trace.WAIT, n, trace.FOR_GRADIENTS)
            trace.begin(trace.ADD, n)
            for target, source in additions:
                target.add_(source)
            trace.end(trace.ADD, n)

    def post(self, slot: int) -> None:
        """Posts the gradients that leave at this slot, and the receives of what others send now."""
        for label, sends, receives, due in self.itinerary.homes[slot]:
            if sends or receives or self.transport.collective:
                messages = _messages(self._buffer, receives)
                additions = [(m.tensor, torch.empty_like(m.tensor)) for m in messages]
                arriving = [m._replace(tensor=mail) for m, (_, mail) in zip(messages, additions, strict=True)]
                self.arriving.append((due, self.transport.post(label, _messages(self._buffer, sends), arriving), additions))

    def release(self, slot: int) -> None:
        """Forgets the gradients that have left by this slot (the transport keeps what it still sends)."""
        for step in self.itinerary.gradients_end[slot]:
            self.buffers.pop(step, None)


def _messages(buffer: Callable[[int], Tensor], legs: Iterable[Leg]) -> list[Message]:
    parts = [(leg, buffer(leg.step) if leg.whole else buffer(leg.step)[leg.start : leg.stop]) for leg in legs]
    return [Message(leg.peer, part, leg.row, leg.there) for leg, part in parts]
