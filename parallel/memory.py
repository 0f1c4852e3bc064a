"""Peak memory of one rank's pass, by walking a plan as the running code does and counting what it allocates and lets go.

The order of events is that of autograd.py, heads.py and transport/; a test runs those under a counter of storages and compares.
Of what kernels need for themselves it counts what they declare (``kernels.Extras``), which are upper bounds. Not counted: copies
of inputs that a kernel cannot read where they lie (no tensor that the loops make is such), of log-sum-exp and delta for a dilated
mask's views, and what a collective transport copies (`alltoall`, `allgather`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ringflash.parallel.plan import Plan, make_plan, query_row_bytes
from ringflash.parallel.transport import itinerary
from ringflash.parallel.transport.symmetric import BUFFERS, buffer_bytes
from ringflash.parallel.work import calls_of

INPUTS = "q, k, v"
RESULTS = "out, lse"
GRADS_IN = "dout, delta"
GRADS_OUT = "dq, dk, dv"
EXCHANGED = "q, k, v of the own heads"
EXCHANGE = "exchange of heads"
STATE = "float32 running state"
PACKED = "own chunk, packed"
STAGES = "arrived chunks"
HOME = "float32 gradients of stages"
MAIL = "gradients arriving from others"
WORKSPACE = "workspace of the kernel"


@dataclass(frozen=True)
class Shape:
    """What a plan leaves open of a call's tensors and of its kernel. ``dtype_bytes``: of q, k, v; running state is float32
    (float64 for 8)."""

    batch: int = 1
    head_dim: int = 128
    head_dim_v: int = 128
    dtype_bytes: int = 2
    takes_delta: bool = True
    """Whether the kernel's backward takes delta in place of out (``kernels.Extras.delta``): only then may queries travel."""
    settle_rows: int = 384
    """``kernels.Extras.settle_rows``: the results of rows that one call completes stand beside the others' running state. This,
    the one above and the last two are by default those of our own kernels."""
    deterministic: bool = False
    """Whether gradients must repeat bitwise."""
    portion_bytes: tuple[tuple[int, int], ...] = ((64, 128 << 20), (96, 192 << 20), (128, 256 << 20))
    """``kernels.Extras.portion_bytes``: by head dim, up to."""
    turn_rows: int = 64
    """``kernels.Extras.turn_rows``."""

    def backward(self, plan: Plan) -> Plan:
        """The plan of the backward pass of such tensors."""
        return plan.backward(self.head_dim, self.head_dim_v, self.dtype_bytes, self.takes_delta)

    def portions(self, only_call: bool) -> int:
        """Bytes, at most, of partial sums of a backward call. only_call: whether it is its pass (``kernels.OneCallKernel``)."""
        if not (self.deterministic or only_call) or self.dtype_bytes != 2:  # kernels that divide work so are of 16-bit inputs
            return 0
        return next((n for dim, n in self.portion_bytes if max(self.head_dim, self.head_dim_v) <= dim), 0)

    def turns(self, rows: int, heads: int) -> int:
        """Bytes, at most, by which a backward call on so many query rows and heads orders its additions."""
        if not self.deterministic or self.dtype_bytes != 2 or not self.turn_rows:
            return 0
        return self.batch * heads * -(-rows // self.turn_rows) * 8

    @property
    def acc_bytes(self) -> int:
        return 8 if self.dtype_bytes == 8 else 4

    @property
    def dims(self) -> int:
        """Elements of one row of K and V of one head."""
        return self.head_dim + self.head_dim_v


@dataclass(frozen=True)
class Peak:
    """The moment at which most memory is taken: what lives then, in bytes, largest first."""

    items: tuple[tuple[str, int], ...]

    @property
    def total(self) -> int:
        return sum(nbytes for _, nbytes in self.items)


class Ledger:
    """Bytes alive by what they are for, and the peak so far."""

    def __init__(self) -> None:
        self.live: Counter[str] = Counter()
        self.best: Counter[str] = Counter()

    def take(self, what: str, nbytes: int) -> None:
        self.live[what] += nbytes
        if self.live.total() > self.best.total():
            self.best = self.live.copy()

    def drop(self, what: str, nbytes: int | None = None) -> None:
        """Lets go of so many bytes, or of all of that kind."""
        self.live[what] -= self.live[what] if nbytes is None else nbytes
        assert self.live[what] >= 0, what

    def peak(self) -> Peak:
        return Peak(tuple((what, n) for what, n in self.best.most_common() if n))


@dataclass(frozen=True)
class Rows:
    """Bytes of one row of this rank's buffers, all heads of this rank and the batch."""

    q: int
    k: int
    v: int
    out: int
    kv_acc: int
    q_acc: int
    out_acc: int
    lse: int
    moved: int
    """Of what travels: K and V; or Q, dO, log-sum-exp and delta."""
    home: int
    """Of its gradients."""

    @classmethod
    def of(cls, plan: Plan, shape: Shape) -> Rows:
        e, acc = shape.dtype_bytes * shape.batch, shape.acc_bytes * shape.batch
        h, hk = plan.share.q_heads, plan.share.kv_heads
        queries = h * shape.batch * query_row_bytes(shape.dims, shape.dtype_bytes)
        turned = plan.key.travels == "q"
        return cls(
            q=h * shape.head_dim * e,
            k=hk * shape.head_dim * e,
            v=hk * shape.head_dim_v * e,
            out=h * shape.head_dim_v * e,
            kv_acc=hk * shape.dims * acc,
            q_acc=h * shape.head_dim * acc,
            out_acc=h * shape.head_dim_v * acc,
            lse=h * acc,
            moved=queries if turned else hk * shape.dims * e,
            home=h * shape.head_dim * acc if turned else hk * shape.dims * acc,
        )

    @property
    def kv(self) -> int:
        return self.k + self.v


class _StagesWalk:
    """transport.Stages: one buffer a stage from its post until it is computed and passed on, the own chunk packed when it is
    first sent. ``row``: bytes of what travels; ``narrow``: of what is copied out of a row on arrival."""

    def __init__(self, plan: Plan, ledger: Ledger, row: int, narrow: int = 0, leased: bool = False) -> None:
        self.plan, self.ledger, self.row, self.narrow = plan, ledger, row, narrow
        self.ends = itinerary(plan).stages_end
        self.there: set[int] = set()
        self.packed = leased  # then it is a part of what the transport holds all the time
        self.leaving: list[int] = []  # released, but the loop's variables or what is being sent still hold them
        self.copied = 0

    def _stage(self, step: int) -> None:
        if step not in self.there:
            self.there.add(step)
            self.ledger.take(STAGES, self.plan.steps[step].rows * self.row)

    def arrive(self, step: int) -> None:
        local = self.plan.steps[step].local
        if not local:
            self._stage(step)
        copied = 0 if local else self.plan.steps[step].rows * self.narrow
        self.ledger.take(STAGES, copied)
        self.ledger.drop(STAGES, self.copied + sum(self.plan.steps[step].rows * self.row for step in self.leaving))
        self.leaving, self.copied = [], copied

    def post(self, slot: int) -> None:
        for step, transfers in self.plan.posts[slot]:
            for t in transfers:
                if t.dest == self.plan.rank:
                    self._stage(step)
                elif t.owner == self.plan.rank and not self.packed:
                    self.packed = True
                    self.ledger.take(PACKED, self.plan.steps[0].rows * self.row)

    def release(self, slot: int) -> None:
        self.leaving += [step for step in self.ends[slot] if step in self.there]


class _HomeWalk:
    """transport.Homecoming: one float32 buffer a stage until its gradients have left, and what arrives until it is added."""

    def __init__(self, plan: Plan, ledger: Ledger, row: int, leased: bool = False) -> None:
        self.plan, self.ledger, self.row, self.leased = plan, ledger, row, leased
        self.ends = itinerary(plan).gradients_end
        self.there: set[int] = set()
        self.released: set[int] = set()
        self.current = 0  # the loop's variables hold this one, released or not
        self.mail: list[tuple[int, int, set[int]]] = []  # due; bytes that arrive; steps of which something is being sent

    def gradients(self, step: int) -> None:
        step = 0 if self.plan.steps[step].local else step
        if step not in self.there and not (step and self.leased):  # what leaves lies in the transport's own buffers
            self.there.add(step)
            self.ledger.take(HOME, self.plan.steps[step].rows * self.row)
        self.current = step
        self._forget()

    def _forget(self) -> None:
        gone = self.released - {self.current}.union(*(steps for _, _, steps in self.mail))
        self.released -= gone
        self.ledger.drop(HOME, sum(self.plan.steps[step].rows * self.row for step in gone))

    def receive(self, slot: int | None = None) -> None:
        due = [mail for mail in self.mail if slot is None or mail[0] <= slot]
        self.mail = [mail for mail in self.mail if mail not in due]
        self.ledger.drop(MAIL, sum(nbytes for _, nbytes, _ in due))
        self._forget()

    def post(self, slot: int) -> None:
        for _, sends, receives, due in itinerary(self.plan).homes[slot]:
            nbytes = sum(leg.stop - leg.start for leg in receives) * self.row
            self.ledger.take(MAIL, nbytes)
            self.mail.append((due, nbytes, {leg.step for leg in sends}))

    def release(self, slot: int) -> None:
        self.released |= {step for step in self.ends[slot] if step in self.there}


class _ExchangeWalk:
    """heads.HeadExchange: what arrives, and copies of what leaves until it has left."""

    def __init__(self, plan: Plan, ledger: Ledger, batch: int) -> None:
        self.plan, self.ledger, self.batch = plan, ledger, batch
        self.others = [share for i, share in enumerate(plan.shares) if i != plan.member]

    def enter(self, what: str, tensors: Sequence[tuple[int, bool]]) -> None:
        """tensors: (bytes of one row of one head, whether heads are key heads)."""
        for unit, keys in tensors:
            lengths = self.plan.k_lengths if keys else self.plan.q_lengths
            self.ledger.take(EXCHANGE, sum(lengths) * self.plan.share.traded(keys) * unit)
            self.ledger.take(EXCHANGE, lengths[self.plan.member] * sum(s.traded(keys) for s in self.others) * unit)
        kept = 0
        for unit, keys in tensors:
            rows = self.plan.k_len if keys else self.plan.q_len
            if keys and self.plan.share.k_index is not None:
                self.ledger.take(EXCHANGE, rows * self.plan.share.kv_heads * unit)
            kept += rows * (self.plan.share.kv_heads if keys else self.plan.share.q_heads) * unit
        self.ledger.drop(EXCHANGE)
        self.ledger.take(what, kept)

    def leave(self, what: str, tensors: Sequence[tuple[int, bool, int, bool]]) -> None:
        """tensors: (bytes of one row of one head, whether heads are key heads, all heads, whether no copy is sent)."""
        kept = 0
        for unit, keys, heads, in_place in tensors:
            lengths = self.plan.k_lengths if keys else self.plan.q_lengths
            span, own = self.plan.share.traded(keys), lengths[self.plan.member]
            if keys and self.plan.share.k_index is not None:
                self.ledger.take(EXCHANGE, sum(lengths) * span * unit)
                in_place = self.batch == 1
            if not in_place:
                self.ledger.take(EXCHANGE, (sum(lengths) - own) * span * unit)
            self.ledger.take(EXCHANGE, own * (heads + sum(s.traded(keys) for s in self.others)) * unit)
            kept += own * heads * unit
        self.ledger.drop(EXCHANGE)
        self.ledger.take(what, kept)


def forward_peak(plan: Plan, shape: Shape, sinks: bool = False, lse: bool = False, leased: bool = False) -> Peak:
    """The peak of `autograd.forward_loop`, inputs and results included.

    lse: whether the caller gets it. leased: without what symmetric memory holds for it.
    """
    ledger, row = Ledger(), Rows.of(plan, shape)
    e, acc = shape.dtype_bytes * shape.batch, shape.acc_bytes * shape.batch
    heads, kv_heads = plan.key.heads, plan.key.kv_heads
    own_q, own_k = plan.q_lengths[plan.member], plan.k_lengths[plan.member]
    ledger.take(INPUTS, (own_q * heads * shape.head_dim + own_k * kv_heads * shape.dims) * e)
    exchange = _ExchangeWalk(plan, ledger, shape.batch)
    if len(plan.shares) > 1:
        exchange.enter(EXCHANGED, [(shape.head_dim * e, False), (shape.head_dim * e, True), (shape.head_dim_v * e, True)])
    direct, last_call, settled = calls_of(plan, shape.settle_rows)
    rounded = shape.acc_bytes != shape.dtype_bytes
    state = sinks or not direct
    if state:
        ledger.take(STATE, plan.q_len * row.out_acc)
        ledger.take(RESULTS, plan.q_len * row.lse)
    if settled:
        ledger.take(RESULTS, plan.q_len * row.out)
    stages = _StagesWalk(plan, ledger, row.moved, leased=leased)
    for n, step in enumerate(plan.steps):
        stages.arrive(n)
        stages.post(n)
        for part in step.parts if direct else ():
            last = part is last_call and not settled
            if not state:
                ledger.take(RESULTS, plan.q_len * row.lse)
                ledger.take(RESULTS if last else STATE, plan.q_len * (row.out if last else row.out_acc))
                state = True
            elif last and rounded:
                ledger.take(RESULTS, plan.q_len * row.out)
        stages.release(n)
    if not direct and rounded:
        ledger.take(RESULTS, plan.q_len * row.out)
    if len(plan.shares) > 1:
        leaving = [
            (shape.head_dim_v * e, False, heads, shape.batch == 1),
            *([(acc, False, heads, plan.share.q_heads == 1 == shape.batch)] if lse else []),
        ]
        exchange.leave(RESULTS, leaving)
    return ledger.peak()


def _is_only_call(plan: Plan) -> bool:
    """Whether a backward pass is one kernel call on whole tensors, so that a OneCallKernel takes its short way. That may do
    without float32 dk and dv, which the walk has all the same."""
    parts = [part for step in plan.steps for part in step.parts]
    return len(plan.steps) == len(parts) == plan.rings == len(plan.shares) == 1 and parts[0].q_view == parts[0].k_view == (0, 1)


def backward_peak(plan: Plan, shape: Shape, dlse: bool = False, leased: bool = False) -> Peak:
    """The peak of `autograd.backward_loop`: what forward saved, the incoming gradients, and the results included.

    leased: without what symmetric memory holds for it.
    """
    plan = shape.backward(plan)
    ledger, row = Ledger(), Rows.of(plan, shape)
    e, acc = shape.dtype_bytes * shape.batch, shape.acc_bytes * shape.batch
    heads, kv_heads = plan.key.heads, plan.key.kv_heads
    own_q = plan.q_lengths[plan.member]
    rounded = shape.acc_bytes != shape.dtype_bytes
    ledger.take(INPUTS, plan.q_len * row.q + plan.k_len * row.kv)
    ledger.take(RESULTS, plan.q_len * (row.out + row.lse))
    ledger.take(GRADS_IN, own_q * heads * (shape.head_dim_v * e + (acc if dlse else 0)))
    exchange = _ExchangeWalk(plan, ledger, shape.batch)
    if len(plan.shares) > 1:
        exchange.enter(GRADS_IN, [(shape.head_dim_v * e, False), *([(acc, False)] if dlse else [])])
    ledger.take(GRADS_IN, plan.q_len * row.lse)
    turned = plan.key.travels == "q"
    ledger.take(STATE, plan.k_len * row.kv_acc if turned else plan.q_len * row.q_acc)
    stages = _StagesWalk(plan, ledger, row.moved, 2 * row.lse if turned else 0, leased)
    home = _HomeWalk(plan, ledger, row.home, leased)
    portions = shape.portions(_is_only_call(plan))
    home.gradients(0)
    for n, step in enumerate(plan.steps):
        stages.arrive(n)
        stages.post(n)
        home.gradients(n)
        for part in step.parts:
            queries = range(part.q_view.start, step.rows if turned and not step.local else plan.q_len, part.q_view.step)
            ledger.take(WORKSPACE, portions + shape.turns(len(queries), plan.share.q_heads))
            ledger.drop(WORKSPACE)
        home.receive(n)
        home.post(n)
        stages.release(n)
        home.release(n)
    home.receive(len(plan.steps))
    home.post(len(plan.steps))
    home.receive()
    if rounded:
        ledger.take(GRADS_OUT, plan.q_len * row.q)
    if len(plan.shares) > 1:
        alone = shape.batch == 1  # what came home stands sequence first already
        leaving = [
            (shape.head_dim * e, False, heads, turned or alone),
            (shape.head_dim * acc, True, kv_heads, turned and alone),
            (shape.head_dim_v * acc, True, kv_heads, turned and alone),
        ]
        exchange.leave(GRADS_OUT, leaving)
        if rounded:
            ledger.take(GRADS_OUT, plan.k_lengths[plan.member] * kv_heads * shape.dims * e)
    elif rounded:
        ledger.take(GRADS_OUT, plan.k_len * row.kv)
    return ledger.peak()


def tensor_bytes(plan: Plan, shape: Shape, backward: bool = True) -> int:
    """What the caller has anyway on this rank: q, k, v, out, log-sum-exp; with ``backward`` also gradients of the first four."""
    q, k = plan.q_lengths[plan.member], plan.k_lengths[plan.member]
    rows = q * plan.key.heads * (shape.head_dim + shape.head_dim_v) + k * plan.key.kv_heads * shape.dims
    return shape.batch * (rows * shape.dtype_bytes * (2 if backward else 1) + q * plan.key.heads * shape.acc_bytes)


def symmetric_bytes(plan: Plan, shape: Shape, backward: bool = True) -> int:
    """What the transport "symmetric" holds all the time, outside torch's allocator: two buffers of chunks, two of gradients."""
    if len(plan.steps) == 1:
        return 0
    e, back = shape.dtype_bytes, shape.backward(plan)
    chunks = buffer_bytes(plan, "chunks", (shape.batch, shape.dims), e)
    if not backward:
        return BUFFERS * chunks
    there, home = shape.dims, shape.dims
    if back.key.travels == "q":
        there, home = query_row_bytes(shape.dims, e) // e, shape.head_dim
    chunks = max(chunks, buffer_bytes(back, "chunks", (shape.batch, there), e))
    return BUFFERS * (chunks + buffer_bytes(back, "gradients", (shape.batch, home), shape.acc_bytes))


@dataclass(frozen=True)
class Demand:
    """What else than the plan decides how much memory a call takes."""

    shape: Shape = Shape()
    backward: bool = True
    sinks: bool = False
    lse: bool = False
    """Whether the caller gets the log-sum-exp, and may differentiate it."""
    symmetric: bool = False
    """Whether the transport holds memory of its own outside torch's allocator."""


def lean_bytes(plan: Plan, call: Demand) -> int:
    """What is little beyond a call's tensors: a tenth of them, and 1.1 times two of the world's longest stages (what transports
    hold is as large on all ranks). And the partial sums of a kernel, which nothing that a budget decides makes fewer."""
    row = plan.share.kv_heads * call.shape.dims * call.shape.dtype_bytes
    stage = plan.longest_stage() * row
    portions = call.shape.portions(_is_only_call(plan)) if call.backward else 0
    return (tensor_bytes(plan, call.shape, call.backward) + 11 * 2 * stage * call.shape.batch) // 10 + portions


class Frugality(NamedTuple):
    """What a memory budget may decide: after how many rows "auto" closes a stage, and groups of heads, one after the other."""

    rows: int
    groups: int


def frugalities(rows: int, rings: int, k_len: int, kv_heads: int, ulysses: int, auto: bool) -> tuple[Frugality, ...]:
    """Ever thriftier ways to compute the same: first smaller stages, down to one chunk, then the heads in more groups.

    rows: what "auto" fills a stage to if nothing is asked for. Members of a head exchange have their share of heads anyway.
    """
    chunk = -(-k_len // rings)
    stages = [rows]
    chunks = rings - 1
    while auto and chunks > 1:
        chunks //= 2
        if (fewer := (chunks - 1) * chunk + 1) < stages[-1]:
            stages.append(fewer)
    divisors = [n for n in range(1, max(kv_heads, 1) + 1) if kv_heads % n == 0] if ulysses == 1 else [1]
    return tuple(Frugality(stage, groups) for groups in divisors for stage in stages)


def extra_bytes(plan: Plan, call: Demand, groups: int = 1) -> int:
    """The most that the passes take beyond `tensor_bytes`: running state, stages, and what the transport holds.

    groups: of heads, computed one after the other (autograd.py). All of it is then of one group, and so are results before they
    are put where they belong.
    """
    part, shape = plan, call.shape
    if groups > 1:
        part = make_plan(replace(plan.key, heads=plan.key.heads // groups, kv_heads=plan.key.kv_heads // groups))
    forward = forward_peak(part, shape, call.sinks, call.lse, call.symmetric).total - tensor_bytes(part, shape, False)
    if groups > 1:  # a group's out and lse
        forward += shape.batch * part.q_len * part.key.heads * (shape.head_dim_v * shape.dtype_bytes + shape.acc_bytes)
    most = forward
    if call.backward:
        back = backward_peak(part, shape, call.lse, call.symmetric)
        most = max(most, back.total - tensor_bytes(part, shape))
        if groups > 1:  # a group's dq, dk, dv
            own = part.key.heads * shape.head_dim * part.q_len + part.key.kv_heads * shape.dims * part.k_len
            most = max(most, back.total - tensor_bytes(part, shape) + shape.batch * shape.dtype_bytes * own)
    return max(most, 0) + (symmetric_bytes(part, shape, call.backward) if call.symmetric else 0)
