"""The public door: check, plan, compute."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ringflash import env
from ringflash.autograd import Attention, Job, forward_pass
from ringflash.kernels import Kernel, Problem, choose
from ringflash.mask import Mask
from ringflash.parallel.context import ContextParallel
from ringflash.parallel.layout import make_layout
from ringflash.parallel.memory import Demand, Shape
from ringflash.parallel.plan import Plan, make_plan
from ringflash.parallel.schedule import Schedule
from ringflash.parallel.transport import Transport
from ringflash.parallel.transport.simulated import Mailbox, Simulated
from ringflash.parallel.world import PlanKey

_NOBODY = Simulated(Mailbox(), 0)
"""The transport of a plan that moves nothing."""

_EVERYBODY = Mask.full()

MAX_AGREED = 1024
"""Calls a context remembers as agreed; packed documents bring a new one with every batch."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Call:
    """The arguments of one call, checked; everything but the tensors' data. Hashable: the key of what was planned for it."""

    q_shape: tuple[int, ...]
    k_shape: tuple[int, ...]
    v_shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    mask: Mask
    scale: float
    softcap: float
    sinks: bool
    backend: str
    deterministic: bool
    needs_grad: bool
    with_lse: bool


def check(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float | None, softcap: float, sinks: Tensor | None, backend: str,
    deterministic: bool, with_lse: bool,
) -> Call:  # fmt: skip
    """Raises ValueError for whatever cannot be meant; returns the call."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.dim() != 4:
            got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name} must be a tensor (batch, sequence, heads, head_dim), got {got}")
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"q, k, v must share one of bfloat16, float16, float32, float64; got {q.dtype}, {k.dtype}, {v.dtype}; cast them first"
        )
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k, v must be on one device, got {q.device}, {k.device}, {v.device}")
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        raise ValueError(
            "shapes do not fit: q (B, Sq, H, D), k (B, Sk, Hkv, D), v (B, Sk, Hkv, Dv), "
            f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    heads, kv_heads, head_dim = q.shape[2], k.shape[2], q.shape[3]
    if kv_heads < 1 or heads < 1 or heads % kv_heads:
        raise ValueError(f"query heads must be a positive multiple of key heads, got {heads} and {kv_heads}")
    if head_dim < 1 or v.shape[3] < 1:
        raise ValueError(f"head_dim must be at least 1, got {head_dim} for q and k, {v.shape[3]} for v")
    if not isinstance(mask, Mask):
        raise ValueError(f"mask must be a ringflash.Mask such as Mask.causal(), got {type(mask).__name__}")
    if sinks is not None and not isinstance(sinks, Tensor):
        raise ValueError(f"sinks must be a tensor ({heads},) or None, got {type(sinks).__name__}")
    if sinks is not None and (sinks.shape != (heads,) or not sinks.is_floating_point() or sinks.device != q.device):
        raise ValueError(
            f"sinks must be floating point ({heads},) on {q.device}, got {sinks.dtype} {tuple(sinks.shape)} on {sinks.device}"
        )
    if scale is not None and not (isinstance(scale, (int, float)) and math.isfinite(scale)):
        raise ValueError(f"scale must be a finite number or None for 1/sqrt(head_dim), got {scale!r}")
    if not (isinstance(softcap, (int, float)) and math.isfinite(softcap) and softcap >= 0):
        raise ValueError(f"softcap must be a finite number >= 0 (0 turns it off), got {softcap!r}")
    tracked = any(x is not None and x.requires_grad for x in (q, k, v, sinks))
    return Call(
        tuple(q.shape), tuple(k.shape), tuple(v.shape), q.dtype, q.device, mask, scale if scale is not None else head_dim**-0.5,
        float(softcap), sinks is not None, backend, bool(deterministic), tracked and torch.is_grad_enabled(), bool(with_lse),
    )  # fmt: skip


def kernel_for(call: Call, plan: Plan) -> Kernel:
    """The kernel for what a rank computes: after the head exchange, with the plan's Slices."""
    share = plan.share
    capability = torch.cuda.get_device_capability(call.device) if call.device.type == "cuda" else None
    problem = Problem(
        device=call.device.type,
        capability=capability,
        dtype=call.dtype,
        head_dim=call.q_shape[3],
        head_dim_v=call.v_shape[3],
        heads=max(share.q_heads, 1),
        kv_heads=max(share.kv_heads, 1),
        softcap=call.softcap > 0,
        deterministic=call.deterministic,
        needs_grad=call.needs_grad,
        dlse=(call.with_lse or plan.key.schedule.travels == "q") and call.needs_grad,  # where q travels, out does not
        positive_scale=call.scale > 0,
    )
    kernel = choose(call.backend, problem)
    env.logger("kernel").debug("%s for %s", kernel.name, problem)
    return kernel


def _facts(call: Call, plan: Plan, kernel: Kernel, transport: str) -> dict[str, str]:
    """What the ranks of a group must agree on, by name, as text."""
    (b, _, h, d), (_, _, hk, dv) = call.q_shape, call.v_shape
    key = plan.key
    return {
        "q's batch, heads, head_dim": f"({b}, {h}, {d})",
        "k's and v's heads and head_dim": f"({hk}, {dv})",
        "sequence lengths": f"{key.q_layout.seqlen} queries, {key.k_layout.seqlen} keys",
        "dtype": str(call.dtype),
        "device": call.device.type,
        "mask": f"{call.mask!r} #{call.mask.digest()}",
        "layout": f"{key.q_layout.name} #{key.q_layout.digest()}",
        "schedule": str(key.schedule),
        "scale, softcap, sinks": f"{call.scale!r}, {call.softcap!r}, {call.sinks}",
        "whether gradients are needed, and the log-sum-exp": f"{call.needs_grad}, {call.with_lse}",
        "transport": transport,
        "backend and determinism": f"{kernel.name}, {call.deterministic}",
    }


def demand(call: Call, kernel: Kernel, symmetric: bool = False) -> Demand:
    """What a memory budget must know of a call."""
    extras = kernel.extras
    shape = Shape(
        call.q_shape[0], call.q_shape[3], call.v_shape[3], call.dtype.itemsize, extras.delta, extras.settle_rows,
        call.deterministic, extras.portion_bytes, extras.turn_rows, extras.one_call,
    )  # fmt: skip
    return Demand(shape, call.needs_grad, call.sinks, call.with_lse, symmetric)


def _prepare(call: Call, cp: ContextParallel, lengths: tuple[int, int]) -> tuple[Plan, Kernel, int]:
    """Plan, kernel and groups of heads of a call, verified with the other ranks the first time."""
    affordable, whose = [0], (cp.rank, call.mask, *lengths, call.q_shape[2], call.k_shape[2])
    try:
        q_len, k_len = lengths
        call.mask.check(q_len, k_len)
        plan = cp.plan(*whose)
        for name, local, layout in (("q", call.q_shape[1], plan.key.q_layout), ("k and v", call.k_shape[1], plan.key.k_layout)):
            if local != layout.lengths[cp.rank]:
                raise ValueError(
                    f"{name} has {local} rows on rank {cp.rank}, but layout {layout.name} of {layout.seqlen} tokens gives it "
                    f"{layout.lengths[cp.rank]}; shard with cp.shard (or tell the lengths with cp.for_lengths)"
                )
        kernel = kernel_for(call, plan)
        dims = call.q_shape[3], call.v_shape[3], call.dtype.itemsize
        traded = cp.trading(plan, *dims, kernel.extras.delta) if call.needs_grad else None
        shared = None if traded is None else (traded, kernel_for(call, traded))
        if cp.memory_budget is not None:
            affordable = cp.affordable(demand(call, kernel, cp.may_share_memory(call.device)), *whose)
    except Exception as error:  # whatever it is, the other ranks must not wait for this one
        cp.agreement.refuse(error)
        raise
    whole = "needed rows" if cp.trim else "whole chunks"
    facts = _facts(call, plan, kernel, f"{cp.transport_name}, {whole}, gaps up to {cp.max_gap} rows")
    facts["memory_budget"] = str(cp.memory_budget)
    facts["schedule over symmetric memory"] = facts["schedule"] if shared is None else str(shared[0].key.schedule)
    if cp.relays:  # its lanes over slow links are made once for each timeout, by all ranks together
        facts["timeout_s"] = str(cp.timeout_s)
    cp.agreement.agree(facts)
    # After the handshake: to make a transport takes all ranks, and they must not wait there for one that refuses.
    if shared is not None and cp.transport(call.device).name == "symmetric":
        plan, kernel = shared
        facts["schedule"] = facts["schedule over symmetric memory"]
    groups = plan.key.groups
    if cp.memory_budget is not None:  # the ranks' choices mean the same only now
        rows, groups = cp.frugalities(plan)[cp.afford(affordable)]
        plan = cp.plan(*whose, rows)
    env.logger("plan").debug("%s", ", ".join(f"{name}: {value}" for name, value in facts.items()))
    return plan, kernel, groups


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | None = ...,
    scale: float | None = ...,
    softcap: float = ...,
    sinks: Tensor | None = ...,
    cp: ContextParallel | None = ...,
    backend: str = ...,
    deterministic: bool = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | None = ...,
    scale: float | None = ...,
    softcap: float = ...,
    sinks: Tensor | None = ...,
    cp: ContextParallel | None = ...,
    backend: str = ...,
    deterministic: bool = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    cp: ContextParallel | None = None,
    backend: str = "auto",
    deterministic: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention, on one device or over a group of ranks.

    q (B, Sq, H, D), k (B, Sk, Hkv, D), v (B, Sk, Hkv, Dv): bfloat16, float16, float32 or float64; with ``cp`` the local rows of
    this rank, as ``cp.shard`` gives them. H must be a multiple of Hkv.

    mask           who sees whom, in global positions (default: everybody, or the mask of a ``cp.for_mask`` view).
    scale          of the scores; default 1/sqrt(D).
    softcap        c > 0 replaces scores s by c * tanh(s / c).
    sinks          (H,) extra logits, one per head, that take part in every row's softmax with a zero value (gpt-oss). Their
                   gradient is this rank's share, as that of any parameter.
    cp             ContextParallel; None computes on this device alone.
    backend        "auto" or a kernel's name; a named kernel that cannot do the job raises.
    deterministic  bitwise equal gradients from run to run.
    return_lse     also return the log-sum-exp of every row (natural log, sinks included): float32 (B, H, Sq), differentiable.

    Returns out (B, Sq, H, Dv) in the inputs' dtype. A row that sees nothing is 0 with log-sum-exp -inf.

    Raises ValueError, on every rank and before anything is sent, for arguments that do not fit or on which the ranks disagree;
    TransportError when a rank dies or stays silent. What ranks agree on is verified the first time a call is made with these
    shapes and options; ranks must make the same calls in the same order. (Ring Attention, Liu et al. 2023; FlashAttention-2,
    Dao 2023.)

    schedule="auto" may compute a training step in another order than the same call without gradients, which may then differ in
    its last bits; so may the first forward of a checkpoint that runs without them.
    """
    words: Any = None
    try:
        # Everything that decides what is done, as it was given: two calls with equal words are one and the same job.
        words = (
            q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device, mask, scale, softcap,
            None if sinks is None else (sinks.shape, sinks.dtype, sinks.device), backend, deterministic, return_lse,
            torch.is_grad_enabled()
            and (q.requires_grad or k.requires_grad or v.requires_grad or (sinks is not None and sinks.requires_grad)),
        )  # fmt: skip
        jobs = _JOBS if cp is None else cp.jobs
        if cp is not None:
            words += (cp.mask, cp.lengths, cp.last_seqlen)
        job = jobs.get(words)
    except (AttributeError, TypeError):  # something is no tensor, no mask, no context: the checks say it better
        words = job = None
    if job is None:
        job = _job(q, k, v, mask, scale, softcap, sinks, backend, deterministic, return_lse, cp)
        jobs = _JOBS if cp is None else cp.jobs
        if len(jobs) >= MAX_AGREED:
            del jobs[next(iter(jobs))]
        jobs[words] = job
    tensors = (row_major(q), row_major(k), row_major(v), sinks)
    if job.tracked:
        out, lse = Attention.apply((job,), *tensors)  # type: ignore[no-untyped-call]
    else:
        ((out, lse, _),) = forward_pass((job,), *tensors)
    return (out, lse) if return_lse else out


_JOBS: dict[Any, Job] = {}
"""What calls on one device come to, by their words."""


def _job(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, scale: float | None, softcap: float, sinks: Tensor | None, backend: str,
    deterministic: bool, return_lse: bool, cp: ContextParallel | None,
) -> Job:  # fmt: skip
    """What a call comes to: checked, planned, and agreed on with the other ranks. Raises what `attention` raises."""
    try:
        if cp is not None and not isinstance(cp, ContextParallel):
            raise ValueError(f"cp must be a ringflash.ContextParallel, got {type(cp).__name__}")
        if cp is not None:
            mask = cp.bound(mask)
        elif mask is None:
            mask = _EVERYBODY
        call = check(q, k, v, mask, scale, softcap, sinks, backend, deterministic, return_lse)
        lengths = None if cp is None else cp.global_lengths(q.shape[1], k.shape[1], mask)
    except Exception as error:  # whatever it is, the other ranks must not wait for this one
        if isinstance(cp, ContextParallel):
            cp.agreement.refuse(error)
        raise
    groups = 1
    if cp is None or lengths is None:
        plan, kernel = _alone(call)
        transport: Transport = _NOBODY
    else:
        key = (call, lengths, cp.mask)
        if key not in cp.agreed:
            if len(cp.agreed) >= MAX_AGREED:  # the ranks make the same calls in the same order, so all forget the same one
                del cp.agreed[next(iter(cp.agreed))]
                cp.jobs.clear()
            cp.agreed[key] = _prepare(call, cp, lengths)
        plan, kernel, groups = cp.agreed[key]
        transport = cp.transport(q.device)
    return Job(plan, kernel, transport, call.scale, call.softcap, call.deterministic, call.with_lse, call.needs_grad, groups)


@lru_cache(maxsize=1024)
def _alone(call: Call) -> tuple[Plan, Kernel]:
    """Plan and kernel of one device: the same path with one step. Raises ValueError for a mask that does not fit."""
    (_, q_len, heads, _), (_, k_len, kv_heads, _) = call.q_shape, call.k_shape
    call.mask.check(q_len, k_len)
    q_layout, k_layout = make_layout("contiguous", q_len, 1), make_layout("contiguous", k_len, 1)
    plan = make_plan(PlanKey(call.mask, q_layout, k_layout, Schedule(), heads, kv_heads, 0))
    return plan, kernel_for(call, plan)


def row_major(x: Tensor) -> Tensor:
    """Kernels take any strides but that of the last dim, which must be 1."""
    return x if x.stride(-1) == 1 else x.contiguous()
