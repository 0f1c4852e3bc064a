"""Ends a stalled NCCL transfer with a word.

On CUDA a wait only makes a stream wait: the host runs on, and a dead peer shows as a kernel that never ends. So after each wait
an event is recorded, and a daemon thread looks whether it passes within the group's time. If not, it says which rank waited for
whom in which step, and aborts the group's communicator, so that the waiting kernels end and the job fails instead of hanging.
A stream that waits for a signal in symmetric memory ends by no abort: there the process ends, with exit code 70. Replays of a
CUDA graph are not watched.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ringflash.parallel.transport import Label, TransportError
from ringflash.streams import current_stream


@dataclass
class _Watched:
    begun: torch.cuda.Event
    event: torch.cuda.Event
    group: dist.ProcessGroup
    rank: int
    label: Label
    peers: Sequence[int]
    timeout_s: float
    device: int
    since: float | None = None
    """When the stream was seen to wait: work queued before, of whatever length, is not the peers' doing."""


_watched: deque[_Watched] = deque()
_spare: defaultdict[int, deque[torch.cuda.Event]] = defaultdict(deque)
"""Events of a device that have passed, to be recorded again: making and destroying them costs more than recording."""
_thread: threading.Thread | None = None
_lock = threading.Lock()
_failed: TransportError | None = None

PERIOD_S = 0.2
GRACE_S = 10.0
"""How long the main thread gets to raise after an abort before the process is ended."""


def reached() -> torch.cuda.Event:
    """An event on the current stream, to be recorded right before the wait that `watch` is told of."""
    stream = current_stream(torch.cuda.current_device())
    spare = _spare[stream.device_index]
    event = spare.popleft() if spare else torch.cuda.Event()
    event.record(stream)
    return event


def watch(
    group: dist.ProcessGroup, rank: int, label: Label, peers: Sequence[int], timeout_s: float, begun: torch.cuda.Event
) -> None:
    """Watches the transfer that the current stream now waits for. Raises the TransportError of an earlier stall."""
    global _thread
    if _failed is not None:
        raise _failed
    if torch.cuda.is_current_stream_capturing():  # nothing runs now, and whoever replays the graph is not seen here
        return
    _watched.append(_Watched(begun, reached(), group, rank, label, peers, timeout_s, torch.cuda.current_device()))
    with _lock:
        if _thread is None or not _thread.is_alive():
            _thread = threading.Thread(target=_look, name="ringflash-watchdog", daemon=True)
            _thread.start()


def _look() -> None:
    global _thread
    _allow_captures()
    idle = 0
    while True:
        time.sleep(PERIOD_S)
        idle = 0 if _watched else idle + 1
        with _lock:
            if idle >= 50 and not _watched:  # some seconds after the last transfer; the next one starts a new thread
                _thread = None
                return
        while _watched and _watched[0].event.query():
            passed = _watched.popleft()
            _spare[passed.device].extend((passed.begun, passed.event))
        if not _watched:
            continue
        oldest = _watched[0]
        now = time.monotonic()
        if oldest.since is None and oldest.begun.query():
            oldest.since = now
        if oldest.since is not None and now - oldest.since > oldest.timeout_s:
            _give_up(oldest)
            return


def _allow_captures() -> None:
    """Asking for an event would otherwise break a CUDA graph that another thread is capturing."""
    relaxed = ctypes.c_int(2)  # CU_STREAM_CAPTURE_MODE_RELAXED
    ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode(ctypes.byref(relaxed))


def _give_up(stalled: _Watched) -> None:
    global _failed
    names = ", ".join(str(p) for p in stalled.peers)
    _failed = TransportError(
        f"rank {stalled.rank}, {stalled.label}: rank {names} did not answer within {stalled.timeout_s:g} s; "
        "raise timeout_s (or RINGFLASH_TIMEOUT_S) if the rank is only slow, else look at that rank's own output for the cause"
    )
    print(f"ringflash: {_failed}", file=sys.stderr, flush=True)
    aborter = threading.Thread(target=_abort, args=(stalled.group,), daemon=True)
    aborter.start()
    time.sleep(GRACE_S)
    # The main thread may sit in a driver call that no abort ends; a clear exit beats a silent hang.
    os._exit(70)


def _abort(group: dist.ProcessGroup) -> None:
    abort = getattr(group, "abort", None)
    if abort is not None:
        abort()
