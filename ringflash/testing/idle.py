"""A kernel for what is measured around kernels: host time, memory, waits."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ringflash.kernels import Extras, State
from ringflash.kernels.running import accumulate_dtype


class Idle:
    """Makes the results that the protocol asks for, of any content, and computes nothing."""

    name = "idle"
    extras = Extras()

    def refuses(self, problem: object) -> str | None:
        return None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, slices: object, *, carry: State | None = None, finish: bool = True, **_: Any
    ) -> State:
        acc = accumulate_dtype(q.dtype)
        if carry is None:
            B, S, H = q.shape[:3]
            return q.new_empty((B, S, H, v.shape[3]), dtype=q.dtype if finish else acc), q.new_empty((B, H, S), dtype=acc)
        return (carry[0].to(q.dtype) if finish else carry[0]), carry[1]

    def backward(self, *args: object, **kwargs: object) -> None:
        return None
