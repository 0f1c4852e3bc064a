"""Starts a module on several ranks of this host with torch's elastic launcher, for commands that bring their own ranks."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Sequence

from ringflash.launch import world


def start(module: str, arguments: Sequence[str], ranks: int) -> int:
    """Runs ``python -m module arguments`` on so many ranks and waits for them.

    Returns 0, or the exit code of the first rank that failed; a rank that was killed is named on stderr. As ``torchrun
    --standalone --nproc-per-node``, but without its tables of tracebacks.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, world.cores() // ranks)))
    with tempfile.TemporaryDirectory(prefix="ringflash-") as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=ranks,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            monitor_interval=0.1,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        try:
            elastic_launch(config, sys.executable)("-u", "-m", module, *arguments)
        except SignalException as stop:
            return 128 + int(stop.sigval)
        except ChildFailedError as failed:
            codes = {rank: failure.exitcode for rank, failure in sorted(failed.failures.items())}
            own = [code for code in codes.values() if code > 0]
            for rank, code in codes.items():
                if code < 0 and (code != -signal.SIGTERM or not own):  # SIGTERM is how the launcher ends the rest
                    print(f"{module}: rank {rank} was killed by {signal.Signals(-code).name}", file=sys.stderr)
            return own[0] if own else 1
    return 0
