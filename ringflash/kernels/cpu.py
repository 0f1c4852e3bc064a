"""Attention on the CPU, on torch's own flash operator, with its traps closed.

``aten::_scaled_dot_product_flash_attention_for_cpu`` returns the log-sum-exp, takes any head dim, GQA, strides and lengths, and
its backward is exact when it is given the out and lse of the whole row. What it does not do, and what stands here instead:

- Sq = 0 or Sk = 0 ends the process: it is never called without rows, keys, heads or batch.
- A last dim that is not contiguous is read wrongly, without an error: such inputs are copied.
- Only full and causal (aligned at the first row and key): other Slices are cut, by `decompose` and into row blocks with an
  additive float mask (bool masks are refused). A row masked completely would get lse 0: every row of a Slice sees a key.
- lse -inf in backward makes every gradient NaN: rows without weight get +inf, so that exp(score - lse) = 0.
- head_dim_v must equal head_dim: the smaller one is padded with zeros.
- It computes delta = rowsum(dout * out) itself: any other delta is spelled as one more column of out (ones) and dout (delta),
  against a column of zeros in v. That leaves scores and dout.v as they were, so it is exact.
- bfloat16 and float16 return rounded partial results: such inputs are computed in float32.
- 0 * NaN: a NaN would reach rows that do not see it. Inputs with NaN or infinities go to `reference`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from ringflash.kernels import Extras, Problem, Settle, State, reference
from ringflash.kernels.decompose import (
    by_bounds,
    core,
    fulls_and_causal_squares,
    is_causal_square,
    is_full,
    lower_bound_matters,
    repeats,
    row_blocks,
)
from ringflash.kernels.running import Running, accumulate_dtype
from ringflash.slices import Slice, Slices

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

SMALL = 1 << 15
"""Scores of a rectangle below which one call with a mask beats several calls without: a call costs about 15 us."""

WIDE = 4096
"""Keys of a row block from which on its inside, which needs no mask, is a call of its own. Masks stay below 512 * 4608 floats."""

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _parts_of(s: Slice) -> Iterator[Slice]:
    """The Slice as disjoint ones that take one call each: full, causal squares, and small enough to be masked."""
    if is_full(s) or is_causal_square(s) or (s.q1 - s.q0) * (s.k1 - s.k0) <= SMALL:
        yield s
        return
    for piece in by_bounds(s):
        if is_full(piece):
            yield piece
        elif not lower_bound_matters(piece):
            yield from fulls_and_causal_squares(piece)
        else:
            for block in row_blocks(piece, _block_rows(piece)):
                yield from _inside_and_edges(block)


def _block_rows(s: Slice) -> int:
    """Rows of a block: few beside the band's width w, for a block of r rows spends r of every w + r scores on masked ones."""
    return min(512, max(64, (s.hi - s.lo + 1) // 4))


def _inside_and_edges(block: Slice) -> Iterator[Slice]:
    """A row block, or if it is wide the keys that all its rows see, those before and those after."""
    a, b = core(block)
    if b - a < WIDE:
        yield block
        return
    for k0, k1 in ((block.k0, a), (a, b), (b, block.k1)):
        if k1 > k0:
            yield from Slices.from_rows([(block.q0, block.q1, k0, k1, block.lo, block.hi)])


@lru_cache(maxsize=256)
def parts(s: Slice) -> tuple[Slice, ...]:
    return tuple(_parts_of(s))


@lru_cache(maxsize=8)
def _band_mask(rows: int, keys: int, lo: int, hi: int, dtype: torch.dtype) -> Tensor:
    """(rows, keys): 0 where lo <= j - i <= hi, else -inf. Row blocks of a band share one."""
    offset = torch.arange(keys) - torch.arange(rows)[:, None]
    visible = (offset >= lo) & (offset <= hi)
    return torch.zeros(rows, keys, dtype=dtype).masked_fill_(~visible, -torch.inf)


def _mask_arguments(s: Slice, dtype: torch.dtype) -> tuple[bool, Tensor | None]:
    """(is_causal, attn_mask) of the call for one part."""
    if is_full(s):
        return False, None
    if is_causal_square(s):
        return True, None
    shift = s.q0 - s.k0
    return False, _band_mask(s.q1 - s.q0, s.k1 - s.k0, s.lo + shift, s.hi + shift, dtype)


def _prepared(x_BSHD: Tensor, width: int) -> Tensor:
    """(B, S, H, D) -> (B, H, S, width) in the accumulate dtype, zeros behind, last dim contiguous; a view if nothing is to do."""
    x = x_BSHD.to(accumulate_dtype(x_BSHD.dtype)).transpose(1, 2)
    if x.shape[-1] < width:
        return F.pad(x, (0, width - x.shape[-1]))
    return x if x.stride(-1) == 1 else x.contiguous()


def _tiled(x_BHSD: Tensor, start: int, length: int, n: int) -> Tensor:
    """n pieces of ``length`` rows from ``start`` on, as a batch: (B, H, S, D) -> (B n, H, length, D)."""
    piece = x_BHSD[:, :, start : start + n * length]
    return piece if n == 1 else piece.unflatten(2, (n, length)).transpose(1, 2).flatten(0, 1)


def _untiled(x: Tensor, n: int) -> Tensor:
    """(B n, length, ...) -> (B, n length, ...)."""
    return x.reshape(-1, n * x.shape[1], *x.shape[2:])


def _at_origin(s: Slice) -> Slice:
    """The same Slice with its first row and key at 0."""
    shift = s.q0 - s.k0
    return Slice(0, s.q1 - s.q0, 0, s.k1 - s.k0, s.lo + shift, s.hi + shift)


class _Tiles:
    """q, k, v of one call, prepared for the operator; and of one run of equal Slices, as a batch of n."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, width: int) -> None:
        self.q, self.k, self.v = (_prepared(x, width) for x in (q, k, v))

    def of_run(self, s: Slice, n: int) -> tuple[Tensor, Tensor, Tensor]:
        rows, keys = s.q1 - s.q0, s.k1 - s.k0
        return _tiled(self.q, s.q0, rows, n), _tiled(self.k, s.k0, keys, n), _tiled(self.v, s.k0, keys, n)


class Cpu:
    """torch's flash operator for the CPU."""

    name = "cpu"
    extras = Extras(delta=True, settle_rows=1)

    def refuses(self, problem: Problem) -> str | None:
        if problem.device != "cpu":
            return f"needs CPU tensors, got {problem.device}"
        if problem.dtype not in DTYPES:
            return f"needs float64, float32, bfloat16 or float16, got {problem.dtype}"
        if problem.softcap:
            return "torch's operator has no softcap"
        return None

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slices: Slices,
        *,
        scale: float,
        softcap: float = 0.0,
        carry: State | None = None,
        finish: bool = True,
        settle: Settle | None = None,
    ) -> State:
        assert not softcap, "the cpu backend refuses softcap"
        state = Running.of(q, v, carry)
        if not (q.shape[0] and q.shape[2] and len(slices)):
            return state.result(finish, settle)
        if scale <= 0 or not reference.all_finite(q, k, v):  # torch multiplies its -inf of masked scores by the scale
            return reference.KERNEL.forward(q, k, v, slices, scale=scale, carry=carry, finish=finish, settle=settle)
        tiles = _Tiles(q, k, v, max(q.shape[3], v.shape[3]))
        for s, n in repeats(slices):
            q_run, k_run, v_run = tiles.of_run(s, n)
            # A single Slice goes straight into the state, a batch of them first into a state of its own.
            batch_state = None if n == 1 else Running((len(q_run), q_run.shape[2], q.shape[2], v.shape[3]), q_run.dtype, q.device)
            for part in parts(_at_origin(s)):
                rows, keys = slice(part.q0, part.q1), slice(part.k0, part.k1)
                is_causal, mask = _mask_arguments(part, q_run.dtype)
                out, lse = _forward(
                    q_run[:, :, rows], k_run[:, :, keys], v_run[:, :, keys], 0.0, is_causal, attn_mask=mask, scale=scale
                )
                out = out[..., : v.shape[3]].transpose(1, 2)
                if batch_state is None:
                    state.put(s.q0 + part.q0, s.q0 + part.q1, out, lse)
                else:
                    batch_state.put(part.q0, part.q1, out, lse)
            if batch_state is not None:
                out, lse = batch_state.result(finish=False)
                state.put(s.q0, s.q0 + n * (s.q1 - s.q0), _untiled(out, n), _untiled(lse.transpose(1, 2), n).transpose(1, 2))
        return state.result(finish, settle)

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor | None,
        lse: Tensor,
        delta: Tensor,
        slices: Slices,
        *,
        scale: float,
        softcap: float = 0.0,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        deterministic: bool = False,
    ) -> None:
        assert not softcap, "the cpu backend refuses softcap"
        if not (q.shape[0] and q.shape[2] and len(slices)):
            return
        if scale <= 0 or not (reference.all_finite(q, k, v, dout, delta) and bool(lse.amax() < torch.inf)):
            reference.KERNEL.backward(dout, q, k, v, out, lse, delta, slices, scale=scale, dq=dq, dk=dk, dv=dv)
            return
        if out is None:
            dout, out = _with_delta(dout, delta)
        width = max(q.shape[3], dout.shape[3])
        tiles = _Tiles(q, k, v, width)
        dout, out = _prepared(dout, width), _prepared(out, width)
        lse = lse.masked_fill(lse.isneginf(), torch.inf)
        for s, n in repeats(slices):
            q_run, k_run, v_run = tiles.of_run(s, n)
            dout_run, out_run, lse_run = (_tiled(x, s.q0, s.q1 - s.q0, n) for x in (dout, out, lse.unsqueeze(-1)))
            for part in parts(_at_origin(s)):
                rows, keys = slice(part.q0, part.q1), slice(part.k0, part.k1)
                is_causal, mask = _mask_arguments(part, q_run.dtype)
                dq_part, dk_part, dv_part = _backward(
                    dout_run[:, :, rows],
                    q_run[:, :, rows],
                    k_run[:, :, keys],
                    v_run[:, :, keys],
                    out_run[:, :, rows],
                    lse_run[:, :, rows].squeeze(-1),
                    0.0,
                    is_causal,
                    attn_mask=mask,
                    scale=scale,
                )
                _add(dq, s.q0, s.q1 - s.q0, n, rows, dq_part)
                _add(dk, s.k0, s.k1 - s.k0, n, keys, dk_part)
                _add(dv, s.k0, s.k1 - s.k0, n, keys, dv_part)


def _add(into: Tensor, start: int, length: int, n: int, rows: slice, part: Tensor) -> None:
    """Adds part (B n, H, rows, >= D) to those rows of each of the n pieces of into (B, S, H, D)."""
    pieces = into[:, start : start + n * length].unflatten(1, (n, length))
    pieces[:, :, rows] += part[..., : into.shape[3]].unflatten(0, (-1, n)).transpose(2, 3)


def _with_delta(dout: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """(dout', out') of head dim Dv + 1 with rowsum(dout' * out') = delta: dout beside delta, zeros beside ones."""
    acc = accumulate_dtype(dout.dtype)
    column = delta.transpose(1, 2).unsqueeze(-1)
    out = torch.zeros(*dout.shape[:3], dout.shape[3] + 1, dtype=acc, device=dout.device)
    out[..., -1] = 1.0
    return torch.cat([dout.to(acc), column.to(acc)], dim=-1), out


KERNEL = Cpu()
