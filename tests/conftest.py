"""Fixtures shared by all tests: one thread per process, and pools of real ranks that live as long as the session."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from ringflash.testing.rank_pool import RankPool


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # ranks and xdist workers already fill the cores
    for line in (
        "gpu: needs a CUDA device",
        "multigpu: needs at least two CUDA devices",
        "slow: minutes rather than seconds",
    ):
        config.addinivalue_line("markers", line)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], RankPool]]:
    """``ranks(world)``: the session's pool of that many gloo ranks."""
    pools: dict[int, RankPool] = {}

    def get(world: int) -> RankPool:
        if world not in pools:
            pools[world] = RankPool(world)
        return pools[world]

    yield get
    for pool in pools.values():
        pool.close()
