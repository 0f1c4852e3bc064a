"""Peak memory of one rank's pass, by walking a plan as the running code does and counting what it allocates and lets go.

The order of events is that of autograd.py, heads.py and transport/; a test runs those under a counter of storages and compares.
A walk of one group of heads is a generator, as the loop that it follows, and walks take turns as loops do (`_in_groups`).
Of what kernels need for themselves it counts what they declare (``kernels.Extras``), which are upper bounds. Not counted: copies
of inputs that a kernel cannot read where they lie (no tensor that the loops make is such), of log-sum-exp and delta for a dilated
mask's views, and what a collective transport copies (`alltoall`, `allgather`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ringflash.parallel.heads import Traded, largest_pack
from ringflash.parallel.plan import Plan, query_row_bytes
from ringflash.parallel.transport import buffer_bytes, itinerary, relay_buffers
from ringflash.parallel.transport.symmetric import BUFFERS
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
    the one above and the last three are by default those of our own kernels."""
    deterministic: bool = False
    """Whether gradients must repeat bitwise."""
    portion_bytes: tuple[tuple[int, int], ...] = ((64, 128 << 20), (96, 192 << 20), (128, 256 << 20))
    """``kernels.Extras.portion_bytes``: by head dim, up to."""
    turn_rows: int = 64
    """``kernels.Extras.turn_rows``."""
    one_call: bool = True
    """``kernels.Extras.one_call``: what such a kernel adds up in is gone when its results are there."""

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
class Demand:
    """What else than the plan decides how much memory a call takes."""

    shape: Shape = Shape()
    backward: bool = True
    sinks: bool = False
    lse: bool = False
    """Whether the caller gets the log-sum-exp, and may differentiate it."""
    symmetric: bool = False
    """Whether the transport holds memory of its own outside torch's allocator."""


@dataclass(frozen=True)
class Peak:
    """The moment at which most memory is taken: what lives then, in bytes, largest first."""

    items: tuple[tuple[str, int], ...]

    @property
    def total(self) -> int:
        return sum(nbytes for _, nbytes in self.items)


class Ledger:
    """Bytes alive by what they are for, and the peak so far. One that is part of another counts there too: what one loop holds,
    and lets go of all at once."""

    def __init__(self, whole: Ledger | None = None) -> None:
        self.whole = whole
        self.live: Counter[str] = Counter()
        self.best: Counter[str] = Counter()

    def take(self, what: str, nbytes: int) -> None:
        self.live[what] += nbytes
        if self.whole is not None:
            self.whole.take(what, nbytes)
        elif self.live.total() > self.best.total():
            self.best = self.live.copy()

    def drop(self, what: str, nbytes: int | None = None) -> None:
        """Lets go of so many bytes, or of all of that kind."""
        nbytes = self.live[what] if nbytes is None else nbytes
        self.live[what] -= nbytes
        assert self.live[what] >= 0, what
        if self.whole is not None:
            self.whole.drop(what, nbytes)

    def close(self, *kept: str) -> None:
        """Lets go of everything but some kinds, which are the whole's from now on."""
        for what in self.live:
            if what not in kept:
                self.drop(what)

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


@dataclass(frozen=True)
class Own:
    """Bytes of this rank's rows before heads are traded and after: all heads and the batch."""

    q: int
    kv: int
    out: int
    lse: int
    kv_acc: int
    """Of gradients of K and V as they are accumulated."""

    @classmethod
    def of(cls, plan: Plan, shape: Shape) -> Own:
        q = plan.q_lengths[plan.member] * plan.key.heads * shape.batch
        kv = plan.k_lengths[plan.member] * plan.key.kv_heads * shape.batch * shape.dims
        e, acc = shape.dtype_bytes, shape.acc_bytes
        return cls(q * shape.head_dim * e, kv * e, q * shape.head_dim_v * e, q * acc, kv * acc)


class _StagesWalk:
    """transport.Stages: one buffer a stage from its post until it is computed and passed on, the own chunk packed when it is
    first sent. ``row``: bytes of what travels; ``narrow``: of what is copied out of a row on arrival."""

    def __init__(self, plan: Plan, ledger: Ledger, row: int, narrow: int = 0, leased: bool = False) -> None:
        self.plan, self.ledger, self.row, self.narrow = plan, ledger, row, narrow
        self.ends = itinerary(plan).stages_end
        self.there: set[int] = set()
        # Then the own chunk, and what is passed on, are a part of what the transport holds all the time.
        self.packed = leased
        self.leased = itinerary(plan).relayed if leased else frozenset()
        self.leaving: list[int] = []  # released, but the loop's variables or what is being sent still hold them
        self.copied = 0

    def _bytes(self, step: int) -> int:
        return 0 if step in self.leased else self.plan.steps[step].rows * self.row

    def _stage(self, step: int) -> None:
        if step not in self.there:
            self.there.add(step)
            self.ledger.take(STAGES, self._bytes(step))

    def arrive(self, step: int) -> None:
        local = self.plan.steps[step].local
        if not local:
            self._stage(step)
        copied = 0 if local else self.plan.steps[step].rows * self.narrow
        self.ledger.take(STAGES, copied)
        self.ledger.drop(STAGES, self.copied + sum(map(self._bytes, self.leaving)))
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
        far = self.plan.far[step]
        if step not in self.there and not (step and self.leased and not far):  # what leaves lies in the transport's own buffers
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


def traded_tensors(plan: Plan, shape: Shape, entering: bool, backward: bool, lse: bool = False) -> tuple[Traded, ...]:
    """The tensors of an exchange of heads. Gradients of shared key heads travel as they were accumulated."""
    e, acc, d, dv = shape.dtype_bytes * shape.batch, shape.acc_bytes * shape.batch, shape.head_dim, shape.head_dim_v
    if entering == backward:  # out and lse, or their gradients
        return Traded(dv * e, False), *([Traded(acc, False)] if lse else [])
    keys = acc if backward and plan.shares_keys else e
    return Traded(d * e, False), Traded(d * keys, True), Traded(dv * keys, True)


class _ExchangeWalk:
    """heads.HeadExchange: what arrives, and copies of what leaves until it has left. Yields when it is posted."""

    def __init__(self, plan: Plan, room: Ledger, batch: int, leased: bool) -> None:
        self.plan, self.room, self.batch = plan, room, batch
        self.leased = leased  # then copies are a part of what the transport holds all the time
        self.others = [share for i, share in enumerate(plan.shares) if i != plan.member]

    def _sizes(self, tensor: Traded) -> tuple[int, int, int, int]:
        """Rows here and of all members; heads here and of all others."""
        lengths = self.plan.k_lengths if tensor.keys else self.plan.q_lengths
        others = sum(share.traded(tensor.keys) for share in self.others)
        return lengths[self.plan.member], sum(lengths), self.plan.share.traded(tensor.keys), others

    def enter(self, loop: Ledger, what: str, tensors: Sequence[Traded]) -> Iterator[None]:
        """What arrives is the loop's."""
        copies, laid_out = Ledger(self.room), 0
        for tensor in tensors:
            own, rows, heads, others = self._sizes(tensor)
            loop.take(what, rows * heads * tensor.unit)
            copies.take(EXCHANGE, 0 if self.leased else own * others * tensor.unit)
        yield
        copies.close()
        for tensor in tensors if self.plan.share.k_index is not None else ():
            if tensor.keys:
                loop.take(what, self.plan.k_len * self.plan.share.kv_heads * tensor.unit)
                laid_out += self.plan.k_len * self.plan.share.traded(keys=True) * tensor.unit
        loop.drop(what, laid_out)

    def leave(self, tensors: Sequence[Traded], rows_first: Sequence[bool]) -> Iterator[None]:
        """rows_first: of which tensors rows lie together, so that no copy of them is sent."""
        moving = Ledger(self.room)
        for tensor, in_place in zip(tensors, rows_first, strict=True):
            own, rows, heads, others = self._sizes(tensor)
            if tensor.keys and self.plan.share.k_index is not None:
                moving.take(EXCHANGE, rows * heads * tensor.unit)
                in_place = self.batch == 1
            moving.take(EXCHANGE, own * others * tensor.unit)
            moving.take(EXCHANGE, 0 if self.leased or in_place else (rows - own) * heads * tensor.unit)
        yield
        moving.close()


def _in_groups(walks: Sequence[Iterator[None]], trades: bool) -> None:
    """The walks of all groups of heads, in the order of `autograd.in_groups`. Where heads are traded, a walk yields when they are
    on their way in, and again when results are on their way home."""
    if not trades:
        for walk in walks:
            next(walk, None)
        return
    next(walks[0])
    for i, walk in enumerate(walks):
        if i + 1 < len(walks):
            next(walks[i + 1])
        next(walk)
        if i:
            next(walks[i - 1], None)
    next(walks[-1], None)


def forward_peak(
    plan: Plan,
    shape: Shape,
    sinks: bool = False,
    lse: bool = False,
    leased: bool = False,
    groups: int | None = None,
    saves: bool = True,
) -> Peak:
    """The peak of `autograd.forward_in_groups`, inputs and results included.

    lse: whether the caller gets it. leased: without what symmetric memory holds for it. groups: of heads; None: as many as the
    plan's key says. saves: whether gradients can be asked for.
    """
    groups = plan.key.groups if groups is None else groups
    part = plan.of_one_group(groups)
    ledger, trades, call = Ledger(), len(plan.shares) > 1, Demand(shape, saves, sinks, lse, leased)
    own = Own.of(plan, shape)
    ledger.take(INPUTS, own.q + own.kv)
    if groups > 1:
        ledger.take(RESULTS, own.out + (own.lse if lse or not trades else 0))
    walks = [_forward(part, call, ledger, groups > 1) for _ in range(groups if trades else 1)]
    _in_groups(walks, trades)
    return ledger.peak()


def _forward(plan: Plan, call: Demand, room: Ledger, grouped: bool) -> Iterator[None]:
    """`autograd.forward_loop`. grouped: whether there is room already for the results of all groups."""
    shape, loop, own = call.shape, Ledger(room), Own.of(plan, call.shape)
    exchange = _ExchangeWalk(plan, room, shape.batch, call.symmetric)
    if len(plan.shares) == 1:
        _forward_steps(plan, call, loop)
        loop.close()
        return
    yield from exchange.enter(loop, EXCHANGED, traded_tensors(plan, shape, True, False, call.lse))
    steps = Ledger(loop)
    _forward_steps(plan, call, steps)
    steps.close(RESULTS)
    if not grouped:
        room.take(RESULTS, own.out + (own.lse if call.lse else 0))
    alone = shape.batch == 1
    rows_first = [alone, alone and plan.share.q_heads == 1]
    leaving = traded_tensors(plan, shape, False, False, call.lse)
    yield from exchange.leave(leaving, rows_first[: len(leaving)])
    loop.close(*((EXCHANGED, RESULTS) if call.backward else ()))  # which are saved


def _forward_steps(plan: Plan, call: Demand, loop: Ledger) -> None:
    """The steps of a forward pass: running state, stages, out and lse."""
    shape, row = call.shape, Rows.of(plan, call.shape)
    direct, last_call, settled = calls_of(plan, shape.settle_rows)
    rounded = shape.acc_bytes != shape.dtype_bytes
    state = call.sinks or not direct
    if state:
        loop.take(STATE, plan.q_len * row.out_acc)
        loop.take(RESULTS, plan.q_len * row.lse)
    if settled:
        loop.take(RESULTS, plan.q_len * row.out)
    stages = _StagesWalk(plan, loop, row.moved, leased=call.symmetric)
    for n, step in enumerate(plan.steps):
        stages.arrive(n)
        stages.post(n)
        for part in step.parts if direct else ():
            last = part is last_call and not settled
            if not state:
                loop.take(RESULTS, plan.q_len * row.lse)
                loop.take(RESULTS if last else STATE, plan.q_len * (row.out if last else row.out_acc))
                state = True
            elif last and rounded:
                loop.take(RESULTS, plan.q_len * row.out)
        stages.release(n)
    if not direct and rounded:
        loop.take(RESULTS, plan.q_len * row.out)
    if loop.live[STATE] and not rounded and not settled:  # is the result
        loop.drop(STATE)
        loop.take(RESULTS, plan.q_len * row.out)


def _is_only_call(plan: Plan) -> bool:
    """Whether a backward pass is one kernel call on whole tensors, of which nothing is added up afterwards: a OneCallKernel takes
    its short way then. That may do without float32 dk and dv, which the walk has all the same."""
    parts = [part for step in plan.steps for part in step.parts]
    one = len(plan.steps) == len(parts) == plan.rings == 1 and not plan.shares_keys and plan.share.q_heads > 0
    return one and parts[0].q_view == parts[0].k_view == (0, 1)


def backward_peak(plan: Plan, shape: Shape, dlse: bool = False, leased: bool = False, groups: int | None = None) -> Peak:
    """The peak of `autograd.backward_in_groups`: with the caller's tensors and the results, what forward saved, and the incoming
    gradients. plan: of the forward pass.

    leased: without what symmetric memory holds for it. groups: of heads; None: as many as the plan's key says.
    """
    groups = plan.key.groups if groups is None else groups
    part = plan.of_one_group(groups)
    ledger, trades, call = Ledger(), len(plan.shares) > 1, Demand(shape, True, False, dlse, leased)
    own = Own.of(plan, shape)
    ledger.take(INPUTS, own.q + own.kv)
    ledger.take(RESULTS, own.out + (own.lse if dlse or not trades else 0))
    if trades:
        ledger.take(EXCHANGED, _exchanged_bytes(part, shape) * groups)
    ledger.take(GRADS_IN, own.out + (own.lse if dlse else 0))
    if groups > 1:
        ledger.take(GRADS_OUT, own.q + own.kv)
    walks = [_backward(part, call, ledger, groups > 1) for _ in range(groups if trades else 1)]
    _in_groups(walks, trades)
    return ledger.peak()


def _backward(plan: Plan, call: Demand, room: Ledger, grouped: bool) -> Iterator[None]:
    """`autograd.backward_loop`. grouped: whether there is room already for the results of all groups."""
    shape, loop, trades, shared = call.shape, Ledger(room), len(plan.shares) > 1, plan.shares_keys
    only, plan = shape.one_call and _is_only_call(plan), shape.backward(plan)
    row, own, alone = Rows.of(plan, shape), Own.of(plan, shape), shape.batch == 1
    rounded = shape.acc_bytes != shape.dtype_bytes
    exchange, steps = _ExchangeWalk(plan, room, shape.batch, call.symmetric), Ledger(loop)
    if trades:
        yield from exchange.enter(steps, GRADS_IN, traded_tensors(plan, shape, True, True, call.lse))
    if call.lse and (trades or (grouped and not alone)):  # made contiguous
        steps.take(GRADS_IN, plan.q_len * row.lse)
    if call.lse and trades:
        steps.drop(GRADS_IN, plan.q_len * row.lse)
    steps.take(GRADS_IN, plan.q_len * row.lse)  # delta
    _backward_steps(plan, call, steps, only)
    if rounded:
        loop.take(GRADS_OUT, plan.q_len * row.q)
    if rounded and not shared:
        loop.take(GRADS_OUT, plan.k_len * row.kv)
    steps.close()
    if not rounded:
        loop.take(GRADS_OUT, plan.q_len * row.q)
    if shared or not rounded:
        loop.take(GRADS_OUT, plan.k_len * row.kv_acc)
    if trades:
        if shared or not grouped:
            loop.take(GRADS_OUT, own.q + (own.kv_acc if shared else own.kv))
        turned = plan.key.travels == "q" and not only
        # What came home stands sequence first already, if it is one tensor; so it does once it is rounded.
        of_keys = alone if turned or only else rounded and not shared
        yield from exchange.leave(traded_tensors(plan, shape, False, True, call.lse), [turned or alone, of_keys, of_keys])
    loop.close()  # shared key heads are rounded after it: less than what had arrived


def _backward_steps(plan: Plan, call: Demand, ledger: Ledger, only_call: bool) -> None:
    """The steps of a backward pass: gradients as they are accumulated, stages, and what a kernel needs."""
    shape, leased, row, turned = call.shape, call.symmetric, Rows.of(plan, call.shape), plan.key.travels == "q"
    ledger.take(STATE, plan.k_len * row.kv_acc if turned else plan.q_len * row.q_acc)
    stages = _StagesWalk(plan, ledger, row.moved, 2 * row.lse if turned else 0, leased)
    home = _HomeWalk(plan, ledger, row.home, leased)
    portions = shape.portions(only_call)
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


def _exchanged_bytes(part: Plan, shape: Shape) -> int:
    """What one group of traded heads keeps for the backward pass: q, k, v, out and log-sum-exp of the own ones."""
    row = Rows.of(part, shape)
    return part.q_len * (row.q + row.out + row.lse) + part.k_len * row.kv


def tensor_bytes(plan: Plan, shape: Shape, backward: bool = True) -> int:
    """What the caller has anyway on this rank: q, k, v, out, log-sum-exp; with ``backward`` also gradients of the first four."""
    own = Own.of(plan, shape)
    return (own.q + own.kv + own.out) * (2 if backward else 1) + own.lse


def symmetric_bytes(plan: Plan, shape: Shape, backward: bool = True, lse: bool = False, groups: int | None = None) -> int:
    """What the transports "symmetric" and "domains" hold all the time, outside torch's allocator: two buffers of chunks, two of
    gradients, two of what members pack for each other in an exchange of heads, and as many as a double ring needs of chunks that
    it passes on.

    groups: of heads; None: as many as the plan's key says.
    """
    part = plan.of_one_group(groups)
    most = 0
    if len(plan.shares) > 1:
        ways = [(entering, returning) for entering in (True, False) for returning in (False, True)[: 1 + backward]]
        most = max(largest_pack(part, way[0], traded_tensors(part, shape, *way, lse)) for way in ways)
    heads = -(-most // 1024) * 1024
    if len(part.steps) == 1:
        return BUFFERS * heads
    e, back = shape.dtype_bytes, shape.backward(part)
    chunks = buffer_bytes(part, "chunks", (shape.batch, shape.dims), e)
    relays, relayed = relay_buffers(part), buffer_bytes(part, "relays", (shape.batch, shape.dims), e)
    if not backward:
        return BUFFERS * (heads + chunks) + relays * relayed
    there, home = shape.dims, shape.dims
    if back.key.travels == "q":
        there, home = query_row_bytes(shape.dims, e) // e, shape.head_dim
    chunks = max(chunks, buffer_bytes(back, "chunks", (shape.batch, there), e))
    relays, relayed = max(relays, relay_buffers(back)), max(relayed, buffer_bytes(back, "relays", (shape.batch, there), e))
    gradients = buffer_bytes(back, "gradients", (shape.batch, home), shape.acc_bytes)
    return BUFFERS * (heads + chunks + gradients) + relays * relayed


def lean_bytes(plan: Plan, call: Demand) -> int:
    """What is little beyond a call's tensors: a tenth of them, and 1.1 times two of the world's longest stages (what transports
    hold is as large on all ranks). And what nothing that a budget decides makes less: the partial sums of a kernel, and what
    ranks that trade heads keep of them."""
    part, groups, shape = plan.of_one_group(), plan.key.groups, call.shape
    stage = plan.longest_stage() * plan.share.kv_heads * shape.dims * shape.dtype_bytes * shape.batch
    portions = shape.portions(shape.one_call and _is_only_call(part)) if call.backward else 0
    kept = groups * _exchanged_bytes(part, shape) if len(plan.shares) > 1 and call.backward else 0
    return (tensor_bytes(plan, shape, call.backward) + 11 * 2 * stage) // 10 + portions + kept


class Frugality(NamedTuple):
    """What a memory budget may decide: after how many rows "auto" closes a stage, and groups of heads, one after the other."""

    rows: int
    groups: int


def frugalities(
    rows: int, rings: int, k_len: int, kv_heads: int, ulysses: int, auto: bool, groups: int = 1
) -> tuple[Frugality, ...]:
    """Ever thriftier ways to compute the same: first smaller stages, down to one chunk, then the heads in more groups.

    rows, groups: what "auto" fills a stage to, and the groups of heads, if nothing is asked for. Members of a head exchange each
    keep a key head of every group.
    """
    chunk = -(-k_len // rings)
    stages = [rows]
    chunks = rings - 1
    while auto and chunks > 1:
        chunks //= 2
        if (fewer := (chunks - 1) * chunk + 1) < stages[-1]:
            stages.append(fewer)
    own = kv_heads // ulysses if kv_heads % ulysses == 0 else 1
    more = [n for n in range(groups + 1, own + 1) if own % n == 0]
    return tuple(Frugality(stage, n) for n in (groups, *more) for stage in stages)


def extra_bytes(plan: Plan, call: Demand, groups: int | None = None) -> int:
    """The most that the passes take beyond `tensor_bytes`: running state, stages, traded heads, and what the transport holds.

    groups: of heads (autograd.py); None: as many as the plan's key says.
    """
    shape = call.shape
    forward = forward_peak(plan, shape, call.sinks, call.lse, call.symmetric, groups, call.backward).total
    most = max(forward - tensor_bytes(plan, shape, False), 0)
    if call.backward:
        most = max(most, backward_peak(plan, shape, call.lse, call.symmetric, groups).total - tensor_bytes(plan, shape))
    return most + (symmetric_bytes(plan, shape, call.backward, call.lse, groups) if call.symmetric else 0)
