"""One Function, one forward loop, one backward loop: for every mask, layout, schedule and world size.

The loops are generators. They yield wherever a rank waits for others, so that one process can run a whole simulated world by
taking turns between its ranks (`take_turns`); a real rank simply runs its own loop to the end. World size 1 is the same loop
with one step.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ringflash.kernels import Kernel, OneCallKernel, Settle, leaving
from ringflash.kernels.hopper_backward import delta as rowsum_delta
from ringflash.kernels.running import accumulate_dtype
from ringflash.parallel import trace
from ringflash.parallel.heads import HeadExchange
from ringflash.parallel.lower import Part, View
from ringflash.parallel.plan import Plan, make_plan
from ringflash.parallel.transport import Homecoming, Stages, Transport
from ringflash.parallel.work import calls_of

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """One rank's attention: what to do (plan), with what (kernel, transport), and the scalars."""

    plan: Plan
    kernel: Kernel
    transport: Transport
    scale: float
    softcap: float
    deterministic: bool
    with_lse: bool = False
    """Whether the caller gets the log-sum-exp, and may differentiate it. The same on all ranks: only then does it go back to the
    rows' owners where heads are traded."""
    tracked: bool = True
    """Whether gradients can be asked for."""
    groups: int = 1
    """Groups of heads that go through the loop one after the other: what a pass holds besides its tensors is so much smaller."""


@dataclass
class Saved:
    """What the backward pass of one rank needs, after the head exchange."""

    q: Tensor  # (B, Sq, h, D)
    k: Tensor  # (B, Sk, hk, D)
    v: Tensor  # (B, Sk, hk, Dv)
    out: Tensor  # (B, Sq, h, Dv)
    lse: Tensor  # (B, h, Sq)
    sinks: Tensor | None  # (H,)

    def tensors(self) -> tuple[Tensor | None, ...]:
        return (self.q, self.k, self.v, self.out, self.lse, self.sinks)


N_SAVED = 6

Results = tuple[Tensor, Tensor | None, Saved]
"""Of a forward loop: out, lse (None where nobody asked for what other ranks hold), and what to save."""


def take_turns(ranks: Sequence[Generator[None, None, T]]) -> list[T]:
    """Runs the loops of all ranks hosted here, each to its next yield in turn; returns their results."""
    if len(ranks) == 1:
        while True:
            try:
                next(ranks[0])
            except StopIteration as stop:
                return [stop.value]
    results: dict[int, T] = {}
    while len(results) < len(ranks):
        for i, rank in enumerate(ranks):
            if i not in results:
                try:
                    next(rank)
                except StopIteration as stop:
                    results[i] = stop.value
    return [results[i] for i in range(len(ranks))]


def _rows(x: Tensor, view: View, dim: int = 1) -> Tensor:
    """Rows start::step of a buffer, as a view."""
    if view == (0, 1):
        return x
    index = [slice(None)] * x.dim()
    index[dim] = slice(view.start, None, view.step)
    return x[tuple(index)]


def _only_call(plan: Plan) -> Part | None:
    """The part of a plan whose work is one kernel call on whole local tensors; None for any other plan."""
    if len(plan.steps) > 1 or len(plan.steps[0].parts) != 1 or plan.rings > 1 or plan.key.schedule.ulysses > 1:
        return None
    (part,) = plan.steps[0].parts
    return part if part.q_view == part.k_view == (0, 1) else None


def forward_loop(job: Job, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Generator[None, None, Results]:
    """out (B, Sq, H, Dv) and lse (B, H, Sq) of the local rows, and what to save."""
    plan, kernel = job.plan, leaving(job.kernel, job.transport.multiprocessors(job.plan))
    trades = len(plan.shares) > 1
    if trades:
        heads = HeadExchange(plan, job.transport)
        q, k, v = yield from heads.enter([(q, False), (k, True), (v, True)])
    # Start in the first kernel call and finish in the last, unless calls see only some of the rows (views), or sinks come first:
    # a sink is a running state of its own, output 0 and log-sum-exp of the sink, which some kernels start from by themselves.
    carry: tuple[Tensor, Tensor] | None = None
    direct, last, settled = calls_of(plan, kernel.extras.settle_rows)
    final = q.new_empty((*q.shape[:3], v.shape[3])) if settled else None
    completes = iter(settled)
    own_sinks = None if sinks is None else sinks[plan.share.q0 : plan.share.q1]
    further: dict[str, Any] = {}
    if own_sinks is not None and direct and kernel.extras.sinks:
        further["sinks"] = own_sinks
    elif own_sinks is not None or not direct:
        carry = _initial(q, v, accumulate_dtype(q.dtype), own_sinks)
    stages = Stages(plan, job.transport, k, v)
    for n, step in enumerate(plan.steps):
        if n:
            yield
            trace.begin(trace.WAIT, n)
        k_stage, v_stage = stages.arrive(n)
        if n:
            trace.end(trace.WAIT, n)
        stages.post(n)
        trace.begin(trace.FORWARD, n)
        for part in step.parts:
            view = carry if carry is None else (_rows(carry[0], part.q_view), _rows(carry[1], part.q_view, dim=2))
            if final is not None:
                further["settle"] = Settle(final, next(completes))
            state = kernel.forward(
                _rows(q, part.q_view),
                _rows(k_stage, part.k_view),
                _rows(v_stage, part.k_view),
                part.slices,
                scale=job.scale,
                softcap=job.softcap,
                carry=view,
                finish=direct and part is last and final is None,
                **further,
            )
            carry = state if direct else carry
            further.pop("sinks", None)
        trace.end(trace.FORWARD, n)
        stages.release(n)
    stages.finish()
    assert carry is not None
    out, lse = carry
    out = out if final is None else final
    saved = Saved(q, k, v, out if out.dtype == q.dtype else out.to(q.dtype), lse, sinks)
    if not trades:
        return saved.out, lse, saved
    n_heads = plan.key.heads
    if not job.with_lse:
        (out,) = yield from heads.leave([(saved.out, False)], [n_heads])
        return out, None, saved
    out, wide = yield from heads.leave([(saved.out, False), (lse.transpose(1, 2).unsqueeze(-1), False)], [n_heads, n_heads])
    return out, wide.squeeze(-1).transpose(1, 2), saved


def _initial(q: Tensor, v: Tensor, acc: torch.dtype, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """The running state before any key: output 0, log-sum-exp -inf or the heads' sinks."""
    out = torch.zeros((*q.shape[:3], v.shape[3]), dtype=acc, device=q.device)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), float("-inf"), dtype=acc, device=q.device)
    if sinks is not None:
        lse.copy_(sinks.to(acc)[None, :, None].expand(lse.shape))
    return out, lse


@lru_cache(maxsize=1024)
def _of_one_group(plan: Plan, groups: int) -> Plan:
    """The plan of a part of the heads."""
    key = plan.key
    assert key.heads % groups == 0 == key.kv_heads % groups and key.schedule.ulysses == 1
    return make_plan(replace(key, heads=key.heads // groups, kv_heads=key.kv_heads // groups))


def _heads(x: Tensor, group: int, groups: int, dim: int = 2) -> Tensor:
    """A group's heads, as a view."""
    n = x.shape[dim] // groups
    return x.narrow(dim, group * n, n)


def forward_in_groups(job: Job, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Generator[None, None, Results]:
    """`forward_loop` of each group of heads in turn."""
    if job.groups == 1:
        return (yield from forward_loop(job, q, k, v, sinks))
    n = job.groups
    part = replace(job, plan=_of_one_group(job.plan, n), groups=1)
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=accumulate_dtype(q.dtype))
    for i in range(n):
        if i:
            yield
        sinks_i = None if sinks is None else _heads(sinks, i, n, 0)
        results = yield from forward_loop(part, _heads(q, i, n), _heads(k, i, n), _heads(v, i, n), sinks_i)
        _heads(out, i, n).copy_(results[0])
        _heads(lse, i, n, 1).copy_(results[2].lse)
        del results  # before the next group makes its own
    return out, lse, Saved(q, k, v, out, lse, sinks)


def backward_in_groups(
    job: Job, saved: Saved, dout: Tensor | None, dlse: Tensor | None
) -> Generator[None, None, tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """`backward_loop` of each group of heads in turn."""
    if job.groups == 1:
        return (yield from backward_loop(job, saved, dout, dlse))
    n = job.groups
    part = replace(job, plan=_of_one_group(job.plan, n), groups=1)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (saved.q, saved.k, saved.v))
    dsinks = None if saved.sinks is None else torch.empty_like(saved.sinks)
    for i in range(n):
        if i:
            yield
        q, k, v, out = (_heads(x, i, n) for x in (saved.q, saved.k, saved.v, saved.out))
        sinks = None if saved.sinks is None else _heads(saved.sinks, i, n, 0)
        own = Saved(q, k, v, out, _heads(saved.lse, i, n, 1), sinks)
        dout_i, dlse_i = None if dout is None else _heads(dout, i, n), None if dlse is None else _heads(dlse, i, n, 1)
        results = yield from backward_loop(part, own, dout_i, dlse_i)
        for whole, result in zip((dq, dk, dv), results[:3], strict=True):
            _heads(whole, i, n).copy_(result)
        if dsinks is not None and results[3] is not None:
            _heads(dsinks, i, n, 0).copy_(results[3])
        del results, result, own  # before the next group makes its own
    return dq, dk, dv, dsinks


def backward_loop(
    job: Job, saved: Saved, dout: Tensor | None, dlse: Tensor | None
) -> Generator[None, None, tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """dq, dk, dv of the local rows in the inputs' dtype, and this rank's share of dsinks (H,)."""
    plan, kernel, (q, k, v) = job.plan, job.kernel, (saved.q, saved.k, saved.v)
    acc = accumulate_dtype(q.dtype)
    heads = HeadExchange(plan, job.transport)
    only = _only_call(plan) if kernel.extras.one_call else None
    if only is not None and dout is not None and dlse is None and saved.sinks is None:
        return *_gradients(job, saved, only, dout, None), None  # the kernel makes delta and its zeros in one pass over memory
    dout, delta = yield from _delta(job, heads, saved, dout, dlse)
    dsinks = None if saved.sinks is None else _dsinks(plan, saved, delta)
    if only is not None:
        return *_gradients(job, saved, only, dout, delta), dsinks
    plan = plan.backward(q.shape[3], v.shape[3], q.element_size(), kernel.extras.delta)
    kernel = leaving(kernel, job.transport.multiprocessors(plan))
    queries, keys = (q, dout, saved.lse, delta), (k, v)
    turned = plan.key.travels == "q"  # keys stay, and queries come to them
    stages = Stages(plan, job.transport, q, dout, narrow=queries[2:]) if turned else Stages(plan, job.transport, k, v)
    home = Homecoming(plan, job.transport, q if turned else k, [x.shape[3] for x in ((q,) if turned else keys)], acc)
    kept = tuple(torch.zeros(x.shape, dtype=acc, device=x.device) for x in (keys if turned else (q,)))
    home.gradients(0)
    for n, step in enumerate(plan.steps):
        if n:
            yield
            trace.begin(trace.WAIT, n)
        (q_n, dout_n, lse_n, delta_n), (k_n, v_n) = (stages.arrive(n), keys) if turned else (queries, stages.arrive(n))
        if n:
            trace.end(trace.WAIT, n)
        stages.post(n)
        (dq_n,), (dk_n, dv_n) = (home.gradients(n), kept) if turned else (kept, home.gradients(n))
        out_n = saved.out if dlse is None and (step.local or not turned) else None
        trace.begin(trace.BACKWARD, n)
        for part in step.parts:
            kernel.backward(
                _rows(dout_n, part.q_view),
                _rows(q_n, part.q_view),
                _rows(k_n, part.k_view),
                _rows(v_n, part.k_view),
                None if out_n is None else _rows(out_n, part.q_view),
                _rows(lse_n, part.q_view, dim=2),
                _rows(delta_n, part.q_view, dim=2),
                part.slices,
                scale=job.scale,
                softcap=job.softcap,
                dq=_rows(dq_n, part.q_view),
                dk=_rows(dk_n, part.k_view),
                dv=_rows(dv_n, part.k_view),
                deterministic=job.deterministic,
            )
        trace.end(trace.BACKWARD, n)
        home.receive(n)
        home.post(n)
        stages.release(n)
        home.release(n)
    yield
    home.receive(len(plan.steps))
    home.post(len(plan.steps))
    yield
    home.receive()
    stages.finish()
    (dq,), (dk, dv) = (home.gradients(0), kept) if turned else (kept, home.gradients(0))
    if plan.key.schedule.ulysses == 1:
        return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype), dsinks
    # Query heads have one owner, so they travel in their final dtype; key heads may be shared and are summed in float32.
    n_kv = plan.key.kv_heads
    dq, dk, dv = yield from heads.leave([(dq.to(q.dtype), False), (dk, True), (dv, True)], [plan.key.heads, n_kv, n_kv])
    return dq, dk.to(q.dtype), dv.to(q.dtype), dsinks


def _gradients(job: Job, saved: Saved, only: Part, dout: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of a pass that is one kernel call."""
    return cast(OneCallKernel, job.kernel).gradients(
        dout,
        saved.q,
        saved.k,
        saved.v,
        saved.out,
        saved.lse,
        delta,
        only.slices,
        scale=job.scale,
        softcap=job.softcap,
        deterministic=job.deterministic,
    )


def _delta(
    job: Job, heads: HeadExchange, saved: Saved, dout: Tensor | None, dlse: Tensor | None
) -> Generator[None, None, tuple[Tensor, Tensor]]:
    """dout after the head exchange, and ``delta = rowsum(dout * out) - dlse`` (B, h, Sq), the same for every step."""
    shape = (*saved.out.shape[:1], job.plan.q_lengths[job.plan.member], job.plan.key.heads, saved.out.shape[3])
    if dout is None:
        dout = saved.out.new_zeros(shape)
    sends = [(dout, False)]
    if dlse is not None:
        sends.append((dlse.transpose(1, 2).unsqueeze(-1), False))
    arrived = yield from heads.enter(sends)
    dout = arrived[0] if arrived[0].stride(-1) == 1 else arrived[0].contiguous()
    dlse = None if dlse is None else arrived[1].squeeze(-1).transpose(1, 2).contiguous()
    return dout, rowsum_delta(dout, saved.out, dlse)


def _dsinks(plan: Plan, saved: Saved, delta: Tensor) -> Tensor:
    """A sink is a key with a zero value: dsink = sum over rows of P_sink * (0 - delta)."""
    assert saved.sinks is not None
    share = plan.share
    sinks = saved.sinks[share.q0 : share.q1].to(saved.lse.dtype)[None, :, None]
    weight = torch.where(sinks == float("-inf"), torch.zeros_like(saved.lse), torch.exp(sinks - saved.lse))
    dsinks = torch.zeros(saved.sinks.shape, dtype=saved.lse.dtype, device=saved.lse.device)
    dsinks[share.q0 : share.q1] = -(weight * delta).sum((0, 2))
    return dsinks.to(saved.sinks.dtype)


def forward_pass(jobs: tuple[Job, ...], *tensors: Tensor | None) -> list[Results]:
    """The forward loops of all ranks hosted here. tensors: q, k, v, sinks of each job in turn."""
    loops = [forward_in_groups(job, *inputs) for job, inputs in zip(jobs, _by_job(tensors, 4), strict=True)]  # type: ignore[arg-type]
    with _full_precision():
        return take_turns(loops)


class Attention(torch.autograd.Function):
    """Attention of all ranks hosted by this process: one, or every rank of a simulated world."""

    @staticmethod
    def forward(ctx: Any, jobs: tuple[Job, ...], *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        """tensors: q, k, v, sinks of each job in turn. Returns out, lse of each job in turn."""
        results = forward_pass(jobs, *tensors)
        ctx.jobs = jobs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*(x for _, _, saved in results for x in saved.tensors()))
        return tuple(x for out, lse, _ in results for x in (out, lse))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        saved = [Saved(*tensors) for tensors in _by_job(ctx.saved_tensors, N_SAVED)]
        if all(g is None for g in grads):
            return (None,) * (1 + 4 * len(ctx.jobs))
        # A simulated rank whose output was not used takes part with zeros; so does dlse wherever one rank has one.
        # Ranks that trade heads must all send dlse or none, also if only some of them used it.
        trades = any(job.with_lse and job.plan.key.schedule.ulysses > 1 for job in ctx.jobs)
        with_dlse = trades or any(g is not None for g in grads[1::2])
        loops = []
        for job, state, (dout, dlse) in zip(ctx.jobs, saved, _by_job(grads, 2), strict=True):
            if with_dlse and dlse is None:
                shape = (state.lse.shape[0], job.plan.key.heads, job.plan.q_lengths[job.plan.member])
                dlse = state.lse.new_zeros(shape)
            loops.append(backward_in_groups(job, state, dout, dlse))
        with _full_precision():
            return (None, *(x for result in take_turns(loops) for x in result))


_AS_IT_IS: AbstractContextManager[None] = nullcontext()


def _full_precision() -> AbstractContextManager[Any]:
    """Turns autocast off: it would round the float32 running state of every matrix product inside to bfloat16."""
    devices = [d for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)]
    if not devices:
        return _AS_IT_IS
    stack = ExitStack()
    for device in devices:
        stack.enter_context(torch.autocast(device, enabled=False))
    return stack


def _by_job(tensors: Sequence[T], n: int) -> Iterator[tuple[T, ...]]:
    return (tuple(tensors[i : i + n]) for i in range(0, len(tensors), n))
