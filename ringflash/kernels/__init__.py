"""Kernels: backends that compute the Slices of one step, what each can do, and the choice between them.

A backend is one module of this package with an object ``KERNEL``. Backends know Slices, tensors and numbers; they never see a
mask, a layout, a rank or a transport, and they do not import one another, but for ``reference``, which any of them may hand
inputs to that its library cannot treat (NaN and infinities on the CPU).
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from ringflash.slices import Slices

NAMES = ("hopper", "sdpa", "flash_attn", "cpu", "reference")
"""Every backend that can be asked for by name."""

State = tuple[Tensor, Tensor]
"""``(out, lse)``: (B, Sq, H, Dv) and (B, H, Sq)."""


class Settle(NamedTuple):
    """Rows that a forward call (with finish=False) completes, though others go on.

    They are written to ``out`` (B, Sq, H, Dv), in q's dtype, and their lse to the running one; the running output's rows are
    then unspecified. rows: sorted ranges, cut at multiples of the backend's ``extras.settle_rows`` or at Sq. With a carry, a row
    that is neither among them nor in a Slice stays as it is. So the float32 state of rows that one call completes never meets
    memory, and no later call looks at them.
    """

    out: Tensor
    rows: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Extras:
    """What a backend can beyond what all must. Whoever calls a kernel asks here, and nowhere else.

    delta        backward reads delta and never ``out``, which then need not travel with queries.
    sinks        forward has a keyword ``sinks: Tensor | None = None`` (H,), to start from instead of a carry of output 0 and lse
                 sinks.
    settle_rows  if not 0, forward has a keyword ``settle: Settle | None = None``.
    one_call     the backend is a OneCallKernel.
    sm_margin    it is a dataclass with a field of that name: multiprocessors that its kernels leave free.

    What a backward call takes of memory besides its tensors, for forecasts and budgets; upper bounds:

    portion_bytes  by head dim (the larger one), up to: for partial sums, if deterministic, and in ``gradients`` always. Pairs,
                   ascending; beyond the last head dim none.
    turn_rows      if not 0: if deterministic, 8 bytes for each batch entry, head and so many query rows.
    """

    delta: bool = False
    sinks: bool = False
    settle_rows: int = 0
    one_call: bool = False
    sm_margin: bool = False
    portion_bytes: tuple[tuple[int, int], ...] = ()
    turn_rows: int = 0


@dataclass(frozen=True)
class Problem:
    """What a backend must be able to do. Frozen and hashable: the choice is cached by it.

    device: its type, "cuda", "cpu", ... capability: CUDA compute capability (major, minor), None elsewhere. head_dim: of q and k.
    softcap: scores are capped. deterministic: gradients must repeat bitwise. needs_grad: backward will be called. dlse: the
    log-sum-exp is differentiated. positive_scale: scores keep their order.
    """

    device: str
    capability: tuple[int, int] | None
    dtype: torch.dtype
    head_dim: int
    head_dim_v: int
    heads: int
    kv_heads: int
    softcap: bool = False
    deterministic: bool = False
    needs_grad: bool = False
    dlse: bool = False
    positive_scale: bool = True

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        softcap: bool = False,
        deterministic: bool = False,
        needs_grad: bool = False,
        dlse: bool = False,
    ) -> Problem:
        """The problem that these tensors (B, S, H, D) pose."""
        return cls(
            device=q.device.type,
            capability=torch.cuda.get_device_capability(q.device) if q.is_cuda else None,
            dtype=q.dtype,
            head_dim=q.shape[3],
            head_dim_v=v.shape[3],
            heads=q.shape[2],
            kv_heads=k.shape[2],
            softcap=softcap,
            deterministic=deterministic,
            needs_grad=needs_grad,
            dlse=dlse,
        )

    def __str__(self) -> str:
        device = self.device if self.capability is None else f"{self.device} {self.capability[0]}.{self.capability[1]}"
        dims = f"{self.head_dim}" if self.head_dim == self.head_dim_v else f"{self.head_dim}/{self.head_dim_v}"
        wishes = [w for w in ("softcap", "deterministic", "needs_grad", "dlse") if getattr(self, w)]
        return ", ".join(
            [device, str(self.dtype).removeprefix("torch."), f"head_dim {dims}", f"heads {self.heads}/{self.kv_heads}", *wishes]
        )


class Kernel(Protocol):
    """One backend.

    Tensors: q (B, Sq, H, D), k (B, Sk, Hkv, D), v (B, Sk, Hkv, Dv) with any strides of B, S, H and a contiguous last dim;
    lse, delta (B, H, Sq). The *accumulate dtype* is float64 for float64 inputs, else float32; running state, lse, delta and
    gradients are kept in it. Query head h reads key head ``h // (H // Hkv)``. Scores are ``scale * q.k``, or with a softcap
    ``softcap * tanh(scale * q.k / softcap)``. No Slices, Sq = 0, Sk = 0 and H = 0 are all fine.
    """

    name: str
    extras: Extras

    def refuses(self, problem: Problem) -> str | None:
        """Why this backend cannot do it here, in words for the user; None if it can."""
        ...

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
        """Folds the Slices into the running ``(out, lse)`` and returns it.

        carry None starts: a row that sees nothing ends with out 0, lse -inf. A given carry, in the accumulate dtype and possibly
        a strided view, is continued: with finish=False it is updated in place and returned; with finish=True it is used up
        (its contents are unspecified afterwards). finish=True returns a new ``out`` in q's dtype, finish=False one in the
        accumulate dtype. lse is the natural log of ``sum exp(score)`` in the accumulate dtype.
        """
        ...

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
        """Adds the gradients of the Slices into dq, dk, dv (accumulate dtype, possibly strided views).

        lse: of the whole row over all steps, -inf for a row that sees nothing anywhere. delta: rowsum(dout * out) - dlse, with
        the whole row's out. out: that output in q's dtype if delta is rowsum(dout * out); None if a dlse was folded into delta.
        """
        ...


class OneCallKernel(Kernel, Protocol):
    """A backend with a shorter way for a backward pass that is one call: nothing to add to, so dk and dv can be written."""

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
        """dq, dk, dv in q's dtype. lse and delta as for ``backward``, of the same rows; out in q's dtype.

        delta None: rowsum(dout * out), for the kernel to make.
        """
        ...


@cache
def load(name: str) -> Kernel | None:
    """The backend of that name; None for one that this installation does not contain."""
    module = f"{__name__}.{name}"
    try:
        return cast(Kernel, importlib.import_module(module).KERNEL)
    except ModuleNotFoundError as error:
        if error.name != module:  # something that the backend itself imports is missing: not ours to hide
            raise
        return None


def leaving(kernel: Kernel, multiprocessors: int) -> Kernel:
    """The backend, leaving so many multiprocessors free if it can."""
    if not multiprocessors or not kernel.extras.sm_margin:
        return kernel
    return replace(kernel, sm_margin=multiprocessors)  # type: ignore[type-var]


def _refusal(name: str, problem: Problem) -> str | None:
    kernel = load(name)
    return "not part of this installation" if kernel is None else kernel.refuses(problem)


def preference(problem: Problem) -> tuple[str, ...]:
    """The order in which "auto" asks the backends.

    On an H200 (head_dim 128, 16k tokens, forward TFLOP/s) FlashAttention-4 reaches 650, cuDNN 540-600, both FlashAttention-2
    builds 320-345. So a FlashAttention-3/4 that the user installed comes before torch's own kernels, and FlashAttention-2 after
    them: it is asked for what they cannot do (softcap).
    """
    if problem.device == "cpu":
        return ("cpu", "reference")
    if problem.device != "cuda":
        return ("reference",)
    from ringflash.kernels.flash_attn import generation_for

    generation = generation_for(problem.capability)
    if generation is None:
        return ("hopper", "sdpa", "reference")
    return ("hopper", "flash_attn", "sdpa", "reference") if generation >= 3 else ("hopper", "sdpa", "flash_attn", "reference")


@cache
def choose(backend: str, problem: Problem) -> Kernel:
    """The backend to use: the named one, or for "auto" the first of the preference list that does not refuse.

    ValueError for an unknown name, and for a named backend that refuses: an explicit choice is never replaced silently.
    """
    if backend == "auto":
        for name in preference(problem):
            if _refusal(name, problem) is None:
                return cast(Kernel, load(name))
        reasons = "; ".join(f"{name}: {reason}" for name, reason in explain_choice(problem))
        raise ValueError(f"no backend can compute attention for {problem} ({reasons})")
    if backend not in NAMES:
        raise ValueError(f"backend={backend!r} is unknown; allowed: 'auto', {', '.join(map(repr, NAMES))}")
    reason = _refusal(backend, problem)
    if reason is not None:
        able = [name for name in NAMES if _refusal(name, problem) is None]
        instead = f"backend='auto' or {' or '.join(map(repr, able))}" if able else "other inputs: no backend can"
        raise ValueError(f"backend={backend!r} cannot compute attention for {problem}: {reason}. Use {instead}")
    return cast(Kernel, load(backend))


def explain_choice(problem: Problem) -> list[tuple[str, str | None]]:
    """Every backend with the reason why it refuses (None: it can), those that "auto" asks first in its order."""
    asked = preference(problem)
    order = [*asked, *(name for name in NAMES if name not in asked)]
    return [(name, _refusal(name, problem)) for name in order]
