"""Chunks pulled straight from their owner's memory by copy engines, inside one NVLink domain.

Every rank keeps what others may read in buffers that all ranks map (symmetric memory). A receiver's copy stream waits for the
owner's signal, copies the rows it needs, and signals back that the buffer may be written again. Signals are 32-bit flags
written and awaited by the streams themselves (cuStreamBatchMemOp): no kernel, no multiprocessor, no host.
On 4 H200 this moves 174-364 GB/s at 4-256 MB against 61-277 by NCCL's send/recv; a running kernel loses 0-1 % instead of 3-4 %.

Two buffers of a kind alternate: for chunks from pass to pass (one is read while the next layer already packs the other), for
gradients from step to step, for heads from exchange to exchange. Chunks that a rank got from elsewhere and passes on (a double
ring's) lie in as many buffers as `relay_buffers` says, in turn. Nothing here uses NVLink multicast.

Two flags for every kind, buffer and pair of owner and reader make reuse safe. They are 0 or 1, never counted:

    BUSY  at the owner   1: the reader has been told to read. The owner writes a buffer only when all of its BUSY are 0.
    READY at the reader  1: the owner's rows are complete.

    owner    computing stream   wait BUSY == 0 of all readers; write the buffer; event "complete"
             signal stream      wait for "complete"; BUSY = 1; READY = 1 at the reader; event "signalled"
             computing stream   waits for "signalled" before it looks at BUSY again
    reader   copy stream        wait READY == 1; READY = 0; copy; BUSY = 0 at the owner

What a reader fetches from one buffer in several posts (a chunk in pieces) counts as one read: the owner signals with the first
post, when all of the chunk is complete already, and the reader waits before its first copy and leaves after its last.

READY is set again only after the owner saw BUSY == 0, which the reader wrote after READY = 0: no signal is lost or seen twice. Of
two passes with one buffer each, the later one's READY is another flag, so that an owner may be one pass ahead of its reader.
No host knows the flags' values and none are written into an operation but 0 and 1, so a captured CUDA graph may be replayed any
number of times, between passes that are not captured too, as long as all ranks do the same. Inside a capture the signals are
given on the computing stream, so that no branch of the graph that waits can hold up a signal; the copies' branch ends in it,
before it waits for what others read meanwhile: nor can it hold up that branch, should both be one queue.
A capture allocates nothing: the same call must have been made once before. Buffers that a graph knows are kept when larger ones
are made.
"""

from __future__ import annotations

import ctypes
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor

from ringflash.parallel import trace
from ringflash.parallel.plan import Plan
from ringflash.parallel.transport import Label, Message, Pending, Several, Transport, itinerary, relay_buffers
from ringflash.parallel.watchdog import reached, watch
from ringflash.streams import current_stream

BUFFERS = 2
TOGETHER_BYTES = 4 << 20
"""Up to here the chunks of one post are fetched once all their owners are ready, and given back together: two calls of the driver
instead of two for each. Above, each is fetched as soon as its owner is ready. (Not tuned.)"""
RELAYS = "relays"
KINDS = ("chunks", "gradients", "heads", RELAYS)
"""In the order of their flags; the last may have more buffers than the others."""
MOST_RELAYS = 1024
"""Buffers for what is passed on, at most: there are two flags for each and reader. A plan of its own making needs three."""
READY, BUSY = 0, 1


class NotSharedError(RuntimeError):
    """Symmetric memory cannot be had, on some rank; raised on all of them alike, and says where and why."""


class Op(NamedTuple):
    """A stream waits until the word at an address has a value, or writes it after everything before is visible everywhere."""

    wait: bool
    address: int
    value: int


class Shared(NamedTuple):
    """Memory that all ranks map, and where each rank's part of it begins."""

    memory: Tensor
    addresses: tuple[int, ...]
    handle: Any = None


Meet = Callable[[str], None]
"""Tells all ranks of one rank's trouble ("" for none), and raises NotSharedError on all of them if any has some."""


@cache
def _driver() -> ctypes.CDLL:
    driver = ctypes.CDLL("libcuda.so.1")
    driver.cuStreamBatchMemOp_v2.argtypes = [ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p, ctypes.c_uint]
    driver.cuMemcpyDtoDAsync_v2.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p]
    return driver


def _checked(name: str, code: int) -> None:
    if code:
        raise RuntimeError(f"{name} failed with CUDA error {code}")


class Cuda:
    """What this transport asks of a GPU. A test has another one, whose streams run in any order that they may.

    group: that maps each other's memory. whole: that which computes together, if it is a larger one; its ranks all meet.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        timeout_s: float,
        device: torch.device,
        meet: Meet,
        whole: dist.ProcessGroup | None = None,
    ) -> None:
        self.group, self.timeout_s, self.device, self.meet = group, timeout_s, device, meet
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self.whole = whole or group

    def share(self, size: int) -> Shared:
        """Zeroed bytes that all ranks of the group map. All of ``whole`` must call it together, those of a group with the same
        size, and have no work under way. Nobody reads a rank alone: it gets next to nothing."""
        # Step by step, so that nobody goes to the rendezvous where somebody is missing.
        n = size if self.world > 1 else 1
        memory = self._met(lambda: symmetric_memory.empty(n, dtype=torch.uint8, device=self.device).zero_())
        handle = self._met(lambda: symmetric_memory.rendezvous(memory, self.group) if self.world > 1 else None)
        addresses = [memory.data_ptr()] if handle is None else handle.buffer_ptrs
        return Shared(memory, tuple(map(int, addresses)), handle)

    def _met(self, make: Callable[[], Any]) -> Any:
        """What was made, once all ranks have theirs."""
        made, trouble = None, ""
        try:
            made = make()
            torch.cuda.synchronize(self.device)
        except (RuntimeError, OSError, AttributeError) as error:  # no peer access, no memory, a container that forbids it
            trouble = (str(error).strip() or type(error).__name__).splitlines()[0]
        self.meet(trouble)
        return made

    def stream(self, urgency: int) -> torch.cuda.Stream:
        """A stream before the computing one. Of another urgency it most likely has another hardware queue, of which a process has
        eight unless CUDA_DEVICE_MAX_CONNECTIONS says more: streams of one queue wait for each other (torch makes its streams
        in turn for each priority)."""
        return torch.cuda.Stream(self.device, priority=-urgency)

    def current(self) -> torch.cuda.Stream:
        return current_stream(self.device.index)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def mark(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(stream)
        return event

    def wait(self, stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
        stream.wait_event(event)

    def pack(self, ops: Sequence[Op]) -> Any:
        """Operations in the driver's form (CUstreamBatchMemOpParams: six words each), to be issued any number of times."""
        words: list[int] = []
        for op in ops:  # operation, address, value, flags (1: wait for equality), two unused
            words += [1 if op.wait else 2, op.address, op.value, 1 if op.wait else 0, 0, 0]
        return (ctypes.c_uint64 * len(words))(*words)

    def issue(self, stream: torch.cuda.Stream, packed: Any) -> None:
        """The stream does the operations, in order."""
        _checked("cuStreamBatchMemOp", _driver().cuStreamBatchMemOp_v2(stream.cuda_stream, len(packed) // 6, packed, 0))

    def copy(self, stream: torch.cuda.Stream, target: Tensor, source: int) -> None:
        """The stream fills a contiguous tensor from an address, by a copy engine."""
        code = _driver().cuMemcpyDtoDAsync_v2(target.data_ptr(), source, target.nbytes, stream.cuda_stream)
        _checked("cuMemcpyDtoDAsync", code)

    def begun(self) -> Any:
        return reached()

    def watch(self, label: Label, peers: Sequence[int], begun: Any) -> None:
        watch(self.whole, dist.get_rank(self.whole), label, peers, self.timeout_s, begun)


@dataclass
class _Lane:
    """The buffers and streams of one kind of data."""

    kind: str
    copies: Any
    signals: Any
    size: int = 0
    """Bytes of one buffer."""
    count: int = 0
    """Of them."""
    turns: Sequence[int] = ()
    """By step: whose turn it is, where buffers alternate inside a pass."""
    shared: Shared | None = None
    passes: int = 0
    captured: bool = False
    """Whether a CUDA graph knows the buffers."""
    complete: defaultdict[int, Any] = field(default_factory=lambda: defaultdict(lambda: None))
    """When what was written since the last lease is complete, by buffer."""
    told: defaultdict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    """Who was told to read it since then, by buffer."""
    unwaited: defaultdict[int, list[_Pull]] = field(default_factory=lambda: defaultdict(list))
    """Posts about it that the computing stream has not waited for, by buffer."""
    reads: Mapping[tuple[int, int], int] = field(default_factory=dict)
    """In how many posts of this pass something comes, by the buffer's step and peer; and how many of them were posted."""
    begun: Counter[tuple[int, int]] = field(default_factory=Counter)
    views: dict[Any, Tensor] = field(default_factory=dict)
    packed: dict[Any, Any] = field(default_factory=dict)


class Symmetric(Transport):
    """Pulls through symmetric memory.

    members: the ranks that map each other's memory, by the numbers that messages and plans give them; default: those of gpu.
    """

    name = "symmetric"
    pulls = True

    def __init__(self, gpu: Cuda, members: Sequence[int] | None = None) -> None:
        self.gpu, self.world = gpu, gpu.world
        members = range(self.world) if members is None else members
        self.place = {member: i for i, member in enumerate(members)}
        self.rank = members[gpu.rank]
        self.others = tuple(p for p in members if p != self.rank)
        self.flags = gpu.share((KINDS.index(RELAYS) * BUFFERS + MOST_RELAYS) * 2 * self.world * 4)
        streams = {kind: (gpu.stream(n), gpu.stream(n)) for n, kind in enumerate(KINDS[:-1], start=1)}
        self.lanes = {kind: _Lane(kind, *streams.get(kind, streams["chunks"])) for kind in KINDS}
        self.kept: list[Shared] = []

    @classmethod
    def of(
        cls,
        group: dist.ProcessGroup,
        timeout_s: float,
        device: torch.device,
        meet: Meet,
        whole: dist.ProcessGroup | None = None,
        members: Sequence[int] | None = None,
    ) -> Symmetric:
        """That of a group's rank. Raises NotSharedError on all ranks (of ``whole``) if one of them cannot."""
        return cls(Cuda(group, timeout_s, device, meet, whole), members)

    @property
    def nbytes(self) -> int:
        """Bytes of this device that the transport holds."""
        held = [self.flags, *self.kept, *(lane.shared for lane in self.lanes.values() if lane.shared is not None)]
        return sum(shared.memory.nbytes for shared in held)

    def _flag(self, at: int, kind: str, index: int, flag: int, peer: int) -> int:
        """Address, on rank ``at``, of its flag about ``peer``."""
        buffer = KINDS.index(kind) * BUFFERS + index
        return self.flags.addresses[self.place[at]] + 4 * ((buffer * 2 + flag) * self.world + self.place[peer])

    def open(self, what: str, plan: Plan, nbytes: int) -> None:
        lane, size, count = self.lanes[what], -(-nbytes // 1024) * 1024, BUFFERS
        if what == RELAYS and (count := relay_buffers(plan)) > MOST_RELAYS:
            raise ValueError(
                f"a double ring of so many pieces needs {count} buffers for what it passes on, and symmetric memory has at most "
                f'{MOST_RELAYS}: use fewer pieces, or transport="p2p"'
            )
        lane.passes += 1
        if size * count and (size > lane.size or count > lane.count):  # the same on all ranks: it follows from the plan alone
            self._make(lane, max(size, lane.size), max(count, lane.count))
        lane.captured |= self.gpu.capturing()
        lane.reads, lane.turns = _reads(plan, what), _turns(plan, what)
        lane.begun.clear()

    def _make(self, lane: _Lane, size: int, count: int) -> None:
        """So many buffers of so many bytes each."""
        if self.gpu.capturing():
            raise ValueError(
                f"symmetric memory needs {count} buffers of {size} bytes for {lane.kind}, has {lane.count} of {lane.size}, and "
                "can make none while a CUDA graph is captured: make the same call once before capturing it"
            )
        self.gpu.synchronize()
        if lane.captured and lane.shared is not None:
            self.kept.append(lane.shared)
        lane.shared, lane.captured = self.gpu.share(size * count), False
        lane.size, lane.count = size, count
        lane.views.clear()

    def _buffer(self, what: str, step: int) -> tuple[_Lane, int]:
        """Which lane's buffer a lease, or a message of a post, is about, and which of them; both sides know it."""
        lane = self.lanes[RELAYS if what == "chunks" and step else what]
        turn = lane.passes if what == "heads" or not step else lane.turns[step]
        return lane, turn % max(lane.count, 1)

    def lease(self, label: Label, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        n = dtype.itemsize
        for size in shape:
            n *= size
        # No rows, heads or batch: nobody will read it. Nor what goes far, nor what is of a rank alone.
        if n == 0 or label.far or not self.others:
            return torch.empty(shape, dtype=dtype, device=device)
        lane, index = self._buffer(label.what, label.step)
        assert lane.shared is not None and n <= lane.size, (label, shape, lane.size)
        stream = self.gpu.current()
        trace.begin(trace.WAIT, label.step, trace.FOR_READERS)
        for pull in tuple(lane.unwaited[index]):  # a third group of heads leaves before anybody waits for the second
            if label.what != "chunks" or pull.turn != lane.passes:  # others' chunks of this pass may still be on their way
                pull.join()
        begun = self.gpu.begun()
        self.gpu.issue(stream, self._ops(lane, "free", index, self.others))
        trace.end(trace.WAIT, label.step, trace.FOR_READERS)
        self.gpu.watch(label, self.others, begun)
        lane.complete[index] = None
        lane.told[index].clear()
        key = (index, shape, dtype)
        if key not in lane.views:
            lane.views[key] = lane.shared.memory[index * lane.size : index * lane.size + n].view(dtype).view(shape)
        return lane.views[key]

    def _ops(self, lane: _Lane, what: str, index: int, peers: tuple[int, ...]) -> Any:
        """The flags' operations: "free" and "signal" of an owner, "arrive" and "leave" of a reader."""
        key = (what, index, peers)
        if key not in lane.packed:
            lane.packed[key] = self.gpu.pack(self._spell(lane.kind, what, index, peers))
        return lane.packed[key]

    def _spell(self, kind: str, what: str, index: int, peers: tuple[int, ...]) -> list[Op]:
        busy = [self._flag(self.rank, kind, index, BUSY, p) for p in peers]
        if what == "free":
            return [Op(True, address, 0) for address in busy]
        if what == "signal":
            ready = [self._flag(p, kind, index, READY, self.rank) for p in peers]
            return [*(Op(False, address, 1) for address in busy), *(Op(False, address, 1) for address in ready)]
        if what == "arrive":
            ready = [self._flag(self.rank, kind, index, READY, p) for p in peers]
            return [op for address in ready for op in (Op(True, address, 1), Op(False, address, 0))]
        assert what == "leave"
        return [Op(False, self._flag(p, kind, index, BUSY, self.rank), 0) for p in peers]

    def post(self, label: Label, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        if label.what != "chunks":
            return self._post(label, label.step, sends, receives)
        steps = sorted({m.step for m in (*sends, *receives)})
        if len(steps) <= 1:
            return self._post(label, steps[0] if steps else 0, sends, receives)

        def of(step: int, messages: Sequence[Message]) -> list[Message]:
            return [m for m in messages if m.step == step]

        return Several([self._post(label, step, of(step, sends), of(step, receives)) for step in steps])

    def _post(self, label: Label, step: int, sends: Sequence[Message], receives: Sequence[Message]) -> _Pull:
        """Of messages that lie in their senders' buffers of one step."""
        (lane, index), gpu = self._buffer(label.what, step), self.gpu
        main, now, signalled, done = gpu.current(), None, None, None
        told = lane.told[index]
        # Messages without elements do not travel; both sides know the sizes.
        if news := tuple(dict.fromkeys(m.peer for m in sends if m.peer not in told and m.tensor.numel())):
            told.update(news)
            ops = self._ops(lane, "signal", index, news)
            if gpu.capturing():
                gpu.issue(main, ops)
            else:  # a chunk is complete since its first post; later readers need not wait for more
                if (complete := lane.complete[index]) is None:
                    complete = now = lane.complete[index] = gpu.mark(main)
                gpu.wait(lane.signals, complete)
                gpu.issue(lane.signals, ops)
                signalled = gpu.mark(lane.signals)
        reads: dict[int, list[Message]] = {}
        nbytes = 0
        for m in receives:
            if n := m.tensor.nbytes:
                nbytes += n
                reads.setdefault(m.peer, []).append(m)
        if reads:
            gpu.wait(lane.copies, now or gpu.mark(main))  # the memory being filled may have been in use until now
            together = nbytes <= TOGETHER_BYTES
            for peers in (tuple(reads),) if together else ((peer,) for peer in reads):
                self._read(lane, label, step, index, peers, reads)
            done = gpu.mark(lane.copies)
        return _Pull(self, label, signalled, done, tuple(reads), receives, lane.unwaited[index], lane.passes)

    def _read(
        self, lane: _Lane, label: Label, step: int, index: int, peers: tuple[int, ...], reads: Mapping[int, Sequence[Message]]
    ) -> None:
        """Copies of one post from some peers' buffers of a step, once all of these are ready."""
        gpu, stream = self.gpu, lane.copies
        assert lane.shared is not None
        step, who = 0 if label.what == "heads" else step, peers[0] if len(peers) == 1 else None
        first, last = [], []
        for peer in peers:
            lane.begun[step, peer] += 1
            if lane.begun[step, peer] == 1:
                first.append(peer)
            if lane.begun[step, peer] == lane.reads[step, peer]:
                last.append(peer)
        if first:
            trace.begin(trace.WAIT, label.step, who, label.what, stream)
            gpu.issue(stream, self._ops(lane, "arrive", index, tuple(first)))
            trace.end(trace.WAIT, label.step, who, label.what, stream)
        trace.begin(trace.COPY, label.step, who, label.what, stream)
        for peer in peers:
            begin = lane.shared.addresses[self.place[peer]] + index * lane.size
            for m in reads[peer]:
                gpu.copy(stream, m.tensor, begin + m.row * (m.tensor.nbytes // m.tensor.shape[0]))
        trace.end(trace.COPY, label.step, who, label.what, stream)
        if last:
            gpu.issue(stream, self._ops(lane, "leave", index, tuple(last)))


class _Pull:
    """Copies under way; keeps the tensors being filled."""

    def __init__(
        self,
        transport: Symmetric,
        label: Label,
        signalled: Any,
        done: Any,
        peers: tuple[int, ...],
        kept: Sequence[Message],
        unwaited: list[_Pull],
        turn: int,
    ) -> None:
        self.transport, self.label, self.signalled, self.done = transport, label, signalled, done
        self.peers, self.kept, self.unwaited, self.turn = peers, kept, unwaited, turn
        self.captured = transport.gpu.capturing()
        unwaited.append(self)

    def join(self) -> None:
        """Makes the computing stream wait, unless it has."""
        gpu = self.transport.gpu
        if self not in self.unwaited:
            return
        self.unwaited.remove(self)
        if self.captured != gpu.capturing():  # of a pass that ended in an error: all is over before a capture, or never happens
            return
        main = gpu.current()
        if self.signalled is not None:  # given long ago; the next lease may only look at the flags after it
            gpu.wait(main, self.signalled)
        if self.done is not None:
            begun = gpu.begun()
            gpu.wait(main, self.done)
            gpu.watch(self.label, self.peers, begun)

    def wait(self) -> None:
        self.join()
        self.kept = ()


@lru_cache(maxsize=1024)
def _reads(plan: Plan, what: str) -> Mapping[tuple[int, int], int]:
    """In how many posts of a pass a rank reads a peer's buffer: by the step of the buffer there (0: the own chunk, or heads) and
    peer."""
    if what == "heads":
        return {(0, plan.rank * len(plan.shares) + member): 1 for member in range(len(plan.shares))}
    way = itinerary(plan, pulls=True)
    return Counter(
        buffer
        for slot in (way.homes if what == "gradients" else way.posts)
        for moves in slot
        for buffer in {(leg.there, leg.peer) for leg in moves.receives}
        if what == "gradients" or (buffer[0] > 0) == (what == RELAYS)
    )


@lru_cache(maxsize=1024)
def _turns(plan: Plan, what: str) -> Sequence[int]:
    """By step: how many buffers of that kind are taken before its. What comes from far is what is passed on, and its gradients go
    far again, from no buffer of these."""
    return tuple(accumulate((crosses == (what == RELAYS) for crosses in plan.far), initial=0))
