"""Masks: who may see whom, in global positions.

Query ``i`` of ``Sq`` sits at position ``i + Sk - Sq``, key ``j`` at position ``j``: with ``Sq != Sk`` the queries are the last
ones, as in flash-attn. Every mask knows its own oracle, ``visible(q_pos, k_pos)``, and its *bands*: the same set as disjoint
rectangles of positions with bounds on ``k - q`` (see ``slices.py``), which is all that planner and kernels ever look at.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ringflash.slices import UNBOUNDED, IntArray, tighten

Span = tuple[int, int]
"""A half-open range of positions."""


LARGEST = 1 << 40
"""Sizes and bounds above this mean the same: no sequence is that long."""


@dataclass(frozen=True)
class Bands:
    """A mask as disjoint bands of positions: ``rows`` (n, 6) with columns q0, q1, k0, k1, lo, hi.

    ``q`` in ``[q0, q1)`` sees ``k`` in ``[k0, k1)`` iff ``lo <= k - q <= hi`` and ``(k - q) % modulus == 0``.
    """

    rows: IntArray
    modulus: int = 1


class Mask(ABC):
    """Base of all masks; build one with the constructors below and combine them with ``&``. Hashable and comparable."""

    @staticmethod
    def full() -> Mask:
        """Everybody sees everybody."""
        return Window(None, None)

    @staticmethod
    def causal(window: int | None = None) -> Mask:
        """``0 <= q - k`` and, with a window of W tokens (counting the query itself), ``q - k < W``."""
        if window is not None:
            window = _integer("window", window, at_least=1, advice="it counts the query itself, so 1 sees only itself")
        return Causal(window)

    @staticmethod
    def window(left: int | None, right: int | None) -> Mask:
        """``q - left <= k <= q + right``; None is unbounded (flash-attn's ``window_size`` with -1)."""
        advice = "use None for an unbounded side"
        return Window(
            None if left is None else _integer("left", left, advice=advice),
            None if right is None else _integer("right", right, advice=advice),
        )

    @staticmethod
    def documents(lengths: Sequence[int] | Tensor | np.ndarray[Any, Any], causal: bool = True, window: int | None = None) -> Mask:
        """Packed documents of the given lengths (zeros allowed): only the own document, and the causal/window rule inside it.

        With ``causal=False`` a window W sees ``abs(q - k) < W``.
        """
        raw = np.asarray(lengths.detach().cpu() if isinstance(lengths, Tensor) else lengths)
        if raw.ndim != 1 or (raw.size and not np.issubdtype(raw.dtype, np.integer)):
            raise ValueError(f"document lengths must be a flat list of integers, got {_short(lengths)}")
        if (raw < 0).any():
            raise ValueError(f"document lengths must not be negative, got {int(raw.min())} at index {int(raw.argmin())}")
        if window is not None:
            window = _integer("window", window, at_least=1, advice="it counts the query itself, so 1 sees only itself")
        return Documents(tuple(int(n) for n in raw), bool(causal), window)

    @staticmethod
    def prefix(n: int) -> Mask:
        """Prefix-LM: the first ``n`` keys are visible to all, the rest causally."""
        return Prefix(_integer("prefix length", n))

    @staticmethod
    def chunked(size: int) -> Mask:
        """Only the own chunk of ``size`` positions: ``q // size == k // size``."""
        return Chunked(_integer("chunk size", size, at_least=1))

    @staticmethod
    def blocks(map: Sequence[Sequence[bool]] | Tensor | np.ndarray[Any, Any], block_size: int) -> Mask:
        """``map[q // block_size, k // block_size]`` of a bool matrix."""
        raw = np.asarray(map.detach().cpu() if isinstance(map, Tensor) else map)
        if raw.ndim != 2 or raw.dtype != np.bool_:
            raise ValueError(
                f"a block map must be a 2-D bool matrix, got shape {raw.shape} of {raw.dtype}; convert it with .bool()"
            )
        return Blocks(
            raw.shape[0], raw.shape[1], np.ascontiguousarray(raw).tobytes(), _integer("block_size", block_size, at_least=1)
        )

    @staticmethod
    def dilated(stride: int, window: int | None = None) -> Mask:
        """Every ``stride``-th position: ``(q - k) % stride == 0`` and, with a window W, ``abs(q - k) < W * stride``."""
        if window is not None:
            window = _integer("window", window, at_least=1, advice="it counts the query itself, so 1 sees only itself")
        return Dilated(_integer("stride", stride, at_least=1), window)

    def __and__(self, other: Mask) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        return Intersection((*self.parts(), *other.parts()))

    def parts(self) -> tuple[Mask, ...]:
        """The masks of which this one is the intersection: itself, unless made by ``&``."""
        return (self,)

    def check(self, q_len: int, k_len: int) -> None:
        """Raises ValueError when the mask cannot be meant for these sequence lengths."""

    def visible(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        """The oracle: bool (len(q_pos), len(k_pos)) for 1-D integer tensors of global positions."""
        return self._visible(q_pos[:, None], k_pos[None, :]).expand(len(q_pos), len(k_pos))

    def digest(self) -> str:
        """Eight hex digits that tell masks apart across processes."""

        facts = [(type(part).__name__, *(getattr(part, f.name) for f in fields(part) if f.compare)) for part in self.parts()]  # type: ignore[arg-type]
        return hashlib.sha1(repr(facts).encode()).hexdigest()[:8]

    @abstractmethod
    def _visible(self, q: Tensor, k: Tensor) -> Tensor:
        """The formula, on broadcastable integer tensors."""

    @abstractmethod
    def _bands(self, q: Span, k: Span) -> Bands:
        """Bands that cover the given spans (and may reach beyond them)."""

    def bands(self, q: Span, k: Span) -> Bands:
        """The mask inside the given spans of positions, as disjoint, tight, non-empty bands sorted by q0."""
        found = self._bands(q, k)
        rows = found.rows.copy()
        rows[:, 0], rows[:, 1] = np.maximum(rows[:, 0], q[0]), np.minimum(rows[:, 1], q[1])
        rows[:, 2], rows[:, 3] = np.maximum(rows[:, 2], k[0]), np.minimum(rows[:, 3], k[1])
        rows, _ = tighten(rows)
        return Bands(rows[np.lexsort((rows[:, 2], rows[:, 0]))], found.modulus)


@dataclass(frozen=True)
class Window(Mask):
    left: int | None
    right: int | None

    def _visible(self, q: Tensor, k: Tensor) -> Tensor:
        seen = (q == q) & (k == k)
        if self.left is not None:
            seen = seen & (k >= q - self.left)
        if self.right is not None:
            seen = seen & (k <= q + self.right)
        return seen

    def _bands(self, q: Span, k: Span) -> Bands:
        return _one_band(-_or_unbounded(self.left), _or_unbounded(self.right))


@dataclass(frozen=True)
class Causal(Mask):
    size: int | None

    def _visible(self, q: Tensor, k: Tensor) -> Tensor:
        seen = k <= q
        return seen if self.size is None else seen & (q - k < self.size)

    def _bands(self, q: Span, k: Span) -> Bands:
        return _one_band(-UNBOUNDED if self.size is None else 1 - self.size, 0)


@dataclass(frozen=True)
class Documents(Mask):
    lengths: tuple[int, ...] = field(repr=False)
    is_causal: bool  # not "causal": the constructor of that name would become its default
    size: int | None
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.lengths, self.is_causal, self.size)))

    def __hash__(self) -> int:
        return self._hash  # thousands of lengths are hashed once, not at every look-up of a plan

    def __reduce__(self) -> tuple[Any, ...]:
        return Documents, (self.lengths, self.is_causal, self.size)  # hashes differ between processes and must not travel

    def __repr__(self) -> str:
        return f"Documents({len(self.lengths)} of {sum(self.lengths)} tokens, causal={self.is_causal}, window={self.size})"

    @property
    def total(self) -> int:
        """Tokens of all documents."""
        return sum(self.lengths)

    def check(self, q_len: int, k_len: int) -> None:
        if not self.total == q_len == k_len:
            raise ValueError(
                f"document lengths sum to {self.total}, but the sequence has {q_len} queries and {k_len} keys; "
                "they must be equal (append the padding as a last document)"
            )

    def _visible(self, q: Tensor, k: Tensor) -> Tensor:
        ends = torch.tensor(self.lengths, dtype=torch.int64, device=q.device).cumsum(0)
        seen = torch.searchsorted(ends, q.contiguous(), right=True) == torch.searchsorted(ends, k.contiguous(), right=True)
        if self.is_causal:
            seen = seen & (k <= q)
        return seen if self.size is None else seen & ((q - k).abs() < self.size)

    def _bands(self, q: Span, k: Span) -> Bands:
        ends = np.cumsum(np.asarray(self.lengths, dtype=np.int64))
        starts = ends - np.asarray(self.lengths, dtype=np.int64)
        reach = UNBOUNDED if self.size is None else self.size - 1
        lo, hi = np.full_like(starts, -reach), np.full_like(starts, 0 if self.is_causal else reach)
        return Bands(np.stack([starts, ends, starts, ends, lo, hi], axis=1))


@dataclass(frozen=True)
class Prefix(Mask):
    n: int

    def _visible(self, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) | (k < self.n)

    def _bands(self, q: Span, k: Span) -> Bands:
        return Bands(
            np.array(
                [
                    [-UNBOUNDED, UNBOUNDED, -UNBOUNDED, self.n, -UNBOUNDED, UNBOUNDED],
                    [-UNBOUNDED, UNBOUNDED, self.n, UNBOUNDED, -UNBOUNDED, 0],
                ],
                dtype=np.int64,
            )
        )


@dataclass(frozen=True)
class Chunked(Mask):
    size: int

    def _visible(self, q: Tensor, k: Tensor) -> Tensor:
        return q // self.size == k // self.size

    def _bands(self, q: Span, k: Span) -> Bands:
        starts = np.arange(q[0] // self.size, -(-q[1] // self.size), dtype=np.int64) * self.size
        free = np.full_like(starts, UNBOUNDED)
        return Bands(np.stack([starts, starts + self.size, starts, starts + self.size, -free, free], axis=1))


@dataclass(frozen=True)
class Blocks(Mask):
    rows: int
    columns: int
    bits: bytes = field(repr=False)
    block_size: int

    def _map(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        return np.frombuffer(self.bits, dtype=np.bool_).reshape(self.rows, self.columns)

    def check(self, q_len: int, k_len: int) -> None:
        need = -(-k_len // self.block_size)
        if self.rows < need or self.columns < need:
            raise ValueError(
                f"a block map of {self.rows} x {self.columns} blocks of {self.block_size} does not cover {k_len} positions; "
                f"it needs at least {need} x {need} blocks"
            )
        if q_len > k_len:
            raise ValueError(f"a block map needs at least as many keys as queries, got {q_len} queries and {k_len} keys")

    def _visible(self, q: Tensor, k: Tensor) -> Tensor:
        table = torch.tensor(self._map(), device=q.device)
        return table[q // self.block_size, k // self.block_size]

    def _bands(self, q: Span, k: Span) -> Bands:
        padded = np.pad(self._map().astype(np.int8), ((0, 0), (1, 1)))
        row, begin = np.nonzero(np.diff(padded, axis=1) == 1)
        _, end = np.nonzero(np.diff(padded, axis=1) == -1)
        row, begin, end = (x.astype(np.int64) * self.block_size for x in (row, begin, end))
        free = np.full_like(row, UNBOUNDED)
        return Bands(np.stack([row, row + self.block_size, begin, end, -free, free], axis=1))


@dataclass(frozen=True)
class Dilated(Mask):
    stride: int
    size: int | None

    def _visible(self, q: Tensor, k: Tensor) -> Tensor:
        seen = (q - k) % self.stride == 0
        return seen if self.size is None else seen & ((q - k).abs() < self.size * self.stride)

    def _bands(self, q: Span, k: Span) -> Bands:
        reach = UNBOUNDED if self.size is None else self.size * self.stride - 1
        return Bands(_one_band(-reach, reach).rows, self.stride)


@dataclass(frozen=True)
class Intersection(Mask):
    masks: tuple[Mask, ...]

    def parts(self) -> tuple[Mask, ...]:
        return self.masks

    def check(self, q_len: int, k_len: int) -> None:
        for part in self.masks:
            part.check(q_len, k_len)

    def _visible(self, q: Tensor, k: Tensor) -> Tensor:
        seen = self.masks[0]._visible(q, k)
        for part in self.masks[1:]:
            seen = seen & part._visible(q, k)
        return seen

    def _bands(self, q: Span, k: Span) -> Bands:
        found = self.masks[0].bands(q, k)
        for part in self.masks[1:]:
            found = _intersect(found, part.bands(q, k))
        return found


def overlaps(a0: IntArray, a1: IntArray, b0: IntArray, b1: IntArray) -> tuple[IntArray, IntArray]:
    """All index pairs (i, j) where the half-open intervals ``[a0[i], a1[i])`` and ``[b0[j], b1[j])`` share a point.

    b must be sorted by b0. Work is linear in the pairs looked at, which for intervals without deep nesting are the pairs found.
    """
    if not len(a0) or not len(b0):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    # b[j] can reach a[i] only from the first j whose running maximum of ends exceeds a0[i], and only while b0[j] < a1[i].
    first = np.searchsorted(np.maximum.accumulate(b1), a0, side="right")
    count = np.maximum(np.searchsorted(b0, a1, side="left") - first, 0)
    i = np.repeat(np.arange(len(a0)), count)
    j = np.arange(len(i)) - np.repeat(np.cumsum(count) - count, count) + first[i]
    hit = (a0[i] < b1[j]) & (b0[j] < a1[i])
    return i[hit], j[hit]


def _intersect(a: Bands, b: Bands) -> Bands:
    i, j = overlaps(a.rows[:, 0], a.rows[:, 1], b.rows[:, 0], b.rows[:, 1])
    x, y = a.rows[i], b.rows[j]
    rows = np.where(np.array([True, False, True, False, True, False]), np.maximum(x, y), np.minimum(x, y))
    rows, _ = tighten(rows)
    return Bands(rows[np.lexsort((rows[:, 2], rows[:, 0]))], math.lcm(a.modulus, b.modulus))


def _one_band(lo: int, hi: int) -> Bands:
    return Bands(np.array([[-UNBOUNDED, UNBOUNDED, -UNBOUNDED, UNBOUNDED, lo, hi]], dtype=np.int64))


def _or_unbounded(bound: int | None) -> int:
    return UNBOUNDED if bound is None else bound


def _integer(name: str, value: Any, at_least: int = 0, advice: str = "") -> int:
    try:
        exact = int(value) == value and not isinstance(value, bool)
    except (TypeError, ValueError):
        exact = False
    if not exact or value < at_least:
        hint = f"; {advice}" if advice else ""
        raise ValueError(f"{name} must be an integer of at least {at_least}, got {_short(value)}{hint}")
    return min(int(value), LARGEST)  # sys.maxsize means "no limit"; sums with positions must still fit 64 bits


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
