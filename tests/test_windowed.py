"""The kernels on CUDA libraries, run on the CPU over emulations of these libraries.

An emulation computes with the reference kernel and keeps the library's interface and habits: which windows it misreads, what
it leaves unwritten, what it assumes of strides. So everything but the device code is tested: how Slices become calls, padding,
argument order, the way of delta. The same cases run on real devices in tests/gpu.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ringflash.kernels import Problem, flash_attn, reference, sdpa, windowed
from ringflash.kernels.decompose import UNLIMITED, Pack
from ringflash.kernels.running import accumulate_dtype
from ringflash.kernels.windowed import Library, WindowedKernel
from ringflash.slices import Slices
from ringflash.testing.inputs import spread
from ringflash.testing.oracle import Inputs
from ringflash.testing.slice_cases import CASES, SliceCase, documents, make_slice_inputs, run_kernel, visible
from ringflash.testing.tolerance import Judge

SEEING = [case for case in CASES if len(case.slices) and case.heads]
BY_NAME = {case.name: case for case in CASES}


def band(rows: int, keys: int, left: int, right: int) -> Slices:
    """A window aligned at the end; UNLIMITED sides are far away."""
    end = keys - rows
    return Slices.from_rows([(0, rows, 0, keys, -(1 << 40) if left < 0 else end - left, 1 << 40 if right < 0 else end + right)])


def flash_attention_2_window(rows: int, keys: int, left: int, right: int, max_keys: int) -> Slices:
    """What FlashAttention-2 makes of a window (see tests/test_decompose.py)."""
    left, right = (UNLIMITED if side >= max_keys else side for side in (left, right))
    if left == right == UNLIMITED:
        return band(rows, keys, left, right)
    left, right = (max_keys if side == UNLIMITED else side for side in (left, right))
    return band(rows, keys, left, right)


Window = Callable[[int, int, int], Slices]
"""(rows, keys, most keys of a sequence) -> the scores that are computed."""


def one_forward(q: Tensor, k: Tensor, v: Tensor, slices: Slices, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    out, lse = reference.KERNEL.forward(q, k, v, slices, scale=scale, softcap=softcap)
    return out, lse.masked_fill(lse.isneginf(), torch.inf)  # FlashAttention-2's spelling of an empty row


def one_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, slices: Slices, scale: float, softcap: float
) -> list[Tensor]:
    dq, dk, dv = (torch.zeros_like(x, dtype=lse.dtype) for x in (q, k, v))
    reference.KERNEL.backward(dout, q, k, v, None, lse, delta, slices, scale=scale, softcap=softcap, dq=dq, dk=dk, dv=dv)
    return [x.to(q.dtype) for x in (dq, dk, dv)]


def check_inputs(*tensors: Tensor, one_width: bool = True) -> None:
    for x in tensors:
        assert x.stride(-1) == 1 and x.shape[-1] % 8 == 0 and x.data_ptr() % 16 == 0
        assert all(n <= 1 or s % 8 == 0 for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True))
    assert not one_width or len({x.shape[-1] for x in tensors}) == 1, "this library knows one head dim"


def spans(cu_q: Tensor, cu_k: Tensor) -> Iterator[tuple[slice, slice]]:
    assert cu_q.dtype == cu_k.dtype == torch.int32 and cu_q.shape == cu_k.shape
    for q0, q1, k0, k1 in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), cu_k[:-1].tolist(), cu_k[1:].tolist(), strict=True):
        yield slice(q0, q1), slice(k0, k1)


def library_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[Tensor | None, Tensor | None, int, int],
    window: Window,
    scale: float,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Dense or of variable length, in the layouts that all libraries share. What no sequence covers stays unwritten: NaN."""
    assert scale > 0, "0 times the -inf of a masked score is NaN in the libraries"
    cu_q, cu_k, max_q, max_k = lengths
    if cu_q is None:
        return one_forward(q, k, v, window(q.shape[1], k.shape[1], k.shape[1]), scale, softcap)
    assert cu_k is not None and max_q >= 2
    out = q.new_full((*q.shape[:-1], v.shape[-1]), torch.nan)
    lse = q.new_full((q.shape[1], q.shape[0]), torch.nan, dtype=accumulate_dtype(q.dtype))
    for rows, keys in spans(cu_q, cu_k):
        n, m = rows.stop - rows.start, keys.stop - keys.start
        assert n <= max_q or not m
        assert m <= max_k or not n
        tensors = q[None, rows], k[None, keys], v[None, keys]
        out[rows], lse[:, rows] = (x[0] for x in one_forward(*tensors, window(n, m, max_k), scale, softcap))
    return out, lse


def library_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: tuple[Tensor | None, Tensor | None, int, int],
    window: Window,
    scale: float,
    softcap: float = 0.0,
    dlse: Tensor | None = None,
) -> list[Tensor]:
    """delta = rowsum(dout * out) - dlse, as every library computes it."""
    assert lse.is_contiguous() and scale > 0
    cu_q, cu_k, _, max_k = lengths
    delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1).transpose(-1, -2)
    delta = delta if dlse is None else delta - dlse
    if cu_q is None:
        return one_backward(dout, q, k, v, lse, delta, window(q.shape[1], k.shape[1], k.shape[1]), scale, softcap)
    assert cu_k is not None
    grads = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    for rows, keys in spans(cu_q, cu_k):
        shown = window(rows.stop - rows.start, keys.stop - keys.start, max_k)
        tensors = (dout[None, rows], q[None, rows], k[None, keys], v[None, keys], lse[None, :, rows], delta[None, :, rows])
        for grad, where, part in zip(grads, (rows, keys, keys), one_backward(*tensors, shown, scale, softcap), strict=True):
            grad[where] = part[0]
    return grads


def fa2(left: int, right: int) -> Window:
    return lambda rows, keys, max_keys: flash_attention_2_window(rows, keys, left, right, max_keys)


class Emulation:
    """Counts the calls by kind."""

    def __init__(self) -> None:
        self.calls: list[str] = []


def bind(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, by the schema of the operator of this torch."""
    arguments = operator._schema.arguments
    bound = dict(zip([a.name for a in arguments if not a.kwarg_only], args, strict=False))
    assert len(args) <= len([a for a in arguments if not a.kwarg_only]) and not bound.keys() & kwargs.keys()
    assert kwargs.keys() <= {a.name for a in arguments}
    bound |= kwargs
    assert {a.name for a in arguments if not a.has_default_value()} <= bound.keys()
    return bound


class EmulatedTorch(Emulation):
    """torch's operators: FlashAttention-2 and cuDNN."""

    def __init__(self, lse_dims: int) -> None:
        super().__init__()
        self.lse_dims = lse_dims
        names = ("_flash_forward", "_flash_backward", "_cudnn_forward", "_cudnn_backward")
        self.real = {name: getattr(sdpa, name) for name in names}
        self._layouts: dict[Any, Any] = {}

    @staticmethod
    def _lengths(a: dict[str, Any]) -> tuple[Tensor | None, Tensor | None, int, int]:
        return a["cum_seq_q"], a["cum_seq_k"], a["max_q"], a["max_k"]

    def flash_forward(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        a = bind(self.real["_flash_forward"], args, kwargs)
        self.calls.append("flash" if a["cum_seq_q"] is None else "packed")
        q, k, v = a["query"], a["key"], a["value"]
        check_inputs(q, k, v)
        assert a["dropout_p"] == 0.0 and not a["is_causal"] and not a["return_debug_mask"]
        out, lse = library_forward(q, k, v, self._lengths(a), fa2(a["window_size_left"], a["window_size_right"]), a["scale"])
        return out, lse, None, None, None

    def flash_backward(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        a = bind(self.real["_flash_backward"], args, kwargs)
        self.calls.append("flash" if a["cum_seq_q"] is None else "packed")
        self.deterministic = torch.are_deterministic_algorithms_enabled()
        tensors = a["grad_out"], a["query"], a["key"], a["value"], a["out"]
        check_inputs(*tensors)
        assert a["dropout_p"] == 0.0 and not a["is_causal"]
        window = fa2(a["window_size_left"], a["window_size_right"])
        return tuple(library_backward(*tensors, a["logsumexp"], self._lengths(a), window, a["scale"]))

    def _cudnn_window(self, q: Tensor, k: Tensor, causal: bool) -> Window:
        """Causal is aligned at the first row and key."""
        if causal:
            return lambda rows, keys, _: Slices.from_rows([(0, rows, 0, keys, -(1 << 40), 0)])
        return lambda rows, keys, _: Slices.full_rectangle(rows, keys)

    def cudnn_forward(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        a = bind(self.real["_cudnn_forward"], args, kwargs)
        self.calls.append("cudnn")
        q, k, v = (a[name].transpose(1, 2) for name in ("query", "key", "value"))
        check_inputs(q, k, v, one_width=False)
        assert a["attn_bias"] is None and a["compute_log_sumexp"] and a["dropout_p"] == 0.0 and not a["return_debug_mask"]
        scale = q.shape[-1] ** -0.5 if a.get("scale") is None else a["scale"]
        out, lse = library_forward(q, k, v, (None, None, 0, 0), self._cudnn_window(q, k, a["is_causal"]), scale)
        return out.transpose(1, 2), lse.unsqueeze(-1) if self.lse_dims == 4 else lse, None, None, 0, 0, None, None, None

    def cudnn_backward(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        a = bind(self.real["_cudnn_backward"], args, kwargs)
        self.calls.append("cudnn")
        q, k, v = (a[name].transpose(1, 2) for name in ("query", "key", "value"))
        lse = a["logsumexp"]
        assert lse.dim() == self.lse_dims and a["attn_bias"] is None and a["cum_seq_q"] is None and a["cum_seq_k"] is None
        assert (a["max_q"], a["max_k"]) == (q.shape[1], k.shape[1])
        # A plan is cached by the strides of q, k and v, and reads out and dout with the strides of the call that made it.
        shapes = tuple((x.shape, x.stride()) for x in (a["query"], a["key"], a["value"]))
        layouts = self._layouts.setdefault(shapes, (a["out"].stride(), a["grad_out"].stride()))
        read = zip((a["out"], a["grad_out"]), layouts, strict=True)
        out, dout = (x.as_strided(x.shape, layout).transpose(1, 2) for x, layout in read)
        check_inputs(q, k, v, out, dout, one_width=False)
        window = self._cudnn_window(q, k, a["is_causal"])
        lse = lse.squeeze(-1) if self.lse_dims == 4 else lse
        grads = library_backward(dout, q, k, v, out, lse, (None, None, 0, 0), window, a["scale"])
        return tuple(x.transpose(1, 2) for x in grads)


@pytest.fixture(params=["flash only", "cudnn", "cudnn with lse (B, H, S)"])
def torch_library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[EmulatedTorch]:
    emulated = EmulatedTorch(3 if "(B, H, S)" in request.param else 4)
    for name in ("flash_forward", "flash_backward", "cudnn_forward", "cudnn_backward"):
        monkeypatch.setattr(sdpa, f"_{name}", getattr(emulated, name))
    allowed = "cudnn" in request.param
    monkeypatch.setattr(sdpa, "_cudnn_can", lambda shape, needs_grad, enabled: allowed)
    for setting, value in (("CUDNN_SIDE", 3), ("CUT_AREA", 200)):
        monkeypatch.setattr(sdpa, setting, value)
    monkeypatch.setattr(windowed, "LARGE", 150)
    caches = (sdpa._cut, sdpa._cudnn_lse_dims, windowed.launches)
    for cache in caches:
        cache.cache_clear()
    assert sdpa._cudnn_lse_dims(torch.device("cpu")) == emulated.lse_dims
    emulated.calls.clear()
    yield emulated
    for cache in caches:
        cache.cache_clear()


def judged(kernel: Any, inputs: Inputs, slices: Slices, softcap: float = 0.0, deterministic: bool = False) -> list[str]:
    judge = Judge(inputs, visible(slices, inputs.q.shape[1], inputs.k.shape[1]), softcap=softcap)
    return judge.objections(run_kernel(kernel, inputs, [slices], softcap=softcap, deterministic=deterministic))


@pytest.mark.parametrize("dlse", [False, True], ids=["", "dlse"])
@pytest.mark.parametrize("case", SEEING, ids=str)
def test_sdpa(torch_library: EmulatedTorch, case: SliceCase, dlse: bool) -> None:
    assert not judged(sdpa.KERNEL, make_slice_inputs(case, torch.float64, dlse=dlse), case.slices)


@pytest.mark.parametrize("dlse", [False, True], ids=["", "dlse"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", SEEING, ids=str)
def test_sdpa_rounding(torch_library: EmulatedTorch, case: SliceCase, dtype: torch.dtype, dlse: bool) -> None:
    """Partial results rounded to the inputs' dtype, and delta carried in it, stay within the tolerance of plain torch."""
    assert not judged(sdpa.KERNEL, make_slice_inputs(case, dtype, dlse=dlse), case.slices)


@pytest.mark.parametrize("scale", [0.0, 2.5, -1.0])
@pytest.mark.parametrize("name", ["causal", "documents", "band"])
def test_sdpa_scale(torch_library: EmulatedTorch, name: str, scale: float) -> None:
    case = BY_NAME[name]
    inputs = make_slice_inputs(case, torch.float64, dlse=True)
    judge = Judge(inputs, visible(case.slices, case.q_len, case.k_len), scale=scale)
    assert not judge.objections(run_kernel(sdpa.KERNEL, inputs, [case.slices], scale=scale))


@pytest.mark.parametrize("case", [case for case in SEEING if len(case.slices) > 1], ids=str)
def test_sdpa_continues(torch_library: EmulatedTorch, case: SliceCase) -> None:
    inputs = make_slice_inputs(case, torch.float64, dlse=True)
    judge = Judge(inputs, visible(case.slices, case.q_len, case.k_len))
    assert not judge.objections(run_kernel(sdpa.KERNEL, inputs, [case.slices[n : n + 1] for n in range(len(case.slices))]))


@pytest.mark.parametrize("case", [case for case in CASES if case not in SEEING], ids=str)
def test_sdpa_calls_nothing_for_nothing(torch_library: EmulatedTorch, case: SliceCase) -> None:
    run_kernel(sdpa.KERNEL, make_slice_inputs(case, torch.bfloat16, dlse=True), [case.slices])
    assert not torch_library.calls


class TestSdpaChoosesCalls:
    @staticmethod
    def calls(library: EmulatedTorch, name: str, **how: Any) -> list[str]:
        case = BY_NAME[name]
        library.calls.clear()
        assert not judged(sdpa.KERNEL, make_slice_inputs(case, torch.float64), case.slices, **how)
        return library.calls

    def test_cudnn_for_few_plain_shapes(self, torch_library: EmulatedTorch) -> None:
        engine = "flash" if not sdpa._cudnn_can(None, False, True) else "cudnn"
        assert self.calls(torch_library, "causal") == [engine] * 2
        assert self.calls(torch_library, "full") == [engine] * 2
        assert self.calls(torch_library, "zigzag") == [engine] * 6
        assert set(self.calls(torch_library, "causal_more_keys")) == {engine}
        assert self.calls(torch_library, "window") == ["flash"] * 2
        assert self.calls(torch_library, "documents") == ["packed"] * 2

    def test_deterministic_gradients_are_flash_attentions(self, torch_library: EmulatedTorch) -> None:
        before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
        assert self.calls(torch_library, "causal", deterministic=True)[1] == "flash"
        assert torch_library.deterministic
        assert before == (torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory)
        self.calls(torch_library, "window")
        assert not torch_library.deterministic


@pytest.mark.parametrize("name", ["causal", "full", "window", "documents"])
def test_a_single_call_returns_the_librarys_tensor(
    torch_library: EmulatedTorch, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """No copy and no merge when one call covers all rows."""
    made: list[int] = []
    for function in ("_flash_forward", "_cudnn_forward"):
        real = getattr(sdpa, function)

        def watched(*args: Any, real: Any = real, **kwargs: Any) -> Any:
            result = real(*args, **kwargs)
            made.append(result[0].data_ptr())
            return result

        monkeypatch.setattr(sdpa, function, watched)
    x = make_slice_inputs(BY_NAME[name], torch.bfloat16)
    out, _ = sdpa.KERNEL.forward(x.q, x.k, x.v, BY_NAME[name].slices, scale=1.0)
    assert made == [out.data_ptr()]


def test_backward_plans_see_one_layout(torch_library: EmulatedTorch) -> None:
    """The same q, k, v with out and dout in other strides: cuDNN's cached plan must not misread them."""
    case = BY_NAME["full"]
    inputs = make_slice_inputs(case, torch.float64)
    exact = run_kernel(sdpa.KERNEL, inputs, [case.slices])
    heads_first = inputs.dout.transpose(1, 2).contiguous().transpose(1, 2)
    delta = (inputs.dout * exact.out).sum(-1).transpose(1, 2)
    for dout, out in ((heads_first, exact.out), (inputs.dout, exact.out.transpose(1, 2).contiguous().transpose(1, 2))):
        grads = [torch.zeros_like(x) for x in (inputs.q, inputs.k, inputs.v)]
        dq, dk, dv = grads
        args = (dout, inputs.q, inputs.k, inputs.v, out, exact.lse, delta, case.slices)
        sdpa.KERNEL.backward(*args, scale=case.head_dim**-0.5, dq=dq, dk=dk, dv=dv)
        for got, wanted in zip(grads, (exact.dq, exact.dk, exact.dv), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("how", ["every third row", "inside a wider dim", "heads first"])
@pytest.mark.parametrize("name", ["gqa", "documents_both_ways", "zigzag", "odd_dim"])
def test_strides(torch_library: EmulatedTorch, name: str, how: str) -> None:
    case = BY_NAME[name]
    x = make_slice_inputs(case, torch.float64)
    views = Inputs(*(spread(t, how) for t in (x.q, x.k, x.v)), None, spread(x.dout, how), None)
    assert not judged(sdpa.KERNEL, views, case.slices)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1e-6, 1.0, 3e4])
def test_delta_survives_the_dtype(dtype: torch.dtype, size: float) -> None:
    """delta in two columns: far closer than one rounding to the dtype."""
    delta = torch.randn(2, 3, 50) * size
    dout = torch.zeros(2, 50, 3, 8, dtype=dtype)
    wide_dout, wide_out = windowed.with_delta(dout, delta)
    assert wide_dout.dtype == wide_out.dtype == dtype and wide_dout.shape == wide_out.shape == (2, 50, 3, 10)
    got = (wide_dout.double() * wide_out.double()).sum(-1).transpose(1, 2)
    error = (got - delta.double()).abs()
    assert bool((error <= delta.abs() * 2**-16 + 2e-9).all())


def test_many_documents_are_one_call(torch_library: EmulatedTorch) -> None:
    lengths = np.random.default_rng(0).integers(1, 9, 60).tolist()
    n = sum(lengths)
    case = SliceCase("many", "", n, n, documents(lengths, lo=-4), batch=2)
    assert not judged(sdpa.KERNEL, make_slice_inputs(case, torch.float64), case.slices)
    assert torch_library.calls == ["packed"] * 2


# --- flash-attn 2, 3, 4 -------------------------------------------------------------------------------------------------------


def lengths_of(kwargs: dict[str, Any]) -> tuple[Tensor | None, Tensor | None, int, int]:
    return kwargs.get("cu_seqlens_q"), kwargs.get("cu_seqlens_k"), kwargs.get("max_seqlen_q", 0), kwargs.get("max_seqlen_k", 0)


def emulated_flash_attn_2() -> ModuleType:
    module = ModuleType(flash_attn.MODULES[2])

    def _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
        return_softmax
    ):  # fmt: skip
        assert dropout_p == 0.0 and not causal and alibi_slopes is None and not return_softmax
        check_inputs(q, k, v)
        window = fa2(window_size_left, window_size_right)
        return *library_forward(q, k, v, (None, None, 0, 0), window, softmax_scale, softcap), None, None

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None,
    ):  # fmt: skip
        assert dropout_p == 0.0 and not causal and alibi_slopes is None and not return_softmax
        check_inputs(q, k, v)
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        return *library_forward(q, k, v, lengths, fa2(window_size_left, window_size_right), softmax_scale, softcap), None, None

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
        window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        check_inputs(dout, q, k, v, out, dq, dk, dv)
        window = fa2(window_size_left, window_size_right)
        parts = library_backward(dout, q, k, v, out, softmax_lse, (None, None, 0, 0), window, softmax_scale, softcap)
        for grad, part in zip((dq, dk, dv), parts, strict=True):
            grad.copy_(part)
        return None

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None,
    ):  # fmt: skip
        check_inputs(dout, q, k, v, out, dq, dk, dv)
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        window = fa2(window_size_left, window_size_right)
        parts = library_backward(dout, q, k, v, out, softmax_lse, lengths, window, softmax_scale, softcap)
        for grad, part in zip((dq, dk, dv), parts, strict=True):
            grad.copy_(part)
        return None

    for function in (_flash_attn_forward, _flash_attn_varlen_forward, _flash_attn_backward, _flash_attn_varlen_backward):
        setattr(module, function.__name__, function)
    return module


def emulated_flash_attn_3() -> ModuleType:
    module = ModuleType(flash_attn.MODULES[3])

    def clipped(left: int, right: int) -> Window:
        """It takes a side that reaches the last key, or the last row, for unlimited."""
        return lambda rows, keys, max_keys: band(rows, keys, UNLIMITED if left >= max_keys - 1 else left, right)

    def _flash_attn_forward(
        q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None,
        cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, page_table=None,
        kv_batch_idx=None, leftpad_k=None, rotary_cos=None, rotary_sin=None, seqlens_rotary=None, q_descale=None,
        k_descale=None, v_descale=None, softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1,
        attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, num_splits=1, pack_gqa=None,
        sm_margin=0,
    ):  # fmt: skip
        check_inputs(q, k, v)
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q or 0, max_seqlen_k or 0
        out, lse = library_forward(q, k, v, lengths, clipped(window_size_left, window_size_right), softmax_scale, softcap)
        return out, lse, None, None

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
        max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
        window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        check_inputs(dout, q, k, v, out, dq, dk, dv)
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q or 0, max_seqlen_k or 0
        window = clipped(window_size_left, window_size_right)
        parts = library_backward(dout, q, k, v, out, softmax_lse, lengths, window, softmax_scale, softcap)
        for grad, part in zip((dq, dk, dv), parts, strict=True):
            grad.copy_(part)
        return None

    module._flash_attn_forward = _flash_attn_forward
    module._flash_attn_backward = _flash_attn_backward
    return module


def emulated_flash_attn_4() -> ModuleType:
    module = ModuleType(flash_attn.MODULES[4])

    def exact(left: int | None, right: int | None) -> Window:
        assert (left is None or left >= 0) and (right is None or right >= 0)
        return lambda rows, keys, _: band(rows, keys, UNLIMITED if left is None else left, UNLIMITED if right is None else right)

    def _flash_attn_fwd(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
        max_seqlen_k=None, softmax_scale=None, causal=False, softcap=None, window_size_left=None,
        window_size_right=None, return_lse=False,
    ):  # fmt: skip
        check_inputs(q, k, v, one_width=False)
        assert return_lse
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q or 0, max_seqlen_k or 0
        window = exact(window_size_left, window_size_right)
        return *library_forward(q, k, v, lengths, window, softmax_scale, softcap or 0.0), None, None

    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
        window_size_right=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        deterministic=False, dlse=None,
    ):  # fmt: skip
        check_inputs(q, k, v, out, dout, one_width=False)
        assert all(x.is_contiguous() for x in (q, k, v, out, dout))
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q or 0, max_seqlen_k or 0
        window = exact(window_size_left, window_size_right)
        return tuple(library_backward(dout, q, k, v, out, lse, lengths, window, softmax_scale, softcap, dlse))

    module._flash_attn_fwd = _flash_attn_fwd
    module._flash_attn_bwd = _flash_attn_bwd
    return module


EMULATED = {2: emulated_flash_attn_2, 3: emulated_flash_attn_3, 4: emulated_flash_attn_4}


class OnGeneration(WindowedKernel):
    name = "flash_attn"

    def __init__(self, generation: int) -> None:
        self._library = flash_attn.GENERATIONS[generation]()

    def refuses(self, problem: Problem) -> str | None:
        return None

    def library_for(self, q: Tensor) -> Library:
        return self._library


@pytest.fixture(params=[2, 3, 4])
def generation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> OnGeneration:
    monkeypatch.setitem(sys.modules, flash_attn.MODULES[request.param], EMULATED[request.param]())
    return OnGeneration(request.param)


@pytest.mark.parametrize("dlse", [False, True], ids=["", "dlse"])
@pytest.mark.parametrize("case", SEEING, ids=str)
def test_flash_attn(generation: OnGeneration, case: SliceCase, dlse: bool) -> None:
    assert not judged(generation, make_slice_inputs(case, torch.float64, dlse=dlse), case.slices)


@pytest.mark.parametrize("name", ["causal", "band", "documents_window", "gqa"])
def test_flash_attn_softcap(generation: OnGeneration, name: str) -> None:
    case = BY_NAME[name]
    assert not judged(generation, make_slice_inputs(case, torch.float64, dlse=True), case.slices, softcap=2.0)


H200 = Problem("cuda", (9, 0), torch.bfloat16, 128, 128, 16, 4)


class TestFlashAttnRefuses:
    @pytest.fixture(autouse=True)
    def fresh(self) -> Iterator[None]:
        flash_attn._library.cache_clear()
        yield
        flash_attn._library.cache_clear()

    def test_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(flash_attn, "installed_generations", lambda: ())
        assert flash_attn.KERNEL.refuses(H200) == "flash-attn is not installed"

    def test_what_is_installed_is_found(self) -> None:
        assert set(flash_attn.installed_generations()) <= {4, 3, 2}

    def test_newest_generation_for_the_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(flash_attn, "installed_generations", lambda: (4, 3, 2))
        assert [flash_attn.generation_for(c) for c in ((8, 0), (9, 0), (10, 0), (12, 0), (7, 5), None)] == [
            2,
            4,
            4,
            2,
            None,
            None,
        ]
        monkeypatch.setattr(flash_attn, "installed_generations", lambda: (3,))
        refusal = flash_attn.KERNEL.refuses(Problem("cuda", (8, 0), torch.bfloat16, 64, 64, 4, 4))
        assert refusal == "the installed flash-attn (3) has no kernels for compute capability 8.0"

    def test_another_interface(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(flash_attn, "installed_generations", lambda: (4,))
        module = emulated_flash_attn_4()
        module._flash_attn_bwd = lambda q, k, v, out, dout, lse: None
        monkeypatch.setitem(sys.modules, flash_attn.MODULES[4], module)
        refusal = flash_attn.KERNEL.refuses(H200)
        assert refusal is not None and "_flash_attn_bwd has no argument cu_seqlens_k" in refusal and "dlse" in refusal

    def test_a_broken_installation(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(flash_attn, "installed_generations", lambda: (3,))
        refusal = flash_attn.KERNEL.refuses(H200)
        assert refusal is not None and refusal.startswith("flash-attn 3 is installed but cannot be used: ModuleNotFoundError")

    @pytest.mark.parametrize("number", [2, 3, 4])
    def test_accepts(self, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        monkeypatch.setattr(flash_attn, "installed_generations", lambda: (number,))
        monkeypatch.setitem(sys.modules, flash_attn.MODULES[number], EMULATED[number]())
        assert flash_attn.KERNEL.refuses(H200) is None

    @pytest.mark.parametrize(
        ("number", "problem", "words"),
        [
            (2, Problem("cuda", (9, 0), torch.bfloat16, 256, 256, 4, 4, needs_grad=True, dlse=True), "head dims up to 248"),
            (2, Problem("cuda", (9, 0), torch.float32, 64, 64, 4, 4), "bfloat16 or float16, got float32"),
            (2, Problem("cuda", (9, 0), torch.float16, 264, 264, 4, 4), "head dims up to 256"),
            (3, Problem("cuda", (9, 0), torch.float16, 256, 256, 4, 4, needs_grad=True, deterministic=True), "up to 192"),
            (4, Problem("cuda", (10, 0), torch.float16, 160, 160, 4, 4), "head dims up to 128, 192/128 or 256"),
            (4, Problem("cuda", (10, 0), torch.float16, 256, 256, 4, 4, softcap=True), "neither a softcap"),
        ],
    )
    def test_with_reason(self, monkeypatch: pytest.MonkeyPatch, number: int, problem: Problem, words: str) -> None:
        monkeypatch.setattr(flash_attn, "installed_generations", lambda: (number,))
        monkeypatch.setitem(sys.modules, flash_attn.MODULES[number], EMULATED[number]())
        refusal = flash_attn.KERNEL.refuses(problem)
        assert refusal is not None and words in refusal


def test_sequences_are_copied_to_the_device_once() -> None:
    pack = Pack()
    for s in Slices.from_rows(documents((3, 4))):
        assert pack.take(s)
    first = windowed.sequences(pack, 1, 7, 7, torch.device("cpu"))
    assert windowed.sequences(pack, 1, 7, 7, torch.device("cpu")) is first
    assert windowed.sequences(pack, 2, 7, 7, torch.device("cpu")) is not first
    assert first.cu_q.tolist() == [0, 3, 7] and (first.max_q, first.max_k) == (4, 4)


@pytest.mark.parametrize("operator", list(sdpa._POSITIONS), ids=str)
def test_torch_has_the_operators_as_they_are_called(operator: Any) -> None:
    assert sdpa._unexpected(operator) is None
