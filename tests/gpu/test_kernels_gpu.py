"""The kernels on a CUDA device: the cases of the CPU tests, and sizes at which libraries change their ways."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch

from ringflash import kernels
from ringflash.kernels import Kernel, Problem, sdpa
from ringflash.merge import merge_, merge_torch_
from ringflash.slices import Slices
from ringflash.testing.inputs import spread
from ringflash.testing.oracle import Inputs, Results
from ringflash.testing.slice_cases import CASES, INF, SliceCase, documents, make_slice_inputs, run_kernel, to_device, visible
from ringflash.testing.tolerance import Judge

DEVICE = "cuda"

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda")]

SEEING = [case for case in CASES if len(case.slices) and case.heads]
BY_NAME = {case.name: case for case in CASES}
BACKENDS = ["sdpa", "flash_attn", "hopper", "reference"]
LENGTHS = np.random.default_rng(0).integers(1, 260, 20).tolist()
TOTAL = sum(LENGTHS)

LARGE = [
    SliceCase("full", "cuDNN", 1024, 1024, ((0, 1024, 0, 1024, -INF, INF),), heads=1, kv_heads=1, head_dim=64, head_dim_v=64),
    SliceCase("causal", "cuDNN", 1024, 1024, ((0, 1024, 0, 1024, -INF, 0),), head_dim=128, head_dim_v=128, heads=2, kv_heads=1),
    SliceCase("causal_uneven", "beside every tile", 1003, 1003, ((0, 1003, 0, 1003, -INF, 0),), head_dim=64, head_dim_v=64),
    SliceCase("causal_more_keys", "cut for cuDNN", 1600, 3200, ((0, 1600, 0, 3200, -INF, 1600),), heads=1, kv_heads=1),
    SliceCase("causal_full_below", "cut for cuDNN", 3200, 1600, ((0, 3200, 0, 1600, -INF, 0),), heads=1, kv_heads=1),
    SliceCase(
        "zigzag",
        "few large Slices, two for the same rows",
        2048,
        2048,
        ((0, 1024, 0, 1024, -INF, 0), (1024, 2048, 0, 1024, -INF, INF), (1024, 2048, 1024, 2048, -INF, 0)),
        heads=1,
        kv_heads=1,
        head_dim=64,
        head_dim_v=64,
    ),
    SliceCase("window", "FlashAttention only", 2048, 2048, ((0, 2048, 0, 2048, -299, 0),), heads=1, kv_heads=1),
    SliceCase("band_tall", "a window that FlashAttention-2 would misread", 2000, 300, ((0, 2000, 0, 300, -1900, 100),), batch=2),
    SliceCase("documents", "one variable-length call", TOTAL, TOTAL, documents(LENGTHS), batch=2, heads=4, kv_heads=2),
    SliceCase(
        "documents_window", "the same under a window", TOTAL, TOTAL, documents(LENGTHS, lo=-99), head_dim=64, head_dim_v=64
    ),
    SliceCase("documents_apart", "rows and keys between", TOTAL + 60, TOTAL + 60, documents(LENGTHS, gap=3), batch=2),
]
DIMS = [(64, 64), (96, 96), (128, 128), (192, 192), (256, 256), (192, 128), (128, 64), (40, 40), (37, 37), (72, 128)]


def kernel_for(backend: str, inputs: Inputs, slices: Slices, **wishes: bool) -> Kernel:
    """The backend, or a skip with its reason."""
    kernel = kernels.load(backend)
    if kernel is None:
        pytest.skip(f"{backend} is not part of this installation")
    dlse = inputs.dlse is not None
    problem = Problem.of(
        inputs.q.to(DEVICE), inputs.k, inputs.v, needs_grad=True, dlse=dlse, **wishes
    )  # fmt: skip
    if (reason := kernel.refuses(problem)) is not None:
        pytest.skip(f"{backend}: {reason}")
    return kernel


@lru_cache(maxsize=16)
def judge_of(case: SliceCase, dtype: torch.dtype, dlse: bool = False, softcap: float = 0.0, scale: float | None = None) -> Judge:
    """Of float64 on the GPU: up to a minute of a CPU core. Backends are asked one after the other, so few are kept."""
    inputs = to_device(make_slice_inputs(case, dtype, dlse=dlse), DEVICE)
    return Judge(inputs, visible(case.slices, case.q_len, case.k_len, DEVICE), softcap=softcap, scale=scale)


def assert_right(
    backend: str, case: SliceCase, dtype: torch.dtype, dlse: bool = False, softcap: float = 0.0, **scale: float
) -> None:
    inputs = make_slice_inputs(case, dtype, dlse=dlse)
    kernel = kernel_for(backend, inputs, case.slices, softcap=softcap > 0)
    judge = judge_of(case, dtype, dlse, softcap, **scale)
    objections = judge.objections(run_kernel(kernel, to_device(inputs, DEVICE), [case.slices], softcap=softcap, **scale))
    assert not objections, "\n".join(objections)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dlse", [False, True], ids=["", "dlse"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", SEEING, ids=str)
def test_cases(backend: str, case: SliceCase, dtype: torch.dtype, dlse: bool) -> None:
    assert_right(backend, case, dtype, dlse)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", SEEING, ids=str)
def test_reference_in_full_precision(case: SliceCase, dtype: torch.dtype) -> None:
    assert_right("reference", case, dtype, dlse=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dlse", [False, True], ids=["", "dlse"])
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large(backend: str, case: SliceCase, dlse: bool) -> None:
    assert_right(backend, case, torch.bfloat16, dlse)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dlse", [False, True], ids=["", "dlse"])
@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("name", ["causal", "band", "documents", "gqa"])
def test_head_dims(backend: str, name: str, dims: tuple[int, int], dlse: bool) -> None:
    case = replace(BY_NAME[name], head_dim=dims[0], head_dim_v=dims[1])
    assert_right(backend, case, torch.bfloat16, dlse)


@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_head_dims_of_cudnn(dims: tuple[int, int]) -> None:
    case = SliceCase(
        "causal", "", 300, 300, ((0, 300, 0, 300, -INF, 0),), heads=4, kv_heads=2, head_dim=dims[0], head_dim_v=dims[1]
    )
    assert_right("sdpa", case, torch.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["causal", "band", "documents_window", "gqa"])
def test_softcap(backend: str, name: str) -> None:
    assert_right(backend, BY_NAME[name], torch.bfloat16, softcap=2.0)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "hopper"])
@pytest.mark.parametrize("scale", [0.0, -0.7])
@pytest.mark.parametrize("name", ["causal", "band", "documents_window", "gqa"])
def test_scales_that_are_not_positive(backend: str, name: str, scale: float) -> None:
    assert_right(backend, BY_NAME[name], torch.bfloat16, scale=scale)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [case for case in SEEING if len(case.slices) > 1], ids=str)
def test_continues_a_running_state(backend: str, case: SliceCase) -> None:
    inputs = make_slice_inputs(case, torch.bfloat16, dlse=True)
    kernel = kernel_for(backend, inputs, case.slices)
    judge = judge_of(case, torch.bfloat16, dlse=True)
    steps = [case.slices[n : n + 1] for n in range(len(case.slices))]
    objections = judge.objections(run_kernel(kernel, to_device(inputs, DEVICE), steps))
    assert not objections, "\n".join(objections)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [case for case in CASES if case not in SEEING], ids=str)
def test_nothing(backend: str, case: SliceCase) -> None:
    inputs = to_device(make_slice_inputs(case, torch.bfloat16, dlse=True), DEVICE)
    kernel = kernel_for(backend, inputs, case.slices)
    result = run_kernel(kernel, inputs, [case.slices])
    assert result.out.shape == inputs.dout.shape and not result.out.any() and bool(result.lse.isneginf().all())
    assert not any(bool(grad.any()) for grad in (result.dq, result.dk, result.dv))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["every third row", "heads first", "inside a wider dim"])
@pytest.mark.parametrize("case", [BY_NAME["gqa"], BY_NAME["documents_both_ways"], LARGE[0], LARGE[2], LARGE[8]], ids=str)
def test_strides(backend: str, case: SliceCase, how: str) -> None:
    plain = make_slice_inputs(case, torch.bfloat16)
    kernel = kernel_for(backend, plain, case.slices)
    x = to_device(plain, DEVICE)
    views = Inputs(*(spread(t, how) for t in (x.q, x.k, x.v)), None, spread(x.dout, how), None)
    objections = judge_of(case, torch.bfloat16).objections(run_kernel(kernel, views, [case.slices]))
    assert not objections, "\n".join(objections)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["gqa", "documents_apart", "prefix", "band"])
def test_in_place_state_and_added_gradients(backend: str, name: str) -> None:
    case = BY_NAME[name]
    cpu_inputs = make_slice_inputs(case, torch.bfloat16)
    kernel = kernel_for(backend, cpu_inputs, case.slices)
    x = to_device(cpu_inputs, DEVICE)
    exact = run_kernel(kernel, x, [case.slices])
    out = torch.full((case.batch, 2 * case.q_len, case.heads, case.head_dim_v), 7.0, device=DEVICE)
    lse = torch.full((case.batch, case.heads, 2 * case.q_len), 7.0, device=DEVICE)
    view = out[:, ::2], lse[:, :, ::2]
    view[0].zero_(), view[1].fill_(-torch.inf)
    scale = case.head_dim**-0.5
    kernel.forward(x.q, x.k, x.v, case.slices, scale=scale, carry=view, finish=False)
    torch.testing.assert_close(view[0], exact.out.float(), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(view[1], exact.lse, rtol=1e-4, atol=1e-4)
    assert bool((out[:, 1::2] == 7).all()) and bool((lse[:, :, 1::2] == 7).all())
    delta = (x.dout.float() * exact.out.float()).sum(-1).transpose(1, 2)
    buffers = [torch.full((t.shape[0], 2 * t.shape[1], *t.shape[2:]), 7.0, device=DEVICE) for t in (x.q, x.k, x.v)]
    dq, dk, dv = (b[:, 1::2] for b in buffers)
    kernel.backward(x.dout, x.q, x.k, x.v, exact.out, exact.lse, delta, case.slices, scale=scale, dq=dq, dk=dk, dv=dv)
    for buffer, grad, once in zip(buffers, (dq, dk, dv), (exact.dq, exact.dk, exact.dv), strict=True):
        torch.testing.assert_close(grad - 7, once.float(), rtol=3e-2, atol=3e-2)
        assert bool((buffer[:, ::2] == 7).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [LARGE[1], LARGE[5], LARGE[8], BY_NAME["gqa"]], ids=str)
def test_deterministic_gradients_repeat_bitwise(backend: str, case: SliceCase) -> None:
    inputs = make_slice_inputs(case, torch.bfloat16)
    kernel = kernel_for(backend, inputs, case.slices, deterministic=True)
    x = to_device(inputs, DEVICE)
    runs: list[Results] = [run_kernel(kernel, x, [case.slices], deterministic=True) for _ in range(3)]
    for run in runs[1:]:
        for name in ("out", "lse", "dq", "dk", "dv"):
            assert torch.equal(getattr(run, name), getattr(runs[0], name)), name


def test_cudnn_backward_with_other_layouts_of_out_and_dout() -> None:
    """The same q, k and v, out and dout in other strides: the cached plan must not misread them."""
    case = LARGE[1]
    inputs = make_slice_inputs(case, torch.bfloat16)
    kernel = kernel_for("sdpa", inputs, case.slices)
    x = to_device(inputs, DEVICE)
    exact = run_kernel(kernel, x, [case.slices])
    delta = (x.dout.float() * exact.out.float()).sum(-1).transpose(1, 2)
    for dout, out in ((spread(x.dout, "heads first"), exact.out), (x.dout, spread(exact.out, "heads first"))):
        grads = [torch.zeros(t.shape, device=DEVICE) for t in (x.q, x.k, x.v)]
        dq, dk, dv = grads
        args = (dout, x.q, x.k, x.v, out, exact.lse, delta, case.slices)
        kernel.backward(*args, scale=case.head_dim**-0.5, dq=dq, dk=dk, dv=dv)
        for got, wanted in zip(grads, (exact.dq, exact.dk, exact.dv), strict=True):
            torch.testing.assert_close(got, wanted.float(), rtol=2e-2, atol=2e-2)


def test_cudnn_is_used_where_it_is_there() -> None:
    """On Hopper and later, with the torch that this project needs, plain shapes are cuDNN's."""
    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("cuDNN is only preferred from compute capability 9 on")
    q, k = torch.empty(1, 1024, 16, 128, device=DEVICE, dtype=torch.bfloat16), torch.empty(1, 1024, 4, 128, device=DEVICE)
    shape = sdpa.Shape.of(q, k, k)
    assert sdpa._cudnn_wanted(shape, backward=False, deterministic=False)
    assert sdpa._cudnn_wanted(shape, backward=True, deterministic=False)
    assert not sdpa._cudnn_wanted(shape, backward=True, deterministic=True)


@pytest.mark.parametrize("backend", ["sdpa", "flash_attn", "hopper"])
@pytest.mark.parametrize("case", [LARGE[1], LARGE[5], LARGE[6], LARGE[8]], ids=str)
def test_never_waits_for_the_device(backend: str, case: SliceCase) -> None:
    """Once warm, a call only queues work: what overlaps with it may run on."""
    inputs = make_slice_inputs(case, torch.bfloat16)
    kernel = kernel_for(backend, inputs, case.slices)
    x = to_device(inputs, DEVICE)
    steps = [case.slices[n : n + 1] for n in range(len(case.slices))] if len(case.slices) < 4 else [case.slices]
    run_kernel(kernel, x, steps)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_kernel(kernel, x, steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("where", ["q", "k", "v", "dout"])
def test_reference_keeps_nan_where_it_is_seen(where: str) -> None:
    case = replace(BY_NAME["documents"], heads=1, kv_heads=1)
    inputs = make_slice_inputs(case, torch.float32)
    getattr(inputs, where)[0, 20, 0, 3] = torch.nan
    kernel = kernels.load("reference")
    assert kernel is not None
    here = run_kernel(kernel, inputs, [case.slices])
    there = run_kernel(kernel, to_device(inputs, DEVICE), [case.slices])
    for name in ("out", "lse", "dq", "dk", "dv"):
        assert torch.equal(getattr(there, name).cpu().isnan(), getattr(here, name).isnan()), name


@pytest.mark.parametrize("part_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [slice(None), slice(3, 200), slice(1, None, 2)], ids=["all", "some", "every second"])
def test_merge(part_dtype: torch.dtype, rows: slice) -> None:
    """The device's merge, with the library or without, is torch's on the CPU, views and empty rows included."""
    B, S, H, D = 2, 257, 3, 72
    generator = torch.Generator().manual_seed(0)
    out, part = (torch.randn(B, S, H, D, generator=generator) for _ in range(2))
    lse, lse_part = (torch.randn(B, H, S, generator=generator) * 30 for _ in range(2))
    lse[:, :, ::7], lse_part[:, :, ::5] = -torch.inf, -torch.inf
    out.masked_fill_(lse.isneginf().transpose(1, 2).unsqueeze(-1), 0.0)
    part = part.to(part_dtype)
    on_device = [x.to(DEVICE) for x in (out, lse, part, lse_part)]
    for merge, (o, s, p, t) in ((merge_torch_, (out, lse, part, lse_part)), (merge_, on_device)):
        merge(o[:, rows], s[:, :, rows], p[:, rows], t[:, :, rows])
    torch.testing.assert_close(on_device[0].cpu(), out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(on_device[1].cpu(), lse, rtol=1e-5, atol=1e-5)


def test_automatic_choice_is_a_fast_one() -> None:
    q = torch.empty(1, 8, 16, 128, device=DEVICE, dtype=torch.bfloat16)
    problem = Problem.of(q, q[:, :, :4], q[:, :, :4], needs_grad=True)
    assert kernels.choose("auto", problem).name in ("hopper", "flash_attn", "sdpa")
    assert kernels.choose("auto", replace(problem, dtype=torch.float32)).name == "reference"
