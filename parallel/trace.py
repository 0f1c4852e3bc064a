"""What this rank's streams did when: spans of kernels, copies and waits, recorded only while somebody asks for them.

    with trace.record() as recorder:
        rf.attention(q, k, v, cp=cp)
    print(recorder.spans())

The loops and the transports say ``begin`` and ``end`` around what they put on a stream. On CUDA both record an event on that
stream, so a span is when the GPU did it, not when the host asked for it; without CUDA they read the host's clock. While nobody
records, each call is one comparison. Meant for one rank a process; nothing is recorded while a CUDA graph is captured.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

COMPUTE, CHUNKS, GRADIENTS, HEADS = "compute", "chunks", "gradients", "heads"
"""Lanes: the stream that computes, the one that fetches keys and values, the one that brings gradients home, and the one that
fetches heads that ranks trade, both ways."""

FORWARD, BACKWARD, COPY, PACK, ADD, WAIT = "forward", "backward", "copy", "pack", "add", "wait"
"""What a lane does: kernels of the two passes, transfers, packing what leaves, adding gradients that arrived, waiting."""

FOR_GRADIENTS, FOR_READERS, FOR_HEADS = -1, -2, -3
"""What the computing stream waits for besides a step's chunks, in place of a peer: gradients, others who still read the buffer
that is to be written, an exchange of heads."""


class Span(NamedTuple):
    """One thing that a lane did, from ``start`` to ``stop``, milliseconds after the recording began."""

    lane: str
    what: str
    step: int
    peer: int | None
    start: float
    stop: float

    @property
    def ms(self) -> float:
        return self.stop - self.start


class Recorder:
    """Collects marks. ``spans`` waits for the device."""

    def __init__(self) -> None:
        self.cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        self.open: dict[tuple[str, str, int, int | None], torch.cuda.Event | float] = {}
        self.closed: list[tuple[tuple[str, str, int, int | None], torch.cuda.Event | float, torch.cuda.Event | float]] = []
        self.origin = self.now(None)

    def now(self, stream: torch.cuda.Stream | None) -> torch.cuda.Event | float:
        if not self.cuda:
            return time.perf_counter() * 1e3
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream or torch.cuda.current_stream())
        return event

    def mark(self, key: tuple[str, str, int, int | None], stream: torch.cuda.Stream | None, begins: bool) -> None:
        if self.cuda and torch.cuda.is_current_stream_capturing():
            return
        if begins:
            self.open[key] = self.now(stream)
        elif key in self.open:
            self.closed.append((key, self.open.pop(key), self.now(stream)))

    def spans(self) -> list[Span]:
        """All spans that have ended, by their start."""
        if self.cuda:
            torch.cuda.synchronize()

        def since(mark: torch.cuda.Event | float) -> float:
            if isinstance(mark, float):
                assert isinstance(self.origin, float)
                return mark - self.origin
            return float(self.origin.elapsed_time(mark))  # type: ignore[union-attr]

        return sorted((Span(*key, since(start), since(stop)) for key, start, stop in self.closed), key=lambda s: s.start)


_recorder: Recorder | None = None


@contextmanager
def record() -> Iterator[Recorder]:
    """Records whatever is marked inside."""
    global _recorder
    assert _recorder is None, "one recording at a time"
    _recorder = Recorder()
    try:
        yield _recorder
    finally:
        _recorder = None


def begin(
    what: str, step: int = 0, peer: int | None = None, lane: str = COMPUTE, stream: torch.cuda.Stream | None = None
) -> None:
    """``what`` of ``step`` (with ``peer``) begins on a stream, by default the current one."""
    if _recorder is not None:
        _recorder.mark((lane, what, step, peer), stream, True)


def end(what: str, step: int = 0, peer: int | None = None, lane: str = COMPUTE, stream: torch.cuda.Stream | None = None) -> None:
    """What the same words began has been put on the stream."""
    if _recorder is not None:
        _recorder.mark((lane, what, step, peer), stream, False)


def total(spans: Sequence[Span], what: str, lane: str = COMPUTE) -> float:
    """Milliseconds that a lane spent on something: ``total(spans, WAIT)`` is what transfers kept the kernels waiting."""
    return sum(span.ms for span in spans if (span.lane, span.what) == (lane, what))
