"""How long a device's units are busy with a call, against taking its tiles one by one."""

from __future__ import annotations

import heapq

import numpy as np
import pytest

from ringflash.mask import Mask
from ringflash.parallel.layout import make_layout
from ringflash.parallel.plan import make_plan
from ringflash.parallel.schedule import Schedule
from ringflash.parallel.work import _taken, stretch
from ringflash.parallel.world import PlanKey
from ringflash.slices import Slices
from ringflash.testing.cases import Drawing

TILE = 16


def one_by_one(slices: Slices, copies: int, units: int) -> float:
    """The same by the definition: every tile of rows, longest first, goes to whoever is free first."""
    q0, q1, k0, k1, lo, hi = (x.tolist() for x in slices.table.T)
    lengths: dict[int, int] = {}
    for a, b, c, d, low, high in zip(q0, q1, k0, k1, lo, hi, strict=True):
        for tile in range(a // TILE, -(-b // TILE)):
            top, bottom = max(a, tile * TILE), min(b, (tile + 1) * TILE)
            keys = -(-min(d, bottom + high) // TILE) - max(c, top + low) // TILE
            lengths[tile] = lengths.get(tile, 0) + max(keys, 0)
    free = [0] * units
    for length in sorted((n for n in lengths.values() for _ in range(copies)), reverse=True):
        heapq.heapreplace(free, free[0] + length)
    return max(free) * units / (sum(lengths.values()) * copies)


@pytest.mark.parametrize("seed", range(40))
def test_units_take_items_of_one_length_as_they_get_free(seed: int) -> None:
    d = Drawing(seed)
    free = np.array([d.between(0, 20) for _ in range(d.between(1, 9))], np.int64)
    length, n = d.between(1, 9), d.between(1, 40)
    expected = free.tolist()
    heapq.heapify(expected)
    for _ in range(n):
        heapq.heapreplace(expected, expected[0] + length)
    assert sorted(_taken(free, length, n).tolist()) == sorted(expected)


@pytest.mark.parametrize("layout", ["zigzag", "zigzag:3", "contiguous", "balanced"])
@pytest.mark.parametrize("mask", [Mask.causal(), Mask.causal(window=100), Mask.documents([70, 300, 5, 393])], ids=repr)
def test_a_call_takes_as_long_as_its_tiles_one_by_one(layout: str, mask: Mask) -> None:
    where = make_layout(layout, 768, 3, mask)
    for rank in range(3):
        for step in make_plan(PlanKey(mask, where, where, Schedule("allgather", 2), 4, 2, rank)).steps:
            for part in step.parts:
                for copies, units in ((1, 1), (1, 7), (4, 7), (4, 200)):
                    assert stretch(part.slices, TILE, copies, units) == pytest.approx(one_by_one(part.slices, copies, units))


def test_a_folded_zigzag_ends_together() -> None:
    """Four ranks, 128k tokens, 32 heads on 132 multiprocessors: what the last round of a forward pass costs the slowest rank."""

    def slowest(layout: str) -> float:
        where = make_layout(layout, 131_072, 4)
        schedule = Schedule("staged", rows=98_304)
        keys = [PlanKey(Mask.causal(), where, where, schedule, 32, 8, rank) for rank in range(4)]
        ranks = [[part.slices for step in make_plan(key).steps for part in step.parts] for key in keys]
        return max(sum(stretch(s, 128, 32, 132) * s.area() for s in rank) / sum(s.area() for s in rank) for rank in ranks)

    assert slowest("zigzag") == pytest.approx(1.0234, abs=2e-4)
    assert slowest("zigzag:8") < 1.003
