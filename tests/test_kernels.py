"""The kernels that need no GPU, against float64 dense attention on the pairs that the Slices show; and the choice of a kernel."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from ringflash import kernels
from ringflash.kernels import Kernel, Problem, cpu, reference
from ringflash.kernels.running import accumulate_dtype
from ringflash.slices import UNBOUNDED, Slices
from ringflash.testing.inputs import spread
from ringflash.testing.oracle import Inputs, dense_attention
from ringflash.testing.slice_cases import CASES, SliceCase, make_slice_inputs, run_kernel, visible
from ringflash.testing.tolerance import Judge

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SEEING = [case for case in CASES if len(case.slices) and case.heads]
BY_NAME = {case.name: case for case in CASES}


@pytest.fixture(params=["reference", "cpu"])
def kernel(request: pytest.FixtureRequest) -> Kernel:
    found = kernels.load(request.param)
    assert found is not None
    return found


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles and blocks so small that the cases have many of them."""
    monkeypatch.setattr(reference, "ROWS", 8)
    monkeypatch.setattr(reference, "KEYS", 12)
    monkeypatch.setattr(cpu, "SMALL", 0)
    monkeypatch.setattr(cpu, "WIDE", 6)
    monkeypatch.setattr(cpu, "_block_rows", lambda s: 5)
    cpu.parts.cache_clear()
    yield
    cpu.parts.cache_clear()


def assert_right(kernel: Kernel, inputs: Inputs, steps: list[Slices], softcap: float = 0.0, scale: float | None = None) -> None:
    whole = Slices(np.concatenate([s.table for s in steps]))
    judge = Judge(inputs, visible(whole, inputs.q.shape[1], inputs.k.shape[1]), softcap=softcap, scale=scale)
    objections = judge.objections(run_kernel(kernel, inputs, steps, softcap=softcap, scale=scale))
    assert not objections, "\n".join(objections)


@pytest.mark.parametrize("dlse", [False, True], ids=["", "dlse"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SEEING, ids=str)
def test_forward_and_gradients(kernel: Kernel, case: SliceCase, dtype: torch.dtype, dlse: bool) -> None:
    assert_right(kernel, make_slice_inputs(case, dtype, dlse=dlse), [case.slices])


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("case", SEEING, ids=str)
def test_tiles_and_blocks(kernel: Kernel, case: SliceCase) -> None:
    assert_right(kernel, make_slice_inputs(case, torch.float64, dlse=True), [case.slices])


@pytest.mark.parametrize("name", ["band", "causal_more_keys", "lower", "documents_window"])
def test_beyond_one_tile(kernel: Kernel, name: str) -> None:
    """The same shapes 40 times as large, in the real tile sizes."""
    small = BY_NAME[name]
    rows = tuple(tuple(x * 40 if abs(x) < UNBOUNDED else x for x in row) for row in small.rows)
    case = replace(
        small, q_len=small.q_len * 40, k_len=small.k_len * 40, rows=rows, heads=1, kv_heads=1, head_dim=8, head_dim_v=8
    )
    assert_right(kernel, make_slice_inputs(case, torch.float32), [case.slices])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [case for case in SEEING if len(case.slices) > 1], ids=str)
def test_continues_a_running_state(kernel: Kernel, case: SliceCase, dtype: torch.dtype) -> None:
    """One step per Slice: start, continue in place, finish."""
    steps = [case.slices[n : n + 1] for n in range(len(case.slices))]
    assert_right(kernel, make_slice_inputs(case, dtype), steps)
    assert_right(kernel, make_slice_inputs(case, dtype), [Slices.from_rows([]), *steps[::-1]])


@pytest.mark.parametrize("softcap", [0.5, 15.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["causal", "band", "prefix", "gqa", "documents_window"])
def test_softcap(name: str, dtype: torch.dtype, softcap: float) -> None:
    case = BY_NAME[name]
    assert_right(reference.KERNEL, make_slice_inputs(case, dtype, dlse=True), [case.slices], softcap=softcap)


@pytest.mark.parametrize("scale", [0.0, 2.5, -1.0])
def test_scale(kernel: Kernel, scale: float) -> None:
    case = BY_NAME["causal_more_keys"]
    assert_right(kernel, make_slice_inputs(case, torch.float64, dlse=True), [case.slices], scale=scale)


class TestStrides:
    """Any strides of B, S and H; these two kernels take any of D as well."""

    @pytest.mark.parametrize(
        "how", ["every third row", "heads first", "batch inside", "inside a wider dim", "every second element"]
    )
    @pytest.mark.parametrize("name", ["gqa", "documents_apart", "chunks", "narrow_v", "zigzag"])
    def test_inputs(self, kernel: Kernel, name: str, how: str) -> None:
        case = BY_NAME[name]
        plain = make_slice_inputs(case, torch.float64)
        views = Inputs(*(spread(x, how) for x in (plain.q, plain.k, plain.v)), None, spread(plain.dout, how), None)
        for dlse in (None, torch.randn(case.batch, case.heads, 2 * case.q_len, dtype=torch.float64)[:, :, ::2]):
            assert_right(kernel, replace(views, dlse=dlse), [case.slices])

    @pytest.mark.parametrize("name", ["gqa", "documents_apart", "chunks", "prefix", "band"])
    def test_running_state_is_updated_in_place(self, kernel: Kernel, name: str) -> None:
        case = BY_NAME[name]
        inputs = make_slice_inputs(case, torch.float32)
        exact_out, exact_lse = kernel.forward(inputs.q, inputs.k, inputs.v, case.slices, scale=0.3)
        out = torch.full((case.batch, 2 * case.q_len, case.heads, case.head_dim_v), 7.0)
        lse = torch.full((case.batch, case.heads, 2 * case.q_len), 7.0)
        view = out[:, ::2], lse[:, :, ::2]
        view[0].zero_(), view[1].fill_(-torch.inf)
        state = kernel.forward(inputs.q, inputs.k, inputs.v, case.slices, scale=0.3, carry=view, finish=False)
        torch.testing.assert_close(out[:, ::2], exact_out)
        torch.testing.assert_close(lse[:, :, ::2], exact_lse)
        assert state[0].data_ptr() == out.data_ptr() and state[1].data_ptr() == lse.data_ptr()
        assert bool((out[:, 1::2] == 7).all()) and bool((lse[:, :, 1::2] == 7).all())

    @pytest.mark.parametrize("name", ["gqa", "documents_apart", "chunks", "prefix", "band", "narrow_v"])
    @pytest.mark.parametrize("dlse", [False, True], ids=["", "dlse"])
    def test_gradients_are_added(self, kernel: Kernel, name: str, dlse: bool) -> None:
        case = BY_NAME[name]
        inputs = make_slice_inputs(case, torch.float64, dlse=dlse)
        exact = run_kernel(kernel, inputs, [case.slices])
        delta = (inputs.dout * exact.out).sum(-1).transpose(1, 2) - (inputs.dlse if inputs.dlse is not None else 0)
        accumulators = []
        for x in (inputs.q, inputs.k, inputs.v):
            longer = torch.full((x.shape[0], 2 * x.shape[1], *x.shape[2:]), 7.0, dtype=x.dtype)
            accumulators.append(longer[:, 1::2])
        dq, dk, dv = accumulators
        given = None if dlse else exact.out
        scale = case.head_dim**-0.5
        args = (inputs.dout, inputs.q, inputs.k, inputs.v, given, exact.lse, delta, case.slices)
        for _ in range(2):
            kernel.backward(*args, scale=scale, dq=dq, dk=dk, dv=dv)
        for grad, once in zip(accumulators, (exact.dq, exact.dk, exact.dv), strict=True):
            torch.testing.assert_close(grad, 7 + 2 * once, rtol=1e-12, atol=1e-12)
            assert grad._base is not None and bool((grad._base[:, ::2] == 7).all())


class TestDtypes:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("carried", [False, True])
    def test_of_results(self, kernel: Kernel, dtype: torch.dtype, carried: bool) -> None:
        case, acc = BY_NAME["zigzag"], accumulate_dtype(dtype)
        x = make_slice_inputs(case, dtype)
        for finish, expected in ((True, dtype), (False, acc)):
            carry = (torch.zeros(1, 32, 2, 16, dtype=acc), torch.full((1, 2, 32), -torch.inf, dtype=acc)) if carried else None
            out, lse = kernel.forward(x.q, x.k, x.v, case.slices, scale=1.0, carry=carry, finish=finish)
            assert out.dtype == expected and lse.dtype == acc
            if carry is not None and finish:
                assert out.data_ptr() != carry[0].data_ptr(), "a finished output is a new tensor"

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_partial_results_are_not_rounded(self, kernel: Kernel, dtype: torch.dtype) -> None:
        """Of low-precision inputs, only the finished output is rounded: an unfinished one is as exact as float32."""
        case = BY_NAME["zigzag"]
        x = make_slice_inputs(case, dtype)
        out, _ = kernel.forward(x.q, x.k, x.v, case.slices, scale=0.25, finish=False)
        exact, _ = kernel.forward(x.q.double(), x.k.double(), x.v.double(), case.slices, scale=0.25)
        assert (out - exact).abs().max() < 2e-6


class TestNothing:
    """Empty tables and empty tensors."""

    @pytest.mark.parametrize("name", ["none", "no_rows", "no_keys", "no_heads"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_results(self, kernel: Kernel, name: str, dtype: torch.dtype) -> None:
        case = BY_NAME[name]
        inputs = make_slice_inputs(case, dtype, dlse=True)
        result = run_kernel(kernel, inputs, [case.slices])
        assert result.out.shape == inputs.dout.shape and result.out.dtype == dtype and not result.out.any()
        assert result.lse.shape == (case.batch, case.heads, case.q_len) and bool(result.lse.isneginf().all())
        for grad, x in ((result.dq, inputs.q), (result.dk, inputs.k), (result.dv, inputs.v)):
            assert grad.shape == x.shape and not grad.any()

    def test_a_carry_without_slices_comes_back(self, kernel: Kernel) -> None:
        x = make_slice_inputs(BY_NAME["none"], torch.bfloat16)
        out, lse = torch.randn(1, 7, 2, 16), torch.randn(1, 2, 7)
        kept = out.clone(), lse.clone()
        state = kernel.forward(x.q, x.k, x.v, Slices.from_rows([]), scale=1.0, carry=(out, lse), finish=False)
        assert state[0] is out and torch.equal(out, kept[0]) and torch.equal(lse, kept[1])
        finished = kernel.forward(x.q, x.k, x.v, Slices.from_rows([]), scale=1.0, carry=(out, lse))
        assert torch.equal(finished[0], kept[0].bfloat16()) and torch.equal(finished[1], kept[1])

    def test_rows_that_see_nothing_anywhere(self, kernel: Kernel) -> None:
        """Backward with lse -inf in some rows: no gradients there, no NaN anywhere."""
        case = BY_NAME["holes"]
        result = run_kernel(kernel, make_slice_inputs(case, torch.float32), [case.slices])
        unseen = ~visible(case.slices, case.q_len, case.k_len).any(1)
        assert unseen.any() and not result.dq[:, unseen].any() and not result.out[:, unseen].any()
        assert all(bool(x.isfinite().all()) for x in (result.dq, result.dk, result.dv))


def test_a_row_without_weight_has_no_gradients(kernel: Kernel) -> None:
    """lse = -inf inside a Slice: every score of the row was -inf."""
    case = BY_NAME["causal"]
    x = make_slice_inputs(case, torch.float32)
    result = run_kernel(kernel, x, [case.slices])
    lse = result.lse.clone()
    lse[:, :, 7] = -torch.inf
    grads = [torch.zeros_like(t) for t in (x.q, x.k, x.v)]
    dq, dk, dv = grads
    delta = (x.dout * result.out).sum(-1).transpose(1, 2)
    for out in (result.out, None):
        kernel.backward(x.dout, x.q, x.k, x.v, out, lse, delta, case.slices, scale=0.25, dq=dq, dk=dk, dv=dv)
        assert not dq[:, 7].any() and dq[:, 8].any() and all(bool(grad.isfinite().all()) for grad in grads)


def test_a_sink_is_a_carry(kernel: Kernel) -> None:
    """Starting from (0, sink) gives softmax with one more, valueless key; rows that see nothing keep lse = sink."""
    case = BY_NAME["holes"]
    x = make_slice_inputs(case, torch.float64)
    sinks = torch.tensor([0.3, -2.0], dtype=torch.float64)
    carry = torch.zeros(1, 40, 2, 16, dtype=torch.float64), sinks[None, :, None].repeat(1, 1, 40)
    out, lse = kernel.forward(x.q, x.k, x.v, case.slices, scale=0.25, carry=carry)
    exact = dense_attention(x.q, x.k, x.v, visible(case.slices, 40, 40), scale=0.25, sinks=sinks)
    torch.testing.assert_close(out, exact[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, exact[1], rtol=1e-12, atol=1e-12)


POISONED = ["causal", "window", "band_behind", "documents", "prefix", "gqa", "chunks", "blocks", "causal_more_keys"]


class TestPoison:
    """A NaN or an infinity reaches what it would reach in dense attention on the visible pairs, and nothing else."""

    @staticmethod
    def dense(inputs: Inputs, seen: Tensor) -> tuple[Tensor, ...]:
        """out, dq, dk, dv of one head, pair by pair: nothing is multiplied by an invisible pair's zero."""
        q, k, v, dout = (x[0, :, 0] for x in (inputs.q, inputs.k, inputs.v, inputs.dout))
        scores = ((q[:, None] * k[None]).sum(-1) * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
        p = scores.softmax(-1).masked_fill(~seen.any(1, keepdim=True), 0.0)
        out = (p[..., None] * v).masked_fill(~seen[..., None], 0.0).sum(1)
        ds = p * ((dout[:, None] * v[None]).sum(-1) - (dout * out).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
        dq = (ds[..., None] * k).masked_fill(~seen[..., None], 0.0).sum(1)
        dk = (ds[..., None] * q[:, None]).masked_fill(~seen[..., None], 0.0).sum(0)
        dv = (p[..., None] * dout[:, None]).masked_fill(~seen[..., None], 0.0).sum(0)
        return out, dq, dk, dv

    @pytest.mark.usefixtures("small_tiles")
    @pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("where", ["q", "k", "v", "dout"])
    @pytest.mark.parametrize("name", POISONED)
    def test_reaches_what_sees_it(self, kernel: Kernel, name: str, where: str, poison: float) -> None:
        case = replace(BY_NAME[name], batch=1, heads=1, kv_heads=1)
        inputs = make_slice_inputs(case, torch.float64)
        row = getattr(inputs, where).shape[1] * 2 // 5
        getattr(inputs, where)[0, row, 0, 3] = poison
        seen = visible(case.slices, case.q_len, case.k_len)
        result = run_kernel(kernel, inputs, [case.slices])
        for tensor, exact in zip(("out", "dq", "dk", "dv"), self.dense(inputs, seen), strict=True):
            got = getattr(result, tensor)[0, :, 0]
            assert torch.equal(got.isfinite(), exact.isfinite()), f"{tensor} is finite in the wrong places"
            torch.testing.assert_close(got[exact.isfinite()], exact[exact.isfinite()], rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("where", ["q", "k", "v", "dout"])
    def test_other_heads_and_batches_are_untouched(self, kernel: Kernel, where: str) -> None:
        case = BY_NAME["gqa"]
        clean = run_kernel(kernel, make_slice_inputs(case, torch.float64), [case.slices])
        inputs = make_slice_inputs(case, torch.float64)
        getattr(inputs, where)[1, 5, 1] = torch.nan
        result = run_kernel(kernel, inputs, [case.slices])
        group = case.heads // case.kv_heads
        of_q = {"q": [1], "dout": [1]}.get(where, list(range(group, 2 * group)))
        of_k = {"q": [0], "dout": [0]}.get(where, [1])
        for name, heads in (("out", of_q), ("dq", of_q), ("dk", of_k), ("dv", of_k)):
            got, untouched = getattr(result, name), getattr(clean, name)
            assert got[0].isfinite().all()
            others = [h for h in range(got.shape[2]) if h not in heads]
            torch.testing.assert_close(got[1][:, others], untouched[1][:, others], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seed", range(60))
def test_drawn_tables(kernel: Kernel, seed: int) -> None:
    """Bands of any kind side by side, many per row."""
    rng = np.random.default_rng(seed)
    q_len, k_len = rng.integers(1, 80, 2).tolist()
    rows = []
    q_cuts = [0, *sorted(rng.integers(0, q_len + 1, 3).tolist()), q_len]
    for q0, q1 in itertools.pairwise(q_cuts):
        k_cuts = [0, *sorted(rng.integers(0, k_len + 1, 2).tolist()), k_len]
        for k0, k1 in itertools.pairwise(k_cuts):
            lo = -UNBOUNDED if rng.random() < 0.5 else int(rng.integers(-60, 40))
            hi = UNBOUNDED if rng.random() < 0.5 else int(rng.integers(-40, 60))
            rows.append((q0, q1, k0, k1, lo, hi))
    kv_heads = int(rng.integers(1, 3))
    case = SliceCase(
        f"drawn {seed}",
        "",
        q_len,
        k_len,
        tuple(rows),
        batch=int(rng.integers(1, 3)),
        heads=kv_heads * int(rng.integers(1, 4)),
        kv_heads=kv_heads,
        head_dim=int(rng.choice([8, 13, 32])),
        head_dim_v=int(rng.choice([8, 13, 32])),
    )
    inputs = make_slice_inputs(case, [torch.float64, torch.float32, torch.bfloat16][seed % 3], dlse=bool(seed % 2), seed=seed)
    assert_right(kernel, inputs, [case.slices])


CPU_PROBLEM = Problem("cpu", None, torch.float32, 64, 64, 4, 2)
H200_PROBLEM = Problem("cuda", (9, 0), torch.bfloat16, 128, 128, 16, 4)


class TestChoice:
    def test_of_a_tensor(self) -> None:
        q, k, v = torch.zeros(1, 3, 4, 24), torch.zeros(1, 5, 2, 24), torch.zeros(1, 5, 2, 8)
        problem = Problem.of(q, k, v, softcap=True, needs_grad=True)
        assert problem == Problem("cpu", None, torch.float32, 24, 8, 4, 2, softcap=True, needs_grad=True)
        assert "head_dim 24/8" in str(problem) and "softcap" in str(problem)

    def test_auto_on_the_cpu(self) -> None:
        assert kernels.choose("auto", CPU_PROBLEM) is cpu.KERNEL
        assert kernels.choose("auto", replace(CPU_PROBLEM, softcap=True)) is reference.KERNEL

    def test_auto_on_other_devices(self) -> None:
        assert kernels.choose("auto", replace(CPU_PROBLEM, device="mps")) is reference.KERNEL

    def test_auto_on_cuda_prefers_what_is_faster(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from ringflash.kernels import flash_attn

        monkeypatch.setattr(flash_attn, "installed_generations", lambda: ())
        assert kernels.preference(H200_PROBLEM) == ("hopper", "sdpa", "reference")
        monkeypatch.setattr(flash_attn, "installed_generations", lambda: (2,))
        assert kernels.preference(H200_PROBLEM) == ("hopper", "sdpa", "flash_attn", "reference")
        monkeypatch.setattr(flash_attn, "installed_generations", lambda: (4, 2))
        assert kernels.preference(H200_PROBLEM) == ("hopper", "flash_attn", "sdpa", "reference")
        assert kernels.preference(replace(H200_PROBLEM, capability=(8, 0)))[:2] == ("hopper", "sdpa"), "no version 4 on Ampere"

    def test_is_cached(self) -> None:
        assert kernels.choose("auto", CPU_PROBLEM) is kernels.choose("auto", replace(CPU_PROBLEM))
        assert kernels.choose.cache_info().hits > 0

    def test_unknown_name(self) -> None:
        with pytest.raises(ValueError, match=r"backend='fast' is unknown; allowed: 'auto', 'hopper', 'sdpa'"):
            kernels.choose("fast", CPU_PROBLEM)

    @pytest.mark.parametrize(
        ("backend", "problem", "words"),
        [
            ("sdpa", CPU_PROBLEM, "needs a CUDA device, got cpu"),
            ("flash_attn", CPU_PROBLEM, "needs a CUDA device, got cpu"),
            ("cpu", replace(CPU_PROBLEM, softcap=True), "no softcap"),
            ("cpu", H200_PROBLEM, "needs CPU tensors"),
            ("sdpa", replace(H200_PROBLEM, dtype=torch.float32), "needs bfloat16 or float16, got float32"),
            ("sdpa", replace(H200_PROBLEM, head_dim=264), "head dims up to 256"),
            ("sdpa", replace(H200_PROBLEM, head_dim=256, head_dim_v=256, needs_grad=True, dlse=True), "head dims up to 248"),
            ("sdpa", replace(H200_PROBLEM, softcap=True), "no softcap"),
            ("sdpa", replace(H200_PROBLEM, capability=(7, 5)), "this device has 7.5"),
            ("reference", replace(CPU_PROBLEM, dtype=torch.int32), "needs a floating dtype"),
        ],
    )
    def test_a_named_backend_that_cannot_is_an_error(self, backend: str, problem: Problem, words: str) -> None:
        with pytest.raises(ValueError, match=words) as caught:
            kernels.choose(backend, problem)
        assert f"backend={backend!r} cannot compute attention for {problem}" in str(caught.value)
        assert "Use " in str(caught.value)

    def test_head_dims_that_sdpa_can_pad(self) -> None:
        for head_dim, head_dim_v, dlse in ((37, 37, True), (256, 256, False), (248, 246, True), (192, 128, True)):
            problem = replace(H200_PROBLEM, head_dim=head_dim, head_dim_v=head_dim_v, needs_grad=True, dlse=dlse)
            assert dict(kernels.explain_choice(problem))["sdpa"] is None

    def test_explanation_covers_every_backend_once(self) -> None:
        for problem in (CPU_PROBLEM, H200_PROBLEM):
            explained = kernels.explain_choice(problem)
            assert sorted(name for name, _ in explained) == sorted(kernels.NAMES)
            chosen = next(name for name, reason in explained if reason is None)
            assert kernels.choose("auto", problem).name == chosen

    def test_nothing_can(self) -> None:
        with pytest.raises(
            ValueError, match=r"no backend can compute attention for cpu, int32.*reference: needs a floating dtype"
        ):
            kernels.choose("auto", replace(CPU_PROBLEM, dtype=torch.int32))

    def test_a_missing_backend_is_not_an_error_but_a_missing_import_is(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing(name: str, error_name: str) -> None:
            def import_module(module: str) -> object:
                raise ModuleNotFoundError(f"No module named {error_name!r}", name=error_name)

            kernels.load.cache_clear()
            monkeypatch.setattr(importlib, "import_module", import_module)

        missing("hopper", "ringflash.kernels.hopper")
        assert kernels.load("hopper") is None
        missing("hopper", "something_else")
        with pytest.raises(ModuleNotFoundError, match="something_else"):
            kernels.load("hopper")
        kernels.load.cache_clear()
