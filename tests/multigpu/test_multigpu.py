"""Several GPUs: every schedule, transport and mask over NCCL (and symmetric memory), against the float64 oracle on the CPU.

Ranks are processes of a pool, one GPU each; no torchrun.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store

from ringflash import ContextParallel, Mask, attention
from ringflash.parallel.memory import Frugality
from ringflash.parallel.plan import Plan
from ringflash.testing import Case, RankPool, Results, draw, gpu_places, objections_on_ranks
from ringflash.testing.rank_pool import RankError
from ringflash.testing.runs import context_of, device_of, run_on_rank

PLACES = gpu_places()

pytestmark = [pytest.mark.multigpu, pytest.mark.skipif(PLACES < 2, reason="needs two GPUs, or one for several ranks")]

WORLDS = [n for n in (2, 4, 8) if n <= PLACES] or [2]

Pools = Callable[..., RankPool]

MASKS = (
    "full()",
    "causal()",
    "causal(window=257)",
    "window(200, 90)",
    "documents([0, 300, 1, 700, 23])",
    "prefix(300)",
    "chunked(300)",
    "dilated(3)",
    'blocks(["10000000", "11000000", "01100000", "00110000", "10011000", "10001100", "10000110", "10000011"], 128)',
)

SCHEDULES = (
    {"schedule": "ring"},
    {"schedule": "allgather"},
    {"schedule": "staged:2"},
    {"schedule": "ulysses"},
    {"schedule": "ulysses:2", "heads": 16, "kv_heads": 4},
    {"schedule": "double_ring", "inner": 2},
    {"schedule": "hybrid", "ulysses": 2},
    {"schedule": "hybrid", "ulysses": 2, "head_groups": 2},
)


def gpu_case(world: int, **changes: object) -> Case:
    """Sizes that a GPU kernel takes: 1,024 tokens, GQA, head_dim 64, bfloat16."""
    case = Case(
        world=world, q_len=1024, k_len=1024, heads=8, kv_heads=2, head_dim=64, head_dim_v=64, dtype="bfloat16", dlse=False
    )
    return replace(case, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s["schedule"])
@pytest.mark.parametrize("world", WORLDS, scope="module")
def test_every_schedule_computes_every_mask(gpus: Pools, world: int, schedule: dict[str, object]) -> None:
    if schedule["schedule"] == "hybrid" and world == 2:
        schedule = {**schedule, "schedule": "ulysses"}  # two ranks have no proper part
    cases = [gpu_case(world, mask=mask, **schedule) for mask in MASKS]
    wrong = objections_on_ranks(gpus(world), cases, device="cuda")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("transport", ["auto", "p2p", "alltoall", "allgather"])
@pytest.mark.parametrize("world", WORLDS, scope="module")
def test_every_transport(gpus: Pools, world: int, transport: str) -> None:
    cases = [
        gpu_case(world, mask=mask, schedule="allgather", transport=transport, layout=layout, dlse=True, sinks=True)
        for mask in ("causal()", "documents([0, 300, 1, 700, 23])")
        for layout in ("zigzag", "contiguous", "striped")
    ]
    wrong = objections_on_ranks(gpus(world), cases, device="cuda")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("transport", ["auto", "p2p", "alltoall"])
@pytest.mark.parametrize("world", WORLDS, scope="module")
def test_heads_in_groups_on_every_transport_that_trades_them(gpus: Pools, world: int, transport: str) -> None:
    shape = {"heads": 4 * world, "kv_heads": 4, "transport": transport}
    cases = [
        gpu_case(world, mask=mask, schedule=f"ulysses:{groups}", dlse=more, sinks=more, batch=1 + more, **shape)
        for mask in ("causal()", "documents([0, 300, 1, 700, 23])", "dilated(3)")
        for groups, more in ((1, True), (2, False), (2, True), (4, False), (4, True))
    ]
    cases += [gpu_case(world, q_len=rows, k_len=rows, schedule="ulysses:4", **shape) for rows in (1, 257)]  # ranks without rows
    wrong = objections_on_ranks(gpus(world), cases, device="cuda")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("batch", range(6))
@pytest.mark.parametrize("world", WORLDS, scope="module")
def test_drawn(gpus: Pools, world: int, batch: int) -> None:
    """Small cases with every option drawn; float64 among them, so the way things travel is held to 1e-12."""
    first = 200_000 + world * 100 + 10 * batch
    for seed in range(first, first + 10):  # one by one: whatever happens, the case is named
        case = draw(seed, worlds=(world,))
        try:
            wrong = objections_on_ranks(gpus(world), [case], device="cuda", timeout_s=60.0)
        except RankError as error:
            pytest.fail(f"{case!r}: {error}")
        assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("world", WORLDS[:1], scope="module")
def test_head_dims(gpus: Pools, world: int, head_dim: int, dtype: str) -> None:
    cases = [
        replace(gpu_case(world, mask=mask, head_dim=head_dim, head_dim_v=head_dim, softcap=softcap), dtype=dtype)
        for mask in ("causal()", "causal(window=257)")
        for softcap in (0.0, 10.0)
    ]
    wrong = objections_on_ranks(gpus(world), cases, device="cuda")
    assert not wrong, "\n".join(wrong)


class Quarters(ContextParallel):
    """A context whose budget may choose the stages only: heads go in four groups, one after the other."""

    def frugalities(self, plan: Plan) -> tuple[Frugality, ...]:
        return tuple(choice for choice in super().frugalities(plan) if choice.groups == 4)


def run_lean(rank: int, cases: Sequence[Case], device: str) -> list[tuple[Results, Tensor, Tensor]]:
    """``run_all_on_rank`` in four groups of heads."""
    found = []
    for case in cases:
        cp = context_of(case, Quarters, memory_budget="lean")
        found.append(run_on_rank(case, device_of(device), cp))
        assert [job.groups for job in cp.jobs.values()] == [4]
    return found


@pytest.mark.parametrize("transport", ["auto", "p2p"])
@pytest.mark.parametrize("world", WORLDS, scope="module")
def test_lean_in_four_groups_of_heads(gpus: Pools, world: int, transport: str) -> None:
    cases = [
        gpu_case(world, mask=mask, schedule=schedule, transport=transport, kv_heads=4, dlse=more, sinks=more)
        for mask in ("causal()", "causal(window=257)", "documents([0, 300, 1, 700, 23])", "dilated(3)")
        for schedule, more in (("auto", False), ("ring", True))
    ]
    wrong = objections_on_ranks(gpus(world), cases, device="cuda", work=run_lean)
    assert not wrong, "\n".join(wrong)


def repeat(rank: int, transport: str, schedule: str) -> bool:
    """Whether a deterministic pass gives the same bits every time."""
    cp = ContextParallel(schedule=schedule, transport=transport)
    q, k, v = (cp.shard(torch.randn(1, 2048, h, 64, device="cuda", dtype=torch.bfloat16)).requires_grad_() for h in (32, 4, 4))
    dout = torch.randn_like(q)
    runs = []
    for _ in range(5):
        out = attention(q, k, v, mask=Mask.causal(), cp=cp, deterministic=True)
        runs.append((out, *torch.autograd.grad(out, (q, k, v), dout)))
    return all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("transport", ["auto", "p2p"])
@pytest.mark.parametrize("schedule", ["auto", "ulysses:4"])  # of whose groups ranks share the one key head
@pytest.mark.parametrize("world", WORLDS[-1:], scope="module")
def test_deterministic_means_the_same_bits(gpus: Pools, world: int, transport: str, schedule: str) -> None:
    assert all(gpus(world).run(repeat, transport, schedule))


TIMEOUT_S = 5.0


def stall(rank: int) -> str:
    """The error of a rank whose peer sleeps; rank 1 sleeps until the others have given up."""
    cp = ContextParallel(transport="p2p", timeout_s=TIMEOUT_S)
    q, k, v = (cp.shard(torch.randn(1, 512, 4, 64, device="cuda", dtype=torch.bfloat16)) for _ in range(3))
    attention(q, k, v, cp=cp)
    torch.cuda.synchronize()
    if rank == 1:
        _get_default_store().wait(["rank 0 gave up"], timedelta(seconds=45))
        return "slept"
    try:
        for _ in range(1000):
            attention(q, k, v, cp=cp)
            torch.cuda.synchronize()
    except Exception as error:
        _get_default_store().set(f"rank {rank} gave up", "")
        return str(error)
    return "no error"


def test_a_stalled_gpu_rank_ends_in_an_error_and_not_in_a_hang(fresh_gpus: Pools) -> None:
    """In the error of the call or, where the driver lets no thread go on, in the end of the process."""
    with fresh_gpus(2, last=True) as pool:
        outcomes = pool.outcomes(stall, timeout_s=50.0)
        pool.kill()
    if outcomes[0].error is None:
        assert re.match(r"rank 0, .*step .*: .*rank 1\b", outcomes[0].value), outcomes[0].value
    else:
        assert "exit code 70" in outcomes[0].error, outcomes[0].error
