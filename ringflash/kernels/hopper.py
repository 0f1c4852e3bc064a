"""Our own Hopper kernels (csrc/hopper, sm_90a): bf16 and fp16, any Slices, running float32 state continued inside the kernel."""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ringflash import ops
from ringflash.kernels import hopper_backward, tiles
from ringflash.slices import Slices

if TYPE_CHECKING:
    from ringflash.kernels import Problem, State

NOTHING, STATE, SINKS = 0, 1, 2
"""``RfCarry`` of csrc/hopper/forward_api.h: what a launch starts from."""

DTYPES = (torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256
L2_BYTES = 32 << 20
"""Share of the 50-60 MB L2 that K and V of the heads in work at the same time may take."""
EVEN_L2_BYTES = 8 << 20
"""The same where all items are equally long. Longest first has no say then, and the fewer heads at a time, the more evenly their
K and V come from memory: 1-2 % at 1k. Under a causal mask, groups that small cost up to 8 %."""

_PARAMS = struct.Struct("=11Q21q13i2fi")
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
def forward_plan(slices: Slices, q_len: int, k_len: int, head_dim: int, head_dim_v: int) -> tuple[Tile, tiles.TileTable]:
    """The variant that computes these Slices in the fewest cycles, and its tile table."""

    def cycles(choice: tuple[Tile, tiles.TileTable]) -> int:
        tile, table = choice
        return table.tiles * tile.tile_cost + len(table.items) * tile.item_cost

    variants = forward_tiles(head_dim, head_dim_v)
    return min(((t, tiles.forward_table(slices, q_len, k_len, t.rows, t.keys)) for t in variants), key=cycles)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _counter_of(device: torch.device, stream: int) -> Tensor:
    """The two work counters of a stream: zero between launches, and launches of one stream never overlap."""
    return torch.zeros(2, dtype=torch.int32, device=device)


def _counter(device: torch.device, stream: int) -> Tensor:
    """Zeroed work counters. A captured launch has its own, zeroed by the graph: graphs of one stream may run on several."""
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(2, dtype=torch.int32, device=device)
    return _counter_of(device, stream)


def _for_copy_engine(x: Tensor) -> Tensor:
    """x, or a contiguous copy where the copy engine cannot read it: it wants 16-byte aligned rows and no dim of stride 0."""
    unaligned = x.data_ptr() % 16 or (x.stride(3) != 1 and x.shape[3] > 1)
    if unaligned or any(n > 1 and (s <= 0 or s % 8) for n, s in zip(x.shape[:3], x.stride()[:3], strict=True)):
        return x.clone(memory_format=torch.contiguous_format)
    return x


def _strides(x_BSHD: Tensor) -> tuple[int, int, int]:
    """B, S, H in elements; a dim of one element may carry any stride in torch, the copy engine wants a plausible one."""
    B, S, H, D = x_BSHD.shape
    b, s, h, _ = x_BSHD.stride()
    h = h if H > 1 else -(-D // 8) * 8
    s = s if S > 1 else H * h
    return (b if B > 1 else S * s), s, h


def _lse_strides(lse_BHS: Tensor) -> tuple[int, int, int]:
    b, h, s = lse_BHS.stride()
    return b, s, h


def _vectors(x: Tensor) -> bool:
    """Whether the kernel can read and write the float32 rows of x in 16-byte vectors."""
    aligned = x.data_ptr() % 16 == 0 and x.stride(3) == 1
    return aligned and all(n == 1 or (s > 0 and s % 4 == 0) for n, s in zip(x.shape[:3], x.stride()[:3], strict=True))


@dataclass
class HopperKernel:
    """The backend. ``sm_margin`` multiprocessors are left free for whoever moves data with them meanwhile."""

    name: str = "hopper"
    sm_margin: int = 0

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
    ) -> State:
        """Folds the Slices into the running ``(out, lse)``; the contract is ``ringflash.kernels.Kernel.forward``.

        sinks: (H,) float32, for a first call instead of ``carry``: starts from the running state (0, sinks) without that state
        ever lying in memory. q, k, v are read where they lie, unless a row of theirs is not 16-byte aligned.
        ValueError for a scale that is not positive.
        """
        assert sinks is None or carry is None, "sinks are part of the running state already"
        if not scale > 0.0:
            raise ValueError(f"scale={scale}: the Hopper kernels need a positive scale; use backend='reference' or negate q")
        B, Sq, H, D = q.shape
        Sk, Dv = k.shape[1], v.shape[3]
        if q.numel() == 0 or len(slices) == 0 or k.numel() == 0:
            return self._see_nothing(q, Dv, carry, finish, sinks)
        if carry is not None and not _vectors(carry[0]):
            copy = carry[0].contiguous()
            out, lse = self.forward(q, k, v, slices, scale=scale, softcap=softcap, carry=(copy, carry[1]), finish=finish)
            return (out, lse) if finish else (carry[0].copy_(out), lse)
        q, k, v = _for_copy_engine(q), _for_copy_engine(k), _for_copy_engine(v)
        if carry is not None and not finish:
            result, lse = carry
        else:
            dtype = q.dtype if finish else torch.float32
            result = torch.empty((B, Sq, H, Dv), dtype=dtype, device=q.device)
            lse = torch.empty((B, H, Sq), dtype=torch.float32, device=q.device)
        if sinks is not None:
            start, before = SINKS, (result, sinks.float()[None, :, None].expand(B, H, Sq))
        elif carry is not None:
            start, before = STATE, carry
        else:
            start, before = NOTHING, (result, lse)
        tile, table = forward_plan(slices, Sq, Sk, D, Dv)
        if torch.cuda.current_device() == q.device.index:
            self._launch(tile.variant, table, q, k, v, result, lse, start, before, scale, softcap, finish)
        else:
            with torch.cuda.device(q.device):
                self._launch(tile.variant, table, q, k, v, result, lse, start, before, scale, softcap, finish)
        return result, lse

    def _launch(
        self,
        variant: int,
        table: tiles.TileTable,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        result: Tensor,
        lse: Tensor,
        start: int,
        before: State,
        scale: float,
        softcap: float,
        finish: bool,
    ) -> None:
        lib = _library()
        assert lib is not None
        B, Sq, H, D = q.shape
        Sk, Hkv, Dv = k.shape[1], k.shape[2], v.shape[3]
        items, runs, extra = table.on(q.device)
        stream = torch.cuda.current_stream(q.device).cuda_stream
        kv_heads_in_l2 = max(1, (EVEN_L2_BYTES if table.even else L2_BYTES) // (Sk * (D + Dv) * 2))
        acc, lse_in = before
        params = _PARAMS.pack(
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            result.data_ptr(),
            acc.data_ptr(),
            lse_in.data_ptr(),
            lse.data_ptr(),
            items.data_ptr(),
            runs.data_ptr(),
            extra.data_ptr(),
            _counter(q.device, stream).data_ptr(),
            *_strides(q),
            *_strides(k),
            *_strides(v),
            *_strides(result),
            *_strides(acc),
            *_lse_strides(lse_in),
            *_lse_strides(lse),
            B,
            Sq,
            Sk,
            H,
            Hkv,
            D,
            Dv,
            len(table.items),
            ops.DTYPES[q.dtype],
            start,
            finish,
            min(B * H, kv_heads_in_l2 * (H // Hkv)),
            max(1, _multiprocessors(q.device) - self.sm_margin),
            scale,
            softcap,
            variant,
        )
        ops.check(lib, "rf_hopper_forward", lib.rf_hopper_forward(params, stream))

    def _see_nothing(self, q: Tensor, head_dim_v: int, carry: State | None, finish: bool, sinks: Tensor | None) -> State:
        """The step without a visible pair: the running state as it is, or the unit (0, -inf or the sinks)."""
        if carry is not None:
            return (carry[0].to(q.dtype), carry[1]) if finish else carry
        B, Sq, H, _ = q.shape
        out = torch.zeros((B, Sq, H, head_dim_v), dtype=q.dtype if finish else torch.float32, device=q.device)
        lse = torch.full((B, H, Sq), -torch.inf, dtype=torch.float32, device=q.device)
        return out, lse if sinks is None else lse.copy_(sinks[None, :, None].expand(B, H, Sq))

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
        delta: Tensor,
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
