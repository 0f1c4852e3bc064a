"""The running state of one forward call, for backends whose library returns partial results.

Decides when a partial result is copied, merged or simply becomes the state, so that a call with a single part costs nothing
beside its library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ringflash.merge import merge_

if TYPE_CHECKING:
    from ringflash.kernels import Settle

State = tuple[Tensor, Tensor]


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of running state and gradients: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Running:
    """``(out, lse)`` while parts arrive. Empty, or the continuation of a carry.

    shape: (B, Sq, H, Dv) of out. dtype: of out when it is finished.
    """

    def __init__(
        self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, carry: State | None = None
    ) -> None:
        self._shape = shape
        self._dtype, self._acc, self._device = dtype, accumulate_dtype(dtype), device
        self._carried = carry is not None
        self._out: Tensor | None = None if carry is None else carry[0]
        self._lse: Tensor | None = None if carry is None else carry[1]
        self._seen: npt.NDArray[np.bool_] | None = None
        """(Sq,): rows that hold something; None once all do."""
        if carry is None:
            self._seen = np.zeros(shape[1], dtype=np.bool_)

    @classmethod
    def of(cls, q: Tensor, v: Tensor, carry: State | None = None) -> Running:
        """For queries q (B, Sq, H, D) and values v (B, Sk, Hkv, Dv)."""
        B, Sq, H, _ = q.shape
        return cls((B, Sq, H, v.shape[3]), q.dtype, q.device, carry)

    def put(self, q0: int, q1: int, out_part: Tensor, lse_part: Tensor) -> None:
        """Adds a part of rows [q0, q1): out_part (B, q1 - q0, H, Dv) of any floating dtype, lse_part (B, H, q1 - q0).

        The part becomes ours: it may be written to later.
        """
        if self._out is None and q0 == 0 and q1 == self._shape[1]:
            self._out, self._lse, self._seen = out_part, lse_part, None
            return
        self._own()
        assert self._out is not None and self._lse is not None
        out, lse = self._out[:, q0:q1], self._lse[:, :, q0:q1]
        if self._seen is not None:
            seen = self._seen[q0:q1]
            if not seen.any():
                out.copy_(out_part)
                lse.copy_(lse_part)
                seen[:] = True
                return
            self._clear_unseen(q0, q1)
        merge_(out, lse, out_part, lse_part.to(self._acc))

    def result(self, finish: bool, settle: Settle | None = None) -> State:
        """The state: in q's dtype as a new tensor with finish, else in the accumulate dtype, some rows perhaps settled."""
        assert not (finish and settle), "settling is for calls that leave other rows unfinished"
        if not finish or self._out is None:
            self._own()
        if self._seen is not None:
            self._clear_unseen(0, self._shape[1])
        assert self._out is not None and self._lse is not None
        lse = self._lse.to(self._acc)
        if not finish:
            if settle is not None:
                for begin, end in settle.rows:
                    settle.out[:, begin:end] = self._out[:, begin:end]
            return self._out, lse
        return self._out.to(self._dtype, copy=self._carried), lse.clone() if self._carried else lse

    def _own(self) -> None:
        """From here on the state is a pair in the accumulate dtype that may be written to."""
        if self._out is None:
            B, Sq, H, _ = self._shape
            self._out = torch.empty(self._shape, dtype=self._acc, device=self._device)
            self._lse = torch.empty((B, H, Sq), dtype=self._acc, device=self._device)
        elif self._out.dtype != self._acc:
            assert self._lse is not None
            self._out, self._lse = self._out.to(self._acc), self._lse.to(self._acc)

    def _clear_unseen(self, q0: int, q1: int) -> None:
        """Makes the rows of [q0, q1) that nothing was put into empty ones: out 0, lse -inf."""
        assert self._seen is not None and self._out is not None and self._lse is not None
        rows = self._seen[q0:q1]
        edges = np.flatnonzero(np.diff(np.concatenate([[True], rows, [True]]).astype(np.int8)))
        for a, b in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            self._out[:, q0 + a : q0 + b] = 0.0
            self._lse[:, :, q0 + a : q0 + b] = -torch.inf
        rows[:] = True
