"""Slices in the shapes that other people's kernels understand. Integer arithmetic only, no tensors.

Libraries offer full rectangles, causal squares, and windows aligned to the end of the keys. Any Slice is a few of these; which
few is decided here, once per Slice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ringflash.slices import IntArray, Slice, Slices


def lower_bound_matters(s: Slice) -> bool:
    """Whether some score of the rectangle is masked because its key lies too far back."""
    return s.lo > s.k0 - s.q1 + 1


def upper_bound_matters(s: Slice) -> bool:
    """Whether some score of the rectangle is masked because its key lies too far ahead."""
    return s.hi < s.k1 - 1 - s.q0


def is_full(s: Slice) -> bool:
    """Whether the Slice masks nothing inside its rectangle."""
    return not lower_bound_matters(s) and not upper_bound_matters(s)


def is_causal_square(s: Slice) -> bool:
    """Whether row q0 + n sees exactly the keys k0 .. k0 + n, up to the last row and key: what libraries call causal."""
    return s.q1 - s.q0 == s.k1 - s.k0 and s.hi == s.k0 - s.q0 and not lower_bound_matters(s)


def restricted(s: Slice, q0: int, q1: int) -> Slice | None:
    """The tight Slice of rows [q0, q1) of a tight Slice; None if there are none."""
    q0, q1 = max(q0, s.q0), min(q1, s.q1)
    if q0 >= q1:
        return None
    k0, k1 = max(s.k0, q0 + s.lo), min(s.k1, q1 + s.hi)
    return Slice(q0, q1, k0, k1, max(s.lo, k0 - q1 + 1), min(s.hi, k1 - 1 - q0))


def by_bounds(s: Slice) -> list[Slice]:
    """The Slice cut by rows so that in each piece a bound matters in every row (but the corner one) or in none.

    Up to three pieces, from the top: where only the upper bound cuts the rectangle, where both do or neither does, where only
    the lower one does. No piece but a full one has more rows than keys.
    """
    lower_from = max(s.k0 - s.lo, s.q0) if lower_bound_matters(s) else s.q1
    upper_until = min(s.k1 - s.hi, s.q1) if upper_bound_matters(s) else s.q0
    cuts = sorted({s.q0, s.q1, lower_from, upper_until})
    pieces = (restricted(s, a, b) for a, b in pairwise(cuts))
    return [p for p in pieces if p is not None]


def fulls_and_causal_squares(s: Slice) -> list[Slice]:
    """A Slice without a lower bound, as full rectangles and causal squares."""
    assert not lower_bound_matters(s)
    parts = []
    for piece in by_bounds(s):
        if not upper_bound_matters(piece):
            parts.append(piece)
            continue
        # Row q0 sees keys up to q0 + hi and every row sees one more: a rectangle that all rows see, then a square.
        corner = piece.q0 + piece.hi
        if corner > piece.k0:
            parts.append(Slice(piece.q0, piece.q1, piece.k0, corner, piece.k0 - piece.q1 + 1, corner - 1 - piece.q0))
        parts.append(Slice(piece.q0, piece.q1, corner, piece.k1, corner - piece.q1 + 1, piece.hi))
    return parts


UNLIMITED = -1
"""A window side without a limit, as flash-attention libraries spell it."""


def window(s: Slice) -> tuple[int, int]:
    """The Slice as ``window_size`` aligned at the end: (left, right), both >= 0 or UNLIMITED.

    With n rows and m keys, row i of the rectangle sees keys ``i + m - n - left .. i + m - n + right``. In a tight Slice the last
    row sees the last key and the first row the first, so neither side is ever negative.
    """
    end = s.k1 - s.q1
    left = end - s.lo if lower_bound_matters(s) else UNLIMITED
    right = s.hi - end if upper_bound_matters(s) else UNLIMITED
    return left, right


def windowed(s: Slice) -> list[Slice]:
    """The Slice as ones that flash-attention libraries compute correctly as windows.

    FlashAttention-2 takes a side >= the number of keys for unlimited, and an unlimited side beside a limited one for that
    number, counted from the end of the keys: with more rows than keys + 1, the first rows would see too little, or of a
    causal Slice all.
    """
    if is_full(s) or s.q1 - s.q0 <= s.k1 - s.k0 + 1:
        return [s]
    return by_bounds(s)


class Pack:
    """Slices that one variable-length call computes: disjoint in rows and in keys, in the same order, under one window."""

    def __init__(self) -> None:
        self.slices: list[Slice] = []
        self._left, self._right = _Side(), _Side()
        self._tall = False

    def take(self, s: Slice) -> bool:
        """Adds the Slice if it fits: behind the last one, under the same window. Slices come in the order of their rows."""
        if self.slices and (s.q0 < self.slices[-1].q1 or s.k0 < self.slices[-1].k1):
            return False
        rows, keys = s.q1 - s.q0, s.k1 - s.k0
        left, right = window(s)
        # A Slice without a limit may be computed under any limit that it does not reach.
        new_left, new_right = self._left.with_(left, keys - 1), self._right.with_(right, rows - 1)
        if new_left is None or new_right is None:
            return False
        tall = self._tall or rows > keys + 1
        if tall and (new_left.exactly, new_right.exactly) != (UNLIMITED, UNLIMITED):  # see `windowed`
            return False
        self._left, self._right, self._tall = new_left, new_right, tall
        self.slices.append(s)
        return True

    @property
    def window(self) -> tuple[int, int]:
        return self._left.exactly, self._right.exactly

    @property
    def longest(self) -> tuple[int, int]:
        """The most rows and the most keys of a Slice. At least 2 rows: libraries take single queries for a decoding step."""
        return max(2, *(s.q1 - s.q0 for s in self.slices)), max(s.k1 - s.k0 for s in self.slices)

    def row_runs(self) -> list[tuple[int, int]]:
        """The rows that the Slices cover, as maximal ranges."""
        return _joined((s.q0, s.q1) for s in self.slices)

    def key_runs(self) -> list[tuple[int, int]]:
        """The keys that the Slices cover, as maximal ranges."""
        return _joined((s.k0, s.k1) for s in self.slices)

    def cumulative(self, batch: int, q_len: int, k_len: int) -> tuple[IntArray, IntArray]:
        """Sequence borders (n + 1,) in the flattened rows and keys of a batch.

        Rows and keys between the Slices become sequences without keys, and without rows.
        """
        rows, keys = [0], [0]
        for b in range(batch):
            for s in self.slices:
                q0, k0 = b * q_len + s.q0, b * k_len + s.k0
                if q0 > rows[-1]:
                    rows.append(q0)
                    keys.append(keys[-1])
                if k0 > keys[-1]:
                    rows.append(q0)
                    keys.append(k0)
                rows.append(b * q_len + s.q1)
                keys.append(b * k_len + s.k1)
        return np.array(rows, dtype=np.int64), np.array(keys, dtype=np.int64)


class _Side(NamedTuple):
    """One side of a window that several Slices share."""

    exactly: int = UNLIMITED
    at_least: int = 0
    """The smallest limit that the members without one do not reach."""

    def with_(self, limit: int, reach: int) -> _Side | None:
        """The side with a member of this limit, or of this reach if it has no limit; None if they do not go together."""
        exactly, at_least = self
        if limit == UNLIMITED:
            at_least = max(at_least, reach)
        elif exactly in (UNLIMITED, limit):
            exactly = limit
        else:
            return None
        return None if exactly != UNLIMITED and exactly < at_least else _Side(exactly, at_least)


def _joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ascending ranges with touching ones joined."""
    runs: list[tuple[int, int]] = []
    for a, b in ranges:
        if runs and runs[-1][1] == a:
            runs[-1] = (runs[-1][0], b)
        else:
            runs.append((a, b))
    return runs


OPEN_PACKS = 8
"""Packs that a Slice is tried against before it starts a new one."""


def packs(slices: Iterable[Slice]) -> list[Pack]:
    """The Slices distributed over few packs."""
    done: list[Pack] = []
    for s in sorted(slices):
        for pack in done[-OPEN_PACKS:]:
            if pack.take(s):
                break
        else:
            done.append(Pack())
            taken = done[-1].take(s)
            assert taken
    return done


def row_blocks(s: Slice, rows: int) -> Iterator[Slice]:
    """The Slice cut into blocks of that many rows, each with only the keys that its rows see."""
    for q0 in range(s.q0, s.q1, rows):
        block = restricted(s, q0, q0 + rows)
        assert block is not None  # every row of a tight Slice sees a key
        yield block


def core(s: Slice) -> tuple[int, int]:
    """The keys [a, b) that every row of the Slice sees; a >= b if there are none."""
    return max(s.k0, s.q1 - 1 + s.lo), min(s.k1, s.q0 + s.hi + 1)


def repeats(slices: Slices) -> list[tuple[Slice, int]]:
    """The table as runs ``(s, n)``: Slice s and n - 1 copies of it, each starting where the one before ends, in rows and keys.

    Chunked masks and equal documents are one such run, which a kernel can treat as a batch of n.
    """
    table = slices.table
    if not len(table):
        return []
    starts = np.flatnonzero(np.concatenate([[True], ~_follows(table)]))
    counts = np.diff(np.append(starts, len(table)))
    return [(Slice(*row), n) for row, n in zip(table[starts].tolist(), counts.tolist(), strict=True)]


def _follows(table: IntArray) -> npt.NDArray[np.bool_]:
    """(n - 1,): which Slice is its predecessor moved by the predecessor's own size."""
    rows, keys = table[:, 1] - table[:, 0], table[:, 3] - table[:, 2]
    before, after = table[:-1], table[1:]
    follows: npt.NDArray[np.bool_] = (
        (after[:, 0] == before[:, 1])
        & (after[:, 2] == before[:, 3])
        & (rows[1:] == rows[:-1])
        & (keys[1:] == keys[:-1])
        & (after[:, 4] - before[:, 4] == keys[:-1] - rows[:-1])
        & (after[:, 5] - before[:, 5] == keys[:-1] - rows[:-1])
    )
    return follows
