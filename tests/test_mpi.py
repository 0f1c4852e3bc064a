"""Ranks started by mpirun or srun: their variables, bootstrap with and without mpi4py, the real thing where MPI is installed."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from ringflash.launch import mpi, world

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """An environment without a launcher, restored afterwards even where the code under test sets variables itself."""
    before = dict(os.environ)
    for name in list(os.environ):
        if name in RANK_VARIABLES or name.startswith(("OMPI_", "PMI_", "PMIX_", "SLURM_")):
            monkeypatch.delenv(name)
    yield monkeypatch
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"RANK": "0", "WORLD_SIZE": "4"}, "torchrun"),
        ({"OMPI_COMM_WORLD_RANK": "1"}, "mpi"),
        ({"PMI_RANK": "1"}, "mpi"),
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8"}, "slurm"),
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "PMI_RANK": "3"}, "slurm"),  # srun --mpi=pmi2
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "OMPI_COMM_WORLD_RANK": "5"}, "mpi"),  # mpirun's daemons
        ({"SLURM_PROCID": "0"}, None),  # a batch script is no task of a step
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, None),  # an interactive shell
    ],
)
def test_launcher(environment: dict[str, str], expected: str | None) -> None:
    assert world.launcher(environment) == expected


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (
            {
                "OMPI_COMM_WORLD_RANK": "5",
                "OMPI_COMM_WORLD_SIZE": "8",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
            },
            {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
        ),
        (
            {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"},
            {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"},
        ),
        ({"PMIX_RANK": "0"}, {"RANK": "0"}),
    ],
)
def test_variables_of_mpi(environment: dict[str, str], expected: dict[str, str]) -> None:
    assert mpi.environment_of(environment) == expected


def test_variables_of_slurm() -> None:
    step = {
        "SLURM_PROCID": "6",
        "SLURM_LOCALID": "2",
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
        "SLURM_STEP_NODELIST": "alpha,beta",
        "SLURM_JOB_ID": "1234567",
    }
    expected = {
        "RANK": "6",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "2",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "alpha",
        "MASTER_PORT": str(20000 + 1234567 % 20000),
    }
    assert world.slurm_environment(step) == expected
    assert world.slurm_environment({**step, "SLURM_STEP_NUM_NODES": "1"})["MASTER_ADDR"] == "127.0.0.1"
    chosen = world.slurm_environment({**step, "MASTER_ADDR": "gamma", "MASTER_PORT": "4321"})
    assert (chosen["MASTER_ADDR"], chosen["MASTER_PORT"]) == ("gamma", "4321")


def test_compressed_host_list_without_scontrol(clean: pytest.MonkeyPatch) -> None:
    clean.setenv("PATH", "")
    step = {
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "gpu[01-02]",
    }
    with pytest.raises(ValueError, match=r"gpu\[01-02\].*export MASTER_ADDR"):
        world.slurm_environment(step)


def test_without_mpi4py_it_says_what_to_do(clean: pytest.MonkeyPatch) -> None:
    clean.setitem(sys.modules, "mpi4py", None)  # import mpi4py raises ImportError
    with pytest.raises(ImportError, match=r"pip install 'ringflash\[mpi\]'.*MASTER_ADDR.*torchrun"):
        mpi.bootstrap(timedelta(seconds=5))


def test_without_mpi4py_an_address_is_enough(clean: pytest.MonkeyPatch) -> None:
    clean.setitem(sys.modules, "mpi4py", None)
    for name, value in {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "4321",
        "OMPI_COMM_WORLD_RANK": "1",
        "OMPI_COMM_WORLD_SIZE": "2",
    }.items():
        clean.setenv(name, value)
    assert mpi.bootstrap(timedelta(seconds=5)) is None
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("1", "2")


class OneRank:
    """The four calls of an MPI communicator that the bootstrap makes, for a world of one."""

    def Get_rank(self) -> int:  # noqa: N802 - MPI's names
        return 0

    def Get_size(self) -> int:  # noqa: N802
        return 1

    def Split_type(self, kind: int, key: int) -> OneRank:  # noqa: N802
        return self

    def Free(self) -> None:  # noqa: N802
        pass

    def bcast(self, value: Any, root: int) -> Any:
        return value


def test_store_takes_the_port_the_system_gave(clean: pytest.MonkeyPatch) -> None:
    store = mpi.store_of(OneRank(), 0, timedelta(seconds=5))
    store.set("key", "value")
    assert store.get("key") == b"value"
    assert {name: os.environ[name] for name in RANK_VARIABLES[:5]} == {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
    }
    assert int(os.environ["MASTER_PORT"]) == store.port  # type: ignore[attr-defined]


@pytest.mark.skipif(
    shutil.which("mpirun") is None or importlib.util.find_spec("mpi4py") is None,
    reason="needs mpirun and mpi4py (pip install 'ringflash[mpi]' and an MPI)",
)
def test_training_under_mpirun(tmp_path: Path, clean: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.txt").write_text("to be, or not to be, that is the question\n" * 400)
    options = [
        f"data.path={tmp_path / 'text.txt'}",
        f"out={tmp_path / 'out'}",
        "machine=cpu",
        "seqlen=128",
        "steps=2",
        "model.dim=16",
        "model.heads=2",
        "model.head_dim=8",
        "model.ffn_dim=16",
    ]
    extra = ["--allow-run-as-root", "--oversubscribe"] if "Open MPI" in _version() else []
    command = ["mpirun", *extra, "-n", "2", sys.executable, "-m", "ringflash.launch.train", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"check: 2 ranks against 1[\s\S]*PASS", done.stdout)


def _version() -> str:
    return subprocess.run(["mpirun", "--version"], capture_output=True, text=True).stdout
