"""The Hopper backward against float64 autograd: masks, head dims, GQA, strides, softcap, dlse, determinism.

Gradients are added to what is there, so every check starts from random gradients.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from ringflash.kernels import Problem, hopper_backward, tiles_backward
from ringflash.slices import UNBOUNDED, Slices
from ringflash.testing.oracle import Inputs, Results, dense_results
from ringflash.testing.slice_cases import BandCase, Row, causal, documents

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("hopper")]

OPEN = UNBOUNDED


CASES = [
    BandCase("one tile", 1, 128, 128, 1, 1, [(0, 128, 0, 128, -OPEN, OPEN)]),
    BandCase("one pair", 1, 1, 1, 1, 1, causal(1)),
    BandCase("causal, several items a CTA", 3, 2048, 2048, 8, 2, causal(2048)),
    BandCase("tails of rows and keys, GQA", 2, 333, 517, 4, 2, [(0, 333, 0, 517, -OPEN, OPEN)]),
    BandCase("causal, keys longer, MQA", 1, 300, 700, 4, 1, causal(300, 700)),
    BandCase("window of a tile and a key", 1, 900, 900, 2, 2, causal(900, window=129)),
    BandCase("documents of odd lengths, one and zero rows", 1, 1111, 1111, 4, 1, documents([1, 7, 0, 130, 333, 129, 511])),
    BandCase("many documents in one tile", 2, 700, 700, 2, 2, documents([100, 3, 2, 20, 30, 5, 97, 300, 143], hi=OPEN)),
    BandCase("rows that see nothing", 1, 900, 300, 2, 2, [(100, 250, 37, 290, -OPEN, 0), (700, 750, 0, 300, -OPEN, OPEN)]),
    BandCase("prefix: two Slices of a row", 1, 600, 600, 2, 1, [(0, 600, 0, 150, -OPEN, OPEN), (0, 600, 150, 600, -OPEN, 0)]),
    BandCase("bands of striped chunks", 1, 640, 640, 2, 2, [(0, 640, 0, 640, -300, -17), (0, 640, 0, 640, 50, 90)]),
    BandCase("two arrived chunks, one causal", 1, 500, 1000, 2, 2,
             [(0, 500, 0, 500, -OPEN, OPEN), (0, 500, 500, 1000, -OPEN, 500)]),
]  # fmt: skip
DIMS = [(128, 128), (64, 64), (96, 96), (192, 192), (256, 256), (192, 128)]


def inputs_of(case: BandCase, dtype: torch.dtype, D: int, Dv: int, *, dlse: bool = False) -> Inputs:
    g = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", generator=g)

    q, k = normal(case.B, case.Sq, case.H, D).to(dtype), normal(case.B, case.Sk, case.Hkv, D).to(dtype)
    v, dout = normal(case.B, case.Sk, case.Hkv, Dv).to(dtype), normal(case.B, case.Sq, case.H, Dv).to(dtype)
    return Inputs(q, k, v, None, dout, normal(case.B, case.H, case.Sq) if dlse else None)


def differentiate(case: BandCase, x: Inputs, exact: Results, *, deterministic: bool = False, **options: float) -> list[Tensor]:
    """What the kernel adds to random dq, dk, dv."""
    problem = Problem.of(x.q, x.k, x.v, softcap=bool(options.get("softcap")), deterministic=deterministic, needs_grad=True)
    assert hopper_backward.refuses(problem) is None
    dlse = None if x.dlse is None else x.dlse.masked_fill(exact.lse == -torch.inf, 0.0)
    delta = (exact.out * x.dout.double()).sum(-1).transpose(1, 2)
    delta = (delta if dlse is None else delta - dlse).float()
    g = torch.Generator("cuda").manual_seed(1)
    before = [torch.randn(t.shape, device="cuda", generator=g) for t in (x.q, x.k, x.v)]
    after = [t.clone() for t in before]
    hopper_backward.backward(
        x.dout, x.q, x.k, x.v, None, exact.lse.float(), delta, case.slices,
        dq=after[0], dk=after[1], dv=after[2], deterministic=deterministic, **options,  # type: ignore[arg-type]
    )  # fmt: skip
    return [a - b for a, b in zip(after, before, strict=True)]


def agree(given: Sequence[Tensor], exact: Results, plain: Results) -> None:
    """Errors are at most twice those of plain torch in the same dtype, and one rounding of P and dS.

    Where the exact gradient is zero because dP and delta cancel (a row that sees one key), what is left is their float32
    rounding. Both are sums of D products of about 1 with random signs: off by 2^-24 D together. Times a scale of 1/sqrt(D) and
    an element of about 1: 2^-24 sqrt(D) per element, 2^-20 at D 256.
    """
    eps = torch.finfo(plain.dq.dtype).eps
    for name, value in zip(("dq", "dk", "dv"), given, strict=True):
        want = getattr(exact, name)
        error, fair = ((y.double() - want).norm() for y in (value, getattr(plain, name)))
        band = 2**-20 * want.numel() ** 0.5 if want.abs().max() < 1e-12 else 1e-6
        assert error <= 2 * fair + eps / 2 * want.norm() + band, f"{name}: {error / want.norm():.2e}"


def exact_and_plain(case: BandCase, x: Inputs, **options: float) -> tuple[Results, Results]:
    visible = case.visible("cuda")
    exact = dense_results(x, visible, dtype=torch.float64, **options)
    return exact, dense_results(x, visible, dtype=x.q.dtype, **options)


@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.why)
def test_masks(case: BandCase, dims: tuple[int, int], deterministic: bool) -> None:
    x, scale = inputs_of(case, torch.bfloat16, *dims), dims[0] ** -0.5
    exact, plain = exact_and_plain(case, x, scale=scale)
    agree(differentiate(case, x, exact, scale=scale, deterministic=deterministic), exact, plain)


@pytest.fixture
def pairs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """CTAs work in pairs wherever they can, however short the sequence."""
    monkeypatch.setattr(tiles_backward, "PAIR_STEP", 0.0)
    monkeypatch.setattr(tiles_backward, "PAIR_COST", (-10.0, -10.0))
    monkeypatch.setattr(tiles_backward, "PAIR_MASKED", 0.0)
    hopper_backward.forget_lists()
    yield
    hopper_backward.forget_lists()


def in_pairs(case: BandCase, x: Inputs, *, write: bool = False, sm_margin: int = 0) -> bool:
    """Whether CTAs work in pairs on this case."""
    return hopper_backward._work(x.q, x.k, x.v, case.slices, False, write, sm_margin).pairs


@pytest.mark.usefixtures("pairs")
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("D", [128, 104])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.why)
def test_masks_in_pairs(case: BandCase, D: int, dtype: torch.dtype, softcap: float) -> None:
    x = inputs_of(case, dtype, D, D)
    assert in_pairs(case, x)
    exact, plain = exact_and_plain(case, x, scale=D**-0.5, softcap=softcap)
    agree(differentiate(case, x, exact, scale=D**-0.5, softcap=softcap), exact, plain)


@pytest.mark.usefixtures("pairs")
@pytest.mark.parametrize("sm_margin", [0, 1, 5, 129, 130, 131])
def test_pairs_repeat_on_any_number_of_multiprocessors(sm_margin: int) -> None:
    """Additions come in any order; a race would show as more than their rounding."""
    case = BandCase("long, GQA", 1, 2500, 2500, 4, 2, causal(2500))
    x = inputs_of(case, torch.bfloat16, 128, 128)
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    assert in_pairs(case, x, sm_margin=sm_margin) == (multiprocessors - sm_margin >= 2)
    exact, plain = exact_and_plain(case, x, scale=0.1)
    first = differentiate(case, x, exact, scale=0.1, sm_margin=sm_margin)
    agree(first, exact, plain)
    for _ in range(10):
        for a, b in zip(differentiate(case, x, exact, scale=0.1, sm_margin=sm_margin), first, strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.usefixtures("pairs")
def test_pairs_in_a_graph() -> None:
    case = CASES[2]
    x = inputs_of(case, torch.bfloat16, 128, 128)
    assert in_pairs(case, x)
    exact, plain = exact_and_plain(case, x, scale=0.1)
    lse, delta = exact.lse.float(), (exact.out * x.dout.double()).sum(-1).transpose(1, 2).float()
    total = [torch.zeros(t.shape, device="cuda") for t in (x.q, x.k, x.v)]
    dq, dk, dv = total

    def step() -> None:
        slices = case.slices
        hopper_backward.backward(x.dout, x.q, x.k, x.v, None, lse, delta, slices, scale=0.1, dq=dq, dk=dk, dv=dv)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(3):
        for t in total:
            t.zero_()
        graph.replay()
        agree(total, exact, plain)


@pytest.mark.parametrize("D", [8, 40, 80, 120, 136, 200, 248])
def test_head_dims_between(D: int) -> None:
    case = CASES[3]
    x = inputs_of(case, torch.bfloat16, D, D)
    exact, plain = exact_and_plain(case, x, scale=D**-0.5)
    agree(differentiate(case, x, exact, scale=D**-0.5), exact, plain)


@pytest.mark.parametrize("dims", [(128, 64), (64, 128), (192, 64), (136, 200)], ids=str)
def test_v_of_another_head_dim(dims: tuple[int, int]) -> None:
    case = CASES[4]
    x = inputs_of(case, torch.bfloat16, *dims)
    exact, plain = exact_and_plain(case, x, scale=dims[0] ** -0.5)
    agree(differentiate(case, x, exact, scale=dims[0] ** -0.5), exact, plain)


@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_float16_softcap_and_dlse(dims: tuple[int, int]) -> None:
    case = CASES[6]
    x = inputs_of(case, torch.float16, *dims, dlse=True)
    exact, plain = exact_and_plain(case, x, scale=dims[0] ** -0.5, softcap=2.0)
    agree(differentiate(case, x, exact, scale=dims[0] ** -0.5, softcap=2.0), exact, plain)


@pytest.mark.parametrize("D", [64, 128, 256])
def test_very_negative_lse(D: int) -> None:
    """exp(0 - lse) of a key past the end would overflow float16."""
    case = BandCase("all scores far below zero", 1, 300, 333, 2, 2, [(0, 300, 0, 333, -OPEN, OPEN)])
    x = inputs_of(case, torch.float16, D, D)
    x = Inputs((x.q.abs() * 16).to(torch.float16), -x.k.abs(), x.v, None, x.dout, None)
    exact, plain = exact_and_plain(case, x, scale=D**-0.5)
    assert exact.lse.max() < -20
    agree(differentiate(case, x, exact, scale=D**-0.5), exact, plain)


def gradients(case: BandCase, x: Inputs, exact: Results, **options: object) -> tuple[Tensor, Tensor, Tensor]:
    """What a pass of one step returns, into memory that was full of NaN."""
    numbers = max(t.numel() for t in (x.q, x.k, x.v))
    dirt = [torch.full((n,), torch.nan, dtype=t, device="cuda") for n in (numbers, numbers, numbers, 1 << 24) for t in
            (x.q.dtype, torch.float32)]  # fmt: skip
    del dirt
    out, lse = exact.out.to(x.q.dtype), exact.lse.float()
    slices = case.slices
    return hopper_backward.gradients(x.dout, x.q, x.k, x.v, out, lse, slices, **options)  # type: ignore[arg-type]


def agree_in_the_final_dtype(given: Sequence[Tensor], exact: Results, plain: Results) -> None:
    """As ``agree``, and one more rounding."""
    eps = torch.finfo(plain.dq.dtype).eps
    for name, value in zip(("dq", "dk", "dv"), given, strict=True):
        assert value.dtype == plain.dq.dtype
        want = getattr(exact, name)
        error, fair = ((y.double() - want).norm() for y in (value, getattr(plain, name)))
        band = 2**-20 * want.numel() ** 0.5 if want.abs().max() < 1e-12 else 1e-6
        assert error <= 2 * fair + eps / 2 * want.norm() + band, f"{name}: {error / want.norm():.2e}"


@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.why)
def test_a_pass_of_one_step_in_the_final_dtype(case: BandCase, dims: tuple[int, int]) -> None:
    x, scale = inputs_of(case, torch.bfloat16, *dims), dims[0] ** -0.5
    exact, plain = exact_and_plain(case, x, scale=scale)
    agree_in_the_final_dtype(gradients(case, x, exact, scale=scale), exact, plain)


@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_a_deterministic_pass_of_one_step(dims: tuple[int, int]) -> None:
    for case in (CASES[2], CASES[3], CASES[8]):
        x, scale = inputs_of(case, torch.bfloat16, *dims), dims[0] ** -0.5
        exact, plain = exact_and_plain(case, x, scale=scale)
        agree_in_the_final_dtype(gradients(case, x, exact, scale=scale, deterministic=True), exact, plain)


def test_a_pass_of_one_step_with_a_delta_of_its_own() -> None:
    case = CASES[3]
    x, scale = inputs_of(case, torch.bfloat16, 128, 128, dlse=True), 0.1
    assert x.dlse is not None
    exact, plain = exact_and_plain(case, x, scale=scale)
    delta = hopper_backward.delta(x.dout, exact.out.to(x.q.dtype), x.dlse)
    agree_in_the_final_dtype(gradients(case, x, exact, scale=scale, row_delta=delta), exact, plain)


@pytest.mark.usefixtures("pairs")
@pytest.mark.parametrize("D", [128, 104, 120])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.why)
def test_a_pass_of_one_step_in_pairs(case: BandCase, D: int) -> None:
    x = inputs_of(case, torch.float16, D, D)
    assert in_pairs(case, x, write=True) and in_pairs(case, x)
    exact, plain = exact_and_plain(case, x, scale=D**-0.5)
    agree_in_the_final_dtype(gradients(case, x, exact, scale=D**-0.5), exact, plain)


def test_a_pass_of_one_step_in_a_graph() -> None:
    """Kernels overlap their ends and beginnings in a graph, too, and each replay starts from zeros."""
    case = CASES[2]
    x = inputs_of(case, torch.bfloat16, 128, 128)
    exact, plain = exact_and_plain(case, x, scale=0.1)
    out, lse, slices = exact.out.to(x.q.dtype), exact.lse.float(), case.slices
    hopper_backward.gradients(x.dout, x.q, x.k, x.v, out, lse, slices, scale=0.1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        given = hopper_backward.gradients(x.dout, x.q, x.k, x.v, out, lse, slices, scale=0.1)
    for _ in range(3):
        for t in given:
            t.fill_(torch.nan)
        graph.replay()
        agree_in_the_final_dtype(given, exact, plain)


def test_passes_behind_each_other_overlap_safely() -> None:
    """Each kernel may begin while the one before it ends, also that of the pass before; none may touch what is still in use."""
    case = BandCase("short", 1, 512, 512, 16, 4, causal(512))
    x = inputs_of(case, torch.bfloat16, 128, 128)
    exact, plain = exact_and_plain(case, x, scale=0.1)
    out, lse, slices = exact.out.to(x.q.dtype), exact.lse.float(), case.slices
    common = (x.q, x.k, x.v, out, lse, slices)
    passes = [partial(hopper_backward.gradients, dout, *common, scale=0.1) for dout in (x.dout, -4 * x.dout)]
    agree_in_the_final_dtype(passes[0](), exact, plain)
    torch.cuda.synchronize()
    expected = [[y.clone() for y in run()] for run in passes]
    torch.cuda.synchronize()
    for _ in range(50):
        given = [passes[n % 2]() for n in range(8)]  # what a pass too early would read is another one's
        for n, grads in enumerate(given):
            for y, want in zip(grads, expected[n % 2], strict=True):
                assert (y - want).float().norm() <= 2.0**-7 * want.float().norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("numel", [8, 8192, 8200, 1 << 22, (1 << 22) + 24])
def test_rounding_is_torchs(numel: int, dtype: torch.dtype) -> None:
    x = torch.randn(numel, device="cuda") * 1000
    x[:3] = torch.tensor([torch.inf, torch.nan, 1e30])
    torch.testing.assert_close(hopper_backward._rounded(x, dtype), x.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_delta_writes_zeros_beside() -> None:
    out, dout = (torch.randn(2, 77, 3, 64, device="cuda").to(torch.bfloat16) for _ in range(2))
    for words in (4, 400, 1 << 22):
        zeros = torch.full((words + 4,), 7, dtype=torch.int32, device="cuda")
        given = hopper_backward._delta(dout, out, None, zeros[:-4])
        assert torch.equal(given, hopper_backward.delta(dout, out)) and not zeros[:-4].any() and (zeros[-4:] == 7).all()


@pytest.mark.parametrize("dims", [(128, 128), (64, 64), (96, 96)], ids=str)
@pytest.mark.parametrize("rows", [[(0, 2100, 0, 2000, -OPEN, OPEN)], causal(2100, 2000)], ids=["full", "causal"])
def test_portions_of_an_item_are_written_once(rows: Sequence[Row], dims: tuple[int, int]) -> None:
    """dk and dv of a divided item are sums in a fixed order; the counters are zero again after each launch."""
    case = BandCase("few items, GQA", 1, 2100, 2000, 8, 2, rows)
    x, scale, slices = inputs_of(case, torch.bfloat16, *dims), dims[0] ** -0.5, Slices.from_rows(rows)
    exact, plain = exact_and_plain(case, x, scale=scale)
    work = hopper_backward._work(x.q, x.k, x.v, slices, False, True, 0)
    assert work.slots > 0
    out, lse = exact.out.to(x.q.dtype), exact.lse.float()
    first = hopper_backward.gradients(x.dout, x.q, x.k, x.v, out, lse, slices, scale=scale)
    for name, value in zip(("dq", "dk", "dv"), first, strict=True):
        want = getattr(exact, name)
        error, fair = ((y.double() - want).norm() for y in (value, getattr(plain, name)))
        assert error <= 2 * fair + 2.0**-8 * want.norm(), name
    for _ in range(4):
        again = hopper_backward.gradients(x.dout, x.q, x.k, x.v, out, lse, slices, scale=scale)
        assert torch.equal(again[1], first[1]) and torch.equal(again[2], first[2])


@pytest.mark.usefixtures("pairs")
@pytest.mark.parametrize("rows", [[(0, 2100, 0, 2000, -OPEN, OPEN)], causal(2100, 2000)], ids=["full", "causal"])
def test_portions_of_pairs_are_written_once(rows: Sequence[Row], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles_backward, "PAIR_STEP", 0.5)  # not 0: only what takes time is divided
    monkeypatch.setattr(tiles_backward, "PAIR_COST", (0.0, 0.0))
    monkeypatch.setattr(tiles_backward, "PAIR_MASKED", 0.0)
    hopper_backward.forget_lists()
    case = BandCase("few items, GQA", 1, 2100, 2000, 8, 2, rows)
    assert in_pairs(case, inputs_of(case, torch.bfloat16, 128, 128), write=True)
    test_portions_of_an_item_are_written_once(rows, (128, 128))


def test_strides_of_batch_sequence_and_head() -> None:
    """Inputs, statistics and gradients are views of larger buffers; nothing around them changes."""
    case = BandCase("views", 2, 300, 400, 3, 3, causal(300, 400))
    D = 128

    def view(S: int, H: int, dtype: torch.dtype, pad: int) -> Tensor:
        buffer = torch.randn(S + 3, case.B, H + 1, D + pad, device="cuda").to(dtype)
        return buffer[2 : S + 2, :, 1:, :D].transpose(0, 1)

    q, dout = view(300, 3, torch.bfloat16, 8), view(300, 3, torch.bfloat16, 8)
    k, v = view(400, 3, torch.bfloat16, 8), view(400, 3, torch.bfloat16, 16)
    x = Inputs(q, k, v, None, dout, None)
    exact, plain = exact_and_plain(case, x, scale=0.1)
    delta = (exact.out * dout.double()).sum(-1).transpose(1, 2).float()
    lse = torch.cat([exact.lse.float(), exact.lse.float()], dim=2)[:, :, 300:]
    targets = [view(S, 3, torch.float32, 4) for S in (300, 400, 400)]
    bases = [t._base for t in targets]
    before, whole = [t.clone() for t in targets], [b.clone() for b in bases if b is not None]
    dq, dk, dv = targets
    hopper_backward.backward(dout, q, k, v, None, lse, delta, case.slices, scale=0.1, dq=dq, dk=dk, dv=dv)
    agree([a - b for a, b in zip(targets, before, strict=True)], exact, plain)
    for target, old, base, was in zip(targets, before, bases, whole, strict=True):
        target.copy_(old)
        assert base is not None and torch.equal(base, was)


def test_unaligned_gradients_and_inputs() -> None:
    case = CASES[3]
    x = inputs_of(case, torch.bfloat16, 64, 64)
    exact, plain = exact_and_plain(case, x, scale=0.125)

    def shifted(t: Tensor) -> Tensor:
        flat = torch.zeros(t.numel() + 1, dtype=t.dtype, device="cuda")
        return flat[1:].view(t.shape).copy_(t)

    x = Inputs(shifted(x.q), shifted(x.k), x.v, None, x.dout, None)
    delta = (exact.out * x.dout.double()).sum(-1).transpose(1, 2).float()
    targets = [shifted(torch.zeros(t.shape, device="cuda")) for t in (x.q, x.k, x.v)]
    dq, dk, dv = targets
    slices = case.slices
    hopper_backward.backward(x.dout, x.q, x.k, x.v, None, exact.lse.float(), delta, slices, scale=0.125, dq=dq, dk=dk, dv=dv)
    agree(targets, exact, plain)


def test_steps_of_a_ring_add_up() -> None:
    case = BandCase("four chunks", 1, 1000, 1000, 4, 2, causal(1000))
    x = inputs_of(case, torch.bfloat16, 128, 128)
    exact, plain = exact_and_plain(case, x, scale=0.1)
    lse, delta = exact.lse.float(), (exact.out * x.dout.double()).sum(-1).transpose(1, 2).float()
    total = [torch.zeros(t.shape, device="cuda") for t in (x.q, x.k, x.v)]
    n = 250
    for a, b in itertools.product(range(4), range(4)):
        if b > a:
            continue
        i, j = slice(a * n, a * n + n), slice(b * n, b * n + n)
        slices = Slices.causal(n, n) if a == b else Slices.full_rectangle(n, n)
        hopper_backward.backward(
            x.dout[:, i], x.q[:, i], x.k[:, j], x.v[:, j], None, lse[:, :, i], delta[:, :, i], slices,
            scale=0.1, dq=total[0][:, i], dk=total[1][:, j], dv=total[2][:, j],
        )  # fmt: skip
    agree(total, exact, plain)


@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("case", [CASES[2], CASES[3], CASES[9]], ids=lambda c: c.why)
def test_deterministic_gradients_repeat_bitwise(case: BandCase, dims: tuple[int, int]) -> None:
    x, scale = inputs_of(case, torch.bfloat16, *dims), dims[0] ** -0.5
    exact, _ = exact_and_plain(case, x, scale=scale)
    first = differentiate(case, x, exact, scale=scale, deterministic=True)
    for _ in range(4):
        assert all(map(torch.equal, first, differentiate(case, x, exact, scale=scale, deterministic=True)))


@pytest.mark.parametrize("sm_margin", [0, 100, 128, 131])
@pytest.mark.parametrize(("q_len", "k_len"), [(2000, 2100), (130, 3000), (3000, 130)])
@pytest.mark.parametrize("dims", [(128, 128), (64, 64), (256, 256)], ids=str)
def test_full_masks_take_turns(dims: tuple[int, int], q_len: int, k_len: int, sm_margin: int) -> None:
    """Under a full mask all tiles of keys begin at the first query tile; few CTAs take them one after the other."""
    case = BandCase("full", 1, q_len, k_len, 4, 2, [(0, q_len, 0, k_len, -OPEN, OPEN)])
    x, scale = inputs_of(case, torch.bfloat16, *dims), dims[0] ** -0.5
    exact, plain = exact_and_plain(case, x, scale=scale)
    first = differentiate(case, x, exact, scale=scale, deterministic=True, sm_margin=sm_margin)
    agree(first, exact, plain)
    again = differentiate(case, x, exact, scale=scale, deterministic=True, sm_margin=sm_margin)
    assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("D", [8, 64, 72, 128, 256])
@pytest.mark.parametrize("S", [1, 77, 1000])
def test_delta(S: int, dtype: torch.dtype, D: int) -> None:
    out, dout = (torch.randn(2, S, 3, D + 8, device="cuda").to(dtype)[..., :D] for _ in range(2))
    dlse = torch.randn(2, 3, S, device="cuda")
    exact = (out.double() * dout.double()).sum(-1).transpose(1, 2)
    torch.testing.assert_close(hopper_backward.delta(dout, out), exact.float(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(hopper_backward.delta(dout, out, dlse), (exact - dlse).float(), rtol=1e-5, atol=1e-4)


def test_nothing_to_do() -> None:
    q = torch.randn(1, 0, 2, 64, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(1, 5, 2, 64, device="cuda", dtype=torch.bfloat16)
    lse = torch.zeros(1, 2, 0, device="cuda")
    dq, dk = torch.zeros(q.shape, device="cuda"), torch.zeros(k.shape, device="cuda")
    hopper_backward.backward(q, q, k, k, None, lse, lse, Slices.from_rows([]), scale=1.0, dq=dq, dk=dk, dv=dk)
    assert not dk.any()


def test_scale_must_be_positive() -> None:
    q = torch.randn(1, 4, 1, 64, device="cuda", dtype=torch.bfloat16)
    lse, g = torch.zeros(1, 1, 4, device="cuda"), torch.zeros(q.shape, device="cuda")
    with pytest.raises(ValueError, match="positive scale"):
        hopper_backward.backward(q, q, q, q, None, lse, lse, Slices.causal(4, 4), scale=-1.0, dq=g, dk=g, dv=g)
