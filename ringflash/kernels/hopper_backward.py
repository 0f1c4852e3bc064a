"""Backward of our Hopper kernels (csrc/hopper/backward*): gradients added into caller-owned float32 tensors; and delta."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ringflash import ops
from ringflash.kernels import streams
from ringflash.kernels.tiles_backward import MAX_SLOTS, Shape, WorkList, work_list
from ringflash.slices import Slices
from ringflash.streams import current_handle

if TYPE_CHECKING:
    from ringflash.kernels import Problem

DTYPES = (torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256
PORTION_BYTES = tuple((dim, MAX_SLOTS * 2 * 128 * dim * 4) for dim in (64, 96, 128))
"""By head dim, up to: the most that partial sums of a launch take, float32 dk and dv of 128 keys each (``kPortion`` of
csrc/hopper/backward_tiles.h; a pair's are twice as many, and half as many fit MAX_SLOTS). Larger head dims divide no item."""
TURN_ROWS = 64
"""The fewest queries of a tile; of each, and each head, a deterministic launch counts the turns: 4 bytes, 8 for pairs."""

_POINTERS, _REST = struct.Struct("=18Q"), struct.Struct("=25q10i2f2i")
"""``RfHopperBackwardParams`` of csrc/hopper/backward_api.h."""
_DELTA, _ROUND = struct.Struct("=4Q14q4iQq"), struct.Struct("=2Qq2i")
"""``RfDeltaParams`` and ``RfRoundParams`` of the same."""


@cache
def _library() -> ctypes.CDLL | None:
    """The device library with the backward's entry points declared; None if this installation has none."""
    lib = ops.library()
    if lib is None or not lib.rf_has_hopper():
        return None
    lib.rf_hopper_backward.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
    lib.rf_hopper_backward.restype = ctypes.c_int
    int32_pointer = ctypes.POINTER(ctypes.c_int32)
    lib.rf_hopper_backward_tile.argtypes = [ctypes.c_int32, ctypes.c_int32, *[int32_pointer] * 4]
    lib.rf_hopper_backward_tile.restype = ctypes.c_int
    lib.rf_delta.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
    lib.rf_delta.restype = ctypes.c_int
    lib.rf_round.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
    lib.rf_round.restype = ctypes.c_int
    return lib


def refuses(problem: Problem) -> str | None:
    """Why the backward cannot do it; None if it can. What the forward has checked is not checked again."""
    for word, size in (("head_dim", problem.head_dim), ("head_dim of v", problem.head_dim_v)):
        if size % 8 or not 0 < size <= MAX_HEAD_DIM:
            return f"its backward needs a {word} that is a multiple of 8 up to {MAX_HEAD_DIM}, got {size}"
    return None


@cache
def _tile(head_dim: int, head_dim_v: int) -> tuple[int, int, bool, int]:
    """Queries and keys of the tiles of the kernel of these head dims, whether two CTAs can share twice the keys, and the float32
    values of a portion of an item that the kernel sums; 0: none is divided."""
    lib = _library()
    assert lib is not None
    found = [ctypes.c_int32() for _ in range(4)]
    code = lib.rf_hopper_backward_tile(head_dim, head_dim_v, *map(ctypes.byref, found))
    ops.check(lib, "rf_hopper_backward_tile", code)
    rows, keys, pairs, portion = (x.value for x in found)
    return rows, keys, bool(pairs), portion


def _fits(x_BSHD: Tensor, vector: int) -> bool:
    """Whether rows of x are aligned to 16 bytes (``vector`` elements) and no dim of more than one element has stride 0."""
    if x_BSHD.data_ptr() % 16 or x_BSHD.stride(3) != 1:
        return False
    return all(n == 1 or (s > 0 and s % vector == 0) for n, s in zip(x_BSHD.shape[:3], x_BSHD.stride()[:3], strict=True))


def _readable(x_BSHD: Tensor) -> Tensor:
    """x, or a copy where the copy engine cannot read it."""
    return x_BSHD if _fits(x_BSHD, 8) else x_BSHD.clone(memory_format=torch.contiguous_format)


def _strides(shape: Sequence[int], stride: Sequence[int]) -> tuple[int, int, int]:
    """B, S, H in elements; torch lets a dim of one element carry any stride, the copy engine wants a plausible one."""
    B, S, H, D = shape
    b, s, h, _ = stride
    h = h if H > 1 else D
    s = s if S > 1 else H * h
    return (b if B > 1 else S * s), s, h


def _rows(x_BHS: Tensor) -> Tensor:
    return x_BHS if x_BHS.stride(2) == 1 or x_BHS.shape[2] == 1 else x_BHS.contiguous()


def backward(
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
    sm_margin: int = 0,
) -> None:
    """Adds the gradients of the Slices into float32 dq, dk, dv; the contract is ``ringflash.kernels.Kernel.backward``.

    ``sm_margin`` multiprocessors are left free. Gradients whose rows are not 16-byte aligned cost a temporary. With
    ``deterministic`` gradients repeat bitwise on one kind of GPU: additions to a tile of dq take turns, for which 4 or 8 bytes
    per tile, head and batch are used, and the last items are divided (some 90 MiB of partial sums where items are about equally
    long, PORTION_BYTES at most, whatever the length).
    ValueError for a scale that is not positive.
    """
    if not scale > 0.0:
        raise ValueError(f"scale={scale}: the Hopper kernels need a positive scale; use backend='reference' or negate q")
    if q.numel() == 0 or k.numel() == 0 or len(slices) == 0:
        return
    targets = [x if _fits(x, 4) else torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (dq, dk, dv)]
    with torch.cuda.device(q.device):
        inputs = [_readable(x) for x in (dout, q, k, v)]
        work = _work(q, k, v, slices, deterministic, False, sm_margin)
        _launch(work, inputs, _rows(lse), _rows(delta), targets, scale, softcap, sm_margin)
    for target, x in zip(targets, (dq, dk, dv), strict=True):
        if target is not x:
            x.add_(target)


def gradients(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    slices: Slices,
    *,
    scale: float,
    softcap: float = 0.0,
    row_delta: Tensor | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) in q's dtype of a pass that is one step: the whole backward, with delta, zeroing and conversion.

    dk and dv are written in their final dtype where that is faster, which spares zeroing, adding to and converting float32
    tensors. Shapes as ``ringflash.kernels.Kernel.backward``. ``row_delta``: delta (B, H, Sq) where the caller already has it,
    perhaps with a dlse in it; else delta(dout, out).
    """
    if not scale > 0.0:
        raise ValueError(f"scale={scale}: the Hopper kernels need a positive scale; use backend='reference' or negate q")
    if q.numel() == 0 or k.numel() == 0 or len(slices) == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    with torch.cuda.device(q.device):
        work, write = _work_of_a_pass(slices, q.device, q.shape, k.shape, v.shape[3], deterministic, sm_margin)
        every_key = work.whole == -(-k.shape[1] // work.keys) * k.shape[0] * k.shape[2]
        new = torch.empty if write and every_key else torch.zeros
        dk, dv = (new(x.shape, dtype=q.dtype if write else torch.float32, device=x.device) for x in (k, v))
        dq = torch.empty(q.shape, dtype=torch.float32, device=q.device)
        inputs = [_readable(x) for x in (dout, q, k, v)]
        if row_delta is None:
            row_delta = _delta(inputs[0], _readable(out), None, zeros=dq)
        else:
            dq.zero_()
        _launch(work, inputs, _rows(lse), _rows(row_delta), [dq, dk, dv], scale, softcap, sm_margin)
        return _rounded(dq, q.dtype), _rounded(dk, q.dtype), _rounded(dv, q.dtype)


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous x in a 2-byte dtype; x itself if it has it already."""
    if x.dtype == dtype:
        return x
    result = torch.empty(x.shape, dtype=dtype, device=x.device)
    lib = _library()
    assert lib is not None
    params = _ROUND.pack(x.data_ptr(), result.data_ptr(), x.numel(), ops.DTYPES[dtype], 0)
    ops.check(lib, "rf_round", lib.rf_round(params, current_handle(x.device.index)))
    return result


@lru_cache(maxsize=512)
def _work_of_a_pass(
    slices: Slices,
    device: torch.device,
    q_shape: Sequence[int],
    k_shape: Sequence[int],
    head_dim_v: int,
    deterministic: bool,
    sm_margin: int,
) -> tuple[WorkList, bool]:
    """The work list of a pass of one step, and whether it writes dk and dv."""
    written = _work_of(slices, device, q_shape, k_shape, head_dim_v, deterministic, True, sm_margin)
    if deterministic:
        return written, True
    added = _work_of(slices, device, q_shape, k_shape, head_dim_v, False, False, sm_margin)
    return (written, True) if written.duration <= added.duration else (added, False)


@lru_cache(maxsize=512)
def _work_of(
    slices: Slices,
    device: torch.device,
    q_shape: Sequence[int],
    k_shape: Sequence[int],
    head_dim_v: int,
    deterministic: bool,
    write: bool,
    sm_margin: int,
) -> WorkList:
    B, Sq, H, D = q_shape
    ctas = max(1, streams.multiprocessors(device) - sm_margin)
    rows, keys, pairs, portion = _tile(D, head_dim_v)
    narrow = portion > 0  # backward_narrow.cuh
    shape = Shape(Sq, k_shape[1], B, H, k_shape[2], D, rows, keys, ctas, pairs, portions=narrow, halves=narrow)
    return work_list(slices, shape, deterministic=deterministic, write=write)


def _work(q: Tensor, k: Tensor, v: Tensor, slices: Slices, deterministic: bool, write: bool, sm_margin: int) -> WorkList:
    return _work_of(slices, q.device, q.shape, k.shape, v.shape[3], deterministic, write, sm_margin)


def forget_lists() -> None:
    """For whoever changes what lists are made by."""
    for cached in (work_list, _work_of, _work_of_a_pass):
        cached.cache_clear()


@lru_cache(maxsize=512)
def _rest(
    work: WorkList,
    shapes: tuple[Sequence[int], ...],  # of dout, q, k, v
    strides: tuple[Sequence[int], ...],  # of dout, q, k, v, dq, dk, dv
    row_strides: tuple[Sequence[int], ...],  # of lse, delta
    dtype: torch.dtype,
    write: bool,
    scale: float,
    softcap: float,
    ctas: int,
) -> bytes:
    """What a launch is made of besides addresses."""
    (_, Sq, _, Dv), (B, _, H, D), (_, Sk, Hkv, _) = shapes[:3]
    return _REST.pack(
        *(n for shape, stride in zip((*shapes, *shapes[1:]), strides, strict=True) for n in _strides(shape, stride)),
        *(n for stride in row_strides for n in stride[:2]),
        B,
        Sq,
        Sk,
        H,
        Hkv,
        D,
        Dv,
        len(work.items),
        ops.DTYPES[dtype],
        min(ctas // 2 if work.pairs else ctas, len(work.items)),
        scale,
        softcap,
        write,
        work.pairs,
    )


def partial_sums(work: WorkList, head_dim: int, head_dim_v: int) -> int:
    """float32 values in which a launch sums what it divides."""
    *_, portion = _tile(head_dim, head_dim_v)
    return work.slots * (2 if work.pairs else 1) * portion


def _launch(
    work: WorkList,
    inputs: list[Tensor],
    lse: Tensor,
    delta: Tensor,
    gradients: list[Tensor],
    scale: float,
    softcap: float,
    sm_margin: int,
) -> None:
    """dk and dv of q's dtype are written, those of float32 added to."""
    dout, q, k, v = inputs
    dq, dk, dv = gradients
    lib = _library()
    assert lib is not None
    B, Sq, H, D = q.shape
    rows, *_ = _tile(D, v.shape[3])
    if not len(work.items):
        return
    items, runs, bands, *order = work.on(q.device)
    ways = 2 if work.pairs else 1
    turns = torch.zeros(B * H * -(-Sq // rows) * ways, dtype=torch.int32, device=q.device) if order else None
    portions = torch.empty(partial_sums(work, D, v.shape[3]), dtype=torch.float32, device=q.device) if work.slots else None
    stream = current_handle(q.device.index)
    counters = streams.counters(q.device, stream, 1 + 2 * MAX_SLOTS).data_ptr()  # of items taken, and of portions done
    pointers = _POINTERS.pack(
        dout.data_ptr(),
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        lse.data_ptr(),
        delta.data_ptr(),
        dq.data_ptr(),
        dk.data_ptr(),
        dv.data_ptr(),
        items.data_ptr(),
        runs.data_ptr(),
        bands.data_ptr(),
        *((x.data_ptr() for x in order) if order else (0, 0)),
        turns.data_ptr() if turns is not None else 0,
        portions.data_ptr() if portions is not None else 0,
        counters + 4,
        counters,
    )
    rest = _rest(
        work,
        (dout.shape, q.shape, k.shape, v.shape),
        (dout.stride(), q.stride(), k.stride(), v.stride(), dq.stride(), dk.stride(), dv.stride()),
        (lse.stride(), delta.stride()),
        q.dtype,
        dk.dtype == q.dtype,
        scale,
        softcap,
        max(1, streams.multiprocessors(q.device) - sm_margin),
    )
    ops.check(lib, "rf_hopper_backward", lib.rf_hopper_backward(pointers + rest, stream))


DELTA_ROWS = 512
"""Rows of a block of delta in plain torch."""


def delta(dout: Tensor, out: Tensor, dlse: Tensor | None = None) -> Tensor:
    """``rowsum(dout * out) - dlse`` in float32 (B, H, S): what a row's softmax gradient subtracts; once per backward pass.

    dout, out: (B, S, H, D) of one dtype; dlse: (B, H, S) or None. One pass over memory where the device library is present.
    """
    return torch.ops.ringflash.delta(dout, out, dlse)  # type: ignore[no-any-return]


def _check_delta(dout: Tensor, out: Tensor, dlse: Tensor | None) -> None:
    if dout.dim() != 4 or dout.shape != out.shape or dout.dtype != out.dtype:
        given = f"dout {tuple(dout.shape)} {dout.dtype} and out {tuple(out.shape)} {out.dtype}"
        raise ValueError(f"delta: {given} must have one shape (B, S, H, D) and one dtype")
    B, S, H, _ = dout.shape
    if dlse is not None and dlse.shape != (B, H, S):
        raise ValueError(f"delta: dlse {tuple(dlse.shape)} must have the shape (B, H, S) = {(B, H, S)}")


def _delta_reference(dout: Tensor, out: Tensor, dlse: Tensor | None) -> Tensor:
    """delta in plain torch: float64 for float64 inputs, else float32."""
    _check_delta(dout, out, dlse)
    acc = torch.float64 if out.dtype == torch.float64 else torch.float32
    B, S, H, _ = out.shape
    result = torch.empty((B, H, S), dtype=acc, device=out.device)
    for rows in (slice(i, i + DELTA_ROWS) for i in range(0, S, DELTA_ROWS)):  # three float32 copies of all rows would be the peak
        torch.sum(dout[:, rows].to(acc) * out[:, rows].to(acc), dim=-1, out=result[:, :, rows].transpose(1, 2))
    return result if dlse is None else result.sub_(dlse)


@cache
def _is_hopper(device: torch.device) -> bool:
    """Our kernels are compiled for Hopper alone, and delta is asked for whatever the device and backend."""
    return torch.cuda.get_device_capability(device) == (9, 0)


def _delta_cuda(dout: Tensor, out: Tensor, dlse: Tensor | None) -> Tensor:
    return _delta(dout, out, dlse)


def _delta(dout: Tensor, out: Tensor, dlse: Tensor | None, zeros: Tensor | None = None) -> Tensor:
    """delta; ``zeros``, a contiguous tensor of a multiple of 16 bytes, becomes zeros in the same pass over memory."""
    lib = _library() if _is_hopper(out.device) else None
    vector = 16 // out.element_size()
    if lib is None or out.dtype not in ops.DTYPES or out.shape[3] % 8 or not (_fits(dout, vector) and _fits(out, vector)):
        if zeros is not None:
            zeros.zero_()
        return _delta_reference(dout, out, dlse)
    _check_delta(dout, out, dlse)
    B, S, H, D = out.shape
    result = torch.empty((B, H, S), dtype=torch.float32, device=out.device)
    dlse = dlse if dlse is None else dlse.float()
    params = _DELTA.pack(
        dout.data_ptr(),
        out.data_ptr(),
        0 if dlse is None else dlse.data_ptr(),
        result.data_ptr(),
        *dout.stride()[:3],
        *out.stride()[:3],
        *(n for x in (result if dlse is None else dlse, result) for n in (x.stride(0), x.stride(2), x.stride(1))),
        B,
        S,
        H,
        D,
        ops.DTYPES[out.dtype],
        0,
        0 if zeros is None else zeros.data_ptr(),
        0 if zeros is None else zeros.nbytes // 16,
    )
    with torch.cuda.device(out.device):
        ops.check(lib, "rf_delta", lib.rf_delta(params, current_handle(out.device.index)))
    return result


def _delta_fake(dout: Tensor, out: Tensor, dlse: Tensor | None) -> Tensor:
    _check_delta(dout, out, dlse)
    B, S, H, _ = out.shape
    return out.new_empty((B, H, S), dtype=torch.float64 if out.dtype == torch.float64 else torch.float32)


ops.LIBRARY.define("delta(Tensor dout, Tensor out, Tensor? dlse) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
ops.LIBRARY.impl("delta", _delta_reference, "CompositeExplicitAutograd")
ops.LIBRARY.impl("delta", _delta_cuda, "CUDA")
torch.library.register_fake("ringflash::delta", _delta_fake, lib=ops.LIBRARY)
