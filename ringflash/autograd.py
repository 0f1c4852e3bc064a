"""One Function, one forward loop, one backward loop: for every mask, layout, schedule and world size.

The loops are generators. They yield wherever a rank waits for others, so that one process can run a whole simulated world by
taking turns between its ranks (`take_turns`); a real rank simply runs its own loop to the end. World size 1 is the same loop
with one step. Heads may go through the loops in groups (`in_groups`), for less memory, or so that one group's exchange is hidden
by another's kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ringflash.kernels import Kernel, OneCallKernel, Settle, leaving
from ringflash.kernels.hopper_backward import delta as rowsum_delta
from ringflash.kernels.running import accumulate_dtype
from ringflash.parallel import trace
from ringflash.parallel.heads import POSTED, HeadExchange, Turns
from ringflash.parallel.lower import Part, View
from ringflash.parallel.plan import Plan
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
    """Groups of heads that go through the loop one after the other: what a pass holds besides its tensors is so much smaller, and
    where heads are traded, one group is on its way while another is computed."""

    @property
    def trades(self) -> bool:
        """Whether ranks trade heads for sequence."""
        return self.plan.key.schedule.ulysses > 1

    @property
    def parts(self) -> int:
        """How many Saved there are: traded heads are kept by group, as they came."""
        return self.groups if self.trades else 1


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

Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""dq, dk, dv of the local rows in the inputs' dtype, and this rank's share of dsinks (H,)."""


def take_turns(ranks: Sequence[Turns[T]]) -> list[T]:
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
    """The part of a plan whose work is one kernel call on whole tensors, of which nothing is added up afterwards; None for any
    other plan."""
    if len(plan.steps) > 1 or len(plan.steps[0].parts) != 1 or plan.rings > 1 or plan.shares_keys or not plan.share.q_heads:
        return None
    (part,) = plan.steps[0].parts
    return part if part.q_view == part.k_view == (0, 1) else None


def forward_loop(
    job: Job, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, into: tuple[Tensor, Tensor | None] | None = None
) -> Turns[Results]:
    """out (B, Sq, H, Dv) and lse (B, H, Sq) of the local rows, and what to save. into: where traded heads' results go."""
    heads = HeadExchange(job.plan, job.transport)
    q, k, v = yield from heads.enter([(q, False), (k, True), (v, True)])
    saved = Saved(q, k, v, *(yield from _forward_steps(job, q, k, v, sinks)), sinks)
    if not job.trades:
        return saved.out, saved.lse, saved
    out, whole_lse = _results_of(job, saved.out, saved.lse) if into is None else into
    home, targets = [(saved.out, False)], [out]
    if whole_lse is not None:
        home.append((_as_wide(saved.lse), False))
        targets.append(_as_wide(whole_lse))
    yield from heads.leave(home, targets)
    return out, whole_lse, saved


def _forward_steps(job: Job, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Turns[tuple[Tensor, Tensor]]:
    """out in q's dtype and lse of the own heads. Stages and running state are gone when these travel home."""
    plan, kernel = job.plan, leaving(job.kernel, job.transport.multiprocessors(job.plan))
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
    return out if out.dtype == q.dtype else out.to(q.dtype), lse


def _results_of(job: Job, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor | None]:
    """Room for out and lse of all heads of the local rows; no lse where heads are traded and nobody asked for it."""
    rows, heads = job.plan.q_lengths[job.plan.member], job.plan.key.heads
    whole = out.new_empty((out.shape[0], rows, heads, out.shape[3]))
    return whole, lse.new_empty((out.shape[0], heads, rows)) if job.with_lse or not job.trades else None


def _as_wide(lse: Tensor) -> Tensor:
    """(B, H, S) as (B, S, H, 1)."""
    return lse.transpose(1, 2).unsqueeze(-1)


def _initial(q: Tensor, v: Tensor, acc: torch.dtype, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """The running state before any key: output 0, log-sum-exp -inf or the heads' sinks."""
    out = torch.zeros((*q.shape[:3], v.shape[3]), dtype=acc, device=q.device)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), float("-inf"), dtype=acc, device=q.device)
    if sinks is not None:
        lse.copy_(sinks.to(acc)[None, :, None].expand(lse.shape))
    return out, lse


def _heads(x: Tensor, group: int, groups: int, dim: int = 2) -> Tensor:
    """A group's heads, as a view."""
    n = x.shape[dim] // groups
    return x.narrow(dim, group * n, n)


def in_groups(loops: Sequence[Turns[T]], take: Callable[[int, T], None], trades: bool) -> Turns[None]:
    """Runs the loops of groups of heads one after the other and hands their results on.

    Where heads are traded, a group is on its way in while the one before is computed, and what that one computed is on its way
    home while the next one is.
    """
    if not trades:
        for i, loop in enumerate(loops):
            if i:
                yield
            take(i, (yield from loop))
        return
    next(loops[0])
    for i, loop in enumerate(loops):
        if i + 1 < len(loops):
            next(loops[i + 1])
        yield
        while next(loop) is not POSTED:
            yield
        if i:
            take(i - 1, (yield from loops[i - 1]))
    yield
    take(len(loops) - 1, (yield from loops[-1]))


def forward_in_groups(
    job: Job, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None
) -> Turns[tuple[Tensor, Tensor | None, tuple[Saved, ...]]]:
    """`forward_loop` of all groups of heads."""
    if job.groups == 1:
        out, lse, saved = yield from forward_loop(job, q, k, v, sinks)
        return out, lse, (saved,)
    n = job.groups
    part = replace(job, plan=job.plan.of_one_group(n), groups=1)
    lse_like = torch.empty(0, dtype=accumulate_dtype(q.dtype), device=q.device)
    out, lse = _results_of(job, q.new_empty((q.shape[0], 0, 0, v.shape[3])), lse_like)
    kept: list[Saved] = []

    def loop(i: int) -> Turns[Results]:
        into = (_heads(out, i, n), None if lse is None else _heads(lse, i, n, 1)) if job.trades else None
        sinks_i = None if sinks is None else _heads(sinks, i, n, 0)
        return forward_loop(part, _heads(q, i, n), _heads(k, i, n), _heads(v, i, n), sinks_i, into)

    def take(i: int, results: Results) -> None:
        if job.trades:
            kept.extend(results[2:] if job.tracked else ())
        else:
            assert lse is not None
            _heads(out, i, n).copy_(results[0])
            _heads(lse, i, n, 1).copy_(results[2].lse)

    yield from in_groups([loop(i) for i in range(n)], take, job.trades)
    if job.trades:
        return out, lse, tuple(kept)
    assert lse is not None
    return out, lse, (Saved(q, k, v, out, lse, sinks),)


def backward_in_groups(job: Job, saved: Sequence[Saved], dout: Tensor | None, dlse: Tensor | None) -> Turns[Gradients]:
    """`backward_loop` of all groups of heads."""
    if job.groups == 1:
        return (yield from backward_loop(job, saved[0], dout, dlse))
    n, like = job.groups, saved[0]
    part = replace(job, plan=job.plan.of_one_group(n), groups=1)
    dq, dk, dv = _gradients_of(job, like.q, like.k, like.v)
    dsinks = None if like.sinks is None else like.sinks.new_empty(job.plan.key.heads)

    def loop(i: int) -> Turns[Gradients]:
        own, into = saved[i] if job.trades else _group_of(like, i, n), None
        if job.trades:
            into = (_heads(dq, i, n), _heads(dk, i, n), _heads(dv, i, n))
        dout_i, dlse_i = None if dout is None else _heads(dout, i, n), None if dlse is None else _heads(dlse, i, n, 1)
        return backward_loop(part, own, dout_i, dlse_i, into)

    def take(i: int, results: Gradients) -> None:
        for whole, result in zip((dq, dk, dv), results[:3], strict=True) if not job.trades else ():
            _heads(whole, i, n).copy_(result)
        if dsinks is not None and results[3] is not None:
            _heads(dsinks, i, n, 0).copy_(results[3])

    yield from in_groups([loop(i) for i in range(n)], take, job.trades)
    return dq, dk, dv, dsinks


def _group_of(saved: Saved, i: int, n: int) -> Saved:
    """A group's heads of what was saved, as views."""
    q, k, v, out = (_heads(x, i, n) for x in (saved.q, saved.k, saved.v, saved.out))
    return Saved(q, k, v, out, _heads(saved.lse, i, n, 1), None if saved.sinks is None else _heads(saved.sinks, i, n, 0))


def backward_loop(
    job: Job,
    saved: Saved,
    dout: Tensor | None,
    dlse: Tensor | None,
    into: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Turns[Gradients]:
    """The gradients of the local rows. into: where those of traded heads go."""
    heads = HeadExchange(job.plan, job.transport)
    dq, dk, dv, dsinks = yield from _backward_steps(job, heads, saved, dout, dlse)
    return *(yield from _home(job, heads, dq, dk, dv, into)), dsinks


def _backward_steps(job: Job, heads: HeadExchange, saved: Saved, dout: Tensor | None, dlse: Tensor | None) -> Turns[Gradients]:
    """The gradients of the own heads, as they travel. What came in, stages and what gradients were added up in are gone then."""
    plan, kernel, (q, k, v) = job.plan, job.kernel, (saved.q, saved.k, saved.v)
    acc = accumulate_dtype(q.dtype)
    only = _only_call(plan) if kernel.extras.one_call else None
    dout, dlse = yield from _incoming(job, heads, saved, dout, dlse)
    if only is not None and dlse is None and saved.sinks is None:  # the kernel makes delta and its zeros in one pass over memory
        return *_gradients(job, saved, only, dout, None), None
    delta = rowsum_delta(dout, saved.out, dlse)
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
    dq = dq.to(q.dtype)
    if not plan.shares_keys:
        dk, dv = dk.to(q.dtype), dv.to(q.dtype)
    return dq, dk, dv, dsinks


def _home(
    job: Job, heads: HeadExchange, dq: Tensor, dk: Tensor, dv: Tensor, into: tuple[Tensor, Tensor, Tensor] | None
) -> Turns[tuple[Tensor, Tensor, Tensor]]:
    """The gradients at the rows' owners. Heads of one owner travel in their final dtype; shared key heads come as they were
    accumulated, and are summed so."""
    if not job.trades:
        return dq, dk, dv
    targets = _gradients_of(job, dq, dk, dv) if into is None or job.plan.shares_keys else into
    yield from heads.leave([(dq, False), (dk, True), (dv, True)], targets)
    if into is None or into is targets:
        return targets[0], targets[1].to(dq.dtype), targets[2].to(dq.dtype)
    for x, target in zip(targets, into, strict=True):
        target.copy_(x)
    return into


def _gradients_of(job: Job, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the gradients of all heads of the local rows, of the dtypes and head dims of those that are given."""
    plan = job.plan
    q, k = (plan.q_lengths[plan.member], plan.key.heads), (plan.k_lengths[plan.member], plan.key.kv_heads)
    room = [x.new_empty((x.shape[0], *size, x.shape[3])) for x, size in ((dq, q), (dk, k), (dv, k))]
    return room[0], room[1], room[2]


def _gradients(job: Job, saved: Saved, only: Part, dout: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of a pass that is one kernel call."""
    trace.begin(trace.BACKWARD)
    grads = cast(OneCallKernel, job.kernel).gradients(
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
    trace.end(trace.BACKWARD)
    return grads


def _incoming(
    job: Job, heads: HeadExchange, saved: Saved, dout: Tensor | None, dlse: Tensor | None
) -> Turns[tuple[Tensor, Tensor | None]]:
    """dout (zeros if there is none) and dlse, after the head exchange."""
    shape = (*saved.out.shape[:1], job.plan.q_lengths[job.plan.member], job.plan.key.heads, saved.out.shape[3])
    if dout is None:
        dout = saved.out.new_zeros(shape)
    sends = [(dout, False)]
    if dlse is not None:
        sends.append((_as_wide(dlse), False))
    arrived = yield from heads.enter(sends)
    dout = arrived[0] if arrived[0].stride(-1) == 1 else arrived[0].contiguous()
    return dout, None if dlse is None else arrived[1].squeeze(-1).transpose(1, 2).contiguous()


def _dsinks(plan: Plan, saved: Saved, delta: Tensor) -> Tensor:
    """A sink is a key with a zero value: dsink = sum over rows of P_sink * (0 - delta)."""
    assert saved.sinks is not None
    share = plan.share
    sinks = saved.sinks[share.q0 : share.q1].to(saved.lse.dtype)[None, :, None]
    weight = torch.where(sinks == float("-inf"), torch.zeros_like(saved.lse), torch.exp(sinks - saved.lse))
    dsinks = torch.zeros(saved.sinks.shape, dtype=saved.lse.dtype, device=saved.lse.device)
    dsinks[share.q0 : share.q1] = -(weight * delta).sum((0, 2))
    return dsinks.to(saved.sinks.dtype)


def forward_pass(jobs: tuple[Job, ...], *tensors: Tensor | None) -> list[tuple[Tensor, Tensor | None, tuple[Saved, ...]]]:
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
        ctx.save_for_backward(*(x for _, _, parts in results for saved in parts for x in saved.tensors()))
        return tuple(x for out, lse, _ in results for x in (out, lse))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        parts = iter([Saved(*tensors) for tensors in _by_job(ctx.saved_tensors, N_SAVED)])
        if all(g is None for g in grads):
            return (None,) * (1 + 4 * len(ctx.jobs))
        # A simulated rank whose output was not used takes part with zeros; so does dlse wherever one rank has one.
        # Ranks that trade heads must all send dlse or none, also if only some of them used it.
        trades = any(job.with_lse and job.trades for job in ctx.jobs)
        with_dlse = trades or any(g is not None for g in grads[1::2])
        loops = []
        for job, (dout, dlse) in zip(ctx.jobs, _by_job(grads, 2), strict=True):
            saved = list(islice(parts, job.parts))
            if with_dlse and dlse is None:
                lse = saved[0].lse
                dlse = lse.new_zeros((lse.shape[0], job.plan.key.heads, job.plan.q_lengths[job.plan.member]))
            loops.append(backward_in_groups(job, saved, dout, dlse))
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
