"""Slices: the one mask a kernel knows.

A *Slice* ``(q0, q1, k0, k1, lo, hi)`` is a band of the score matrix between one query buffer and one key buffer: row ``i`` in
``[q0, q1)`` sees key ``j`` in ``[k0, k1)`` iff ``lo <= j - i <= hi``, all in buffer indices. A kernel gets a table of disjoint
Slices; causal, windows, packed documents, prefixes and block maps are tables, never code.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

UNBOUNDED = 1 << 60
"""Stands for an absent bound in raw band tables; canonical Slices never hold it."""


class Slice(NamedTuple):
    """Rows ``[q0, q1)`` see keys ``[k0, k1)`` where ``lo <= j - i <= hi``."""

    q0: int
    q1: int
    k0: int
    k1: int
    lo: int
    hi: int


def tighten(rows: IntArray) -> tuple[IntArray, npt.NDArray[np.bool_]]:
    """Shrinks each rectangle to what its band reaches.

    rows: (n, >= 6) with columns q0, q1, k0, k1, lo, hi first. Returns the tightened rows that see something (further columns
    kept) and the mask of which they were. Bounds that a rectangle cannot reach are clipped to its corners, so that a full
    rectangle has exactly one spelling.
    """
    q0, q1, k0, k1, lo, hi = rows[:, :6].T
    q0 = np.maximum(q0, k0 - hi)
    q1 = np.minimum(q1, k1 - lo)
    k0 = np.maximum(k0, q0 + lo)
    k1 = np.minimum(k1, q1 + hi)
    keep = (q1 > q0) & (k1 > k0) & (hi >= lo)
    out = rows.copy()
    out[:, 0], out[:, 1], out[:, 2], out[:, 3] = q0, q1, k0, k1
    out[:, 4] = np.maximum(lo, k0 - q1 + 1)
    out[:, 5] = np.minimum(hi, k1 - 1 - q0)
    return out[keep], keep


def _ramp(n: IntArray) -> IntArray:
    """1 + 2 + ... + n, zero for n <= 0."""
    n = np.maximum(n, 0)
    return n * (n + 1) // 2


def area(rows: IntArray) -> IntArray:
    """Visible pairs of each row of a band table (n, >= 6), in closed form."""
    q0, q1, k0, k1, lo, hi = rows[:, :6].T
    q1, k1 = np.maximum(q1, q0), np.maximum(k1, k0)

    def below(c: IntArray) -> IntArray:
        """Sum over i in [q0, q1) of clip(i + c - k0, 0, k1 - k0)."""
        first, last, top = q0 + c - k0, q1 - 1 + c - k0, k1 - k0
        ramp = _ramp(last) - _ramp(first - 1)
        over = _ramp(last - top) - _ramp(first - 1 - top)
        return ramp - over

    lo, hi = np.maximum(lo, k0 - q1), np.minimum(hi, k1 - q0)
    return np.where(hi >= lo, below(hi + 1) - below(lo), 0)


class Slices(Sequence[Slice]):
    """An immutable, hashable table of disjoint, tight, non-empty Slices.

    ``table`` is a read-only int64 array (n, 6). A Slice is *full* (no score of its rectangle is masked) iff
    ``lo == k0 - q1 + 1`` and ``hi == k1 - 1 - q0``.
    """

    __slots__ = ("_bytes", "_hash", "table")

    def __init__(self, table: IntArray) -> None:
        tight, _ = tighten(np.asarray(table, dtype=np.int64).reshape(-1, 6))
        self.table: IntArray = np.ascontiguousarray(tight)
        self.table.flags.writeable = False
        self._bytes = self.table.tobytes()
        self._hash = hash(self._bytes)

    @classmethod
    def from_rows(cls, rows: Iterable[Sequence[int]]) -> Slices:
        """Slices of any rows ``(q0, q1, k0, k1, lo, hi)``; empty ones are dropped, bounds tightened."""
        return cls(np.array([tuple(r) for r in rows], dtype=np.int64).reshape(-1, 6))

    @classmethod
    def full_rectangle(cls, q_len: int, k_len: int) -> Slices:
        """Every one of ``q_len`` rows sees every one of ``k_len`` keys."""
        return cls.from_rows([(0, q_len, 0, k_len, -UNBOUNDED, UNBOUNDED)])

    @classmethod
    def causal(cls, q_len: int, k_len: int) -> Slices:
        """Causal, aligned at the end: key ``j`` is visible iff ``j <= i + k_len - q_len``."""
        return cls.from_rows([(0, q_len, 0, k_len, -UNBOUNDED, k_len - q_len)])

    def __len__(self) -> int:
        return len(self.table)

    def __iter__(self) -> Iterator[Slice]:
        return (Slice(*row) for row in self.table.tolist())

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        if isinstance(index, slice):
            return Slices(self.table[index])
        return Slice(*self.table[index].tolist())

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Slices) and self._bytes == other._bytes

    def __reduce__(self) -> tuple[Any, ...]:
        return Slices, (self.table,)

    def __repr__(self) -> str:
        head = ", ".join(str(tuple(s)) for s in list(self)[:4])
        return f"Slices([{head}{', ...' if len(self) > 4 else ''}], n={len(self)})"

    @property
    def full(self) -> npt.NDArray[np.bool_]:
        """(n,) bool: which Slices mask nothing inside their rectangle."""
        q0, q1, k0, k1, lo, hi = self.table.T
        full: npt.NDArray[np.bool_] = (lo == k0 - q1 + 1) & (hi == k1 - 1 - q0)
        return full

    def area(self) -> int:
        """Number of visible (row, key) pairs."""
        return int(area(self.table).sum())


def settled_rows(calls: Sequence[Slices], q_len: int, granule: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Per call the rows that no later call touches, and no earlier one's answer holds: each row is in exactly one answer.

    Rows that no call touches are the first one's. Answers are sorted ranges, cut at multiples of ``granule`` rows: a block of
    so many rows is one call's as a whole. Later calls come later in ``calls``, which must not be empty.
    """
    blocks = -(-q_len // granule)
    last = np.zeros(blocks, dtype=np.int64)
    for number, slices in enumerate(calls):
        steps = np.zeros(blocks + 1, dtype=np.int64)
        np.add.at(steps, slices.table[:, 0] // granule, 1)
        np.add.at(steps, -(-slices.table[:, 1] // granule), -1)
        last[np.cumsum(steps)[:-1] > 0] = number
    edges = np.flatnonzero(np.diff(last, prepend=-1, append=-1)).tolist()
    answers: list[list[tuple[int, int]]] = [[] for _ in calls]
    for begin, end in itertools.pairwise(edges):
        answers[last[begin]].append((begin * granule, min(end * granule, q_len)))
    return tuple(map(tuple, answers))
