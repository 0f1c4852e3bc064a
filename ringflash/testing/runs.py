"""Runs cases: by a simulated world in this process, or by real ranks in a pool."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from ringflash.api import attention
from ringflash.parallel.context import ContextParallel
from ringflash.simulated import SimulatedWorld
from ringflash.testing.cases import Case
from ringflash.testing.inputs import make_inputs
from ringflash.testing.oracle import Inputs, Results, visibility
from ringflash.testing.rank_pool import RankPool
from ringflash.testing.tolerance import Judge


def judge_of(case: Case, device: str = "cpu") -> Judge:
    """The oracle's results of a case, and what deviation is fair: the same however the sequence is cut and moved.

    device: what computes the formula; at 1,024 tokens and 8 heads it takes a CPU core 4 s.
    """
    whole = replace(case, layout="zigzag", schedule="ring", transport="auto", world=1, ulysses=1, inner=None)
    whole = replace(whole, travels="auto", pieces=0, stage_rows=0, local_last=0)
    return _judge(replace(whole, trim=True, max_gap=0, backend="auto", deterministic=False), device)


@lru_cache(maxsize=32)  # 20 MB each at 1,024 tokens, 8 heads of 64
def _judge(case: Case, device: str) -> Judge:
    visible = visibility(case.build_mask(), case.q_len, case.k_len)
    return Judge(make_inputs(case, device), visible, scale=case.scale, softcap=case.softcap)


def simulate(case: Case, inputs: Inputs | None = None) -> Results:
    """Results of a case by a simulated world. inputs: whole tensors to use in place of the case's own."""
    inputs = make_inputs(case) if inputs is None else inputs
    mask = case.build_mask()
    world = SimulatedWorld(case.world, case.build_layout(), case.build_schedule(), ulysses=case.ulysses, inner=case.inner)
    world.trim, world.max_gap = case.trim, case.max_gap
    leaves = _leaves(inputs)
    out, lse = world.for_mask(mask).attention(
        *leaves[:3],
        mask=mask,
        scale=case.scale,
        softcap=case.softcap,
        sinks=leaves[3] if inputs.sinks is not None else None,
        backend=case.backend,
        deterministic=case.deterministic,
        return_lse=True,
    )
    return _results(out, lse, leaves, inputs.dout, inputs.dlse)


def context_of(
    case: Case, kind: type[ContextParallel] = ContextParallel, memory_budget: int | str | None = None
) -> ContextParallel:
    """A real rank's context of the default group, as the case wants it."""
    cp = kind(
        None,
        case.build_layout(),
        case.build_schedule(),
        ulysses=case.ulysses,
        inner=case.inner,
        transport=case.transport,
        timeout_s=60.0,
        memory_budget=memory_budget,
    ).for_mask(case.build_mask())
    cp.trim, cp.max_gap = cp.trim and case.trim, case.max_gap
    return cp


def run_on_rank(case: Case, device: str = "cpu", cp: ContextParallel | None = None) -> tuple[Results, Tensor, Tensor]:
    """What one real rank of the default group gets: its results, and the positions of its queries and keys.

    dsinks is the rank's share. cp: the context, if the caller wants to look at it afterwards.
    """
    cp = context_of(case) if cp is None else cp
    inputs, mask = make_inputs(case, device), case.build_mask()
    if case.q_len != case.k_len:
        cp = cp.for_lengths(case.q_len, case.k_len)
    q, dout = (cp.shard(x, dim=1) for x in (inputs.q, inputs.dout))
    dlse = None if inputs.dlse is None else cp.shard(inputs.dlse, dim=2)
    k, v = (cp.shard(x, dim=1) for x in (inputs.k, inputs.v))
    leaves = _leaves(Inputs(q, k, v, inputs.sinks, dout, dlse))
    out, lse = attention(
        *leaves[:3],
        mask=mask,
        scale=case.scale,
        softcap=case.softcap,
        sinks=leaves[3] if inputs.sinks is not None else None,
        cp=cp,
        backend=case.backend,
        deterministic=case.deterministic,
        return_lse=True,
    )
    results = _results(out, lse, leaves, dout, dlse)
    return results.cpu(), cp.position_ids(case.q_len), cp.position_ids(case.k_len)


def run_all_on_rank(rank: int, cases: Sequence[Case], device: str = "cpu") -> list[tuple[Results, Tensor, Tensor]]:
    """``run_on_rank`` of several cases, one after the other."""
    return [run_on_rank(case, device_of(device)) for case in cases]


def device_of(kind: str) -> str:
    """This rank's own device of a kind."""
    return f"{kind}:{torch.cuda.current_device()}" if kind == "cuda" else kind


def assembled(case: Case, parts: Sequence[tuple[Results, Tensor, Tensor]]) -> Results:
    """Whole-sequence results from those of the ranks: rows put where their positions say, shares of dsinks added."""

    def whole(name: str, length: int, dim: int) -> Tensor:
        pieces = [getattr(results, name) for results, _, _ in parts]
        places = [k_pos if name in ("dk", "dv") else q_pos for _, q_pos, k_pos in parts]
        shape = list(pieces[0].shape)
        shape[dim] = length
        full = torch.full(shape, torch.nan, dtype=pieces[0].dtype)
        for piece, place in zip(pieces, places, strict=True):
            full.index_copy_(dim, place, piece)
        return full

    shares = [results.dsinks for results, _, _ in parts if results.dsinks is not None]
    return Results(
        out=whole("out", case.q_len, 1),
        lse=whole("lse", case.q_len, 2),
        dq=whole("dq", case.q_len, 1),
        dk=whole("dk", case.k_len, 1),
        dv=whole("dv", case.k_len, 1),
        dsinks=torch.stack(shares).sum(0) if shares else None,
    )


def objections_simulated(cases: Sequence[Case]) -> list[str]:
    """One line for every case that a simulated world gets wrong: how to replay it, and what is off."""
    found = []
    for case in cases:
        try:
            wrong = judge_of(case).objections(simulate(case))
        except Exception as error:
            wrong = [f"raised {type(error).__name__}: {error}"]
        if wrong:
            found.append(f"{case!r}: {'; '.join(wrong)}")
    return found


Work = Callable[[int, Sequence[Case], str], list[tuple[Results, Tensor, Tensor]]]


def objections_on_ranks(
    pool: RankPool, cases: Sequence[Case], device: str = "cpu", timeout_s: float = 300.0, work: Work = run_all_on_rank
) -> list[str]:
    """One line for every case that the pool's ranks get wrong. All cases must have the pool's world.

    device: of the ranks, and of the formula in this process. work: a module's own function, which every rank runs.
    """
    by_rank = pool.run(work, list(cases), device, timeout_s=timeout_s)
    found = []
    for i, case in enumerate(cases):
        wrong = judge_of(case, device).objections(assembled(case, [answers[i] for answers in by_rank]))
        if wrong:
            found.append(f"{case!r}: {'; '.join(wrong)}")
    return found


def _leaves(inputs: Inputs) -> list[Tensor]:
    tensors = (inputs.q, inputs.k, inputs.v, inputs.sinks)
    return [x.detach().clone().requires_grad_() for x in tensors if x is not None]


def _results(out: Tensor, lse: Tensor, leaves: Sequence[Tensor], dout: Tensor, dlse: Tensor | None) -> Results:
    roots, grads = ([out], [dout]) if dlse is None else ([out, lse], [dout, dlse])
    dq, dk, dv, *dsinks = torch.autograd.grad(roots, leaves, grads)
    return Results(out.detach(), lse.detach(), dq, dk, dv, dsinks[0] if dsinks else None)
