"""Lowering: what of a mask lies between the buffers of ranks, as kernel calls.

A mask is bands between positions (mask.py), a layout says which positions stand in which rows of a rank's buffer (layout.py).
Between the rows of two buffers the mask is bands again: exactly, whatever the layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ringflash.mask import Bands, overlaps
from ringflash.parallel.layout import Layout
from ringflash.slices import UNBOUNDED, IntArray, Slices, area, tighten

COALESCE_UP_TO = 4096
"""Slices of a stage that are worth joining. Longer tables (thousands of documents, striped) hardly shrink and cost seconds."""


Ranges = tuple[tuple[int, int], ...]
"""Disjoint ascending row ranges ``[start, stop)`` of an owner's buffer."""


class View(NamedTuple):
    """Rows ``start::step`` of a buffer; dilated masks are bands only between such views."""

    start: int
    step: int


@dataclass(frozen=True)
class Part:
    """One kernel call: the Slices between a view of the query buffer and a view of the key buffer (in view indices).

    One of the two is the stage's buffer, the other is the own one: that of what does not travel.
    """

    q_view: View
    k_view: View
    slices: Slices

    def transposed(self) -> Part:
        """With queries and keys in each other's place."""
        return Part(self.k_view, self.q_view, Slices(_transposed(self.slices.table)))


class Runs(NamedTuple):
    """Runs of several ranks as columns; ``offset`` is a run's first row in its rank's buffer, ``piece`` its rank or its rank's
    piece: piece p of rank r is number ``r * pieces + p``."""

    start: IntArray
    length: IntArray
    stride: IntArray
    offset: IntArray
    piece: IntArray


def runs_of(layout: Layout, ranks: Sequence[int], shift: int = 0, pieces: int = 1) -> Runs:
    """The runs of ranks, cut where their pieces begin."""
    rows = []
    for rank in ranks:
        offset, cuts = 0, [layout.lengths[rank] * p // pieces for p in range(1, pieces + 1)]
        piece = 0
        for run in layout.ranks[rank]:
            done = 0
            while done < run.length:
                while cuts[piece] <= offset:
                    piece += 1
                n = min(run.length - done, cuts[piece] - offset)
                rows.append((run.start + shift + done * run.stride, n, run.stride, offset, rank * pieces + piece))
                done, offset = done + n, offset + n
    return Runs(*np.array(rows, dtype=np.int64).reshape(-1, 5).T)


def _ceil_div(a: IntArray, b: IntArray) -> IntArray:
    return -(-a // b)


def _join(runs: Runs, b0: IntArray, b1: IntArray) -> tuple[IntArray, IntArray]:
    """Pairs (run, interval) that may share a position."""
    order = np.argsort(b0, kind="stable")
    i, j = overlaps(runs.start, runs.start + (runs.length - 1) * runs.stride + 1, b0[order], b1[order])
    return i, order[j]


def _to_rows(x: IntArray, runs: Runs, i: IntArray) -> IntArray:
    """First row of run i, counted in the run, at or after position x; clipped to the run."""
    return np.clip(_ceil_div(x - runs.start[i], runs.stride[i]), 0, runs.length[i])


def _transposed(rows: IntArray) -> IntArray:
    """Bands (n, 6) with queries and keys in each other's place."""
    q0, q1, k0, k1, lo, hi = rows.T
    return np.stack([k0, k1, q0, q1, -hi, -lo], axis=1)


class Lowered(NamedTuple):
    """Bands in buffer rows: ``rows`` (n, 6) of q0, q1, k0, k1, lo, hi; ``residue`` of j - i modulo ``modulus``; and the pieces
    of their queries and keys. Transposed where queries travel: so the planner always moves "keys"."""

    rows: IntArray
    residue: IntArray
    modulus: int
    q_piece: IntArray
    k_piece: IntArray

    def transposed(self) -> Lowered:
        return Lowered(_transposed(self.rows), -self.residue % self.modulus, self.modulus, self.k_piece, self.q_piece)

    def where(self, pick: npt.NDArray[np.bool_]) -> Lowered:
        return Lowered(self.rows[pick], self.residue[pick], self.modulus, self.q_piece[pick], self.k_piece[pick])


def lower(bands: Bands, q_runs: Runs, k_runs: Runs) -> Lowered:
    """Bands of positions -> bands between the buffers of the runs' ranks. Vectorised; the smaller side is joined first.

    For q = a + s*i and k = b + s*j, ``lo <= k - q <= hi`` is ``ceil((lo + a - b)/s) <= j - i <= floor((hi + a - b)/s)``, and
    ``(k - q) % m == 0`` is ``s*(j - i) = a - b (mod m)``: solvable iff gcd(s, m) divides a - b, and then one residue of j - i.
    """
    r = bands.rows
    if len(q_runs.start) <= len(k_runs.start):
        iq, band = _join(q_runs, r[:, 0], r[:, 1])
        first = np.maximum(q_runs.start[iq], r[band, 0])
        last = np.minimum(q_runs.start[iq] + (q_runs.length[iq] - 1) * q_runs.stride[iq] + 1, r[band, 1])
        ik, pair = _join(k_runs, np.maximum(r[band, 2], first + r[band, 4]), np.minimum(r[band, 3], last + r[band, 5]))
        iq, band = iq[pair], band[pair]
    else:
        ik, band = _join(k_runs, r[:, 2], r[:, 3])
        first = np.maximum(k_runs.start[ik], r[band, 2])
        last = np.minimum(k_runs.start[ik] + (k_runs.length[ik] - 1) * k_runs.stride[ik] + 1, r[band, 3])
        iq, pair = _join(q_runs, np.maximum(r[band, 0], first - r[band, 5]), np.minimum(r[band, 1], last - r[band, 4]))
        ik, band = ik[pair], band[pair]
    b = r[band]
    # A run of one position has any stride; it takes its partner's.
    stride = np.where(q_runs.length[iq] > 1, q_runs.stride[iq], k_runs.stride[ik])
    gap = q_runs.start[iq] - k_runs.start[ik]
    q_offset, k_offset = q_runs.offset[iq], k_runs.offset[ik]
    shift = k_offset - q_offset
    rows = np.stack(
        [
            q_offset + _to_rows(b[:, 0], q_runs, iq),
            q_offset + _to_rows(b[:, 1], q_runs, iq),
            k_offset + _to_rows(b[:, 2], k_runs, ik),
            k_offset + _to_rows(b[:, 3], k_runs, ik),
            np.where(b[:, 4] <= -UNBOUNDED, -UNBOUNDED, _ceil_div(b[:, 4] + gap, stride) + shift),
            np.where(b[:, 5] >= UNBOUNDED, UNBOUNDED, (b[:, 5] + gap) // stride + shift),
        ],
        axis=1,
    )
    residue = np.zeros(len(rows), np.int64)
    modulus = 1
    solvable = np.ones(len(rows), dtype=np.bool_)
    if bands.modulus > 1:
        # One stride per layout makes one modulus per table (a lone position in the pair takes any).
        common = int(stride.max(initial=1))
        assert (stride == common).all() or (stride[stride != common] == 1).all()
        g = int(np.gcd(common, bands.modulus))
        modulus = bands.modulus // g
        solvable = gap % g == 0
        residue = ((gap // g) * pow(common // g, -1, modulus) + shift) % modulus if modulus > 1 else residue
    tight, keep = tighten(rows[solvable])
    pick = np.flatnonzero(solvable)[keep]
    if modulus > 1:  # every j - i in [lo, hi] occurs in a tight band; those of the right residue are all that counts
        tight[:, 4] += (residue[pick] - tight[:, 4]) % modulus
        tight[:, 5] -= (tight[:, 5] - residue[pick]) % modulus
        tight, keep = tighten(tight)
        pick = pick[keep]
    return Lowered(tight, residue[pick], modulus, q_runs.piece[iq[pick]], k_runs.piece[ik[pick]])


def reach(low: Lowered, pair: IntArray, max_gap: int) -> dict[int, Ranges]:
    """For every value of ``pair`` (one per band), the key rows its bands reach: disjoint ranges, joined over short gaps."""
    if not len(pair):
        return {}
    order = np.lexsort((low.rows[:, 2], pair))
    who, start, stop = pair[order], low.rows[order, 2], low.rows[order, 3]
    # A running maximum of the ends that starts anew at every value of pair: ends are lifted by a step per value.
    lift = np.cumsum(np.concatenate([[0], who[1:] != who[:-1]])) * (int(stop.max()) + 1)
    reached = np.maximum.accumulate(stop + lift) - lift
    first = np.concatenate([[True], (who[1:] != who[:-1]) | (start[1:] > reached[:-1] + max_gap)])
    head = np.flatnonzero(first)
    tail = np.concatenate([head[1:], [len(who)]]) - 1
    found: dict[int, list[tuple[int, int]]] = {}
    for key, a, b in zip(who[head].tolist(), start[head].tolist(), reached[tail].tolist(), strict=True):
        found.setdefault(key, []).append((a, b))
    return {key: tuple(ranges) for key, ranges in found.items()}


def _coalesce(rows: IntArray) -> IntArray:
    """Joins Slices into larger ones wherever two of them are exactly one band: fewer, larger kernel calls.

    So the local step of zigzag (causal, full, causal) becomes one causal Slice, and its other steps one full Slice each.
    """
    rows, _ = tighten(rows)
    while len(rows) <= COALESCE_UP_TO:
        before = len(rows)
        rows = _join_neighbours(rows, np.lexsort((rows[:, 2], rows[:, 1], rows[:, 0])))  # same rows, keys side by side
        rows = _join_neighbours(rows, np.lexsort((rows[:, 0], rows[:, 2])))  # same first key, rows one below the other
        rows = _join_neighbours(rows, np.lexsort((rows[:, 2], rows[:, 0])))
        if len(rows) == before:
            break
    return rows


def _join_neighbours(rows: IntArray, order: IntArray) -> IntArray:
    """One pass over pairs that follow each other in the given order; Slices are disjoint, so equal area means equal sets."""
    rows = rows[order]
    if len(rows) < 2:
        return rows
    a, b = rows[:-1], rows[1:]
    union = np.where(np.array([True, False, True, False, True, False]), np.minimum(a, b), np.maximum(a, b))
    joins = area(union) == area(a) + area(b)
    # Of pairs in a row every second one: a Slice joins one neighbour a pass.
    index = np.arange(len(joins))
    begins = joins & ~np.concatenate([[False], joins[:-1]])
    begin = np.maximum.accumulate(np.where(begins, index, 0))
    joins &= (index - begin) % 2 == 0
    joined = rows.copy()
    joined[:-1][joins] = union[joins]
    kept: IntArray = joined[~np.concatenate([[False], joins])]
    return kept


def parts_of(rows: IntArray, residue: IntArray, modulus: int) -> tuple[Part, ...]:
    """Kernel calls for a stage's bands: one, or for a dilated mask one per pair of residues."""
    if modulus == 1:
        slices = Slices(_coalesce(rows))
        return (Part(View(0, 1), View(0, 1), slices),) if len(slices) else ()
    parts = []
    for c in np.unique(residue).tolist():
        band = rows[residue == c]
        for q_start in range(min(modulus, int(band[:, 1].max()))):
            k_start = (q_start + c) % modulus
            q0, q1, k0, k1, lo, hi = band.T
            view = np.stack(
                [
                    -((q_start - q0) // modulus),
                    -((q_start - q1) // modulus),
                    -((k_start - k0) // modulus),
                    -((k_start - k1) // modulus),
                    np.where(lo <= -UNBOUNDED, lo, -((k_start - q_start - lo) // modulus)),
                    np.where(hi >= UNBOUNDED, hi, (hi - k_start + q_start) // modulus),
                ],
                axis=1,
            )
            slices = Slices(_coalesce(view))
            if len(slices):
                parts.append(Part(View(q_start, modulus), View(k_start, modulus), slices))
    return tuple(parts)
