"""Attention over Slices as plain tensor arithmetic: any device, any floating dtype, any head dims, softcap.

Slow and simple, in tiles, so that memory stays linear in the sequence. It is the meaning of a Slice for inputs of every kind,
NaN and infinities included: key j reaches exactly the rows that see j. Everything is computed in the accumulate dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ringflash.kernels import Extras, Problem, Settle, State
from ringflash.kernels.running import Running, accumulate_dtype
from ringflash.slices import Slice, Slices

ROWS, KEYS = 512, 1024
"""Tile size. One tile of scores of 32 heads in float32 takes 64 MiB."""


def all_finite(*tensors: Tensor) -> bool:
    """Whether no tensor holds a NaN or an infinity. May say no where finite values overflow when summed.

    One sum per tensor, the cheapest pass that NaN and infinities cannot hide from. On a GPU it waits for the device.
    """
    return all(bool(x.sum(dtype=accumulate_dtype(x.dtype)).isfinite()) for x in tensors)


class Tile(NamedTuple):
    """Rows [q0, q1) by keys [k0, k1), and which scores are visible: (q1 - q0, k1 - k0) bool, None if all."""

    q0: int
    q1: int
    k0: int
    k1: int
    visible: Tensor | None


def _key_tiles(s: Slice, q0: int, q1: int, device: torch.device) -> Iterator[Tile]:
    """The key tiles that rows [q0, q1) of a Slice need."""
    first, last = max(s.k0, q0 + s.lo), min(s.k1, q1 + s.hi)
    for k0 in range(first, last, KEYS):
        k1 = min(k0 + KEYS, last)
        visible = None
        if k0 - (q1 - 1) < s.lo or k1 - 1 - q0 > s.hi:
            offset = torch.arange(k0, k1, device=device) - torch.arange(q0, q1, device=device)[:, None]
            visible = (offset >= s.lo) & (offset <= s.hi)
        yield Tile(q0, q1, k0, k1, visible)


class _Heads:
    """Tensors cut into tiles with the query heads of one key head stacked as further rows: (B Hkv, rows, D)."""

    def __init__(self, q: Tensor, k: Tensor) -> None:
        self.batch, self.kv_heads = q.shape[0], k.shape[2]
        self.group = q.shape[2] // self.kv_heads
        self.acc = accumulate_dtype(q.dtype)

    def rows(self, x_BSHD: Tensor, q0: int, q1: int) -> Tensor:
        """(B, S, H, D) -> (B Hkv, G (q1 - q0), D)."""
        tile = x_BSHD[:, q0:q1].to(self.acc).transpose(1, 2)
        return tile.reshape(self.batch * self.kv_heads, self.group * (q1 - q0), x_BSHD.shape[3])

    def keys(self, x_BSHD: Tensor, k0: int, k1: int) -> Tensor:
        """(B, S, Hkv, D) -> (B Hkv, k1 - k0, D)."""
        return x_BSHD[:, k0:k1].to(self.acc).transpose(1, 2).reshape(self.batch * self.kv_heads, k1 - k0, x_BSHD.shape[3])

    def row_values(self, x_BHS: Tensor, q0: int, q1: int) -> Tensor:
        """(B, H, S) -> (B Hkv, G (q1 - q0), 1)."""
        return x_BHS[:, :, q0:q1].to(self.acc).reshape(self.batch * self.kv_heads, self.group * (q1 - q0), 1)

    def visible(self, tile: Tile) -> Tensor | None:
        """(G (q1 - q0), k1 - k0) bool, None if all."""
        return None if tile.visible is None else tile.visible.repeat(self.group, 1)

    def rows_back(self, x: Tensor) -> Tensor:
        """(B Hkv, G n, D) -> (B, n, H, D)."""
        return x.reshape(self.batch, self.kv_heads * self.group, -1, x.shape[-1]).transpose(1, 2)

    def keys_back(self, x: Tensor) -> Tensor:
        """(B Hkv, n, D) -> (B, n, Hkv, D)."""
        return x.reshape(self.batch, self.kv_heads, -1, x.shape[-1]).transpose(1, 2)


def _scores(q: Tensor, k: Tensor, scale: float, softcap: float) -> Tensor:
    """(X, rows, keys)"""
    scores = torch.bmm(q, k.transpose(1, 2)).mul_(scale)
    return scores.div_(softcap).tanh_().mul_(softcap) if softcap else scores


def _product(weights: Tensor, x: Tensor, visible: Tensor | None, finite: bool) -> Tensor:
    """``weights @ x`` over the visible pairs only: weights (X, n, m) are 0 at invisible pairs, x is (X, m, d).

    If x holds NaN or infinities, 0 * NaN would carry them to rows that do not see them. The few rows of x that do are
    therefore added one by one, to the rows that see them.
    """
    if finite or visible is None:
        return torch.bmm(weights, x)
    bad = ~x.isfinite().all(-1).all(0)  # (m,)
    product = torch.bmm(weights, x.masked_fill(bad[:, None], 0.0))
    for j in bad.nonzero().flatten().tolist():
        product += (weights[:, :, j, None] * x[:, j, None, :]).masked_fill(~visible[:, j, None], 0.0)
    return product


@dataclass(frozen=True)
class _Attention:
    """The inputs of one call, in tiles."""

    heads: _Heads
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    softcap: float

    def forward_rows(self, s: Slice, q0: int, q1: int, finite: bool) -> State:
        """(out, lse) of rows [q0, q1) of one Slice: the online softmax over its key tiles. finite: v holds no NaN or infinity."""
        q_tile = self.heads.rows(self.q, q0, q1)
        highest = q_tile.new_full((*q_tile.shape[:2], 1), -torch.inf)
        total = torch.zeros_like(highest)
        out = q_tile.new_zeros((*q_tile.shape[:2], self.v.shape[3]))
        for tile in _key_tiles(s, q0, q1, self.q.device):
            visible = self.heads.visible(tile)
            scores = _scores(q_tile, self.heads.keys(self.k, tile.k0, tile.k1), self.scale, self.softcap)
            if visible is not None:
                scores.masked_fill_(~visible, -torch.inf)
            before, highest = highest, torch.maximum(highest, scores.amax(-1, keepdim=True))
            shift = highest.masked_fill(highest.isneginf(), 0.0)  # rows that saw only -inf so far: exp(-inf - 0), not NaN
            weights = scores.sub_(shift).exp_()
            keep = (before - shift).exp_()
            total = total * keep + weights.sum(-1, keepdim=True)
            out = out * keep + _product(weights, self.heads.keys(self.v, tile.k0, tile.k1), visible, finite)
        lse = total.log() + highest.masked_fill(highest.isneginf(), 0.0)
        out = self.heads.rows_back(out / total.masked_fill(total == 0, 1.0))
        return out, self.heads.rows_back(lse).squeeze(-1).transpose(1, 2)

    def backward_rows(self, s: Slice, q0: int, q1: int, finite: bool, into: _Gradients) -> None:
        """Adds the gradients of rows [q0, q1) of one Slice. finite: q, k and dout hold no NaN or infinity."""
        q_tile, dout_tile = self.heads.rows(self.q, q0, q1), self.heads.rows(into.dout, q0, q1)
        lse_rows, delta_rows = self.heads.row_values(into.lse, q0, q1), self.heads.row_values(into.delta, q0, q1)
        lse_rows = lse_rows.masked_fill(lse_rows.isneginf(), torch.inf)  # a row without weight: exp(score - inf) = 0
        dq_tile = torch.zeros_like(q_tile)
        for tile in _key_tiles(s, q0, q1, self.q.device):
            visible = self.heads.visible(tile)
            k_tile, v_tile = (self.heads.keys(x, tile.k0, tile.k1) for x in (self.k, self.v))
            scores = _scores(q_tile, k_tile, self.scale, self.softcap)
            weights = (scores - lse_rows).exp_()
            dscores = weights * (torch.bmm(dout_tile, v_tile.transpose(1, 2)) - delta_rows)
            if self.softcap:
                dscores.mul_(1 - (scores / self.softcap).square_())
            if visible is not None:
                weights.masked_fill_(~visible, 0.0)
                dscores.masked_fill_(~visible, 0.0)
            dscores.mul_(self.scale)
            seen_by = None if visible is None else visible.T
            dq_tile += _product(dscores, k_tile, visible, finite)
            into.dk[:, tile.k0 : tile.k1] += self.heads.keys_back(_product(dscores.transpose(1, 2), q_tile, seen_by, finite))
            into.dv[:, tile.k0 : tile.k1] += self.heads.keys_back(_product(weights.transpose(1, 2), dout_tile, seen_by, finite))
        into.dq[:, q0:q1] += self.heads.rows_back(dq_tile)


@dataclass(frozen=True)
class _Gradients:
    """What comes into a backward call, and the accumulators that its result is added to."""

    dout: Tensor
    lse: Tensor
    delta: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def _row_tiles(slices: Slices) -> Iterator[tuple[Slice, int, int]]:
    for s in slices:
        for q0 in range(s.q0, s.q1, ROWS):
            yield s, q0, min(q0 + ROWS, s.q1)


def _from_sinks(q: Tensor, v: Tensor, sinks: Tensor) -> State:
    """The running state of rows that have seen their heads' sinks alone."""
    out = torch.zeros((*q.shape[:3], v.shape[3]), dtype=accumulate_dtype(q.dtype), device=q.device)
    return out, sinks.to(out.dtype)[None, :, None].expand(q.shape[0], -1, q.shape[1]).clone()


class Reference:
    """Any problem, slowly."""

    name = "reference"
    extras = Extras(delta=True, sinks=True, settle_rows=1)

    def refuses(self, problem: Problem) -> str | None:
        if not problem.dtype.is_floating_point:
            return f"needs a floating dtype, got {problem.dtype}"
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
        sinks: Tensor | None = None,
    ) -> State:
        assert sinks is None or carry is None, "sinks are part of the running state already"
        state = Running.of(q, v, carry if sinks is None else _from_sinks(q, v, sinks))
        if q.shape[0] and q.shape[2] and len(slices):
            attention, finite = _Attention(_Heads(q, k), q, k, v, scale, softcap), all_finite(v)
            for s, q0, q1 in _row_tiles(slices):
                state.put(q0, q1, *attention.forward_rows(s, q0, q1, finite))
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
        if q.shape[0] and q.shape[2] and len(slices):
            attention, finite = _Attention(_Heads(q, k), q, k, v, scale, softcap), all_finite(q, k, dout)
            into = _Gradients(dout, lse, delta, dq, dk, dv)
            for s, q0, q1 in _row_tiles(slices):
                attention.backward_rows(s, q0, q1, finite, into)


KERNEL = Reference()
