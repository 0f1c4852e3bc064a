"""What goes wrong ends in a clear error on every rank, in time: wrong arguments, ranks that disagree, die or stall."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store

from ringflash import ContextParallel, Mask, SimulatedWorld, attention
from ringflash.parallel.transport import TransportError
from ringflash.parallel.transport.domains import Domains
from ringflash.parallel.transport.symmetric import Symmetric
from ringflash.testing import RankPool

Ranks = Callable[[int], RankPool]


def tensors(
    batch: int = 1, seqlen: int = 12, heads: int = 4, kv_heads: int = 2, head_dim: int = 8, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of a whole sequence or of a rank."""
    make = torch.Generator().manual_seed(0)
    shapes = [(batch, seqlen, heads, head_dim), (batch, seqlen, kv_heads, head_dim), (batch, seqlen, kv_heads, head_dim)]
    q, k, v = (torch.randn(shape, generator=make).to(dtype) for shape in shapes)
    return q, k, v


# ---- wrong arguments, one process ----------------------------------------------------------------------------------------------


def call(**changes: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a call that is right but for the changes."""
    q, k, v = tensors()
    args = {"q": q, "k": k, "v": v, **{name: changes.pop(name) for name in ("q", "k", "v") if name in changes}}
    return (args["q"], args["k"], args["v"]), changes


WRONG_CALLS = [
    (call(q=torch.zeros(12, 4, 8)), r"q must be .*\(batch, sequence, heads, head_dim\).*\(12, 4, 8\)"),
    (call(k=[1.0]), "k must be a tensor.*list"),
    (call(q=tensors(heads=3)[0]), "multiple of key heads.*3 and 2"),
    (call(q=tensors(heads=1)[0]), "multiple of key heads.*1 and 2"),
    (call(q=tensors(batch=2)[0]), r"shapes do not fit.*q \(2, 12, 4, 8\).*k \(1, 12, 2, 8\)"),
    (call(q=tensors(head_dim=16)[0]), "shapes do not fit"),
    (call(v=tensors(seqlen=11)[2]), r"shapes do not fit.*v \(1, 11, 2, 8\)"),
    (call(v=tensors(kv_heads=4)[2]), r"shapes do not fit.*v \(1, 12, 4, 8\)"),
    (call(q=tensors(dtype=torch.bfloat16)[0]), "share one of.*bfloat16.*float32"),
    (call(**dict(zip("qkv", tensors(dtype=torch.int64), strict=True))), "share one of.*int64"),
    (call(**dict(zip("qkv", tensors(dtype=torch.complex64), strict=True))), "share one of.*complex64"),
    (call(k=tensors()[1].to("meta")), "on one device.*meta"),
    (call(mask="causal"), r"ringflash\.Mask.*str"),
    (call(mask=torch.ones(12, 12, dtype=torch.bool)), r"ringflash\.Mask.*Tensor"),
    (call(mask=Mask.documents([5, 6])), "sum to 11.*12 queries"),
    (call(mask=Mask.causal() & Mask.documents([5, 6])), "sum to 11"),
    (call(mask=Mask.blocks(np.ones((1, 1), dtype=bool), 8)), "does not cover 12"),
    (call(scale=math.nan), "scale must be a finite number.*nan"),
    (call(scale="big"), "scale must be a finite number.*'big'"),
    (call(softcap=-1.0), "softcap.*>= 0.*-1"),
    (call(softcap=math.inf), "softcap.*finite.*inf"),
    (call(sinks=torch.zeros(2)), r"sinks must be .*\(4,\).*\(2,\)"),
    (call(sinks=torch.zeros(4, dtype=torch.int64)), "sinks must be floating point.*int64"),
    (call(backend="fastest"), "fastest"),
    (call(backend="hopper"), "hopper"),
    (call(backend="cpu", softcap=3.0), "softcap"),
    (call(cp="everything"), "ContextParallel.*str"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG_CALLS, ids=[m[:40] for _, m in WRONG_CALLS])
def test_wrong_arguments_are_refused_with_what_was_given(arguments: tuple[tuple[Any, ...], dict[str, Any]], message: str) -> None:
    args, options = arguments
    with pytest.raises(ValueError, match=message):
        attention(*args, **options)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SimulatedWorld(4, "spiral"), "unknown layout 'spiral'"),
        (lambda: SimulatedWorld(4, schedule="spiral"), "unknown schedule 'spiral'"),
        (lambda: SimulatedWorld(4, schedule="hybrid", ulysses=3), "ulysses"),
        (lambda: SimulatedWorld(0), "world"),
        (lambda: SimulatedWorld(4, "balanced").attention(*tensors()), "for_mask"),
        (lambda: ContextParallel(), "init_process_group"),
    ],
)
def test_worlds_that_cannot_be_are_refused(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


# ---- ranks that disagree -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Odd:
    """What rank 1 does differently from the others, and what the error must say."""

    name: str
    says: tuple[str, ...]
    tensors: tuple[tuple[str, Any], ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    context: tuple[tuple[str, Any], ...] = ()


DISAGREEMENTS = [
    Odd("heads", ("ranks 0, 2: (1, 4, 8)", "rank 1: (1, 8, 8)"), tensors=(("heads", 8),)),
    Odd("kv_heads", ("rank 1:",), tensors=(("kv_heads", 4),)),
    Odd("batch", ("ranks 0, 2: (1, 4, 8)", "rank 1: (3, 4, 8)"), tensors=(("batch", 3),)),
    Odd("head_dim", ("rank 1: (1, 4, 16)",), tensors=(("head_dim", 16),)),
    Odd("dtype", ("dtype", "ranks 0, 2: torch.float32", "rank 1: torch.bfloat16"), tensors=(("dtype", torch.bfloat16),)),
    Odd("length", ("sequence length", "rank 1:"), tensors=(("seqlen", 5),)),
    Odd("mask", ("mask", "ranks 0, 2:", "rank 1:"), options=(("mask", Mask.causal(window=3)),)),
    Odd("documents", ("mask", "rank 1:"), options=(("mask", Mask.documents([5, 7])),)),
    Odd("scale", ("scale", "rank 1: 2"), options=(("scale", 2.0),)),
    Odd("softcap", ("softcap", "rank 1:"), options=(("softcap", 3.0),)),
    Odd("sinks", ("sinks", "rank 1:"), options=(("sinks", torch.zeros(4)),)),
    Odd("backend", ("backend", "reference"), options=(("backend", "reference"),)),
    Odd("layout", ("layout", "ranks 0, 2: zigzag", "rank 1: contiguous"), context=(("layout", "contiguous"),)),
    Odd("schedule", ("schedule", "rank 1: allgather"), context=(("schedule", "allgather"),)),
]


def attend_as(rank: int, odd: Odd) -> tuple[str, str, float]:
    """The error of a call in which rank 1 differs, its type, and the largest deviation of a right call that follows."""
    context: dict[str, Any] = {
        "layout": "zigzag",
        "schedule": "ring",
        "timeout_s": 60.0,
        **(dict(odd.context) if rank == 1 else {}),
    }
    cp = ContextParallel(**context)
    shapes: dict[str, Any] = {"seqlen": 4, **(dict(odd.tensors) if rank == 1 else {})}
    options: dict[str, Any] = {"mask": Mask.documents([12]), "cp": cp, **(dict(odd.options) if rank == 1 else {})}
    if shapes["seqlen"] != 4:
        options["mask"] = Mask.causal()
    try:
        attention(*tensors(**shapes), **options)
    except Exception as error:
        kind, text = type(error).__name__, str(error)
    else:
        return "", "no error", 0.0
    # The group is as good as new: the same context serves a call on which all agree.
    if odd.context:
        cp = ContextParallel(layout="zigzag", schedule="ring", timeout_s=60.0)
    q, k, v = tensors()
    out = attention(*(cp.shard(x) for x in (q, k, v)), mask=Mask.causal(), cp=cp)
    return kind, text, float((cp.unshard(out) - attention(q, k, v, mask=Mask.causal())).abs().max())


@pytest.mark.parametrize("odd", DISAGREEMENTS, ids=[odd.name for odd in DISAGREEMENTS])
def test_disagreement_is_the_same_error_on_every_rank(ranks: Ranks, odd: Odd) -> None:
    answers = ranks(3).run(attend_as, odd)
    kinds, texts, deviations = zip(*answers, strict=True)
    assert set(kinds) == {"ValueError"}, texts
    assert len(set(texts)) == 1, "every rank tells the same"
    for words in odd.says:
        assert words in texts[0]
    assert max(deviations) < 1e-5, "the group still works"


def attend_with_another_timeout(rank: int) -> str:
    """Lanes over slow links are made together, once for each timeout: ranks with some would not join those with none."""
    for timeout_s in (60.0, 60.0 + (rank == 1)):
        cp = ContextParallel(layout="zigzag", schedule="double_ring", inner=2, timeout_s=timeout_s)
        q, k, v = (cp.shard(x) for x in tensors())
        try:
            attention(q, k, v, mask=Mask.causal(), cp=cp)
        except ValueError as error:
            return str(error)
    return "no error"


def test_ranks_of_a_double_ring_must_have_one_timeout(ranks: Ranks) -> None:
    for text in ranks(4).run(attend_with_another_timeout):
        assert "timeout_s" in text and "ranks 0, 2, 3: 60.0" in text and "rank 1: 61.0" in text, text


REFUSALS = [
    Odd("rank 1's heads do not fit", ("multiple of key heads",), tensors=(("heads", 3),)),
    Odd("rank 1's dtype is none", ("share one of",), tensors=(("dtype", torch.int32),)),
    Odd("rank 1's documents do not sum", ("sum to 20",), options=(("mask", Mask.documents([20])),)),
    Odd("rank 1's backend cannot", ("hopper",), options=(("backend", "hopper"),)),
    Odd("rank 1's softcap is negative", ("softcap",), options=(("softcap", -1.0),)),
]


@pytest.mark.parametrize("odd", REFUSALS, ids=[odd.name for odd in REFUSALS])
def test_one_ranks_mistake_is_told_to_all(ranks: Ranks, odd: Odd) -> None:
    answers = ranks(3).run(attend_as, odd)
    kinds, texts, deviations = zip(*answers, strict=True)
    assert set(kinds) == {"ValueError"}, texts
    for words in odd.says:
        assert all(words in text for text in texts), texts
    assert all("rank 1" in texts[rank] for rank in (0, 2)), "the others are told whose mistake it is"
    assert max(deviations) < 1e-5, "the group still works"


# ---- ranks that cannot share memory --------------------------------------------------------------------------------------------


def make_transport_where_rank_1_cannot(rank: int, name: str, stage: str) -> tuple[str, str]:
    """What a context makes of symmetric memory that fails on rank 1 in one of its stages, and why (or the error it raises)."""

    def made(*args: Any, **kwargs: Any) -> Tensor:
        if rank == 1 and kwargs.get("device") == (None if stage == "rendezvous" else torch.device("cuda")):
            raise RuntimeError("no peer access to the moon\nand more")
        return torch.zeros(8)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.distributed._symmetric_memory.empty", made)
        patch.setattr("torch.distributed._symmetric_memory.rendezvous", made)
        patch.setattr("torch.cuda.synchronize", lambda device: None)
        cp = ContextParallel(transport=name, timeout_s=60.0)
        try:
            transport, why = cp._make_transport(torch.device("cuda"))
        except ValueError as error:
            return "ValueError", str(error)
        return transport.name, why


def make_transport_on_hosts(rank: int, hosts: str, schedule: str, name: str, **options: int) -> tuple[str, str, tuple[int, ...]]:
    """What a context makes of ranks on several hosts, why, and who is read by this rank (or the error it raises)."""

    def rendezvous(memory: Tensor, group: dist.ProcessGroup) -> Any:
        return SimpleNamespace(buffer_ptrs=dist.get_process_group_ranks(group))

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RINGFLASH_HOST", hosts[rank])
        patch.setattr("torch.distributed._symmetric_memory.empty", lambda *_, **__: torch.zeros(8))
        patch.setattr("torch.distributed._symmetric_memory.rendezvous", rendezvous)
        patch.setattr("torch.cuda.synchronize", lambda device: None)
        patch.setattr("ringflash.parallel.transport.symmetric.Cuda.stream", lambda *_: None)
        patch.setattr("ringflash.parallel.context.far_groups", lambda *_: {})
        cp = ContextParallel(None, "zigzag", schedule, transport=name, timeout_s=60.0, **options)
        try:
            transport, why = cp._make_transport(torch.device("cuda"))
        except ValueError as error:
            return "ValueError", str(error), ()
        near = transport.near if isinstance(transport, Domains) else transport
        return transport.name, why, near.flags.addresses if isinstance(near, Symmetric) else ()


@pytest.mark.parametrize(
    ("hosts", "schedule", "options", "domains"),
    [
        ("aabb", "auto", {}, ("01", "01", "23", "23")),
        ("abab", "ring", {}, ("02", "13", "02", "13")),
        ("aaab", "ring", {}, ("012", "012", "012", "3")),
        ("aabb", "hybrid", {"ulysses": 2}, ("01", "01", "23", "23")),
        ("aabb", "double_ring", {"inner": 2}, ("01", "01", "23", "23")),
        ("aaaa", "double_ring", {"inner": 2}, ("01", "01", "23", "23")),
    ],
)
def test_auto_shares_memory_inside_hosts_and_inner_groups(
    ranks: Ranks, hosts: str, schedule: str, options: dict[str, int], domains: tuple[str, ...]
) -> None:
    for (name, why, read), members in zip(
        ranks(4).run(make_transport_on_hosts, hosts, schedule, "auto", **options), domains, strict=True
    ):
        assert name == "domains" and len(read) == len(members), (name, why, read)
        assert len(read) == 1 or read == tuple(map(int, members)), "a rank alone asks for no rendezvous"
        assert why == f"auto: {len(members)} of 4 ranks read each other"


@pytest.mark.parametrize(
    ("hosts", "schedule", "options", "why"),
    [
        ("abcd", "ring", {}, "every rank is on a host of its own"),
        ("aabb", "ulysses", {}, "ranks 0 to 3 exchange heads or are an inner group, but are not on one host"),
        ("abba", "double_ring", {"inner": 2}, "ranks 0 to 1 exchange heads or are an inner group, but are not on one host"),
    ],
)
def test_hosts_that_tear_what_belongs_together_share_nothing(
    ranks: Ranks, hosts: str, schedule: str, options: dict[str, int], why: str
) -> None:
    for name, said, _ in ranks(4).run(make_transport_on_hosts, hosts, schedule, "auto", **options):
        assert name == "p2p" and why in said
    for name, said, _ in ranks(4).run(make_transport_on_hosts, hosts, schedule, "domains", **options):
        assert name == "ValueError" and why in said and 'transport="domains" cannot work here' in said


@pytest.mark.parametrize("stage", ["memory", "rendezvous"])
def test_auto_takes_symmetric_memory_on_all_ranks_or_on_none_and_says_whose_fault_it_is(ranks: Ranks, stage: str) -> None:
    answers = ranks(3).run(make_transport_where_rank_1_cannot, "auto", stage)
    assert answers == [("p2p", "auto: no symmetric memory, rank 1: no peer access to the moon")] * 3


def test_symmetric_memory_that_was_asked_for_is_refused_by_all_ranks(ranks: Ranks) -> None:
    answers = ranks(3).run(make_transport_where_rank_1_cannot, "symmetric", "memory")
    assert len(set(answers)) == 1
    assert answers[0][0] == "ValueError"
    assert "rank 1: no peer access" in answers[0][1]


def attend_on_cpu_with_symmetric(rank: int) -> str:
    cp = ContextParallel(transport="symmetric", timeout_s=60.0)
    try:
        attention(*(cp.shard(x) for x in tensors()), cp=cp)
    except ValueError as error:
        return str(error)
    return "no error"


def test_symmetric_needs_cuda(ranks: Ranks) -> None:
    for text in ranks(2).run(attend_on_cpu_with_symmetric):
        assert "rank 0: its tensors are on cpu" in text


# ---- ranks that die or stall ---------------------------------------------------------------------------------------------------

TIMEOUT_S = 4.0
IN_TIME_S = 30.0
"""Far above what it takes, far below what a hang takes: the machine may be busy."""


def attend_without_rank_1(rank: int, how: str, when: str, transport: str) -> tuple[str, str, float]:
    """The error of a call, its type, and after what time it came. Rank 1 exits or sleeps at some point of it."""
    cp = ContextParallel(layout="contiguous", schedule="ring", transport=transport, timeout_s=TIMEOUT_S)
    q, k, v = (cp.shard(x).requires_grad_() for x in tensors())
    if when != "handshake":
        attention(q, k, v, cp=cp).sum().backward()  # what there is to agree on is agreed on

    store = _get_default_store()

    def leave() -> None:
        if rank == 1 and how == "dies":
            os._exit(7)
        if rank == 1:  # asleep until the others have given up
            store.wait(["rank 0 gave up", "rank 2 gave up"], timedelta(seconds=2 * IN_TIME_S))

    if when in ("handshake", "forward"):
        leave()
    begin = time.monotonic()
    try:
        out = attention(q, k, v, cp=cp)
        if when == "backward":
            leave()
        begin = time.monotonic()
        out.sum().backward()
    except Exception as error:
        store.set(f"rank {rank} gave up", "")
        return type(error).__name__, str(error), time.monotonic() - begin
    return "", "no error", time.monotonic() - begin


@pytest.mark.parametrize(
    ("when", "transport"),
    [("handshake", "p2p"), ("forward", "p2p"), ("backward", "p2p"), ("forward", "alltoall"), ("backward", "alltoall")],
)
@pytest.mark.parametrize("how", ["dies", "stalls"])
def test_a_lost_rank_is_named_in_time(how: str, when: str, transport: str) -> None:
    with RankPool(3) as pool:
        outcomes = pool.outcomes(attend_without_rank_1, how, when, transport, timeout_s=2 * IN_TIME_S, grace_s=IN_TIME_S)
        pool.kill()
    for rank in (0, 2):
        assert outcomes[rank].error is None, outcomes[rank].error
        kind, text, seconds = outcomes[rank].value
        assert kind == TransportError.__name__, text
        # A collective cannot tell which of the others it waits for.
        assert re.match(rf"rank {rank}, .*step .*: .*ranks? ({'0, ' if transport == 'alltoall' else ''})?1\b", text), text
        assert seconds < IN_TIME_S
    if how == "dies":
        assert "exit code 7" in str(outcomes[1].error)
