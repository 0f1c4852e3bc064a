"""Attention on the CUDA kernels that torch ships: FlashAttention-2 for any window, cuDNN where it is faster and can.

cuDNN computes full rectangles and causal squares at 540-600 TFLOP/s (H200, head_dim 128, forward, 16k) where torch's
FlashAttention-2 reaches 320-345; so large Slices without a lower bound are cut into these two shapes. cuDNN prepares an execution
plan for every new shape, so it is only used for few and large Slices, whose shapes repeat from step to step.

Both keep what they load in tiles: a NaN in a key or value also reaches rows of the same Slice and tile that do not see it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ringflash.kernels import Extras, Problem, State
from ringflash.kernels.decompose import (
    UNLIMITED,
    Pack,
    fulls_and_causal_squares,
    is_causal_square,
    is_full,
    lower_bound_matters,
)
from ringflash.kernels.windowed import (
    MAX_HEAD_DIM,
    Call,
    Library,
    WindowedKernel,
    launches,
    round_up,
    same_width,
    width_with_delta,
)
from ringflash.slices import Slice, Slices

_flash_forward = torch.ops.aten._flash_attention_forward.default
_flash_backward = torch.ops.aten._flash_attention_backward.default
_cudnn_forward = torch.ops.aten._scaled_dot_product_cudnn_attention.default
_cudnn_backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default

DTYPES = (torch.bfloat16, torch.float16)

CUDNN_SIDE = 128
"""Rows and keys from which on cuDNN is used; below, its lead is gone and its execution plans would be many."""

CUT_AREA = 1 << 22
"""Scores of a causal-like Slice from which on several cuDNN calls beat one of FlashAttention-2."""


_POSITIONS = {
    _flash_forward: "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal return_debug_mask",
    _flash_backward: "grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q max_k dropout_p is_causal * *",
    _cudnn_forward: "query key value attn_bias compute_log_sumexp dropout_p is_causal return_debug_mask",
    _cudnn_backward: "grad_out query key value out logsumexp * * attn_bias cum_seq_q cum_seq_k max_q max_k dropout_p is_causal",
}
"""The positional arguments that the calls below rely on; * stands for the state of a random generator, whose name varies."""


@cache
def _unexpected(operator: Any) -> str | None:
    """How this torch's operator differs from what is called below, in words, or None: its interface is not a stable one."""
    arguments = operator._schema.arguments
    names = [argument.name for argument in arguments if not argument.kwarg_only]
    expected = _POSITIONS[operator].split()
    same = len(names) == len(expected) and all(b in (a, "*") for a, b in zip(names, expected, strict=True))
    keywords = {argument.name for argument in arguments if argument.kwarg_only}
    needed = {"scale"} if operator in (_cudnn_forward, _cudnn_backward) else {"scale", "window_size_left", "window_size_right"}
    return None if same and needed <= keywords else f"torch {torch.__version__} has other arguments in {operator._schema}"


@cache
def _no_random_state(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The dropout arguments of a backward without dropout: never read, but they must be there."""
    return torch.zeros(2, dtype=dtype, device=device), torch.zeros((), dtype=dtype, device=device)


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """torch's FlashAttention-2 backward has no argument for it: it asks the global switch."""
    enabled, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if not wanted or (enabled and not warn_only):
        yield
        return
    settings: Any = torch.utils.deterministic
    fill, settings.fill_uninitialized_memory = settings.fill_uninitialized_memory, False  # it would overwrite every allocation
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        settings.fill_uninitialized_memory = fill


class Shape(NamedTuple):
    """What decides, beside lengths, whether cuDNN can."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int
    head_dim_v: int

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor) -> Shape:
        """q, k, v: (..., H, D)."""
        return cls(q.device, q.dtype, q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1])


@cache
def _cudnn_can(shape: Shape, needs_grad: bool, enabled: bool) -> bool:
    """Asks torch, whose answer depends on its version, cuDNN's and the device. enabled: the user's switch, part of the key."""
    if not enabled or _unexpected(_cudnn_forward) or _unexpected(_cudnn_backward):
        return False
    if torch.cuda.get_device_capability(shape.device)[0] < 9:  # on older devices FlashAttention-2 is as fast
        return False

    def sample(heads: int, head_dim: int) -> Tensor:
        x = torch.empty(1, 2 * CUDNN_SIDE, heads, head_dim, dtype=shape.dtype, device=shape.device)
        return x.transpose(1, 2).requires_grad_(needs_grad)

    q, k = sample(shape.heads, shape.head_dim), sample(shape.kv_heads, shape.head_dim)
    v = sample(shape.kv_heads, shape.head_dim_v)
    params = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, shape.heads != shape.kv_heads)
    return bool(torch.backends.cuda.can_use_cudnn_attention(params, False))


def _cudnn_wanted(shape: Shape, backward: bool, deterministic: bool) -> bool:
    if backward and (deterministic or torch.are_deterministic_algorithms_enabled()):
        return False
    return _cudnn_can(shape, backward, torch.backends.cuda.cudnn_sdp_enabled())


@cache
def _cudnn_lse_dims(device: torch.device) -> int:
    """3 or 4: some versions of torch return and take cuDNN's lse as (B, H, S), others as (B, H, S, 1)."""
    x = torch.zeros(1, 1, CUDNN_SIDE, 64, dtype=torch.bfloat16, device=device)
    return int(_cudnn_forward(x, x, x, None, True, 0.0, False, False)[1].dim())


def _dense_like(x: Tensor, order_of: Tensor) -> Tensor:
    """x with strides without gaps, its dims in memory in the order of ``order_of``'s; a copy if it is not so.

    torch caches cuDNN's backward plans by the strides of q, k and v alone and takes those of out and dout from the first call:
    other strides would be read wrongly. So they always get the layout that the forward operator gives its output.
    """
    strides = order_of.stride()
    order = sorted(range(x.dim()), key=lambda dim: -strides[dim])
    dense = x.permute(order).contiguous()
    inverse = [order.index(dim) for dim in range(x.dim())]
    return dense.permute(inverse)


@lru_cache(maxsize=1024)
def _cut(slices: Slices) -> tuple[Slice | Pack, ...]:
    """The calls, with large causal-like Slices cut into the shapes of cuDNN."""
    found: list[Slice | Pack] = []
    for launch in launches(slices):
        found.extend([launch] if isinstance(launch, Pack) or not _gains_by_cutting(launch) else fulls_and_causal_squares(launch))
    return tuple(found)


def _gains_by_cutting(s: Slice) -> bool:
    if is_full(s) or is_causal_square(s) or lower_bound_matters(s):
        return False
    return (s.q1 - s.q0) * (s.k1 - s.k0) >= CUT_AREA


class Torch:
    """torch's own operators as a library: cuDNN for what it is asked for, FlashAttention-2 for everything else."""

    takes_delta = False

    def launches(
        self, slices: Slices, q: Tensor, k: Tensor, v: Tensor, backward: bool, deterministic: bool
    ) -> Sequence[Slice | Pack]:
        return _cut(slices) if _cudnn_wanted(Shape.of(q, k, v), backward, deterministic) else launches(slices)

    def _takes_cudnn(self, q: Tensor, k: Tensor, v: Tensor, call: Call, backward: bool) -> bool:
        if call.sequences is not None or not call.repeated or min(q.shape[1], k.shape[1]) < CUDNN_SIDE:
            return False
        full = call.left == UNLIMITED and call.right == UNLIMITED
        causal_square = call.left == UNLIMITED and call.right == 0 and q.shape[1] == k.shape[1]
        return (full or causal_square) and _cudnn_wanted(Shape.of(q, k, v), backward, call.deterministic)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> State:
        if self._takes_cudnn(q, k, v, call, backward=False):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            out, lse = _cudnn_forward(q, k, v, None, True, 0.0, call.right == 0, False, scale=call.scale)[:2]
            return out.transpose(1, 2), lse.squeeze(-1) if lse.dim() == 4 else lse
        width_v = v.shape[-1]
        q, k, v = same_width(q, k, v)
        out, lse = _flash_forward(q, k, v, *_lengths(q, k, call), 0.0, False, False, **_window(call))[:2]
        return out[..., :width_v], lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, lse: Tensor, delta: Tensor | None, call: Call
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert out is not None
        if self._takes_cudnn(q, k, v, call, backward=True):
            dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
            dout, out = _dense_like(dout, q), _dense_like(out, q)
            if _cudnn_lse_dims(q.device) == 4:
                lse = lse.unsqueeze(-1)
            rest = (*_no_random_state(q.device, torch.int64), None, None, None, q.shape[2], k.shape[2])
            grads = _cudnn_backward(dout, q, k, v, out, lse, *rest, 0.0, call.right == 0, scale=call.scale)
            dq, dk, dv = (x.transpose(1, 2) for x in grads)
            return dq, dk, dv
        q, k, v, dout, out = same_width(q, k, v, dout, out)
        lengths, random = _lengths(q, k, call), _no_random_state(q.device, torch.uint64)
        with _deterministic(call.deterministic):
            dq, dk, dv = _flash_backward(dout, q, k, v, out, lse, *lengths, 0.0, False, *random, **_window(call))
        return dq, dk, dv


def _lengths(q: Tensor, k: Tensor, call: Call) -> tuple[Tensor | None, Tensor | None, int, int]:
    """(cum_seq_q, cum_seq_k, max_q, max_k)"""
    if call.sequences is None:
        return None, None, q.shape[1], k.shape[1]
    return call.sequences.cu_q, call.sequences.cu_k, call.sequences.max_q, call.sequences.max_k


def _window(call: Call) -> dict[str, Any]:
    return {"scale": call.scale, "window_size_left": call.left, "window_size_right": call.right}


LIBRARY = Torch()


class Sdpa(WindowedKernel):
    """torch's FlashAttention-2 and cuDNN kernels."""

    name = "sdpa"
    extras = Extras()

    def library_for(self, q: Tensor) -> Library:
        return LIBRARY

    def refuses(self, problem: Problem) -> str | None:
        if problem.device != "cuda" or problem.capability is None:
            return f"needs a CUDA device, got {problem.device}"
        if problem.capability < (8, 0):
            return f"needs compute capability 8.0 or later, this device has {problem.capability[0]}.{problem.capability[1]}"
        if problem.dtype not in DTYPES:
            return f"needs bfloat16 or float16, got {str(problem.dtype).removeprefix('torch.')}"
        if problem.softcap:
            return "torch's kernels have no softcap"
        if round_up(max(problem.head_dim, problem.head_dim_v)) > MAX_HEAD_DIM:
            return f"needs head dims up to {MAX_HEAD_DIM}, got {problem.head_dim} and {problem.head_dim_v}"
        dims = f"{problem.head_dim} and {problem.head_dim_v}"
        if problem.dlse and problem.needs_grad and width_with_delta(problem.head_dim, problem.head_dim_v) > MAX_HEAD_DIM:
            return f"the gradient of the log-sum-exp needs head dims up to {MAX_HEAD_DIM - 8}, got {dims}"
        return _unexpected(_flash_forward) or _unexpected(_flash_backward)


KERNEL = Sdpa()
