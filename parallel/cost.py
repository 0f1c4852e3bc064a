"""The cost model: what the steps of a plan take, what they wait for, and what they move, predicted from two tables.

It replays the running code's order of events (autograd.py): the transfers of slot n are posted when step n has arrived and before
it is computed; gradients leave when their step is computed and are waited for when the plan says that they are due. Kernels take
the time their tiles take; a message takes the time the link table says, when both ends have posted it. Groups of heads are
replayed one after the other; where ranks trade them, a group is on its way while another is computed. Ranks may be simulated
together, so that one waits for another that is late, or one alone, which then takes its peers to be as fast as itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

from ringflash.parallel.heads import block_bytes
from ringflash.parallel.memory import Peak, Rows, Shape, backward_peak, forward_peak, traded_tensors
from ringflash.parallel.plan import Plan, Transfer, make_plan
from ringflash.parallel.tables import DeviceTable, Link, LinkTable, Rate, Tables
from ringflash.parallel.transport import itinerary
from ringflash.parallel.work import Work, rank_areas, stretch, work_of
from ringflash.parallel.world import PlanKey

__all__ = [
    "DeviceTable",
    "Flight",
    "Forecast",
    "Link",
    "LinkTable",
    "PassForecast",
    "Peak",
    "Rate",
    "Shape",
    "StepForecast",
    "StepTime",
    "Tables",
    "predict",
    "predict_all",
]


class StepTime(NamedTuple):
    """One step of a pass: it began to wait at ``start_s``, for ``wait_s`` (exposed communication), and then computed.

    ``transfer_s`` is how long that for which it waited was under way.
    """

    start_s: float
    wait_s: float
    compute_s: float
    transfer_s: float


class Flight(NamedTuple):
    """What a rank posted together, from the moment both ends were ready: "chunks", "gradients" or "heads"."""

    what: str
    step: int
    start_s: float
    stop_s: float
    bytes_in: int
    bytes_out: int
    slow: bool


@dataclass(frozen=True)
class PassForecast:
    """One rank's forward or backward pass.

    groups            the steps of every group of heads.
    enter_s, leave_s  what the exchange of heads takes on the way in and on the way home that no kernel hides: waiting for it, and
                      its copies (packing, own rows, unpacking), which run on the computing stream.
    tail_s            waiting for each group's last gradients, and adding them.
    """

    groups: tuple[tuple[StepTime, ...], ...]
    flights: tuple[Flight, ...]
    enter_s: float
    tail_s: float
    leave_s: float
    total_s: float
    memory: Peak

    @cached_property
    def steps(self) -> tuple[StepTime, ...]:
        """Of each step the sums over all groups of heads, and when it began in the first."""
        found = []
        for times in zip(*self.groups, strict=True):
            sums = (sum(getattr(t, name) for t in times) for name in StepTime._fields[1:])
            found.append(StepTime(times[0].start_s, *sums))
        return tuple(found)

    @property
    def compute_s(self) -> float:
        return sum(step.compute_s for step in self.steps)

    @property
    def waiting_s(self) -> float:
        """Waiting for what travels in the ring."""
        return sum(step.wait_s for step in self.steps) + self.tail_s

    @property
    def exposed_s(self) -> float:
        """Communication that nothing hides."""
        return self.waiting_s + self.enter_s + self.leave_s


@dataclass(frozen=True)
class StepForecast:
    """What one step computes, per head, and moves. Bytes, of all groups of heads: of chunks it waits for, and that leave in the
    same post; ``home_in``, ``home_out``: in a backward pass, of their gradients on the way home."""

    work: Work
    bytes_in: int
    bytes_out: int
    home_in: int
    home_out: int


@dataclass(frozen=True)
class Forecast:
    """What one rank will do. ``areas``: visible pairs times heads of every rank of the group. ``steps`` and ``backward_steps``
    are of the two passes, ``back`` is the plan of the second: the same plan, unless other things travel or in another order."""

    plan: Plan
    back: Plan
    shape: Shape
    device: DeviceTable
    link: LinkTable
    steps: tuple[StepForecast, ...]
    backward_steps: tuple[StepForecast, ...]
    forward: PassForecast
    backward: PassForecast
    areas: tuple[int, ...]

    @property
    def balance(self) -> float:
        """Work of the busiest rank over the mean."""
        mean = sum(self.areas) / len(self.areas)
        return max(self.areas) / mean if mean else 1.0

    def flop(self, backward: bool) -> float:
        """Of the visible pairs of this rank."""
        heads = self.plan.of_one_group().share.q_heads * self.plan.key.groups
        return float(self.plan.area * heads * self.shape.batch * _flop_per_pair(self.shape, backward))


def _flop_per_pair(shape: Shape, backward: bool) -> int:
    return 6 * shape.head_dim + 4 * shape.head_dim_v if backward else 2 * shape.dims


def predict(
    plan: Plan | PlanKey,
    device: DeviceTable,
    link: LinkTable,
    *,
    batch: int = 1,
    head_dim: int = 128,
    head_dim_v: int | None = None,
    dtype_bytes: int = 2,
    takes_delta: bool = True,
    deterministic: bool = False,
) -> Forecast:
    """The forecast of one rank, whose peers are taken to be as fast as itself. The options are those of Shape."""
    plan = make_plan(plan) if isinstance(plan, PlanKey) else plan
    dims = head_dim, head_dim if head_dim_v is None else head_dim_v
    shape = Shape(batch, *dims, dtype_bytes, takes_delta, deterministic=deterministic)
    return predict_all([plan], device, link, shape)[0]


def predict_all(plans: Sequence[Plan], device: DeviceTable, link: LinkTable, shape: Shape) -> list[Forecast]:
    """The forecasts of several ranks of one world, simulated together."""
    groups = plans[0].key.groups
    areas = tuple(groups * area for area in rank_areas(plans[0].of_one_group().key))
    forward = _Replay(plans, device, link, shape, backward=False).run()
    backward = _Replay(plans, device, link, shape, backward=True).run()
    found = []
    for plan in plans:
        back, rank = _back(plan, shape), plan.key.rank
        there, again = _steps(plan, device, shape), _steps(back, device, shape)
        found.append(Forecast(plan, back, shape, device, link, there, again, forward[rank], backward[rank], areas))
    return found


def _back(plan: Plan, shape: Shape) -> Plan:
    """The plan of the backward pass, with the steps that every group of heads has in it."""
    part = plan.of_one_group()
    back = shape.backward(part)
    if back is part:
        return plan
    schedule = replace(back.key.schedule, head_groups=plan.key.schedule.head_groups)
    return make_plan(replace(plan.key, schedule=schedule, travels=back.key.travels, returns=back.key.returns))


def _steps(plan: Plan, device: DeviceTable, shape: Shape) -> tuple[StepForecast, ...]:
    row, groups = Rows.of(plan.of_one_group(), shape), plan.key.groups
    moved = [[0, 0, 0, 0] for _ in plan.steps]
    for slots, nbytes, first in ((plan.posts, row.moved, 0), (plan.homes, row.home, 2)):
        for post in (post for slot in slots for post in slot):
            for t in post.transfers:
                moved[post.step][first + (0 if t.dest == plan.rank else 1)] += _rows(t) * nbytes * groups
    return tuple(StepForecast(work_of(s.parts, device.tile), *m) for s, m in zip(plan.steps, moved, strict=True))


def _rows(transfer: Transfer) -> int:
    return sum(stop - start for start, stop in transfer.ranges)


class _Load(NamedTuple):
    """One rank's part of a post: so many bytes from or to a peer of the group."""

    peer: int
    inbound: bool
    nbytes: int
    messages: int


@dataclass
class _Clock:
    """One rank in the replay: the time, when its links are free again, what is under way, and the record."""

    now: float = 0.0
    waited: float = 0.0  # in this step
    free: dict[tuple[bool, bool], float] = field(default_factory=dict)  # by slowness and direction
    order: dict[str, float] = field(default_factory=dict)  # by lane: what is posted to one is moved in order
    pending: dict[int, tuple[float, float]] = field(default_factory=dict)  # by step: begun at, done at
    mail: list[tuple[int, float, int]] = field(default_factory=list)  # gradients under way: due, done at, bytes that arrive
    traded: list[float] = field(default_factory=list)  # exchanges of heads under way: done at
    packed: bool = False  # the own chunk of this group of heads
    groups: list[tuple[StepTime, ...]] = field(default_factory=list)
    flights: list[Flight] = field(default_factory=list)
    tail_s: float = 0.0
    heads_s: dict[bool, float] = field(default_factory=lambda: {True: 0.0, False: 0.0})  # by whether on the way in

    def wait(self, done: float) -> float:
        """Waits until then; how long that took."""
        gap = max(0.0, done - self.now)
        self.now += gap
        self.waited += gap
        return gap


class _Replay:
    """One pass of some or all ranks of a world. Slots come in the same order on all ranks, so they are replayed one by one.

    plans: of the forward pass and all heads.
    """

    def __init__(self, plans: Sequence[Plan], device: DeviceTable, link: LinkTable, shape: Shape, backward: bool) -> None:
        self.wholes = {plan.key.rank: plan for plan in plans}
        parts = {rank: plan.of_one_group() for rank, plan in self.wholes.items()}
        self.plans = {rank: shape.backward(part) if backward else part for rank, part in parts.items()}
        self.device, self.link, self.shape, self.backward = device, link, shape, backward
        self.row = {rank: Rows.of(plan, shape) for rank, plan in self.plans.items()}
        self.clocks = {rank: _Clock() for rank in self.plans}
        first = next(iter(self.plans.values()))
        self.n_steps, self.trades, self.groups = len(first.steps), len(first.shares) > 1, plans[0].key.groups

    def run(self) -> dict[int, PassForecast]:
        """In the order of `autograd.in_groups`."""
        if self.trades:
            self._run_trading()
        else:
            for _ in range(self.groups):
                self._group()
        return {rank: self._result(rank) for rank in self.plans}

    def _run_trading(self) -> None:
        self._trade(entering=True)
        for group in range(self.groups):
            if group + 1 < self.groups:
                self._trade(entering=True)
            self._take(entering=True)
            self._group()
            self._trade(entering=False)
            if group:
                self._take(entering=False)
        self._take(entering=False)

    def _group(self) -> None:
        """The steps of one group of heads."""
        times: dict[int, list[StepTime]] = {rank: [] for rank in self.clocks}
        for clock in self.clocks.values():
            clock.packed = False
        for n in range(self.n_steps):
            begun = {rank: clock.now for rank, clock in self.clocks.items()}
            under_way = {}
            for rank, clock in self.clocks.items():
                posted, done = clock.pending.pop(n, (0.0, 0.0))
                clock.waited, under_way[rank] = 0.0, done - posted
                clock.wait(done)
            self._post(n)
            for rank, clock in self.clocks.items():
                clock.now += self._compute_s(rank, n)
            if self.backward:
                self._receive(n)
                self._send_home(n)
            for rank, clock in self.clocks.items():
                busy = clock.now - begun[rank] - clock.waited
                times[rank].append(StepTime(begun[rank], clock.waited, busy, under_way[rank]))
        begun = {rank: clock.now for rank, clock in self.clocks.items()}
        if self.backward:
            self._receive(self.n_steps)
            self._send_home(self.n_steps)
            self._receive()
        for rank, clock in self.clocks.items():
            for _, done in clock.pending.values():  # of sends in posts that this rank computes nothing of
                clock.wait(done)
            clock.pending.clear()
            clock.tail_s += clock.now - begun[rank]
            clock.groups.append(tuple(times[rank]))

    def _result(self, rank: int) -> PassForecast:
        clock, plan = self.clocks[rank], self.wholes[rank]
        memory = backward_peak(plan, self.shape) if self.backward else forward_peak(plan, self.shape)
        enter_s, leave_s = clock.heads_s[True], clock.heads_s[False]
        return PassForecast(tuple(clock.groups), tuple(clock.flights), enter_s, clock.tail_s, leave_s, clock.now, memory)

    def _copy_s(self, nbytes: float) -> float:
        """Seconds for memory traffic of so many bytes, read and written."""
        return nbytes / self.device.memory_GBps / 1e9

    def _post(self, slot: int) -> None:
        """Posts of a slot, in the order of their steps."""
        loads: dict[int, dict[int, list[_Load]]] = {}
        for rank, plan in self.plans.items():
            for post in plan.posts[slot]:
                if post.transfers:
                    loads.setdefault(post.step, {})[rank] = [self._load(plan, t, self.row[rank].moved) for t in post.transfers]
                if not self.clocks[rank].packed and any(t.owner == plan.rank for t in post.transfers):
                    self.clocks[rank].packed = True
                    packed = sum(stop - start for start, stop in itinerary(plan).leaving)
                    self.clocks[rank].now += self._copy_s(2 * packed * self.row[rank].moved)
        for step in sorted(loads):
            for rank, span in self._move("chunks", step, loads[step]).items():
                self.clocks[rank].pending[step] = span

    def _load(self, plan: Plan, t: Transfer, row: int) -> _Load:
        inbound = t.dest == plan.rank
        return _Load(plan.peer(t.source if inbound else t.dest), inbound, _rows(t) * row, len(t.ranges))

    def _move(self, what: str, step: int, loads: Mapping[int, Sequence[_Load]]) -> dict[int, tuple[float, float]]:
        """Moves what these ranks post now: by rank, from when to when.

        A message starts when both ends have posted it, their links are free in its direction, and what was posted to the same
        lane before has arrived: fast links have one lane, slow ones have one for chunks and one for gradients. It takes as long
        as the slower end needs for all it sends or receives in this post (messages share a link evenly, so all end together).
        """
        lanes = {False: "fast", True: what}
        seconds: dict[tuple[int, bool, bool], float] = {}  # by rank, slowness, direction
        for rank, mine in loads.items():
            for slow in (False, True):
                for inbound in (False, True):
                    some = [x for x in mine if x.inbound == inbound and self.link.is_slow(rank, x.peer) == slow]
                    nbytes, messages = sum(x.nbytes for x in some), sum(x.messages for x in some)
                    seconds[rank, slow, inbound] = self.link.between(slow).time_s(nbytes, messages)
        ready = {
            (r, slow, inbound): max(c.now, c.free.get((slow, inbound), 0.0), c.order.get(lanes[slow], 0.0))
            for r, c in ((r, self.clocks[r]) for r in loads)
            for slow in (False, True)
            for inbound in (False, True)
        }
        spans: dict[int, tuple[float, float]] = {}
        for rank, mine in loads.items():
            for slow in (False, True):
                some = [x for x in mine if self.link.is_slow(rank, x.peer) == slow]
                if not some:
                    continue
                begin = [max(ready[rank, slow, x.inbound], ready.get((x.peer, slow, not x.inbound), 0.0)) for x in some]
                took = [max(seconds[rank, slow, x.inbound], seconds.get((x.peer, slow, not x.inbound), 0.0)) for x in some]
                ends = [a + b for a, b in zip(begin, took, strict=True)]
                done = max(ends)
                for x, end in zip(some, ends, strict=True):
                    free = self.clocks[rank].free
                    free[slow, x.inbound] = max(end, free.get((slow, x.inbound), 0.0))
                nbytes_in, nbytes_out = (sum(x.nbytes for x in some if x.inbound == inbound) for inbound in (True, False))
                self.clocks[rank].flights.append(Flight(what, step, min(begin), done, nbytes_in, nbytes_out, slow))
                self.clocks[rank].order[lanes[slow]] = done
                first, last = spans.get(rank, (done, done))
                spans[rank] = (min(first, *begin), max(last, done))
        return spans

    def _compute_s(self, rank: int, n: int) -> float:
        """Seconds of a step's kernel calls, and of the memory traffic around them."""
        plan, row, device, shape = self.plans[rank], self.row[rank], self.device, self.shape
        step = plan.steps[n]
        work = work_of(step.parts, device.tile)
        rate = device.rate(max(shape.head_dim, shape.head_dim_v))
        heads = plan.share.q_heads * shape.batch
        flop = device.tile**2 * heads * _flop_per_pair(shape, self.backward)
        full, masked = (
            (rate.backward_full_TFLOPS, rate.backward_masked_TFLOPS)
            if self.backward
            else (rate.forward_full_TFLOPS, rate.forward_masked_TFLOPS)
        )
        kernel = flop * (work.full_tiles / full + work.masked_tiles / masked) / 1e12
        if self.backward:  # whose kernels divide what comes last
            kernel *= max(1.0, device.units / max(work.row_tiles * heads, 1))
        elif work.visible:
            late = [(stretch(part.slices, device.tile, heads, device.units), part.slices.area()) for part in step.parts]
            kernel *= sum(longer * area for longer, area in late) / work.visible
        if self.backward:
            # Stages of gradients start as zeros; delta is computed before the first step.
            traffic = step.rows * row.home + (plan.q_len * (2 * row.out + 6 * row.out_acc) if n == 0 else 0)
        else:
            # From the second call on, the running state is read and written again.
            traffic = 2 * min(work.row_tiles * device.tile, plan.q_len) * (row.out_acc + row.lse) if n else 0
        return kernel + work.calls * device.launch_s + self._copy_s(traffic)

    def _receive(self, slot: int | None = None) -> None:
        """Waits for the gradients that are due by a slot (None: for all) and adds them."""
        for clock in self.clocks.values():
            for due, done, arrived in clock.mail:
                if slot is None or due <= slot:
                    clock.wait(done)
                    clock.now += self._copy_s(3 * arrived)
            clock.mail = [mail for mail in clock.mail if slot is not None and mail[0] > slot]

    def _send_home(self, slot: int) -> None:
        loads: dict[int, dict[int, list[_Load]]] = {}
        for rank, plan in self.plans.items():
            for post in (post for post in plan.homes[slot] if post.transfers):
                loads.setdefault(post.step, {})[rank] = [self._load(plan, t, self.row[rank].home) for t in post.transfers]
        for step in sorted(loads):
            for rank, (_, done) in self._move("gradients", step, loads[step]).items():
                arrived = sum(x.nbytes for x in loads[step][rank] if x.inbound)
                self.clocks[rank].mail.append((self.plans[rank].due(slot, step), done, arrived))

    def _trade(self, entering: bool) -> None:
        """Packs and posts a group's exchange of heads, on the way in or home."""
        for rank, plan in self.plans.items():
            self._copy_heads(rank, self._copied(plan, entering)[0], entering)
        loads = {rank: self._head_loads(plan, entering) for rank, plan in self.plans.items()}
        spans = self._move("heads", 0 if entering else self.n_steps, loads)
        for rank, clock in self.clocks.items():
            clock.traded.append(spans[rank][1] if rank in spans else clock.now)

    def _take(self, entering: bool) -> None:
        """Waits for the oldest exchange under way (they are taken in the order of their posts), and unpacks it."""
        for rank, clock in self.clocks.items():
            clock.heads_s[entering] += clock.wait(clock.traded.pop(0))
            self._copy_heads(rank, self._copied(self.plans[rank], entering)[1], entering)

    def _copy_heads(self, rank: int, nbytes: int, entering: bool) -> None:
        took = self._copy_s(nbytes)
        self.clocks[rank].now += took
        self.clocks[rank].heads_s[entering] += took

    def _copied(self, plan: Plan, entering: bool) -> tuple[int, int]:
        """Bytes read and written on the computing stream before an exchange is posted, and after it has arrived: as for a
        transport that pulls. One that sends can do without packing what goes home, of batch 1."""
        me, share, others = plan.member, plan.share, [m for m in range(len(plan.shares)) if m != plan.member]
        before = after = 0
        for what in traded_tensors(plan, self.shape, entering, self.backward):
            own = block_bytes(plan, entering, me, me, what)
            before += 2 * sum(block_bytes(plan, entering, me, member, what) for member in others)
            laid_out = plan.k_len * share.kv_heads * what.unit if what.keys and share.k_index is not None else 0
            if entering:
                before, after = before + 2 * own, after + 2 * laid_out
                continue
            arrived = own + sum(block_bytes(plan, entering, member, me, what) for member in others)
            before += 2 * laid_out  # at most: fewer are written, when they are summed
            after += (3 if what.keys and plan.shares_keys else 2) * arrived
        return before, after

    def _head_loads(self, plan: Plan, entering: bool) -> list[_Load]:
        me, tensors, loads = plan.member, traded_tensors(plan, self.shape, entering, self.backward), []
        for member in (m for m in range(len(plan.shares)) if m != me):
            for inbound, source, dest in ((False, me, member), (True, member, me)):
                sizes = [block_bytes(plan, entering, source, dest, what) for what in tensors]
                if any(sizes):
                    peer = plan.rank * len(plan.shares) + member
                    loads.append(_Load(peer, inbound, sum(sizes), sum(1 for nbytes in sizes if nbytes)))
        return loads
