"""Slices on libraries of the flash-attention family: dense and variable-length calls with windows aligned at the end of the keys.

What such libraries share is here: how Slices become calls, how inputs are padded and aligned, how a delta is passed that the
library insists on computing itself. A `Library` adds its own signatures.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ringflash.kernels.decompose import UNLIMITED, Pack, packs, window, windowed
from ringflash.kernels.running import Running, State
from ringflash.slices import Slice, Slices

MAX_HEAD_DIM = 256

FEW = 4
"""Up to so many Slices are computed by one dense call each, if they are large."""

LARGE = 1 << 20
"""Scores of a large Slice: a call of its own fills the device."""


@dataclass(frozen=True)
class Sequences:
    """The sequences of a variable-length call."""

    cu_q: Tensor  # (n + 1,) int32 on the device
    cu_k: Tensor  # (n + 1,)
    max_q: int
    max_k: int


@dataclass(frozen=True)
class Call:
    """One call of a library: its scalars, and its sequences if it is of variable length."""

    scale: float
    softcap: float = 0.0
    left: int = UNLIMITED
    right: int = UNLIMITED
    sequences: Sequences | None = None
    deterministic: bool = False
    repeated: bool = False
    """The step is a few dense calls: their shapes are those of chunks, which repeat, not those of documents."""


class Library(Protocol):
    """Dense calls: q (B, Sq, H, D), lse (B, H, Sq). With ``call.sequences``: q (T, H, D), lse (H, T).

    D and Dv are multiples of 8, rows lie on 16-byte borders, and statistics (lse, delta) are contiguous.
    """

    takes_delta: bool
    """Whether backward takes any delta; if not, ``delta`` is None and out is such that rowsum(dout * out) is the one wanted."""

    def launches(
        self, slices: Slices, q: Tensor, k: Tensor, v: Tensor, backward: bool, deterministic: bool
    ) -> Sequence[Slice | Pack]:
        """The calls that compute the Slices of q, k, v (B, S, H, D)."""
        ...

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> State:
        """(out, lse), new tensors; out in q's dtype."""
        ...

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, lse: Tensor, delta: Tensor | None, call: Call
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv), new tensors."""
        ...


@lru_cache(maxsize=1024)
def launches(slices: Slices) -> tuple[Slice | Pack, ...]:
    """Few and large Slices as dense calls, others packed into as few variable-length calls as possible."""
    pieces = [piece for s in slices for piece in windowed(s)]
    if len(pieces) == 1 or (len(pieces) <= FEW and all((s.q1 - s.q0) * (s.k1 - s.k0) >= LARGE for s in pieces)):
        return tuple(pieces)
    return tuple(pack.slices[0] if len(pack.slices) == 1 else pack for pack in packs(pieces))


_sequences: WeakKeyDictionary[Pack, dict[tuple[int, int, int, torch.device], Sequences]] = WeakKeyDictionary()
"""Device copies of each pack's sequence borders, which every layer of every step uses again."""


def sequences(pack: Pack, batch: int, q_len: int, k_len: int, device: torch.device) -> Sequences:
    known = _sequences.setdefault(pack, {})
    key = (batch, q_len, k_len, device)
    if key not in known:
        cu_q, cu_k = (torch.from_numpy(x.astype(np.int32)).to(device) for x in pack.cumulative(batch, q_len, k_len))
        known[key] = Sequences(cu_q, cu_k, *pack.longest)
    return known[key]


def round_up(n: int, multiple: int = 8) -> int:
    return -(-n // multiple) * multiple


def width_with_delta(head_dim: int, head_dim_v: int) -> int:
    """The common head dim of a backward call that carries delta in two more columns of v."""
    return round_up(max(head_dim, head_dim_v + 2))


def fitted(x: Tensor, width: int) -> Tensor:
    """(B, S, H, D) -> (B, S, H, width) with zeros behind and rows on 16-byte borders, as the libraries' loads need.

    A view of x, or x itself, if it already is so.
    """
    if x.shape[3] < width:
        return F.pad(x, (0, width - x.shape[3]))
    aligned = x.stride(3) == 1 and x.data_ptr() % 16 == 0
    if aligned and all(n == 1 or (s > 0 and s % 8 == 0) for n, s in zip(x.shape[:3], x.stride()[:3], strict=True)):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def same_width(*tensors: Tensor) -> list[Tensor]:
    """The tensors padded with zeros to the largest head dim among them."""
    width = max(x.shape[-1] for x in tensors)
    return [x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in tensors]


DELTA_UNIT = 32.0


def with_delta(dout: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """(dout', out') in dout's dtype, two columns wider than dout, with rowsum(dout' * out') = delta (B, H, S).

    delta = 32 a + b / 32 with a and b rounded to the dtype: 16 bits and more of delta arrive, and in float16 neither a large
    delta overflows nor a small one vanishes.
    """
    column = delta.transpose(1, 2).unsqueeze(-1)
    high = (column / DELTA_UNIT).to(dout.dtype)
    low = ((column - high.to(column.dtype) * DELTA_UNIT) * DELTA_UNIT).to(dout.dtype)
    out = dout.new_zeros(*dout.shape[:3], dout.shape[3] + 2)
    out[..., -2], out[..., -1] = DELTA_UNIT, 1 / DELTA_UNIT
    return torch.cat([dout, high, low], dim=-1), out


class _Dense:
    """Where one Slice lies in the tensors of a call: a rectangle of its own."""

    sequences = None

    def __init__(self, s: Slice) -> None:
        self.window = window(s)
        self.row_runs, self.key_runs = [(s.q0, s.q1)], [(s.k0, s.k1)]
        self.first_row, self.first_key = s.q0, s.k0
        self._rows, self._keys = slice(s.q0, s.q1), slice(s.k0, s.k1)

    def rows(self, x_BSHD: Tensor) -> Tensor:
        return x_BSHD[:, self._rows]

    def keys(self, x_BSHD: Tensor) -> Tensor:
        return x_BSHD[:, self._keys]

    def statistics(self, x_BHS: Tensor) -> Tensor:
        return x_BHS[:, :, self._rows].contiguous()

    def back(self, x: Tensor) -> Tensor:
        """A result of rows or keys as (B, S, H, D)."""
        return x

    def statistics_back(self, x: Tensor) -> Tensor:
        """An lse as (B, H, S)."""
        return x


class _Packed:
    """Where the Slices of one pack lie: all rows and keys of the batch, one after another."""

    first_row = first_key = 0

    def __init__(self, pack: Pack, q: Tensor, k: Tensor) -> None:
        self.window, self.row_runs, self.key_runs = pack.window, pack.row_runs(), pack.key_runs()
        self.sequences = sequences(pack, q.shape[0], q.shape[1], k.shape[1], q.device)
        self._batch = q.shape[0]

    def rows(self, x_BSHD: Tensor) -> Tensor:
        return x_BSHD.flatten(0, 1)

    keys = rows

    def statistics(self, x_BHS: Tensor) -> Tensor:
        return x_BHS.transpose(0, 1).flatten(1).contiguous()

    def back(self, x: Tensor) -> Tensor:
        return x.reshape(self._batch, -1, *x.shape[1:])

    def statistics_back(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], self._batch, -1).transpose(0, 1)


def _add(into: Tensor, part: Tensor, first: int, runs: list[tuple[int, int]], sign: int = 1) -> None:
    """Adds those runs of part (B, S', H, >= D), whose row 0 is row ``first`` of into (B, S, H, D)."""
    for a, b in runs:
        into[:, a:b].add_(part[:, a - first : b - first, :, : into.shape[3]], alpha=sign)


def _positive(q: Tensor, scale: float) -> tuple[Tensor, float, int]:
    """(q, scale, sign) with the same scores and a positive scale; sign is that of dq.

    Under a negative one libraries would take a minimum for the maximum; 0 would make NaN of masked scores (0 times -inf).
    """
    if scale == 0:
        return torch.zeros_like(q), 1.0, 0
    return (q, scale, 1) if scale > 0 else (-q, -scale, -1)


def _calls(
    library: Library, slices: Slices, q: Tensor, k: Tensor, v: Tensor, call: Call, backward: bool
) -> Iterator[tuple[_Dense | _Packed, Call]]:
    """Each call of the library: where it works, and ``call`` with its window and sequences."""
    todo = library.launches(slices, q, k, v, backward, call.deterministic)
    repeated = len(slices) <= FEW and not any(isinstance(launch, Pack) for launch in todo)
    for launch in todo:
        at = _Packed(launch, q, k) if isinstance(launch, Pack) else _Dense(launch)
        left, right = at.window
        yield at, replace(call, left=left, right=right, sequences=at.sequences, repeated=repeated)


class WindowedKernel(ABC):
    """A backend on libraries of the family; name, refusals and the library are for it to say."""

    @abstractmethod
    def library_for(self, q: Tensor) -> Library:
        """What computes on q's device."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slices: Slices,
        *,
        scale: float,
        softcap: float = 0.0,
        carry: State | None = None,
        finish: bool = True,
    ) -> State:
        state = Running.of(q, v, carry)
        if not (q.shape[0] and q.shape[2] and len(slices)):
            return state.result(finish)
        library, Dv = self.library_for(q), v.shape[3]
        q, scale, _ = _positive(q, scale)
        q, k, v = (fitted(x, round_up(x.shape[3])) for x in (q, k, v))
        for at, call in _calls(library, slices, q, k, v, Call(scale, softcap), backward=False):
            out, lse = library.forward(at.rows(q), at.keys(k), at.keys(v), call)
            out, lse = at.back(out)[..., :Dv], at.statistics_back(lse)
            for q0, q1 in at.row_runs:
                rows = slice(q0 - at.first_row, q1 - at.first_row)
                state.put(q0, q1, out[:, rows], lse[:, :, rows])
        return state.result(finish)

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor | None,
        lse: Tensor,
        delta: Tensor,
        slices: Slices,
        *,
        scale: float,
        softcap: float = 0.0,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        deterministic: bool = False,
    ) -> None:
        if not (q.shape[0] and q.shape[2] and len(slices)):
            return
        library = self.library_for(q)
        q, scale, sign = _positive(q, scale)
        width, width_v = round_up(q.shape[3]), round_up(v.shape[3])
        if out is None and not library.takes_delta:
            width = width_v = width_with_delta(q.shape[3], v.shape[3])
            dout, out = with_delta(dout, delta)
        q, k, v, dout = fitted(q, width), fitted(k, width), fitted(v, width_v), fitted(dout, width_v)
        out = None if out is None else fitted(out, width_v)
        for at, call in _calls(library, slices, q, k, v, Call(scale, softcap, deterministic=deterministic), backward=True):
            dq_part, dk_part, dv_part = library.backward(
                at.rows(dout),
                at.rows(q),
                at.keys(k),
                at.keys(v),
                None if out is None else at.rows(out),
                at.statistics(lse),
                at.statistics(delta) if out is None else None,
                call,
            )
            _add(dq, at.back(dq_part), at.first_row, at.row_runs, sign)
            _add(dk, at.back(dk_part), at.first_key, at.key_runs)
            _add(dv, at.back(dv_part), at.first_key, at.key_runs)
