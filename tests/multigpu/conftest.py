"""Pools of ranks with a GPU each. To start one takes seconds: processes, CUDA, NCCL, the kernels' first call."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from ringflash.testing import RankPool

BACKEND = "cpu:gloo,cuda:nccl"

Pools = Callable[[int], RankPool]


@pytest.fixture(scope="session")
def gpus() -> Iterator[Pools]:
    """``gpus(world)``: a pool of that many ranks. Only the last world asked for holds its GPUs, so tests of one world stand
    together (``parametrize(..., scope="module")``)."""
    pools: dict[int, RankPool] = {}

    def get(world: int) -> RankPool:
        if world not in pools:
            for pool in pools.values():
                pool.close()
            pools.clear()
            pools[world] = RankPool(world, backend=BACKEND)
        return pools[world]

    yield get
    for pool in pools.values():
        pool.close()


@pytest.fixture(scope="session")
def fresh_gpus() -> Iterator[Callable[..., RankPool]]:
    """``fresh_gpus(world)``: a pool that nobody has used, for tests that end its ranks. The next one starts meanwhile, unless
    this is the last."""
    spare: dict[int, RankPool] = {}

    def get(world: int, last: bool = False) -> RankPool:
        pool = spare.pop(world, None) or RankPool(world, backend=BACKEND)
        if not last:
            spare[world] = RankPool(world, backend=BACKEND).begin()
        return pool

    yield get
    for pool in spare.values():
        pool.kill()
