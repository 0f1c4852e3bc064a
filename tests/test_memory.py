"""The memory walk against the running code: the same loops, with every storage they make counted."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from ringflash.autograd import Job, _only_call, backward_in_groups, forward_in_groups
from ringflash.kernels import Extras, hopper_backward
from ringflash.mask import Mask
from ringflash.parallel.memory import (
    WORKSPACE,
    Demand,
    Peak,
    Shape,
    _is_only_call,
    backward_peak,
    extra_bytes,
    forward_peak,
    tensor_bytes,
)
from ringflash.parallel.plan import Plan
from ringflash.parallel.schedule import make_schedule
from ringflash.parallel.transport import Label, Message, Transport
from ringflash.simulated import SimulatedWorld
from ringflash.testing import Idle

SMALL = 1 << 12
"""Index tensors and the like, which the walk leaves out."""


class Storages(TorchDispatchMode):
    """Counts the bytes of all storages made inside that are still alive, and remembers the most there ever were."""

    def __init__(self, transport: Transport, *given: Tensor | None) -> None:
        super().__init__()
        self.transport = transport
        self.alive: dict[int, int] = {}
        self.most = 0
        for x in given:
            if x is not None:
                self._count(x)
        self.most = sum(self.alive.values())

    def _count(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key = storage.data_ptr()
        leased = isinstance(self.transport, Leasing) and self.transport.has(key)
        if storage.nbytes() and key not in self.alive and not leased:
            self.alive[key] = storage.nbytes()
            weakref.finalize(storage, self.alive.pop, key)
            self.most = max(self.most, sum(self.alive.values()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, Tensor):
                self._count(x)
        return result


class Nowhere(Transport):
    """A transport whose messages stay where they are; like the real ones it holds them until the wait."""

    name = "nowhere"

    def post(self, label: Label, sends: Sequence[Message], receives: Sequence[Message]) -> Held:
        return Held([*sends, *receives])


class Leasing(Nowhere):
    """A transport that has memory of its own for what it sends, which is not counted."""

    def __init__(self) -> None:
        self.memory: list[Tensor] = []

    def lease(self, label: Label, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        with _disable_current_modes():
            self.memory.append(torch.zeros(shape, dtype=dtype))
        return self.memory[-1]

    def has(self, storage: int) -> bool:
        return any(x.untyped_storage().data_ptr() == storage for x in self.memory)


class Held:
    def __init__(self, messages: list[Message]) -> None:
        self.messages = messages

    def wait(self) -> None:
        self.messages = []


def run_out(loop: Any) -> Any:
    while True:
        try:
            next(loop)
        except StopIteration as stop:
            return stop.value


def shape_of(case: Case, kernel: Idle, deterministic: bool = False) -> Shape:
    extras = kernel.extras
    sizes = case.batch, case.head_dim, case.head_dim_v, case.dtype.itemsize
    # These walks are for kernels that take delta, whatever the kernel: then queries may travel.
    return Shape(*sizes, True, extras.settle_rows, deterministic, extras.portion_bytes, extras.turn_rows)


@dataclass(frozen=True)
class Case:
    name: str
    mask: Mask
    schedule: str
    world: int = 4
    layout: str = "zigzag"
    ulysses: int = 1
    inner: int | None = None
    seqlen: int = 512
    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    head_dim_v: int = 24
    dtype: torch.dtype = torch.bfloat16
    sinks: bool = False
    dlse: bool = False

    @property
    def shape(self) -> Shape:
        return shape_of(self, Idle())

    travels: str = "kv"
    pieces: int = 0

    def plan(self, rank: int) -> Plan:
        schedule = make_schedule(self.schedule, self.world, self.ulysses, self.inner)
        schedule = replace(schedule, travels=self.travels, pieces=self.pieces)
        world = SimulatedWorld(self.world, self.layout, schedule).for_mask(self.mask)
        return world.plan(rank, self.mask, self.seqlen, self.seqlen, self.heads, self.kv_heads)


CASES = [
    Case("one rank, one call", Mask.causal(), "ring", world=1),
    Case("ring: two stages at a time", Mask.causal(), "ring"),
    Case("ring in float32: no casts", Mask.causal(), "ring", dtype=torch.float32),
    Case("all-gather: one large stage", Mask.full(), "allgather"),
    Case("staged", Mask.full(), "staged:2", world=6),
    Case("a window: parts of chunks, some ranks ask nobody", Mask.causal(window=48), "ring", layout="contiguous"),
    Case("documents: several ranges a chunk", Mask.documents([70, 0, 130, 40, 272]), "ring", layout="balanced"),
    Case("double ring: stages stay to be passed on", Mask.full(), "double_ring", world=8, inner=4),
    Case("double ring in pieces", Mask.full(), "double_ring", world=8, inner=4, pieces=2),
    Case("queries travel", Mask.causal(), "ring", travels="q"),
    Case("queries travel in float32", Mask.causal(), "ring", dtype=torch.float32, travels="q"),
    Case("queries travel all at once", Mask.full(), "allgather", travels="q"),
    Case("queries travel in a double ring, in pieces", Mask.full(), "double_ring", world=6, inner=3, travels="q", pieces=3),
    Case("queries travel behind Ulysses", Mask.causal(), "hybrid", world=8, ulysses=4, travels="q"),
    Case("dilated: views, so a running state from the start", Mask.dilated(4), "ring"),
    Case("sinks: a running state from the start", Mask.causal(), "ring", sinks=True),
    Case("dlse", Mask.causal(), "ring", dlse=True),
    Case("Ulysses", Mask.causal(), "ulysses", dlse=True),
    Case("Ulysses, batch 1: rows leave without a copy", Mask.causal(), "ulysses", batch=1),
    Case("hybrid, more ranks than key heads: shared ones", Mask.causal(), "hybrid", world=8, ulysses=4),
    Case(
        "hybrid, heads not divisible: keys laid out per query head",
        Mask.full(),
        "hybrid",
        world=4,
        ulysses=2,
        heads=6,
        kv_heads=3,
    ),
]


class Settling(Idle):
    """A kernel that writes the results of rows as soon as they are complete."""

    extras = Extras(settle_rows=1)


@pytest.mark.parametrize("kernel", [Idle(), Settling()], ids=["", "settling"])
@pytest.mark.parametrize("leased", [False, True], ids=["", "leased"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_walk_counts_what_the_loops_allocate(case: Case, leased: bool, kernel: Idle) -> None:
    shape = shape_of(case, kernel)
    for rank in range(case.world):
        plan = case.plan(rank)
        transport = Leasing() if leased else Nowhere()
        job = Job(plan, kernel, transport, 1.0, 0.0, False, with_lse=case.dlse)
        own_q, own_k = plan.q_lengths[plan.member], plan.k_lengths[plan.member]
        q = torch.zeros(case.batch, own_q, case.heads, case.head_dim, dtype=case.dtype)
        k = torch.zeros(case.batch, own_k, case.kv_heads, case.head_dim, dtype=case.dtype)
        v = torch.zeros(case.batch, own_k, case.kv_heads, case.head_dim_v, dtype=case.dtype)
        sinks = torch.zeros(case.heads) if case.sinks else None
        with Storages(transport, q, k, v) as counted:
            _, _, saved = run_out(forward_in_groups(job, q, k, v, sinks))
        agree(forward_peak(plan, shape, case.sinks, case.dlse, leased), counted.most)
        dout = torch.zeros(case.batch, own_q, case.heads, case.head_dim_v, dtype=case.dtype)
        dlse = torch.zeros(case.batch, case.heads, own_q) if case.dlse else None
        with Storages(transport, *saved.tensors()[:5], dout, dlse) as counted:
            run_out(backward_in_groups(job, saved, dout, dlse))
        agree(backward_peak(plan, shape, case.dlse, leased), counted.most)


class Needing(Idle):
    """A kernel whose deterministic gradients, and those of a pass of one call, want memory besides their tensors; it sees to it
    that ours would find nothing to copy."""

    extras = Extras(portion_bytes=((8, 1 << 30), (24, 3 << 18), (32, 1 << 30)), turn_rows=2, one_call=True)

    def __init__(self, rounds: bool = False) -> None:
        self.rounds = rounds

    def _need(self, q: Tensor, deterministic: bool, only_call: bool) -> list[Tensor]:
        B, S, H, _ = q.shape
        needs = [torch.empty(3 << 18, dtype=torch.uint8)] if deterministic or only_call else []
        return needs + ([torch.zeros(B, H, -(-S // 2), dtype=torch.int64)] if deterministic else [])

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object, deterministic: bool = False, **options: Any
    ) -> None:
        if q.dtype == torch.bfloat16:
            assert all(hopper_backward._fits(x, 8) for x in (dout, q, k, v)), "an input would be copied"
        assert all(hopper_backward._fits(options[name], 4) for name in ("dq", "dk", "dv")), "gradients would be added in copies"
        self._need(q, deterministic, False)

    def gradients(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object, deterministic: bool = False, **__: Any
    ) -> tuple[Tensor, ...]:
        delta = torch.empty(q.shape[0], q.shape[2], q.shape[1])
        dtypes = [torch.float32, *[torch.float32 if self.rounds else q.dtype] * 2]
        added = [torch.empty(x.shape, dtype=dtype) for x, dtype in zip((q, k, v), dtypes, strict=True)]
        self._need(q, deterministic, True)
        del delta
        return tuple(x.to(q.dtype) for x in added)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_a_kernel_needs_for_itself_is_counted(case: Case, deterministic: bool) -> None:
    shape = shape_of(case, Needing(), deterministic)
    for rank in range(case.world):
        plan = case.plan(rank)
        if _only_call(plan) is not None:
            continue
        found, told = counted_backward(case, plan, Needing(), deterministic), backward_peak(plan, shape, case.dlse)
        if case.dtype == torch.bfloat16:
            agree(told, found)
            assert not deterministic or WORKSPACE in dict(told.items)
        else:
            assert told == backward_peak(plan, replace(shape, deterministic=False), case.dlse), "such kernels are of 16 bits"


def counted_backward(case: Case, plan: Plan, kernel: Idle, deterministic: bool) -> int:
    job = Job(plan, kernel, Nowhere(), 1.0, 0.0, deterministic, with_lse=case.dlse)
    q = torch.zeros(case.batch, plan.q_lengths[plan.member], case.heads, case.head_dim, dtype=case.dtype)
    own_k = plan.k_lengths[plan.member]
    k, v = (torch.zeros(case.batch, own_k, case.kv_heads, d, dtype=case.dtype) for d in (case.head_dim, case.head_dim_v))
    _, _, saved = run_out(forward_in_groups(job, q, k, v, None))
    dout = torch.zeros(*q.shape[:3], case.head_dim_v, dtype=case.dtype)
    dlse = torch.zeros(case.batch, case.heads, q.shape[1]) if case.dlse else None
    with Storages(job.transport, *saved.tensors()[:5], dout, dlse) as counted:
        run_out(backward_in_groups(job, saved, dout, dlse))
    return counted.most


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_pass_of_one_call_takes_at_most_what_is_told(deterministic: bool) -> None:
    for seqlen, exact in ((512, True), (8192, False)):  # what is told has float32 dk and dv, whether or not the kernel makes them
        case = Case("one call", Mask.causal(), "ring", world=1, seqlen=seqlen)
        plan = case.plan(0)
        told = backward_peak(plan, shape_of(case, Needing(), deterministic))
        found = [counted_backward(case, plan, Needing(rounds), deterministic) for rounds in (True, False)]
        assert max(found) <= told.total + SMALL
        if exact:
            agree(told, found[0])
            assert dict(told.items)[WORKSPACE] >= 3 << 18


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_walk_and_loop_agree_on_what_is_one_call(case: Case) -> None:
    for plan in (case.plan(rank) for rank in range(case.world)):
        assert _is_only_call(plan) == (_only_call(plan) is not None)
        back = case.shape.backward(plan)
        assert _is_only_call(back) == _is_only_call(plan)


def agree(peak: Peak, counted: int) -> None:
    assert abs(peak.total - counted) <= SMALL, (counted, peak)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("schedule", ["ring", "allgather", "staged:2"])
def test_heads_in_groups_take_what_the_formula_says(schedule: str, groups: int) -> None:
    case = Case("groups", Mask.causal(), schedule, heads=8, kv_heads=4, batch=1)
    found, told = [], []
    for rank in range(case.world):
        plan = case.plan(rank)
        job = Job(plan, Idle(), Nowhere(), 1.0, 0.0, False, groups=groups)
        q, k, v = (torch.zeros(1, plan.q_len, heads, d, dtype=case.dtype) for heads, d in ((8, 16), (4, 16), (4, 24)))
        with Storages(job.transport, q, k, v) as forward:
            _, _, saved = run_out(forward_in_groups(job, q, k, v, None))
        dout = torch.zeros_like(saved.out)
        with Storages(job.transport, *saved.tensors()[:5], dout) as backward:
            run_out(backward_in_groups(job, saved, dout, None))
        tensors = tensor_bytes(plan, case.shape)
        found.append(max(forward.most - tensor_bytes(plan, case.shape, backward=False), backward.most - tensors))
        told.append(extra_bytes(plan, Demand(case.shape), groups))
    assert all(abs(a - b) <= SMALL for a, b in zip(found, told, strict=True)), (found, told)
