"""What there is to compute: how a pass's kernel calls follow each other, their tiles, and the visible pairs of every rank."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ringflash.mask import Mask
from ringflash.parallel.lower import Part, Ranges
from ringflash.parallel.plan import Plan, head_shares
from ringflash.parallel.world import PlanKey
from ringflash.slices import IntArray, Slices, settled_rows


class Work(NamedTuple):
    """What kernels compute, per head.

    calls        kernel launches. slices: in all of them.
    visible      visible pairs; ``full`` of them lie in tiles that need no mask.
    full_tiles   tiles without a masked score. masked_tiles: the others.
    row_tiles    tiles of query rows that have anything to compute.
    """

    calls: int = 0
    slices: int = 0
    visible: int = 0
    full: int = 0
    full_tiles: int = 0
    masked_tiles: int = 0
    row_tiles: int = 0

    def __add__(self, other: tuple[int, ...]) -> Work:  # type: ignore[override]
        return Work(*(a + b for a, b in zip(self, other, strict=True)))


def work_of(parts: Iterable[Part], tile: int) -> Work:
    """The work of kernel calls, in square tiles of that many rows and keys."""
    total = Work()
    for part in parts:
        total = total + _work(part.slices, tile)
    return total


@lru_cache(maxsize=4096)
def _work(slices: Slices, tile: int) -> Work:
    _, _, k0, k1, lo, hi = slices.table.T
    band, row, top, bottom, begin, end = _touched(slices, tile)
    all0, all1 = np.maximum(k0[band], bottom - 1 + lo[band]), np.minimum(k1[band], top + hi[band] + 1)
    full = np.maximum(all1 // tile - -(-all0 // tile), 0)
    full[bottom - top < tile] = 0
    # Slices of disjoint rows share the tile at the border between them: one document ends where the next begins.
    cells = _cells(row, begin, end, full, -(-all0 // tile))
    return Work(
        calls=1,
        slices=len(slices),
        visible=slices.area(),
        full=int(full.sum()) * tile * tile,
        full_tiles=int(full.sum()),
        masked_tiles=len(np.unique(cells, axis=0)),
        row_tiles=len(np.unique(row)),
    )


class _Touched(NamedTuple):
    """One entry per Slice and tile of rows it touches: the Slice's rows there, and the tiles of keys that any of them sees."""

    band: IntArray
    row: IntArray
    top: IntArray
    bottom: IntArray
    begin: IntArray
    end: IntArray


def _touched(slices: Slices, tile: int) -> _Touched:
    q0, q1, k0, k1, lo, hi = slices.table.T
    first = q0 // tile
    count = -(-q1 // tile) - first
    band = np.repeat(np.arange(len(slices)), count)
    row = np.arange(len(band)) - np.repeat(np.cumsum(count) - count, count) + first[band]
    top, bottom = np.maximum(q0[band], row * tile), np.minimum(q1[band], (row + 1) * tile)
    any0, any1 = np.maximum(k0[band], top + lo[band]), np.minimum(k1[band], bottom + hi[band])
    return _Touched(band, row, top, bottom, any0 // tile, -(-any1 // tile))


@lru_cache(maxsize=4096)
def stretch(slices: Slices, tile: int, copies: int, units: int) -> float:
    """How much longer a forward call takes than if its work were spread evenly over the device: the last units are done so late.

    Tiles of ``tile`` query rows, ``copies`` of each (one a head and batch entry), are taken longest first by whichever of
    ``units`` multiprocessors is free, as persistent kernels do.
    """
    touched = _touched(slices, tile)
    keys = np.bincount(touched.row, weights=np.maximum(touched.end - touched.begin, 0))
    lengths, count = np.unique(keys.astype(np.int64), return_counts=True)
    total = int((lengths * count).sum()) * copies
    if not total:
        return 1.0
    free = np.zeros(units, np.int64)
    for length, n in zip(lengths[::-1].tolist(), (count[::-1] * copies).tolist(), strict=True):
        if length:
            free = _taken(free, length, n)
    return float(free.max()) * units / total


def _taken(free: IntArray, length: int, n: int) -> IntArray:
    """When units that are free at these times are free after n items of one length, each taken by the first that is free."""
    # All units work until some level; those that are below it by then take one item more each, the earliest first.
    low, high = int(free.min()), int(free.max()) + length * (n // len(free) + 1)
    while low < high:  # the first level at which more than n items would have been begun
        middle = (low + high) // 2
        begun = int((np.maximum(middle - free, 0) // length + (middle >= free)).sum())
        low, high = (low, middle) if begun > n else (middle + 1, high)
    taken = np.maximum(low - 1 - free, 0) // length + (low - 1 >= free)
    left = n - int(taken.sum())
    free = free + taken * length
    free[np.flatnonzero(free == low)[:left]] += length
    return free


def _cells(row: IntArray, begin: IntArray, end: IntArray, full: IntArray, full_begin: IntArray) -> IntArray:
    """(row tile, key tile) of every tile in [begin, end) that is not one of the ``full`` tiles from full_begin."""
    before = np.where(full > 0, full_begin, end) - begin
    after = np.where(full > 0, end - full_begin - full, 0)
    count = before + after
    i = np.repeat(np.arange(len(row)), count)
    n = np.arange(len(i)) - np.repeat(np.cumsum(count) - count, count)
    return np.stack([row[i], begin[i] + n + np.where(n < before[i], 0, full[i])], axis=1)


class Calls(NamedTuple):
    """How the kernel calls of a forward pass hand the running state on.

    direct: the first one starts it and ``last`` finishes it. settled: by call, the rows that it completes, if others than the
    last one complete any.
    """

    direct: bool
    last: Part | None
    settled: tuple[Ranges, ...]


@lru_cache(maxsize=1024)
def calls_of(plan: Plan, settle_rows: int) -> Calls:
    """Not direct are calls that see only some of the rows (views). settle_rows: of the kernel; 0 if it settles none."""
    work = [part for step in plan.steps for part in step.parts]
    direct = bool(work) and all(part.q_view == (0, 1) for part in work)
    settled: tuple[Ranges, ...] = ()
    if direct and settle_rows and len(work) > 1:
        settled = settled_rows([part.slices for part in work], plan.q_len, settle_rows)
    return Calls(direct, work[-1] if work else None, settled if any(settled[:-1]) else ())


def visible_pairs(mask: Mask, q_len: int, k_len: int) -> IntArray:
    """How many keys each query sees: int64 (q_len,), queries at the end of the keys."""
    shift = k_len - q_len
    bands = mask.bands((shift, k_len), (0, k_len))
    q0, q1, k0, k1, lo, hi = bands.rows.T
    q0, q1 = q0 - shift, q1 - shift
    lo, hi = lo + shift, hi + shift
    pairs = np.zeros(q_len, np.int64)
    if bands.modulus == 1:
        # Per band, the end of a row's keys grows by one a row until it reaches k1, and the start from when it leaves k0.
        jump, bend = np.zeros(q_len + 1, np.int64), np.zeros(q_len + 2, np.int64)

        def add(sign: int, begin: IntArray, end: IntArray, first: IntArray, last: IntArray) -> None:
            """A line that has the value ``first`` at q0, slope 1 from row ``begin`` to row ``end``, and ``last`` at q1 - 1."""
            np.add.at(jump, q0, sign * first)
            np.add.at(jump, q1, -sign * last)
            np.add.at(bend, begin + 1, sign)
            np.add.at(bend, end + 1, -sign)

        stop = np.clip(k1 - hi - 1, q0, q1 - 1)
        add(1, q0, stop, np.minimum(k1, q0 + hi + 1), np.minimum(k1, q1 + hi))
        start = np.clip(k0 - lo, q0, q1 - 1)
        add(-1, start, q1 - 1, np.maximum(k0, q0 + lo), np.maximum(k0, q1 - 1 + lo))
        pairs[:] = np.cumsum(jump + np.cumsum(bend[:-1]))[:-1]
        return pairs
    per_turn = max(1, (1 << 22) // int(max((q1 - q0).max(initial=1), 1)))
    for i in range(0, len(q0), per_turn):
        some = slice(i, i + per_turn)
        count = (q1 - q0)[some]
        band = np.repeat(np.arange(len(q0))[some], count)
        q = np.arange(len(band)) - np.repeat(np.cumsum(count) - count, count) + q0[band]
        first, last = np.maximum(k0[band], q + lo[band]), np.minimum(k1[band] - 1, q + hi[band])
        at = q + shift
        np.add.at(pairs, q, (last - at) // bands.modulus - (first - 1 - at) // bands.modulus)
    return pairs


def rank_areas(key: PlanKey) -> tuple[int, ...]:
    """Visible pairs times heads of every rank of the group."""
    return _rank_areas(replace(key, rank=0))


@lru_cache(maxsize=64)
def _rank_areas(key: PlanKey) -> tuple[int, ...]:
    ulysses = key.schedule.ulysses
    layout = key.q_layout.merged(ulysses)
    pairs = visible_pairs(key.mask, key.q_layout.seqlen, key.k_layout.seqlen)
    rings = [sum(int(pairs[run.start : run.stop : run.stride].sum()) for run in runs) for runs in layout.ranks]
    shares = head_shares(key.heads, key.kv_heads, ulysses)
    return tuple(area * share.q_heads for area in rings for share in shares)
