"""Fixtures and options shared by all tests: one thread per process, pools of real ranks that live as long as the session, a GPU
for each worker, failures as they happen."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from ringflash.testing.rank_pool import RankPool

LAST_LINES = 12
"""Of a failure, which --instant prints; all of it is in pytest's summary."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ringflash")
    group.addoption("--instant", action="store_true", help="print a failing test and its last lines at once")
    group.addoption("--one-gpu", action="store_true", help="let each worker of xdist see one GPU, all of them in turn")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # ranks and xdist workers already fill the cores
    for line in (
        "gpu: needs a CUDA device",
        "multigpu: needs at least two CUDA devices",
        "slow: minutes rather than seconds",
        "alone: measures time; `make test` runs these when nothing else runs",
    ):
        config.addinivalue_line("markers", line)
    mine = getattr(config, "workerinput", None)
    if mine is not None and "gpu" in mine:
        assert not torch.cuda.is_initialized()  # no test file has been imported yet, and CUDA looks once
        os.environ["CUDA_VISIBLE_DEVICES"] = mine["gpu"]
    if mine is None and config.getoption("--instant"):
        config.pluginmanager.register(Instant(config), "ringflash-instant")


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Of xdist, before a worker starts: which GPU it gets."""
    if node.config.getoption("--one-gpu") and (gpus := visible_gpus()):
        node.workerinput["gpu"] = gpus[int(node.gateway.id.removeprefix("gw")) % len(gpus)]


def visible_gpus() -> list[str]:
    """Names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES spells them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(n) for n in range(torch.cuda.device_count())] if given is None else [n for n in given.split(",") if n]


class Instant:
    """Prints failures as they happen: a run that is cut off has then told what it saw."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._say(f"FAILED {report.nodeid} ({report.when})", report.longreprtext)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._say(f"ERROR {report.nodeid}", report.longreprtext)

    def _say(self, what: str, text: str) -> None:
        terminal: Any = self.config.pluginmanager.get_plugin("terminalreporter")
        for line in ("", what, *text.splitlines()[-LAST_LINES:]):
            terminal.write_line(line)


@pytest.fixture(scope="session")
def cuda() -> None:
    """Skips a test where there is no CUDA device. Asked when tests run: asked where files are imported, it would start CUDA."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def hopper(cuda: None) -> None:
    """Skips a test where the CUDA device is no Hopper GPU."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")


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
