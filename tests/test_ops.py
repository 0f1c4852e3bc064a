"""The device library, its C ABI, and the torch operators over it."""

from __future__ import annotations

import ctypes
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ringflash import ops

ROOT = Path(__file__).resolve().parent.parent
INF = float("inf")
NAN = float("nan")

Part = tuple[Tensor, Tensor]

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    lib = ops.library()
    if lib is None:
        pytest.skip("this installation has no device library (built without nvcc)")
    return lib


@dataclass(frozen=True)
class Case:
    """Shapes and memory layout of one merge."""

    B: int
    S: int
    H: int
    D: int
    part: torch.dtype
    pad_D: int = 0  # rows are this much longer in memory than D

    def __str__(self) -> str:
        return f"B{self.B}S{self.S}H{self.H}D{self.D}-{str(self.part)[6:]}-pad{self.pad_D}"

    def make(self, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Part, Part]:
        """Two partial results as strided views; about a third of the rows of each is empty (out 0, lse -inf)."""
        generator = torch.Generator().manual_seed(seed)

        def rows() -> Tensor:
            memory = torch.randn(self.B, self.H, self.S + 1, self.D + self.pad_D, generator=generator, dtype=torch.float64)
            return memory.transpose(1, 2)[:, : self.S, :, : self.D]

        def lse() -> Tensor:
            memory = torch.randn(self.B, self.S, self.H, generator=generator, dtype=torch.float64) * 20
            return memory.masked_fill(torch.rand(memory.shape, generator=generator) < 0.3, -INF).transpose(1, 2)

        def one(out_dtype: torch.dtype) -> Part:
            out, lse_BHS = rows(), lse()
            out.masked_fill_((lse_BHS == -INF).transpose(1, 2).unsqueeze(-1), 0.0)
            return _to(out, device, out_dtype), _to(lse_BHS, device, dtype)

        return one(dtype), one(self.part)


def _to(x: Tensor, device: str, dtype: torch.dtype) -> Tensor:
    """Converts the memory that ``x`` is a view of, and takes the same view of it."""
    memory = torch.as_strided(x, (x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
    return torch.as_strided(memory.to(device, dtype), x.shape, x.stride(), x.storage_offset())


CASES = [
    Case(2, 5, 3, 64, torch.bfloat16),  # 16-byte accesses
    Case(1, 257, 2, 128, torch.float16),  # rows end inside a block
    Case(1, 33, 4, 256, torch.float32),  # one row is a whole warp
    Case(2, 7, 1, 264, torch.bfloat16),  # longer than a warp's width
    Case(2, 5, 3, 40, torch.bfloat16),  # lanes of a row without work
    Case(2, 9, 3, 63, torch.float16),  # D not a multiple of the access width
    Case(1, 4, 2, 1, torch.float32),  # the shortest row
    Case(2, 6, 2, 64, torch.bfloat16, pad_D=4),  # rows not 16-byte aligned
    Case(2, 6, 2, 64, torch.float32, pad_D=8),  # strided and aligned
    Case(0, 5, 3, 64, torch.bfloat16),  # nothing to do
    Case(2, 0, 3, 64, torch.bfloat16),
    Case(2, 5, 0, 64, torch.bfloat16),
    Case(2, 5, 3, 0, torch.float32),  # only lse to merge
]
LARGE_CASES = [
    Case(65536 + 3, 1, 1, 8, torch.bfloat16),  # more batch entries than a grid's second axis holds
    Case(1, 4099, 16, 128, torch.bfloat16),
]


def oracle(running: Part, part: Part) -> Part:
    """The merge in float64: softmax of the two lse weighs the two out."""
    out, lse, out_part, lse_part = (x.double().cpu() for x in (*running, *part))
    both = torch.stack((lse, lse_part))
    weights = torch.softmax(both, 0).nan_to_num(0.0).transpose(2, 3).unsqueeze(-1)  # NaN: both sides empty
    return weights[0] * out + weights[1] * out_part, torch.logsumexp(both, 0)


def merge(running: Part, part: Part) -> Part:
    torch.ops.ringflash.merge_(*running, *part)
    return running


def assert_close_to_oracle(got: Part, want: Part) -> None:
    """float32 arithmetic: three roundings of out, and of lse one at the magnitude of lse and one at that of a sum in [1, 2]."""
    eps = torch.finfo(got[0].dtype).eps
    bounds = (8 * eps * want[0].abs().clamp_min(1.0), 4 * eps * want[1].abs().clamp_min(1.0))
    for name, x, y, bound in zip(("out", "lse"), got, want, bounds, strict=True):
        x = x.double().cpu()
        empty = y == -INF
        assert torch.equal(x == -INF, empty), name
        error = torch.where(empty, 0.0, (x - y).abs() - torch.where(empty, 0.0, bound))
        assert not error.isnan().any(), name
        assert error.numel() == 0 or error.max() <= 0, f"{name} is off by {error.max():.3g} more than rounding explains"


# ----------------------------------------------------------------------------------------------- the operator


@pytest.mark.parametrize("case", CASES, ids=str)
def test_merge_equals_the_oracle(case: Case) -> None:
    running, part = case.make()
    want = oracle(running, part)
    assert_close_to_oracle(merge(running, part), want)


@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_float64_state_keeps_float64_accuracy(case: Case) -> None:
    running, part = case.make(dtype=torch.float64)
    want = oracle(running, part)
    assert_close_to_oracle(merge(running, part), want)


def test_merging_parts_of_the_keys_is_attention_over_all_keys() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 40, 3, 8, dtype=torch.float64) for _ in range(3))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k).tril()  # later rows of the lower triangle see more
    scores.masked_fill_(torch.ones(40, 40, dtype=torch.bool).triu(1), -INF)

    def attention(keys: slice) -> Part:
        s = scores[..., keys]
        p = torch.softmax(s, -1).nan_to_num(0.0)
        return torch.einsum("bhqk,bkhd->bqhd", p, v[:, keys]), torch.logsumexp(s, -1)

    running = torch.zeros_like(q), torch.full((2, 3, 40), -INF, dtype=torch.float64)
    for first, last in ((30, 40), (0, 1), (1, 17), (17, 30)):
        merge(running, attention(slice(first, last)))
    for got, want in zip(running, attention(slice(0, 40)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_the_unit_changes_nothing_on_either_side(device: str = "cpu") -> None:
    case = Case(2, 9, 3, 64, torch.float32)
    state, _ = case.make(device)
    unit = torch.zeros_like(state[0]), torch.full_like(state[1], -INF)
    right = merge((state[0].clone(), state[1].clone()), unit)
    left = merge((unit[0].clone(), unit[1].clone()), state)
    for got in (right, left):
        assert torch.equal(got[0], state[0])
        assert torch.equal(got[1], state[1])


def test_extreme_lse_neither_overflows_nor_leaks_into_other_rows(device: str = "cpu") -> None:
    values = (3e38, -3e38, 1e4, -1e4, 88.8, -104.0, 0.0, -INF, INF, NAN)
    pairs = torch.tensor(list(itertools.product(values, repeat=2)), device=device)
    lse, lse_part = (pairs[:, i].reshape(1, 1, -1).clone() for i in (0, 1))
    rows = pairs.shape[0]
    out = torch.ones(1, rows, 1, 8, device=device).masked_fill_((lse == -INF).reshape(1, rows, 1, 1), 0.0)
    out_part = torch.full((1, rows, 1, 8), 3.0, device=device).masked_fill_((lse_part == -INF).reshape(1, rows, 1, 1), 0.0)
    want_out, want_lse = oracle((out, lse), (out_part, lse_part))
    merge((out, lse), (out_part, lse_part))
    finite = ~(pairs.isnan() | (pairs == INF)).any(1).cpu()
    poisoned = ~finite & (pairs[:, 1] != -INF).cpu()  # an empty part may leave the row as it was
    assert_close_to_oracle((out[:, finite], lse[..., finite]), (want_out[:, finite], want_lse[..., finite]))
    assert out[:, poisoned].isnan().all()
    assert not lse[..., ~finite].isfinite().any()


def test_dimensions_that_do_not_fit_are_named() -> None:
    (out, lse), (out_part, lse_part) = Case(2, 5, 3, 8, torch.bfloat16).make()
    op: Callable[..., None] = torch.ops.ringflash.merge_
    for arguments, message in [
        ((out[0], lse, out_part, lse_part), r"one shape \(B, S, H, D\)"),
        ((out, lse, out_part[:, :4], lse_part), r"one shape \(B, S, H, D\)"),
        ((out, lse.transpose(1, 2), out_part, lse_part), r"\(B, H, S\) = \(2, 3, 5\)"),
        ((out.bfloat16(), lse, out_part, lse_part), "out is torch.bfloat16"),
        ((out, lse.double(), out_part, lse_part), "lse torch.float64"),
        ((out, lse, out_part.int(), lse_part), "out_part is torch.int32"),
        ((out.transpose(1, 3).contiguous().transpose(1, 3), lse, out_part, lse_part), "last dim of out must be contiguous"),
    ]:
        with pytest.raises(ValueError, match=message):
            op(*arguments)


@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_opcheck(case: Case) -> None:
    running, part = case.make()
    torch.library.opcheck(torch.ops.ringflash.merge_.default, (*running, *part))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_break(dynamic: bool) -> None:
    def two_merges(out: Tensor, lse: Tensor, a: Tensor, lse_a: Tensor) -> Tensor:
        out, lse = out * 1.0, lse * 1.0
        torch.ops.ringflash.merge_(out, lse, a, lse_a)
        torch.ops.ringflash.merge_(out, lse, a * 2, lse_a + 1)
        return out * lse.transpose(1, 2).unsqueeze(-1)

    compiled = torch.compile(two_merges, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for case in (Case(2, 5, 3, 8, torch.bfloat16), Case(2, 6, 3, 8, torch.bfloat16)):
        running, part = case.make()
        assert torch.equal(compiled(*running, *part).nan_to_num(), two_merges(*running, *part).nan_to_num())


# ------------------------------------------------------------------------------------------------- the C ABI


def test_python_mirrors_the_headers() -> None:
    api, params = ((ROOT / "csrc" / name).read_text() for name in ("api.h", "params.h"))
    assert re.findall(r"RF_ABI_VERSION (\d+)", api) == [str(ops.ABI_VERSION)]
    assert re.findall(r"sizeof\(RfMergeParams\) == (\d+)", params) == [str(ctypes.sizeof(ops.MergeParams))]
    for dtype, code in ops.DTYPES.items():
        assert f"RF_{str(dtype)[6:].upper()} = {code}" in params


def test_a_library_of_another_version_is_refused(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "ABI_VERSION", ops.ABI_VERSION + 1)
    with pytest.raises(RuntimeError, match=f"has ABI version {ops.ABI_VERSION - 1}, this ringflash needs {ops.ABI_VERSION}"):
        ops.library.__wrapped__()


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"lse": None}, -1),
        ({"out_part": None}, -1),
        ({"seq": -1}, -2),
        ({"heads": -1}, -2),
        ({"seq": 1 << 30, "heads": 2}, -2),  # S * H must stay below 2^31
        ({"out_part_dtype": 17}, -3),
        ({"batch": 0, "lse": None}, 0),  # nothing to do, nothing to read
    ],
    ids=str,
)
def test_bad_arguments_give_an_error_code(library: ctypes.CDLL, changes: dict[str, int | None], code: int) -> None:
    fields = {"out": 16, "lse": 16, "out_part": 16, "lse_part": 16, "batch": 1, "seq": 4, "heads": 2, "head_dim": 8}
    params = ops.MergeParams(**{**fields, **changes})
    assert library.rf_merge(ctypes.byref(params), None) == code
    if code:
        with pytest.raises(RuntimeError, match=rf"rf_merge: .+ \(code {code}\)"):
            ops.check(library, "rf_merge", code)


def test_null_params_and_error_strings(library: ctypes.CDLL) -> None:
    assert library.rf_merge(None, None) == -1
    texts = [library.rf_error_string(code).decode() for code in (0, -1, -2, -3, -4, -5)]
    assert len(set(texts)) == len(texts)
    assert library.rf_error_string(-99) == b"unknown error"
    assert b"invalid argument" in library.rf_error_string(1)  # cudaErrorInvalidValue


# -------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("case", CASES + LARGE_CASES, ids=str)
def test_kernel_equals_the_oracle(case: Case, library: ctypes.CDLL) -> None:
    running, part = case.make("cuda")
    want = oracle(running, part)
    before = running[0].untyped_storage().nbytes()
    assert_close_to_oracle(merge(running, part), want)
    assert running[0].untyped_storage().nbytes() == before


@pytest.mark.gpu
@needs_gpu
def test_kernel_leaves_memory_between_rows_alone(library: ctypes.CDLL) -> None:
    case = Case(2, 6, 2, 64, torch.bfloat16, pad_D=8)
    running, part = case.make("cuda")
    memory = torch.as_strided(running[0], (running[0].untyped_storage().nbytes() // 4,), (1,), 0)
    before = memory.clone()
    inside = torch.zeros_like(memory, dtype=torch.bool)
    torch.as_strided(inside, running[0].shape, running[0].stride(), running[0].storage_offset()).fill_(True)
    merge(running, part)
    assert torch.equal(memory[~inside], before[~inside])
    assert not torch.equal(memory[inside], before[inside])


@pytest.mark.gpu
@needs_gpu
def test_kernel_laws_and_extremes(library: ctypes.CDLL) -> None:
    test_the_unit_changes_nothing_on_either_side("cuda")
    test_extreme_lse_neither_overflows_nor_leaks_into_other_rows("cuda")


@pytest.mark.gpu
@needs_gpu
def test_kernel_runs_on_the_current_stream_and_in_a_graph(library: ctypes.CDLL) -> None:
    case = Case(1, 512, 8, 128, torch.bfloat16)
    running, part = case.make("cuda")
    want = oracle(oracle(running, part), part)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # capture fails if anything synchronises or runs on another stream
        merge(running, part)
    graph.replay()
    graph.replay()
    assert_close_to_oracle(running, want)


@pytest.mark.gpu
@needs_gpu
def test_kernel_opcheck(library: ctypes.CDLL) -> None:
    running, part = CASES[0].make("cuda")
    torch.library.opcheck(torch.ops.ringflash.merge_.default, (*running, *part))


@pytest.mark.multigpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_kernel_runs_on_the_tensors_device(library: ctypes.CDLL) -> None:
    running, part = CASES[1].make("cuda:1")
    want = oracle(running, part)
    with torch.cuda.device(0):
        merge(running, part)
    torch.cuda.synchronize(1)
    assert_close_to_oracle(running, want)
