"""The pool itself: values by rank, failures with their traceback, deaths and stalls that end, and recovery after each."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from ringflash.testing.rank_pool import RankError, RankPool

Ranks = Callable[[int], RankPool]


def pass_on(rank: int, n: int) -> float:
    """Sends the own rank to the next one and returns what the previous one sent."""
    world = dist.get_world_size()
    mine, theirs = torch.full((n,), float(rank)), torch.empty(n)
    ops = [dist.P2POp(dist.isend, mine, (rank + 1) % world), dist.P2POp(dist.irecv, theirs, (rank - 1) % world)]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    return float(theirs[-1])


def raise_on_one(rank: int, culprit: int) -> None:
    if rank == culprit:
        raise ValueError(f"wrong on rank {rank}")
    dist.barrier()


def exit_on_one(rank: int, culprit: int) -> None:
    if rank == culprit:
        os._exit(7)
    dist.barrier()


def sleep_on_one(rank: int, culprit: int) -> int:
    if rank == culprit:
        time.sleep(1000)
    return rank


def tensor_of(rank: int, n: int) -> torch.Tensor:
    return torch.arange(n) + rank


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_values_come_back_by_rank(ranks: Ranks, world: int) -> None:
    pool = ranks(world)
    if world > 1:
        for n in (1, 1000):
            assert pool.run(pass_on, n) == [(r - 1) % world for r in range(world)]
    for rank, value in enumerate(pool.run(tensor_of, 5)):
        assert torch.equal(value, torch.arange(5) + rank)


def test_an_error_carries_the_ranks_traceback_and_the_pool_recovers(ranks: Ranks) -> None:
    pool = ranks(4)
    with pytest.raises(RankError, match=r"rank 2: Traceback(.|\n)*ValueError: wrong on rank 2"):
        pool.run(raise_on_one, 2)
    assert pool.run(pass_on, 3) == [3, 0, 1, 2]


def test_a_dead_rank_is_named_with_its_exit_code(ranks: Ranks) -> None:
    pool = ranks(4)
    outcomes = pool.outcomes(exit_on_one, 1)
    assert "exit code 7" in str(outcomes[1].error)
    assert all(o.error is not None for o in outcomes), "a barrier without one of its ranks cannot succeed"
    assert pool.run(pass_on, 3) == [3, 0, 1, 2]


def test_a_stall_ends_in_time_and_the_others_values_are_kept(ranks: Ranks) -> None:
    pool = ranks(2)
    outcomes = pool.outcomes(sleep_on_one, 0, timeout_s=1.0)
    assert not outcomes[0].answered and "no answer within 1 s" in str(outcomes[0].error)
    assert outcomes[1].answered and outcomes[1].value == 1
    assert pool.run(pass_on, 3) == [1, 0]


def test_work_without_a_name_is_refused_before_anything_starts() -> None:
    pool = RankPool(2)
    with pytest.raises(TypeError, match="module's own function"):
        pool.run(lambda rank: rank)
    assert not pool._processes


def test_a_pool_needs_ranks() -> None:
    with pytest.raises(ValueError, match="world=0"):
        RankPool(0)
