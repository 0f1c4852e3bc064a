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

from ringflash.autograd import Job, Saved, _only_call, backward_in_groups, forward_in_groups
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
    symmetric_bytes,
    tensor_bytes,
)
from ringflash.parallel.plan import Plan
from ringflash.parallel.schedule import make_schedule
from ringflash.parallel.transport import Label, Message, Transport, relay_buffers
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
    """A transport that has memory of its own for what others pull, which is not counted."""

    pulls = True

    def __init__(self) -> None:
        self.memory: list[Tensor] = []
        self.opened: dict[str, int] = {}
        """The largest buffer asked for, by what it is for."""

    def open(self, what: str, plan: Plan, nbytes: int) -> None:
        self.opened[what] = max(self.opened.get(what, 0), nbytes)

    def lease(self, label: Label, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        if label.far:  # which nobody pulls
            return super().lease(label, shape, dtype, device)
        with _disable_current_modes():
            self.memory.append(torch.zeros(shape, dtype=dtype))
        assert self.memory[-1].nbytes <= self.opened[label.what], label
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
    return Shape(*sizes, True, extras.settle_rows, deterministic, extras.portion_bytes, extras.turn_rows, extras.one_call)


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
    groups: int = 1

    def plan(self, rank: int) -> Plan:
        schedule = make_schedule(self.schedule, self.world, self.ulysses, self.inner)
        schedule = replace(schedule, travels=self.travels, pieces=self.pieces, head_groups=self.groups)
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
    Case("Ulysses, no key head shared", Mask.causal(), "ulysses", heads=8, kv_heads=4),
    Case("Ulysses, one head each, batch 1: log-sum-exp leaves without a copy", Mask.causal(), "ulysses", batch=1, dlse=True),
    Case("Ulysses, two heads each, batch 1: it does not", Mask.causal(), "ulysses", seqlen=4096, heads=8, batch=1, dlse=True),
    Case("Ulysses, ranks without heads", Mask.causal(), "ulysses", heads=2, kv_heads=1),
    Case("hybrid, more ranks than key heads: shared ones", Mask.causal(), "hybrid", world=8, ulysses=4),
    Case("hybrid, heads not divisible: keys laid out per query head", Mask.full(), "hybrid", ulysses=2, heads=6, kv_heads=3),
    Case(
        "the same, batch 1: folded gradients leave without a copy", Mask.full(), "hybrid", ulysses=2, heads=6, kv_heads=3, batch=1
    ),
    Case("ring in groups: one after the other", Mask.causal(), "ring", seqlen=2048, heads=8, kv_heads=4, dlse=True, groups=4),
    Case("Ulysses in groups", Mask.causal(), "ulysses", heads=16, kv_heads=8, groups=2),
    Case("Ulysses in groups, batch 1", Mask.causal(), "ulysses", heads=16, kv_heads=16, batch=1, groups=4),
    Case("Ulysses in groups, dlse", Mask.causal(), "ulysses", heads=16, kv_heads=16, dlse=True, groups=4),
    Case("Ulysses in groups in float32", Mask.full(), "ulysses", heads=8, kv_heads=8, dtype=torch.float32, groups=2),
    Case("Ulysses in groups that share key heads", Mask.causal(), "ulysses", heads=16, kv_heads=8, dlse=True, groups=4),
    Case("the same, batch 1", Mask.causal(), "ulysses", heads=8, kv_heads=4, batch=1, groups=2),
    Case("Ulysses in groups with sinks", Mask.causal(), "ulysses", heads=8, kv_heads=8, sinks=True, groups=2),
    Case("hybrid in groups", Mask.causal(), "hybrid", ulysses=2, heads=8, kv_heads=4, groups=2),
    Case("hybrid in groups, batch 1", Mask.causal(), "hybrid", ulysses=2, heads=8, kv_heads=8, batch=1, dlse=True, groups=4),
    Case("hybrid in groups in float32", Mask.causal(), "hybrid", ulysses=2, heads=8, kv_heads=8, dtype=torch.float32, groups=4),
    Case("hybrid in groups, keys laid out per query head", Mask.full(), "hybrid", ulysses=2, heads=12, kv_heads=6, groups=2),
    Case("hybrid in groups, queries travel", Mask.causal(), "hybrid", ulysses=2, heads=8, kv_heads=4, travels="q", groups=2),
]


class Settling(Idle):
    """A kernel that writes the results of rows as soon as they are complete."""

    extras = Extras(settle_rows=1)


def tensors_of(case: Case, plan: Plan) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """q, k, v, sinks of a rank."""
    q, k = plan.q_lengths[plan.member], plan.k_lengths[plan.member]
    sizes = (q, case.heads, case.head_dim), (k, case.kv_heads, case.head_dim), (k, case.kv_heads, case.head_dim_v)
    x = [torch.zeros(case.batch, *size, dtype=case.dtype) for size in sizes]
    return x[0], x[1], x[2], torch.zeros(case.heads) if case.sinks else None


def counted(case: Case, plan: Plan, job: Job) -> tuple[int, int]:
    """The most bytes alive in the forward and in the backward pass; the caller lets go of nothing."""
    inputs = tensors_of(case, plan)
    with Storages(job.transport, *inputs) as forward:
        out, lse, saved = run_out(forward_in_groups(job, *inputs))
    dout, dlse = torch.zeros_like(out), None
    if case.dlse:
        dlse = torch.zeros(case.batch, case.heads, out.shape[1])
    with Storages(job.transport, *inputs, out, lse, *of_all(saved), dout, dlse) as backward:
        run_out(backward_in_groups(job, saved, dout, dlse))
    return forward.most, backward.most


def of_all(saved: Sequence[Saved]) -> list[Tensor | None]:
    return [x for part in saved for x in part.tensors()]


@pytest.mark.parametrize("kernel", [Idle(), Settling()], ids=["", "settling"])
@pytest.mark.parametrize("leased", [False, True], ids=["", "leased"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_walk_counts_what_the_loops_allocate(case: Case, leased: bool, kernel: Idle) -> None:
    shape = shape_of(case, kernel)
    for rank in range(case.world):
        plan = case.plan(rank)
        transport = Leasing() if leased else Nowhere()
        forward, backward = counted(case, plan, Job(plan, kernel, transport, 1.0, 0.0, False, case.dlse, groups=case.groups))
        agree(forward_peak(plan, shape, case.sinks, case.dlse, leased), forward)
        agree(backward_peak(plan, shape, case.dlse, leased), backward)
        if isinstance(transport, Leasing):
            relays = max(relay_buffers(plan.of_one_group()), relay_buffers(shape.backward(plan.of_one_group())))
            counts = {what: relays if what == "relays" else 2 for what in transport.opened}
            held = sum(counts[what] * (-(-nbytes // 1024) * 1024) for what, nbytes in transport.opened.items())
            assert symmetric_bytes(plan, shape, lse=case.dlse) == held


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
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        delta: Tensor | None,
        *_: object,
        deterministic: bool = False,
        **__: Any,
    ) -> tuple[Tensor, ...]:
        made = torch.empty(q.shape[0], q.shape[2], q.shape[1]) if delta is None else None
        dtypes = [torch.float32, *[torch.float32 if self.rounds else q.dtype] * 2]
        added = [torch.empty(x.shape, dtype=dtype) for x, dtype in zip((q, k, v), dtypes, strict=True)]
        self._need(q, deterministic, True)
        results = tuple(x.to(q.dtype) for x in added)
        del made
        return results


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_a_kernel_needs_for_itself_is_counted(case: Case, deterministic: bool) -> None:
    shape = shape_of(case, Needing(), deterministic)
    for rank in range(case.world):
        plan = case.plan(rank)
        if _only_call(plan.of_one_group()) is not None:
            continue
        found, told = needed(case, plan, Needing(), deterministic), backward_peak(plan, shape, case.dlse)
        if case.dtype == torch.bfloat16:
            agree(told, found)
            assert not deterministic or case.seqlen > 512 or WORKSPACE in dict(told.items)
        else:
            assert told == backward_peak(plan, replace(shape, deterministic=False), case.dlse), "such kernels are of 16 bits"


def needed(case: Case, plan: Plan, kernel: Idle, deterministic: bool, transport: Transport | None = None) -> int:
    """Of the backward pass."""
    given = replace(case, sinks=False)
    job = Job(plan, kernel, transport or Nowhere(), 1.0, 0.0, deterministic, case.dlse, groups=case.groups)
    return counted(given, plan, job)[1]


ONE_CALL = [
    Case("one rank", Mask.causal(), "ring", world=1),
    Case("one rank, dlse", Mask.causal(), "ring", world=1, dlse=True),
    Case("one rank in groups", Mask.causal(), "ring", world=1, heads=8, kv_heads=4, groups=2),
    Case("Ulysses", Mask.causal(), "ulysses", heads=8, kv_heads=4),
    Case("Ulysses, batch 1", Mask.causal(), "ulysses", heads=8, kv_heads=8, batch=1),
    Case("Ulysses, dlse", Mask.causal(), "ulysses", heads=8, kv_heads=4, dlse=True),
    Case("Ulysses, queries would travel", Mask.causal(), "ulysses", heads=8, kv_heads=8, travels="q"),
    Case("Ulysses in groups", Mask.causal(), "ulysses", heads=16, kv_heads=16, groups=4),
    Case("Ulysses in groups, batch 1, dlse", Mask.causal(), "ulysses", heads=16, kv_heads=8, batch=1, dlse=True, groups=2),
]


@pytest.mark.parametrize("leased", [False, True], ids=["", "leased"])
@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize("seqlen", [512, 8192])
@pytest.mark.parametrize("case", ONE_CALL, ids=lambda case: case.name)
def test_a_pass_of_one_call_takes_at_most_what_is_told(case: Case, seqlen: int, deterministic: bool, leased: bool) -> None:
    """What is told has float32 dk and dv, whether or not the kernel makes them."""
    case = replace(case, seqlen=seqlen)
    for rank in range(case.world):
        plan, transport = case.plan(rank), Leasing() if leased else Nowhere()
        assert _only_call(plan.of_one_group()) is not None
        told = backward_peak(plan, shape_of(case, Needing(), deterministic), case.dlse, leased)
        found = [needed(case, plan, Needing(rounds), deterministic, transport) for rounds in (True, False)]
        agree(told, found[0])
        assert found[1] <= told.total + SMALL
        assert seqlen > 512 or case.groups > 1 or dict(told.items)[WORKSPACE] >= 3 << 18


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_walk_and_loop_agree_on_what_is_one_call(case: Case) -> None:
    for plan in (case.plan(rank).of_one_group() for rank in range(case.world)):
        assert _is_only_call(plan) == (_only_call(plan) is not None)
        back = case.shape.backward(plan)
        assert _is_only_call(back) == _is_only_call(plan)


def agree(peak: Peak, counted: int) -> None:
    assert abs(peak.total - counted) <= SMALL, (counted, peak)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("schedule", ["ring", "allgather", "staged:2", "ulysses", "hybrid"])
def test_heads_in_groups_take_what_the_formula_says(schedule: str, groups: int) -> None:
    """By the number of groups that a budget chose, whatever the plan's own."""
    case = Case("groups", Mask.causal(), schedule, ulysses=2 if schedule == "hybrid" else 1, heads=16, kv_heads=8, batch=1)
    for rank in range(case.world):
        plan = case.plan(rank)
        forward, backward = counted(case, plan, Job(plan, Idle(), Nowhere(), 1.0, 0.0, False, groups=groups))
        found = max(forward - tensor_bytes(plan, case.shape, backward=False), backward - tensor_bytes(plan, case.shape))
        assert abs(found - extra_bytes(plan, Demand(case.shape), groups)) <= SMALL


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("schedule", ["ring", "ulysses"])
def test_where_nobody_asks_for_gradients_no_traded_heads_are_kept(schedule: str, groups: int) -> None:
    case = Case("untracked", Mask.causal(), schedule, heads=16, kv_heads=16, batch=1, groups=groups)
    for rank in range(case.world):
        plan, transport = case.plan(rank), Nowhere()
        job = Job(plan, Idle(), transport, 1.0, 0.0, False, tracked=False, groups=groups)
        shapes = ((16, case.head_dim), (16, case.head_dim), (16, case.head_dim_v))
        given = [torch.zeros(1, plan.q_lengths[plan.member], h, d, dtype=case.dtype) for h, d in shapes]
        with Storages(transport, *given) as storages:
            run_out(forward_in_groups(job, *given, None))
        told = forward_peak(plan, case.shape, groups=groups, saves=False)
        agree(told, storages.most)
        saved = forward_peak(plan, case.shape, groups=groups)
        assert (told.total < saved.total) == (schedule == "ulysses" and groups > 2)


@pytest.mark.parametrize("schedule", ["ring", "ulysses"])
def test_without_a_number_groups_are_those_of_the_plan(schedule: str) -> None:
    case = Case("groups", Mask.causal(), schedule, heads=16, kv_heads=16)
    plan, whole, shape = replace(case, groups=4).plan(0), case.plan(0), case.shape
    for of in (forward_peak, backward_peak, symmetric_bytes):
        assert of(plan, shape) == of(plan, shape, groups=4) == of(whole, shape, groups=4) != of(whole, shape)
    assert extra_bytes(plan, Demand(shape)) == extra_bytes(whole, Demand(shape), 4)
