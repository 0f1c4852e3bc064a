"""Recorded spans: nothing unless asked for, and then every kernel and every wait of a pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import ringflash as rf
from ringflash.parallel import trace
from ringflash.parallel.trace import BACKWARD, CHUNKS, COMPUTE, COPY, FORWARD, WAIT, Span
from ringflash.testing.rank_pool import RankPool


def test_nothing_is_recorded_unless_somebody_asks() -> None:
    trace.begin(WAIT, 1)
    trace.end(WAIT, 1)
    with trace.record() as recorder:
        trace.begin(WAIT, 1)
        trace.begin(COPY, 1, 3, CHUNKS)
        trace.end(COPY, 1, 3, CHUNKS)
        trace.end(WAIT, 1)
        trace.begin(FORWARD, 2)  # never ends
        trace.end(WAIT, 7)  # never began
    trace.begin(WAIT, 1)
    trace.end(WAIT, 1)
    outer, inner = recorder.spans()
    assert outer[:4] == (COMPUTE, WAIT, 1, None) and inner[:4] == (CHUNKS, COPY, 1, 3)
    assert 0 <= outer.start <= inner.start <= inner.stop <= outer.stop
    assert trace.total([outer, inner], WAIT) == pytest.approx(outer.ms)
    assert trace.total([outer, inner], COPY) == 0.0


def record_a_pass(rank: int, schedule: str) -> list[Span]:
    cp = rf.ContextParallel(None, "zigzag", schedule)
    cp.position_ids(64)
    q, k, v = (torch.randn(1, 16, 2, 8, requires_grad=True) for _ in range(3))
    with trace.record() as recorder:
        rf.attention(q, k, v, mask=rf.Mask.causal(), cp=cp).sum().backward()
    return recorder.spans()


@pytest.mark.parametrize(("schedule", "steps"), [("ring", 4), ("allgather", 2)])
def test_a_pass_marks_every_kernel_and_every_wait(ranks: Callable[[int], RankPool], schedule: str, steps: int) -> None:
    for spans in ranks(4).run(record_a_pass, schedule):
        compute = [s for s in spans if s.lane == COMPUTE]
        for what in (FORWARD, BACKWARD):
            assert [s.step for s in compute if s.what == what] == list(range(steps))
        assert {s.step for s in compute if s.what == WAIT} >= set(range(1, steps))
        last_forward = max(s.stop for s in compute if s.what == FORWARD)
        assert last_forward <= min(s.start for s in compute if s.what == BACKWARD)
        assert all(s.ms >= 0 for s in spans)
