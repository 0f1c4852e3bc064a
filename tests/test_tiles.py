"""Tile tables against brute force: each visible pair once, full tiles marked, no empty tile, longest first."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringflash.kernels import tiles
from ringflash.slices import UNBOUNDED, Slices

OPEN = UNBOUNDED


def documents(lengths: list[int], causal: bool = True) -> list[tuple[int, ...]]:
    ends = np.cumsum(lengths)
    return [(e - n, e, e - n, e, -OPEN, 0 if causal else OPEN) for n, e in zip(lengths, ends.tolist(), strict=True)]


CASES = {
    "nothing": (200, 200, []),
    "full, tails on both sides": (333, 517, [(0, 333, 0, 517, -OPEN, OPEN)]),
    "causal, on the tile's edge": (256, 256, [(0, 256, 0, 256, -OPEN, 0)]),
    "causal, one off": (257, 255, [(0, 257, 0, 255, -OPEN, 0)]),
    "window of one tile and a half": (1000, 1000, [(0, 1000, 0, 1000, -95, 0)]),
    "documents: tiny, empty, odd": (711, 711, documents([1, 7, 0, 130, 33, 29, 511])),
    "bidirectional documents": (700, 700, documents([100, 3, 200, 97, 300], causal=False)),
    "prefix: two Slices of one row in a tile": (600, 600, [(0, 600, 0, 150, -OPEN, OPEN), (0, 600, 150, 600, -OPEN, 0)]),
    "striped bands": (640, 640, [(0, 640, 0, 640, -300, -17), (0, 640, 0, 640, 50, 90)]),
    "blocks smaller than a tile": (
        256,
        256,
        [(32 * a, 32 * a + 32, 32 * b, 32 * b + 32, -OPEN, OPEN) for a, b in [(0, 0), (0, 2), (1, 1), (3, 0), (3, 1), (5, 7)]],
    ),
    "rows that see nothing": (500, 300, [(100, 250, 37, 290, -OPEN, 0), (400, 450, 0, 300, -OPEN, OPEN)]),
}


def covered(table: tiles.TileTable, row_len: int, column_len: int) -> np.ndarray:
    """How often the table computes each pair, reading it as the kernel does."""
    times = np.zeros((row_len, column_len), dtype=np.int64)
    i, j = np.arange(row_len)[:, None], np.arange(column_len)[None, :]
    seen_tiles = set()
    for item in table.items:
        tile, count, begin, end, masked = (int(item[w]) for w in (0, 1, 2, 3, tiles.MASKED_TILES))
        assert tile not in seen_tiles
        seen_tiles.add(tile)
        if end > begin:
            assert (item[4:14] == table.runs[begin, 4:14]).all()
        order = []
        for run in table.runs[begin:end]:
            for column in range(run[4], run[5]):
                box = (i // table.rows == tile) & (j // table.columns == column)
                assert box.any(), "outside the buffers"
                order.append(run[6] >= 0)
                if run[6] < 0:
                    assert (column + 1) * table.columns <= column_len, "a full tile reaches past the keys"
                    times += box
                    continue
                rows_seen = np.zeros((row_len, 1), dtype=np.int64)
                visible = np.zeros_like(box)
                for r0, r1, c0, c1, lo, hi in [run[8:14], *table.extra[run[6] : run[7], :6]]:
                    mine = (i >= r0) & (i < r1)
                    rows_seen += mine
                    visible |= box & mine & (j >= c0) & (j < c1) & (j - i >= lo) & (j - i <= hi)
                assert rows_seen.max() <= 1, "two bands of one pass share a row"
                assert visible.any(), "an empty tile"
                times += visible
        assert len(order) == count
        assert order == sorted(order, reverse=True) and sum(order) == masked, "masked tiles come first and are counted"
    assert seen_tiles == set(range(-(-row_len // table.rows)))
    assert (np.diff(table.items[:, tiles.TILES]) <= 0).all(), "longest first"
    return times


def visibility(rows: list[tuple[int, ...]], q_len: int, k_len: int) -> np.ndarray:
    i, j = np.arange(q_len)[:, None], np.arange(k_len)[None, :]
    visible = np.zeros((q_len, k_len), dtype=bool)
    for q0, q1, k0, k1, lo, hi in rows:
        visible |= (i >= q0) & (i < q1) & (j >= k0) & (j < k1) & (j - i >= lo) & (j - i <= hi)
    return visible


def fully_visible_tiles(visible: np.ndarray, rows: int, columns: int) -> int:
    """Whole tiles in which one sees all; the last, shorter tile of columns is masked by its very length."""
    count = 0
    for a in range(0, visible.shape[0], rows):
        for b in range(0, visible.shape[1] - columns + 1, columns):
            count += bool(visible[a : a + rows, b : b + columns].all())
    return count


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tile", [(128, 128), (64, 80), (192, 128), (128, 32)])
def test_every_visible_pair_once(name: str, tile: tuple[int, int]) -> None:
    q_len, k_len, rows = CASES[name]
    visible = visibility(rows, q_len, k_len).astype(np.int64)
    slices = Slices.from_rows(rows)
    assert (covered(tiles.forward_table(slices, q_len, k_len, *tile), q_len, k_len) == visible).all()
    assert (covered(tiles.backward_table(slices, q_len, k_len, *tile), k_len, q_len) == visible.T).all()


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(("causal", "window", "striped", "full"))])
def test_full_tiles_are_marked(name: str) -> None:
    q_len, k_len, rows = CASES[name]
    table = tiles.forward_table(Slices.from_rows(rows), q_len, k_len, 32, 64)
    marked = int((table.items[:, tiles.TILES] - table.items[:, tiles.MASKED_TILES]).sum())
    assert marked == fully_visible_tiles(visibility(rows, q_len, k_len), 32, 64) > 0


def test_document_border_is_one_pass() -> None:
    slices = Slices.from_rows(documents([64, 64]))
    assert tiles.forward_table(slices, 128, 128, 128, 128).tiles == 1


@pytest.mark.parametrize(
    ("rows", "even"),
    [
        ([(0, 512, 0, 640, -OPEN, OPEN)], True),
        ([(0, 512, 0, 512, -OPEN, 0)], False),
        ([(0, 128, 0, 640, -OPEN, OPEN)], False),
        ([], True),
    ],
    ids=["full", "causal", "empty tiles", "nothing"],
)
def test_even_tables_are_known(rows: list[tuple[int, ...]], even: bool) -> None:
    assert tiles.forward_table(Slices.from_rows(rows), 512, 640, 128, 128).even is even


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_random_tables(data: st.DataObject) -> None:
    """Random disjoint bands: a random partition of the keys, bands stacked with gaps in it."""
    q_len, k_len = data.draw(st.integers(1, 90)), data.draw(st.integers(1, 90))
    cuts = sorted({0, k_len, *data.draw(st.lists(st.integers(0, k_len), max_size=3))})
    rows = []
    for k0, k1 in itertools.pairwise(cuts):
        lo = -q_len
        for _ in range(data.draw(st.integers(0, 3))):
            lo += data.draw(st.integers(0, 30))
            hi = lo + data.draw(st.integers(0, 60))
            q0 = data.draw(st.integers(0, q_len))
            rows.append((q0, data.draw(st.integers(q0, q_len)), k0, k1, lo, hi))
            lo = hi + 1
    tile = data.draw(st.sampled_from([(8, 8), (16, 24), (24, 8)]))
    slices = Slices.from_rows(rows)
    expected = visibility(rows, q_len, k_len).astype(np.int64)
    assert (covered(tiles.forward_table(slices, q_len, k_len, *tile), q_len, k_len) == expected).all()
    assert (covered(tiles.backward_table(slices, q_len, k_len, *tile), k_len, q_len) == expected.T).all()


@pytest.mark.parametrize(
    ("settled", "whole", "items"),
    [
        (((0, 128), (384, 500)), True, {0: 1, 1: 0, 2: 0, 3: 1}),
        (((0, 128), (384, 500)), False, {0: 1, 2: 0, 3: 1}),
        ((), False, {2: 0}),
        ((), True, {0: 0, 1: 0, 2: 0, 3: 0}),
    ],
)
def test_settled_row_tiles(settled: tiles.Ranges, whole: bool, items: dict[int, int]) -> None:
    """Row tiles that settle are marked; those that neither settle nor see anything can be left out."""
    slices = Slices.from_rows([(300, 310, 0, 640, -OPEN, OPEN)])
    table = tiles.forward_table(slices, 500, 640, 128, 128, settled, whole)
    assert {int(i[tiles.ROW_TILE]): int(i[tiles.SETTLED]) for i in table.items} == items
    assert table.tiles == 5 and int(table.items[0, tiles.ROW_TILE]) == 2, "longest first"
    with pytest.raises(AssertionError, match="inside a tile"):
        tiles.forward_table(slices, 500, 640, 128, 128, ((0, 100),), whole)
