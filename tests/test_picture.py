"""Pictures of plans: the regions they draw are those of the mask, and files come out for every kind of plan."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from ringflash import Mask, SimulatedWorld
from ringflash.parallel.cost import predict_all
from ringflash.parallel.layout import make_layout
from ringflash.parallel.memory import Shape
from ringflash.parallel.picture import MOST_POLYGONS, coverage, draw_plan, polygons, rank_colours, regions
from ringflash.parallel.plan import steps_of
from ringflash.parallel.schedule import Schedule
from ringflash.parallel.tables import DEFAULTS
from ringflash.slices import area
from ringflash.testing import visibility

MASKS = [
    Mask.causal(),
    Mask.causal(window=9),
    Mask.documents([5, 0, 30, 29]),
    Mask.prefix(20),
    Mask.chunked(7),
    Mask.window(3, 11),
]
DILATED = Mask.dilated(3, window=4) & Mask.causal()


def png_size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:24])
    return width, height


@pytest.mark.parametrize("mask", [*MASKS, DILATED], ids=repr)
def test_cells_are_covered_as_the_mask_says(mask: Mask) -> None:
    seen = visibility(mask, 64, 64).numpy()
    assert np.array_equal(coverage(mask, 0, 64, 64), seen)
    assert np.array_equal(coverage(mask, 16, 32, 32), seen[16:48, 16:48])
    if mask is not DILATED:  # its share of a larger cell is an average
        assert np.allclose(coverage(mask, 0, 64, 16), seen.reshape(16, 4, 16, 4).mean((1, 3)))


@pytest.mark.parametrize("mask", MASKS, ids=repr)
def test_regions_are_all_that_is_visible_and_belong_to_their_ranks(mask: Mask) -> None:
    layout = make_layout("zigzag", 64, 3)
    rows, q_rank, k_rank = regions(mask, layout)
    assert area(rows).sum() == visibility(mask, 64, 64).sum()
    owner = {p: rank for rank in range(3) for p in layout.positions(rank).tolist()}
    for (q0, q1, k0, k1, _, _), q, k in zip(rows.tolist(), q_rank.tolist(), k_rank.tolist(), strict=True):
        assert {owner[p] for p in range(q0, q1)} == {q} and {owner[p] for p in range(k0, k1)} == {k}


def test_polygons_have_the_area_of_their_bands() -> None:
    rows, _, _ = regions(Mask.causal(window=2000), make_layout("contiguous", 8192, 4))
    x, y = polygons(rows)[..., 0], polygons(rows)[..., 1]
    drawn = 0.5 * np.abs((x * np.roll(y, -1, 1) - y * np.roll(x, -1, 1)).sum(1))
    assert drawn == pytest.approx(area(rows), rel=1e-2, abs=1024)


def test_steps_and_colours() -> None:
    full = SimulatedWorld(3, "contiguous", "ring").plan(0, Mask.full(), 9, 9, 1, 1)
    assert steps_of(full.key).tolist() == [[0, 2, 1], [1, 0, 2], [2, 1, 0]]
    first = SimulatedWorld(3, "contiguous", "ring").plan(0, Mask.prefix(3), 9, 9, 1, 1)
    assert steps_of(first.key).tolist() == [[0, 0, 0], [1, 0, 0], [2, 1, 0]]
    for n in (1, 8, 9, 64):
        assert len({tuple(c) for c in rank_colours(n).round(3)}) == n


@pytest.mark.parametrize(
    ("world", "mask", "seqlen"),
    [
        (SimulatedWorld(1, "zigzag", "ring"), Mask.full(), 1),
        (SimulatedWorld(4, "zigzag", "ring"), Mask.causal(), 131_072),
        (SimulatedWorld(4, "striped", "allgather"), Mask.causal(), 100),
        (SimulatedWorld(8, "striped", "staged:3"), Mask.causal(window=1000), 1 << 20),
        (SimulatedWorld(8, "contiguous", "hybrid", ulysses=2), Mask.window(500, 10), 20_000),
        (SimulatedWorld(8, "zigzag", "double_ring", inner=4), Mask.prefix(3000), 8192),
        (SimulatedWorld(4, "zigzag", "ulysses"), DILATED, 4096),
        (SimulatedWorld(2, "zigzag", "ulysses:2"), Mask.causal(), 65_536),
        (SimulatedWorld(4, "zigzag", Schedule("ring", ulysses=2, head_groups=2)), Mask.causal(), 4096),
        (SimulatedWorld(5, "balanced", "ring"), Mask.documents([600, 0, 1, 399, 3096]), 4096),
        (SimulatedWorld(9, "contiguous", "ring"), Mask.blocks(np.zeros((2, 2), dtype=bool), 64), 128),  # nothing to compute
        (SimulatedWorld(6, "zigzag", "ring"), Mask.causal(), 3),  # ranks that hold nothing
    ],
    ids=lambda x: str(x.schedule) if isinstance(x, SimulatedWorld) else None,
)
def test_every_kind_of_plan_has_a_picture(world: SimulatedWorld, mask: Mask, seqlen: int, tmp_path: Path) -> None:
    path = tmp_path / "plan.png"
    draw_plan(world.for_mask(mask), mask, seqlen, 8, 2, 64, path)
    width, height = png_size(path)
    assert width > 1000 and height > 500 and path.stat().st_size > 10_000


def test_bars_and_hatches_fill_a_pass(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Between groups of heads, too, a rank may wait."""
    drawn: list[tuple[float, float]] = []

    def record(_: Any, spans: list[tuple[float, float]], y: tuple[float, float], **_look: Any) -> None:
        if y[0] == pytest.approx(-0.4):  # rank 0, above what is under way
            drawn.extend(spans)

    monkeypatch.setattr("matplotlib.axes.Axes.broken_barh", record)
    world, h200 = SimulatedWorld(4, "zigzag", Schedule("ring", ulysses=2, head_groups=2)), DEFAULTS["cuda"]
    draw_plan(world, Mask.causal(), 4096, 8, 8, 64, tmp_path / "plan.png", tables=h200)
    plans = [world.plan(rank, Mask.causal(), 4096, 4096, 8, 8) for rank in range(4)]
    found = predict_all(plans, h200.device, h200.link, Shape(1, 64, 64, 2))[0]
    assert found.forward.leave_s > 0 < found.backward.enter_s
    assert sum(length for _, length in drawn) == pytest.approx(1e3 * (found.forward.total_s + found.backward.total_s))


def test_ten_thousand_documents_on_64_ranks_as_polygons_and_as_an_image(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 209, size=10_000)
    lengths[-1] += (1 << 20) - lengths.sum()
    mask = Mask.documents(lengths)
    world = SimulatedWorld(64, "contiguous", "ring").for_mask(mask)
    assert len(regions(mask, world.layout_of(1 << 20))[0]) < MOST_POLYGONS  # still polygons; twice as many are not
    draw_plan(world, mask, 1 << 20, 8, 2, 64, tmp_path / "polygons.png")
    halves = np.stack([lengths // 2, lengths - lengths // 2], axis=1).ravel()
    draw_plan(world.for_mask(Mask.documents(halves)), Mask.documents(halves), 1 << 20, 8, 2, 64, tmp_path / "image.png")
    assert png_size(tmp_path / "polygons.png") == png_size(tmp_path / "image.png")
