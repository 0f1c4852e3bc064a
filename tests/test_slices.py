"""Slices as arithmetic: tight, disjoint to the eye of a brute-force painter, counted right, comparable."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringflash.slices import UNBOUNDED, Slices, area, settled_rows, tighten


def painted(rows: np.ndarray, q_len: int = 9, k_len: int = 11) -> np.ndarray:
    """How often each (row, key) of the buffers is shown."""
    i, j = np.arange(q_len)[:, None], np.arange(k_len)[None, :]
    seen = np.zeros((q_len, k_len), dtype=int)
    for q0, q1, k0, k1, lo, hi in rows.tolist():
        seen += (q0 <= i) & (i < q1) & (k0 <= j) & (j < k1) & (lo <= j - i) & (j - i <= hi)
    return seen


def drawn(rng: np.random.Generator) -> np.ndarray:
    """One band of any shape inside the buffers, often with bounds that it cannot reach."""
    q0, q1 = np.sort(rng.integers(0, 10, 2))
    k0, k1 = np.sort(rng.integers(0, 12, 2))
    lo, hi = rng.integers(-12, 13), rng.integers(-12, 13)
    lo = -UNBOUNDED if rng.random() < 0.2 else lo
    hi = UNBOUNDED if rng.random() < 0.2 else hi
    return np.array([[q0, q1, k0, k1, lo, hi]], dtype=np.int64)


def test_tightening_changes_nothing_that_is_seen_and_leaves_nothing_to_take() -> None:
    rng = np.random.default_rng(0)
    for _ in range(3000):
        row = drawn(rng)
        before = painted(row)
        tight, keep = tighten(row)
        assert bool(keep[0]) == bool(before.any()) and len(tight) == keep.sum()
        if not len(tight):
            continue
        assert np.array_equal(painted(tight), before)
        q0, q1, k0, k1, lo, hi = tight[0].tolist()
        q_seen, k_seen = np.flatnonzero(before.any(1)), np.flatnonzero(before.any(0))
        assert (q0, q1, k0, k1) == (q_seen[0], q_seen[-1] + 1, k_seen[0], k_seen[-1] + 1)
        assert len(q_seen) == q1 - q0 and len(k_seen) == k1 - k0, "every row sees a key and every key is seen"
        assert lo >= k0 - (q1 - 1) and hi <= k1 - 1 - q0, "bounds are not wider than the rectangle"
        assert bool(Slices(tight).full[0]) == bool(before[q0:q1, k0:k1].all())
        assert np.array_equal(tighten(tight)[0], tight), "once is enough"


def test_area_counts_pairs() -> None:
    rng = np.random.default_rng(1)
    rows = np.concatenate([drawn(rng) for _ in range(2000)])
    counted = np.array([painted(row[None]).sum() for row in rows])
    assert np.array_equal(area(rows), counted)
    assert np.array_equal(area(tighten(rows)[0]), counted[counted > 0])


def test_area_of_a_million_rows_does_not_overflow() -> None:
    n = 1 << 20
    assert Slices.causal(n, n).area() == n * (n + 1) // 2
    assert Slices.full_rectangle(n, n).area() == n * n


def test_constructors() -> None:
    assert np.array_equal(painted(Slices.causal(9, 11).table), np.tri(9, 11, 2, dtype=int))
    assert np.array_equal(painted(Slices.causal(9, 5).table, 9, 5), np.tri(9, 5, -4, dtype=int))
    assert painted(Slices.full_rectangle(9, 11).table).all()
    assert len(Slices.causal(0, 4)) == len(Slices.full_rectangle(4, 0)) == len(Slices.from_rows([])) == 0
    assert Slices.from_rows([(0, 2, 5, 9, -UNBOUNDED, 0)]) == Slices.from_rows([]), "what shows nothing is dropped"


def test_slices_are_values() -> None:
    one = Slices.from_rows([(0, 4, 0, 6, -UNBOUNDED, 1), (4, 6, 0, 2, -UNBOUNDED, UNBOUNDED)])
    same = Slices.from_rows([(0, 4, 0, 5, -3, 1), (4, 6, 0, 2, -99, 99)])
    assert one == same and hash(one) == hash(same), "bounds that mask nothing have one spelling"
    copy = pickle.loads(pickle.dumps(one))
    assert copy == one and hash(copy) == hash(one)
    assert one != Slices.causal(4, 6) and one != "slices"
    assert [tuple(s) for s in one] == [tuple(row) for row in one.table.tolist()] and one[0] == tuple(one.table[0])
    assert one[1:] == Slices.from_rows([(4, 6, 0, 2, -9, 9)])
    with pytest.raises(ValueError):
        one.table[0, 0] = 3


CALLS = st.lists(st.lists(st.tuples(st.integers(0, 59), st.integers(1, 30)), max_size=3), min_size=1, max_size=5)


@given(st.integers(1, 60), st.integers(1, 20), CALLS)
def test_settled_rows_hold_each_row_once_after_its_last_call(q_len: int, granule: int, rows: list[list[tuple[int, int]]]) -> None:
    calls = [Slices.from_rows([(q0, min(q0 + n, q_len), 0, 8, -100, 100) for q0, n in call if q0 < q_len]) for call in rows]
    settled = settled_rows(calls, q_len, granule)
    owner = np.full(q_len, -1)
    for number, ranges in enumerate(settled):
        for begin, end in ranges:
            assert begin % granule == 0 and (end % granule == 0 or end == q_len)
            assert (owner[begin:end] == -1).all()
            owner[begin:end] = number
    touched = np.zeros((len(calls), q_len), dtype=bool)
    for number, slices in enumerate(calls):
        for s in slices:
            touched[number, s.q0 : s.q1] = True
    for block in range(0, q_len, granule):
        calls_there = np.flatnonzero(touched[:, block : block + granule].any(1))
        assert (owner[block : block + granule] == (calls_there[-1] if len(calls_there) else 0)).all()
