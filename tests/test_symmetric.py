"""The symmetric transport's protocol without a GPU: streams that run in any order they may, and seeded bugs that must show.

`World` keeps what every stream of every rank has been given, and does one operation at a time, of a random stream whose next one
may run: so a run is one of all interleavings that the flags and events allow, delays of any length included. What a rank packs
tells pass and rank; what arrives is read on the computing stream, as a kernel would. Heads are traded by the real `HeadExchange`
and `in_groups`; `OnStream` leaves what torch is asked to compute to the computing stream.
"""

from __future__ import annotations

import ctypes
import random
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from typing import Any, ClassVar, NamedTuple, TypeVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from ringflash.api import Call, check, kernel_for
from ringflash.autograd import Job, backward_in_groups, forward_in_groups, in_groups, take_turns
from ringflash.kernels import Kernel
from ringflash.kernels.running import accumulate_dtype
from ringflash.mask import Mask
from ringflash.parallel.heads import HeadExchange
from ringflash.parallel.plan import Plan, make_plan
from ringflash.parallel.schedule import make_schedule
from ringflash.parallel.transport import Label, Message, Pending, Transport, buffer_bytes
from ringflash.parallel.transport.domains import Domain, Domains, domain_of
from ringflash.parallel.transport.simulated import Mailbox, Simulated
from ringflash.parallel.transport.symmetric import KINDS, Op, Shared, Symmetric
from ringflash.simulated import SimulatedWorld
from ringflash.testing import Case, draw
from ringflash.testing.inputs import make_inputs
from ringflash.testing.runs import judge_of, simulate

T = TypeVar("T")


class DeadlockError(AssertionError):
    """Streams are left that wait for what nobody will do."""


@dataclass(eq=False)
class Work:
    """Something a stream does: when it may, and what. ``after``: the works it waits for, inside a graph or across streams."""

    run: Callable[[], object] = lambda: None
    may: Callable[[], bool] = lambda: True
    after: list[Work] = field(default_factory=list)
    done: bool = False

    def able(self) -> bool:
        while self.after and self.after[-1].done:
            self.after.pop()
        return not self.after and self.may()


@dataclass(eq=False)
class Stream:
    queue: deque[Work] = field(default_factory=deque)
    pace: float = 1.0
    passing: bool = False  # made for one launch of a graph
    captured: list[Work] | None = None  # the graph under construction that this stream takes part in
    last: Work | None = None  # of the captured ones


class World:
    """The GPUs of all ranks."""

    def __init__(self, world: int, seed: int) -> None:
        self.world, self.random = world, random.Random(seed)
        self.streams: list[Stream] = []
        self.memory: dict[int, Tensor] = {}  # by address of the first byte
        self.shares: list[list[int]] = [[] for _ in range(world)]
        self.words: dict[int, Any] = {}

    def address(self, rank: int, number: int) -> int:
        return (1 + rank) << 40 | (1 + number) << 24

    def word(self, address: int) -> Any:
        """One flag, as an array of numpy: looked at far more often than anything else."""
        if address not in self.words:
            self.words[address] = self.at(address, 4).view(torch.int32).numpy()
        return self.words[address]

    def at(self, address: int, n: int) -> Tensor:
        base = address >> 24 << 24
        assert n <= len(self.memory[base]) - (address - base), "reads beyond the buffer"
        return self.memory[base][address - base : address - base + n]

    def step(self, patience: float = 0.0) -> bool:
        """Does one operation that may be done; False if there is none (or only slow ones, and the host goes on)."""
        able = [s for s in self.streams if s.queue and s.queue[0].able()]
        if not able:
            return False
        (stream,) = self.random.choices([*able, None], [*(s.pace for s in able), patience])
        if stream is None:
            return False
        work = stream.queue[0]
        work.run()
        work.done = True
        stream.queue.popleft()
        if stream.passing and not stream.queue:
            self.streams.remove(stream)
        return True

    def drain(self) -> None:
        while self.step():
            pass
        if any(s.queue for s in self.streams):
            raise DeadlockError(f"{sum(bool(s.queue) for s in self.streams)} streams wait for ever")


class FakeGpu:
    """One rank's GPU: what `symmetric.Cuda` offers, on a World's streams. members: with whom it shares memory; default: all."""

    def __init__(self, world: World, rank: int, members: Sequence[int] | None = None) -> None:
        self.there, self.place, self.members = world, rank, range(world.world) if members is None else members
        self.rank, self.world = self.members.index(rank), len(self.members)
        self.main = self.stream(0)
        self.graph: list[Work] | None = None

    def share(self, size: int) -> Shared:
        number = len(self.there.shares[self.place])
        self.there.shares[self.place].append(size)
        others = (self.there.shares[member] for member in self.members)
        assert all(len(s) <= number or s[number] == size for s in others), "sizes differ between ranks"
        with _disable_current_modes():
            memory = torch.zeros(size, dtype=torch.uint8)
        self.there.memory[self.there.address(self.place, number)] = memory
        return Shared(memory, tuple(self.there.address(r, number) for r in self.members))

    def stream(self, urgency: int) -> Stream:
        self.there.streams.append(Stream(pace=self.there.random.choice((1e-4, 1.0))))
        return self.there.streams[-1]

    def current(self) -> Stream:
        return self.main

    def synchronize(self) -> None:
        with _disable_current_modes():
            self.there.drain()

    def capturing(self) -> bool:
        return self.graph is not None

    def put(self, stream: Stream, work: Work) -> Work:
        if stream.captured is not None:
            work.after += [stream.last] if stream.last else []
            stream.captured.append(work)
            stream.last = work
        else:
            stream.queue.append(work)
        return work

    def mark(self, stream: Stream) -> tuple[Stream, Work]:
        return stream, self.put(stream, Work())

    def wait(self, stream: Stream, event: tuple[Stream, Work]) -> None:
        source, work = event
        if source.captured is not None:  # a stream that waits for a captured event is captured from there on
            stream.captured = source.captured
        assert stream.captured is None or work in stream.captured, "a graph waits for an event from outside"
        self.put(stream, Work(after=[work]))

    def pack(self, ops: Sequence[Op]) -> list[Op]:
        return list(ops)

    def issue(self, stream: Stream, packed: list[Op]) -> None:
        for op in packed:
            word = self.there.word(op.address)
            if op.wait:
                self.put(stream, Work(may=lambda op=op, word=word: word[0] == op.value))  # type: ignore[misc]
            else:
                self.put(stream, Work(run=lambda op=op, word=word: word.fill(op.value)))  # type: ignore[misc]

    def copy(self, stream: Stream, target: Tensor, source: int) -> None:
        flat = target.view(torch.uint8).view(-1)
        half = len(flat) // 2  # two pieces: another stream may come between
        for part, begin in ((flat[:half], 0), (flat[half:], half)):
            self.put(stream, Work(run=lambda part=part, at=source + begin: part.copy_(self.there.at(at, len(part)))))  # type: ignore[misc]

    def begun(self) -> None:
        return None

    def watch(self, label: Label, peers: Sequence[int], begun: None) -> None:
        return None

    # ---- what a test does with it

    def kernel(self, run: Callable[[], object]) -> None:
        self.put(self.main, Work(run=run))

    def capture(self) -> None:
        self.graph = self.main.captured = []
        self.main.last = None

    def end_capture(self) -> list[Work]:
        assert self.graph is not None
        for stream in self.there.streams:
            if stream.captured is self.graph and stream is not self.main:
                assert self._reaches(self.main.last, stream.last), "a branch of the graph does not end in it"
                stream.captured = stream.last = None
        self.main.captured = self.main.last = None
        graph, self.graph = self.graph, None
        return graph

    def abandon(self) -> None:
        """Ends a capture of which nothing will be replayed."""
        for stream in self.there.streams:
            if stream.captured is self.graph:
                stream.captured = stream.last = None
        self.graph = None

    def _reaches(self, end: Work | None, start: Work | None) -> bool:
        seen, todo = set(), [end]
        while todo:
            work = todo.pop()
            if work is start:
                return True
            if work is not None and id(work) not in seen:
                seen.add(id(work))
                todo += work.after
        return start is None

    def replay(self, graph: list[Work]) -> None:
        """One launch: a stream for every node, or one for all in some order, and the computing stream waits for all."""
        copies = {id(work): Work(work.run, work.may) for work in graph}
        start = self.put(self.main, Work())
        for work in graph:
            copies[id(work)].after = [start, *(copies[id(w)] for w in work.after)]
        one = self.there.random.random() < 0.5
        queues = [self._in_some_order(graph, copies)] if one else [[work] for work in copies.values()]
        self.there.streams += [Stream(deque(works), passing=True) for works in queues]
        self.put(self.main, Work(after=list(copies.values())))

    def _in_some_order(self, graph: list[Work], copies: dict[int, Work]) -> list[Work]:
        """Any one that the graph allows: its branches are as many streams as the driver likes to give it."""
        needed, then = {id(work): len(work.after) for work in graph}, defaultdict(list)
        for work in graph:
            for before in work.after:
                then[id(before)].append(work)
        able, order = [work for work in graph if not work.after], []
        choice = self.there.random
        late = choice.choice((0.0, 0.9, 1.0))  # how often the branch that waits longest goes on waiting
        while able:
            work = able.pop(-1 if choice.random() < late else choice.randrange(len(able)))
            order.append(copies[id(work)])
            for other in then[id(work)]:
                needed[id(other)] -= 1
                if not needed[id(other)]:
                    able.append(other)
        assert len(order) == len(graph)
        return order


MADE = {torch.ops.aten.empty, torch.ops.aten.new_empty, torch.ops.aten.empty_strided, torch.ops.aten.empty_like}
"""Operations that only make memory."""


class OnStream(TorchDispatchMode):
    """What torch is asked to compute is computed by a rank's computing stream, when it comes to it; memory and views of it are
    made at once."""

    def __init__(self, gpu: FakeGpu) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        places, computes = effects(func)
        if places:
            self.gpu.kernel(lambda: func(*args, **kwargs))
            at, name = places[0]
            return (args[at] if at < len(args) else kwargs[name]) if func._schema.returns else None
        result = func(*args, **kwargs)
        if computes:
            assert isinstance(result, Tensor), func
            self.gpu.kernel(lambda: result.copy_(func(*args, **kwargs)))
        return result


@cache
def effects(func: Any) -> tuple[list[tuple[int, str]], bool]:
    """Which arguments an operation writes, and whether its result is computed: no view, and not only memory."""
    assert func is not torch.ops.aten._local_scalar_dense.default, "the host looks at what is not computed yet"
    words, results = func._schema.arguments, func._schema.returns
    places = [(i, word.name) for i, word in enumerate(words) if word.alias_info is not None and word.alias_info.is_write]
    return places, func.overloadpacket not in MADE and all(x.alias_info is None for x in results)


def on_stream(gpu: FakeGpu, loop: Generator[Any, None, T]) -> Generator[None, None, T]:
    """A loop of a rank's host, whose GPU computes what it asks torch for."""
    while True:
        with OnStream(gpu):
            try:
                next(loop)
            except StopIteration as stop:
                return stop.value  # type: ignore[no-any-return]
        yield


class Kind(NamedTuple):
    """A tensor that is traded."""

    keys: bool
    dtype: torch.dtype
    width: int


PASSES = {
    False: ([Kind(False, torch.int16, 3), Kind(True, torch.int16, 3), Kind(True, torch.int32, 1)],
            [Kind(False, torch.int16, 4), Kind(False, torch.float32, 1)]),
    True: ([Kind(False, torch.int64, 1)],
           [Kind(False, torch.int16, 1), Kind(True, torch.float32, 3), Kind(True, torch.float32, 2)]),
}  # fmt: skip
"""What a forward and a backward pass trade on the way in and back. Most blocks end off the alignment."""


@dataclass
class Rank:
    """A rank's host: passes of a model that trade heads, pack, fetch, compute with what came, and bring gradients home."""

    gpu: FakeGpu
    transport: Symmetric
    wrong: list[str] = field(default_factory=list)
    count: list[int] = field(default_factory=lambda: [0])
    """Passes run so far, counted where the packing runs: a graph's replay counts on."""

    def run_pass(self, plan: Plan, width: int, backward: bool, groups: int = 1) -> Iterator[None]:
        """The order of events of autograd.py. Yields wherever hosts of other ranks may run."""
        if plan.key.schedule.ulysses == 1:
            yield from self._ring(plan, width, backward, 0)
        else:
            loops = [self._traded(plan, width, backward, group) for group in range(groups)]
            yield from on_stream(self.gpu, in_groups(loops, lambda group, end: end(), trades=True))
        self.gpu.kernel(lambda: self.count.__setitem__(0, self.count[0] + 1))

    def _check(self, tensor: Tensor, expected: Callable[[], int | Tensor], what: str) -> None:
        """On the computing stream."""

        def run() -> None:
            if tensor.numel() and not bool((tensor == expected()).all()):
                self.wrong.append(f"rank {self.gpu.rank}, {what}: {tensor.flatten()[:4].tolist()}")

        self.gpu.kernel(run)

    def _told(self, rank: int, what: int, heads: Sequence[int], rows: int) -> Tensor:
        """(1, rows, heads, 1): what a rank says in this pass, other at every place."""
        row, head = torch.arange(rows)[:, None], torch.tensor(heads, dtype=torch.int64)
        return ((self.count[0] * 1009 + rank * 4001 + what * 211 + head * 17 + row) % 32749)[None, :, :, None]

    def _traded(self, plan: Plan, width: int, backward: bool, group: int) -> Generator[Any, None, Callable[[], None]]:
        """A group of heads: in, through the ring, and back. Returns what is done with it at home."""
        heads, gpu, batch = HeadExchange(plan, self.transport), self.gpu, 1 + width % 2
        first, share = plan.rank * len(plan.shares), plan.share
        given = []
        for i, kind in enumerate(PASSES[backward][0]):
            own = (plan.k_lengths if kind.keys else plan.q_lengths)[plan.member]
            n = plan.key.kv_heads if kind.keys else plan.key.heads
            x = torch.empty(batch, own, n, kind.width, dtype=kind.dtype)
            gpu.kernel(lambda i=i, n=n, own=own, x=x: x.copy_(self._told(gpu.rank, 8 * group + i, range(n), own)))  # type: ignore[misc]
            given.append((x, kind.keys))
        arrived = yield from heads.enter(given)
        for i, (x, (_, keys)) in enumerate(zip(arrived, given, strict=True)):
            used: Sequence[int] = range(share.span(keys).start, share.span(keys).stop)
            if keys and share.k_index is not None:
                used = [share.k0 + k for k in share.k_index]
            lengths = plan.k_lengths if keys else plan.q_lengths
            for member, rows in enumerate(x.split(lengths, 1)):
                self._check(
                    rows,
                    lambda m=member, i=i, used=used, n=lengths[member]: self._told(first + m, 8 * group + i, used, n),  # type: ignore[misc]
                    f"group {group}, heads of tensor {i} from member {member}",
                )
        yield from self._ring(plan, width, backward, group)
        leaving, targets = [], []
        for i, kind in enumerate(PASSES[backward][1], 4):
            lengths = plan.k_lengths if kind.keys else plan.q_lengths
            n, rows = share.kv_heads if kind.keys else share.q_heads, sum(lengths)
            x = torch.empty(batch, rows, n, kind.width, dtype=kind.dtype)
            gpu.kernel(lambda i=i, n=n, s=rows, x=x: x.copy_(self._told(gpu.rank, 8 * group + i, range(n), s)))  # type: ignore[misc]
            leaving.append((x, kind.keys))
            whole = plan.key.kv_heads if kind.keys else plan.key.heads
            targets.append(torch.empty(batch, lengths[plan.member], whole, kind.width, dtype=kind.dtype))
        yield from heads.leave(leaving, targets)

        def at_home() -> None:
            for i, (x, kind) in enumerate(zip(targets, PASSES[backward][1], strict=True), 4):
                what = f"group {group}, tensor {i} on its way back"
                self._check(x, lambda i=i, kind=kind: self._home(plan, 8 * group + i, kind), what)  # type: ignore[misc]

        return at_home

    def _home(self, plan: Plan, what: int, kind: Kind) -> Tensor:
        """What all members together sent back of a tensor."""
        lengths = plan.k_lengths if kind.keys else plan.q_lengths
        begin, own = sum(lengths[: plan.member]), lengths[plan.member]
        whole = torch.zeros(1, own, plan.key.kv_heads if kind.keys else plan.key.heads, 1, dtype=torch.int64)
        for member, share in enumerate(plan.shares):
            n = share.kv_heads if kind.keys else share.q_heads
            told = self._told(plan.rank * len(plan.shares) + member, what, range(n), sum(lengths))[:, begin : begin + own]
            at = share.k_index if kind.keys and share.k_index is not None else range(n)
            whole.index_add_(2, torch.tensor([share.span(kind.keys).start + k for k in at], dtype=torch.int64), told)
        return whole

    def _ring(self, plan: Plan, width: int, backward: bool, group: int) -> Iterator[None]:
        transport, gpu, own = self.transport, self.gpu, self.count
        h, dtype, device = plan.share.kv_heads, torch.int32, torch.device("cpu")

        def told(rank: int, slot: int = 0) -> int:
            """Of a group's rank that packed in this pass. Gradients begin at slot 1."""
            return 1 + rank + gpu.world * own[0] + 1000 * slot + 100_000 * group

        buffer = torch.empty(0)
        if len(plan.steps) > 1:
            transport.open("chunks", plan, buffer_bytes(plan, "chunks", (1, width), dtype.itemsize))
            buffer = transport.lease(Label("chunks"), (plan.k_len, 1, h, width), dtype, device)
            gpu.kernel(lambda: buffer.fill_(told(gpu.rank)))
            if backward:
                transport.open("gradients", plan, buffer_bytes(plan, "gradients", (1, width), dtype.itemsize))
        pending: dict[int, tuple[Any, list[tuple[int, Tensor]]]] = {}
        arriving: list[tuple[Any, list[tuple[int, int, Tensor]]]] = []

        def receive() -> None:
            for handle, additions in arriving:
                handle.wait()
                for source, slot, tensor in additions:
                    self._check(tensor, lambda a=(source, slot): told(*a), f"gradient of slot {slot}")  # type: ignore[misc]
            arriving.clear()

        for n, step in enumerate(plan.steps):
            if n in pending:
                handle, tensors = pending.pop(n)
                handle.wait()
                for owner, tensor in tensors:
                    self._check(tensor, lambda owner=owner: told(owner), f"chunk of step {n}")  # type: ignore[misc]
            for at, transfers in plan.posts[n]:
                sends = [Message(plan.peer(t.dest), buffer[a:b]) for t in transfers if t.dest != plan.rank for a, b in t.ranges]
                came = [
                    Message(plan.peer(t.source), torch.empty(b - a, 1, h, width, dtype=dtype), a)
                    for t in transfers
                    if t.dest == plan.rank
                    for a, b in t.ranges
                ]
                pending[at] = transport.post(Label("chunks", at), sends, came), [(m.peer, m.tensor) for m in came]
            yield
            if backward:
                leased = None
                if n and step.rows:
                    leased = transport.lease(Label("gradients", n), (step.rows, 1, h, width), dtype, device)
                    gpu.kernel(lambda leased=leased, n=n: leased.fill_(told(gpu.rank, n)))  # type: ignore[misc]
                receive()
                sends, receives, additions = [], [], []
                for t in (t for post in plan.homes[n] for t in post.transfers):
                    if t.source == plan.rank:
                        chunk = next(c for c in step.chunks if c.owner == t.dest)
                        rows = sum(b - a for a, b in chunk.ranges)
                        assert leased is not None
                        sends.append(Message(plan.peer(t.dest), leased[chunk.offset : chunk.offset + rows]))
                    else:
                        source = plan.peer(t.source)
                        there = make_plan(replace(plan.key, rank=source)).steps[t.step]
                        chunk = next(c for c in there.chunks if c.owner == plan.rank)
                        target = torch.empty(sum(b - a for a, b in chunk.ranges), 1, h, width, dtype=dtype)
                        receives.append(Message(source, target, chunk.offset))
                        additions.append((source, n, target))
                if sends or receives:
                    arriving.append((transport.post(Label("gradients", n), sends, receives), additions))
            yield
        receive()
        for handle, _ in pending.values():
            handle.wait()


SCHEDULES = ("ring", "allgather", "staged:2")
HEADS = ((4, 4), (6, 2), (3, 1), (5, 5), (2, 2), (1, 1))
"""Query heads and key heads of a group: some ranks share key heads, some have none."""
MASKS = (Mask.full(), Mask.causal(), Mask.causal(window=11), Mask.documents([3, 20, 0, 41]))


def make(seed: int, world: int, transport: type[Symmetric] = Symmetric) -> tuple[World, list[Rank]]:
    there = World(world, seed)
    gpus = [FakeGpu(there, rank) for rank in range(world)]
    return there, [Rank(gpu, transport(gpu)) for gpu in gpus]  # type: ignore[arg-type]


class Pass(NamedTuple):
    """A pass of all ranks."""

    plans: list[Plan]
    width: int
    backward: bool
    groups: int


def draw_pass(choice: random.Random, world: int, seqlen: int, one_way: bool = False) -> Pass:
    """Any pass over sequences of up to so many tokens. one_way: in which rank 0 waits for little and may run far ahead."""
    mask = Mask.causal() if one_way else choice.choice(MASKS[:3] if seqlen != 64 else MASKS)
    layout = "contiguous" if one_way else choice.choice(("zigzag", "contiguous"))
    backward = choice.random() < (0.2 if one_way else 0.5)
    name = choice.choice(SCHEDULES)
    pieces = 1 if backward else choice.choice((1, 1, 3))
    ulysses = choice.choice([1, *(n for n in range(2, world + 1) if world % n == 0)])
    heads, kv_heads = (1, 1) if ulysses == 1 else choice.choice(HEADS)
    if ulysses > 1 and MASKS.index(mask) < 3:
        seqlen = choice.choice((seqlen, seqlen - 3, world - 1))  # the last one leaves a rank without rows
    there = SimulatedWorld(world, layout, replace(make_schedule(name, world, ulysses), pieces=pieces))
    plans = [there.plan(rank, mask, seqlen, seqlen, heads, kv_heads) for rank in range(world)]
    return Pass(plans, choice.randint(1, 3), backward, choice.randint(1, 4))


def passes(there: World, ranks: list[Rank], seqlen: int, count: int) -> None:
    """Random passes, the same on all ranks; hosts run as far ahead of each other and of the devices as it happens."""
    choice = there.random
    one_way = choice.random() < 0.4
    order = [draw_pass(choice, len(ranks), seqlen, one_way) for _ in range(count)]

    def host(rank: int) -> Iterator[None]:
        for one in order:
            yield from ranks[rank].run_pass(one.plans[rank], *one[1:])

    run(there, [host(rank) for rank in range(len(ranks))])


def run(there: World, hosts: list[Iterator[None]]) -> None:
    """Hosts in any order, each as far ahead of the others and of the devices as it happens."""
    choice = there.random
    while hosts:
        chosen = choice.choice(hosts)
        if next(chosen, "over") == "over":
            hosts.remove(chosen)
        for _ in range(choice.choice((0, 0, 1, 5, 40))):
            there.step(patience=0.01)


def warm(there: World, ranks: list[Rank], seqlen: int) -> None:
    """Buffers as large as any pass of this length needs: those are made by all ranks together."""
    sharding = SimulatedWorld(len(ranks), "contiguous", "allgather")
    plans = [sharding.plan(rank, Mask.full(), seqlen, seqlen, 1, 1) for rank in range(len(ranks))]
    for what in KINDS:
        for rank, plan in zip(ranks, plans, strict=True):
            rank.transport.open(what, plan, 256 * seqlen)


def wrongs(seed: int, world: int = 3, transport: type[Symmetric] = Symmetric) -> list[str]:
    """What goes wrong in some random passes of growing lengths."""
    there, ranks = make(seed, world, transport)
    for seqlen in (16, 64):
        warm(there, ranks, seqlen)
        passes(there, ranks, seqlen, 5)
        there.drain()
    return [text for rank in ranks for text in rank.wrong]


@pytest.fixture(params=[0, 1 << 20], ids=["one by one", "together"], autouse=True)
def together(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks fetched as each owner is ready, and once all are."""
    monkeypatch.setattr("ringflash.parallel.transport.symmetric.TOGETHER_BYTES", request.param)


@pytest.mark.parametrize(("world", "seeds"), [(2, 16), (3, 10), (4, 6)])
def test_no_interleaving_overwrites_what_a_peer_still_reads(world: int, seeds: int) -> None:
    for seed in range(seeds):
        assert wrongs(1000 * world + seed, world) == []


class NeverWaitsForReaders(Symmetric):
    def _spell(self, kind: str, what: str, index: int, peers: tuple[int, ...]) -> list[Op]:
        return [] if what == "free" else super()._spell(kind, what, index, peers)


class NeverWaitsForTheOwner(Symmetric):
    def _spell(self, kind: str, what: str, index: int, peers: tuple[int, ...]) -> list[Op]:
        ops = super()._spell(kind, what, index, peers)
        return [op for op in ops if not op.wait] if what == "arrive" else ops


class LeavesBeforeItCopies(Symmetric):
    def _spell(self, kind: str, what: str, index: int, peers: tuple[int, ...]) -> list[Op]:
        if what == "leave":
            return []
        more = super()._spell(kind, "leave", index, peers) if what == "arrive" else []
        return [*super()._spell(kind, what, index, peers), *more]


class SignalsBeforeItIsComplete(Symmetric):
    def lease(self, label: Label, *args: Any) -> Tensor:
        tensor = super().lease(label, *args)
        lane, index = self._buffer(label.what, label.step)
        lane.complete[index] = self.gpu.mark(self.gpu.current())  # before anything is written
        return tensor


class UsesOneFlagForBothBuffers(Symmetric):
    def _flag(self, at: int, kind: str, index: int, flag: int, peer: int) -> int:
        return super()._flag(at, kind, index if flag else 0, flag, peer)


class SwapsTheBuffers(Symmetric):
    def post(self, label: Label, sends: Sequence[Message], receives: Sequence[Message]) -> Any:
        moved = [Message(m.peer, m.tensor, m.row) for m in receives]
        lane = self.lanes[label.what]
        if receives and lane.passes % 3 == 0 and lane.shared is not None:
            _, index = self._buffer(label.what, label.step if label.what == "gradients" else 0)
            addresses = tuple(a + (lane.size if index == 0 else -lane.size) for a in lane.shared.addresses)
            lane.shared, kept = lane.shared._replace(addresses=addresses), lane.shared
            pending = super().post(label, sends, moved)
            lane.shared = kept
            return pending
        return super().post(label, sends, moved)


class DoesNotWaitForItsOwnSignals(Symmetric):
    def post(self, label: Label, sends: Sequence[Message], receives: Sequence[Message]) -> Any:
        pending = super().post(label, sends, receives)
        pending.signalled = None  # type: ignore[attr-defined]
        return pending


class LeavesAfterTheFirstPiece(Symmetric):
    def open(self, what: str, *args: Any) -> None:
        super().open(what, *args)
        self.lanes[what].reads = defaultdict(lambda: 1)


class HeadsNeverWaitForReaders(Symmetric):
    def _spell(self, kind: str, what: str, index: int, peers: tuple[int, ...]) -> list[Op]:
        return [] if (kind, what) == ("heads", "free") else super()._spell(kind, what, index, peers)


class HeadsNeverWaitForTheirOwner(Symmetric):
    def _spell(self, kind: str, what: str, index: int, peers: tuple[int, ...]) -> list[Op]:
        ops = super()._spell(kind, what, index, peers)
        return [op for op in ops if not op.wait] if (kind, what) == ("heads", "arrive") else ops


class LeasesBeforeItHasWaited(Symmetric):
    """A third group of heads is leased a buffer before the computing stream waits for what was posted of the second."""

    def leaves_out(self, event: Any) -> bool:
        return True

    def lease(self, label: Label, *args: Any) -> Tensor:
        wait = self.gpu.wait
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.gpu, "wait", lambda stream, event: None if self.leaves_out(event) else wait(stream, event))
            return super().lease(label, *args)

    def post(self, label: Label, sends: Sequence[Message], receives: Sequence[Message]) -> Any:
        pending: Any = super().post(label, sends, receives)

        def wait() -> None:
            """Also for what was left out."""
            type(pending).wait(pending)
            for event in (pending.signalled, pending.done):
                if event is not None:
                    self.gpu.wait(self.gpu.current(), event)

        pending.wait = wait
        return pending


class GraphsLeaseBeforeTheirOwnCopies(LeasesBeforeItHasWaited):
    """What waits for the others' copies may then hold up the own ones, where a graph's branches are one queue."""

    def leaves_out(self, event: Any) -> bool:
        return self.gpu.capturing() and any(event[0] is lane.copies for lane in self.lanes.values())


class HeadsAllInOneBuffer(Symmetric):
    """While their flags alternate."""

    def lease(self, label: Label, *args: Any) -> Tensor:
        tensor = super().lease(label, *args)
        lane, index = self._buffer(label.what, label.step)
        if label.what == "heads" and index and tensor.numel():
            assert lane.shared is not None
            return lane.shared.memory[: tensor.numel()]
        return tensor

    def post(self, label: Label, sends: Sequence[Message], receives: Sequence[Message]) -> Any:
        lane, index = self._buffer("heads", 0)
        if label.what != "heads" or not index or lane.shared is None:
            return super().post(label, sends, receives)
        shared = lane.shared
        lane.shared = shared._replace(addresses=tuple(a - lane.size for a in shared.addresses))
        pending = super().post(label, sends, receives)
        lane.shared = shared
        return pending


class OneWithoutHeadsDoesNotAlternate(Symmetric):
    """Or without rows: with nothing to send."""

    def lease(self, label: Label, shape: tuple[int, ...], *args: Any) -> Tensor:
        self.lanes[label.what].passes -= label.what == "heads" and not shape[0]
        return super().lease(label, shape, *args)


class HeadsReadTheFirstBlock(Symmetric):
    def post(self, label: Label, sends: Sequence[Message], receives: Sequence[Message]) -> Any:
        return super().post(label, sends, [m._replace(row=0) if label.what == "heads" else m for m in receives])


class HeadsReadABlockEarly(Symmetric):
    def post(self, label: Label, sends: Sequence[Message], receives: Sequence[Message]) -> Any:
        return super().post(label, sends, [m._replace(row=max(m.row - 16, 0)) if label.what == "heads" else m for m in receives])


HEADS_BUGS = (
    HeadsNeverWaitForReaders,
    HeadsNeverWaitForTheirOwner,
    LeasesBeforeItHasWaited,
    HeadsAllInOneBuffer,
    OneWithoutHeadsDoesNotAlternate,
    HeadsReadTheFirstBlock,
    HeadsReadABlockEarly,
)
BUGS = (
    *HEADS_BUGS,
    LeavesAfterTheFirstPiece,
    NeverWaitsForReaders,
    NeverWaitsForTheOwner,
    LeavesBeforeItCopies,
    SignalsBeforeItIsComplete,
    UsesOneFlagForBothBuffers,
    SwapsTheBuffers,
    DoesNotWaitForItsOwnSignals,
)


def shows(what_is_wrong: Callable[..., list[str]], *args: Any) -> bool:
    """Whether something is, or waits for ever."""
    try:
        return bool(what_is_wrong(*args))
    except DeadlockError:
        return True


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_the_test_finds_bugs(bug: type[Symmetric]) -> None:
    assert any(shows(wrongs, seed, 2 + seed % 2, bug) for seed in range(100))


def graphs(seed: int, world: int, transport: type[Symmetric] = Symmetric, drawn: Callable[..., Pass] = draw_pass) -> list[str]:
    """A pass or two captured on every rank and replayed between passes that are not."""
    there, ranks = make(seed, world, transport)
    warm(there, ranks, 64)
    choice = there.random
    captured: list[list[list[Work]]] = []
    for number in range(2):
        passes(there, ranks, 64, choice.randint(0, 3))
        there.drain()  # as torch.cuda.graph does
        order = [drawn(choice, world, 64) for _ in range(choice.randint(1, 2))]
        graph = []
        for rank in ranks:
            rank.gpu.capture()
            for one in order:
                for _ in rank.run_pass(one.plans[rank.gpu.rank], *one[1:]):
                    pass
            graph.append(rank.gpu.end_capture())
        captured.append(graph)
        if number:
            warm(there, ranks, 96)  # larger buffers: the graph goes on with those it knows
        for _ in range(4):
            replayed = choice.choice(captured)
            for rank, own in zip(ranks, replayed, strict=True):
                rank.gpu.replay(own)
                for _ in range(choice.choice((0, 10, 100))):
                    there.step(patience=0.01)
            passes(there, ranks, 64, choice.randint(0, 2))
    there.drain()
    return [text for rank in ranks for text in rank.wrong]


@pytest.mark.parametrize(("world", "seeds"), [(2, 10), (3, 4)])
def test_captured_passes_can_be_replayed_between_others(world: int, seeds: int) -> None:
    for seed in range(seeds):
        assert graphs(seed, world) == []


def in_groups_of_heads(choice: random.Random, world: int, seqlen: int) -> Pass:
    sharding = SimulatedWorld(world, "zigzag", "ulysses")
    return Pass([sharding.plan(r, Mask.full(), seqlen, seqlen, world, world) for r in range(world)], 1, choice.random() < 0.5, 4)


def test_a_graph_whose_branches_are_one_queue_does_not_hold_itself_up() -> None:
    for seed in range(3):
        assert graphs(seed, 2, drawn=in_groups_of_heads) == []
    assert any(shows(graphs, seed, 2, GraphsLeaseBeforeTheirOwnCopies, in_groups_of_heads) for seed in range(50))


@pytest.mark.parametrize("captured", [False, True])
def test_a_pass_that_ends_in_an_error_on_all_ranks_leaves_nothing_behind(captured: bool) -> None:
    """With two groups of heads under way."""
    for seed in range(10):
        there, ranks = make(seed, 2)
        warm(there, ranks, 64)
        for _ in range(3):
            broken = in_groups_of_heads(there.random, 2, 64)
            for rank in ranks:
                if captured:
                    there.drain()
                    rank.gpu.capture()
                host = rank.run_pass(broken.plans[rank.gpu.rank], *broken[1:])
                next(host)
                if captured:
                    rank.gpu.abandon()
            whole = in_groups_of_heads(there.random, 2, 64)  # as one does before one tries again to capture it
            run(there, [rank.run_pass(whole.plans[rank.gpu.rank], *whole[1:]) for rank in ranks])
            passes(there, ranks, 64, 2)
        there.drain()
        assert [text for rank in ranks for text in rank.wrong] == []


def test_nothing_is_leased_of_nothing() -> None:
    _, (rank, _) = make(0, 2)
    assert rank.transport.lease(Label("gradients", 1), (0, 2, 1, 4), torch.float32, torch.device("cpu")).shape == (0, 2, 1, 4)


def test_a_capture_makes_no_buffers() -> None:
    _, ranks = make(0, 2)
    plan = SimulatedWorld(2).plan(0, Mask.full(), 64, 64, 1, 1)
    ranks[0].gpu.capture()
    with pytest.raises(ValueError, match="once before capturing"):
        ranks[0].transport.open("chunks", plan, 4 * 64)


# ---- whole passes --------------------------------------------------------------------------------------------------------------


class EagerGpu:
    """One rank's GPU without any delay: the computing stream is the host, and runs other streams as far as it must wait for them.

    So the real loops run over the transport as in a simulated world, in one thread.
    """

    def __init__(self, rank: int, members: Sequence[int], memory: list[dict[int, Tensor]], log: list[tuple[int, int]]) -> None:
        self.place, self.members, self.memory, self.log = rank, members, memory, log
        self.rank, self.world = members.index(rank), len(members)
        self.shared = 0

    def share(self, size: int) -> Shared:
        if len(self.memory) == self.shared:
            self.memory.append({})
        parts = self.memory[self.shared]
        for member in self.members:
            parts.setdefault(member, torch.zeros(size, dtype=torch.uint8))
        self.log.append((self.place, self.shared))
        self.shared += 1
        assert parts[self.place].numel() == size, "ranks make buffers of different sizes"
        return Shared(parts[self.place], tuple(parts[r].data_ptr() for r in self.members))

    def stream(self, urgency: int) -> deque[Work]:
        return deque()

    def current(self) -> None:
        return None

    def synchronize(self) -> None:
        return None

    def capturing(self) -> bool:
        return False

    def put(self, stream: deque[Work] | None, work: Work) -> Work:
        if stream is not None:
            stream.append(work)
            return work
        EagerGpu.run_until(lambda: work.may() and all(w.done for w in work.after))
        work.run()
        work.done = True
        return work

    streams: ClassVar[list[deque[Work]]] = []
    """Of all ranks."""

    @staticmethod
    def run_until(reached: Callable[[], bool]) -> None:
        while not reached():
            able = [s for s in EagerGpu.streams if s and s[0].may() and all(w.done for w in s[0].after)]
            if not able:
                raise DeadlockError("the computing stream waits for ever")
            work = able[0].popleft()
            work.run()
            work.done = True

    def mark(self, stream: deque[Work] | None) -> Work:
        return self.put(stream, Work())

    def wait(self, stream: deque[Work] | None, event: Work) -> None:
        self.put(stream, Work(after=[event]))

    def pack(self, ops: Sequence[Op]) -> list[Op]:
        return list(ops)

    def issue(self, stream: deque[Work] | None, packed: list[Op]) -> None:
        for op in packed:
            word = ctypes.c_uint32.from_address(op.address)
            if op.wait:
                self.put(stream, Work(may=lambda word=word, op=op: word.value == op.value))  # type: ignore[misc]
            else:
                self.put(stream, Work(run=lambda word=word, op=op: setattr(word, "value", op.value)))  # type: ignore[misc]

    def copy(self, stream: deque[Work], target: Tensor, source: int) -> None:
        assert target.is_contiguous()
        self.put(stream, Work(run=lambda: ctypes.memmove(target.data_ptr(), source, target.nbytes)))

    def begun(self) -> None:
        return None

    def watch(self, label: Label, peers: Sequence[int], begun: None) -> None:
        return None


class EagerWorld:
    """Takes the place of `Simulated` in a simulated world: transports of one call share their memory, inside their domain."""

    def __init__(self, domains: Sequence[Domain]) -> None:
        self.domains, self.world = domains, len(domains)
        self.mailbox: Mailbox | None = None
        self.memory: list[dict[int, Tensor]] = []
        self.logs: list[list[tuple[int, int]]] = []

    def __call__(self, mailbox: Mailbox, rank: int) -> Transport:
        if mailbox is not self.mailbox:
            self.mailbox, self.memory = mailbox, []
            self.logs.append([])
            EagerGpu.streams.clear()
        members = self.domains[rank].members
        gpu = EagerGpu(rank, members, self.memory, self.logs[-1])
        self.transport = near = Symmetric(gpu, members)  # type: ignore[arg-type]
        for stream in {id(s): s for lane in near.lanes.values() for s in (lane.copies, lane.signals)}.values():
            EagerGpu.streams.append(stream)
        return near if len(members) == self.world else Domains(near, Simulated(mailbox, rank))

    def check(self) -> None:
        """All ranks made the same buffers, and nothing is left under way."""
        for log in self.logs:
            made = [[n for r, n in log if r == rank] for rank in range(self.world)]
            assert all(m == made[0] for m in made), f"ranks that make buffers alone would wait for ever: {made}"
        EagerGpu.run_until(lambda: not any(EagerGpu.streams))


Sizes = Mapping[str, tuple[int, int]]
"""Of a lane's buffers: bytes of each, and how many."""


def one_domain(case: Case) -> list[Domain]:
    return [Domain(tuple(range(case.world)))] * case.world


def over_symmetric_memory(case: Case, domains: Sequence[Domain] | None = None) -> tuple[list[str], Sizes]:
    """What is wrong with a case's results over symmetric memory, and its buffers."""
    there = EagerWorld(domains or one_domain(case))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ringflash.simulated.Simulated", there)
        results = simulate(case)
    there.check()
    sizes = {kind: (lane.size, lane.count) for kind, lane in there.transport.lanes.items() if lane.size}
    return [f"{case!r}: {text}" for text in judge_of(case).objections(results)], sizes


def symmetric_case(seed: int, world: int) -> Case | None:
    """A drawn case, or None for one that passes chunks on."""
    case = draw(seed, worlds=(world,))
    return None if case.inner is not None and case.inner > 1 else case


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_drawn_passes_over_symmetric_memory(world: int) -> None:
    """Those that tests/multigpu draws, and more."""
    wrong = []
    for seed in range(200_000 + world * 100, 200_000 + world * 100 + 40):
        if (case := symmetric_case(seed, world)) is not None:
            wrong += over_symmetric_memory(case)[0]
    assert not wrong, "\n".join(wrong)


class Later:
    """A backend whose kernels run on a fake GPU's computing stream."""

    def __init__(self, kernel: Kernel, gpu: FakeGpu) -> None:
        self.kernel, self.gpu, self.name, self.extras = kernel, gpu, kernel.name, kernel.extras

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, slices: Any, *, carry: Any = None, finish: bool = True, **options: Any
    ) -> tuple[Tensor, Tensor]:
        if carry is not None and not finish:
            out, lse = carry
        else:
            acc = accumulate_dtype(q.dtype)
            out = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype if finish else acc)
            lse = torch.empty((q.shape[0], q.shape[2], q.shape[1]), dtype=acc)

        def run() -> None:
            found = self.kernel.forward(q, k, v, slices, carry=carry, finish=finish, **options)
            for target, x in zip((out, lse), found, strict=True):
                target.copy_(x)

        self.gpu.kernel(run)
        return out, lse

    def backward(self, *tensors: Any, **options: Any) -> None:
        self.gpu.kernel(lambda: self.kernel.backward(*tensors, **options))


@dataclass
class Wire:
    """Between domains: tensors on offer, by sender, receiver, lane and number, and how many were offered and asked for."""

    offers: dict[tuple[int, int, str, int], Tensor] = field(default_factory=dict)
    sent: Counter[tuple[int, int, str]] = field(default_factory=Counter)
    asked: Counter[tuple[int, int, str]] = field(default_factory=Counter)


class FakeFar(Transport):
    """One rank's end of a wire, like NCCL's: a post ends when all of it has been received on both sides, and until then nothing
    that was posted later to the same lane moves."""

    name = "far"

    def __init__(self, gpu: FakeGpu, wire: Wire) -> None:
        self.gpu, self.wire, self.rank = gpu, wire, gpu.place
        self.lanes = {name: gpu.stream(0) for name in ("fast", "chunks", "gradients")}

    def post(self, label: Label, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        name, gpu, offers = label.what if label.far else "fast", self.gpu, self.wire.offers
        lane = self.lanes[name]
        gpu.wait(lane, gpu.mark(gpu.main))
        mine = []
        for m in (m for m in sends if m.tensor.numel()):
            pair = self.rank, m.peer, name
            mine.append((*pair, self.wire.sent[pair]))
            self.wire.sent[pair] += 1
            gpu.put(lane, Work(run=lambda key=mine[-1], x=m.tensor: offers.__setitem__(key, x)))  # type: ignore[misc]
        for m in (m for m in receives if m.tensor.numel()):
            pair = m.peer, self.rank, name
            key = (*pair, self.wire.asked[pair])
            self.wire.asked[pair] += 1
            gpu.put(
                lane,
                Work(
                    run=lambda key=key, x=m.tensor: x.copy_(offers.pop(key)),  # type: ignore[misc]
                    may=lambda key=key: key in offers,  # type: ignore[misc]
                ),
            )
        gpu.put(lane, Work(may=lambda: not any(key in offers for key in mine)))
        return Arrival(gpu, gpu.mark(lane))


@dataclass
class Arrival:
    gpu: FakeGpu
    done: Any

    def wait(self) -> None:
        self.gpu.wait(self.gpu.main, self.done)


class AnyOrder:
    """Takes the place of `Simulated`, kernels and `take_turns`: hosts and streams of all ranks in any order that they may."""

    def __init__(self, domains: Sequence[Domain], seed: int, sizes: Sizes, transport: type[Symmetric] = Symmetric) -> None:
        self.there = World(len(domains), seed)
        self.gpus = [FakeGpu(self.there, rank, domain.members) for rank, domain in enumerate(domains)]
        near = [transport(gpu, gpu.members) for gpu in self.gpus]  # type: ignore[arg-type]
        # Ranks make buffers together; here they cannot wait for each other in the middle of a pass.
        for (what, (size, count)), own in product(sizes.items(), near):
            own._make(own.lanes[what], size, count)
        wire = Wire()
        self.transports = [
            own if gpu.world == len(domains) else Domains(own, FakeFar(gpu, wire))
            for gpu, own in zip(self.gpus, near, strict=True)
        ]

    def transport_of(self, mailbox: Mailbox, rank: int) -> Transport:
        return self.transports[rank]

    def kernel_for(self, call: Call, plan: Plan) -> Later:
        return Later(kernel_for(call, plan), self.gpus[plan.key.rank])

    def take_turns(self, loops: Sequence[Generator[Any, None, T]]) -> list[T]:
        results: dict[int, T] = {}

        def host(rank: int) -> Iterator[None]:
            results[rank] = yield from on_stream(self.gpus[rank], loops[rank])

        run(self.there, [host(rank) for rank in range(len(loops))])
        self.there.drain()
        return [results[rank] for rank in range(len(loops))]


def in_any_order(
    case: Case, sizes: Sizes, seed: int, transport: type[Symmetric] = Symmetric, domains: Sequence[Domain] | None = None
) -> list[str]:
    """What is wrong with a case's results in one of all orders of events."""
    there = AnyOrder(domains or one_domain(case), seed, sizes, transport)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ringflash.simulated.Simulated", there.transport_of)
        patch.setattr("ringflash.simulated.kernel_for", there.kernel_for)
        patch.setattr("ringflash.autograd.take_turns", there.take_turns)
        results = simulate(case)
    return [f"{case!r}, order {seed}: {text}" for text in judge_of(case).objections(results)]


def in_four_groups(case: Case) -> Case:
    """The same with heads in four groups, where they are traded."""
    ulysses = case.world if case.schedule == "ulysses" else case.ulysses
    return replace(case, heads=4 * ulysses, kv_heads=4, head_groups=4) if ulysses > 1 else case


@pytest.mark.parametrize(("world", "seeds"), [(2, 24), (3, 14), (4, 10), (8, 4)])
def test_drawn_passes_in_any_order(world: int, seeds: int) -> None:
    """The loops as they are. What they leave to the order of events shows in their results."""
    wrong = []
    for seed in range(300_000 + world * 100, 300_000 + world * 100 + seeds):
        if (case := symmetric_case(seed, world)) is not None:
            for kind in {case, in_four_groups(case)}:
                found, sizes = over_symmetric_memory(kind)
                wrong += found + in_any_order(kind, sizes, seed)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("bug", HEADS_BUGS, ids=lambda bug: bug.__name__)
def test_any_order_finds_bugs(bug: type[Symmetric]) -> None:
    one_head = Case(schedule="ulysses", world=2, heads=1, kv_heads=1, dlse=False)
    cases = [(case, over_symmetric_memory(case)[1]) for case in (in_four_groups(one_head), one_head)]
    assert any(shows(in_any_order, case, sizes, seed, bug) for seed in range(50) for case, sizes in cases)


# ---- several domains -----------------------------------------------------------------------------------------------------------


def cases_of_domains(seed: int, world: int) -> list[tuple[Case, list[Domain]]]:
    """A drawn case over some way to put its ranks on hosts, also unevenly; double rings more often than they are drawn."""
    choice, case = random.Random(seed), draw(seed, worlds=(world,))
    found = []
    inner = [n for n in range(2, world) if world % n == 0]
    ring: dict[str, Any] = {"trim": True, "transport": "auto"} if case.schedule in ("allgather", "ulysses") else {}
    for one in (case, replace(case, schedule="double_ring", ulysses=1, inner=choice.choice(inner), **ring)) if inner else (case,):
        schedule = make_schedule(one.build_schedule(), world, one.ulysses, one.inner)
        size = choice.choice([n for n in range(1, world + 1) if world % n == 0])
        drawn = [choice.randrange(3) for _ in range(world)]
        hosts = choice.choice([[r // size for r in range(world)], sorted(drawn), drawn])
        domains = [domain_of(rank, list(map(str, hosts)), schedule) for rank in range(world)]
        if not any(domain.trouble for domain in domains):
            found.append((one, domains))
    return found


@pytest.mark.parametrize(("world", "seeds"), [(2, 10), (4, 16), (6, 8), (8, 6)])
def test_drawn_passes_over_several_domains(world: int, seeds: int) -> None:
    wrong = []
    for seed in range(400_000 + world * 100, 400_000 + world * 100 + seeds):
        for case, domains in cases_of_domains(seed, world):
            found, sizes = over_symmetric_memory(case, domains)
            wrong += found + in_any_order(case, sizes, seed, domains=domains)
    assert not wrong, "\n".join(wrong)


class RelaysNeverWaitForReaders(Symmetric):
    def _spell(self, kind: str, what: str, index: int, peers: tuple[int, ...]) -> list[Op]:
        return [] if (kind, what) == ("relays", "free") else super()._spell(kind, what, index, peers)


class RelaysAllInOneBuffer(Symmetric):
    """While it may be computed on."""

    def _buffer(self, what: str, step: int) -> tuple[Any, int]:
        lane, index = super()._buffer(what, step)
        return lane, 0 if lane.kind == "relays" else index


class RelaysLeaveBeforeTheyCame(Symmetric):
    def lease(self, label: Label, *args: Any) -> Tensor:
        tensor = super().lease(label, *args)
        if label.what == "relays":
            lane, index = self._buffer(label.what, label.step)
            lane.complete[index] = self.gpu.mark(self.gpu.current())
        return tensor


class RelaysAreTakenForOwnChunks(Symmetric):
    def post(self, label: Label, sends: Sequence[Message], receives: Sequence[Message]) -> Any:
        return super().post(label, sends, [m._replace(step=0) for m in receives])


RELAY_BUGS = (RelaysNeverWaitForReaders, RelaysAllInOneBuffer, RelaysLeaveBeforeTheyCame, RelaysAreTakenForOwnChunks)


@pytest.mark.parametrize("bug", RELAY_BUGS, ids=lambda bug: bug.__name__)
def test_what_is_passed_on_finds_bugs(bug: type[Symmetric]) -> None:
    case = Case(schedule="double_ring", world=6, inner=2, pieces=2, mask="full()", dlse=False)
    schedule = make_schedule(case.build_schedule(), case.world, case.ulysses, case.inner)
    domains = [domain_of(rank, list("001122"), schedule) for rank in range(6)]
    wrong, sizes = over_symmetric_memory(case, domains)
    assert not wrong and not in_any_order(case, sizes, 0, domains=domains)
    assert any(shows(in_any_order, case, sizes, seed, bug, domains) for seed in range(50))


@dataclass
class Layer:
    """A case over a whole world: what a rank is given, and what it should get."""

    jobs: list[Job]
    given: list[tuple[Tensor, ...]]
    sinks: Tensor | None
    expected: list[tuple[Tensor, ...]]

    @classmethod
    def of(cls, case: Case) -> Layer:
        inputs, mask = make_inputs(case), case.build_mask()
        there = SimulatedWorld(case.world, case.build_layout(), case.build_schedule(), ulysses=case.ulysses, inner=case.inner)
        there.trim, there.max_gap = case.trim, case.max_gap
        there, mailbox = there.for_mask(mask), Mailbox()
        q, k, v = (x.clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
        call = check(q, k, v, mask, case.scale, case.softcap, inputs.sinks, "auto", case.deterministic, False)
        plans = [there.plan(rank, mask, case.q_len, case.k_len, case.heads, case.kv_heads) for rank in range(case.world)]
        jobs = [
            Job(plan, kernel_for(call, plan), Simulated(mailbox, rank), call.scale, call.softcap, call.deterministic,
                groups=plan.key.groups)
            for rank, plan in enumerate(plans)
        ]  # fmt: skip
        pieces = (there.shards(x.contiguous()) for x in (inputs.q, inputs.k, inputs.v, inputs.dout))
        given: list[tuple[Tensor, ...]] = list(zip(*([x.contiguous() for x in y] for y in pieces), strict=True))
        forward = take_turns([forward_in_groups(job, x[0], x[1], x[2], inputs.sinks) for job, x in zip(jobs, given, strict=True)])
        backward = take_turns(
            [backward_in_groups(job, saved, x[3], None) for job, (_, _, saved), x in zip(jobs, forward, given, strict=True)]
        )
        expected: list[tuple[Tensor, ...]] = [(a[0], *b[:3]) for a, b in zip(forward, backward, strict=True)]
        return cls(jobs, given, inputs.sinks, expected)


def layers_in_any_order(
    cases: Sequence[Case], domains: Sequence[Domain], seed: int, bug: type[Symmetric] = Symmetric
) -> list[str]:
    """What is wrong with the passes of several layers, all forwards and then all backwards, with no wait between them."""
    sizes: dict[str, tuple[int, int]] = {}
    for case in cases:
        for kind, (size, count) in over_symmetric_memory(case, domains)[1].items():
            sizes[kind] = max(sizes.get(kind, (0, 0))[0], size), max(sizes.get(kind, (0, 0))[1], count)
    layers, there = [Layer.of(case) for case in cases], AnyOrder(domains, seed, sizes, bug)
    found: list[list[tuple[Tensor, ...]]] = [[] for _ in domains]

    def host(rank: int) -> Iterator[None]:
        done = []
        for layer in layers:
            job = layer.jobs[rank]
            kernel: Any = Later(job.kernel, there.gpus[rank])
            job = replace(job, kernel=kernel, transport=there.transports[rank])
            q, k, v, _ = layer.given[rank]
            forward = forward_in_groups(job, q, k, v, layer.sinks)
            done.append((job, (yield from on_stream(there.gpus[rank], forward))))
            yield
        for layer, (job, (out, _, saved)) in zip(reversed(layers), reversed(done), strict=True):
            backward = backward_in_groups(job, saved, layer.given[rank][3], None)
            found[rank].append((out, *(yield from on_stream(there.gpus[rank], backward))[:3]))
            yield

    run(there.there, [host(rank) for rank in range(len(domains))])
    there.there.drain()
    return [
        f"rank {rank}, layer {n}, {name}, {cases[n]!r}"
        for rank, results in enumerate(found)
        for n, result in enumerate(reversed(results))
        for name, a, b in zip(("out", "dq", "dk", "dv"), result, layers[n].expected[rank], strict=True)
        if not torch.allclose(a, b, rtol=1e-9, atol=1e-9)
    ]


def a_model(seed: int) -> tuple[list[Case], list[Domain]]:
    """Layers of one double ring, over hosts of several inner groups or of one."""
    choice = random.Random(seed)
    world, inner = choice.choice([(4, 2), (6, 2), (6, 3)])
    drawn = (draw(choice.randrange(1 << 30), worlds=(world,)) for _ in range(3))
    changes: dict[str, Any] = {"schedule": "double_ring", "ulysses": 1, "inner": inner, "trim": True, "transport": "auto"}
    changes |= {"dtype": "float64", "head_groups": 0, "dlse": False, "backend": "auto"}
    cases = [replace(case, pieces=choice.choice((0, 1, 2, 4)), **changes) for case in drawn]
    schedule = make_schedule("double_ring", world, 1, inner)
    return cases, [domain_of(rank, [str(r // inner) for r in range(world)], schedule) for rank in range(world)]


@pytest.mark.parametrize("seed", range(8))
def test_layers_one_after_the_other_over_several_domains(seed: int) -> None:
    assert layers_in_any_order(*a_model(seed), seed) == []


def test_layers_show_a_buffer_that_is_taken_too_early() -> None:
    assert any(shows(layers_in_any_order, *a_model(seed), seed, RelaysNeverWaitForReaders) for seed in range(20))
