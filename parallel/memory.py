"""Peak memory of one rank's pass, by walking a plan as the running code does and counting what it allocates and lets go.

The order of events is that of autograd.py, heads.py and transport/; a test runs those under a counter of storages and compares.
Not counted: what kernels need for themselves, and what a collective transport copies (`alltoall`, `allgather`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ringflash.parallel.plan import HeadShare, Plan, make_plan
from ringflash.parallel.transport.symmetric import BUFFERS, buffer_bytes

INPUTS = "q, k, v"
RESULTS = "out, lse"
GRADS_IN = "dout, delta"
GRADS_OUT = "dq, dk, dv"
EXCHANGED = "q, k, v of the own heads"
EXCHANGE = "exchange of heads"
STATE = "float32 running state"
PACKED = "own keys and values, packed"
STAGES = "arrived keys and values"
HOME = "float32 dk, dv of stages"
MAIL = "dk, dv arriving from others"
SCRATCH = "temporaries"


@dataclass(frozen=True)
class Shape:
    """What a plan leaves open of a call's tensors. ``dtype_bytes``: of q, k, v; running state is float32 (float64 for 8)."""

    batch: int = 1
    head_dim: int = 128
    head_dim_v: int = 128
    dtype_bytes: int = 2

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


def _kv_heads(plan: Plan) -> int:
    """Key heads that this rank computes with: one per query head where they are spread."""
    return len(plan.share.k_index) if plan.share.k_index is not None else plan.share.k1 - plan.share.k0


def _q_heads(plan: Plan) -> int:
    return plan.share.q1 - plan.share.q0


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

    @classmethod
    def of(cls, plan: Plan, shape: Shape) -> Rows:
        e, acc = shape.dtype_bytes * shape.batch, shape.acc_bytes * shape.batch
        h, hk = _q_heads(plan), _kv_heads(plan)
        return cls(
            q=h * shape.head_dim * e,
            k=hk * shape.head_dim * e,
            v=hk * shape.head_dim_v * e,
            out=h * shape.head_dim_v * e,
            kv_acc=hk * shape.dims * acc,
            q_acc=h * shape.head_dim * acc,
            out_acc=h * shape.head_dim_v * acc,
            lse=h * acc,
        )

    @property
    def kv(self) -> int:
        return self.k + self.v


class _StagesWalk:
    """transport.Stages: one buffer a stage from its post to its release, the own chunk packed when it is first sent."""

    def __init__(self, plan: Plan, ledger: Ledger, row: int, leased: bool = False) -> None:
        self.plan, self.ledger, self.row = plan, ledger, row
        self.there: set[int] = set()
        self.packed = leased  # then it is a part of what the transport holds all the time
        self.leaving: int | None = None  # released, but the loop's variables still hold it

    def _stage(self, step: int) -> None:
        if step not in self.there:
            self.there.add(step)
            self.ledger.take(STAGES, self.plan.steps[step].rows * self.row)

    def arrive(self, step: int) -> None:
        if step:
            self._stage(step)
        if self.leaving is not None:
            self.ledger.drop(STAGES, self.plan.steps[self.leaving].rows * self.row)
            self.leaving = None

    def post(self, slot: int) -> None:
        for step, transfers in self.plan.posts[slot]:
            for t in transfers:
                if t.dest == self.plan.rank:
                    self._stage(step)
                elif t.owner == self.plan.rank and not self.packed:
                    self.packed = True
                    self.ledger.take(PACKED, self.plan.k_len * self.row)

    def release(self, step: int) -> None:
        owners = {chunk.owner for chunk in self.plan.steps[step].chunks}
        sent_later = (
            t for slot in self.plan.posts[step + 1 :] for post in slot for t in post.transfers if t.source == self.plan.rank
        )
        if step in self.there and not any(t.owner in owners and t.owner != self.plan.rank for t in sent_later):
            self.leaving = step


class _HomeWalk:
    """transport.Homecoming: one float32 buffer a stage until its gradients have left, and what arrives for the own chunk."""

    def __init__(self, plan: Plan, ledger: Ledger, row: int, leased: bool = False) -> None:
        self.plan, self.ledger, self.row, self.leased = plan, ledger, row, leased
        self.there: set[int] = set()
        self.leaving: list[int] = []
        self.current = 0  # the loop's variables hold this one, released or not

    def gradients(self, step: int) -> None:
        self.current = step
        if step not in self.there and not (step and self.leased):  # what leaves lies in the transport's own buffers
            self.there.add(step)
            self.ledger.take(HOME, self.plan.steps[step].rows * self.row)

    def receive(self) -> None:
        self.ledger.drop(MAIL)
        for step in self.leaving:
            if step != self.current:
                self.ledger.drop(HOME, self.plan.steps[step].rows * self.row)
        self.leaving = [step for step in self.leaving if step == self.current]

    def post(self, slot: int) -> None:
        for t in self.plan.homes[slot]:
            if t.dest == self.plan.rank:
                self.ledger.take(MAIL, sum(b - a for a, b in t.ranges) * self.row)

    def release(self, step: int) -> None:
        owners = {chunk.owner for chunk in self.plan.steps[step].chunks}
        if step in self.there and step and not any(t.owner in owners for slot in self.plan.homes[step + 1 :] for t in slot):
            self.leaving.append(step)


class _ExchangeWalk:
    """heads.HeadExchange: what arrives, and copies of what leaves until it has left."""

    def __init__(self, plan: Plan, ledger: Ledger, batch: int) -> None:
        self.plan, self.ledger, self.batch = plan, ledger, batch
        self.others = [share for i, share in enumerate(plan.shares) if i != plan.member]

    def enter(self, what: str, tensors: Sequence[tuple[int, bool]]) -> None:
        """tensors: (bytes of one row of one head, whether heads are key heads)."""
        for unit, keys in tensors:
            lengths = self.plan.k_lengths if keys else self.plan.q_lengths
            self.ledger.take(EXCHANGE, sum(lengths) * _span(self.plan.share, keys) * unit)
            self.ledger.take(EXCHANGE, lengths[self.plan.member] * sum(_span(s, keys) for s in self.others) * unit)
        kept = 0
        for unit, keys in tensors:
            rows = self.plan.k_len if keys else self.plan.q_len
            if keys and self.plan.share.k_index is not None:
                self.ledger.take(EXCHANGE, rows * _kv_heads(self.plan) * unit)
            kept += rows * (_kv_heads(self.plan) if keys else _q_heads(self.plan)) * unit
        self.ledger.drop(EXCHANGE)
        self.ledger.take(what, kept)

    def leave(self, what: str, tensors: Sequence[tuple[int, bool, int, bool]]) -> None:
        """tensors: (bytes of one row of one head, whether heads are key heads, all heads, whether no copy is sent)."""
        kept = 0
        for unit, keys, heads, in_place in tensors:
            lengths = self.plan.k_lengths if keys else self.plan.q_lengths
            span, own = _span(self.plan.share, keys), lengths[self.plan.member]
            if keys and self.plan.share.k_index is not None:
                self.ledger.take(EXCHANGE, sum(lengths) * span * unit)
                in_place = self.batch == 1
            if not in_place:
                self.ledger.take(EXCHANGE, (sum(lengths) - own) * span * unit)
            self.ledger.take(EXCHANGE, own * (heads + sum(_span(s, keys) for s in self.others)) * unit)
            kept += own * heads * unit
        self.ledger.drop(EXCHANGE)
        self.ledger.take(what, kept)


def _span(share: HeadShare, keys: bool) -> int:
    return share.k1 - share.k0 if keys else share.q1 - share.q0


def forward_peak(plan: Plan, shape: Shape, sinks: bool = False, leased: bool = False) -> Peak:
    """The peak of `autograd.forward_loop`, inputs and results included. leased: without what symmetric memory holds for it."""
    ledger, row = Ledger(), Rows.of(plan, shape)
    e, acc = shape.dtype_bytes * shape.batch, shape.acc_bytes * shape.batch
    heads, kv_heads = plan.key.heads, plan.key.kv_heads
    own_q, own_k = plan.q_lengths[plan.member], plan.k_lengths[plan.member]
    ledger.take(INPUTS, (own_q * heads * shape.head_dim + own_k * kv_heads * shape.dims) * e)
    exchange = _ExchangeWalk(plan, ledger, shape.batch)
    if len(plan.shares) > 1:
        exchange.enter(EXCHANGED, [(shape.head_dim * e, False), (shape.head_dim * e, True), (shape.head_dim_v * e, True)])
    calls = [part for step in plan.steps for part in step.parts]
    direct = bool(calls) and all(part.q_view == (0, 1) for part in calls)
    rounded = shape.acc_bytes != shape.dtype_bytes
    state = sinks or not direct
    if state:
        ledger.take(STATE, plan.q_len * row.out_acc)
        ledger.take(RESULTS, plan.q_len * row.lse)
    stages = _StagesWalk(plan, ledger, row.kv, leased)
    for n, step in enumerate(plan.steps):
        stages.arrive(n)
        stages.post(n)
        for part in step.parts if direct else ():
            last = part is calls[-1]
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
            (acc, False, heads, _q_heads(plan) == 1 == shape.batch),
        ]
        exchange.leave(RESULTS, leaving)
    return ledger.peak()


def backward_peak(plan: Plan, shape: Shape, dlse: bool = False, leased: bool = False) -> Peak:
    """The peak of `autograd.backward_loop`: what forward saved, the incoming gradients, and the results included.

    leased: without what symmetric memory holds for it.
    """
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
    ledger.take(STATE, plan.q_len * row.q_acc)
    stages, home = _StagesWalk(plan, ledger, row.kv, leased), _HomeWalk(plan, ledger, row.kv_acc, leased)
    home.gradients(0)
    for n in range(len(plan.steps)):
        stages.arrive(n)
        stages.post(n)
        home.gradients(n)
        home.receive()
        home.post(n)
        stages.release(n)
        home.release(n)
    home.receive()
    home.post(len(plan.steps))
    home.receive()
    if rounded:
        ledger.take(GRADS_OUT, plan.q_len * row.q)
    if len(plan.shares) > 1:
        leaving = [
            (shape.head_dim * e, False, heads, shape.batch == 1),
            (shape.head_dim * acc, True, kv_heads, False),
            (shape.head_dim_v * acc, True, kv_heads, False),
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
    row = (shape.batch, shape.dims)
    chunks = buffer_bytes(plan, "chunks", row, shape.dtype_bytes)
    return BUFFERS * (chunks + (buffer_bytes(plan, "gradients", row, shape.acc_bytes) if backward else 0))


def extra_bytes(
    plan: Plan, shape: Shape, *, groups: int = 1, backward: bool = True, sinks: bool = False, dlse: bool = False,
    symmetric: bool = False,
) -> int:  # fmt: skip
    """The most that the passes take beyond `tensor_bytes`: running state, stages, and what the transport holds.

    groups: of heads, computed one after the other (autograd.py). All of it is then of one group, and so are results before they
    are put where they belong.
    """
    part = plan
    if groups > 1:
        part = make_plan(replace(plan.key, heads=plan.key.heads // groups, kv_heads=plan.key.kv_heads // groups))
    forward = forward_peak(part, shape, sinks, symmetric).total - tensor_bytes(part, shape, False)
    if groups > 1:  # a group's out and lse
        forward += shape.batch * part.q_len * part.key.heads * (shape.head_dim_v * shape.dtype_bytes + shape.acc_bytes)
    most = forward
    if backward:
        back = backward_peak(part, shape, dlse, symmetric)
        most = max(most, back.total - tensor_bytes(part, shape))
        if groups > 1:  # a group's dq, dk, dv
            own = part.key.heads * shape.head_dim * part.q_len + part.key.kv_heads * shape.dims * part.k_len
            most = max(most, back.total - tensor_bytes(part, shape) + shape.batch * shape.dtype_bytes * own)
    return max(most, 0) + (symmetric_bytes(part, shape, backward) if symmetric else 0)
