"""Drawn cases by real processes over gloo: the same judge as in the simulated world."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from ringflash import ContextParallel, Mask, attention
from ringflash.parallel.schedule import Schedule
from ringflash.testing import Case, RankPool, draw, objections_on_ranks

Ranks = Callable[[int], RankPool]

WORLDS = (1, 2, 3, 4, 8)
BATCH, BATCHES = 12, 4


def with_transport(case: Case) -> Case:
    """Every transport in turn, where the schedule allows it."""
    whole_chunks = case.schedule == "allgather" and case.ulysses == 1 and case.pieces < 2
    transports = ("auto", "p2p", "alltoall", "allgather" if whole_chunks else "alltoall")
    return replace(case, transport=transports[case.seed % len(transports)])


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("batch", range(BATCHES))
def test_drawn(ranks: Ranks, world: int, batch: int) -> None:
    """240 cases in all."""
    first = 100_000 + 1_000 * world + batch * BATCH
    cases = [with_transport(draw(seed, worlds=(world,))) for seed in range(first, first + BATCH)]
    wrong = objections_on_ranks(ranks(world), cases)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("transport", ["p2p", "alltoall"])
def test_several_messages_to_one_peer(ranks: Ranks, transport: str) -> None:
    """Queries, keys and values of a head exchange; chunks in several ranges."""
    checkered = 'blocks(["1010", "0101", "1010", "0101"], 5)'
    cases = [
        Case(schedule="hybrid", ulysses=2, transport=transport, heads=4),
        Case(schedule="ulysses", transport=transport, heads=6, kv_heads=2, sinks=True),
        Case(schedule="ulysses", transport=transport, heads=8, kv_heads=8, head_groups=2, q_len=35, k_len=35),
        Case(schedule="hybrid", ulysses=2, transport=transport, heads=8, kv_heads=4, head_groups=2, dlse=False),
        Case(mask=checkered, q_len=20, k_len=20, max_gap=0, layout="contiguous", transport=transport, world=4),
        Case(mask=checkered, q_len=20, k_len=20, max_gap=0, layout="zigzag", schedule="staged:2", transport=transport),
    ]
    wrong = objections_on_ranks(ranks(4), cases)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("transport", ["p2p", "alltoall", "allgather"])
def test_every_transport_moves_every_mask(ranks: Ranks, transport: str) -> None:
    masks = ("full()", "causal()", "causal(window=9)", "documents([0, 9, 23])", "dilated(3)", 'blocks(["10", "01"], 16)')
    cases = [Case(mask=mask, schedule="allgather", transport=transport, layout="zigzag") for mask in masks]
    wrong = objections_on_ranks(ranks(4), cases)
    assert not wrong, "\n".join(wrong)


def in_half(rank: int) -> float:
    """A double ring over half of the ranks: the largest difference to one device's output."""
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    cp = ContextParallel(halves[rank // 2], "zigzag", "double_ring", inner=2, transport="p2p")
    generator = torch.Generator().manual_seed(rank // 2)
    q, k, v = (torch.randn(1, 24, 2, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    out = attention(*(cp.shard(x) for x in (q, k, v)), mask=Mask.causal(), cp=cp)
    return float((cp.unshard(out) - attention(q, k, v, mask=Mask.causal())).abs().max())


def test_groups_of_some_ranks(ranks: Ranks) -> None:
    assert max(ranks(4).run(in_half)) < 1e-12


def pieces_by_all_gather(rank: int) -> str:
    try:
        ContextParallel(schedule=Schedule("allgather", pieces=3), transport="allgather")
    except ValueError as error:
        return str(error)
    return "no error"


def test_all_gather_refuses_pieces(ranks: Ranks) -> None:
    assert all("whole chunks, not 3 pieces" in said for said in ranks(2).run(pieces_by_all_gather))
