"""Attention on the flash-attn that the user installed: FlashAttention-4 (CuTe), 3 (Hopper) or 2, the newest that fits the device.

ringflash does not depend on any of them. What is used of their Python interfaces is looked up when first needed, by argument
name: a version without one of the names is refused with that reason, not called with a guess.

They keep what they load in tiles: a NaN in a key or value also reaches rows of the same Slice and tile that do not see it.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from ringflash.kernels import Extras, Problem, State
from ringflash.kernels.decompose import UNLIMITED, Pack
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

DTYPES = (torch.bfloat16, torch.float16)

MODULES = {4: "flash_attn.cute.interface", 3: "flash_attn_interface", 2: "flash_attn.flash_attn_interface"}


@cache
def installed_generations() -> tuple[int, ...]:
    """The generations of flash-attn that are installed, newest first. Whether they can be imported shows when one is used."""
    return tuple(generation for generation, module in MODULES.items() if _is_installed(module))


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # the parent package is missing, or is there and cannot be imported
        return False


def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    """Argument names. torch.library.custom_op keeps the Python function that it wraps in ``_init_fn``."""
    return frozenset(inspect.signature(getattr(function, "_init_fn", function)).parameters)


class Generation(ABC):
    """One flash-attn library: what all of them share."""

    number: ClassVar[int]
    takes_delta = False
    functions: ClassVar[dict[str, tuple[str, ...]]]
    """The functions used and the arguments that each must have."""

    def __init__(self) -> None:
        module = importlib.import_module(MODULES[self.number])
        for name, needed in self.functions.items():
            function = getattr(module, name, None)
            if function is None:
                raise ImportError(f"{module.__name__} has no {name}")
            if missing := sorted(set(needed) - _parameters(function)):
                raise ImportError(f"{module.__name__}.{name} has no argument {', '.join(missing)}")
        self._module = module

    @staticmethod
    @abstractmethod
    def runs_on(capability: tuple[int, int]) -> bool:
        """Whether the library has kernels for this compute capability."""

    def refuses(self, problem: Problem) -> str | None:
        """What this generation cannot do beyond what none can."""
        return None

    def launches(
        self, slices: Slices, q: Tensor, k: Tensor, v: Tensor, backward: bool, deterministic: bool
    ) -> Sequence[Slice | Pack]:
        return launches(slices)

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> State:
        """As of `windowed.Library`."""

    @abstractmethod
    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, lse: Tensor, delta: Tensor | None, call: Call
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As of `windowed.Library`."""


def _sequences(call: Call) -> dict[str, Any]:
    """The arguments of a variable-length call; none for a dense one."""
    if call.sequences is None:
        return {}
    s = call.sequences
    return {"cu_seqlens_q": s.cu_q, "cu_seqlens_k": s.cu_k, "max_seqlen_q": s.max_q, "max_seqlen_k": s.max_k}


def _empty_gradients(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
    return {name: torch.empty(x.shape, dtype=x.dtype, device=x.device) for name, x in (("dq", q), ("dk", k), ("dv", v))}


_SCORES = ("softmax_scale", "window_size_left", "window_size_right", "softcap")
_GRADIENTS = ("dq", "dk", "dv", "deterministic")
_LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")


class FlashAttention2(Generation):
    """flash-attn 2.7 and later."""

    number = 2
    functions: ClassVar[dict[str, tuple[str, ...]]] = {
        "_flash_attn_forward": ("dropout_p", "causal", *_SCORES, "alibi_slopes", "return_softmax"),
        "_flash_attn_varlen_forward": (*_LENGTHS, "dropout_p", "causal", *_SCORES, "alibi_slopes", "return_softmax"),
        "_flash_attn_backward": ("softmax_lse", *_GRADIENTS, "dropout_p", "causal", *_SCORES, "alibi_slopes"),
        "_flash_attn_varlen_backward": ("softmax_lse", *_GRADIENTS, *_LENGTHS, "dropout_p", "causal", *_SCORES, "alibi_slopes"),
    }

    @staticmethod
    def runs_on(capability: tuple[int, int]) -> bool:
        return capability >= (8, 0)

    def _scores(self, call: Call) -> dict[str, Any]:
        return {
            "dropout_p": 0.0,
            "softmax_scale": call.scale,
            "causal": False,  # a window with right = 0 is the same, and works for every length
            "window_size_left": call.left,
            "window_size_right": call.right,
            "softcap": call.softcap,
            "alibi_slopes": None,
        }

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> State:
        width_v = v.shape[-1]
        q, k, v = same_width(q, k, v)
        function = self._module._flash_attn_forward if call.sequences is None else self._module._flash_attn_varlen_forward
        out, lse = function(q=q, k=k, v=v, **_sequences(call), **self._scores(call), return_softmax=False)[:2]
        return out[..., :width_v], lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, lse: Tensor, delta: Tensor | None, call: Call
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert out is not None
        q, k, v, dout, out = same_width(q, k, v, dout, out)
        grads = _empty_gradients(q, k, v)
        function = self._module._flash_attn_backward if call.sequences is None else self._module._flash_attn_varlen_backward
        function(
            dout=dout,
            q=q,
            k=k,
            v=v,
            out=out,
            softmax_lse=lse,
            **grads,
            **_sequences(call),
            **self._scores(call),
            deterministic=call.deterministic,
        )
        return grads["dq"], grads["dk"], grads["dv"]


class FlashAttention3(Generation):
    """The Hopper kernels of flash-attn (``hopper/``), built from source."""

    number = 3
    functions: ClassVar[dict[str, tuple[str, ...]]] = {
        "_flash_attn_forward": (*_LENGTHS, *_SCORES),
        "_flash_attn_backward": ("softmax_lse", *_GRADIENTS, *_LENGTHS, *_SCORES),
    }

    @staticmethod
    def runs_on(capability: tuple[int, int]) -> bool:
        return capability == (9, 0)

    def refuses(self, problem: Problem) -> str | None:
        if problem.deterministic and problem.needs_grad:
            width = max(problem.head_dim, problem.head_dim_v)
            if (width_with_delta(problem.head_dim, problem.head_dim_v) if problem.dlse else width) > 192:
                return "its deterministic backward needs head dims up to 192"
        return None

    def _scores(self, call: Call) -> dict[str, Any]:
        return {
            "softmax_scale": call.scale,
            "window_size_left": call.left,
            "window_size_right": call.right,
            "softcap": call.softcap,
        }

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> State:
        width_v = v.shape[-1]
        q, k, v = same_width(q, k, v)
        out, lse = self._module._flash_attn_forward(q, k, v, **_sequences(call), **self._scores(call))[:2]
        return out[..., :width_v], lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, lse: Tensor, delta: Tensor | None, call: Call
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert out is not None
        q, k, v, dout, out = same_width(q, k, v, dout, out)
        grads = _empty_gradients(q, k, v)
        self._module._flash_attn_backward(
            dout, q, k, v, out, lse, **grads, **_sequences(call), **self._scores(call), deterministic=call.deterministic
        )
        return grads["dq"], grads["dk"], grads["dv"]


class FlashAttention4(Generation):
    """The CuTe kernels of flash-attn. They differentiate the log-sum-exp, so any delta can be given."""

    number = 4
    takes_delta = True
    functions: ClassVar[dict[str, tuple[str, ...]]] = {
        "_flash_attn_fwd": (*_LENGTHS, *_SCORES, "return_lse"),
        "_flash_attn_bwd": ("lse", *_LENGTHS, *_SCORES, "deterministic", "dlse"),
    }

    @staticmethod
    def runs_on(capability: tuple[int, int]) -> bool:
        return capability[0] in (9, 10, 11)

    def refuses(self, problem: Problem) -> str | None:
        assert problem.capability is not None
        if problem.capability[0] == 9:
            return None
        dims = (round_up(problem.head_dim), round_up(problem.head_dim_v))
        if max(dims) > 128 and dims not in ((192, 128), (256, 256)):
            return f"on this device it needs head dims up to 128, 192/128 or 256, got {problem.head_dim} and {problem.head_dim_v}"
        if dims == (256, 256) and (problem.softcap or (problem.dlse and problem.needs_grad)):
            return "on this device, with head dim 256, it has neither a softcap nor gradients of the log-sum-exp"
        return None

    def _scores(self, call: Call) -> dict[str, Any]:
        return {
            "softmax_scale": call.scale,
            "window_size_left": None if call.left == UNLIMITED else call.left,
            "window_size_right": None if call.right == UNLIMITED else call.right,
            "softcap": call.softcap,
        }

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> State:
        out, lse = self._module._flash_attn_fwd(q, k, v, **_sequences(call), **self._scores(call), return_lse=True)[:2]
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, lse: Tensor, delta: Tensor | None, call: Call
    ) -> tuple[Tensor, Tensor, Tensor]:
        dlse = None
        if out is None:  # it subtracts dlse from rowsum(dout * out), which is 0 here
            assert delta is not None
            out, dlse = torch.zeros_like(dout), -delta
        q, k, v, dout, out = (x.contiguous() for x in (q, k, v, dout, out))
        dq, dk, dv = self._module._flash_attn_bwd(
            q, k, v, out, dout, lse, **_sequences(call), **self._scores(call), deterministic=call.deterministic, dlse=dlse
        )[:3]
        return dq, dk, dv


GENERATIONS: dict[int, type[Generation]] = {4: FlashAttention4, 3: FlashAttention3, 2: FlashAttention2}


def generation_for(capability: tuple[int, int] | None) -> int | None:
    """The newest installed generation with kernels for a device of this compute capability."""
    if capability is None:
        return None
    return next((n for n in installed_generations() if GENERATIONS[n].runs_on(capability)), None)


@cache
def _library(generation: int) -> Generation | str:
    """The library, or why it cannot be used."""
    try:
        return GENERATIONS[generation]()
    except Exception as error:  # a broken build raises anything when imported
        return f"flash-attn {generation} is installed but cannot be used: {type(error).__name__}: {error}"


class FlashAttn(WindowedKernel):
    """flash-attn 2, 3 or 4, as installed."""

    name = "flash_attn"
    extras = Extras()

    def refuses(self, problem: Problem) -> str | None:
        if problem.device != "cuda" or problem.capability is None:
            return f"needs a CUDA device, got {problem.device}"
        if not installed_generations():
            return "flash-attn is not installed"
        generation = generation_for(problem.capability)
        if generation is None:
            found = ", ".join(map(str, installed_generations()))
            major, minor = problem.capability
            return f"the installed flash-attn ({found}) has no kernels for compute capability {major}.{minor}"
        if problem.dtype not in DTYPES:
            return f"needs bfloat16 or float16, got {str(problem.dtype).removeprefix('torch.')}"
        if round_up(max(problem.head_dim, problem.head_dim_v)) > MAX_HEAD_DIM:
            return f"needs head dims up to {MAX_HEAD_DIM}, got {problem.head_dim} and {problem.head_dim_v}"
        library = _library(generation)
        if isinstance(library, str):
            return library
        carries_delta = problem.dlse and problem.needs_grad and not library.takes_delta
        if carries_delta and width_with_delta(problem.head_dim, problem.head_dim_v) > MAX_HEAD_DIM:
            return f"the gradient of the log-sum-exp needs head dims up to {MAX_HEAD_DIM - 8} with flash-attn {generation}"
        return library.refuses(problem)

    def library_for(self, q: Tensor) -> Library:
        generation = generation_for(torch.cuda.get_device_capability(q.device))
        assert generation is not None, "refused: no generation for this device"
        library = _library(generation)
        assert not isinstance(library, str), library
        return library


KERNEL = FlashAttn()
