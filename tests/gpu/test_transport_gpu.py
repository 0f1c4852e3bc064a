"""What one GPU shows of the passes: drawn worlds, what is packed, passes of one call, CUDA graphs, a host that waits for nothing,
memory.

Symmetric memory's flags between ranks are tests/multigpu's: ranks of one process and GPU share the driver's queues and the host's
waits for the whole device (a kernel that is loaded, memory that is made), and then wait for each other for ever.
tests/test_symmetric.py has all interleavings.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ringflash import Mask, attention
from ringflash.autograd import Attention, Job
from ringflash.kernels import Problem, choose, hopper_backward
from ringflash.parallel.memory import Demand, Shape, extra_bytes, symmetric_bytes, tensor_bytes
from ringflash.parallel.transport import Cargo, Label, Message, Transport
from ringflash.simulated import SimulatedWorld
from ringflash.testing import Case, Results, draw, make_inputs, spread, steady_waits
from ringflash.testing.runs import judge_of, simulate

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda")]

DEVICE = "cuda"
HEADS, KV_HEADS, DIM = 8, 2, 64


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("world", [2, 4])
def test_drawn_cases_of_several_ranks_on_one_gpu(world: int) -> None:
    """The kernels' part of tests/multigpu's drawn cases: the same cases by a simulated world on the GPU."""
    wrong = []
    for seed in range(200_000 + world * 100, 200_000 + world * 100 + 60):
        case = draw(seed, worlds=(world,))
        wrong += [f"{case!r}: {text}" for text in judge_of(case).objections(simulate(case, make_inputs(case, "cuda")).cpu())]
    assert not wrong, "\n".join(wrong)


# ---- what travels --------------------------------------------------------------------------------------------------------------


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


@pytest.mark.parametrize("how", ["", "some of the heads", "heads first", "every third row", "inside a wider dim"])
@pytest.mark.parametrize("widths", [(128, 128), (64, 64), (192, 128), (96, 96), (40, 72), (37, 37), (5, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_packed_queries_are_the_plain_cat(dtype: torch.dtype, widths: tuple[int, int], how: str) -> None:
    """Q and dO are copied by words where they can be, beside lse and delta: bit for bit what cat makes of them, rows between them
    untouched."""
    make = torch.Generator(DEVICE).manual_seed(0)
    rows, heads = 67, 6
    wide = [torch.randn(2, rows, heads, width, device=DEVICE, generator=make).to(dtype) for width in widths]
    for x in wide:
        x[0, 50, 2:4, :2] = torch.tensor([torch.nan, -0.0], device=DEVICE)
    if how == "some of the heads":
        wide, heads = [x[:, :, 2:4] for x in wide], 2
    elif how:
        wide = [spread(x, how) for x in wide]
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    narrow = [torch.randn(2, heads, rows, device=DEVICE, dtype=acc, generator=make) for _ in range(2)]
    cargo = Cargo(wide, narrow)
    buffer = torch.full(cargo.shape(rows), torch.nan, dtype=dtype, device=DEVICE)
    before, packed = buffer.clone(), ((3, 20), (41, rows))
    cargo.pack(buffer, packed)
    for start, stop in packed:
        part, plain = buffer[start:stop], torch.cat([x[:, start:stop] for x in wide], -1).transpose(0, 1)
        assert torch.equal(bits(part[..., : sum(widths)]), bits(plain))
        own = (*(x[:, start:stop] for x in wide), *(x[..., start:stop] for x in narrow))
        for given, x in zip(cargo.unpack(part), own, strict=True):
            assert torch.equal(bits(given), bits(x))
    for start, stop in ((0, 3), (20, 41)):
        assert torch.equal(bits(buffer[start:stop]), bits(before[start:stop]))


# ---- a pass of one call --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("mask", ["full()", "causal()", "causal(window=130)", "documents([0, 300, 1, 390, 9])"])
def test_a_pass_of_one_call_leaves_delta_to_the_kernel(
    mask: str, dim: int, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through autograd; but where the log-sum-exp is differentiated, or there are sinks, delta is the loop's."""
    given: list[Tensor | None] = []
    real = hopper_backward.gradients

    def gradients(*args: Any, row_delta: Tensor | None, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        given.append(row_delta)
        return real(*args, row_delta=row_delta, **options)

    monkeypatch.setattr(hopper_backward, "gradients", gradients)
    shape = {"q_len": 700, "k_len": 700, "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": dim, "head_dim_v": dim}
    case = Case(mask, world=1, dtype="bfloat16", **shape)  # type: ignore[arg-type]
    for dlse, sinks in ((False, False), (True, False), (False, True)):
        asked = replace(case, dlse=dlse, sinks=sinks)
        x = make_inputs(asked, DEVICE)
        leaves = [t.requires_grad_() for t in (x.q, x.k, x.v, x.sinks) if t is not None]
        options: dict[str, Any] = {"sinks": x.sinks, "backend": "hopper", "deterministic": deterministic}
        out, lse = attention(*leaves[:3], mask=asked.build_mask(), return_lse=True, **options)
        grads = torch.autograd.grad([out, lse] if dlse else [out], leaves, [x.dout, x.dlse] if dlse else [x.dout])
        results = Results(out.detach(), lse.detach(), *grads[:3], grads[3] if sinks else None)
        assert not judge_of(asked, DEVICE).objections(results)
        assert len(given) == 1 and (given.pop() is None) == (not dlse and not sinks)


# ---- CUDA graphs ---------------------------------------------------------------------------------------------------------------


def captured(run: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A graph of what was run twice before, on the side, as torch asks for."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph, results


def renew(tensors: Sequence[Tensor], seed: int) -> None:
    make = torch.Generator("cuda").manual_seed(seed)
    with torch.no_grad():
        for x in tensors:
            x.copy_(torch.randn(x.shape, device="cuda", generator=make))


def normal(rows: int) -> list[Tensor]:
    """q, k, v with gradients."""
    heads = (HEADS, KV_HEADS, KV_HEADS)
    return [torch.randn(1, rows, h, DIM, device="cuda", dtype=torch.bfloat16).requires_grad_() for h in heads]


@pytest.mark.parametrize("backward", [False, True])
def test_a_captured_call_on_one_device_computes_what_an_eager_one_does(backward: bool) -> None:
    tensors = normal(700)
    dout = torch.randn_like(tensors[0])

    def run() -> list[Tensor]:
        if not backward:
            with torch.no_grad():
                return [attention(*tensors, mask=Mask.causal())]
        out = attention(*tensors, mask=Mask.causal(), deterministic=True)
        return [out, *torch.autograd.grad(out, tensors, dout)]

    graph, results = captured(run)
    for seed in range(3):
        renew((*tensors, dout), seed)
        graph.replay()
        assert same(results, run())


def test_two_graphs_of_one_device_run_side_by_side() -> None:
    tensors = [[x.detach() for x in normal(2048)] for _ in range(2)]
    graphs = [captured(lambda own=own: [attention(*own, mask=Mask.causal())]) for own in tensors]  # type: ignore[misc]
    expected = [attention(*own, mask=Mask.causal()) for own in tensors]
    streams = [torch.cuda.Stream() for _ in graphs]
    torch.cuda.synchronize()
    for _ in range(20):
        for stream, (graph, _) in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(results[0], x) for (_, results), x in zip(graphs, expected, strict=True))


class Layer(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attention(q, k, v, mask=Mask.causal(), deterministic=True)
        assert isinstance(out, Tensor)
        return out


def test_make_graphed_callables() -> None:
    layer = torch.cuda.make_graphed_callables(Layer(), tuple(normal(512)))
    for _ in range(2):
        given = normal(512)
        out, expected = layer(*given), Layer()(*given)
        dout = torch.randn_like(out)
        grads = torch.autograd.grad(out, given, dout)
        assert same([out, *grads], [expected, *torch.autograd.grad(expected, given, dout)])


# ---- the host ------------------------------------------------------------------------------------------------------------------


def test_nothing_waits_for_the_device_in_the_steady_state() -> None:
    leaves = normal(512)

    def run() -> None:
        out = attention(*leaves, mask=Mask.causal())
        torch.autograd.grad(out, leaves, torch.ones_like(out))

    assert steady_waits(run) == ""


# ---- memory --------------------------------------------------------------------------------------------------------------------


class Leasing(Transport):
    """Moves nothing, and leases as the symmetric transport does: from memory that it has."""

    name = "leasing"
    pulls = True

    def __init__(self) -> None:
        self.memory: dict[Any, Tensor] = {}

    def lease(self, label: Label, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        key = (label, shape, dtype)
        if key not in self.memory:
            self.memory[key] = torch.zeros(shape, dtype=dtype, device=device)
        return self.memory[key]

    def post(self, label: Label, sends: Sequence[Message], receives: Sequence[Message]) -> Held:
        return Held([*sends, *receives])


class Held:
    def __init__(self, messages: list[Message]) -> None:
        self.messages = messages

    def wait(self) -> None:
        self.messages = []


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("schedule", "kv_heads", "groups"),
    [
        ("ring", 4, 1),
        ("allgather", 4, 1),
        ("staged:2", 4, 1),
        ("ring", 4, 2),
        ("ulysses", 4, 1),
        ("ulysses", 16, 2),
        ("ulysses", 16, 4),
        ("ulysses", 4, 2),  # some share a key head
    ],
)
def test_the_allocator_agrees_with_the_formula(schedule: str, kv_heads: int, groups: int) -> None:
    """One rank of four, its transfers left out: within 3 %, which is 7 to 9 MiB; where the pass is one call, for whose sums in
    float32 the formula has an upper bound, between that without them and that with them.

    By the allocator's rules nothing should be left: it rounds up to 512 bytes, and splits a cached block of more than 1 MiB only
    where more than 1 MiB remains. Tensors here are multiples of 2 MiB, or of 512 bytes up to 1 MiB. Kernels keep nothing of
    their own meanwhile: no work of these steps is divided. The 3 % are for blocks that other tests left in use: less than 1 MiB
    for each of the ten or so large tensors that live at the peak. Those that nobody uses any more go back to the driver first.
    """
    gc.collect()
    torch.cuda.empty_cache()
    seqlen, heads, dim = 32768, 16, 128
    plan = SimulatedWorld(4, "zigzag", schedule).plan(0, Mask.causal(), seqlen, seqlen, heads, kv_heads)
    kernel = choose("hopper", Problem("cuda", (9, 0), torch.bfloat16, dim, dim, heads, kv_heads, needs_grad=True))
    job = Job(plan, kernel, Leasing(), dim**-0.5, 0.0, False, groups=groups)
    q_len, k_len = plan.q_lengths[plan.member], plan.k_lengths[plan.member]
    shapes = ((q_len, heads), (k_len, kv_heads), (k_len, kv_heads))
    leaves = [torch.randn(1, rows, h, dim, device="cuda", dtype=torch.bfloat16).requires_grad_() for rows, h in shapes]
    dout = torch.randn_like(leaves[0])

    def run() -> None:
        out, _ = Attention.apply((job,), *leaves, None)  # type: ignore[no-untyped-call]
        torch.autograd.grad(out, leaves, dout)

    run()  # tables, counters, leases
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated() - sum(x.nbytes for x in (*leaves, dout))
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    found = torch.cuda.max_memory_allocated() - before
    shape = Shape(1, dim, dim)
    others = tensor_bytes(plan, shape) - symmetric_bytes(plan, shape, groups=groups)  # which is not the allocator's
    least, told = (
        others + extra_bytes(plan, Demand(of, symmetric=True), groups) for of in (replace(shape, portion_bytes=()), shape)
    )
    print(f"{schedule}, {groups} groups: allocator {found >> 20} MiB, formula {least >> 20} to {told >> 20} MiB")
    assert schedule == "ulysses" or least == told
    # Such a pass may do without float32 dk and dv, which are told all the same; no work of it is divided here.
    fewer = 0 if least == told else plan.k_len * plan.share.kv_heads // groups * 2 * dim * 4
    assert least - fewer - 0.03 * least < found < 1.03 * least
