"""Cases: one attention call across ranks, as a line of text that can be replayed.

``draw(seed)`` gives the same case for the same seed for ever; ``repr`` of a case is the constructor call that builds it again::

    from ringflash.testing import Case, objections_simulated
    objections_simulated([Case(mask="causal(window=9)", q_len=33, k_len=33, seed=17)])
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from ringflash.mask import Mask
from ringflash.parallel.layout import Layout
from ringflash.parallel.schedule import LOCAL_LAST, Schedule, make_schedule
from ringflash.parallel.world import MAX_GAP

LAYOUTS = ("contiguous", "zigzag", "striped", "balanced", "scattered")
"""The named layouts, and runs of any length given to any rank."""

SCHEDULES = ("ring", "allgather", "staged", "ulysses", "hybrid", "double_ring")
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

MASK_WORDS: dict[str, Any] = {
    "full": Mask.full,
    "causal": Mask.causal,
    "window": Mask.window,
    "documents": Mask.documents,
    "prefix": Mask.prefix,
    "chunked": Mask.chunked,
    "blocks": lambda rows, block_size: Mask.blocks(block_map(rows), block_size),
    "dilated": Mask.dilated,
}
"""What a case's mask may be written with: Mask's constructors, block maps as rows of "0" and "1"."""


def block_map(rows: Sequence[str]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """``["10", "11"]`` as a bool matrix."""
    return np.array([[cell == "1" for cell in row] for row in rows], dtype=np.bool_).reshape(len(rows), -1)


def read_mask(text: str, words: dict[str, Any] | None = None) -> Any:
    """The mask a case spells, e.g. ``causal(window=3) & chunked(8)``; ``words`` gives the constructors another meaning."""
    return eval(text, {"__builtins__": {}}, dict(MASK_WORDS if words is None else words))


@dataclass(frozen=True, repr=False)
class Case:
    """One call of attention in a world of ranks. Lengths are of the whole sequence."""

    mask: str = "causal()"
    layout: str = "zigzag"
    schedule: str = "ring"
    transport: str = "auto"  # of real ranks; a simulated world has but one
    world: int = 4
    ulysses: int = 1
    inner: int | None = None
    trim: bool = True
    max_gap: int = MAX_GAP
    travels: str = "auto"
    pieces: int = 0
    stage_rows: int = 0
    local_last: int = LOCAL_LAST
    head_groups: int = 0
    q_len: int = 32
    k_len: int = 32
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 8
    head_dim_v: int = 8
    dtype: str = "float64"
    scale: float | None = None
    softcap: float = 0.0
    sinks: bool = False
    dlse: bool = True
    backend: str = "auto"
    deterministic: bool = False
    seed: int = 0

    def __repr__(self) -> str:
        told = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"Case({', '.join(told)})"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def with_world(self, world: int) -> Case:
        """The same case on another number of ranks."""
        return replace(self, world=world)

    def build_mask(self) -> Mask:
        mask = read_mask(self.mask)
        assert isinstance(mask, Mask)
        return mask

    def build_schedule(self) -> str | Schedule:
        """What ContextParallel takes: a name, or with words that a name does not tell a Schedule."""
        words: dict[str, Any] = {"travels": self.travels, "pieces": self.pieces, "rows": self.stage_rows}
        words |= {"local_last": self.local_last, "head_groups": self.head_groups}
        if words == {"travels": "auto", "pieces": 0, "rows": 0, "local_last": LOCAL_LAST, "head_groups": 0}:
            return self.schedule
        return replace(make_schedule(self.schedule, self.world, self.ulysses, self.inner), **words)

    def build_layout(self) -> str | Layout:
        """What ContextParallel takes: a name, or for "scattered" runs drawn from the seed."""
        if self.layout != "scattered":
            return self.layout
        d = Drawing(self.seed)
        lengths = d.parts(self.k_len, 3 * self.world)
        ranks: list[list[tuple[int, int]]] = [[] for _ in range(self.world)]
        for start, length in zip(np.cumsum([0, *lengths[:-1]]).tolist(), lengths, strict=True):
            if length:
                ranks[d.between(0, self.world - 1)].append((start, length))
        return Layout.from_runs(ranks, name="scattered")


class Drawing:
    """Short words over a seeded generator."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng([20261120, seed])

    def one_of(self, choices: Sequence[Any], weights: Sequence[float] | None = None) -> Any:
        p = None if weights is None else np.asarray(weights) / sum(weights)
        return choices[int(self._rng.choice(len(choices), p=p))]

    def between(self, low: int, high: int) -> int:
        """An integer in [low, high]."""
        return int(self._rng.integers(low, high + 1))

    def chance(self, p: float) -> bool:
        return bool(self._rng.random() < p)

    def parts(self, total: int, n: int) -> list[int]:
        """n sizes, zeros among them, that sum to total."""
        cuts = sorted(self.between(0, total) for _ in range(n - 1))
        return [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]


def draw(seed: int, *, worlds: Sequence[int] = (1, 2, 3, 4, 5, 6, 7, 8), max_len: int = 96) -> Case:
    """The seed-th case: sizes small and on the edges of pieces, windows and worlds, every option drawn."""
    d = Drawing(seed)
    world = d.one_of(worlds)
    schedule, ulysses, inner = _schedule(d, world)
    k_len = _length(d, world, max_len)
    mask, any_lengths = _mask(d, k_len, world)
    layout = d.one_of(LAYOUTS)
    q_len = k_len
    if any_lengths and layout not in ("balanced", "scattered") and d.chance(0.25):
        q_len = d.one_of([1, max(1, k_len // 2), max(1, k_len - 1), d.between(1, k_len)])
    group = d.one_of([1, 1, 2, 3, 4])
    kv_heads = d.one_of([1, 1, 2, 2, 3, 4])
    head_dim = d.one_of([8, 16, 24])
    more = Drawing(seed + (1 << 32))  # words that came later: the others are drawn as ever
    case = Case(
        mask=mask,
        layout=layout,
        schedule=schedule,
        world=world,
        ulysses=ulysses,
        inner=inner,
        trim=not d.chance(0.1),
        max_gap=d.one_of([0, 1, MAX_GAP]),
        travels=more.one_of(["auto", "kv", "q", "q"]),
        pieces=more.one_of([0, 0, 1, 2, 3]),
        stage_rows=more.one_of([0, 0, 0, 1, 9, 1000]),
        local_last=more.one_of([0, 9, LOCAL_LAST]),
        q_len=q_len,
        k_len=k_len,
        batch=d.one_of([1, 1, 2]),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=head_dim,
        head_dim_v=d.one_of([head_dim, head_dim, head_dim, 8, 16]),
        dtype=d.one_of(["float64", "float32", "bfloat16"], [5, 2, 2]),
        scale=d.one_of([None, 0.5, -0.7, 0.0], [12, 4, 1, 1]),
        softcap=d.one_of([0.0, 0.0, 0.0, 2.0, 15.0]),
        sinks=d.chance(0.3),
        dlse=d.chance(0.5),
        deterministic=d.chance(0.1),
        seed=seed,
    )
    folds = more.one_of([1, 1, 2, 3])
    trade = world if schedule == "ulysses" else ulysses
    fit = [n for n in range(2, kv_heads + 1) if kv_heads % n == 0 and case.heads // n >= trade]
    groups = more.one_of([0, 1, *fit, *fit])
    if layout == "zigzag" and folds > 1:
        case = replace(case, layout=f"zigzag:{folds}")
    return replace(case, head_groups=groups)


def _schedule(d: Drawing, world: int) -> tuple[str, int, int | None]:
    """(schedule, ulysses, inner) that this world allows."""
    proper = [n for n in range(2, world) if world % n == 0]
    name = d.one_of(SCHEDULES if proper else [s for s in SCHEDULES if s != "hybrid"])
    if name == "ulysses":
        return name, d.one_of([1, world]), None
    # Any ring may stand behind a head exchange.
    ulysses = int(d.one_of(proper)) if name == "hybrid" or (proper and d.chance(0.2)) else 1
    rings = world // ulysses
    if name == "double_ring":
        return name, ulysses, d.one_of([n for n in range(1, rings + 1) if rings % n == 0])
    if name == "staged":
        name = d.one_of(["staged", "staged:1", "staged:3"])
    return name, ulysses, None


def _length(d: Drawing, world: int, max_len: int) -> int:
    """A sequence length around a multiple of the pieces of a world, shorter than the world, or any."""
    pieces = d.one_of([world, 2 * world])
    on_edge = d.between(1, max(1, max_len // pieces)) * pieces + d.one_of([-1, 0, 0, 1])
    return min(max(1, int(d.one_of([on_edge, on_edge, d.between(1, world), d.between(1, max_len)]))), max_len)


def _mask(d: Drawing, length: int, world: int) -> tuple[str, bool]:
    """A mask as text, and whether it allows fewer queries than keys."""
    if d.chance(0.15):
        (a, any_a), (b, any_b) = _single_mask(d, length, world), _single_mask(d, length, world)
        return f"{a} & {b}", any_a and any_b
    return _single_mask(d, length, world)


def _edge(d: Drawing, length: int, world: int) -> int:
    """A size at the edge of a rank's piece, of half of it, of the sequence, or any; at least 1."""
    piece = math.ceil(length / d.one_of([world, 2 * world]))
    edges = [1, 2, piece - 1, piece, piece + 1, 2 * piece + 1, length - 1, length, length + 1]
    return max(1, int(d.one_of([*edges, d.between(1, length)])))


def _single_mask(d: Drawing, length: int, world: int) -> tuple[str, bool]:
    kind = d.one_of(
        ["full", "causal", "causal_window", "window", "documents", "prefix", "chunked", "blocks", "dilated"],
        [1, 2, 2, 2, 3, 1, 1, 2, 2],
    )
    edge = _edge(d, length, world)
    if kind == "full" or kind == "causal":
        return f"{kind}()", True
    if kind == "causal_window":
        return f"causal(window={edge})", True
    if kind == "window":
        left = d.one_of([None, 0, edge - 1, edge])
        right = d.one_of([None, 0, _edge(d, length, world) - 1])
        return f"window({left}, {right})", True
    if kind == "documents":
        lengths = d.parts(length, d.one_of([1, 2, 3, 5, 9]))
        causal = d.one_of(["", "", ", causal=False"])
        window = d.one_of(["", "", f", window={edge}"])
        return f"documents({lengths}{causal}{window})", False
    if kind == "prefix":
        return f"prefix({d.one_of([0, edge])})", True
    if kind == "chunked":
        return f"chunked({edge})", True
    if kind == "blocks":
        block_size = max(edge, math.ceil(length / 12))
        n = math.ceil(length / block_size)
        density = d.one_of([0.0, 0.3, 0.7, 1.0], [1, 4, 4, 1])
        rows = ["".join("1" if d.chance(density) else "0" for _ in range(n)) for _ in range(n)]
        return f"blocks({rows}, {block_size})", True
    window = d.one_of(["", f", window={d.between(1, 4)}"])
    return f"dilated({d.one_of([1, 2, 3, 4, 5, world, 2 * world])}{window})", True
