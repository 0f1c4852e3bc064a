"""Point to point by torch.distributed: gloo on CPU, NCCL on CUDA, across any links. Chunks come straight from their owner."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store, _get_default_store, _world, default_pg_timeout

from ringflash.parallel.plan import Plan
from ringflash.parallel.transport import Label, Message, Pending, Transport, TransportError
from ringflash.parallel.watchdog import reached, watch

FAR_CTAS = 2
"""Multiprocessors that NCCL may take for one lane over slow links: as many channels as it uses towards a peer on another host by
itself (2.28, ncclTopoGetNchannels), where a GPU has one or two adapters. Attention kernels leave them free, since they keep all
others until a step is over: a transfer that becomes ready meanwhile would wait so long, and its link be idle. Read over sockets
at 8 Gbit/s only, backward, one after the other, with 2, 4 and 8: 1.06, 1.13, 1.17 of the time of the bytes with 32 key heads (in
other runs up to 1.11 with 2, from 1.09 with 4), 1.10 with 8 key heads, whatever the number."""

FarGroups = dict[str, dist.ProcessGroup]

_far: WeakKeyDictionary[Store, dict[tuple[tuple[int, ...], str, torch.device, float], FarGroups]] = WeakKeyDictionary()
"""By ranks, backend, device and timeout: those made since torch.distributed was initialised, which end with it."""
_near: WeakKeyDictionary[Store, dict[tuple[int, ...], dist.ProcessGroup]] = WeakKeyDictionary()
"""By ranks."""


def groups_joined() -> int:
    """In how many process groups this rank is. torch names a new one that only its members make by this number and the ranks:
    where it differs between members, they look for each other under different names."""
    return len(_world.pg_names)


def has_near_group(group: dist.ProcessGroup, members: Sequence[int]) -> bool:
    """Whether ``near_group`` need not make one."""
    some = _global_ranks(group, members)
    return len(some) == dist.get_world_size(group) or some in _near.get(_get_default_store(), {})


def near_group(group: dist.ProcessGroup, members: Sequence[int], again: bool = False) -> dist.ProcessGroup:
    """The group of some ranks of a group, for nothing but its members to find each other. These must call it together.

    again: whether to make it even if there is one, so that all ranks of ``group`` go on being in as many groups as before.
    """
    some = _global_ranks(group, members)
    if len(some) == dist.get_world_size(group):
        return group
    made = _near.setdefault(_get_default_store(), {})
    if again or some not in made:
        with _unbound():
            made[some] = _new_group(some, dist.get_backend_config(group))
    return made[some]


def _global_ranks(group: dist.ProcessGroup, members: Sequence[int]) -> tuple[int, ...]:
    ranks = dist.get_process_group_ranks(group)
    return tuple(ranks[m] for m in members)


def far_groups(group: dist.ProcessGroup, device: torch.device, timeout_s: float) -> FarGroups:
    """For chunks and for gradients another group of the same ranks each, with connections of its own. All of them must call it
    together. Made once for the same ranks and timeout: every context has the same use for them, and NCCL holds memory for each.
    After a timeout gloo's connections are closed; a context with another timeout gets new ones."""
    made, key = _far.setdefault(_get_default_store(), {}), _key(group, device, timeout_s)
    if key not in made:
        ranks, backend, *_ = key
        made[key] = _new_groups(ranks, backend, device)
    return made[key]


def has_far_groups(group: dist.ProcessGroup, device: torch.device, timeout_s: float) -> bool:
    """Whether ``far_groups`` need not make any."""
    return _key(group, device, timeout_s) in _far.get(_get_default_store(), {})


def _key(group: dist.ProcessGroup, device: torch.device, timeout_s: float) -> tuple[tuple[int, ...], str, torch.device, float]:
    # The backend by name, since the default would be the backends of the default group, whatever this one's are.
    return tuple(dist.get_process_group_ranks(group)), dist.get_backend_config(group), device, timeout_s


def _new_groups(ranks: Sequence[int], backend: str, device: torch.device) -> FarGroups:
    found = {}
    with _unbound() if len(ranks) < dist.get_world_size() else nullcontext():
        for what in ("chunks", "gradients"):
            found[what] = _new_group(ranks, backend, _few_ctas() if "nccl" in backend else None)
            if device.type == "cuda":  # NCCL sets up its rings in the first collective of a group, and needs all ranks there
                dist.all_reduce(torch.zeros(1, device=device), group=found[what])
    return found


def _new_group(ranks: Sequence[int], backend: str, options: object = None) -> dist.ProcessGroup:
    group: dist.ProcessGroup = dist.new_group(
        list(ranks), default_pg_timeout, backend=backend, pg_options=options, use_local_synchronization=True
    )
    return group


def _few_ctas() -> object:
    options = dist.ProcessGroupNCCL.Options()
    options.config.max_ctas = FAR_CTAS
    options._timeout = default_pg_timeout
    return options


@contextmanager
def _unbound() -> Iterator[None]:
    """Groups made meanwhile are not split off the default group's communicator, in which all of its ranks would have to join."""
    default = dist.group.WORLD
    assert default is not None
    bound = default.bound_device_id
    default.bound_device_id = None
    try:
        yield
    finally:
        default.bound_device_id = bound


class P2P(Transport):
    """Batched isend/irecv inside a process group.

    timeout_s   how long a peer may keep silent before TransportError.
    ask         what a silent peer last said about itself (see agree.py), for the error's text.
    far         further groups of the same ranks, for chunks and gradients that cross slow links: NCCL moves what is posted to one
                group in order, so there everything after a slow transfer would wait for it. Chunks and gradients fill a link in
                different directions where one side needs more of the other than that of it. (A group for each direction as well
                made backward passes 6 and 11 % slower.)
    """

    name = "p2p"

    def __init__(
        self,
        group: dist.ProcessGroup,
        timeout_s: float,
        ask: Callable[[int], str] = lambda peer: "",
        far: FarGroups | None = None,
    ) -> None:
        self.group, self.timeout_s, self.ask = group, timeout_s, ask
        self.far = far or {}
        self.ctas = FAR_CTAS if any("nccl" in dist.get_backend_config(group) for group in self.far.values()) else 0
        self.rank = dist.get_rank(group)

    def multiprocessors(self, plan: Plan) -> int:
        return self.ctas * (2 if plan.key.returns else 1) if len(plan.steps) > 1 else 0

    def group_of(self, label: Label) -> dist.ProcessGroup:
        return self.far.get(label.what, self.group) if label.far else self.group

    def post(self, label: Label, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        # Pairs must list their messages in the same order on both sides; across pairs any order will do.
        group = self.group_of(label)
        # Receives come first: gloo tells a peer so over the connection that its own data fills, and two that send each other
        # something would else do it one after the other.
        ops = [dist.P2POp(dist.irecv, m.tensor, group=group, group_peer=m.peer) for m in receives]
        ops += [dist.P2POp(dist.isend, m.tensor, group=group, group_peer=m.peer) for m in sends]
        if not ops:
            return Works(self, label, [], [], [])
        peers = [m.peer for m in (*receives, *sends)]
        try:
            works = dist.batch_isend_irecv(ops)
        except RuntimeError as error:
            raise failure(self.rank, label, sorted(set(peers)), self.timeout_s, 0.0, error, self.ask) from error
        return Works(self, label, works, peers, [m.tensor for m in (*receives, *sends)])


class Works:
    """Works under way. Holds the tensors: their memory must not be reused before the wait."""

    def __init__(
        self, transport: P2P, label: Label, works: Sequence[dist.Work], peers: Sequence[int], tensors: Sequence[object]
    ) -> None:
        self.transport, self.label, self.works, self.peers, self.tensors = transport, label, works, peers, tensors

    def wait(self) -> None:
        t = self.transport
        # NCCL puts a whole batch into one work; its wait only makes the stream wait, and the watchdog sees to the rest.
        cuda = bool(self.tensors) and self.tensors[0].is_cuda  # type: ignore[attr-defined]
        begin, begun = time.monotonic(), reached() if cuda and self.works else None
        for i, work in enumerate(self.works):
            peers = [self.peers[i]] if len(self.works) == len(self.peers) else sorted(set(self.peers))
            try:
                if cuda:
                    work.wait()
                else:
                    work.wait(timedelta(seconds=max(t.timeout_s - (time.monotonic() - begin), 0.001)))
            except RuntimeError as error:
                raise failure(t.rank, self.label, peers, t.timeout_s, time.monotonic() - begin, error, t.ask) from error
        if begun is not None:
            watch(t.group_of(self.label), t.rank, self.label, sorted(set(self.peers)), t.timeout_s, begun)
        self.works, self.tensors = [], []


def failure(
    rank: int, label: Label, peers: Sequence[int], timeout_s: float, waited_s: float, error: Exception, ask: Callable[[int], str]
) -> TransportError:
    """The error of a transfer that did not end: who waited for whom, in which step, and what the peer last said."""
    late = waited_s >= 0.9 * timeout_s
    what = f"did not answer within {timeout_s:g} s" if late else f"is gone (connection lost after {waited_s:.1f} s)"
    names = f"rank {peers[0]}" if len(peers) == 1 else f"one of ranks {', '.join(str(p) for p in peers)}"
    said = " ".join(text for p in peers if (text := ask(p)))
    advice = (
        "raise timeout_s (or RINGFLASH_TIMEOUT_S) if the rank is only slow"
        if late
        else "look at that rank's own output for the cause"
    )
    return TransportError(f"rank {rank}, {label}: {names} {what}; {said}{advice} [{str(error).splitlines()[0][:160]}]")
