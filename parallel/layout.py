"""Layouts: which global positions each rank holds. Data, not code: per rank a tuple of runs ``(start, length, stride)``.

contiguous  rank r holds the r-th piece of the sequence.
zigzag      2W pieces, rank r holds piece r and piece 2W-1-r: even work under a causal mask (Llama 3 report, section 3.3.2).
zigzag:K    2KW pieces, given out forth and back K times: as even, and every rank has queries that see few keys besides those that
            see many. A persistent kernel takes the longest first and ends with the short ones, so that all its multiprocessors
            end together; in zigzag all queries of a piece see about as many keys, and the last round of work is mostly idle. The
            price is traffic: with K = 1 a rank needs on average three quarters of the others' keys, with K large all of them.
striped     rank r holds positions r, r + W, r + 2W, ... (Striped Attention, Brandon et al. 2023).
balanced    pieces given to ranks by the work a mask puts on them, with as little traffic as that allows.

Any length works: pieces differ by at most one token, and ranks may hold nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from ringflash.mask import Mask, overlaps
from ringflash.slices import IntArray, area

KINDS = ("contiguous", "zigzag", "striped", "balanced")

PAIRS_PER_TOKEN_MOVED = 500
"""Visible pairs whose computing takes as long as moving one token's K and V: 4*D*H FLOP at 600 TFLOP/s against 4*D*Hkv bytes
at 300 GB/s for H/Hkv = 4. Only the ratio of work to traffic in `balanced` depends on it."""

MIN_CHUNK = 128
"""The smallest piece `balanced` cuts, in tokens: one kernel tile. Shorter pieces would turn full tiles into masked ones."""


class Run(NamedTuple):
    """Positions start, start + stride, ..., ``length`` of them."""

    start: int
    length: int
    stride: int = 1

    @property
    def stop(self) -> int:
        """One past the last position."""
        return self.start + (self.length - 1) * self.stride + 1


@dataclass(frozen=True)
class Layout:
    """``ranks[r]`` lists the runs rank r holds, in the order of its buffer. Together they are every position exactly once."""

    name: str
    seqlen: int
    ranks: tuple[tuple[Run, ...], ...]

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:
        return Layout, (self.name, self.seqlen, self.ranks)  # without the cached hash, which differs between processes

    @cached_property
    def _hash(self) -> int:
        return hash((self.name, self.seqlen, self.ranks))

    @property
    def world(self) -> int:
        return len(self.ranks)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens each rank holds."""
        return tuple(sum(run.length for run in runs) for runs in self.ranks)

    def positions(self, rank: int) -> IntArray:
        """Global positions of a rank's buffer, in its order: int64 (S_local,)."""
        pieces = [run.start + run.stride * np.arange(run.length, dtype=np.int64) for run in self.ranks[rank]]
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)

    @cached_property
    def inverse(self) -> IntArray:
        """Where position p stands in the concatenation of all ranks' buffers: int64 (seqlen,)."""
        order = np.concatenate([self.positions(rank) for rank in range(self.world)])
        inverse = np.empty(self.seqlen, np.int64)
        inverse[order] = np.arange(self.seqlen, dtype=np.int64)
        return inverse

    def merged(self, group: int) -> Layout:
        """The layout after every ``group`` neighbouring ranks have put their buffers together (Ulysses' all-to-all)."""
        if group == 1:
            return self
        assert self.world % group == 0
        merged = [tuple(run for runs in self.ranks[i : i + group] for run in runs) for i in range(0, self.world, group)]
        return Layout(self.name, self.seqlen, tuple(merged))

    def digest(self) -> str:
        """Eight hex digits that tell layouts apart across processes."""
        return hashlib.sha1(repr((self.seqlen, self.ranks)).encode()).hexdigest()[:8]

    @classmethod
    def from_runs(cls, ranks: Sequence[Sequence[Sequence[int]]], name: str = "custom") -> Layout:
        """A layout of one's own: per rank its runs ``(start, length[, stride])``.

        Raises ValueError unless the runs hold every position of a sequence exactly once, with one stride throughout.
        """
        runs = tuple(tuple(Run(*(int(x) for x in run)) for run in rank) for rank in ranks)
        runs = tuple(tuple(run._replace(stride=1) if run.length == 1 else run for run in rank) for rank in runs)
        if any(r.length < 0 or r.start < 0 or r.stride < 1 for rank in runs for r in rank):
            raise ValueError(f"runs need start >= 0, length >= 0 and stride >= 1, got {runs}")
        layout = cls(
            name, sum(r.length for rank in runs for r in rank), tuple(tuple(r for r in rank if r.length) for rank in runs)
        )
        held = np.sort(np.concatenate([layout.positions(r) for r in range(layout.world)] or [np.empty(0, np.int64)]))
        if not np.array_equal(held, np.arange(layout.seqlen)):
            raise ValueError(
                f"the runs hold {len(np.unique(held))} different positions of {layout.seqlen}; each must be held exactly once"
            )
        if len({r.stride for rank in runs for r in rank if r.length > 1}) > 1:
            raise ValueError("all runs of a layout must have the same stride: only then is a mask a band between two of them")
        return layout


def make_layout(kind: str, seqlen: int, world: int, mask: Mask | None = None) -> Layout:
    """The layout of a kind for a sequence; ``mask`` is needed by "balanced" only. Cached.

    Raises ValueError for an unknown kind, or for "balanced" without a mask.
    """
    if kind == "balanced":
        if mask is None:
            raise ValueError(
                'layout "balanced" is decided by a mask: call cp.for_mask(mask) first and shard with what it returns'
            )
        mask.check(seqlen, seqlen)
        return _balanced(mask, seqlen, world)
    return _plain(*read_kind(kind), seqlen, world)


def read_kind(kind: str) -> tuple[str, int]:
    """A layout's name, and how often its pieces go forth and back: ("zigzag", 8) of "zigzag:8", 1 where nothing is said.

    Raises ValueError for what is no layout's name.
    """
    name, colon, folds = str(kind).partition(":")
    if name not in KINDS or (colon and (name != "zigzag" or not folds.isdecimal() or int(folds) < 1)):
        allowed = ", ".join((*KINDS, "zigzag:K (K times forth and back, at least 1)"))
        raise ValueError(f"unknown layout {kind!r}; allowed are {allowed}")
    return name, int(folds or 1)


@lru_cache(maxsize=256)
def _plain(kind: str, folds: int, seqlen: int, world: int) -> Layout:
    ranks: list[list[Run]]
    if kind == "contiguous":
        ranks = [[piece] for piece in _pieces(seqlen, world)]
    elif kind == "zigzag":
        pieces = _pieces(seqlen, 2 * world * folds)
        turns = range(0, len(pieces), 2 * world)
        ranks = [[pieces[i] for at in turns for i in (at + r, at + 2 * world - 1 - r)] for r in range(world)]
    else:
        ranks = [[Run(r, -(-(seqlen - r) // world), world)] for r in range(world)]
    name = kind if folds == 1 else f"{kind}:{folds}"
    return Layout(name, seqlen, tuple(tuple(run for run in runs if run.length > 0) for runs in ranks))


def _pieces(seqlen: int, n: int) -> list[Run]:
    """n runs in a row, their lengths differing by at most one."""
    cuts = [i * seqlen // n for i in range(n + 1)]
    return [Run(a, b - a) for a, b in pairwise(cuts)]


@lru_cache(maxsize=64)
def _balanced(mask: Mask, seqlen: int, world: int) -> Layout:
    """The best of several assignments, by the slowest rank's time: its visible pairs, or its traffic where that is slower.

    Every assignment gives each rank the same number of pieces, hence of tokens: the other layers cost per token.
    """
    best: tuple[float, list[Run], IntArray] | None = None
    for per_rank in (1, 2, 4, 8, 16):
        if per_rank > 1 and seqlen < world * per_rank * MIN_CHUNK and per_rank != 2:
            break
        pieces = _pieces(seqlen, world * per_rank)
        work, need = _work_and_need(mask, seqlen, pieces)
        n = np.arange(len(pieces))
        zigzag = np.where(n % (2 * world) < world, n % world, world - 1 - n % world)
        for owner in (n // per_rank, zigzag, _greedy(work, world, per_rank)):
            cost = _cost(owner, pieces, work, need, world)
            if best is None or cost < best[0] * 0.999:
                best = (cost, pieces, owner)
    assert best is not None
    _, pieces, owner = best
    ranks = []
    for rank in range(world):
        runs: list[Run] = []
        for piece in (pieces[i] for i in np.flatnonzero(owner == rank)):
            if runs and runs[-1].start + runs[-1].length == piece.start:
                runs[-1] = Run(runs[-1].start, runs[-1].length + piece.length)
            elif piece.length:
                runs.append(piece)
        ranks.append(tuple(runs))
    return Layout("balanced", seqlen, tuple(ranks))


def _work_and_need(mask: Mask, seqlen: int, pieces: list[Run]) -> tuple[IntArray, np.ndarray]:
    """Visible pairs of each piece's rows, and the bool matrix of which pieces' keys each piece's rows see."""
    bands = mask.bands((0, seqlen), (0, seqlen))
    start = np.array([p.start for p in pieces], dtype=np.int64)
    stop = start + np.array([p.length for p in pieces], dtype=np.int64)
    band, row = overlaps(bands.rows[:, 0], bands.rows[:, 1], start, stop)
    part = bands.rows[band].copy()
    part[:, 0], part[:, 1] = np.maximum(part[:, 0], start[row]), np.minimum(part[:, 1], stop[row])
    work = np.zeros(len(pieces), np.int64)
    np.add.at(work, row, area(part) // bands.modulus)
    reach0 = np.maximum(part[:, 2], part[:, 0] + part[:, 4])
    reach1 = np.minimum(part[:, 3], part[:, 1] + part[:, 5])
    seen, key = overlaps(reach0, reach1, start, stop)
    need = np.zeros((len(pieces), len(pieces)), dtype=np.bool_)
    need[row[seen], key] = True
    return work, need


def _greedy(work: IntArray, world: int, per_rank: int) -> IntArray:
    """Longest processing time first, with per_rank places a rank; among nearly equal ranks the one that holds a neighbour."""
    owner = np.full(len(work), -1, np.int64)
    load, places = np.zeros(world), np.full(world, per_rank)
    slack = 0.02 * work.sum() / world
    for piece in np.argsort(-work, kind="stable"):
        open_ranks = np.flatnonzero(places > 0)
        near = open_ranks[load[open_ranks] <= load[open_ranks].min() + slack]
        neighbours = {int(owner[i]) for i in (piece - 1, piece + 1) if 0 <= i < len(work)}
        beside = [int(r) for r in near if int(r) in neighbours]
        rank = beside[0] if beside else int(near[np.argmin(load[near])])
        owner[piece] = rank
        load[rank] += work[piece]
        places[rank] -= 1
    return owner


def _cost(owner: IntArray, pieces: list[Run], work: IntArray, need: np.ndarray, world: int) -> float:
    """Time of the slowest rank, in visible pairs: traffic hides behind compute, except for a tenth of it."""
    tokens = np.array([p.length for p in pieces])
    worst = 0.0
    for rank in range(world):
        mine = owner == rank
        traffic = PAIRS_PER_TOKEN_MOVED * float(tokens[need[mine].any(axis=0) & ~mine].sum())
        worst = max(worst, max(float(work[mine].sum()), traffic) + 0.1 * traffic)
    return worst
