"""What contexts share, that they end with their last user, and what their transports ask of kernels."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ringflash import ContextParallel, Mask, attention
from ringflash.kernels import State, hopper, leaving, reference
from ringflash.kernels.reference import Reference
from ringflash.parallel.schedule import Schedule
from ringflash.parallel.sharding import STAGE_TOKENS
from ringflash.parallel.transport import Transport
from ringflash.parallel.transport.p2p import FAR_CTAS, P2P
from ringflash.parallel.transport.symmetric import Symmetric
from ringflash.simulated import SimulatedWorld
from ringflash.testing import RankPool

Ranks = Callable[[int], RankPool]
CPU = torch.device("cpu")


def far_groups_of_some_contexts(rank: int) -> tuple[bool, bool, list[list[int]], float]:
    """Whether two contexts of one group share their far groups, and two of different ranks; the ranks of these; what is sent."""
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    found = []
    for group in (halves[rank // 2], None, None, halves[rank // 2]):
        transport = ContextParallel(group, "zigzag", "double_ring", inner=2, transport="p2p").transport(CPU)
        assert isinstance(transport, P2P)
        found.append(transport.far)
    half, first, second, again = found
    other = ContextParallel(None, "zigzag", "double_ring", inner=2, transport="p2p", timeout_s=31.0).transport(CPU)
    assert isinstance(other, P2P) and other.far["chunks"] is not first["chunks"], "what timed out once is not used again"
    same = all(a[what] is b[what] for a, b in ((half, again), (first, second)) for what in ("chunks", "gradients"))
    apart = len({id(group) for far in (half, first) for group in far.values()}) == 4
    total = torch.ones(1)
    dist.all_reduce(total, group=again["gradients"])
    return same, apart, [dist.get_process_group_ranks(far["chunks"]) for far in (half, first)], float(total)


def test_contexts_of_the_same_ranks_share_their_far_groups(ranks: Ranks) -> None:
    for rank, (same, apart, members, total) in enumerate(ranks(4).run(far_groups_of_some_contexts)):
        assert same and apart
        assert members == [[0, 1] if rank < 2 else [2, 3], [0, 1, 2, 3]]
        assert total == 2


def schedules_over_a_mesh(rank: int, names: list[str]) -> list[Schedule | str]:
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    found: list[Schedule | str] = []
    for name in names:
        try:
            found.append(ContextParallel(mesh, "zigzag", name).plain)
        except ValueError as error:
            found.append(str(error))
    return found


def test_a_mesh_of_two_axes_says_what_is_inside(ranks: Ranks) -> None:
    names = ["double_ring", "double_ring:3", "hybrid", "ring"]
    for *found, refused in ranks(4).run(schedules_over_a_mesh, names):
        double = Schedule("double_ring", inner=2)
        assert found == [double, replace(double, pieces=3), Schedule("ring", ulysses=2)]
        assert "a 2-D mesh is for schedules" in str(refused)


def outlived(rank: int, name: str) -> bool:
    """Whether a context lives on after its last user, without the garbage collector's help."""
    handle = SimpleNamespace(buffer_ptrs=[0, 0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.distributed._symmetric_memory.empty", lambda *_, **__: torch.zeros(8))
        patch.setattr("torch.distributed._symmetric_memory.rendezvous", lambda *_: handle)
        patch.setattr("torch.cuda.synchronize", lambda _: None)
        patch.setattr("ringflash.parallel.transport.symmetric.Cuda.stream", lambda *_: None)
        patch.setattr("torch.distributed.all_reduce", lambda *_, **__: None)
        zeros: Any = torch.zeros
        patch.setattr("torch.zeros", lambda *shape, device=None, **kwargs: zeros(*shape, **kwargs))
        cp = ContextParallel(transport=name, timeout_s=60.0)
        transport = cp.transport(torch.device("cuda" if name == "symmetric" else "cpu"))
    assert isinstance(transport, Symmetric if name == "symmetric" else P2P)
    gone = weakref.ref(cp)
    gc.disable()
    try:
        del cp
        return gone() is not None
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["symmetric", "p2p"])
def test_a_context_ends_with_its_last_user(ranks: Ranks, name: str) -> None:
    assert not any(ranks(2).run(outlived, name))


def test_kernels_leave_multiprocessors_to_slow_lanes_of_nccl_only(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = SimulatedWorld(4, "zigzag", "double_ring", inner=2).plan(0, Mask.causal(), 64, 64, 2, 2)
    group: Any = object()
    monkeypatch.setattr("torch.distributed.get_rank", lambda _: 0)
    for backend, lanes in (("nccl", 1), ("cpu:gloo,cuda:nccl", 1), ("gloo", 0)):
        monkeypatch.setattr("torch.distributed.get_backend_config", lambda _, backend=backend: backend)
        far = P2P(group, 1.0, far={"chunks": group, "gradients": group})
        assert far.multiprocessors(plan) == lanes * FAR_CTAS
        assert far.multiprocessors(plan.backward()) == 2 * lanes * FAR_CTAS
        assert P2P(group, 1.0).multiprocessors(plan) == 0
    margin = leaving(hopper.KERNEL, FAR_CTAS)
    assert isinstance(margin, hopper.HopperKernel) and margin.sm_margin == FAR_CTAS
    assert leaving(hopper.KERNEL, 0) is hopper.KERNEL and leaving(reference.KERNEL, 4) is reference.KERNEL


@dataclass
class Marked(Reference):
    """The reference, which says how many multiprocessors it was asked to leave."""

    sm_margin: int = 0
    seen: list[tuple[str, int]] = field(default_factory=list)
    extras = replace(Reference.extras, sm_margin=True)

    def forward(self, *args: Any, **kwargs: Any) -> State:
        self.seen.append(("forward", self.sm_margin))
        return super().forward(*args, **kwargs)

    def backward(self, *args: Any, **kwargs: Any) -> None:
        self.seen.append(("backward", self.sm_margin))
        super().backward(*args, **kwargs)


def test_both_passes_leave_what_the_transport_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Marked()
    monkeypatch.setattr("ringflash.api.choose", lambda backend, problem: kernel)
    monkeypatch.setattr(Transport, "multiprocessors", lambda self, plan: 5 if plan.key.returns else 3)
    q, k, v = (torch.randn(1, 64, 2, 8, dtype=torch.float64).requires_grad_() for _ in range(3))
    out = SimulatedWorld(2).attention(q, k, v, mask=Mask.causal())
    assert isinstance(out, torch.Tensor)
    torch.autograd.grad(out.sum(), (q, k, v))
    assert set(kernel.seen) == {("forward", 3), ("backward", 5)}


# ---- "auto": a ring, or heads for sequence -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world", "tokens", "heads", "kv_heads", "mask", "options", "trades"),
    [
        (4, 65_536, 32, 32, Mask.causal(), {}, True),
        (2, 65_536, 32, 32, Mask.causal(), {}, True),
        (8, 131_072, 32, 32, Mask.full(), {}, True),
        (4, 65_536, 32, 8, Mask.causal(), {}, False),  # few key heads: a ring is as fast
        (4, 8_192, 32, 32, Mask.causal(), {}, False),  # short: two groups would not hide each other's exchange
        (4, 65_536, 36, 36, Mask.causal(), {}, False),  # an odd number of heads a rank
        (3, 65_536, 32, 32, Mask.causal(), {}, False),
        (4, 1_048_576, 32, 32, Mask.causal(window=4096), {}, False),  # a ring sends little
        (4, 65_536, 32, 32, Mask.causal(), {"schedule": "ring"}, False),
        (4, 65_536, 32, 32, Mask.causal(), {"memory_budget": "lean"}, False),
        (4, 65_536, 32, 32, Mask.causal(), {"ulysses": 2}, False),
        (1, 65_536, 32, 32, Mask.causal(), {}, False),
    ],
)
def test_heads_are_traded_in_training_where_that_was_faster(
    world: int, tokens: int, heads: int, kv_heads: int, mask: Mask, options: dict[str, Any], trades: bool
) -> None:
    for rank in range(world):
        there = SimulatedWorld(world, **options)
        traded = there.trading(there.plan(rank, mask, tokens, tokens, heads, kv_heads), 128, 128, 2)
        assert (traded is not None) == trades
        assert traded is None or (traded.key.rank, traded.key.schedule.ulysses, traded.key.groups) == (rank, world, 2)


def train_and_infer(rank: int) -> tuple[list[int], float]:
    """Members that trade heads in the jobs of a training call and of one without gradients, where every transport claims to be
    symmetric memory; and the largest difference to one device's results."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(P2P, "name", "symmetric")
        patch.setattr("ringflash.parallel.world.GROUP_ROWS", 64)
        cp = ContextParallel(timeout_s=60.0)
        generator = torch.Generator().manual_seed(1)
        q, k, v, dout = (torch.randn(1, 73, 8, 8, dtype=torch.float64, generator=generator) for _ in range(4))
        local = [cp.shard(x).requires_grad_() for x in (q, k, v)]
        out = attention(*local, mask=Mask.causal(), cp=cp)
        found = [out, *torch.autograd.grad(out, local, cp.shard(dout))]
        with torch.no_grad():
            found.append(attention(*local, mask=Mask.causal(), cp=cp))
    whole = [x.requires_grad_() for x in (q, k, v)]
    out = attention(*whole, mask=Mask.causal())
    expected = [out, *torch.autograd.grad(out, whole, dout), out]
    members = [job.plan.key.schedule.ulysses for job in cp.jobs.values()]
    return members, max(float((a - cp.shard(b)).detach().abs().max()) for a, b in zip(found, expected, strict=True))


def train_with_schedules_of_their_own(rank: int) -> str:
    """The error where rank 0 alone lets "auto" decide, which means the same but over symmetric memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(P2P, "name", "symmetric")
        patch.setattr("ringflash.parallel.world.GROUP_ROWS", 64)
        cp = ContextParallel(schedule="auto" if rank == 0 else Schedule("staged", rows=STAGE_TOKENS), timeout_s=60.0)
        try:
            attention(*(torch.randn(1, 19, 8, 8, requires_grad=True) for _ in range(3)), mask=Mask.causal(), cp=cp)
        except ValueError as error:
            return str(error)
    return "no error"


def test_ranks_that_would_not_all_trade_heads_are_told(ranks: Ranks) -> None:
    for text in ranks(4).run(train_with_schedules_of_their_own):
        assert "the ranks disagree on schedule over symmetric memory: rank 0: ring(ulysses=4)" in text


def transports_of_ranks_in_more_groups_than_others(rank: int) -> tuple[str, str, str]:
    """Of a ring over two hosts, and a double ring's error; and what the double ring's is where its groups are made already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RINGFLASH_HOST", "ab"[rank // 2])
        early = ContextParallel(None, "zigzag", "double_ring", inner=2, transport="p2p").transport(CPU)
        dist.new_group([0, 2])
        _, why = ContextParallel()._make_transport(torch.device("cuda"))
        again = ContextParallel(None, "zigzag", "double_ring", inner=2, transport="p2p").transport(CPU)
        assert isinstance(early, P2P) and isinstance(again, P2P)
        try:
            ContextParallel(None, "zigzag", "double_ring", inner=2, transport="p2p", timeout_s=17.0).transport(CPU)
        except ValueError as error:
            return why, str(error), str(early.far is again.far)
    return why, "no error", ""


def test_ranks_in_more_groups_than_others_do_not_wait_for_each_other() -> None:
    """torch names a group that only its members make by how many each is in."""
    with RankPool(4) as pool:
        for why, error, same in pool.run(transports_of_ranks_in_more_groups_than_others):
            assert re.search(r"no symmetric memory, rank 0 is in \d+ process groups and rank 1 in \d+", why), why
            assert "a double ring cannot make process groups of its own: rank 0 is in" in error
            assert same == "True"


def test_a_training_call_trades_heads_and_one_without_gradients_does_not(ranks: Ranks) -> None:
    for members, difference in ranks(4).run(train_and_infer):
        assert members == [4, 1]
        assert difference < 1e-12
