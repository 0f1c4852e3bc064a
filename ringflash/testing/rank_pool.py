"""A persistent pool of real ranks, one process each, for tests and for ``ringflash check``.

Ranks are forked from a server that has already imported torch, so a pool of eight is ready in a fraction of a second and serves
many calls. A pool that has seen a failure is never used again: a rank that raised may have left a collective half done, and the
next call would then read its messages. The next call starts a fresh pool by itself.
"""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import os
import pickle
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from typing import Any, NamedTuple

from ringflash import env

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["torch", "torch.distributed.device_mesh", "ringflash.testing", "pytest", "torch.fx.experimental.symbolic_shapes"]
)  # the last is what torch.autograd.grad imports first of all, sympy with it: a second of each rank's first call


@dataclass(frozen=True)
class Outcome:
    """What one rank answered: a value, or the reason why there is none."""

    rank: int
    value: Any = None
    error: str | None = None
    """None when the rank returned; else its traceback, or how its process ended."""

    answered: bool = True
    """False when the rank was killed because it had not answered in time."""


class RankError(AssertionError):
    """At least one rank of a pool raised, died or did not answer; ``outcomes`` holds every rank's answer."""

    def __init__(self, outcomes: list[Outcome]) -> None:
        self.outcomes = outcomes
        # The ranks that raised say why; those that waited for them in vain only say that they waited.
        failed = sorted((o for o in outcomes if o.error is not None), key=lambda o: (not o.answered, o.rank))
        super().__init__("\n".join(f"rank {o.rank}: {o.error}" for o in failed))


class _Work(NamedTuple):
    """A module's function by name, and where the module lies: pytest's importlib mode loads test files that nobody can import."""

    module: str
    file: str | None
    function: str
    arguments: bytes

    @classmethod
    def of(cls, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Work:
        module = sys.modules.get(function.__module__)
        if getattr(module, function.__qualname__, None) is not function:
            raise TypeError(f"ranks find their work by its name: {function} must be a module's own function")
        return cls(function.__module__, getattr(module, "__file__", None), function.__qualname__, pickle.dumps((args, kwargs)))

    def run(self, rank: int) -> Any:
        if self.module not in sys.modules and self.file is not None:
            spec = importlib.util.spec_from_file_location(self.module, self.file)
            assert spec is not None and spec.loader is not None
            sys.modules[self.module] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[self.module])
        args, kwargs = pickle.loads(self.arguments)
        return getattr(sys.modules[self.module], self.function)(rank, *args, **kwargs)


def gpu_places() -> int:
    """Ranks with a GPU that tests may start here: RINGFLASH_RANKS_PER_GPU for each."""
    import torch

    return torch.cuda.device_count() * env.ranks_per_gpu()


def _share_gpus(rank: int) -> None:
    """Before NCCL starts: lets several ranks use one GPU. NCCL allows that only between hosts, and so it is told that every rank
    is one; symmetric memory has to be told that they are not. They take turns on the GPU: nothing here is fast."""
    os.environ.update(NCCL_HOSTID=f"rank{rank}", NCCL_SOCKET_IFNAME="lo", NCCL_IB_DISABLE="1")
    os.environ.update({env.HOST.name: "shared", "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1"})


def _serve(rank: int, world: int, backend: str, init_file: str, connection: Connection, timeout_s: float) -> None:
    """A rank's life: join the group, then run what arrives until told to stop or the parent is gone."""
    import faulthandler
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    faulthandler.enable()
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    device_id = None
    if "nccl" in backend:
        gpus = torch.cuda.device_count()
        if 0 < gpus < world:
            _share_gpus(rank)
        device_id = torch.device("cuda", rank % max(gpus, 1))
        torch.cuda.set_device(device_id)
    dist.init_process_group(
        backend,
        init_method=f"file://{init_file}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=timeout_s),
        device_id=device_id,
    )
    connection.send_bytes(pickle.dumps(Outcome(rank)))
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:  # the parent died: nobody is left to answer
            os._exit(1)
        if not message:
            break
        try:
            torch.manual_seed(0)
            answer = pickle.dumps(Outcome(rank, value=pickle.loads(message).run(rank)))
        except BaseException:
            answer = pickle.dumps(Outcome(rank, error=traceback.format_exc()))
        connection.send_bytes(answer)
    # Leaving without this can abort at exit, while the other ranks still talk to the store.
    dist.destroy_process_group()


class RankPool:
    """``world`` processes joined in one process group.

    world: number of ranks. backend: of ``init_process_group``; with NCCL, rank r uses CUDA device r, and where there are fewer
    GPUs than ranks, they share them.
    timeout_s: the process group's own timeout, after which a blocked collective raises in its rank.
    """

    def __init__(self, world: int, *, backend: str = "gloo", timeout_s: float = 60.0) -> None:
        if world < 1:
            raise ValueError(f"a pool needs at least one rank, got world={world}")
        self.world, self.backend, self.timeout_s = world, backend, timeout_s
        self._processes: list[ForkServerProcess] = []
        self._connections: list[Connection] = []
        self._directory: str | None = None
        self._joined = False

    def run(self, function: Callable[..., Any], *args: Any, timeout_s: float = 120.0, **kwargs: Any) -> list[Any]:
        """``function(rank, *args, **kwargs)`` on every rank; returns the values by rank.

        function must be a module's own function and everything given or returned must pickle. Raises RankError, with every
        failed rank's traceback, when one raises, dies, or has not answered after ``timeout_s``.
        """
        outcomes = self.outcomes(function, *args, timeout_s=timeout_s, **kwargs)
        if any(o.error is not None for o in outcomes):
            raise RankError(outcomes)
        return [o.value for o in outcomes]

    def outcomes(
        self, function: Callable[..., Any], *args: Any, timeout_s: float = 120.0, grace_s: float = 3.0, **kwargs: Any
    ) -> list[Outcome]:
        """As ``run``, but returns what became of every rank instead of raising.

        grace_s: how long the others may still run after the first failure (they may be waiting for the failed one).
        """
        message = pickle.dumps(_Work.of(function, args, kwargs))
        self._join()
        for connection in self._connections:
            connection.send_bytes(message)
        outcomes = self._collect(timeout_s, grace_s)
        if any(o.error is not None for o in outcomes):
            self.kill()
        return outcomes

    def begin(self) -> RankPool:
        """Starts the ranks, if none are there, without waiting until they have joined: the next call does. Returns the pool."""
        if self._processes:
            return self
        self._directory = tempfile.mkdtemp(prefix="ringflash_ranks_")
        init_file = os.path.join(self._directory, "store")
        for rank in range(self.world):
            ours, theirs = _context.Pipe()
            process = _context.Process(
                target=_serve, args=(rank, self.world, self.backend, init_file, theirs, self.timeout_s), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)
        return self

    def _join(self) -> None:
        """Returns when all ranks have joined."""
        self.begin()
        if self._joined:
            return
        outcomes = self._collect(timeout_s=120.0, grace_s=3.0)
        if any(o.error is not None for o in outcomes):
            self.kill()
            raise RankError(outcomes)
        self._joined = True

    def _collect(self, timeout_s: float, grace_s: float) -> list[Outcome]:
        """One answer from every rank, those that do not answer in time included."""
        pending = dict(enumerate(self._connections))
        outcomes: dict[int, Outcome] = {}
        end = time.monotonic() + timeout_s
        while pending:
            ready = wait(list(pending.values()), timeout=max(0.0, end - time.monotonic()))
            if not ready:
                break
            for rank, connection in [(r, c) for r, c in pending.items() if c in ready]:
                del pending[rank]
                outcomes[rank] = self._receive(rank, connection)
                if outcomes[rank].error is not None:
                    end = min(end, time.monotonic() + grace_s)
        failed = any(o.error is not None for o in outcomes.values())
        why = (
            f"no answer {grace_s:g} s after another rank failed" if failed else f"no answer within {timeout_s:g} s (a deadlock?)"
        )
        for rank in pending:
            outcomes[rank] = Outcome(rank, error=why, answered=False)
        return [outcomes[rank] for rank in range(self.world)]

    def _receive(self, rank: int, connection: Connection) -> Outcome:
        try:
            outcome: Outcome = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):  # the pipe closes with the process: this is how a death shows
            process = self._processes[rank]
            process.join(5)
            return Outcome(rank, error=f"the process ended with exit code {process.exitcode} before it answered")
        return outcome

    def kill(self) -> None:
        """Ends every rank at once; the next call starts fresh ones."""
        for process in self._processes:
            process.kill()
        self._forget()

    def close(self) -> None:
        """Lets every rank leave the group and end; kills those that do not, or have not joined yet."""
        for connection in self._connections if self._joined else ():
            with contextlib.suppress(OSError):
                connection.send_bytes(b"")
        for process in self._processes if self._joined else ():
            process.join(10)
        self.kill()

    def _forget(self) -> None:
        for process in self._processes:
            process.join()
            process.close()
        for connection in self._connections:
            connection.close()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
        self._processes, self._connections, self._directory, self._joined = [], [], None, False

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
