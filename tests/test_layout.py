"""Layouts partition the sequence, whatever its length; the balanced one is balanced."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest

from ringflash.mask import Mask
from ringflash.parallel import layout as layout_module
from ringflash.parallel.layout import KINDS as NAMES
from ringflash.parallel.layout import Layout, make_layout, read_kind
from ringflash.testing import read_mask, visibility

KINDS = (*NAMES, "zigzag:2", "zigzag:3")
WORLDS = (1, 2, 3, 4, 5, 7, 8, 16)
LENGTHS = (0, 1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 32, 33, 100, 1023)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", WORLDS)
def test_every_position_is_held_exactly_once(kind: str, world: int) -> None:
    for seqlen in LENGTHS:
        layout = make_layout(kind, seqlen, world, Mask.causal())
        assert (layout.world, layout.seqlen) == (world, seqlen)
        held = [layout.positions(rank) for rank in range(world)]
        assert tuple(len(h) for h in held) == layout.lengths
        everything = np.concatenate(held)
        assert np.array_equal(np.sort(everything), np.arange(seqlen))
        assert np.array_equal(everything[layout.inverse], np.arange(seqlen)), "inverse puts the ranks' buffers into order"
        for runs in layout.ranks:
            assert all(run.length > 0 for run in runs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", WORLDS)
def test_ranks_hold_even_shares(kind: str, world: int) -> None:
    pieces_per_rank = {"contiguous": 1, "zigzag": 2, "zigzag:2": 4, "zigzag:3": 6, "striped": 1}
    for seqlen in LENGTHS:
        lengths = make_layout(kind, seqlen, world, Mask.causal()).lengths
        # A piece may be one token longer than another, and balanced draws how many pieces a rank gets.
        assert max(lengths) - min(lengths) <= pieces_per_rank.get(kind, 16)


@pytest.mark.parametrize("kind", KINDS)
def test_positions_ascend_within_a_rank(kind: str) -> None:
    """A causal mask between two ascending buffers is one staircase, and the tokens of a rank stay in reading order."""
    for world in WORLDS:
        for seqlen in LENGTHS:
            layout = make_layout(kind, seqlen, world, Mask.causal(window=9))
            for rank in range(world):
                assert (np.diff(layout.positions(rank)) > 0).all()


def test_the_layouts_are_what_their_names_say() -> None:
    def positions(kind: str, seqlen: int, world: int) -> list[list[int]]:
        layout = make_layout(kind, seqlen, world)
        return [layout.positions(rank).tolist() for rank in range(world)]

    assert positions("contiguous", 8, 4) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert positions("zigzag", 8, 4) == [[0, 7], [1, 6], [2, 5], [3, 4]]
    assert positions("zigzag:1", 8, 4) == positions("zigzag", 8, 4)
    assert positions("zigzag:2", 16, 4) == [[0, 7, 8, 15], [1, 6, 9, 14], [2, 5, 10, 13], [3, 4, 11, 12]]
    assert positions("zigzag:2", 5, 2) == [[1, 2, 4], [0, 3]]  # eight pieces, of one token or of none
    assert positions("striped", 8, 4) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert positions("striped", 2, 4) == [[0], [1], [], []]
    assert positions("striped", 6, 4) == [[0, 4], [1, 5], [2], [3]]


@pytest.mark.parametrize("kind", ["zigzag:0", "zigzag:", "zigzag:-1", "zigzag:2.5", "striped:2", "spiral", "", None])
def test_a_name_of_no_layout_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=r"unknown layout .*; allowed are contiguous, zigzag, striped, balanced, zigzag:K"):
        read_kind(kind)


def test_every_rank_of_a_folded_zigzag_has_short_and_long_rows() -> None:
    """Under a causal mask the keys of a rank's rows then go from few to nearly all, in about even steps."""
    for world in (2, 4, 8):
        seqlen = 64 * world
        for folds in (1, 2, 4, 8):
            piece = seqlen // (2 * world * folds)
            for positions in (make_layout(f"zigzag:{folds}", seqlen, world).positions(r) for r in range(world)):
                assert positions[0] < world * piece and positions[-1] >= seqlen - world * piece
                assert np.diff(positions).max() <= (2 * world - 1) * piece + 1


@pytest.mark.parametrize("kind", KINDS)
def test_merged_neighbours_hold_what_they_held_alone(kind: str) -> None:
    for world in (1, 2, 4, 6, 8):
        for group in (n for n in range(1, world + 1) if world % n == 0):
            layout = make_layout(kind, 37, world, Mask.causal())
            merged = layout.merged(group)
            assert merged.world == world // group
            for rank in range(merged.world):
                alone = np.concatenate([layout.positions(rank * group + i) for i in range(group)])
                assert np.array_equal(merged.positions(rank), alone)


@pytest.fixture
def free_traffic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Balance by work alone; else less traffic may be worth a busier rank."""
    monkeypatch.setattr(layout_module, "PAIRS_PER_TOKEN_MOVED", 0)
    layout_module._balanced.cache_clear()
    yield
    layout_module._balanced.cache_clear()


def areas(layout: Layout, visible: np.ndarray) -> np.ndarray:
    """Visible pairs of each rank, counted one by one."""
    return np.array([visible[layout.positions(rank)].sum() for rank in range(layout.world)])


@pytest.mark.parametrize(
    "text",
    [
        "causal()",
        "causal(window=40)",
        "full()",
        "documents([300, 4, 4, 100, 0, 92, 12])",
        "documents([1] * 100 + [412])",
        "documents([412] + [1] * 100)",
        "prefix(100)",
        "chunked(100)",
    ],
)
@pytest.mark.parametrize("world", [2, 4, 8])
def test_balanced_is_never_worse_than_the_plain_layouts(
    text: str, world: int, free_traffic: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout_module, "MIN_CHUNK", 4)
    mask = read_mask(text)
    visible = visibility(mask, 512, 512).numpy()
    balanced = areas(make_layout("balanced", 512, world, mask), visible)
    plain = min(areas(make_layout(kind, 512, world), visible).max() for kind in ("contiguous", "zigzag"))
    assert balanced.sum() == visible.sum()
    assert balanced.max() <= plain * 1.002


def test_balanced_spreads_uneven_documents(free_traffic: None) -> None:
    """64 ranks, documents of very different lengths: nobody has more than 1.05 times the mean work."""
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(6.0, 1.5, size=400).astype(int)
    seqlen, world = int(lengths.sum()), 64
    mask = Mask.documents(lengths)
    layout = make_layout("balanced", seqlen, world, mask)
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    work = np.arange(seqlen) - starts + 1  # keys each row sees
    per_rank = np.array([work[layout.positions(rank)].sum() for rank in range(world)])
    contiguous = make_layout("contiguous", seqlen, world)
    uneven = np.array([work[contiguous.positions(rank)].sum() for rank in range(world)])
    assert per_rank.max() / per_rank.mean() < 1.05
    assert uneven.max() / uneven.mean() > 1.5, "there is something to balance"


def test_a_layout_of_ones_own() -> None:
    layout = Layout.from_runs([[(0, 2), (6, 1)], [], [(2, 4)]])
    assert [layout.positions(rank).tolist() for rank in range(3)] == [[0, 1, 6], [], [2, 3, 4, 5]]
    assert layout.lengths == (3, 0, 4)


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([[(0, 3)], [(2, 3)]], "exactly once"),
        ([[(0, 3)], [(4, 1)]], "exactly once"),
        ([[(0, 2, 2)], [(1, 1), (3, 1), (4, 2)]], "same stride"),
        ([[(0, -1)]], "length >= 0"),
        ([[(0, 2, 0)]], "stride >= 1"),
    ],
)
def test_a_layout_that_is_no_partition_is_refused(runs: list[list[tuple[int, ...]]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layout.from_runs(runs)


def test_unknown_kinds_and_balance_without_a_mask_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown layout 'spiral'; allowed are .*zigzag"):
        make_layout("spiral", 8, 2)
    with pytest.raises(ValueError, match="for_mask"):
        make_layout("balanced", 8, 2)
    with pytest.raises(ValueError, match="sum to 7"):
        make_layout("balanced", 8, 2, Mask.documents([7]))


@pytest.mark.parametrize("kind", KINDS)
def test_layouts_are_values(kind: str) -> None:
    layout = make_layout(kind, 33, 4, Mask.causal())
    copy = pickle.loads(pickle.dumps(layout))
    assert copy == layout and hash(copy) == hash(layout)
    pieces = sorted((run for runs in layout.ranks for run in runs), key=lambda run: run.start)
    assert all(a.start < b.start for a, b in pairwise(pieces))
