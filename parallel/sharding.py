"""Sharding: one sequence over a world of ranks, real or simulated: its layout, its schedule, the plans of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ringflash.mask import Mask
from ringflash.parallel.layout import Layout, make_layout, read_kind
from ringflash.parallel.memory import Demand, Frugality, extra_bytes, frugalities, lean_bytes
from ringflash.parallel.plan import Plan, exchange_bytes, make_plan, ring_bytes
from ringflash.parallel.schedule import Schedule, make_schedule
from ringflash.parallel.world import MAX_GAP, PlanKey

STAGE_TOKENS = 98_304
"""Rows of remote chunks that "auto" puts into one stage, at least. Fewer, larger launches save the running state's way through
memory and the ends of kernels; beyond this nothing is left to save. Measured on 4 H200 (H 32/8, D 128, symmetric memory), forward
and forward + backward as parts of one GPU's rate, with 1 / 2 / 3 remote chunks a stage: 32k tokens .908/.962, .929/.964,
.953/.978; 128k .949/.973, .968/.987, .973/.996; 256k .976/.988, .988/.992, .976/.991."""


class Sharding:
    """What ContextParallel and a simulated world have in common: a world, its layout, its schedule, and the plans of both."""

    def __init__(self, world: int, layout: str | Layout, schedule: str | Schedule, ulysses: int, inner: int | None) -> None:
        if world < 1:
            raise ValueError(f"a world needs at least 1 rank, got {world}")
        if isinstance(layout, Layout):
            if layout.world != world:
                raise ValueError(f"the layout is for {layout.world} ranks, the group has {world}")
        else:
            read_kind(layout)  # raises early
        self.world, self.layout = world, layout
        self.ulysses, self.inner, self.schedule = ulysses, inner, schedule
        self.mask: Mask | None = None
        self.lengths: tuple[int, int] | None = None  # set by for_lengths
        self.last_seqlen: int | None = None  # of the last shard or position_ids
        self.trim, self.max_gap = True, MAX_GAP  # see PlanKey
        self.memory_budget: int | str | None = None
        make_schedule(schedule, world, ulysses, inner)  # raises early

    def layout_of(self, seqlen: int) -> Layout:
        """The layout of a sequence of this length."""
        if isinstance(self.layout, Layout):
            if self.layout.seqlen != seqlen:
                raise ValueError(f"the layout is for {self.layout.seqlen} tokens, got a sequence of {seqlen}")
            return self.layout
        return make_layout(self.layout, seqlen, self.world, self.mask)

    def schedule_of(self, seqlen: int, rows: int = STAGE_TOKENS) -> Schedule:
        """The schedule for a sequence of this length; decides what "auto" means: stages of so many rows."""
        ulysses = max(self.ulysses, 1)
        spec = Schedule("staged", ulysses=ulysses, rows=rows) if self.schedule == "auto" else self.schedule
        return make_schedule(spec, self.world, ulysses, self.inner)

    def plan(self, rank: int, mask: Mask, q_len: int, k_len: int, heads: int, kv_heads: int, rows: int = STAGE_TOKENS) -> Plan:
        """The plan of one rank for global lengths and head counts. Cached. rows: for ``schedule_of``."""
        q_layout = self.layout_of(q_len)
        k_layout = q_layout if k_len == q_len else self.layout_of(k_len)
        schedule = self.schedule_of(k_len, rows)
        return make_plan(PlanKey(mask, q_layout, k_layout, schedule, heads, kv_heads, rank, self.trim, self.max_gap))

    def trading(self, plan: Plan, head_dim: int, head_dim_v: int, dtype_bytes: int, takes_delta: bool = True) -> Plan | None:
        """The plan that trades heads for sequence in place of one of "auto", where a training step over symmetric memory is done
        sooner so: all heads are key heads, there are enough for two groups on every rank, long enough to hide one another's
        exchange, and that is fewer bytes. None elsewhere.

        Measured on 4 H200, causal, forward + backward of one GPU, ring and Ulysses: 64k tokens, 32 heads .944 and .972, .922 and
        .956; 128k .955 and .966. With 8 key heads they are equal (.991, .992), and a forward pass alone is faster by a ring (.976
        and .921). Longer sequences and more ranks: not measured. takes_delta: of the kernel, as for `Plan.backward`.
        """
        key = plan.key
        auto = self.schedule == "auto" and self.ulysses == 1 and self.memory_budget is None
        if not auto or self.world == 1 or key.heads != key.kv_heads or key.kv_heads % self.world:
            return None
        traded = make_plan(replace(key, schedule=make_schedule("ulysses", self.world)))
        dims = head_dim, head_dim_v, dtype_bytes
        fewer = exchange_bytes(traded, *dims) < ring_bytes(plan, *dims, takes_delta)
        return traded if traded.key.groups > 1 and fewer else None

    def keep_within(self, budget: int | str | None) -> None:
        """Sets the memory budget: bytes, "lean", or None for no bound."""
        if budget not in (None, "lean") and not (isinstance(budget, int) and budget > 0):
            raise ValueError(
                f'memory_budget must be a positive number of bytes (2 * 2**30 for 2 GiB), "lean" or None, got {budget!r}'
            )
        self.memory_budget = budget

    def frugalities(self, plan: Plan) -> tuple[Frugality, ...]:
        """What the memory budget may choose from, by the plan for no budget: that one first."""
        key, auto = plan.key, self.schedule == "auto"
        k_len = key.k_layout.seqlen
        return frugalities(STAGE_TOKENS, plan.rings, k_len, key.kv_heads, key.schedule.ulysses, auto, key.groups)

    def affordable(self, call: Demand, rank: int, mask: Mask, q_len: int, k_len: int, heads: int, kv_heads: int) -> list[int]:
        """Which of the ``frugalities`` one rank can afford within the memory budget, by their place there.

        Raises ValueError, with the numbers, if it can afford none.
        """
        budget, default = self.memory_budget, self.plan(rank, mask, q_len, k_len, heads, kv_heads)
        if budget == "lean":
            budget = lean_bytes(default, call)
        assert isinstance(budget, int)
        choices, needs = self.frugalities(default), []
        for rows, groups in choices:
            plan = self.plan(rank, mask, q_len, k_len, heads, kv_heads, rows)
            needs.append(extra_bytes(plan, call, groups))
        if min(needs) > budget and self.memory_budget == "lean":  # a wish, no bound: as little as can be
            return [needs.index(min(needs))]
        if min(needs) > budget:
            groups = choices[needs.index(min(needs))].groups
            raise ValueError(
                f"memory_budget={budget} bytes is too small: beyond its tensors a call takes {min(needs)} bytes on "
                f"rank {rank} (the smallest stages, heads in {groups} groups, one after the other) and {needs[0]} at full speed; "
                "give it more memory, or more ranks"
            )
        return [n for n, need in enumerate(needs) if need <= budget]

    def common(self, affordable: Sequence[Sequence[int]]) -> int:
        """The first of the ``frugalities`` that every rank can afford: each rank's are given. ValueError if there is none."""
        if shared := set.intersection(*map(set, affordable)):
            return min(shared)
        if self.memory_budget == "lean":  # a wish, no bound
            return max(map(min, affordable))
        raise ValueError(
            f"memory_budget={self.memory_budget} suffices for each rank alone, but for no stages and groups of heads that "
            "are the same on all; give it more"
        )

    def bound(self, mask: Mask | None) -> Mask:
        """The mask of a call: the given one, or the one this view was made for.

        A layout balanced for one mask is as good as any other layout for another: layers with windows share a view with the rest.
        """
        return (self.mask or Mask.full()) if mask is None else mask


def take(x: Tensor, layout: Layout, rank: int, dim: int) -> Tensor:
    """A rank's rows of a full tensor, in the order of its buffer."""
    pieces = []
    for run in layout.ranks[rank]:
        index = [slice(None)] * x.dim()
        index[dim] = slice(run.start, run.stop, run.stride)
        pieces.append(x[tuple(index)])
    if not pieces:
        return x.narrow(dim, 0, 0)
    return torch.cat(pieces, dim)  # a copy also of one piece: a view would keep the whole tensor alive, and share its memory
