"""What `make gpu` is made of, without a GPU: its parts, a GPU for each worker, failures as they happen, pools that start ahead,
the formula head by head."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ringflash.testing import Case, Judge, RankPool, make_inputs, oracle, visibility

ROOT = Path(__file__).resolve().parent.parent

STUB = """\
#!/bin/sh
if [ "$1" = -c ]; then echo {gpus}; exit; fi
echo "$(basename "$0") $*" >> {log}
case "$*" in *"{broken}"*) exit 1;; esac
"""


def make_gpu(folder: Path, gpus: int, broken: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """`make gpu` with commands that only say that they were called; those with ``broken`` among their arguments fail."""
    (folder / "bin").mkdir()
    log = folder / "log"
    log.touch()
    for name in ("python", "ringflash"):
        stub = folder / "bin" / name
        stub.write_text(STUB.format(gpus=gpus, log=log, broken=broken))
        stub.chmod(0o755)
    command = ["make", "gpu", f"VENV={folder}", "-o", f"{folder}/.dev"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    return done, log.read_text().splitlines()


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("broken", "name"),
    [("-m gpu", "tests of one GPU"), ("-m multigpu", "tests of several GPUs"), ("check", "ringflash check"), ("nothing", None)],
)
def test_all_parts_run_whichever_fails(broken: str, name: str | None, tmp_path: Path) -> None:
    done, calls = make_gpu(tmp_path, 4, broken)
    assert len(calls) == 3
    assert calls[0].startswith("python -m pytest -m gpu --instant --one-gpu -n 24 tests/gpu/")
    assert calls[1].startswith("python -m pytest -m multigpu --instant tests/multigpu/")
    assert "tests/gpu/test_hopper_forward.py" in calls[0] and "tests/multigpu/test_multigpu.py" in calls[1]
    assert "tests/test_train.py" in calls[1] and all("tests/test_ops.py" in call for call in calls[:2])
    assert calls[2] == "ringflash check --device cuda --world 4"
    assert (done.returncode == 0) == (name is None)
    assert done.stderr.splitlines()[:1] == ([] if name is None else [f"failed: {name}"])


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_one_gpu_is_enough_for_the_first_part_and_none_is_an_error(tmp_path: Path) -> None:
    for gpus in (0, 1):
        (tmp_path / str(gpus)).mkdir()
    assert len(make_gpu(tmp_path / "1", 1, "nothing")[1]) == 1
    done, calls = make_gpu(tmp_path / "0", 0, "nothing")
    assert done.returncode != 0 and not calls and "torch sees none" in done.stderr


@pytest.fixture
def conftest() -> Any:
    """tests/conftest.py, once more."""
    spec = importlib.util.spec_from_file_location("conftest_again", ROOT / "tests" / "conftest.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Config(SimpleNamespace):
    """As much of pytest's as the hooks look at."""

    def getoption(self, name: str) -> bool:
        return name in self.options

    def addinivalue_line(self, name: str, line: str) -> None:
        pass


def test_every_worker_sees_one_gpu_in_turn(conftest: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-7")
    seen = []
    for name in ("gw0", "gw1", "gw2", "gw11"):
        node = SimpleNamespace(config=Config(options=["--one-gpu"]), gateway=SimpleNamespace(id=name), workerinput={})
        conftest.pytest_configure_node(node)
        with pytest.MonkeyPatch.context() as worker:
            worker.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-7")
            conftest.pytest_configure(Config(options=["--one-gpu"], workerinput=node.workerinput))
            seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
    assert seen == ["5", "GPU-7", "5", "GPU-7"]
    node = SimpleNamespace(config=Config(options=[]), gateway=SimpleNamespace(id="gw0"), workerinput={})
    conftest.pytest_configure_node(node)
    assert not node.workerinput, "tests of several GPUs want them all"


def test_a_failure_is_said_at_once_with_its_last_lines(conftest: Any) -> None:
    said: list[str] = []
    terminal = SimpleNamespace(write_line=said.append)
    instant = conftest.Instant(SimpleNamespace(pluginmanager=SimpleNamespace(get_plugin=lambda name: terminal)))
    for failed in (False, True):
        text = "\n".join(f"line {n}" for n in range(100))
        instant.pytest_runtest_logreport(SimpleNamespace(failed=failed, nodeid="a.py::b", when="call", longreprtext=text))
        assert bool(said) == failed
    assert said[:2] == ["", "FAILED a.py::b (call)"] and said[-1] == "line 99" and len(said) == 2 + conftest.LAST_LINES


def rank_of(rank: int) -> int:
    return rank


def test_a_pool_that_was_begun_serves_and_one_that_nobody_asked_ends() -> None:
    with RankPool(2).begin() as pool:
        pids = [process.pid for process in pool._processes]
        assert pool.run(rank_of) == [0, 1]
        assert [process.pid for process in pool.begin()._processes] == pids
    unused = RankPool(2).begin()
    processes = list(unused._processes)
    unused.close()
    for process in processes:
        with pytest.raises(ValueError, match="closed"):
            process.is_alive()


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_key_heads_one_by_one_are_judged_as_all_at_once(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("causal(window=9)", q_len=40, k_len=40, batch=2, heads=6, kv_heads=3, sinks=True, softcap=2.0, dtype=dtype)
    visible, judges = visibility(case.build_mask(), 40, 40), []
    for scores in (0, 1 << 40):
        monkeypatch.setattr(oracle, "SCORES", scores)
        assert len(oracle.by_heads(make_inputs(case))) == (1 if scores else 3)
        judges.append(Judge(make_inputs(case), visible, softcap=case.softcap))
    apart, whole = judges
    for name, x in whole.oracle.items():
        torch.testing.assert_close(getattr(apart.oracle, name), x, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(apart._allowed[name], whole._allowed[name])
        assert apart._allowed_norm[name] == pytest.approx(whole._allowed_norm[name])
