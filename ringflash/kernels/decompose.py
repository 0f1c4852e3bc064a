"""Slices in the shapes that other people's kernels understand. Integer arithmetic only, no tensors.

Libraries offer full rectangles, causal squares, and windows aligned to the end of the keys. Any Slice is a few of these; which
few is decided here, once per Slice.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

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


def banded(slices: Slices) -> bool:
    """Whether some Slice is bounded from below, that is neither full nor causal-like."""
    q1, k0, lo = slices.table[:, 1], slices.table[:, 2], slices.table[:, 4]
    return bool((lo > k0 - q1 + 1).any())


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
