"""The current stream from a table: torch is asked once per device and handle, and what comes is the current one."""

from __future__ import annotations

import pytest
import torch

from ringflash import streams


def test_torch_is_asked_once_per_device_and_handle(monkeypatch: pytest.MonkeyPatch) -> None:
    current, asked = {0: 0, 1: 0}, []

    def ask(index: int) -> object:
        asked.append((index, current[index]))
        return (index, current[index])

    monkeypatch.setattr(streams, "_known", {})
    monkeypatch.setattr(streams, "_raw", lambda index: current[index])
    monkeypatch.setattr(torch.cuda, "current_stream", ask)
    for handle in (0, 7, 0, 7):
        current[1] = handle
        assert streams.current_stream(1) == streams.current_stream(1) == (1, handle)
        assert streams.current_handle(1) == handle
        assert streams.current_stream(0) == (0, 0)
    assert asked == [(1, 0), (0, 0), (1, 7)]


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
def test_it_is_the_current_stream() -> None:
    side, here = torch.cuda.Stream(), torch.cuda.current_device()
    for _ in range(2):
        assert streams.current_stream(here) == torch.cuda.current_stream() != side
        with torch.cuda.stream(side):
            assert streams.current_stream(here) == side and streams.current_handle(here) == side.cuda_stream
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert streams.current_stream(here) == torch.cuda.current_stream()
        torch.zeros(1, device="cuda")
