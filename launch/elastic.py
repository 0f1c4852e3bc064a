"""Start the ranks of this host with torch's elastic launcher and turn whatever ends them into one line and an exit code."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ringflash.launch import world

LOST_PEER = 75
"""Exit code of a rank that failed only because another one did (EX_TEMPFAIL)."""
_STOPPED = tuple(128 + s for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1))
_SHUTDOWN_S = 120

# Until the rank's own handlers are in place, an interrupt must end it without a traceback from the middle of an import.
_ENTRY = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "from ringflash.launch.train import work; sys.exit(work(sys.argv[1:]))"
)


def launch(ranks: int, arguments: Sequence[str]) -> int:
    """Run ``work(arguments)`` of ``ringflash.launch.train`` in ``ranks`` processes; the exit code of the job.

    0 success; 128 + signal if a signal stopped it; else the code of the rank that failed first, whose number is printed.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # its tables repeat what is said below
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, world.cores() // ranks)))
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
            elastic_launch(LaunchConfig(**settings), sys.executable)("-u", "-c", _ENTRY, *arguments)
        except SignalException as stop:
            if not any(e["kind"] == "Stopped" for e in _errors(Path(folder)).values()):
                say("interrupted before the first step; nothing was saved")
            return 128 + int(stop.sigval)
        except ChildFailedError as failed:
            codes = {rank: failure.exitcode for rank, failure in failed.failures.items()}
            pids = {rank: failure.pid for rank, failure in failed.failures.items()}
            return _explain(codes, pids, _errors(Path(folder)))
    return 0


def _explain(codes: dict[int, int], pids: dict[int, int], errors: dict[int, dict[str, str]]) -> int:
    """Print one line about the rank that began it and return the exit code of the job."""
    stopped = [code for code in codes.values() if code in _STOPPED]
    if stopped and all(e["kind"] == "Stopped" for e in errors.values()):
        return stopped[0]
    killed = [
        rank for rank, code in codes.items() if code < 0 and code != -signal.SIGTERM
    ]  # SIGTERM is how the launcher ends the rest
    witnesses = [e["text"] for rank, e in sorted(errors.items()) if codes.get(rank) == LOST_PEER]
    if killed:
        rank = killed[0]
        name = signal.Signals(-codes[rank]).name
        seen = f" ({witnesses[0]})" if witnesses else ""
        say(f"rank {rank} (pid {pids[rank]}) was killed by {name}; the other ranks were ended{seen}")
        return 1
    guilty = [rank for rank, code in codes.items() if code > 0 and code != LOST_PEER and code not in _STOPPED]
    for rank in guilty[:1]:
        if errors.get(rank, {}).get("kind") != "Said":  # it has not printed its own line
            say(f"rank {rank} (pid {pids[rank]}) ended with exit code {codes[rank]}; the other ranks were ended")
        return codes[rank]
    say(witnesses[0] if witnesses else f"ranks {sorted(codes)} ended with exit codes {sorted(set(codes.values()))}")
    return 1


def say(text: str) -> None:
    """One line about the job as a whole."""
    print(f"ringflash train: {text}", file=sys.stderr, flush=True)


def record(kind: str, text: str) -> bool:
    """Leave this rank's last word where the elastic launcher looks for it; False if no such launcher started this rank.

    Kinds: Stopped (on request), Lost (because of another rank), Said (its own failure, already printed).
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return False
    said = {"message": text, "extraInfo": {"py_callstack": text, "timestamp": str(int(time.time())), "kind": kind}}
    Path(path).write_text(json.dumps({"message": said}))
    return True


def _errors(folder: Path) -> dict[int, dict[str, str]]:
    """What ``record`` left, by local rank: the folder above each file is named by it."""
    found = {}
    for path in folder.rglob("error.json"):
        try:
            said = json.loads(path.read_text())["message"]
            found[int(path.parent.name)] = {"kind": said["extraInfo"]["kind"], "text": said["message"]}
        except (ValueError, KeyError, TypeError):  # half written by a rank that was killed meanwhile
            continue
    return found
