"""Tile tables: what the device kernels walk over, made from Slices in vectorised integer arithmetic.

For a tile of ``rows x columns`` scores a table lists, per tile of rows, the *runs* of column tiles to compute: *full* ones, where
every score is visible, and *masked* ones with the Slices that mask them. A tile that several Slices of disjoint rows touch (a
border between documents) is computed once, one that two Slices of one row touch (the edge of a prefix) twice: Slices are
disjoint, so each visible pair is covered exactly once. No tile is empty. Items are ordered longest first.

The same builder serves both passes: forward tables have query rows and key columns, backward tables key rows and query columns.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from ringflash.slices import IntArray, Slices

Int32Array = npt.NDArray[np.int32]
Ranges = tuple[tuple[int, int], ...]

# Words of the records; csrc/hopper/forward.cuh has the same names.
ROW_TILE, TILES, RUN_BEGIN, RUN_END = 0, 1, 2, 3
COLUMN_TILE, COLUMN_TILE_END, EXTRA_BEGIN, EXTRA_END, BAND = 4, 5, 6, 7, 8
MASKED_TILES, SETTLED = 14, 15
RECORD_WORDS, EXTRA_WORDS = 16, 8


@dataclass(frozen=True, eq=False)
class TileTable:
    """A table in CSR form, int32.

    items: (row tiles, 16), longest first: row tile, number of column tiles, its runs [begin, end); words 4 to 13 repeat the first
    run; word 14 counts the masked tiles, which come first; word 15 says whether the rows settle in this call.
    runs: (n, 16): words 4 and 5 are its column tiles [begin, end); 6 and 7 its further Slices [begin, end) in ``extra``, begin -1
    for a full run; words 8 to 13 the band (r0, r1, c0, c1, lo, hi) that masks it: row r of [r0, r1) sees column c of [c0, c1)
    iff lo <= c - r <= hi.
    extra: (m, 8): further bands of a run, each of other rows.
    """

    items: Int32Array
    runs: Int32Array
    extra: Int32Array
    rows: int
    columns: int
    _on_device: dict[torch.device, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=dict, repr=False)

    @property
    def tiles(self) -> int:
        """Number of tiles to compute for one head."""
        return int(self.items[:, TILES].sum())

    @property
    def even(self) -> bool:
        """Whether all items are equally long (or there are none)."""
        return len(self.items) == 0 or bool(self.items[0, TILES] == self.items[-1, TILES])

    @property
    def nbytes(self) -> int:
        return int(self.items.nbytes + self.runs.nbytes + self.extra.nbytes)

    def on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """items, runs, extra on that device; copied once. One buffer, so that one copy does."""
        if device not in self._on_device:
            flat = np.concatenate([self.items.ravel(), self.runs.ravel(), self.extra.ravel()])
            buffer = torch.from_numpy(flat).to(device)
            a, b = self.items.size, self.items.size + self.runs.size
            self._on_device[device] = (
                buffer[:a].view(-1, RECORD_WORDS),
                buffer[a:b].view(-1, RECORD_WORDS),
                buffer[b:].view(-1, EXTRA_WORDS),
            )
        return self._on_device[device]


@lru_cache(maxsize=512)
def forward_table(
    slices: Slices, q_len: int, k_len: int, rows: int, columns: int, settled: Ranges = (), whole: bool = True
) -> TileTable:
    """Per tile of ``rows`` queries its tiles of ``columns`` keys.

    settled: ranges of rows to mark, cut at multiples of ``rows`` or at the end. whole=False leaves out row tiles that are
    neither marked nor see anything.
    """
    table = _build(slices.table, q_len, k_len, rows, columns)
    if not settled and whole:
        return table
    marks = np.zeros(-(-q_len // rows), dtype=np.int32)
    for begin, end in settled:
        assert begin % rows == 0 and (end % rows == 0 or end == q_len), "settled rows end inside a tile"
        marks[begin // rows : -(-end // rows)] = 1
    items = table.items.copy()
    items[:, SETTLED] = marks[items[:, ROW_TILE]]
    return replace(table, items=items if whole else items[(items[:, TILES] > 0) | (items[:, SETTLED] > 0)], _on_device={})


@lru_cache(maxsize=512)
def backward_table(slices: Slices, q_len: int, k_len: int, rows: int, columns: int) -> TileTable:
    """Per tile of ``rows`` keys its tiles of ``columns`` queries: rows of the table are keys, columns are queries."""
    q0, q1, k0, k1, lo, hi = slices.table.T
    return _build(np.stack([k0, k1, q0, q1, -hi, -lo], axis=1), k_len, q_len, rows, columns)


def _ranges(begin: IntArray, end: IntArray) -> tuple[IntArray, IntArray]:
    """All integers of [begin[i], end[i]), one after the other, and the i of each."""
    count = np.maximum(end - begin, 0)
    owner = np.repeat(np.arange(len(count)), count)
    first = np.repeat(np.cumsum(count) - count, count)
    return begin[owner] + np.arange(len(owner)) - first, owner


def _build(bands: IntArray, row_len: int, column_len: int, rows: int, columns: int) -> TileTable:
    row_tiles = -(-row_len // rows)
    r0, r1, c0, c1, lo, hi = bands.T
    # One entry per Slice and row tile that it touches: the columns [a, b) it reaches there, and the tiles it fills.
    tile, band = _ranges(r0 // rows, -(-r1 // rows))
    top, bottom = np.maximum(r0[band], tile * rows), np.minimum(r1[band], (tile + 1) * rows)
    a, b = np.maximum(c0[band], top + lo[band]), np.minimum(c1[band], bottom + hi[band])
    keep = b > a
    tile, band, top, bottom, a, b = (x[keep] for x in (tile, band, top, bottom, a, b))
    first, last = a // columns, -(-b // columns)
    whole_rows = (top == tile * rows) & (bottom == np.minimum((tile + 1) * rows, row_len))
    full_first = np.maximum(first, -(-np.maximum(c0[band], bottom - 1 + lo[band]) // columns))
    full_last = np.minimum(last, np.minimum(c1[band], top + hi[band] + 1) // columns)
    none = ~whole_rows | (full_last <= full_first)
    full_first, full_last = np.where(none, last, full_first), np.where(none, last, full_last)

    full = _merge_adjacent(np.stack([tile, full_first, full_last], axis=1)[~none])
    before, i = _ranges(first, full_first)
    after, j = _ranges(full_last, last)
    columns_of, entry = np.concatenate([before, after]), np.concatenate([i, j])
    masked, extra = _share_tiles(tile[entry], columns_of, band[entry], bands)
    return _pack(masked, extra, full, bands, row_tiles, rows, columns)


def _merge_adjacent(full: IntArray) -> IntArray:
    """Full runs (row tile, begin, end) with those that touch joined."""
    full = full[np.lexsort((full[:, 1], full[:, 0]))]
    if not len(full):
        return full
    new = np.ones(len(full), dtype=bool)
    new[1:] = (full[1:, 0] != full[:-1, 0]) | (full[1:, 1] != full[:-1, 2])
    starts = np.flatnonzero(new)
    ends = np.append(starts[1:], len(full)) - 1
    return np.stack([full[starts, 0], full[starts, 1], full[ends, 2]], axis=1)


def _share_tiles(tile: IntArray, column: IntArray, band: IntArray, bands: IntArray) -> tuple[IntArray, IntArray]:
    """Masked runs (row tile, begin, end, band, extra begin, extra end) and the bands (by number) that `extra` lists.

    Bands with disjoint rows share one pass over a tile, bands that share rows take turns. Neighbouring tiles masked by one and
    the same band become one run.
    """
    order = np.lexsort((bands[band, 0], column, tile))
    tile, column, band = tile[order], column[order], band[order]
    new_tile = np.ones(len(tile), dtype=bool)
    new_tile[1:] = (tile[1:] != tile[:-1]) | (column[1:] != column[:-1])
    group = np.cumsum(new_tile) - 1
    overlaps = ~new_tile
    if len(tile):
        overlaps[1:] &= bands[band[1:], 0] < bands[band[:-1], 1]
    # `turn` numbers the passes over a tile. Almost all tiles need one; the few others are coloured greedily.
    turn = np.zeros(len(tile), dtype=np.int64)
    sizes = np.bincount(group) if len(tile) else np.zeros(0, dtype=np.int64)
    begins = np.cumsum(sizes) - sizes
    for g in np.unique(group[overlaps]):
        free_from: list[int] = []  # per pass, the row after its last band
        for e in range(begins[g], begins[g] + sizes[g]):
            r0, r1 = bands[band[e], :2]
            turn[e] = next((t for t, row in enumerate(free_from) if row <= r0), len(free_from))
            free_from[turn[e] : turn[e] + 1] = [r1]
    order = np.lexsort((turn, group))
    tile, column, band, turn, group = (x[order] for x in (tile, column, band, turn, group))
    new_pass = np.ones(len(tile), dtype=bool)
    new_pass[1:] = (group[1:] != group[:-1]) | (turn[1:] != turn[:-1])
    leader = np.flatnonzero(new_pass)
    count = np.append(leader[1:], len(tile)) - leader if len(leader) else leader
    extra = band[~new_pass]
    extra_begin = np.cumsum(count - 1) - (count - 1)
    passes = np.stack(
        [tile[leader], column[leader], column[leader] + 1, band[leader], extra_begin, extra_begin + count - 1], axis=1
    )
    # Join neighbours under one band alone.
    passes = passes[np.lexsort((passes[:, 1], passes[:, 3], passes[:, 0]))]
    if len(passes):
        alone = passes[:, 4] == passes[:, 5]
        new = np.ones(len(passes), dtype=bool)
        joined = alone[1:] & alone[:-1] & (passes[1:, 3] == passes[:-1, 3])
        new[1:] = ~(joined & (passes[1:, 0] == passes[:-1, 0]) & (passes[1:, 1] == passes[:-1, 2]))
        starts = np.flatnonzero(new)
        ends = np.append(starts[1:], len(passes)) - 1
        merged = passes[starts]
        merged[:, 2] = passes[ends, 2]
        passes = merged
    return passes, extra


def _pack(
    masked: IntArray, extra: IntArray, full: IntArray, bands: IntArray, row_tiles: int, rows: int, columns: int
) -> TileTable:
    runs = np.zeros((len(masked) + len(full), RECORD_WORDS), dtype=np.int64)
    m = len(masked)
    runs[:m, ROW_TILE] = masked[:, 0]
    runs[:m, COLUMN_TILE : COLUMN_TILE_END + 1] = masked[:, 1:3]
    runs[:m, EXTRA_BEGIN : EXTRA_END + 1] = masked[:, 4:6]
    runs[:m, BAND : BAND + 6] = bands[masked[:, 3]]
    runs[m:, ROW_TILE : ROW_TILE + 1] = full[:, :1]
    runs[m:, COLUMN_TILE : COLUMN_TILE_END + 1] = full[:, 1:3]
    runs[m:, EXTRA_BEGIN : EXTRA_END + 1] = -1
    runs = runs[np.argsort(runs[:, ROW_TILE], kind="stable")]  # masked runs of a row tile stay before its full ones
    owner, is_masked = runs[:, ROW_TILE].copy(), runs[:, EXTRA_BEGIN] >= 0
    length = runs[:, COLUMN_TILE_END] - runs[:, COLUMN_TILE]
    items = np.zeros((row_tiles, RECORD_WORDS), dtype=np.int64)
    items[:, ROW_TILE] = np.arange(row_tiles)
    items[:, TILES] = np.bincount(owner, weights=length, minlength=row_tiles)
    items[:, MASKED_TILES] = np.bincount(owner, weights=length * is_masked, minlength=row_tiles)
    items[:, RUN_BEGIN] = np.searchsorted(owner, np.arange(row_tiles), side="left")
    items[:, RUN_END] = np.searchsorted(owner, np.arange(row_tiles), side="right")
    some = items[:, RUN_END] > items[:, RUN_BEGIN]
    items[some, COLUMN_TILE:MASKED_TILES] = runs[items[some, RUN_BEGIN], COLUMN_TILE:MASKED_TILES]
    items = items[np.argsort(-items[:, TILES], kind="stable")]
    further = np.zeros((len(extra), EXTRA_WORDS), dtype=np.int64)
    further[:, :6] = bands[extra]
    return TileTable(items.astype(np.int32), runs.astype(np.int32), further.astype(np.int32), rows, columns)
