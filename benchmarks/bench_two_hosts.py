"""Four GPUs of one host as two hosts of two: what a double ring takes, and against what it cannot beat.

    python -m benchmarks.bench_two_hosts [--link-gbit 8] [tokens ...]

NCCL is told that ranks 0, 1 and ranks 2, 3 are on different hosts (NCCL_HOSTID), so that what they send each other goes through
sockets: on loopback, whose speed depends on how many lanes and directions are busy, or with --link-gbit (as root, with iproute2)
between two network namespaces, over a link that lets so many Gbit/s through each way. No pass can be shorter than its kernels, or
than the bytes that cross between the hosts over the speed that was measured for them. Causal, zigzag, batch 1, bf16, 32 query
heads of 128, and 8 or 32 key heads. Inside a host, chunks are pulled through symmetric memory (transport "domains") or sent by
NCCL ("p2p"); they travel in as many pieces as the schedule takes by itself, or in 16, which is for links of some 8 Gbit/s; beside
the double ring stands a ring. Times are of the slowest rank, medians and the range of all readings, in ms; all are read in turn.

With two GPUs both hosts' ranks share them, and so do the kernels that no pass can be faster than. Meant for --link-gbit: there
the link is what is slow. Ranks of a GPU take turns of some ms, and what NCCL sends from one GPU to another only moves while both
ends have theirs: with "p2p" a pass then now and then takes half as long again. Copy engines do not care.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

import ringflash as rf
from ringflash.parallel.plan import Plan, Post, row_bytes
from ringflash.parallel.schedule import Schedule
from ringflash.parallel.transport import Label, Message
from ringflash.parallel.transport.p2p import P2P, far_groups
from ringflash.testing import RankPool, two_nodes

WORLD, NODE = 4, 2
HEADS, HEAD_DIM = 32, 128
READINGS, TIMEOUT_S = 7, 60.0
MB = 1 << 20

_group: dist.ProcessGroup | None = None


WAYS = {
    "double ring, domains": (Schedule("double_ring", inner=NODE), "domains"),
    "of 16 pieces": (Schedule("double_ring", inner=NODE, pieces=16), "domains"),
    "double ring, p2p": (Schedule("double_ring", inner=NODE), "p2p"),
    "ring, domains": (Schedule("ring"), "domains"),
}


@dataclass(frozen=True)
class Reading:
    """One pass: of the kernels alone, of the bytes that a double ring sends between hosts (one direction); and all readings of
    each of WAYS; ms."""

    name: str
    compute_ms: float
    link_ms: float
    ways_ms: dict[str, list[float]]

    def __str__(self) -> str:
        least = max(self.compute_ms, self.link_ms)
        cells = [self.name, f"{self.compute_ms:.1f}", f"{self.link_ms:.1f}"]
        for times in self.ways_ms.values():
            middle = statistics.median(times)
            cells.append(f"{middle / least:.2f} ({middle:.1f}: {min(times):.1f} to {max(times):.1f})")
        return f"| {' | '.join(cells)} |"


HEAD = (
    f"| work | kernels | bytes / speed | {' | '.join(f'{way}: over the larger (ms)' for way in WAYS)} |\n"
    f"|{'---|' * (3 + len(WAYS))}"
)


def emulate_hosts(rank: int, namespaces: Sequence[str] = ()) -> None:
    """Before NCCL starts in this process. namespaces: of the two hosts; none: all on loopback."""
    global _group
    if namespaces:
        two_nodes.enter(namespaces[rank // NODE])
    interface = two_nodes.INTERFACE if namespaces else "lo"
    os.environ.update(NCCL_HOSTID=f"host{rank // NODE}", NCCL_SOCKET_IFNAME=interface, NCCL_IB_DISABLE="1")
    torch.cuda.set_device(rank % torch.cuda.device_count())
    _group = dist.new_group(backend="nccl")
    dist.all_reduce(torch.zeros(1, device="cuda"), group=_group)  # NCCL sets up its rings in the first collective


def _whole() -> dist.ProcessGroup:
    assert _group is not None
    return _group


def milliseconds(work: Callable[[], object]) -> float:
    """Of the slowest rank, from a moment at which all are ready."""
    dist.all_reduce(torch.zeros(1, device="cuda"), group=_group)
    torch.cuda.synchronize()
    dist.barrier()  # over gloo: the GPUs are idle
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    stop.record()
    torch.cuda.synchronize()
    found = torch.tensor(start.elapsed_time(stop))
    dist.all_reduce(found, dist.ReduceOp.MAX)  # over gloo
    return found.item()


def link_GBps(rank: int, nbytes: int = 128 * MB) -> tuple[float, float]:  # noqa: N802 (a unit)
    """What crosses between the hosts in one direction, while both directions of both pairs are busy: by one lane for chunks, as
    in a forward pass, and with one for gradients beside it."""
    other = (rank + NODE) % WORLD
    transport = P2P(_whole(), TIMEOUT_S, far=far_groups(_whole(), torch.device("cuda", torch.cuda.current_device()), TIMEOUT_S))
    sent, received = torch.zeros(nbytes, dtype=torch.uint8, device="cuda"), torch.zeros(nbytes, dtype=torch.uint8, device="cuda")

    def exchange(lanes: Sequence[str]) -> None:
        parts = zip(lanes, sent.chunk(len(lanes)), received.chunk(len(lanes)), strict=True)
        posts = [transport.post(Label(lane, far=True), [Message(other, a)], [Message(other, b)]) for lane, a, b in parts]
        for post in posts:
            post.wait()

    found = []
    for lanes in (("chunks",), ("chunks", "gradients")):
        exchange(lanes)
        found.append(NODE * nbytes / statistics.median(milliseconds(partial(exchange, lanes)) for _ in range(READINGS)) / 1e6)
    return found[0], found[1]


def crossing(plan: Plan, slots: Sequence[Sequence[Post]]) -> int:
    """Rows that leave a rank for the other host."""
    sent = [t for posts in slots for post in posts for t in post.transfers if t.source == plan.rank]
    return sum(b - a for t in sent if t.source // NODE != t.dest // NODE for a, b in t.ranges)


def link_bytes(cp: rf.ContextParallel, seqlen: int, kv_heads: int) -> tuple[int, int]:
    """Bytes that leave one host in a forward and in a backward pass: of the host that sends more. Early keys are seen by later
    queries and not the other way round, so the two directions differ by up to 2."""
    forward, backward = [], []
    for host in range(WORLD // NODE):
        plans = [cp.plan(host * NODE + i, rf.Mask.causal(), seqlen, seqlen, HEADS, kv_heads) for i in range(NODE)]
        forward.append(sum(crossing(p, p.posts) for p in plans) * kv_heads * 2 * HEAD_DIM * 2)
        nbytes = 0
        for back in (plan.backward() for plan in plans):
            row = row_bytes(back, back.key.travels, HEAD_DIM, HEAD_DIM, 2)
            nbytes += crossing(back, back.posts) * row.out + crossing(back, back.homes) * row.home
        backward.append(nbytes)
    return max(forward), max(backward)


def measure(rank: int, seqlen: int, kv_heads: int, GBps: tuple[float, float]) -> list[Reading]:
    mask = rf.Mask.causal()
    contexts = {
        name: rf.ContextParallel(_group, "zigzag", schedule, transport=transport, timeout_s=TIMEOUT_S)
        for name, (schedule, transport) in WAYS.items()
    }

    def passes(cp: rf.ContextParallel | None, tokens: int) -> dict[str, Callable[[], object]]:
        q, k, v = (torch.randn(1, tokens, h, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for h in (HEADS, kv_heads, kv_heads))
        leaves: list[Tensor] = [x.requires_grad_() for x in (q, k, v)]
        out = rf.attention(*leaves, mask=mask, cp=cp)
        dout = torch.randn_like(out)
        return {
            "forward": lambda: rf.attention(*leaves, mask=mask, cp=cp),
            "backward": lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True),
        }

    # Half of the tokens on one GPU are a quarter of the work.
    works = {"compute": passes(None, seqlen // 2), **{name: passes(cp, seqlen // WORLD) for name, cp in contexts.items()}}
    nbytes = dict(zip(("forward", "backward"), link_bytes(next(iter(contexts.values())), seqlen, kv_heads), strict=True))
    found = []
    for name, speed in zip(("forward", "backward"), GBps, strict=True):
        for work in works.values():
            work[name]()
        times: dict[str, list[float]] = {who: [] for who in works}
        for _ in range(READINGS):
            for who, work in works.items():
                times[who].append(milliseconds(work[name]))
        compute_ms = statistics.median(times.pop("compute"))
        found.append(Reading(f"{seqlen // 1024}k, {kv_heads} key heads, {name}", compute_ms, nbytes[name] / speed / 1e6, times))
    return found


def main(lengths: Sequence[int], link_gbit: float | None) -> None:
    if torch.cuda.device_count() < NODE:
        sys.exit(f"needs {WORLD} GPUs, or {NODE} that are shared; found {torch.cuda.device_count()}")
    if link_gbit is not None and (why := two_nodes.missing()):
        sys.exit(f"--link-gbit {why}")
    link: AbstractContextManager[Sequence[str]] = nullcontext(())
    if link_gbit is not None:
        link = two_nodes.shaped_link(round(link_gbit * 1e9))
    with link as namespaces, RankPool(WORLD) as pool:
        pool.run(emulate_hosts, namespaces)
        GBps = pool.run(link_GBps)[0]
        print(f"between the hosts, each way, both busy: {GBps[0]:.2f} GB/s by one lane, {GBps[1]:.2f} by two\n{HEAD}", flush=True)
        for seqlen in lengths:
            for kv_heads in (8, 32):
                print(*pool.run(measure, seqlen, kv_heads, GBps, timeout_s=120.0)[0], sep="\n", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokens", nargs="*", type=int, default=[131_072, 262_144])
    parser.add_argument("--link-gbit", type=float, help="speed of the link between the hosts; default: that of loopback")
    options = parser.parse_args()
    main(options.tokens, options.link_gbit)
