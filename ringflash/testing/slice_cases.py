"""Cases for kernels: one table of Slices each, with sizes on the edges where kernels go wrong, and how to run a kernel on one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ringflash.kernels import Kernel
from ringflash.slices import UNBOUNDED, Slices
from ringflash.testing.oracle import Inputs, Results

Row = tuple[int, int, int, int, int, int]

INF = UNBOUNDED


@dataclass(frozen=True)
class SliceCase:
    """One kernel call: raw rows (q0, q1, k0, k1, lo, hi), and shapes."""

    name: str
    reason: str
    q_len: int
    k_len: int
    rows: tuple[Row, ...]
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 16
    head_dim_v: int = 16

    @property
    def slices(self) -> Slices:
        return Slices.from_rows(self.rows)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class BandCase:
    """A mask on buffers of these lengths, and why it is here; for kernels whose head dims are a test's own choice."""

    why: str
    B: int
    Sq: int
    Sk: int
    H: int
    Hkv: int
    rows: Sequence[Row]

    @property
    def slices(self) -> Slices:
        return Slices.from_rows(self.rows)

    def visible(self, device: torch.device | str) -> Tensor:
        """(Sq, Sk) bool."""
        return visible(self.slices, self.Sq, self.Sk, device)


def causal(q_len: int, k_len: int | None = None, *, window: int | None = None) -> tuple[Row, ...]:
    """One band, aligned at the end of the keys."""
    k_len = q_len if k_len is None else k_len
    return ((0, q_len, 0, k_len, -INF if window is None else k_len - q_len + 1 - window, k_len - q_len),)


def documents(lengths: Sequence[int], *, lo: int = -INF, hi: int = 0, gap: int = 0) -> tuple[Row, ...]:
    """One band per document of a packed sequence, ``gap`` rows and keys apart."""
    rows, start = [], 0
    for n in lengths:
        rows.append((start, start + n, start, start + n, lo, hi))
        start += n + gap
    return tuple(rows)


CASES = [
    SliceCase("full", "the plain rectangle", 33, 47, ((0, 33, 0, 47, -INF, INF),)),
    SliceCase("causal", "the plain square", 40, 40, ((0, 40, 0, 40, -INF, 0),)),
    SliceCase("causal_more_keys", "aligned at the end: a rectangle, then a square", 20, 45, ((0, 20, 0, 45, -INF, 25),)),
    SliceCase("causal_more_rows", "first rows see nothing, tightening drops them", 45, 20, ((0, 45, 0, 20, -INF, -25),)),
    SliceCase("causal_full_below", "a square, then rows that see all", 60, 17, ((0, 60, 0, 17, -INF, 0),)),
    SliceCase("causal_strict", "the diagonal is not seen", 24, 24, ((0, 24, 0, 24, -INF, -1),)),
    SliceCase("causal_one_over", "one key beyond the diagonal", 24, 24, ((0, 24, 0, 24, -INF, 1),)),
    SliceCase("window", "causal with a window", 50, 50, ((0, 50, 0, 50, -6, 0),)),
    SliceCase("window_one", "the window is the diagonal", 19, 19, ((0, 19, 0, 19, 0, 0),)),
    SliceCase("window_all_but_one", "only the corner is cut off", 30, 30, ((0, 30, 0, 30, -28, 0),)),
    SliceCase("band", "two-sided", 50, 50, ((0, 50, 0, 50, -5, 7),)),
    SliceCase("band_behind", "two-sided, all of it before the diagonal", 50, 50, ((0, 50, 0, 50, -20, -9),)),
    SliceCase("band_ahead", "two-sided, all of it after the diagonal", 50, 50, ((0, 50, 0, 50, 9, 20),)),
    SliceCase("band_tall", "more than twice as many rows as keys, both bounds matter", 70, 20, ((0, 70, 0, 20, -60, 9),)),
    SliceCase("band_wide", "more than twice as many keys as rows, both bounds matter", 20, 70, ((0, 20, 0, 70, 3, 60),)),
    SliceCase("lower", "only a lower bound", 37, 37, ((0, 37, 0, 37, 0, INF),)),
    SliceCase("lower_tall", "full rows above, a lower bound below", 64, 20, ((0, 64, 0, 20, -50, INF),)),
    SliceCase("lower_wide", "only a lower bound, more keys", 20, 64, ((0, 20, 0, 64, 4, INF),)),
    SliceCase("one_row", "a single query", 1, 30, ((0, 1, 0, 30, -INF, 20),)),
    SliceCase("one_row_gqa", "libraries take it for a decoding step", 1, 30, ((0, 1, 0, 30, -INF, INF),), heads=4),
    SliceCase("one_key", "a single key", 30, 1, ((0, 30, 0, 1, -INF, INF),)),
    SliceCase("one_pair", "a single score", 1, 1, ((0, 1, 0, 1, -INF, INF),)),
    SliceCase("none", "no Slices at all", 7, 9, ()),
    SliceCase("holes", "rows and keys that nobody sees", 40, 40, ((3, 11, 5, 9, -INF, INF), (20, 31, 20, 39, -INF, 4))),
    SliceCase("documents", "packed, of all lengths, one of them a single token", 64, 64, documents((13, 1, 30, 2, 18))),
    SliceCase("documents_both_ways", "packed, not causal", 64, 64, documents((13, 1, 30, 2, 18), hi=INF), batch=2),
    SliceCase("documents_window", "longer than some, shorter than others", 64, 64, documents((13, 1, 30, 2, 18), lo=-7)),
    SliceCase("documents_apart", "packed with unseen rows and keys between", 70, 70, documents((9, 20, 3, 11), gap=4), batch=2),
    SliceCase(
        "documents_cut",
        "the first document began before these rows, the last goes on behind these keys",
        40,
        40,
        ((0, 10, 0, 22, -INF, 12), (10, 25, 22, 37, -INF, 12), (25, 40, 37, 40, -INF, 12)),
    ),
    SliceCase(
        "documents_of_one_row",
        "many single queries, each with keys of its own",
        4,
        20,
        tuple((n, n + 1, 5 * n, 5 * n + 5 - n, -INF, INF) for n in range(4)),
        heads=4,
    ),
    SliceCase(
        "full_tall_and_lower",
        "a full Slice of many rows must not share a call with a bounded one",
        33,
        6,
        ((0, 30, 0, 2, -INF, INF), (30, 33, 2, 6, -28, INF)),
    ),
    SliceCase("chunks", "equal squares, one after another", 48, 48, documents((8,) * 6, hi=INF), batch=2),
    SliceCase("chunks_causal", "equal causal squares", 48, 48, documents((8,) * 6)),
    SliceCase(
        "chunks_more_keys",
        "equal Slices of more keys than rows",
        24,
        48,
        tuple((4 * i, 4 * i + 4, 8 * i, 8 * i + 8, -INF, 4 * i + 4) for i in range(6)),
    ),
    SliceCase("chunks_window", "equal bands", 60, 60, documents((12,) * 5, lo=-3, hi=2), batch=2),
    SliceCase("prefix", "Slices that share rows", 30, 30, ((0, 30, 0, 8, -INF, INF), (0, 30, 8, 30, -INF, 0))),
    SliceCase(
        "zigzag",
        "two chunks from both ends of the sequence: the rows of the second see all of the first",
        32,
        32,
        ((0, 16, 0, 16, -INF, 0), (16, 32, 0, 16, -INF, INF), (16, 32, 16, 32, -INF, 0)),
    ),
    SliceCase(
        "blocks",
        "a block map: Slices that share rows, and keys",
        48,
        48,
        tuple((12 * i, 12 * i + 12, 12 * j, 12 * j + 12, -INF, INF) for i, j in ((0, 0), (0, 2), (1, 2), (2, 0), (2, 1), (2, 3))),
    ),
    SliceCase("gqa", "several query heads per key head", 24, 31, ((0, 24, 0, 31, -INF, 7),), batch=2, heads=6, kv_heads=2),
    SliceCase("mqa", "one key head", 24, 31, ((0, 24, 0, 31, -9, 12),), heads=5, kv_heads=1),
    SliceCase("odd_dim", "no multiple of anything", 24, 31, ((0, 24, 0, 31, -INF, 7),), head_dim=37, head_dim_v=37),
    SliceCase("narrow_v", "Dv < D", 24, 31, ((0, 24, 0, 31, -INF, 7),), head_dim=24, head_dim_v=8),
    SliceCase("wide_v", "Dv > D, no multiple of 8", 24, 31, ((0, 24, 0, 31, -4, 7),), head_dim=8, head_dim_v=21),
    SliceCase("no_rows", "an empty query chunk", 0, 9, ()),
    SliceCase("no_keys", "an empty key chunk", 9, 0, ()),
    SliceCase("no_heads", "a rank without heads", 9, 9, ((0, 9, 0, 9, -INF, 0),), heads=0, kv_heads=1),
]  # fmt: skip


def visible(slices: Slices, q_len: int, k_len: int, device: torch.device | str = "cpu") -> Tensor:
    """(q_len, k_len) bool, straight from the definition of a Slice. AssertionError if two Slices show the same score."""
    count = torch.zeros(q_len, k_len, dtype=torch.int64, device=device)
    i, j = torch.arange(q_len, device=device)[:, None], torch.arange(k_len, device=device)
    for s in slices:
        count += (i >= s.q0) & (i < s.q1) & (j >= s.k0) & (j < s.k1) & (j - i >= s.lo) & (j - i <= s.hi)
    assert count.numel() == 0 or count.max() <= 1, "Slices must be disjoint"
    return count.bool()


def make_slice_inputs(case: SliceCase, dtype: torch.dtype, *, dlse: bool = False, seed: int = 0) -> Inputs:
    """Normally distributed tensors of the case."""
    generator = torch.Generator().manual_seed(seed)
    acc = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    B, H, Hkv = case.batch, case.heads, case.kv_heads
    return Inputs(
        q=normal(B, case.q_len, H, case.head_dim),
        k=normal(B, case.k_len, Hkv, case.head_dim),
        v=normal(B, case.k_len, Hkv, case.head_dim_v),
        sinks=None,
        dout=normal(B, case.q_len, H, case.head_dim_v),
        dlse=normal(B, H, case.q_len, dtype=acc) if dlse else None,
    )


def to_device(inputs: Inputs, device: torch.device | str) -> Inputs:
    moved = {name: x.to(device) for name in ("q", "k", "v", "dout", "dlse") if (x := getattr(inputs, name)) is not None}
    return replace(inputs, **moved)


def run_kernel(
    kernel: Kernel,
    inputs: Inputs,
    steps: Sequence[Slices],
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    deterministic: bool = False,
) -> Results:
    """Forward over the steps, each continuing the last, then backward over the same; results in the dtypes that a caller gets."""
    q, k, v, dout = inputs.q, inputs.k, inputs.v, inputs.dout
    scale = q.shape[3] ** -0.5 if scale is None else scale
    state: tuple[Tensor, Tensor] | None = None
    for n, slices in enumerate(steps):
        state = kernel.forward(q, k, v, slices, scale=scale, softcap=softcap, carry=state, finish=n == len(steps) - 1)
    assert state is not None
    out, lse = state
    delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1).transpose(1, 2)
    if inputs.dlse is not None:
        delta = delta - inputs.dlse
    dq, dk, dv = (torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (q, k, v))
    given = out if inputs.dlse is None else None
    backward = partial(kernel.backward, scale=scale, softcap=softcap, deterministic=deterministic, dq=dq, dk=dk, dv=dv)
    for slices in steps:
        backward(dout, q, k, v, given, lse, delta, slices)
    return Results(out, lse, dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None)
