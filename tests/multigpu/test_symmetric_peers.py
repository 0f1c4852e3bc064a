"""Symmetric memory between real GPUs: reuse under random delays, CUDA graphs, memory, ranks that are killed. One GPU a rank."""

from __future__ import annotations

import os
import random
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from ringflash import ContextParallel, Mask, attention
from ringflash.kernels import hopper_backward
from ringflash.parallel.memory import Demand, Shape, extra_bytes, symmetric_bytes, tensor_bytes
from ringflash.parallel.schedule import Schedule, make_schedule
from ringflash.parallel.transport import Label
from ringflash.parallel.transport.symmetric import Cuda, Op, Symmetric
from ringflash.testing import RankPool, gpu_places, steady_waits

PLACES = gpu_places()

pytestmark = [pytest.mark.multigpu, pytest.mark.skipif(PLACES < 2, reason="needs two GPUs, or one for several ranks")]

WORLD = 4 if PLACES >= 4 else 2
TIMEOUT_S = 8.0

Pools = Callable[..., RankPool]

HYBRID = [replace(make_schedule("hybrid", WORLD, 2), head_groups=groups) for groups in (1, 2)] if WORLD == 4 else []
"""Rings of two behind an exchange of heads between two."""


@pytest.fixture(scope="module")
def peers(fresh_gpus: Pools) -> Iterator[RankPool]:
    """Not the pool of other files: what these tests measure begins with an allocator that has seen nothing else."""
    with fresh_gpus(WORLD) as pool:
        yield pool


SOME_HEADS, MORE_HEADS = (8, 2, 2), (16, 8, 8)
"""Of q, k, v. The second in up to four groups that ranks trade, in which four ranks share key heads, or none, or have two."""


def heads_for(schedule: str | Schedule) -> tuple[int, int, int]:
    trades = schedule.ulysses > 1 if isinstance(schedule, Schedule) else schedule.startswith("ulysses")
    return MORE_HEADS if trades else SOME_HEADS


def tensors(cp: ContextParallel, seqlen: int, seed: int, heads: Sequence[int] = SOME_HEADS, dim: int = 64) -> list[Tensor]:
    """This rank's q, k, v of whole tensors that are the same on all ranks."""
    make = torch.Generator("cuda").manual_seed(seed)
    whole = [torch.randn(1, seqlen, h, dim, device="cuda", dtype=torch.bfloat16, generator=make) for h in heads]
    return [cp.shard(x).requires_grad_() for x in whole]


# ---- delays --------------------------------------------------------------------------------------------------------------------


class Slow(Cuda):
    """A GPU that now and then does nothing for up to a millisecond, on whatever stream comes next."""

    random = random.Random(0)
    often = 0.25
    """Of the streams' operations, before which it does so."""

    def _pause(self, stream: torch.cuda.Stream) -> None:
        if self.random.random() < self.often:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(self.random.randrange(10_000, 2_000_000))

    def issue(self, stream: torch.cuda.Stream, packed: Any) -> None:
        self._pause(stream)
        super().issue(stream, packed)

    def copy(self, stream: torch.cuda.Stream, target: Tensor, source: int) -> None:
        self._pause(stream)
        super().copy(stream, target, source)

    def mark(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        self._pause(stream)
        return super().mark(stream)


class NeverWaitsForReaders(Symmetric):
    """Whatever was said before is forgotten, so that nothing waits for ever: only data go wrong."""

    def _spell(self, kind: str, what: str, index: int, peers: tuple[int, ...]) -> list[Op]:
        ops = super()._spell(kind, what, index, peers)
        return [op._replace(wait=False) for op in ops] if what == "free" else ops


class NeverWaitsForTheOwner(Symmetric):
    def _spell(self, kind: str, what: str, index: int, peers: tuple[int, ...]) -> list[Op]:
        return [op._replace(wait=False, value=0) if op.wait else op for op in super()._spell(kind, what, index, peers)]


class SignalsBeforeItIsComplete(Symmetric):
    def lease(self, label: Label, *args: Any) -> Tensor:
        tensor = super().lease(label, *args)
        lane, index = self._buffer(label.what, label.step)
        lane.complete[index] = self.gpu.mark(self.gpu.current())  # before anything is written
        return tensor


class SwapsTheBuffers(Symmetric):
    """Every third read is of the other buffer."""

    turns = 0

    def _read(self, lane: Any, label: Label, step: int, index: int, peers: tuple[int, ...], reads: Any) -> None:
        self.turns += 1
        shared = lane.shared
        if self.turns % 3 == 0:
            other = lane.size * (1 - 2 * index)
            lane.shared = shared._replace(addresses=tuple(a + other for a in shared.addresses))
        super()._read(lane, label, step, index, peers, reads)
        lane.shared = shared


class LeasesBeforeItHasWaited(Symmetric):
    """A third group of heads is leased a buffer before the computing stream waits for what was posted of the second."""

    def lease(self, label: Label, *args: Any) -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.gpu, "wait", lambda stream, event: None)
            return super().lease(label, *args)

    def post(self, label: Label, *messages: Any) -> Any:
        pending: Any = super().post(label, *messages)

        def wait() -> None:
            """Also for what was left out."""
            type(pending).wait(pending)
            for event in (pending.signalled, pending.done):
                if event is not None:
                    self.gpu.wait(self.gpu.current(), event)

        pending.wait = wait
        return pending


MOVED: dict[str, tuple[str | Schedule, ...]] = {
    "chunks": ("ring", "allgather"),
    "heads": ("ulysses:1", "ulysses:2", "ulysses:4", "ulysses:4", *HYBRID),
}
"""Schedules by what they move."""


def layers(rank: int, kind: type[Symmetric] | None, moved: str, seed: int) -> list[Tensor]:
    """Results of many layers of changing shapes, masks and schedules over one transport, forward and backward interleaved.

    Ranks that wait for each other's rows in every pass cannot be two passes apart, which is what it takes to write chunks that
    are still read. So most layers are contiguous (under a causal mask the first rank waits for nobody's), and in every second run
    the last rank is the slow one. Heads need no such help: a buffer is written again by the next exchange but one, in the same
    pass.
    """
    choice = random.Random(seed)
    contexts = [
        ContextParallel(None, layout, schedule, transport="symmetric", timeout_s=TIMEOUT_S)
        for schedule in MOVED[moved]
        for layout in ("zigzag", "contiguous", "contiguous")
    ]
    transport = contexts[0].transport(torch.device("cuda", torch.cuda.current_device()))
    assert isinstance(transport, Symmetric)
    if kind is not None:
        gpu = transport.gpu
        transport = kind(Slow(gpu.group, gpu.timeout_s, gpu.device, gpu.meet))
        Slow.random = random.Random(1000 * seed + rank)
        Slow.often = 0.25 if seed % 2 == 0 else 0.5 if rank == WORLD - 1 else 0.05
    for cp in contexts:  # all layers share the buffers of one transport
        cp._transports[torch.device("cuda", torch.cuda.current_device())] = transport
    found, open_layers = [], []
    for n in range(24):
        cp = choice.choice(contexts)
        seqlen = choice.choice((512, 1000, 2048)) if n else 2048
        mask = choice.choice((Mask.full(), Mask.causal(), Mask.causal(), Mask.causal(window=300)))
        given = tensors(cp, seqlen, n, heads_for(cp.schedule))
        out = attention(*given, mask=mask, cp=cp, deterministic=True)
        assert isinstance(out, Tensor)
        found.append(out.detach())
        open_layers.append((out, given))
        while open_layers and choice.random() < 0.5:
            out, given = open_layers.pop()
            found += torch.autograd.grad(out, given, out.detach())
    for out, given in open_layers:
        found += torch.autograd.grad(out, given, out.detach())
    torch.cuda.synchronize()
    return found


def same_as_undelayed(rank: int, kind: type[Symmetric], moved: str, seeds: Sequence[int]) -> list[bool]:
    equal = []
    for seed in seeds:
        expected, found = layers(rank, None, moved, seed), layers(rank, kind, moved, seed)
        equal.append(all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)))
    return equal


@pytest.mark.parametrize("moved", MOVED)
def test_random_delays_change_nothing(peers: RankPool, moved: str) -> None:
    for answers in peers.run(same_as_undelayed, Symmetric, moved, range(3), timeout_s=90.0):
        assert all(answers)


GAVE_UP = re.compile(r"TransportError: rank \d+, .*step .*did not (answer|come)|exit code (70|-6)\b")
"""The transport's own error, its watchdog's end of the process, or the abort that is NCCL's."""

BUGS = (
    *((bug, "chunks") for bug in (NeverWaitsForReaders, NeverWaitsForTheOwner, SignalsBeforeItIsComplete, SwapsTheBuffers)),
    *((bug, "heads") for bug in (NeverWaitsForReaders, NeverWaitsForTheOwner, LeasesBeforeItHasWaited)),
)


@pytest.mark.skipif(torch.cuda.device_count() < WORLD, reason="ranks that take turns on a GPU are seldom in each other's way")
@pytest.mark.parametrize(("bug", "moved"), BUGS, ids=lambda word: getattr(word, "__name__", word))
def test_random_delays_show_a_bug(fresh_gpus: Pools, bug: type[Symmetric], moved: str) -> None:
    """In numbers, or in ranks that wait until they give up: a signal that is lost is not given again. No other error counts."""
    with fresh_gpus(WORLD) as pool:
        outcomes = pool.outcomes(same_as_undelayed, bug, moved, range(4), timeout_s=60.0, grace_s=15.0)
        pool.kill()
    errors = [outcome.error for outcome in outcomes if outcome.error is not None]
    gave_up = [error for error in errors if GAVE_UP.search(error)]
    assert all(error in gave_up or error.endswith("after another rank failed") for error in errors), errors
    assert gave_up or any(not all(outcome.value) for outcome in outcomes if outcome.error is None)


# ---- CUDA graphs ---------------------------------------------------------------------------------------------------------------


def graphed(rank: int, transport: str, backward: bool, schedule: str | Schedule) -> list[str]:
    """What differs between captured layers, replayed with new inputs among eager ones (of which one needs larger buffers), and
    eager layers."""
    cp, heads = ContextParallel(None, "zigzag", schedule, transport=transport, timeout_s=30.0), heads_for(schedule)
    given, other = tensors(cp, 1024, 0, heads), tensors(cp, 512, 1, heads)
    cp.position_ids(1024)

    def run() -> list[Tensor]:
        if not backward:
            with torch.no_grad():
                return [attention(*given, mask=Mask.causal(), cp=cp), attention(*given, mask=Mask.causal(), cp=cp)]
        out = attention(*given, mask=Mask.causal(), cp=cp, deterministic=True)
        return [out, *torch.autograd.grad(out, given, out.detach())]

    def eager() -> Tensor:
        return attention(*other, mask=Mask.full(), cp=cp)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected_other = eager().detach()
        run()
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    wrong = []
    for n in range(4):
        with torch.no_grad():
            for x in given:
                x.normal_(generator=torch.Generator("cuda").manual_seed(100 * n + rank))
        graph.replay()
        if n == 2:
            attention(*tensors(cp, 4096, 2, heads), mask=Mask.full(), cp=cp)
        between = eager()
        graph.replay()
        found = [x.clone() for x in results]
        expected = run()
        wrong += [
            f"replay {n}, result {i}" for i, (a, b) in enumerate(zip(found, expected, strict=True)) if not torch.equal(a, b)
        ]
        wrong += [] if torch.equal(between, expected_other) else [f"eager after replay {n}"]
    torch.cuda.synchronize()
    return wrong


@pytest.mark.parametrize("transport", ["symmetric", "p2p"])
@pytest.mark.parametrize("schedule", ["ring", "ulysses:1", "ulysses:4", *HYBRID[1:]], ids=str)
@pytest.mark.parametrize("backward", [False, True])
def test_captured_passes_between_ranks(peers: RankPool, transport: str, backward: bool, schedule: str | Schedule) -> None:
    assert peers.run(graphed, transport, backward, schedule, timeout_s=60.0) == [[]] * WORLD


# ---- the host, and memory ------------------------------------------------------------------------------------------------------


def steady(rank: int, transport: str, schedule: str) -> str:
    """The complaint of torch about a synchronisation in the steady state; empty if there is none."""
    cp = ContextParallel(schedule=schedule, transport=transport, timeout_s=30.0)
    given = tensors(cp, 1024, 0, heads_for(schedule))

    def run() -> None:
        out = attention(*given, mask=Mask.causal(), cp=cp)
        torch.autograd.grad(out, given, out.detach())

    return steady_waits(run)


@pytest.mark.parametrize("transport", ["symmetric", "p2p"])
@pytest.mark.parametrize("schedule", ["auto", "ulysses:4"])
def test_nothing_waits_for_the_device_in_the_steady_state(peers: RankPool, transport: str, schedule: str) -> None:
    assert peers.run(steady, transport, schedule) == [""] * WORLD


class Memory(NamedTuple):
    """Peak bytes of a forward and backward pass, by torch's allocator and by the formula; the same of symmetric memory."""

    found: int
    least: int
    """By the formula without the sums in float32 of a pass of one call."""
    most: int
    """The same with float32 dk and dv, which such a pass may do without, and with the partial sums that the kernel made."""
    told: int
    held: int
    told_held: int

    def agrees(self) -> bool:
        return (1 - ROUNDING) * self.least < self.found < (1 + ROUNDING) * self.most and self.held == self.told_held


@contextmanager
def partial_sums() -> Iterator[list[int]]:
    """Bytes that every launch meanwhile sums divided work in."""
    found, launch = [0], hopper_backward._launch

    def noting(work: Any, inputs: list[Tensor], *rest: Any) -> None:
        found.append(4 * hopper_backward.partial_sums(work, inputs[1].shape[3], inputs[3].shape[3]))
        launch(work, inputs, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hopper_backward, "_launch", noting)
        yield found


def memory(rank: int, schedule: str | Schedule, budget: int | None, kv_heads: int = 4) -> Memory:
    cp = ContextParallel(None, "zigzag", schedule, transport="symmetric", memory_budget=budget, timeout_s=30.0)
    seqlen, heads, dim = 8192 * WORLD, 16, 128
    given = tensors(cp, seqlen, 0, (heads, kv_heads, kv_heads), dim)
    torch.cuda.empty_cache()

    def run() -> None:
        out = attention(*given, mask=Mask.causal(), cp=cp)
        torch.autograd.grad(out, given, dout)

    dout = torch.randn_like(given[0])
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated() - sum(x.nbytes for x in (*given, dout))
    torch.cuda.reset_peak_memory_stats()
    with partial_sums() as sums:
        run()
    torch.cuda.synchronize()
    found = torch.cuda.max_memory_allocated() - before
    (job,) = cp.jobs.values()
    transport = cp.transport(given[0].device)
    assert isinstance(transport, Symmetric)
    shape = Shape(1, dim, dim)
    held = symmetric_bytes(job.plan, shape, groups=job.groups)
    least, told = (
        tensor_bytes(job.plan, shape) + extra_bytes(job.plan, Demand(of, symmetric=True), job.groups) - held
        for of in (replace(shape, portion_bytes=()), shape)
    )
    most = least + max(sums)
    if least < told:
        least -= job.plan.k_len * job.plan.share.kv_heads // job.groups * 2 * dim * 4  # dk and dv, which it may do without
    return Memory(found, least, most, told, transport.nbytes - transport.flags.memory.nbytes, held)


# The allocator rounds up to 512 bytes, and splits a cached block of more than 1 MiB only where more than 1 MiB remains: less than
# 1 MiB for each of the ten or so large tensors that live at the peak, 257 to 305 MiB in all.
ROUNDING = 0.04


@pytest.mark.parametrize("schedule", ["auto", "ring", "staged:2"])
def test_memory_is_what_the_formula_says(peers: RankPool, schedule: str) -> None:
    for answer in peers.run(memory, schedule, None):
        assert answer.agrees() and answer.least == answer.told, answer


@pytest.mark.parametrize("kv_heads", [8, 16])
@pytest.mark.parametrize("schedule", ["ulysses:1", "ulysses:2", "ulysses:4", *HYBRID], ids=str)
def test_memory_of_traded_heads_is_what_the_formula_says(peers: RankPool, schedule: str | Schedule, kv_heads: int) -> None:
    for answer in peers.run(memory, schedule, None, kv_heads):
        assert answer.agrees(), answer


def test_a_budget_is_kept(peers: RankPool) -> None:
    budget = 150 << 20  # at full speed a call takes 192 MiB or more
    for answer in peers.run(memory, "auto", budget):
        tensors_of_rank = 8192 * 128 * 2 * (2 * (16 + 16) + 2 * (4 + 4)) + 8192 * 16 * 4
        assert answer.agrees(), answer
        assert answer.found + answer.held - tensors_of_rank < (1 + ROUNDING) * budget


# ---- ranks that die ------------------------------------------------------------------------------------------------------------


def until_killed(rank: int, transport: str, backward: bool, schedule: str, folder: str) -> str:
    """The error of a rank one of whose peers is killed in the middle of a run. What it prints goes to a file of the folder."""
    words = os.open(os.path.join(folder, str(rank)), os.O_CREAT | os.O_WRONLY)
    os.dup2(words, 2)
    cp = ContextParallel(transport=transport, schedule=schedule, timeout_s=TIMEOUT_S)
    given = tensors(cp, 2048, 0, heads_for(schedule))
    try:
        for n in range(2000):
            out = attention(*given, mask=Mask.full(), cp=cp)
            if backward:
                torch.autograd.grad(out, given, out.detach())
            if n % 20 == 19:
                torch.cuda.synchronize()
            if n == 50 and rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.parametrize(
    ("transport", "backward", "schedule"),
    [
        ("symmetric", False, "ring"),
        ("symmetric", True, "ring"),
        ("symmetric", True, "ulysses:4"),
        ("p2p", False, "ring"),
        ("p2p", True, "ring"),
    ],
)
def test_a_killed_rank_ends_the_others_with_a_word(
    fresh_gpus: Pools, transport: str, backward: bool, schedule: str, tmp_path: Path
) -> None:
    """In the error of the call, or, where the driver lets no thread go on, in the end of the process with exit code 70."""
    with fresh_gpus(WORLD) as pool:
        outcomes = pool.outcomes(until_killed, transport, backward, schedule, str(tmp_path), timeout_s=60.0, grace_s=40.0)
        pool.kill()
    said = "".join(path.read_text(errors="replace") for path in tmp_path.iterdir())
    assert "exit code -9" in str(outcomes[1].error)
    for rank in (r for r in range(WORLD) if r != 1):
        outcome = outcomes[rank]
        if outcome.error is None:
            assert re.search(r"TransportError: rank \d, .*step .*: ", outcome.value), outcome.value
        else:  # the watchdog's word is on stderr; NCCL's own one may end the process too
            assert re.search(r"exit code (70|-6)", outcome.error), outcome.error
    named = [o.value for o in outcomes if o.error is None] + re.findall(r"rank \d, [^\n]*step [^\n]*", said)
    assert any(re.search(r"rank 1\b", text) for text in named), (named, said[-2000:])
