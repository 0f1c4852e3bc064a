"""The backward's work list as arithmetic: every visible pair once, no empty step, turns that number the visits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from ringflash.kernels import tiles_backward
from ringflash.kernels.tiles_backward import FAR, IDLE, Shape, WorkList, work_list
from ringflash.slices import UNBOUNDED, Slices

ROWS, KEYS = 64, 128
RECTANGLE = (0, 300, 0, 500, -UNBOUNDED, UNBOUNDED)
CASES = {
    "full, tails on both sides": [RECTANGLE],
    "full, no tail": [(0, 256, 0, 512, -UNBOUNDED, UNBOUNDED)],
    "causal": [(0, 700, 0, 700, -UNBOUNDED, 0)],
    "causal, keys longer": [(0, 300, 0, 500, -UNBOUNDED, 200)],
    "window": [(0, 900, 0, 900, -129, 0)],
    "window of one key": [(0, 900, 0, 900, 0, 0)],
    "documents, borders inside tiles": [(a, b, a, b, -UNBOUNDED, 0) for a, b in ((0, 70), (70, 71), (71, 300), (300, 600))],
    "prefix and causal: two passes over a tile": [(0, 600, 0, 100, -UNBOUNDED, UNBOUNDED), (0, 600, 100, 600, -UNBOUNDED, 0)],
    "sink keys and window: two passes": [(0, 600, 0, 4, -UNBOUNDED, -90), (0, 600, 0, 600, -89, 0)],
    "rows that see nothing": [(100, 200, 0, 300, -UNBOUNDED, UNBOUNDED)],
    "blocks": [
        (0, 64, 128, 256, -UNBOUNDED, UNBOUNDED),
        (64, 128, 0, 128, -UNBOUNDED, UNBOUNDED),
        (64, 192, 256, 300, -9999, 9999),
    ],
    "one pair": [(5, 6, 7, 8, -UNBOUNDED, UNBOUNDED)],
    "nothing": [],
}


@pytest.fixture(autouse=True)
def fresh_lists() -> Iterator[None]:
    """Lists of other tests may be of other costs."""
    work_list.cache_clear()
    yield
    work_list.cache_clear()


def visible(rows: list[tuple[int, int, int, int, int, int]], q_len: int, k_len: int) -> np.ndarray:
    i, j = np.arange(q_len)[:, None], np.arange(k_len)[None, :]
    seen = np.zeros((q_len, k_len), dtype=int)
    for q0, q1, k0, k1, lo, hi in rows:
        seen += (i >= q0) & (i < q1) & (j >= k0) & (j < k1) & (j - i >= lo) & (j - i <= hi)
    return seen


def covered(work: WorkList, shape: Shape) -> np.ndarray:
    """How often each (batch, head, query, key) is computed."""
    count = np.zeros((shape.batch, shape.heads, shape.q_len, shape.k_len), dtype=int)
    group = shape.heads // shape.kv_heads
    for run_begin, run_end, first_key, batch, kv_head, head_begin, head_end, _ in work.items.tolist():
        assert run_end > run_begin and head_end > head_begin, "an item is never empty"
        assert first_key % shape.keys == 0 and kv_head == head_begin // group == (head_end - 1) // group
        key = np.arange(first_key, first_key + shape.keys)[None, :]
        for begin, end, band_begin, bands in work.runs[run_begin:run_end].tolist():
            assert end > begin
            for m in range(begin, end):
                query = np.arange(m * shape.rows, (m + 1) * shape.rows)[:, None]
                seen = np.zeros((shape.rows, shape.keys), dtype=int)
                if bands % IDLE == 0:
                    assert key.max() < shape.k_len, "keys past the end are masked"
                    seen += 1
                users = np.zeros(shape.keys, dtype=int)
                for r0, r1, c0, c1, lo, hi, *_ in work.bands[band_begin : band_begin + bands % IDLE].tolist():
                    users += ((key >= r0) & (key < r1))[0]
                    seen += (key >= r0) & (key < r1) & (query >= c0) & (query < c1) & (query - key >= lo) & (query - key <= hi)
                assert users.max(initial=0) <= 1, "bands of one pass share no key: one interval per key"
                inside = seen[: shape.q_len - m * shape.rows, : shape.k_len - first_key]
                assert inside.any(), "no step is empty"
                for half, sees in enumerate(np.split(seen.any(axis=0), 2)):
                    assert bool(bands & IDLE << half) == (shape.halves and not sees.any()), "halves that see nothing are told"
                where = np.s_[
                    batch, head_begin:head_end, m * shape.rows : (m + 1) * shape.rows, first_key : first_key + shape.keys
                ]
                count[where] += inside
    return count


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "batch", "ctas", "halves"), [(1, 1, 1, 4, True), (4, 1, 2, 3, False), (6, 2, 1, 132, True)]
)
def test_every_visible_pair_is_computed_once(
    name: str, deterministic: bool, heads: int, kv_heads: int, batch: int, ctas: int, halves: bool
) -> None:
    rows = CASES[name]
    q_len, k_len = max((r[1] for r in rows), default=10), max((r[3] for r in rows), default=10)
    shape = Shape(q_len, k_len, batch, heads, kv_heads, 128, ROWS, KEYS, ctas, halves=halves)
    work = work_list(Slices.from_rows(rows), shape, deterministic=deterministic)
    expected = np.broadcast_to(visible(rows, q_len, k_len), (batch, heads, q_len, k_len))
    np.testing.assert_array_equal(covered(work, shape), expected)
    assert abs(work.bands).max(initial=0) <= 2 * FAR


@pytest.mark.parametrize("name", CASES)
def test_pairs_compute_every_visible_pair_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles_backward, "PAIR_STEP", 0.0)
    monkeypatch.setattr(tiles_backward, "PAIR_COST", (-10.0, -10.0))
    monkeypatch.setattr(tiles_backward, "PAIR_MASKED", 0.0)
    rows = CASES[name]
    q_len, k_len = max((r[1] for r in rows), default=10), max((r[3] for r in rows), default=10)
    shape = Shape(q_len, k_len, 2, 4, 2, 128, ROWS, KEYS, 5, pairs=True, halves=True)
    work = work_list.__wrapped__(Slices.from_rows(rows), shape)
    assert not rows or (work.pairs and work.keys == 2 * KEYS)
    expected = np.broadcast_to(visible(rows, q_len, k_len), (2, 4, q_len, k_len))
    np.testing.assert_array_equal(covered(work, replace(shape, keys=work.keys, halves=False)), expected)


def test_pairs_take_long_sequences() -> None:
    def paired(n: int, **options: bool) -> bool:
        return work_list(Slices.causal(n, n), Shape(n, n, 1, 16, 16, 128, ROWS, KEYS, 132, pairs=True), **options).pairs

    assert paired(16384) and paired(16384, write=True) and paired(16384, deterministic=True)
    assert not paired(256)


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_list_for_writing_gives_each_key_to_one_item(deterministic: bool) -> None:
    shape = Shape(2000, 2000, 2, 8, 2, 128, ROWS, KEYS, 132)
    work = work_list(Slices.causal(2000, 2000), shape, deterministic=deterministic, write=True)
    owners = [(key, batch, kv_head) for _, _, key, batch, kv_head, _, _, _ in work.items.tolist()]
    assert len(owners) == len(set(owners)) == work.whole == 2 * 2 * 16 and work.slots == 0


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("is_causal", "group", "ctas"), [(False, 2, 22), (True, 4, 7), (False, 1, 22)])
def test_the_last_items_of_a_list_may_be_divided_into_numbered_portions(
    is_causal: bool, group: int, ctas: int, deterministic: bool
) -> None:
    rows = Slices.causal(2100, 2000) if is_causal else Slices.full_rectangle(2100, 2000)
    shape = Shape(2100, 2000, 1 if is_causal else 3, 2 * group, 2, 128, ROWS, KEYS, ctas, portions=True)
    work = work_list(rows, shape, write=not deterministic, deterministic=deterministic)
    undivided = work_list(rows, replace(shape, portions=False), write=not deterministic, deterministic=deterministic)
    assert work.duration < undivided.duration and work.whole == undivided.whole == len(undivided.items)
    np.testing.assert_array_equal(covered(work, shape), covered(undivided, shape))
    groups: dict[tuple[int, ...], list[tuple[int, int, int]]] = defaultdict(list)
    for _, _, key, batch, kv_head, _, _, part in work.items.tolist():
        groups[key, batch, kv_head].append((part & 0x1FFF, part >> 13 & 0xFF, part >> 21))
    assert len(groups) == work.whole
    divided = [g for g in groups.values() if g != [(0, 0, 0)]]
    assert divided and sum(len(g) for g in divided) == work.slots
    used = [slot + index for g in divided for slot, index, _ in g]
    assert sorted(used) == list(range(work.slots)), "every portion has its own slot"
    for g in divided:
        assert [index for _, index, _ in g] == list(range(len(g))) and {(slot, count) for slot, _, count in g} == {
            (g[0][0], len(g))
        }


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("heads", [1, 7, 8, 16, 100])
def test_a_tile_has_no_more_portions_than_an_item_can_tell(heads: int, deterministic: bool) -> None:
    """One tile of keys, taken by 132 CTAs: divided by heads and by queries, each rounded up, there could be too many."""
    islands = Slices.from_rows([(a, a + 64, 0, 100, -UNBOUNDED, 9) for a in range(0, 20000, 128)])
    for rows in (Slices.full_rectangle(20000, 100), islands):
        shape = Shape(20000, 100, 1, heads, 1, 128, ROWS, KEYS, 132, portions=True)
        work = work_list(rows, shape, write=not deterministic, deterministic=deterministic)
        assert 1 < (work.items[:, 7] >> 21).max() <= tiles_backward.MAX_PORTIONS


def turn_of(work: WorkList, m: int, first_key: int, bands: int) -> int:
    """How many visits to query tile m come before this one, as the kernel counts them."""
    assert work.visits is not None and work.visit_offsets is not None
    after = first_key // work.keys + 1
    intervals = work.visits[work.visit_offsets[m] : work.visit_offsets[m + 1]]
    return (bands >> 16) + sum(max(b - max(a, after), 0) for a, b in intervals.tolist())


CROSSED = [(0, 448, 0, 128, -399, 100), (448, 640, 0, 128, -399, 90), (0, 640, 0, 128, -UNBOUNDED, -400)]
"""Three Slices with common keys; the third's tiles are second passes, after the first's and after the second's."""


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("ctas", [132, 6])
@pytest.mark.parametrize("name", [*CASES, "crossed"])
def test_turns_number_the_visits_and_nobody_waits_for_ever(
    name: str, ctas: int, pairs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if pairs:
        monkeypatch.setattr(tiles_backward, "PAIR_STEP", 0.1)
        monkeypatch.setattr(tiles_backward, "PAIR_COST", (-2.0, -2.0))
        monkeypatch.setattr(tiles_backward, "PAIR_MASKED", 0.0)
    monkeypatch.setattr(
        tiles_backward, "work_list", tiles_backward.work_list.__wrapped__
    )  # lists of other tests are of other costs
    rows = [*CASES.values(), CROSSED][[*CASES, "crossed"].index(name)]
    q_len, k_len = max((r[1] for r in rows), default=10), max((r[3] for r in rows), default=10)
    for heads in (2, 8):
        _run_in_turns(Slices.from_rows(rows), Shape(q_len, k_len, 2, heads, 2, 128, ROWS, KEYS, ctas, pairs, portions=True))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("q_len", "heads", "kv_heads"), [(1024, 64, 64), (4096, 4, 4), (4096, 16, 4)])
def test_deterministic_lists_hardly_wait(q_len: int, heads: int, kv_heads: int, is_causal: bool) -> None:
    shape = Shape(q_len, q_len, 1, heads, kv_heads, 128, ROWS, KEYS, 33, portions=True)
    slices = Slices.causal(q_len, q_len) if is_causal else Slices.full_rectangle(q_len, q_len)
    assert _run_in_turns(slices, shape) <= 0.1


def _run_in_turns(slices: Slices, shape: Shape) -> float:
    """Runs a deterministic list on its workers in lockstep: one step a tick, if its turn has come. The part of the ticks of busy
    workers that were spent waiting."""
    work = work_list(slices, shape, deterministic=True)
    done: dict[tuple[int, int, int], int] = defaultdict(int)
    left = [
        [(batch, h, m, turn_of(work, m, key, bands))
         for h in range(h0, h1) for begin, end, _, bands in work.runs[a:b].tolist() for m in range(begin, end)]
        for a, b, key, batch, _, h0, h1, _ in work.items.tolist()
    ]  # fmt: skip
    many = shape.ctas // 2 if work.pairs else shape.ctas
    workers: list[list[tuple[int, int, int, int]]] = [[] for _ in range(many)]
    steps = waits = 0
    while left or any(workers):
        for w in range(many):
            if not workers[w] and left:
                workers[w] = left.pop(0)
        ready = [w for w in workers if w and done[w[0][:3]] == w[0][3]]
        assert ready, "all wait"
        waits += sum(bool(w) for w in workers) - len(ready)
        steps += len(ready)
        for w in ready:
            done[w.pop(0)[:3]] += 1
    return waits / max(steps + waits, 1)


def test_the_visits_of_a_long_causal_sequence_are_linear_in_its_length() -> None:
    n = 1 << 17
    shape = Shape(n, n, 1, 1, 1, 128, ROWS, KEYS, 132)
    work = work_list(Slices.causal(n, n), shape, deterministic=True)
    assert work.visits is not None and len(work.visits) == n // ROWS
    assert len(work.runs) <= 3 * n // KEYS


def test_long_items_come_first_and_the_end_of_the_list_is_divided() -> None:
    shape = Shape(16384, 16384, 1, 16, 16, 128, ROWS, KEYS, 132)
    work = work_list(Slices.full_rectangle(16384, 16384), shape)
    steps = [int((work.runs[a:b, 1] - work.runs[a:b, 0]).sum()) for a, b in work.items[:, :2]]
    assert steps[0] == 256 and steps[-1] <= 8 and sum(steps) == 16 * 128 * 256
