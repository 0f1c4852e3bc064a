"""Our own Hopper kernels (csrc/hopper, sm_90a): bf16 and fp16, any Slices, running float32 state continued inside the kernel."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ringflash import ops
from ringflash.kernels import Extras, hopper_backward, streams, tiles
from ringflash.slices import Slices
from ringflash.streams import current_handle

if TYPE_CHECKING:
    from ringflash.kernels import Problem, Settle, State

NOTHING, STATE, SINKS = 0, 1, 2
"""``RfCarry`` of csrc/hopper/forward_api.h: what a launch starts from."""
NONE, ALL, SETTLED = 0, 1, 2
"""``RfFinish`` of the same: which rows a launch writes in their final dtype."""
SETTLE_ROWS = 384
"""The least common multiple of the tiles' rows: a tile's rows settle together."""
EXTRAS = Extras(
    delta=True,
    sinks=True,
    settle_rows=SETTLE_ROWS,
    one_call=True,
    sm_margin=True,
    portion_bytes=hopper_backward.PORTION_BYTES,
    turn_rows=hopper_backward.TURN_ROWS,
)

DTYPES = (torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256
L2_BYTES = 32 << 20
"""Share of the 50-60 MB L2 that K and V of the heads in work at the same time may take."""
EVEN_L2_BYTES = 8 << 20
"""The same where all items are equally long. Longest first has no say then, and the fewer heads at a time, the more evenly their
K and V come from memory: 1-2 % at 1k. Under a causal mask, groups that small cost up to 8 %."""

_POINTERS, _REST = struct.Struct("=11Q"), struct.Struct("=21q13i2fi")
"""``RfHopperForwardParams`` of csrc/hopper/forward_api.h. One pack call costs a tenth of filling a ctypes.Structure."""


@cache
def _library() -> ctypes.CDLL | None:
    """The device library with the Hopper launchers declared; None if this installation has none."""
    lib = ops.library()
    if lib is None or not lib.rf_has_hopper():
        return None
    lib.rf_hopper_forward.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
    lib.rf_hopper_forward.restype = ctypes.c_int
    lib.rf_hopper_forward_tile.argtypes = [ctypes.c_int32] * 3 + [ctypes.POINTER(ctypes.c_int32)] * 4
    lib.rf_hopper_forward_tile.restype = ctypes.c_int
    return lib


class Tile(NamedTuple):
    """One compiled variant: the tiles it computes and what they cost, in cycles of a multiprocessor (csrc/hopper/traits.h)."""

    variant: int
    rows: int
    keys: int
    tile_cost: int
    item_cost: int


@cache
def forward_tiles(head_dim: int, head_dim_v: int) -> tuple[Tile, ...]:
    """The variants of the kernel of these head dims."""
    lib = _library()
    assert lib is not None
    found: list[Tile] = []
    while True:
        numbers = [ctypes.c_int32() for _ in range(4)]
        code = lib.rf_hopper_forward_tile(head_dim, head_dim_v, len(found), *map(ctypes.byref, numbers))
        if code and found:
            return tuple(found)
        ops.check(lib, "rf_hopper_forward_tile", code)
        found.append(Tile(len(found), *(n.value for n in numbers)))


@lru_cache(maxsize=512)
def forward_plan(
    slices: Slices, q_len: int, k_len: int, head_dim: int, head_dim_v: int, settled: tiles.Ranges = (), whole: bool = True
) -> tuple[Tile, tiles.TileTable]:
    """The variant that computes these Slices in the fewest cycles, and its tile table."""

    def cycles(choice: tuple[Tile, tiles.TileTable]) -> int:
        tile, table = choice
        return table.tiles * tile.tile_cost + len(table.items) * tile.item_cost

    variants = forward_tiles(head_dim, head_dim_v)
    return min(((t, tiles.forward_table(slices, q_len, k_len, t.rows, t.keys, settled, whole)) for t in variants), key=cycles)


@lru_cache(maxsize=1024)
def _evenly(shape: Sequence[int], stride: Sequence[int], multiple: int) -> bool:
    """Whether rows are contiguous and B, S, H step by positive multiples of that many elements."""
    steps = zip(shape[:3], stride[:3], strict=True)
    return (stride[3] == 1 or shape[3] == 1) and all(n == 1 or (s > 0 and s % multiple == 0) for n, s in steps)


def _for_copy_engine(x: Tensor) -> Tensor:
    """x, or a contiguous copy where the copy engine cannot read it: it wants 16-byte aligned rows and no dim of stride 0."""
    if x.data_ptr() % 16 or not _evenly(x.shape, x.stride(), 8):
        return x.clone(memory_format=torch.contiguous_format)
    return x


def _vectors(x: Tensor) -> bool:
    """Whether the kernel can read and write the float32 rows of x in 16-byte vectors."""
    return x.data_ptr() % 16 == 0 and _evenly(x.shape, x.stride(), 4)


def _strides(shape: Sequence[int], stride: Sequence[int]) -> tuple[int, int, int]:
    """B, S, H in elements; a dim of one element may carry any stride in torch, the copy engine wants a plausible one."""
    B, S, H, D = shape
    b, s, h, _ = stride
    h = h if H > 1 else -(-D // 8) * 8
    s = s if S > 1 else H * h
    return (b if B > 1 else S * s), s, h


class _Call(NamedTuple):
    """A launch but for the tensors' addresses."""

    tables: tuple[Tensor, Tensor, Tensor]
    addresses: tuple[int, int, int]  # of the tables
    rest: bytes


@lru_cache(maxsize=512)
def _call(
    slices: Slices,
    settled: tiles.Ranges,
    device: torch.device,
    dtype: torch.dtype,
    shapes: tuple[Sequence[int], ...],  # of q, k, v
    strides: tuple[Sequence[int], ...],  # of q, k, v, out, acc
    lse_strides: tuple[Sequence[int], ...],  # of lse_in, lse
    start: int,
    ending: int,
    scale: float,
    softcap: float,
    sm_margin: int,
) -> _Call | None:
    """What a launch is made of; all of it follows from Slices, shapes, strides and options. None if there is nothing to do."""
    (B, Sq, H, D), (_, Sk, Hkv, _), (_, _, _, Dv) = shapes
    tile, table = forward_plan(slices, Sq, Sk, D, Dv, settled, start != STATE or ending == ALL)
    if not len(table.items):
        return None
    kv_heads_in_l2 = max(1, (EVEN_L2_BYTES if table.even else L2_BYTES) // (Sk * (D + Dv) * 2))
    out_shape = (B, Sq, H, Dv)
    rest = _REST.pack(
        *(n for shape, x in zip((*shapes, out_shape, out_shape), strides, strict=True) for n in _strides(shape, x)),
        *(n for b, h, s in lse_strides for n in (b, s, h)),
        B,
        Sq,
        Sk,
        H,
        Hkv,
        D,
        Dv,
        len(table.items),
        ops.DTYPES[dtype],
        start,
        ending,
        min(B * H, kv_heads_in_l2 * (H // Hkv)),
        max(1, streams.multiprocessors(device) - sm_margin),
        scale,
        softcap,
        tile.variant,
    )
    items, runs, extra = table.on(device)
    return _Call((items, runs, extra), (items.data_ptr(), runs.data_ptr(), extra.data_ptr()), rest)


@dataclass
class HopperKernel:
    """The backend. ``sm_margin`` multiprocessors are left free for whoever moves data with them meanwhile."""

    name: str = "hopper"
    sm_margin: int = 0
    extras: Extras = EXTRAS

    def refuses(self, problem: Problem) -> str | None:
        """Why these kernels cannot do it here; None if they can."""
        if problem.device != "cuda" or problem.capability is None:
            return f"needs a CUDA device, the tensors are on {problem.device}"
        if problem.capability != (9, 0):
            return f"needs compute capability 9.0, this device has {problem.capability[0]}.{problem.capability[1]}"
        if problem.dtype not in DTYPES:
            return f"needs bfloat16 or float16, got {str(problem.dtype).removeprefix('torch.')}"
        for word, size in (("head_dim", problem.head_dim), ("head_dim of v", problem.head_dim_v)):
            if size % 8 or not 0 < size <= MAX_HEAD_DIM:
                return f"needs a {word} that is a multiple of 8 up to {MAX_HEAD_DIM}, got {size}"
        if not problem.positive_scale:
            return "needs a positive scale"
        if _library() is None:
            return "this installation was built without the Hopper kernels"
        return hopper_backward.refuses(problem) if problem.needs_grad else None

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
        sinks: Tensor | None = None,
        settle: Settle | None = None,
    ) -> State:
        """Folds the Slices into the running ``(out, lse)``; the contract is ``ringflash.kernels.Kernel.forward``.

        sinks: (H,) float32, for a first call instead of ``carry``: starts from the running state (0, sinks) without that state
        ever lying in memory. q, k, v are read where they lie, unless a row of theirs is not 16-byte aligned.
        ValueError for a scale that is not positive.
        """
        assert sinks is None or carry is None, "sinks are part of the running state already"
        assert settle is None or not finish, "settling is for calls that leave other rows unfinished"
        if not scale > 0.0:
            raise ValueError(f"scale={scale}: the Hopper kernels need a positive scale; use backend='reference' or negate q")
        if q.numel() == 0 or len(slices) == 0 or k.numel() == 0:
            return self._see_nothing(q, v.shape[3], carry, finish, sinks, settle)
        if carry is not None and not _vectors(carry[0]):
            copy = carry[0].contiguous()
            out, lse = self.forward(
                q, k, v, slices, scale=scale, softcap=softcap, carry=(copy, carry[1]), finish=finish, settle=settle
            )
            return (out, lse) if finish else (carry[0].copy_(out), lse)
        q, k, v = _for_copy_engine(q), _for_copy_engine(k), _for_copy_engine(v)
        B, Sq, H, _ = q.shape
        if finish or carry is None:
            lse = torch.empty((B, H, Sq), dtype=torch.float32, device=q.device)
            acc = torch.empty((B, Sq, H, v.shape[3]), dtype=q.dtype if finish else torch.float32, device=q.device)
            result = acc
            if carry is not None:
                acc = carry[0]
        else:
            acc, lse = carry
            result = acc
        out = result if settle is None else settle.out
        if sinks is not None:
            start, lse_in = SINKS, sinks.float()[None, :, None].expand(B, H, Sq)
        else:
            start, lse_in = (NOTHING, lse) if carry is None else (STATE, carry[1])
        call = _call(
            slices,
            () if settle is None else settle.rows,
            q.device,
            q.dtype,
            (q.shape, k.shape, v.shape),
            (q.stride(), k.stride(), v.stride(), out.stride(), acc.stride()),
            (lse_in.stride(), lse.stride()),
            start,
            ALL if finish else NONE if settle is None else SETTLED,
            scale,
            softcap,
            self.sm_margin,
        )
        if call is None:
            return result, lse
        if torch.cuda.current_device() == q.device.index:
            self._launch(call, q, k, v, out, acc, lse_in, lse)
        else:
            with torch.cuda.device(q.device):
                self._launch(call, q, k, v, out, acc, lse_in, lse)
        return result, lse

    def _launch(self, call: _Call, q: Tensor, *others: Tensor) -> None:
        lib = _library()
        assert lib is not None
        stream = current_handle(q.device.index)
        addresses = (x.data_ptr() for x in (q, *others))
        pointers = _POINTERS.pack(*addresses, *call.addresses, streams.counters(q.device, stream, 2).data_ptr())
        ops.check(lib, "rf_hopper_forward", lib.rf_hopper_forward(pointers + call.rest, stream))

    def _see_nothing(
        self, q: Tensor, head_dim_v: int, carry: State | None, finish: bool, sinks: Tensor | None, settle: Settle | None
    ) -> State:
        """The step without a visible pair: the running state as it is, or the unit (0, -inf or the sinks)."""
        if carry is not None:
            out, lse = (carry[0].to(q.dtype), carry[1]) if finish else carry
        else:
            B, Sq, H, _ = q.shape
            out = torch.zeros((B, Sq, H, head_dim_v), dtype=q.dtype if finish else torch.float32, device=q.device)
            lse = torch.full((B, H, Sq), -torch.inf, dtype=torch.float32, device=q.device)
            if sinks is not None:
                lse.copy_(sinks[None, :, None].expand(B, H, Sq))
        if settle is not None:
            for begin, end in settle.rows:
                settle.out[:, begin:end] = out[:, begin:end]
        return out, lse

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
        """Adds the gradients of the Slices into dq, dk, dv; the contract is ``ringflash.kernels.Kernel.backward``."""
        hopper_backward.backward(
            dout, q, k, v, out, lse, delta, slices,
            scale=scale, softcap=softcap, dq=dq, dk=dk, dv=dv, deterministic=deterministic, sm_margin=self.sm_margin,
        )  # fmt: skip

    def gradients(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        delta: Tensor | None,
        slices: Slices,
        *,
        scale: float,
        softcap: float = 0.0,
        deterministic: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv of a pass of one call, in q's dtype; the contract is ``ringflash.kernels.OneCallKernel.gradients``."""
        return hopper_backward.gradients(
            dout, q, k, v, out, lse, slices,
            scale=scale, softcap=softcap, row_delta=delta, deterministic=deterministic, sm_margin=self.sm_margin,
        )  # fmt: skip


KERNEL = HopperKernel()
