"""The symmetric transport's protocol without a GPU: streams that run in any order they may, and seeded bugs that must show.

`World` keeps what every stream of every rank has been given, and does one operation at a time, of a random stream whose next one
may run: so a run is one of all interleavings that the flags and events allow, delays of any length included. What a rank packs
tells pass and rank; what arrives is read on the computing stream, as a kernel would.
"""

from __future__ import annotations

import ctypes
import random
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from ringflash.mask import Mask
from ringflash.parallel.plan import Plan, make_plan
from ringflash.parallel.schedule import make_schedule
from ringflash.parallel.transport import Label, Message
from ringflash.parallel.transport.simulated import Mailbox, Simulated
from ringflash.parallel.transport.symmetric import Op, Shared, Symmetric
from ringflash.simulated import SimulatedWorld
from ringflash.testing import Case, draw
from ringflash.testing.runs import judge_of, simulate


class DeadlockError(AssertionError):
    """Streams are left that wait for what nobody will do."""


@dataclass(eq=False)
class Work:
    """Something a stream does: when it may, and what. ``after``: the works it waits for, inside a graph or across streams."""

    run: Callable[[], None] = lambda: None
    may: Callable[[], bool] = lambda: True
    after: list[Work] = field(default_factory=list)
    done: bool = False


@dataclass(eq=False)
class Stream:
    queue: deque[Work] = field(default_factory=deque)
    pace: float = 1.0
    passing: bool = False  # made for one node of one launch of a graph
    captured: list[Work] | None = None  # the graph under construction that this stream takes part in
    last: Work | None = None  # of the captured ones


class World:
    """The GPUs of all ranks."""

    def __init__(self, world: int, seed: int) -> None:
        self.world, self.random = world, random.Random(seed)
        self.streams: list[Stream] = []
        self.memory: dict[int, Tensor] = {}  # by address of the first byte
        self.shares: list[list[int]] = [[] for _ in range(world)]

    def address(self, rank: int, number: int) -> int:
        return (1 + rank) << 40 | (1 + number) << 24

    def word(self, address: int) -> Tensor:
        return self.at(address, 4).view(torch.int32)

    def at(self, address: int, n: int) -> Tensor:
        base = address >> 24 << 24
        assert n <= len(self.memory[base]) - (address - base), "reads beyond the buffer"
        return self.memory[base][address - base : address - base + n]

    def step(self, patience: float = 0.0) -> bool:
        """Does one operation that may be done; False if there is none (or only slow ones, and the host goes on)."""
        able = [s for s in self.streams if s.queue and all(w.done for w in s.queue[0].after) and s.queue[0].may()]
        if not able:
            return False
        (stream,) = self.random.choices([*able, None], [*(s.pace for s in able), patience])
        if stream is None:
            return False
        work = stream.queue[0]
        work.run()
        work.done = True
        stream.queue.popleft()
        if stream.passing:
            self.streams.remove(stream)
        return True

    def drain(self) -> None:
        while self.step():
            pass
        if any(s.queue for s in self.streams):
            raise DeadlockError(f"{sum(bool(s.queue) for s in self.streams)} streams wait for ever")


class FakeGpu:
    """One rank's GPU: what `symmetric.Cuda` offers, on a World's streams."""

    def __init__(self, world: World, rank: int) -> None:
        self.there, self.rank, self.world = world, rank, world.world
        self.main = self.stream(0)
        self.graph: list[Work] | None = None

    def share(self, size: int) -> Shared:
        number = len(self.there.shares[self.rank])
        self.there.shares[self.rank].append(size)
        assert all(len(s) <= number or s[number] == size for s in self.there.shares), "sizes differ between ranks"
        memory = torch.zeros(size, dtype=torch.uint8)
        self.there.memory[self.there.address(self.rank, number)] = memory
        return Shared(memory, tuple(self.there.address(r, number) for r in range(self.world)))

    def stream(self, urgency: int) -> Stream:
        self.there.streams.append(Stream(pace=self.there.random.choice((1e-4, 1.0))))
        return self.there.streams[-1]

    def current(self) -> Stream:
        return self.main

    def synchronize(self) -> None:
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
            word = lambda op=op: self.there.word(op.address)  # noqa: E731
            if op.wait:
                self.put(stream, Work(may=lambda op=op, word=word: int(word()) == op.value))  # type: ignore[misc]
            else:
                self.put(stream, Work(run=lambda op=op, word=word: word().fill_(op.value)))  # type: ignore[misc]

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

    def kernel(self, run: Callable[[], None]) -> None:
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
        """One launch: a stream for every node, and the computing stream waits for all."""
        copies = {id(work): Work(work.run, work.may) for work in graph}
        start = self.put(self.main, Work())
        for work in graph:
            copies[id(work)].after = [start, *(copies[id(w)] for w in work.after)]
            self.there.streams.append(Stream(deque([copies[id(work)]]), passing=True))
        self.put(self.main, Work(after=list(copies.values())))


@dataclass
class Rank:
    """A rank's host: passes of a model that pack, fetch, compute with what came, and bring gradients home."""

    gpu: FakeGpu
    transport: Symmetric
    wrong: list[str] = field(default_factory=list)
    count: list[int] = field(default_factory=lambda: [0])

    def run_pass(self, plan: Plan, width: int, backward: bool) -> Iterator[None]:
        """The order of events of autograd.py. Yields between steps, where hosts of other ranks may run."""
        k = torch.zeros(1, plan.k_len, 1, width, dtype=torch.int32)
        own = self.count  # the passes run so far, counted where the packing runs: a graph's replay counts on

        def packed() -> int:
            return 1 + self.gpu.rank + self.gpu.world * own[0]

        transport, gpu = self.transport, self.gpu
        transport.open("chunks", plan, (1, width), k.dtype, k.device)
        buffer = transport.lease(Label("chunks"), (plan.k_len, 1, 1, width), k.dtype, k.device)
        gpu.kernel(lambda: buffer.fill_(packed()))
        if backward:
            transport.open("gradients", plan, (1, width), k.dtype, k.device)
        pending: dict[int, tuple[Any, list[tuple[int, Tensor]]]] = {}
        arriving: list[tuple[Any, list[tuple[int, int, Tensor]]]] = []

        def check(tensor: Tensor, expected: Callable[[], int], what: str) -> None:
            if tensor.numel() and not bool((tensor == expected()).all()):
                self.wrong.append(f"rank {gpu.rank}, {what}: {tensor.flatten()[:4].tolist()} is not {expected()}")

        def receive() -> None:
            for handle, additions in arriving:
                handle.wait()
                for source, slot, tensor in additions:
                    gpu.kernel(
                        lambda source=source, slot=slot, tensor=tensor: check(  # type: ignore[misc]
                            tensor, lambda: 1 + source + gpu.world * own[0] + 1000 * slot, f"gradient of slot {slot}"
                        )
                    )
            arriving.clear()

        for n, step in enumerate(plan.steps):
            if n in pending:
                handle, tensors = pending.pop(n)
                handle.wait()
                for owner, tensor in tensors:
                    gpu.kernel(
                        lambda owner=owner, tensor=tensor, n=n: check(  # type: ignore[misc]
                            tensor, lambda: 1 + owner + gpu.world * own[0], f"chunk of step {n}"
                        )
                    )
            for at, transfers in plan.posts[n]:
                sends = [Message(t.dest, buffer[a:b]) for t in transfers if t.dest != plan.rank for a, b in t.ranges]
                came = [
                    (t.source, Message(t.source, torch.empty(b - a, 1, 1, width, dtype=k.dtype), a))
                    for t in transfers
                    if t.dest == plan.rank
                    for a, b in t.ranges
                ]
                handle = transport.post(Label("chunks", at), sends, [m for _, m in came])
                pending[at] = (handle, [(owner, m.tensor) for owner, m in came])
            yield
            if backward:
                leased = None
                if n and step.rows:
                    leased = transport.lease(Label("gradients", n), (step.rows, 1, 1, width), k.dtype, k.device)
                    gpu.kernel(lambda leased=leased, n=n: leased.fill_(packed() + 1000 * n))  # type: ignore[misc]
                receive()
                sends, receives, additions = [], [], []
                for t in (t for post in plan.homes[n] for t in post.transfers):
                    if t.source == plan.rank:
                        chunk = next(c for c in step.chunks if c.owner == t.dest)
                        rows = sum(b - a for a, b in chunk.ranges)
                        assert leased is not None
                        sends.append(Message(t.dest, leased[chunk.offset : chunk.offset + rows]))
                    else:
                        there = make_plan(replace(plan.key, rank=plan.peer(t.source))).steps[t.step]
                        chunk = next(c for c in there.chunks if c.owner == plan.rank)
                        target = torch.empty(sum(b - a for a, b in chunk.ranges), 1, 1, width, dtype=k.dtype)
                        receives.append(Message(t.source, target, chunk.offset))
                        additions.append((t.source, n, target))
                if sends or receives:
                    arriving.append((transport.post(Label("gradients", n), sends, receives), additions))
            yield
        receive()
        for handle, _ in pending.values():
            handle.wait()
        gpu.kernel(lambda: own.__setitem__(0, own[0] + 1))


SCHEDULES = ("ring", "allgather", "staged:2")
MASKS = (Mask.full(), Mask.causal(), Mask.causal(window=11), Mask.documents([3, 20, 0, 41]))


def make(seed: int, world: int, transport: type[Symmetric] = Symmetric) -> tuple[World, list[Rank]]:
    there = World(world, seed)
    gpus = [FakeGpu(there, rank) for rank in range(world)]
    return there, [Rank(gpu, transport(gpu, None)) for gpu in gpus]  # type: ignore[arg-type]


def passes(there: World, ranks: list[Rank], seqlen: int, count: int) -> None:
    """Random passes, the same on all ranks; hosts run as far ahead of each other and of the devices as it happens."""
    choice = there.random
    order = []
    one_way = choice.random() < 0.4  # rank 0 needs nobody and may run far ahead
    for _ in range(count):
        mask = Mask.causal() if one_way else choice.choice(MASKS[:3] if seqlen != 64 else MASKS)
        layout = "contiguous" if one_way else choice.choice(("zigzag", "contiguous"))
        backward = choice.random() < (0.2 if one_way else 0.5)
        name = choice.choice(SCHEDULES)
        pieces = 1 if backward else choice.choice((1, 1, 3))
        world = SimulatedWorld(len(ranks), layout, replace(make_schedule(name, len(ranks)), pieces=pieces))
        width = choice.randint(1, 3)
        order.append(([world.plan(r, mask, seqlen, seqlen, 1, 1) for r in range(len(ranks))], width, backward))

    def host(rank: int) -> Iterator[None]:
        for plans, width, backward in order:
            yield from ranks[rank].run_pass(plans[rank], width, backward)

    hosts = [host(rank) for rank in range(len(ranks))]
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
    for what in ("chunks", "gradients"):
        for rank, plan in zip(ranks, plans, strict=True):
            rank.transport.open(what, plan, (1, 3), torch.int32, torch.device("cpu"))


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


@pytest.mark.parametrize("world", [2, 3, 4])
def test_no_interleaving_overwrites_what_a_peer_still_reads(world: int) -> None:
    for seed in range(25):
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
        self.lanes[label.what].complete[self._index(label)] = self.gpu.mark(self.gpu.current())  # before anything is written
        return tensor


class UsesOneFlagForBothBuffers(Symmetric):
    def _flag(self, at: int, kind: str, index: int, flag: int, peer: int) -> int:
        return super()._flag(at, kind, index if flag else 0, flag, peer)


class SwapsTheBuffers(Symmetric):
    def post(self, label: Label, sends: Sequence[Message], receives: Sequence[Message]) -> Any:
        moved = [Message(m.peer, m.tensor, m.row) for m in receives]
        lane = self.lanes[label.what]
        if receives and lane.passes % 3 == 0 and lane.shared is not None:
            addresses = tuple(a + (lane.size if self._index(label) == 0 else -lane.size) for a in lane.shared.addresses)
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


BUGS = (
    LeavesAfterTheFirstPiece,
    NeverWaitsForReaders,
    NeverWaitsForTheOwner,
    LeavesBeforeItCopies,
    SignalsBeforeItIsComplete,
    UsesOneFlagForBothBuffers,
    SwapsTheBuffers,
    DoesNotWaitForItsOwnSignals,
)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_the_test_finds_bugs(bug: type[Symmetric]) -> None:
    def shows(seed: int) -> bool:
        try:
            return bool(wrongs(seed, 2 + seed % 2, bug))
        except DeadlockError:
            return True

    assert any(shows(seed) for seed in range(100))


def graphs(seed: int, world: int, transport: type[Symmetric] = Symmetric) -> list[str]:
    """A pass or two captured on every rank and replayed between passes that are not."""
    there, ranks = make(seed, world, transport)
    warm(there, ranks, 64)
    choice = there.random
    captured: list[list[list[Work]]] = []
    for number in range(2):
        passes(there, ranks, 64, choice.randint(0, 3))
        there.drain()  # as torch.cuda.graph does
        sharding = SimulatedWorld(world, "zigzag", choice.choice(SCHEDULES))
        graph = []
        kinds = [choice.random() < 0.5 for _ in range(choice.randint(1, 3))]
        for rank in ranks:
            rank.gpu.capture()
            for backward in kinds:
                for _ in rank.run_pass(sharding.plan(rank.gpu.rank, Mask.causal(), 64, 64, 1, 1), 2, backward):
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


@pytest.mark.parametrize(("world", "seeds"), [(2, 20), (3, 6)])
def test_captured_passes_can_be_replayed_between_others(world: int, seeds: int) -> None:
    for seed in range(seeds):
        assert graphs(seed, world) == []


def test_nothing_is_leased_of_nothing() -> None:
    _, (rank, _) = make(0, 2)
    assert rank.transport.lease(Label("gradients", 1), (0, 2, 1, 4), torch.float32, torch.device("cpu")).shape == (0, 2, 1, 4)


def test_a_capture_makes_no_buffers() -> None:
    _, ranks = make(0, 2)
    plan = SimulatedWorld(2).plan(0, Mask.full(), 64, 64, 1, 1)
    ranks[0].gpu.capture()
    with pytest.raises(ValueError, match="once before capturing"):
        ranks[0].transport.open("chunks", plan, (1, 1), torch.int32, torch.device("cpu"))


# ---- whole passes --------------------------------------------------------------------------------------------------------------


class EagerGpu:
    """One rank's GPU without any delay: the computing stream is the host, and runs other streams as far as it must wait for them.

    So the real loops run over the transport as in a simulated world, in one thread.
    """

    def __init__(self, rank: int, world: int, memory: list[list[Tensor]], log: list[tuple[int, int]]) -> None:
        self.rank, self.world, self.memory, self.log = rank, world, memory, log
        self.shared = 0

    def share(self, size: int) -> Shared:
        if len(self.memory) == self.shared:
            self.memory.append([torch.zeros(size, dtype=torch.uint8) for _ in range(self.world)])
        parts = self.memory[self.shared]
        self.log.append((self.rank, self.shared))
        self.shared += 1
        assert parts[self.rank].numel() == size, "ranks make buffers of different sizes"
        return Shared(parts[self.rank], tuple(x.data_ptr() for x in parts))

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
        self.put(stream, Work(run=lambda: ctypes.memmove(target.data_ptr(), source, target.nbytes) and None))

    def begun(self) -> None:
        return None

    def watch(self, label: Label, peers: Sequence[int], begun: None) -> None:
        return None


class EagerWorld:
    """Takes the place of `Simulated` in a simulated world: transports of one call share their memory and heads' mailbox."""

    def __init__(self) -> None:
        self.mailbox: Mailbox | None = None
        self.memory: list[list[Tensor]] = []
        self.logs: list[list[tuple[int, int]]] = []

    def __call__(self, mailbox: Mailbox, rank: int) -> Symmetric:
        if mailbox is not self.mailbox:
            self.mailbox, self.memory = mailbox, []
            self.logs.append([])
            EagerGpu.streams.clear()
        gpu = EagerGpu(rank, self.world, self.memory, self.logs[-1])
        transport = Symmetric(gpu, Simulated(mailbox, rank))  # type: ignore[arg-type]
        for lane in transport.lanes.values():
            EagerGpu.streams += [lane.copies, lane.signals]
        return transport

    world = 1

    def check(self) -> None:
        """All ranks made the same buffers, and nothing is left under way."""
        for log in self.logs:
            made = [[n for r, n in log if r == rank] for rank in range(self.world)]
            assert all(m == made[0] for m in made), f"ranks that make buffers alone would wait for ever: {made}"
        EagerGpu.run_until(lambda: not any(EagerGpu.streams))


def over_symmetric_memory(case: Case) -> list[str]:
    """What is wrong with a case's results over symmetric memory."""
    there = EagerWorld()
    there.world = case.world
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ringflash.simulated.Simulated", there)
        results = simulate(case)
    there.check()
    return [f"{case!r}: {text}" for text in judge_of(case).objections(results)]


def symmetric_case(seed: int, world: int) -> Case | None:
    """A drawn case, or None for one that passes chunks on."""
    case = draw(seed, worlds=(world,))
    return None if case.inner is not None and case.inner > 1 else case


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_drawn_passes_over_symmetric_memory(world: int) -> None:
    """Those that tests/multigpu draws, and more."""
    wrong = []
    for seed in range(200_000 + world * 100, 200_000 + world * 100 + 60):
        if (case := symmetric_case(seed, world)) is not None:
            wrong += over_symmetric_memory(case)
    assert not wrong, "\n".join(wrong)
