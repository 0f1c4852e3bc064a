"""What a launch of our CUDA kernels needs to know of its device: multiprocessors, work counters."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _counters_of(device: torch.device, stream: int, n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.int32, device=device)


def counters(device: torch.device, stream: int, n: int) -> Tensor:
    """The n work counters of a stream: zero between launches, of which none touches them before the one in front is complete.

    A captured launch has its own, zeroed by its graph: graphs captured on one stream may run on several.
    """
    if torch.cuda.is_current_stream_capturing():
        return _counters_of.__wrapped__(device, stream, n)
    return _counters_of(device, stream, n)
