"""Ranks as one world: who started this process, joining, stopping together, and finding out who is missing.

torchrun, mpirun and srun describe the world in different environment variables; ``join`` ends with the same process group and
the same ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``LOCAL_WORLD_SIZE`` for all of them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from ringflash import env
from ringflash.launch import mpi

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_SLURM_PORTS = 20_000
_SECOND_SIGNAL_S = 2.0
_WATCH_S = 0.25

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Signals by which a user or a scheduler asks a run to stop."""

LAUNCHER_PID = env.LAUNCHER_PID.name
"""Variable by which our own launcher tells its ranks who it is: it may be gone before they can ask."""


def launcher(environment: Mapping[str, str] = os.environ) -> str | None:
    """Who started this process: "torchrun", "mpi", "slurm", or None if nobody did and the ranks are still to be started.

    Open MPI's own variables outrank Slurm's, because under Slurm its daemons inherit those. A Slurm batch script has
    SLURM_PROCID too, but is no task of a step; and a step of one task is an interactive shell.
    """
    if "RANK" in environment:
        return "torchrun"
    if "OMPI_COMM_WORLD_RANK" in environment:
        return "mpi"
    if "SLURM_PROCID" in environment and environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        return "slurm"
    if "PMI_RANK" in environment or "PMIX_RANK" in environment:
        return "mpi"
    return None


@dataclass(frozen=True)
class World:
    """This process among all: ranks, device, the threads it may use, and the store all ranks reach."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    store: Store

    @property
    def first(self) -> bool:
        """Rank 0, which alone writes files and talks."""
        return self.rank == 0

    @staticmethod
    def threads() -> int:
        """Threads of this rank's kernels on the CPU."""
        return torch.get_num_threads()

    def barrier(self) -> None:
        """Wait for everybody. Over gloo also on GPUs: it must work when the GPUs' streams do not."""
        dist.all_reduce(torch.zeros(1))


def cores() -> int:
    """Processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def join(device: str, timeout_s: float) -> World:
    """Enter the process group described by the environment, and pick this rank's device and its share of the processors.

    Raises ValueError if the environment does not describe a world, or there are fewer GPUs than ranks on this host.
    """
    timeout = timedelta(seconds=timeout_s)
    kind = launcher()
    if kind == "slurm":
        os.environ.update(slurm_environment(os.environ))
    store = mpi.bootstrap(timeout) if kind == "mpi" else None
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(
            f"The environment names a launcher but lacks {', '.join(missing)}; start the ranks with torchrun, mpirun or srun."
        )
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if store is None:
        store, _, _ = next(iter(rendezvous("env://", rank, size, timeout=timeout)))
    if device == "cuda" and local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"Rank {rank} is number {local_rank} on its host, which has {torch.cuda.device_count()} GPUs; "
            f"start one rank per GPU, or use machine=cpu."
        )
    if device == "cuda":
        torch.cuda.set_device(local_rank)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cores() // local_size))
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    group_store, own_store = (dist.PrefixStore(name, store) for name in ("group", "ringflash"))  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=group_store, rank=rank, world_size=size, timeout=timeout)
    place = torch.device("cuda", local_rank) if device == "cuda" else torch.device("cpu")
    return World(rank, size, local_rank, local_size, place, own_store)


def environment_rank(environment: Mapping[str, str]) -> int:
    """This process's rank as its launcher tells it, before joining; 0 if nobody does."""
    names = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID")
    return next((int(environment[name]) for name in names if name in environment), 0)


def leave() -> None:
    """Leave the process group, if any: without it some builds of torch abort at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()


def slurm_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """torch's variables from those of ``srun``. A user's MASTER_ADDR and MASTER_PORT win; else the first host of the job and a
    port made from the job's number, so that two jobs on one host do not meet.
    """
    hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    address = environment.get("MASTER_ADDR")
    if address is None:
        address = "127.0.0.1" if environment.get("SLURM_STEP_NUM_NODES") == "1" else _first_host(hosts)
    job = int(environment.get("SLURM_JOB_ID", "0"))
    per_node = environment.get("SLURM_STEP_TASKS_PER_NODE", environment["SLURM_STEP_NUM_TASKS"])
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": per_node.split("(")[0].split(",")[0],  # "4(x2)" is four tasks on each of two nodes
        "MASTER_ADDR": address,
        "MASTER_PORT": environment.get("MASTER_PORT", str(_SLURM_PORTS + job % _SLURM_PORTS)),
    }


def _first_host(hosts: str) -> str:
    """The first host of Slurm's compressed list; only scontrol knows how to read ``gpu[01-04,07]``."""
    if "[" not in hosts and hosts:
        return hosts.split(",")[0]
    try:
        answer = subprocess.run(["scontrol", "show", "hostnames", hosts], capture_output=True, text=True, check=True, timeout=30)
        return answer.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        raise ValueError(
            f"Cannot tell the first host of SLURM_JOB_NODELIST={hosts!r} ({error}); export MASTER_ADDR before srun."
        ) from error


class StopRequest:
    """Turns Ctrl-C and termination into a wish that the training loop grants between two steps, on all ranks together.

    Between ``at_once`` and ``arm`` there is nothing to save, and a rank that merely noted the signal would wait for those that it
    ended: a stop signal ends the process, by the system's default. A Python handler would not do, because none runs while the
    rank waits for others inside torch.

    A second signal some seconds later does not wait; one right after the first is the same one on another way (terminal and
    launcher). A launcher that vanished (kill -9) counts as a request, so that no rank outlives it.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._parent = int(os.environ.pop(LAUNCHER_PID, os.getppid()))
        self._armed = False
        self._since = 0.0
        self.arm()

    def at_once(self) -> None:
        """From here on a signal ends the process, as does one that was noted before."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        if self.signal is not None:
            os._exit(128 + self.signal)
        self._armed = False
        threading.Thread(target=self._end_with_launcher, name="ringflash-launcher", daemon=True).start()

    def _end_with_launcher(self) -> None:
        """A launcher interrupted while it starts its ranks forgets the first ones, which would wait for the others."""
        while not self._armed:
            if os.getppid() != self._parent:
                os._exit(128 + signal.SIGTERM)
            time.sleep(_WATCH_S)

    def arm(self) -> None:
        """From here on a signal is noted. With a barrier behind it, no rank is left that a signal still ends."""
        self._armed = True
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > _SECOND_SIGNAL_S:
            os._exit(128 + number)

    @property
    def wanted(self) -> bool:
        return self.signal is not None or os.getppid() != self._parent

    @property
    def exit_code(self) -> int:
        """128 + signal, as shells do; termination for a rank that only heard of it from the others."""
        return 128 + (self.signal or signal.SIGTERM)


@dataclass
class Activity:
    """What a rank is doing, for the message should it fail."""

    now: str = "while starting"
    saved: str = ""  # the newest checkpoint


@dataclass(frozen=True)
class Report:
    """What one rank says about its failure."""

    kind: str
    text: str
    lost_peer: bool


def roll_call(world: World, mine: Report, wait_s: float) -> dict[int, Report | None]:
    """After a failure: tell the others why, and learn what each of them says; None is a rank that says nothing.

    Collectives are unusable now, but the store still answers (it lives with the launcher, or with rank 0). Waits up to
    ``wait_s``: a rank that died or hangs cannot answer, everybody else has failed too or is about to.
    """
    reports: dict[int, Report | None] = {rank: None for rank in range(world.size)}
    reports[world.rank] = mine
    try:
        world.store.set(f"report/{world.rank}", json.dumps([mine.kind, mine.text, mine.lost_peer]))
        until = time.monotonic() + wait_s
        while None in reports.values() and time.monotonic() < until:
            for rank in [r for r, report in reports.items() if report is None]:
                if world.store.check([f"report/{rank}"]):
                    reports[rank] = Report(*json.loads(world.store.get(f"report/{rank}")))
            time.sleep(0.05)
    except RuntimeError:  # the store went with its host
        pass
    return reports
