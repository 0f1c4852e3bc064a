"""Slices in the shapes of other people's kernels, as arithmetic: every visible pair exactly once, by each library's own rules."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from ringflash.kernels import cpu, decompose
from ringflash.kernels.decompose import UNLIMITED, Pack
from ringflash.slices import UNBOUNDED, Slice, Slices
from ringflash.testing.slice_cases import CASES, SliceCase, visible

BANDS = [case for case in CASES if len(case.slices) == 1]
SEEING = [case for case in CASES if len(case.slices)]


def every_small_band() -> Iterable[Slices]:
    """All bands in rectangles of a few rows and keys, off the origin."""
    for rows in (1, 2, 3, 5):
        for keys in (1, 2, 4):
            bounds = [-UNBOUNDED, *range(-rows - 1, keys + 2), UNBOUNDED]
            for lo in bounds:
                for hi in bounds:
                    table = Slices.from_rows([(3, 3 + rows, 1, 1 + keys, lo - 2, hi - 2)])
                    if len(table):
                        yield table


def pairs(slices: Iterable[Slice]) -> Tensor:
    return visible(Slices.from_rows(slices), 12, 12)


def test_cut_by_bounds() -> None:
    for table in every_small_band():
        pieces = decompose.by_bounds(table[0])
        assert torch.equal(pairs(pieces), pairs(table))
        assert Slices.from_rows(pieces) == Slices(np.array(pieces)), "pieces are tight"
        for piece in pieces:
            assert decompose.is_full(piece) or piece.q1 - piece.q0 <= piece.k1 - piece.k0


def test_fulls_and_causal_squares() -> None:
    for table in every_small_band():
        if not decompose.lower_bound_matters(table[0]):
            parts = decompose.fulls_and_causal_squares(table[0])
            assert torch.equal(pairs(parts), pairs(table))
            assert all(decompose.is_full(part) or decompose.is_causal_square(part) for part in parts)


def test_a_plain_shape_is_not_cut() -> None:
    for shape in (Slices.causal(9, 9), Slices.full_rectangle(9, 4)):
        assert decompose.fulls_and_causal_squares(shape[0]) == [shape[0]]
        assert decompose.windowed(shape[0]) == [shape[0]]
        assert cpu.parts(shape[0]) == (shape[0],)


def test_is_full_agrees_with_the_table() -> None:
    for table in every_small_band():
        assert decompose.is_full(table[0]) == bool(table.full[0])


def test_row_blocks_and_core() -> None:
    for table in every_small_band():
        blocks = list(decompose.row_blocks(table[0], 2))
        assert torch.equal(pairs(blocks), pairs(table))
        for block in blocks:
            a, b = decompose.core(block)
            seen_by_all = pairs([block])[block.q0 : block.q1].all(0).nonzero().flatten().tolist()
            assert seen_by_all == list(range(a, b))


def test_parts_of_the_cpu_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "SMALL", 0)
    monkeypatch.setattr(cpu, "WIDE", 2)
    monkeypatch.setattr(cpu, "_block_rows", lambda s: 2)
    for table in every_small_band():
        cpu.parts.cache_clear()
        assert torch.equal(pairs(cpu.parts(table[0])), pairs(table))
    cpu.parts.cache_clear()


def test_masks_of_the_cpu_kernel_stay_small() -> None:
    """Memory linear in the sequence: no masked part of a 64k band has more scores than a few row blocks."""
    n = 1 << 16
    for row in ((0, n, 0, n, -4095, 0), (0, n, 0, n, -n // 2, n // 3), (0, n, 0, n, 5, UNBOUNDED), (0, n, 0, n, -UNBOUNDED, -3)):
        table = Slices.from_rows([row])
        parts = cpu.parts(table[0])
        masked = [s for s in parts if not decompose.is_full(s) and not decompose.is_causal_square(s)]
        assert max(((s.q1 - s.q0) * (s.k1 - s.k0) for s in masked), default=0) <= 512 * (cpu.WIDE + 1024)
        assert Slices.from_rows(parts).area() == table.area()
        computed = sum((s.q1 - s.q0) * (s.k1 - s.k0) for s in masked) + sum(
            int(Slices.from_rows([s]).area()) for s in parts if s not in set(masked)
        )
        assert computed <= 1.3 * table.area()


def as_flash_attention_2(rows: int, keys: int, left: int, right: int, max_keys: int) -> Tensor:
    """(rows, keys) bool: what FlashAttention-2 computes for a window, its treatment of large and of absent sides included."""
    left, right = (UNLIMITED if side >= max_keys else side for side in (left, right))
    if left == UNLIMITED and right == UNLIMITED:
        return torch.ones(rows, keys, dtype=torch.bool)
    left, right = (max_keys if side == UNLIMITED else side for side in (left, right))
    offset = torch.arange(keys) - torch.arange(rows)[:, None] - (keys - rows)
    return (offset >= -left) & (offset <= right)


def shown(s: Slice) -> Tensor:
    return visible(Slices.from_rows([s]), s.q1, s.k1)[s.q0 :, s.k0 :]


def test_windows_of_dense_calls() -> None:
    for table in every_small_band():
        pieces = decompose.windowed(table[0])
        assert torch.equal(pairs(pieces), pairs(table))
        for piece in pieces:
            rows, keys = piece.q1 - piece.q0, piece.k1 - piece.k0
            assert torch.equal(as_flash_attention_2(rows, keys, *decompose.window(piece), keys), shown(piece))


def assert_packs_show(packs: list[Pack], slices: Slices, q_len: int, k_len: int, batch: int = 2) -> None:
    """Each pack's variable-length call shows its Slices, in every sequence of the batch, and all packs together the table."""
    assert sorted(s for pack in packs for s in pack.slices) == sorted(piece for s in slices for piece in decompose.windowed(s))
    for pack in packs:
        max_rows, max_keys = pack.longest
        cu_q, cu_k = pack.cumulative(batch, q_len, k_len)
        assert len(cu_q) == len(cu_k) and cu_q[0] == cu_k[0] == 0
        seen = torch.zeros(batch * q_len, batch * k_len, dtype=torch.bool)
        for (q0, q1), (k0, k1) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
            assert q0 <= q1 and k0 <= k1
            if q1 > q0 and k1 > k0:
                assert q1 - q0 <= max_rows and k1 - k0 <= max_keys
                seen[q0:q1, k0:k1] = as_flash_attention_2(q1 - q0, k1 - k0, *pack.window, max_keys)
        for b in range(batch):
            expected = visible(Slices.from_rows(pack.slices), q_len, k_len)
            assert torch.equal(seen[b * q_len : (b + 1) * q_len, b * k_len : (b + 1) * k_len], expected)
        assert int(seen.sum()) == batch * Slices.from_rows(pack.slices).area()
        covered = visible(Slices.from_rows(pack.slices), q_len, k_len)
        assert [i for a, b in pack.row_runs() for i in range(a, b)] == covered.any(1).nonzero().flatten().tolist()
        assert [j for a, b in pack.key_runs() for j in range(a, b)] == covered.any(0).nonzero().flatten().tolist()


@pytest.mark.parametrize("case", SEEING, ids=str)
def test_packs_of_the_cases(case: SliceCase) -> None:
    pieces = [piece for s in case.slices for piece in decompose.windowed(s)]
    assert_packs_show(decompose.packs(pieces), case.slices, case.q_len, case.k_len)


@pytest.mark.parametrize("seed", range(50))
def test_packs_of_drawn_documents(seed: int) -> None:
    """Documents of all sizes under one window, some cut at either end, in one or two groups of bounds."""
    rng = np.random.default_rng(seed)
    lo = -UNBOUNDED if rng.random() < 0.4 else -int(rng.integers(0, 9))
    hi = UNBOUNDED if rng.random() < 0.4 else int(rng.integers(0, 5))
    rows, q, k = [], 0, 0
    for _ in range(int(rng.integers(1, 9))):
        q, k = q + int(rng.integers(0, 2)), k + int(rng.integers(0, 2))
        n, m = rng.integers(1, 12, 2).tolist() if rng.random() < 0.4 else [int(rng.integers(1, 12))] * 2
        shift = (k + m) - (q + n)  # aligned at the end, as a document cut at its start is
        rows.append((q, q + n, k, k + m, lo if lo == -UNBOUNDED else lo + shift, hi if hi == UNBOUNDED else hi + shift))
        q, k = q + n, k + m
    slices = Slices.from_rows(rows)
    pieces = [piece for s in slices for piece in decompose.windowed(s)]
    assert_packs_show(decompose.packs(pieces), slices, q + 2, k + 3)


def test_documents_share_one_call() -> None:
    """Of one window, whatever their lengths, single tokens and documents shorter than the window included."""
    lengths = np.random.default_rng(0).integers(1, 300, 2000).tolist()
    starts = np.cumsum([0, *lengths])[:-1].tolist()
    for lo, hi in ((-UNBOUNDED, 0), (-UNBOUNDED, UNBOUNDED), (-99, 0), (-7, 3)):
        table = Slices.from_rows([(a, a + n, a, a + n, lo, hi) for a, n in zip(starts, lengths, strict=True)])
        packs = decompose.packs(table)
        assert len(packs) == 1 and len(packs[0].slices) == len(table)
        assert len(packs[0].row_runs()) == 1


def test_slices_that_share_rows_or_keys_are_never_packed_together() -> None:
    table = Slices.from_rows([(0, 4, 0, 4, -9, 9), (0, 4, 4, 8, -9, 9), (4, 8, 0, 4, -9, 9), (4, 8, 4, 8, -9, 9)])
    for pack in decompose.packs(table):
        for a, b in pairwise(pack.slices):
            assert a.q1 <= b.q0 and a.k1 <= b.k0


class TestRepeats:
    def test_chunks_are_one_run(self) -> None:
        for n, m, lo, hi in ((4, 4, -9, 0), (3, 5, -9, 9), (5, 2, -9, 0)):
            table = Slices.from_rows([(i * n, i * n + n, i * m, i * m + m, lo + i * (m - n), hi + i * (m - n)) for i in range(7)])
            assert decompose.repeats(table) == [(table[0], 7)]

    def test_anything_else_is_not(self) -> None:
        square = (0, 4, 0, 4, -9, 0)
        for other in (
            (5, 9, 4, 8, -9, -1),  # a row between
            (4, 8, 5, 9, -9, 1),  # a key between
            (4, 8, 4, 8, -9, 9),  # another bound
            (4, 7, 4, 7, -9, 0),  # another size
            (0, 4, 4, 8, -9, 9),  # the same rows
        ):
            table = Slices.from_rows([square, other])
            assert decompose.repeats(table) == [(table[0], 1), (table[1], 1)]

    def test_none(self) -> None:
        assert decompose.repeats(Slices.from_rows([])) == []

    @pytest.mark.parametrize("case", SEEING, ids=str)
    def test_runs_are_the_table(self, case: SliceCase) -> None:
        rows = []
        for s, n in decompose.repeats(case.slices):
            height, width = s.q1 - s.q0, s.k1 - s.k0
            for i in range(n):
                shift = i * (width - height)
                rows.append(
                    (s.q0 + i * height, s.q1 + i * height, s.k0 + i * width, s.k1 + i * width, s.lo + shift, s.hi + shift)
                )
        assert Slices.from_rows(rows) == case.slices
