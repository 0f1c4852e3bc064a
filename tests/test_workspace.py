"""What the Hopper backward declares to take besides its tensors, against the work lists it is given."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from ringflash.kernels import hopper, hopper_backward, tiles_backward
from ringflash.kernels.tiles_backward import MAX_SLOTS, Shape, WorkList, work_list
from ringflash.parallel import memory
from ringflash.slices import UNBOUNDED, Slices

EVERY_DIM = range(8, hopper_backward.MAX_HEAD_DIM + 1, 8)
MODES = {"adding": {}, "writing": {"write": True}, "deterministic": {"deterministic": True}}


def declared(head_dim: int, head_dim_v: int) -> int:
    return next((n for dim, n in hopper.EXTRAS.portion_bytes if max(head_dim, head_dim_v) <= dim), 0)


def portion_of(head_dim: int) -> int:
    """float32 values of a portion."""
    return 2 * 128 * next(dim for dim in (64, 96, 128) if head_dim <= dim)


def test_portions_are_as_large_as_the_library_says() -> None:
    if hopper_backward._library() is None:
        pytest.skip("this installation has no Hopper kernels")
    for dims in ((d, dv) for d in EVERY_DIM for dv in EVERY_DIM):
        rows, keys, _, portion = hopper_backward._tile(*dims)
        assert declared(*dims) == MAX_SLOTS * portion * 4, dims
        assert rows % hopper_backward.TURN_ROWS == 0, dims
        if portion:
            assert (keys, portion) == (128, portion_of(max(dims))), dims


def test_forecasts_count_with_what_our_kernels_declare() -> None:
    told, extras = memory.Shape(deterministic=True), hopper.EXTRAS
    assert (told.portion_bytes, told.turn_rows) == (extras.portion_bytes, extras.turn_rows)
    for dim in EVERY_DIM:
        assert replace(told, head_dim=dim, head_dim_v=8).portions(False) == declared(dim, 8)
        assert replace(told, head_dim=8, head_dim_v=dim).portions(False) == declared(8, dim)


def columns(heights: np.ndarray, rows: int, keys: int) -> Slices:
    """Key tile i is seen by so many query tiles."""
    steps = [max(int(n), 1) for n in heights]
    return Slices.from_rows([(0, rows * n, keys * i, keys * (i + 1), -UNBOUNDED, UNBOUNDED) for i, n in enumerate(steps)])


def drawn(n: int) -> Iterator[tuple[Slices, Shape]]:
    """Lists of even and of very uneven items, on all or most of a GPU."""
    rng = np.random.default_rng(20261121)
    for _ in range(n):
        head_dim = int(rng.choice([64, 96, 128, 128]))
        pairs, rows = bool(head_dim == 128 and rng.random() < 0.5), 128 if head_dim == 64 else 64
        keys = 256 if pairs else 128
        tiles, longest = int(rng.choice([1, 3, 20, 66, 132, 200, 264, 400])), 2 ** rng.uniform(1, 17)
        kind = rng.choice(["equal", "causal", "geometric", "log-normal squares", "log-normal squares", "islands"])
        if kind == "equal":
            slices = columns(np.full(tiles, longest), rows, keys)
        elif kind == "causal":
            slices = Slices.causal(50 * tiles, 50 * tiles)
        elif kind == "geometric":
            slices = columns(np.sort(longest * (1 - 2 ** rng.uniform(-9, -1)) ** np.arange(tiles)), rows, keys)
        elif kind == "log-normal squares":
            heights = longest * np.exp(-rng.uniform(0.2, 4) * rng.standard_normal(tiles) ** 2)
            slices = columns(np.sort(heights), rows, keys)
        else:
            ends = np.unique(rng.integers(1, 50 * tiles + 1, 30)).tolist()
            slices = Slices.from_rows([(a, b, a, b, -UNBOUNDED, 0) for a, b in zip([0, *ends], ends, strict=False)])
        q_len, k_len = int(slices.table[:, 1].max()), int(slices.table[:, 3].max())
        kv_heads = int(rng.choice([1, 1, 2, 8]))
        heads = kv_heads * int(rng.choice([1, 3, 8, 12]))
        batch, ctas = int(rng.choice([1, 1, 2])), int(rng.choice([132, 116, 78]))
        yield slices, Shape(q_len, k_len, batch, heads, kv_heads, head_dim, rows, 128, ctas, pairs, portions=True)


def taken(work: WorkList, head_dim: int) -> int:
    """Bytes of partial sums of a launch, as hopper_backward makes them."""
    return work.slots * (2 if work.pairs else 1) * portion_of(head_dim) * 4


def test_no_list_takes_more_than_is_declared() -> None:
    most = dict.fromkeys(MODES, 0.0)
    kinds = set()
    for slices, shape in drawn(150):
        for mode, options in MODES.items():
            work = work_list.__wrapped__(slices, shape, **options)
            part = taken(work, shape.head_dim) / declared(shape.head_dim, shape.head_dim)
            most[mode] = max(most[mode], part)
            kinds.add((mode, work.pairs, work.slots > 0))
    assert most["adding"] == 0 and max(most.values()) <= 1, most
    assert {(mode, pairs, True) for mode in ("writing", "deterministic") for pairs in (False, True)} <= kinds
    # The bound is no more than lists come near to.
    assert min(most["writing"], most["deterministic"]) > 0.4, most


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("mode", ["writing", "deterministic"])
def test_a_list_that_would_take_more_is_divided_less(mode: str, pairs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    slices = columns(np.sort(1e4 * np.exp(-2 * rng.standard_normal(200) ** 2)), 64, 256 if pairs else 128)
    q_len, k_len = int(slices.table[:, 1].max()), int(slices.table[:, 3].max())
    shape = Shape(q_len, k_len, 1, 8, 1, 128, 64, 128, 132, pairs, portions=True)
    free = work_list.__wrapped__(slices, shape, **MODES[mode])
    most = taken(free, 128)
    monkeypatch.setattr(tiles_backward, "MAX_SLOTS", most // (portion_of(128) * 4) - 1)
    assert free.pairs == pairs and free.slots > 100
    assert taken(work_list.__wrapped__(slices, shape, **MODES[mode]), 128) < most
