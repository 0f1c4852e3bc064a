"""The device library and the torch operators over it.

``libringflash_cuda.so`` has a C ABI (``csrc/api.h``): pointers, sizes, strides and a stream in, an error code out. It is loaded
with ctypes and knows nothing of torch; this module gives its functions torch schemas, fakes for tracing, and a pure torch
implementation for every device and dtype that the library does not cover.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.resources
import os
from pathlib import Path

import torch
from torch import Tensor

from ringflash import env
from ringflash.merge import merge_torch_
from ringflash.streams import current_handle

ABI_VERSION = 1
"""Must equal ``RF_ABI_VERSION`` in ``csrc/api.h``."""

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""``RfDtype`` of ``csrc/params.h``."""


class Strides(ctypes.Structure):
    """``RfStrides``: strides, in elements, of a (B, S, H, D) or a (B, H, S) tensor."""

    _fields_ = [("batch", ctypes.c_int64), ("seq", ctypes.c_int64), ("head", ctypes.c_int64)]

    @classmethod
    def of_rows(cls, x_BSHD: Tensor) -> Strides:
        """Of a tensor (B, S, H, D)."""
        return cls(x_BSHD.stride(0), x_BSHD.stride(1), x_BSHD.stride(2))

    @classmethod
    def of_lse(cls, lse_BHS: Tensor) -> Strides:
        """Of a tensor (B, H, S)."""
        return cls(lse_BHS.stride(0), lse_BHS.stride(2), lse_BHS.stride(1))


class MergeParams(ctypes.Structure):
    """``RfMergeParams`` of ``csrc/params.h``."""

    _fields_ = [
        ("out", ctypes.c_void_p),
        ("lse", ctypes.c_void_p),
        ("out_part", ctypes.c_void_p),
        ("lse_part", ctypes.c_void_p),
        ("out_strides", Strides),
        ("lse_strides", Strides),
        ("out_part_strides", Strides),
        ("lse_part_strides", Strides),
        ("batch", ctypes.c_int64),
        ("seq", ctypes.c_int64),
        ("heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("out_part_dtype", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    ]


def _library_file() -> Path | None:
    """The library to load: the one ``RINGFLASH_LIBRARY`` names, else the package's own, else None."""
    if (chosen := env.library_path()) is not None:
        return chosen
    # Not beside __file__: an editable install keeps the sources and the built library in different folders.
    packaged = importlib.resources.files("ringflash") / "_lib" / "libringflash_cuda.so"
    return Path(os.fspath(packaged)) if isinstance(packaged, os.PathLike) and packaged.is_file() else None


@functools.cache
def library() -> ctypes.CDLL | None:
    """The device library, or None if this installation has none (built without nvcc).

    Loading needs no GPU. RuntimeError if the library was built from other sources than this module (another ABI version).
    """
    path = _library_file()
    if path is None:
        return None
    lib = ctypes.CDLL(str(path))
    lib.rf_abi_version.argtypes = []
    lib.rf_abi_version.restype = ctypes.c_int
    if (found := lib.rf_abi_version()) != ABI_VERSION:
        remedy = f"reinstall ringflash, or unset {env.LIBRARY.name}"
        raise RuntimeError(f"{path} has ABI version {found}, this ringflash needs {ABI_VERSION}; {remedy}")
    lib.rf_error_string.argtypes = [ctypes.c_int]
    lib.rf_error_string.restype = ctypes.c_char_p
    lib.rf_has_hopper.argtypes = []
    lib.rf_has_hopper.restype = ctypes.c_int
    lib.rf_merge.argtypes = [ctypes.POINTER(MergeParams), ctypes.c_void_p]
    lib.rf_merge.restype = ctypes.c_int
    return lib


def check(lib: ctypes.CDLL, function: str, code: int) -> None:
    """RuntimeError naming the function and the reason unless ``code`` is 0."""
    if code:
        raise RuntimeError(f"{function}: {lib.rf_error_string(code).decode()} (code {code})")


LIBRARY = torch.library.Library("ringflash", "DEF")
"""Owner of the namespace ``torch.ops.ringflash``."""

LIBRARY.define(
    "merge_(Tensor(a!) out, Tensor(b!) lse, Tensor out_part, Tensor lse_part) -> ()",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)


def _check_merge(out: Tensor, lse: Tensor, out_part: Tensor, lse_part: Tensor) -> None:
    """ValueError unless the four tensors fit each other; the same for every implementation."""
    if out.dim() != 4 or out_part.shape != out.shape:
        raise ValueError(f"merge_: out {tuple(out.shape)} and out_part {tuple(out_part.shape)} must have one shape (B, S, H, D)")
    B, S, H, _ = out.shape
    if lse.shape != (B, H, S) or lse_part.shape != (B, H, S):
        given = f"lse {tuple(lse.shape)} and lse_part {tuple(lse_part.shape)}"
        raise ValueError(f"merge_: {given} must have the shape (B, H, S) = {(B, H, S)}")
    if out.dtype not in (torch.float32, torch.float64) or lse.dtype != out.dtype or lse_part.dtype != out.dtype:
        given = f"out is {out.dtype}, lse {lse.dtype}, lse_part {lse_part.dtype}"
        raise ValueError(f"merge_: {given}; all three must be float32, or all three float64")
    if not out_part.dtype.is_floating_point:
        raise ValueError(f"merge_: out_part is {out_part.dtype}; give a floating dtype")
    if len({out.device, lse.device, out_part.device, lse_part.device}) != 1:
        given = ", ".join(str(x.device) for x in (out, lse, out_part, lse_part))
        raise ValueError(f"merge_: out, lse, out_part, lse_part are on {given}; put all four on one device")
    if out.shape[3] > 1 and out.stride(3) != 1:
        raise ValueError(f"merge_: the last dim of out must be contiguous, its strides are {tuple(out.stride())}")


def _merge_anywhere(out: Tensor, lse: Tensor, out_part: Tensor, lse_part: Tensor) -> None:
    """The merge in plain torch, on any device and dtype."""
    _check_merge(out, lse, out_part, lse_part)
    merge_torch_(out, lse, out_part, lse_part)


def _merge_cuda(out: Tensor, lse: Tensor, out_part: Tensor, lse_part: Tensor) -> None:
    """The library's fused pass for a float32 state; plain torch for a float64 state and for an installation without library."""
    lib = library()
    if lib is None or out.dtype != torch.float32 or out_part.dtype not in DTYPES:
        _merge_anywhere(out, lse, out_part, lse_part)
        return
    _check_merge(out, lse, out_part, lse_part)
    B, S, H, D = out.shape
    if out_part.stride(3) != 1 and D > 1:
        out_part = out_part.contiguous()
    params = MergeParams(
        out=out.data_ptr(),
        lse=lse.data_ptr(),
        out_part=out_part.data_ptr(),
        lse_part=lse_part.data_ptr(),
        out_strides=Strides.of_rows(out),
        lse_strides=Strides.of_lse(lse),
        out_part_strides=Strides.of_rows(out_part),
        lse_part_strides=Strides.of_lse(lse_part),
        batch=B,
        seq=S,
        heads=H,
        head_dim=D,
        out_part_dtype=DTYPES[out_part.dtype],
    )
    with torch.cuda.device(out.device):
        stream = current_handle(out.device.index)
        check(lib, "rf_merge", lib.rf_merge(ctypes.byref(params), stream))


LIBRARY.impl("merge_", _merge_anywhere, "CompositeExplicitAutograd")
LIBRARY.impl("merge_", _merge_cuda, "CUDA")
torch.library.register_fake("ringflash::merge_", _check_merge, lib=LIBRARY)
