"""Deterministic gradients of the Hopper backward: bitwise equal from run to run, right, and done; for every kind of kernel.

Additions to a tile of dq take turns. A wrong turn shows as another sum, as a lost addition or as a kernel that never ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from ringflash.kernels import hopper_backward, tiles_backward
from ringflash.slices import UNBOUNDED, Slices
from ringflash.testing.oracle import Inputs, Results, dense_results
from ringflash.testing.slice_cases import BandCase, documents

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("hopper")]

OPEN = UNBOUNDED
SOFTCAP = 3.0


CASES = [
    BandCase("full: all key tiles visit all query tiles", 2, 1024, 1024, 4, 4, [(0, 1024, 0, 1024, -OPEN, OPEN)]),
    BandCase("full, tails, GQA", 1, 1900, 2111, 8, 2, [(0, 1900, 0, 2111, -OPEN, OPEN)]),
    BandCase("few keys, many queries", 1, 3000, 130, 4, 1, [(0, 3000, 0, 130, -OPEN, OPEN)]),
    BandCase("many keys, few queries", 1, 130, 3000, 4, 1, [(0, 130, 0, 3000, -OPEN, OPEN)]),
    BandCase("causal, GQA, the last items divided", 1, 2500, 2500, 8, 2, [(0, 2500, 0, 2500, -OPEN, 0)]),
    BandCase("causal, several items a CTA", 6, 1111, 1111, 6, 6, [(0, 1111, 0, 1111, -OPEN, 0)]),
    BandCase("window, GQA", 2, 1777, 1777, 4, 2, [(0, 1777, 0, 1777, -300, 0)]),
    BandCase("documents of odd lengths", 1, 2000, 2000, 4, 2, documents([1, 7, 130, 333, 129, 511, 700, 189])),
    BandCase("prefix: two passes over a tile", 1, 900, 900, 2, 1, [(0, 900, 0, 150, -OPEN, OPEN), (0, 900, 150, 900, -OPEN, 0)]),
    BandCase("second passes behind two Slices", 1, 640, 128, 2, 2,
             [(0, 448, 0, 128, -399, 100), (448, 640, 0, 128, -399, 90), (0, 640, 0, 128, -OPEN, -400)]),
    BandCase("rows that see nothing", 1, 900, 300, 2, 2, [(100, 250, 37, 290, -OPEN, 0), (700, 750, 0, 300, -OPEN, OPEN)]),
]  # fmt: skip
DIMS = [(128, 128), (64, 64), (96, 96), (192, 192), (256, 256), (192, 128)]


@pytest.fixture(params=[False, True], ids=["alone", "pairs"])
def pairs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Whether CTAs work in pairs, however short the sequence."""
    monkeypatch.setattr(tiles_backward, "PAIR_STEP", 0.1 if request.param else 100.0)
    monkeypatch.setattr(tiles_backward, "PAIR_COST", (-4.0, -4.0) if request.param else (0.0, 0.0))
    monkeypatch.setattr(tiles_backward, "PAIR_MASKED", 0.0)
    hopper_backward.forget_lists()
    yield request.param
    hopper_backward.forget_lists()


def inputs_of(case: BandCase, dtype: torch.dtype, D: int, Dv: int) -> tuple[Inputs, Tensor]:
    """Inputs, and which key each query sees."""
    g = torch.Generator("cuda").manual_seed(0)
    shapes = ((case.Sq, case.H, D), (case.Sk, case.Hkv, D), (case.Sk, case.Hkv, Dv), (case.Sq, case.H, Dv))
    q, k, v, dout = (torch.randn(case.B, *s, device="cuda", generator=g).to(dtype) for s in shapes)
    return Inputs(q, k, v, None, dout, None), case.visible("cuda")


def added(case: BandCase, x: Inputs, exact: Results, *, sm_margin: int = 0, softcap: float = 0.0) -> list[Tensor]:
    """Random dq, dk, dv, the same in every call, after the gradients were added."""
    delta = (exact.out * x.dout.double()).sum(-1).transpose(1, 2).float()
    g = torch.Generator("cuda").manual_seed(1)
    dq, dk, dv = (torch.randn(t.shape, device="cuda", generator=g) for t in (x.q, x.k, x.v))
    hopper_backward.backward(
        x.dout, x.q, x.k, x.v, None, exact.lse.float(), delta, case.slices, scale=0.1, softcap=softcap,
        dq=dq, dk=dk, dv=dv, deterministic=True, sm_margin=sm_margin,
    )  # fmt: skip
    return [dq, dk, dv]


def agree(after: Sequence[Tensor], exact: Results, plain: Results) -> None:
    """Errors are at most twice those of plain torch in the same dtype, and one rounding of P and dS."""
    g = torch.Generator("cuda").manual_seed(1)
    for name, value in zip(("dq", "dk", "dv"), after, strict=True):
        want, eps = getattr(exact, name), torch.finfo(getattr(plain, name).dtype).eps
        given = value - torch.randn(value.shape, device="cuda", generator=g)
        error, fair = ((y.double() - want).norm() for y in (given, getattr(plain, name)))
        assert error <= 2 * fair + eps / 2 * want.norm() + 2**-20 * want.numel() ** 0.5, f"{name}: {error / want.norm():.2e}"


def repeats(case: BandCase, dtype: torch.dtype, dims: tuple[int, int], *, softcap: float = 0.0, sm_margin: int = 0) -> None:
    x, visible = inputs_of(case, dtype, *dims)
    exact = dense_results(x, visible, dtype=torch.float64, scale=0.1, softcap=softcap)
    plain = dense_results(x, visible, dtype=dtype, scale=0.1, softcap=softcap)
    first = added(case, x, exact, sm_margin=sm_margin, softcap=softcap)
    agree(first, exact, plain)
    for _ in range(4):
        assert all(map(torch.equal, first, added(case, x, exact, sm_margin=sm_margin, softcap=softcap)))


@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.why)
def test_gradients_repeat_bitwise(case: BandCase, dims: tuple[int, int]) -> None:
    repeats(case, torch.bfloat16, dims)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("D", [128, 104])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.why)
def test_pairs_repeat_bitwise(case: BandCase, D: int, dtype: torch.dtype, pairs: bool) -> None:
    x, _ = inputs_of(case, dtype, D, D)
    assert hopper_backward._work(x.q, x.k, x.v, case.slices, True, False, 0).pairs == pairs
    repeats(case, dtype, (D, D))


@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_float16_with_softcap_repeats_bitwise(dims: tuple[int, int]) -> None:
    repeats(CASES[4], torch.float16, dims, softcap=SOFTCAP)


@pytest.mark.parametrize("sm_margin", [1, 5, 100, 129, 130, 131])
@pytest.mark.parametrize("case", [CASES[1], CASES[4], CASES[7]], ids=lambda c: c.why)
def test_any_number_of_multiprocessors_repeats_bitwise(case: BandCase, sm_margin: int, pairs: bool) -> None:
    x, _ = inputs_of(case, torch.bfloat16, 128, 128)
    lists = hopper_backward._work(x.q, x.k, x.v, case.slices, True, False, sm_margin)
    assert lists.pairs == (pairs and torch.cuda.get_device_properties(0).multi_processor_count - sm_margin >= 2)
    repeats(case, torch.bfloat16, (128, 128), sm_margin=sm_margin)


@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("case", [CASES[1], CASES[4], CASES[7]], ids=lambda c: c.why)
def test_a_pass_of_one_step_repeats_bitwise(case: BandCase, D: int, pairs: bool) -> None:
    """dk and dv are written in the final dtype; those of divided items by whichever portion comes last."""
    x, visible = inputs_of(case, torch.bfloat16, D, D)
    exact = dense_results(x, visible, dtype=torch.float64, scale=0.1)
    plain = dense_results(x, visible, dtype=torch.bfloat16, scale=0.1)
    slices, out, lse = case.slices, exact.out.to(torch.bfloat16), exact.lse.float()
    assert hopper_backward._work(x.q, x.k, x.v, slices, True, True, 0).pairs == (pairs and D == 128)
    runs = [hopper_backward.gradients(x.dout, x.q, x.k, x.v, out, lse, slices, scale=0.1, deterministic=True) for _ in range(5)]
    for name, value in zip(("dq", "dk", "dv"), runs[0], strict=True):
        want = getattr(exact, name)
        error, fair = ((y.double() - want).norm() for y in (value, getattr(plain, name)))
        assert error <= 2 * fair + 2.0**-8 * want.norm(), name
    for again in runs[1:]:
        assert all(map(torch.equal, runs[0], again))


def test_items_are_divided_in_these_tests() -> None:
    """And dk and dv, which are then sums of portions, were seen to repeat above."""
    x, _ = inputs_of(CASES[4], torch.bfloat16, 128, 128)
    assert hopper_backward._work(x.q, x.k, x.v, Slices.from_rows(CASES[4].rows), True, False, 0).slots > 0


def test_a_long_pass_repeats_bitwise() -> None:
    """More items than CTAs, in pairs as they are chosen, under both masks."""
    x, _ = inputs_of(BandCase("long", 1, 8192, 8192, 8, 2, []), torch.bfloat16, 128, 128)
    lse, delta = torch.full((1, 8, 8192), 9.0, device="cuda"), torch.randn(1, 8, 8192, device="cuda")
    for slices in (Slices.full_rectangle(8192, 8192), Slices.causal(8192, 8192)):
        assert hopper_backward._work(x.q, x.k, x.v, slices, True, False, 0).pairs
        results = []
        for _ in range(6):
            dq, dk, dv = (torch.zeros(t.shape, device="cuda") for t in (x.q, x.k, x.v))
            hopper_backward.backward(
                x.dout, x.q, x.k, x.v, None, lse, delta, slices, scale=0.1, dq=dq, dk=dk, dv=dv, deterministic=True
            )
            results.append((dq, dk, dv))
        for again in results[1:]:
            assert all(map(torch.equal, results[0], again))
