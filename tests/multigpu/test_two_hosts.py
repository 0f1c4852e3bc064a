"""Several GPUs of one host that NCCL takes for those of two (NCCL_HOSTID): a double ring over them, against the same formula.

Four ranks. On fewer GPUs both hosts' ranks share them: NCCL takes two ranks on one GPU where they are on different hosts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from ringflash import ContextParallel, Mask, attention
from ringflash.parallel.schedule import Schedule
from ringflash.testing import RankPool

GPUS = torch.cuda.device_count()

pytestmark = [pytest.mark.multigpu, pytest.mark.skipif(GPUS < 2, reason="needs two GPUs, or four, as two hosts of two")]

WORLD, NODE = 4, 2

_group: dist.ProcessGroup | None = None


def emulate_hosts(rank: int) -> None:
    """Before NCCL starts in this process: ranks in pairs on a host each, and sockets on loopback between these."""
    os.environ.update(NCCL_HOSTID=f"host{rank // NODE}", NCCL_SOCKET_IFNAME="lo", NCCL_IB_DISABLE="1")
    torch.cuda.set_device(rank % GPUS)


def group() -> dist.ProcessGroup:
    """All ranks, over NCCL; made in the first call."""
    global _group
    if _group is None:
        _group = dist.new_group(backend="nccl")
    assert _group is not None
    return _group


@pytest.fixture(scope="module")
def hosts() -> Iterator[RankPool]:
    with RankPool(WORLD) as pool:  # joined over gloo, so that NCCL has not looked around yet
        pool.run(emulate_hosts)
        yield pool


def gradients(cp: ContextParallel | None, mask: Mask, heads: tuple[int, int], seqlen: int) -> list[torch.Tensor]:
    """out, dq, dk, dv of the whole sequence, float64, by the reference kernel."""
    generator = torch.Generator("cuda").manual_seed(seqlen)
    q, k, v, dout = (
        torch.randn(1, seqlen, h, 32, device="cuda", dtype=torch.float64, generator=generator)
        for h in (heads[0], *heads[1:] * 2, heads[0])
    )
    q, k, v, dout = (x if cp is None else cp.shard(x) for x in (q, k, v, dout))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, mask=mask, cp=cp, backend="reference")
    found = [out.detach(), *torch.autograd.grad(out, leaves, dout)]
    return found if cp is None else [cp.unshard(x) for x in found]


def differences(rank: int, schedule: Schedule, layout: str, mask: Mask, heads: tuple[int, int]) -> float:
    """The largest difference to one device's results."""
    cp = ContextParallel(group(), layout, schedule)
    found, expected = gradients(cp, mask, heads, 251), gradients(None, mask, heads, 251)
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("travels", ["kv", "q"])
@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize(
    "mask", [Mask.causal(), Mask.causal(window=70), Mask.documents([60, 191])], ids=["causal", "window", "documents"]
)
def test_a_double_ring_over_two_hosts_is_exact(hosts: RankPool, mask: Mask, pieces: int, travels: str) -> None:
    schedule = Schedule("double_ring", inner=NODE, pieces=pieces, travels=travels, local_last=8)
    for layout, heads in (("zigzag", (4, 2)), ("contiguous", (2, 2))):
        assert max(hosts.run(differences, schedule, layout, mask, heads)) < 1e-11


def chosen(rank: int) -> str:
    cp = ContextParallel(group())
    return cp.transport(torch.device("cuda", torch.cuda.current_device())).name


def test_auto_does_not_share_memory_between_hosts(hosts: RankPool) -> None:
    assert hosts.run(chosen) == ["p2p"] * WORLD


def bits(rank: int) -> bool:
    """Whether deterministic passes repeat bitwise, gradients over the slow lane included."""
    cp = ContextParallel(group(), "zigzag", Schedule("double_ring", inner=NODE, pieces=2))
    q, k, v = (cp.shard(torch.randn(1, 2048, h, 64, device="cuda", dtype=torch.bfloat16)).requires_grad_() for h in (8, 2, 2))
    runs = []
    for _ in range(4):
        out = attention(q, k, v, mask=Mask.causal(), cp=cp, deterministic=True)
        runs.append((out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))))
    return all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_deterministic_over_two_hosts(hosts: RankPool) -> None:
    assert all(hosts.run(bits))
