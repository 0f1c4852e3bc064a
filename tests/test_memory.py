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

from ringflash.autograd import Job, backward_in_groups, forward_in_groups
from ringflash.kernels import Extras
from ringflash.mask import Mask
from ringflash.parallel.memory import Demand, Peak, Shape, backward_peak, extra_bytes, forward_peak, tensor_bytes
from ringflash.parallel.plan import Plan, make_schedule
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
        return Shape(self.batch, self.head_dim, self.head_dim_v, self.dtype.itemsize, settle_rows=Idle.extras.settle_rows)

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
    shape = replace(case.shape, settle_rows=kernel.extras.settle_rows)
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
