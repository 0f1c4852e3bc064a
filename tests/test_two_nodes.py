"""Two nodes on one machine: network namespaces with two gloo ranks each, joined by a shaped link.

Kernels sleep here instead of computing, so that the time of a pass is that of its schedule and not of the cores it shares. Marked
alone: nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ringflash import ContextParallel, Mask
from ringflash.autograd import Job, backward_loop, forward_loop, take_turns
from ringflash.kernels import Extras
from ringflash.parallel.plan import Plan, Post, row_bytes
from ringflash.parallel.schedule import Schedule
from ringflash.parallel.transport import Label, Message, Transport
from ringflash.slices import Slices
from ringflash.testing import Case, Idle, RankPool, objections_on_ranks, two_nodes

pytestmark = pytest.mark.alone

WORLD, NODE = 4, 2
RATE = 160_000_000
"""Bits per second of the link, in each direction."""
HEADS, HEAD_DIM = 32, 128
ROWS = 64
"""Of a rank: its keys and values are 2 MiB, 110 ms of the link."""


@pytest.fixture(scope="module")
def nodes() -> Iterator[RankPool]:
    """Ranks 0 and 1 in one namespace, 2 and 3 in the other; ``GROUP`` of each talks over these."""
    if why := two_nodes.missing():
        pytest.skip(why)
    with two_nodes.shaped_link(RATE) as names, RankPool(WORLD) as pool:
        pool.run(enter, names)
        yield pool


GROUP: dist.ProcessGroup | None = None


def enter(rank: int, names: tuple[str, str]) -> None:
    """Moves this rank into its node's namespace and makes a group there; ahead of what else runs on the machine."""
    global GROUP
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, -20)  # and so the group's threads
    two_nodes.enter(names[rank // NODE])
    os.environ["GLOO_SOCKET_IFNAME"] = two_nodes.INTERFACE
    GROUP = dist.new_group(backend="gloo")


def link_MBps(rank: int, nbytes: int, repeats: int) -> float:  # noqa: N802 (a unit)
    """What one direction of the link carries while both are busy, with so many bytes from each rank at a time."""
    other = (rank + NODE) % WORLD
    sent, received = torch.zeros(nbytes, dtype=torch.uint8), torch.zeros(nbytes, dtype=torch.uint8)
    readings = []
    for _ in range(repeats):
        begin = together()
        ops = [dist.P2POp(kind, x, group=GROUP, group_peer=other) for kind, x in ((dist.irecv, received), (dist.isend, sent))]
        for work in dist.batch_isend_irecv(ops):
            work.wait()
        readings.append(NODE * nbytes / slowest(begin) / 1e6)
    return statistics.median(readings)


def together() -> float:
    """The time, once all ranks are here."""
    dist.barrier(group=GROUP)
    return time.monotonic()


def slowest(begin: float) -> float:
    """Seconds that the slowest rank took since it began."""
    seconds = torch.tensor(time.monotonic() - begin)
    dist.all_reduce(seconds, dist.ReduceOp.MAX, group=GROUP)
    return seconds.item()


class Sleeper(Idle):
    """A kernel that takes its time and leaves the cores to others."""

    name = "sleeper"
    extras = Extras(delta=True)

    def __init__(self, pair_s: float) -> None:
        self.pair_s = pair_s

    def forward(self, q: Tensor, k: Tensor, v: Tensor, slices: Any, **options: Any) -> Any:
        time.sleep(self.pair_s * slices.area())
        return super().forward(q, k, v, slices, **options)

    def backward(self, *tensors: object, **_: object) -> None:
        slices = tensors[7]
        assert isinstance(slices, Slices)
        time.sleep(self.pair_s * slices.area())


class Zeros(Transport):
    """A transport that is there at once, with nothing."""

    name = "zeros"

    def post(self, label: Label, sends: Sequence[Message], receives: Sequence[Message]) -> Zeros:
        for message in receives:
            message.tensor.zero_()
        return self

    def wait(self) -> None:
        return None


@dataclass(frozen=True)
class Pass:
    """A rank's passes: seconds of the slowest rank in the fastest one, and in one without transfers; bytes that this rank sends
    over the shaped link."""

    seconds: float
    alone_s: float
    nbytes: int


def passes(rank: int, schedule: Schedule, causal: bool, backward: bool, compute_s: float, repeats: int) -> Pass:
    cp = ContextParallel(GROUP, "zigzag" if causal else "contiguous", schedule, transport="p2p")
    mask = Mask.causal() if causal else Mask.full()
    plan = cp.plan(rank, mask, WORLD * ROWS, WORLD * ROWS, HEADS, HEADS)
    real = Job(plan, Sleeper(compute_s / plan.area), cp.transport(torch.device("cpu")), 1.0, 0.0, False)
    q, k, v = (torch.zeros(1, ROWS, HEADS, HEAD_DIM) for _ in range(3))
    at_once = replace(real, kernel=Sleeper(0.0), transport=Zeros())
    _, _, saved = take_turns([forward_loop(at_once, q, k, v, None)])[0]

    def seconds(job: Job) -> float:
        begin = together()
        take_turns([backward_loop(job, saved, q, None) if backward else forward_loop(job, q, k, v, None)])
        return slowest(begin)

    best, alone = (min(seconds(job) for _ in range(repeats)) for job in (real, replace(real, transport=Zeros())))
    if not backward:
        return Pass(best, alone, crossing(plan, plan.posts) * HEADS // len(plan.shares) * 2 * HEAD_DIM * 4)
    back = plan.backward(HEAD_DIM, HEAD_DIM, 4)
    row = row_bytes(back, back.key.travels, HEAD_DIM, HEAD_DIM, 4)
    return Pass(best, alone, (crossing(back, back.posts) * row.out + crossing(back, back.homes) * row.home) // len(plan.shares))


def busier(found: Sequence[Pass]) -> int:
    """Bytes that cross the link, from the node that sends more."""
    return max(sum(one.nbytes for one in found[:NODE]), sum(one.nbytes for one in found[NODE:]))


def crossing(plan: Plan, slots: tuple[tuple[Post, ...], ...]) -> int:
    """Rows that a rank sends to the other node."""
    away = [t for posts in slots for post in posts for t in post.transfers if t.source == plan.rank]
    nodes = [(plan.peer(t.source) // NODE, plan.peer(t.dest) // NODE, t.ranges) for t in away]
    return sum(stop - start for here, there, ranges in nodes if here != there for start, stop in ranges)


DOUBLE, FINE = (Schedule("double_ring", inner=NODE, pieces=pieces) for pieces in (4, 8))
"""The second as for the backward pass of a long sequence. Causal, in a zigzag, queries of one node see most of the other's keys,
but not the other way round: of what crosses each way, more is chunks in one direction and gradients in the other."""
HYBRID = Schedule("ring", ulysses=NODE, pieces=4, local_last=1)
"""Heads are traded inside a node, and a ring goes around the nodes."""

ATTEMPTS, LEAD = 8, 2


@pytest.mark.parametrize("compute_s", [0.04, 0.8], ids=["bound by the link", "bound by computing"])
@pytest.mark.parametrize(
    ("backward", "travels"), [(False, "kv"), (True, "kv"), (True, "q")], ids=["forward", "backward", "turned"]
)
@pytest.mark.parametrize(
    ("schedule", "causal"), [(DOUBLE, False), (FINE, True), (HYBRID, False)], ids=["double ring", "double ring, causal", "hybrid"]
)
def test_two_axes_take_as_long_as_the_slow_link_or_as_computing(
    nodes: RankPool, schedule: Schedule, causal: bool, backward: bool, travels: str, compute_s: float
) -> None:
    """Within 10 % of max(compute, bytes that cross the slow link / its speed); a ring moves twice as much over it.

    Once that is what the kernels sleep. But whatever else runs on the machine makes passes slower, also without transfers: so
    most attempts need only be within 10 % of what the same passes take without these, in the same attempt. A schedule that is in
    time in 30, 50 or 70 % of attempts passes in 16, 51 or 87 % of runs.
    """
    reached, balance = False, 0
    for _ in range(ATTEMPTS):
        speed = nodes.run(link_MBps, 2 << 20, 3)[0]
        found = nodes.run(passes, replace(schedule, travels=travels), causal, backward, compute_s, 2)
        nbytes, took, alone_s = busier(found), found[0].seconds, found[0].alone_s
        link_s, ring_s = nbytes / speed / 1e6, float("inf")
        if link_s > compute_s:
            plain = nodes.run(passes, Schedule("ring", travels=travels), causal, backward, compute_s, 1)
            assert busier(plain) == 2 * nbytes
            ring_s = plain[0].seconds
        reached |= took < min(1.1 * max(compute_s, link_s), ring_s / 1.5)
        balance += 1 if took < min(1.1 * max(alone_s, link_s), ring_s / 1.5) else -1
        if reached and balance >= LEAD:
            return
    pytest.fail(
        f"{'once' if reached else 'never'} near the bound in {ATTEMPTS} attempts, {balance} more in time than late; the last: "
        f"{took:.3f} s, link {link_s:.3f} s at {speed:.1f} MB/s, without transfers {alone_s:.3f} s, a ring {ring_s:.3f} s"
    )


def test_results_are_those_of_one_device(nodes: RankPool) -> None:
    """Real kernels; what goes from node to node has connections of its own, and these were made over the shaped link."""
    cases = [
        Case(schedule="double_ring", inner=NODE, pieces=pieces, travels=travels, mask=mask, transport="p2p")
        for mask in ("causal()", "causal(window=9)")
        for pieces in (1, 3)
        for travels in ("kv", "q")
    ]
    wrong = objections_on_ranks(nodes, cases)
    assert not wrong, "\n".join(wrong)
