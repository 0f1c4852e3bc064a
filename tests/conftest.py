"""Fixtures shared by all tests: one thread per process, and pools of real ranks that live as long as the session."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

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
def check_ptxas() -> ModuleType:
    """scripts/check_ptxas.py as a module."""
    path = Path(__file__).resolve().parent.parent / "scripts" / "check_ptxas.py"
    spec = importlib.util.spec_from_file_location("check_ptxas", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_ptxas"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


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
