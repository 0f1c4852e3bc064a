"""Start the ranks of this host with torch's elastic launcher and turn whatever ends them into one line and an exit code."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ringflash.launch import world

LOST_PEER = 75
"""Exit code of a rank that failed only because another one did (EX_TEMPFAIL)."""
_STOPPED = tuple(128 + s for s in world.STOP_SIGNALS)
_INTERRUPTED = "interrupted; no new checkpoint was written"
_SHUTDOWN_S = 120

# Until the rank's own handlers are in place, an interrupt must end it without a traceback from the middle of an import. The
# launcher starts it with SIGINT blocked, which covers Python's own start; here it is let in, with the system's silent default.
_ENTRY = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT]); "
    "from ringflash.launch.train import work; sys.exit(work(sys.argv[1:]))"
)


def launch(ranks: int, arguments: Sequence[str]) -> int:
    """Run ``work(arguments)`` of ``ringflash.launch.train`` in ``ranks`` processes; the exit code of the job.

    0 success; 128 + signal if a signal stopped it; else the code of the rank that failed first, whose number is printed.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.ERROR)  # torch's own lines and tables repeat what is said below
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, world.cores() // ranks)))
    os.environ[world.LAUNCHER_PID] = str(os.getpid())
    with tempfile.TemporaryDirectory(prefix="ringflash-") as folder:
        settings: dict[str, Any] = {
            "min_nodes": 1,
            "max_nodes": 1,
            "nproc_per_node": ranks,
            "run_id": uuid.uuid4().hex,
            "rdzv_backend": "c10d",
            "rdzv_endpoint": "localhost:0",
            "max_restarts": 0,
            "monitor_interval": 0.1,
            "logs_specs": DefaultLogsSpecs(log_dir=folder),
        }
        if "shutdown_timeout" in {f.name for f in dataclasses.fields(LaunchConfig)}:
            settings["shutdown_timeout"] = _SHUTDOWN_S
        try:
            with _children_start_without_interrupts():
                elastic_launch(LaunchConfig(**settings), sys.executable)("-u", "-c", _ENTRY, *arguments)
        except SignalException as stop:
            if not any(word.kind == "Stopped" for word in _last_words(Path(folder)).values()):
                say(_INTERRUPTED)
            return 128 + int(stop.sigval)
        except ChildFailedError as failed:
            return _explain(failed.failures, _last_words(Path(folder)))
        finally:
            logging.disable(logging.NOTSET)
    return 0


@contextlib.contextmanager
def _children_start_without_interrupts() -> Iterator[None]:
    """Block SIGINT in the main thread, whose signal mask its child processes inherit, while another thread keeps receiving it.

    Python runs signal handlers in the main thread whichever thread the system chose, so Ctrl-C works here as before.
    """
    done = threading.Event()
    receiver = threading.Thread(target=done.wait, name="ringflash-interrupts", daemon=True)
    receiver.start()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        done.set()
        receiver.join()


def _explain(failures: dict[int, Any], words: dict[int, LastWord]) -> int:
    """Print one line about the rank that began it and return the exit code of the job. ``failures`` are torch's, by rank."""
    codes = {rank: failure.exitcode for rank, failure in failures.items()}
    ended = [int(code if code > 0 else 128 - code) for code in codes.values()]  # as a shell counts
    if not words and all(code in _STOPPED for code in ended):  # while starting, or by a second signal
        say(_INTERRUPTED)
        by_user = [code for code in ended if code != 128 + signal.SIGTERM]  # the launcher sends SIGTERM to the rest
        return (by_user or ended)[0]
    stopped = [code for code in codes.values() if code in _STOPPED]
    if stopped and all(word.kind == "Stopped" for word in words.values()):
        return int(stopped[0])
    witnesses = [words[rank] for rank in sorted(words) if words[rank].kind == "Lost"]
    first_witness = min((w.time for w in witnesses), default=math.inf)
    for rank, failure in failures.items():
        # SIGTERM is how the launcher ends the rest, and SIGKILL how it ends, half a minute later, a rank that does not react.
        if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM and failure.timestamp <= first_witness:
            cause = f"rank {rank} (pid {failure.pid}) was killed by {signal.Signals(-failure.exitcode).name}"
            say(
                "; ".join(
                    [cause + (f" {witnesses[0].where}" if witnesses else ""), "the other ranks were ended", *_rest(witnesses)]
                )
            )
            return 1
    for rank, code in codes.items():
        if code > 0 and code != LOST_PEER and code not in _STOPPED:
            if rank not in words or words[rank].kind != "Said":
                say(f"rank {rank} (pid {failures[rank].pid}) ended with exit code {code}; the other ranks were ended")
            return int(code)
    if witnesses:
        say("; ".join([f"{witnesses[0].where}: {witnesses[0].text}", *_rest(witnesses)]))
    else:
        say(f"ranks {sorted(codes)} ended with exit codes {sorted(set(codes.values()))}")
    return 1


def _rest(witnesses: list[LastWord]) -> list[str]:
    if not witnesses:
        return []
    saved = witnesses[0].saved
    return [f"last checkpoint {saved}, the same command continues from it" if saved else "no new checkpoint was written"]


def say(text: str) -> None:
    """One line about the job as a whole."""
    print(f"ringflash train: {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class LastWord:
    """What a rank says before it ends. Kinds: Stopped (on request), Lost (because of another rank), Said (its own failure,
    printed).
    """

    kind: str
    text: str = ""
    where: str = ""
    saved: str = ""
    time: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def leave(self) -> bool:
        """Write it where the elastic launcher (ours or torchrun) looks for it; False if none started this rank."""
        path = os.environ.get("TORCHELASTIC_ERROR_FILE")
        if not path:
            return False
        text = f"{self.where}: {self.text}" if self.where else self.text
        extra = {"py_callstack": text, "timestamp": str(self.time), "ringflash": dataclasses.asdict(self)}
        Path(path).write_text(json.dumps({"message": {"message": text, "extraInfo": extra}}))
        return True


def _last_words(folder: Path) -> dict[int, LastWord]:
    """What the ranks left under torch's log folder, by local rank: the folder above each file is named by it."""
    found = {}
    for path in folder.rglob("error.json"):
        try:
            found[int(path.parent.name)] = LastWord(**json.loads(path.read_text())["message"]["extraInfo"]["ringflash"])
        except (ValueError, KeyError, TypeError):  # half written by a rank that was killed meanwhile
            continue
    return found
