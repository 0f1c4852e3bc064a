"""The Hopper forward against the float64 oracle: masks, head dims, GQA, strides, odd lengths, carries; outputs poisoned first."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from ringflash.kernels import Problem, Settle, hopper
from ringflash.slices import UNBOUNDED, Slices
from ringflash.testing.oracle import dense_attention
from ringflash.testing.slice_cases import BandCase, Row, causal, documents

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("hopper")]

OPEN = UNBOUNDED


CASES = [
    BandCase("one tile", 1, 128, 128, 1, 1, [(0, 128, 0, 128, -OPEN, OPEN)]),
    BandCase("one row", 1, 1, 1, 1, 1, causal(1)),
    BandCase("full, several items a CTA", 3, 1024, 1024, 8, 8, [(0, 1024, 0, 1024, -OPEN, OPEN)]),
    BandCase("causal", 2, 1024, 1024, 4, 4, causal(1024)),
    BandCase("tails of rows and keys, GQA", 1, 333, 517, 4, 2, [(0, 333, 0, 517, -OPEN, OPEN)]),
    BandCase("window below a tile, MQA", 1, 1000, 1000, 6, 1, causal(1000, window=100)),
    BandCase("documents of odd lengths, one and zero rows", 1, 1111, 1111, 4, 1, documents([1, 7, 0, 130, 333, 129, 511])),
    BandCase("many documents in one tile", 2, 700, 700, 2, 2, documents([100, 3, 2, 20, 30, 5, 97, 300, 143], hi=OPEN)),
    BandCase("rows that see nothing", 1, 900, 300, 2, 2, [(100, 250, 37, 290, -OPEN, 0), (700, 750, 0, 300, -OPEN, OPEN)]),
    BandCase("prefix: Slices share rows", 1, 600, 600, 2, 1, [(0, 600, 0, 150, -OPEN, OPEN), (0, 600, 150, 600, -OPEN, 0)]),
    BandCase("bands of striped chunks", 1, 640, 640, 2, 2, [(0, 640, 0, 640, -300, -17), (0, 640, 0, 640, 50, 90)]),
    BandCase("two arrived chunks, one causal", 1, 500, 1000, 2, 2,
             [(0, 500, 0, 500, -OPEN, OPEN), (0, 500, 500, 1000, -OPEN, 500)]),
]  # fmt: skip


def inputs(case: BandCase, dtype: torch.dtype, D: int, Dv: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and the visible pairs (Sq, Sk)."""
    g = torch.Generator("cuda").manual_seed(seed)
    shapes = [(case.B, case.Sq, case.H, D), (case.B, case.Sk, case.Hkv, D), (case.B, case.Sk, case.Hkv, Dv)]
    q, k, v = (torch.randn(s, device="cuda", dtype=torch.float32, generator=g).to(dtype) for s in shapes)
    return q, k, v, case.visible("cuda")


def agree(
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, visible: Tensor,
    *, scale: float, softcap: float = 0.0, carry: tuple[Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
    """Error at most twice that of plain torch in the same dtype, plus one rounding; exact where a row sees nothing."""
    exact, exact_lse = dense_attention(q.double(), k.double(), v.double(), visible, scale=scale, softcap=softcap)
    plain, _ = dense_attention(q, k, v, visible, scale=scale, softcap=softcap)
    if carry is not None:
        before, before_lse = carry[0].double(), carry[1].double()
        total = torch.logaddexp(before_lse, exact_lse)
        keep, add = ((x - total).nan_to_num(nan=-torch.inf).exp().transpose(1, 2)[..., None] for x in (before_lse, exact_lse))
        plain = (keep * before + add * plain.double()).to(q.dtype)
        exact, exact_lse = keep * before + add * exact, total
    assert not torch.isnan(out).any() and not torch.isnan(lse).any()
    assert torch.equal(lse.isneginf(), exact_lse.isneginf())
    empty = exact_lse.isneginf().transpose(1, 2)
    assert bool((out[empty] == 0).all())
    eps = torch.finfo(q.dtype).eps
    error, fair = out.double() - exact, plain.double() - exact
    assert error.norm() <= 2 * fair.norm() + eps / 4 * exact.norm(), (error.norm() / exact.norm(), fair.norm() / exact.norm())
    assert error.abs().max() <= 2 * fair.abs().max() + eps * exact.abs().max()
    seen = ~exact_lse.isneginf()
    if seen.any():
        assert (lse.double() - exact_lse)[seen].abs().max() <= 1e-5 * max(1.0, float(exact_lse[seen].abs().max()))


def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every new tensor starts as NaN, so that an element the kernel does not write is seen."""
    real = torch.empty

    def empty(*args, **kwargs):  # type: ignore[no-untyped-def]
        x = real(*args, **kwargs)
        return x.fill_(torch.nan) if x.is_cuda and x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", empty)


def run(q: Tensor, k: Tensor, v: Tensor, rows: Sequence[Row], **options):  # type: ignore[no-untyped-def]
    problem = Problem.of(q, k, v, softcap=bool(options.get("softcap")))
    assert hopper.KERNEL.refuses(problem) is None
    return hopper.KERNEL.forward(q, k, v, Slices.from_rows(rows), **options)


@pytest.mark.parametrize("dims", [(128, 128), (64, 64), (96, 96), (192, 192), (256, 256), (192, 128)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.why)
def test_start_and_finish(case: BandCase, dims: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, visible = inputs(case, torch.bfloat16, *dims)
    poisoned(monkeypatch)
    out, lse = run(q, k, v, case.rows, scale=dims[0] ** -0.5)
    agree(out, lse, q, k, v, visible, scale=dims[0] ** -0.5)


@pytest.mark.parametrize("D", [8, 40, 80, 120, 136, 200, 248])
def test_head_dims_between(D: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[6]
    q, k, v, visible = inputs(case, torch.bfloat16, D, D)
    poisoned(monkeypatch)
    out, lse = run(q, k, v, case.rows, scale=D**-0.5)
    agree(out, lse, q, k, v, visible, scale=D**-0.5)


@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_fp16_and_softcap(D: int, softcap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    for case in (CASES[3], CASES[7]):
        q, k, v, visible = inputs(case, torch.float16, D, D)
        poisoned(monkeypatch)
        out, lse = run(q, k, v, case.rows, scale=0.3, softcap=softcap)
        monkeypatch.undo()
        agree(out, lse, q, k, v, visible, scale=0.3, softcap=softcap)


@pytest.mark.parametrize("scale", [0.01, 0.1, 0.3])
@pytest.mark.parametrize("softcap", [15.0, 50.0])
def test_a_capped_score_is_known_to_two_eps_of_the_cap(scale: float, softcap: float) -> None:
    """The lse of rows that see few keys is as small as the scores: the cap's own error shows there."""
    q, k, v, visible = inputs(CASES[3], torch.bfloat16, 64, 64)
    _, lse = run(q, k, v, CASES[3].rows, scale=scale, softcap=softcap)
    _, exact = dense_attention(q.double(), k.double(), v.double(), visible, scale=scale, softcap=softcap)
    _, plain = dense_attention(q.float(), k.float(), v.float(), visible, scale=scale, softcap=softcap)
    error, fair = ((x.double() - exact).abs() for x in (lse, plain))
    eps = torch.finfo(torch.float32).eps
    assert bool((error <= 2 * fair.max() + eps * (1 + exact.abs() + 2 * softcap)).all()), (error.max(), fair.max())


@pytest.mark.parametrize("dims", [(128, 128), (64, 64), (96, 96), (192, 192), (256, 256), (192, 128), (80, 72)], ids=str)
@pytest.mark.parametrize("case", [CASES[i] for i in (1, 2, 4, 6, 8, 11)], ids=lambda c: c.why)
def test_continue(case: BandCase, dims: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two launches over two parts of the keys equal one launch over both, in all four epilogues; the state is a strided view."""
    q, k, v, visible = inputs(case, torch.bfloat16, *dims)
    scale, C = dims[0] ** -0.5, case.Sk // 2
    first = [(q0, q1, min(k0, C), min(k1, C), lo, hi) for q0, q1, k0, k1, lo, hi in case.rows]
    second = [(q0, q1, max(k0, C), max(k1, C), lo, hi) for q0, q1, k0, k1, lo, hi in case.rows]
    second = [(q0, q1, k0 - C, k1 - C, max(lo, -OPEN // 2) - C, min(hi, OPEN // 2) - C) for q0, q1, k0, k1, lo, hi in second]
    poisoned(monkeypatch)
    out, lse = run(q, k[:, :C], v[:, :C], first, scale=scale, finish=False)
    assert out.dtype == torch.float32
    B, S, H, Dv = out.shape
    home, home_lse = torch.empty(B, S, 2, H, Dv, device="cuda"), torch.empty(B, H, 2, S, device="cuda")
    view, view_lse = home[:, :, 1].copy_(out), home_lse[:, :, 1].copy_(lse)
    final, final_lse = run(q, k[:, C:], v[:, C:], second, scale=scale, carry=(out, lse))
    assert final.dtype == q.dtype
    agree(final, final_lse, q, k, v, visible, scale=scale)
    running, running_lse = run(q, k[:, C:], v[:, C:], second, scale=scale, carry=(view, view_lse), finish=False)
    assert running.data_ptr() == view.data_ptr() and running_lse.data_ptr() == view_lse.data_ptr()
    assert home[:, :, 0].isnan().all() and home_lse[:, :, 0].isnan().all(), "wrote outside the view"
    agree(running, running_lse, q, k, v, visible, scale=scale)
    assert torch.equal(running.to(q.dtype), final) and torch.equal(running_lse, final_lse)


@pytest.mark.parametrize("dims", [(128, 128), (64, 64), (256, 256)], ids=str)
def test_starting_from_sinks(dims: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """(0, sink) is a running state like any other: a key that takes weight and gives nothing."""
    for case in (CASES[8], CASES[6]):
        q, k, v, visible = inputs(case, torch.bfloat16, *dims)
        sinks = torch.randn(case.H, device="cuda")
        carry = torch.zeros(case.B, case.Sq, case.H, dims[1], device="cuda"), sinks[None, :, None].repeat(case.B, 1, case.Sq)
        poisoned(monkeypatch)
        out, lse = run(q, k, v, case.rows, scale=0.1, carry=tuple(x.clone() for x in carry))
        agree(out, lse, q, k, v, visible, scale=0.1, carry=carry)
        direct, direct_lse = run(q, k, v, case.rows, scale=0.1, sinks=sinks)
        assert torch.equal(direct, out) and torch.equal(direct_lse, lse)
        running, running_lse = run(q, k, v, case.rows, scale=0.1, sinks=sinks, finish=False)
        assert torch.equal(running.to(q.dtype), out) and torch.equal(running_lse, lse)
        monkeypatch.undo()
    nothing, nothing_lse = run(q, k, v, [], scale=0.1, sinks=sinks)
    assert bool((nothing == 0).all()) and torch.equal(nothing_lse, carry[1])


SETTLING = [
    # (why, rows of the Slices, settled ranges), of 1,300 queries and 700 keys
    ("a block in the middle", [(0, 1300, 0, 700, -OPEN, OPEN)], ((384, 768),)),
    ("the ragged end", [(0, 1300, 0, 700, -OPEN, 0)], ((1152, 1300),)),
    ("all", [(0, 1300, 0, 700, -OPEN, 0)], ((0, 1300),)),
    ("none", [(100, 1200, 0, 700, -OPEN, 0)], ()),
    ("blocks without a Slice", [(500, 600, 30, 700, -OPEN, OPEN)], ((0, 384), (768, 1152))),
    ("two documents, one of them complete", documents([384, 300, 16]), ((0, 384),)),
    ("no Slice at all", [], ((768, 1300),)),
]


@pytest.mark.parametrize("dims", [(128, 128), (64, 64), (256, 256), (192, 128), (40, 72)], ids=str)
@pytest.mark.parametrize(("why", "rows", "ranges"), SETTLING, ids=[why for why, _, _ in SETTLING])
def test_settled_rows(
    why: str, rows: Sequence[Row], ranges: tuple[tuple[int, int], ...], dims: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settled rows come in the final dtype, others stay in the running state; rows neither settled nor seen stay untouched."""
    case = BandCase(why, 2, 1300, 700, 4, 2, rows)
    q, k, v, visible = inputs(case, torch.bfloat16, *dims)
    shape, scale = (case.B, case.Sq, case.H, dims[1]), dims[0] ** -0.5
    settles = torch.zeros(case.Sq, dtype=torch.bool, device="cuda")
    for begin, end in ranges:
        settles[begin:end] = True
    state = torch.randn(shape, device="cuda"), torch.randn(case.B, case.H, case.Sq, device="cuda")
    poisoned(monkeypatch)
    for carry in (None, state):
        final = torch.empty(shape, dtype=q.dtype, device="cuda")
        given = None if carry is None else (carry[0].clone(), carry[1].clone())
        running, lse = run(q, k, v, rows, scale=scale, carry=given, finish=False, settle=Settle(final, ranges))
        assert running.dtype == torch.float32
        assert bool(final[:, ~settles].isnan().all()), "wrote rows that are not settled"
        out = torch.where(settles[None, :, None, None], final.float(), running)
        agree(out, lse, q, k, v, visible, scale=scale, carry=carry)
        if carry is not None:
            assert given is not None and running is given[0] and lse is given[1]
            tiles = torch.arange(case.Sq, device="cuda") // hopper.SETTLE_ROWS
            touched = torch.isin(tiles, tiles[visible.any(1)])
            idle = ~settles & ~touched
            assert torch.equal(running[:, idle], carry[0][:, idle]) and torch.equal(lse[:, :, idle], carry[1][:, :, idle])
            assert torch.equal(final[:, settles & ~touched], carry[0][:, settles & ~touched].to(q.dtype))


@pytest.mark.parametrize("layout", ["BHSD", "qkv in one tensor", "sliced sequence", "unaligned rows", "expanded heads"])
def test_strides(layout: str) -> None:
    B, S, H, D = 2, 300, 4, 128
    x = torch.randn(B, S + 9, 3, H, D + 3, device="cuda").to(torch.bfloat16)
    packed = x[..., :D].contiguous()
    if layout == "BHSD":
        q, k, v = (packed[:, :S, i].transpose(1, 2).contiguous().transpose(1, 2) for i in range(3))
    elif layout == "qkv in one tensor":
        q, k, v = (packed[:, :S, i] for i in range(3))
    elif layout == "sliced sequence":
        q, k, v = (packed[:, 9:, i, 1:3] for i in range(3))
    elif layout == "unaligned rows":
        q, k, v = (x[:, :S, i, :, 1 : D + 1] for i in range(3))
    else:
        q, k, v = packed[:, :S, 0], packed[:, :S, 1, :1].expand(B, S, H, D), packed[:, :S, 2, :1].expand(B, S, H, D)
    rows = causal(S)
    visible = torch.ones(S, S, dtype=torch.bool, device="cuda").tril()
    out, lse = run(q, k, v, rows, scale=D**-0.5)
    agree(out, lse, q.contiguous(), k.contiguous(), v.contiguous(), visible, scale=D**-0.5)


def test_large_scores_and_bitwise_repetition() -> None:
    """Scores of some hundreds, rising along the keys, so that every tile moves the maximum; and the same bits in every run."""
    case = BandCase("", 2, 1000, 1000, 4, 4, causal(1000))
    q, k, v, visible = inputs(case, torch.bfloat16, 128, 128)
    k = (k * torch.linspace(0.1, 8.0, 1000, device="cuda")[None, :, None, None]).to(k.dtype)
    out, lse = run(q, k, v, case.rows, scale=1.0)
    agree(out, lse, q, k, v, visible, scale=1.0)
    for _ in range(5):
        again, again_lse = run(q, k, v, case.rows, scale=1.0)
        assert torch.equal(again, out) and torch.equal(again_lse, lse)


def test_nan_stays_in_its_rows() -> None:
    case = CASES[3]
    q, k, v, _ = inputs(case, torch.bfloat16, 128, 128)
    clean, _ = run(q, k, v, case.rows, scale=0.1)
    q[0, 77, 1] = torch.nan
    out, lse = run(q, k, v, case.rows, scale=0.1)
    assert out[0, 77, 1].isnan().all() and lse[0, 1, 77].isnan()
    assert int(lse.isnan().sum()) == 1 and torch.equal(out[~out.isnan()], clean[~out.isnan()])


def test_nothing_visible_and_nothing_there() -> None:
    q, k, v = (torch.randn(2, 50, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    out, lse = run(q, k, v, [], scale=1.0)
    assert bool((out == 0).all()) and bool(lse.isneginf().all())
    for sizes in ((0, 50, 4), (2, 0, 4), (2, 50, 0)):
        out, lse = run(
            q[: sizes[0], : sizes[1], : sizes[2]], k[: sizes[0], :, : sizes[2]], v[: sizes[0], :, : sizes[2]], [], scale=1.0
        )
        assert out.shape == (*sizes, 64) and lse.shape == (sizes[0], sizes[2], sizes[1])
    with pytest.raises(ValueError, match="positive scale"):
        run(q, k, v, causal(50), scale=-1.0)


def test_multiprocessors_left_free_change_nothing() -> None:
    case = CASES[2]
    q, k, v, _ = inputs(case, torch.bfloat16, 128, 128)
    out, lse = run(q, k, v, case.rows, scale=0.1)
    kernel = hopper.HopperKernel(sm_margin=100)
    again, again_lse = kernel.forward(q, k, v, case.slices, scale=0.1)
    assert torch.equal(again, out) and torch.equal(again_lse, lse)


def test_graphs_captured_on_one_stream_run_on_two() -> None:
    """Also in another order than they were captured in, and before any launch outside of a graph has used the stream."""
    case = CASES[2]
    q, k, v, _ = inputs(case, torch.bfloat16, 128, 128)
    expected, _ = run(q, k, v, case.rows, scale=0.1)
    graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
    capture, outs = torch.cuda.Stream(), []
    for graph in graphs:
        with torch.cuda.graph(graph, stream=capture):
            outs.append(run(q, k, v, case.rows, scale=0.1)[0])
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(3):
        for out in outs:
            out.fill_(torch.nan)
        torch.cuda.synchronize()
        for stream, graph in zip(streams, reversed(graphs), strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(out, expected) for out in outs)


@pytest.mark.parametrize("seed", range(25))
def test_random_problems(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random lengths, heads, dims and disjoint bands, started, continued and finished."""
    rng = np.random.default_rng(seed)
    Hkv = int(rng.integers(1, 4))
    Sq, Sk = (int(x) for x in rng.integers(1, 700, 2))
    cuts = sorted({0, Sk, *rng.integers(0, Sk + 1, 2).tolist()})
    rows: list[Row] = []
    for k0, k1 in itertools.pairwise(cuts):
        lo = -Sq
        for _ in range(int(rng.integers(0, 3))):
            lo += int(rng.integers(0, 200))
            hi = lo + int(rng.integers(0, 500))
            q0, q1 = sorted(rng.integers(0, Sq + 1, 2).tolist())
            rows.append((q0, q1, k0, k1, lo, hi))
            lo = hi + 1
    case = BandCase("random", int(rng.integers(1, 3)), Sq, Sk, Hkv * int(rng.integers(1, 4)), Hkv, rows)
    D = int(rng.choice([64, 72, 96, 128, 192, 256]))
    dtype = torch.bfloat16 if seed % 2 else torch.float16
    q, k, v, visible = inputs(case, dtype, D, D, seed)
    carry = torch.randn(case.B, Sq, case.H, D, device="cuda"), torch.randn(case.B, case.H, Sq, device="cuda")
    poisoned(monkeypatch)
    out, lse = run(q, k, v, rows, scale=D**-0.5)
    state = run(q, k, v, rows, scale=D**-0.5, carry=(carry[0].clone(), carry[1].clone()), finish=False)
    monkeypatch.undo()
    agree(out, lse, q, k, v, visible, scale=D**-0.5)
    agree(*state, q, k, v, visible, scale=D**-0.5, carry=carry)
