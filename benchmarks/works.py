"""What the benchmarks measure: drawn document lengths, and the works that bench_ring spreads over ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ringflash.mask import Mask
from ringflash.parallel.layout import Layout
from ringflash.slices import area

K = 1024


def lognormal(mean: int, total: int, seed: int = 0) -> tuple[int, ...]:
    """Lengths of ``total / mean`` documents drawn log-normal (sigma 1), at least 16, scaled to fill ``total`` tokens."""
    drawn = np.random.default_rng(seed).lognormal(0.0, 1.0, total // mean)
    lengths = np.maximum(16, np.floor(drawn * (total / drawn.sum()))).astype(int)
    lengths[np.argmax(lengths)] += total - lengths.sum()
    return tuple(lengths.tolist())


ONE_LAYOUT, BOTH_LAYOUTS = ("ringflash",), ("ringflash", "ringflash@zigzag:8")
HEADS_TOO = ("ringflash", "ringflash@ulysses")
CAUSAL_PEERS = ("ring_flash_attn_fa4", "ulysses_fa4", "ulysses_cudnn", "torch_cp_allgather_cudnn")


@dataclass(frozen=True)
class Work:
    """One attention problem over all ranks, causal, batch 1."""

    name: str
    seqlen: int
    heads: int = 32
    kv_heads: int = 8
    lengths: tuple[int, ...] = ()
    """Of packed documents; empty: one sequence."""
    window: int = 0
    """Keys a query sees, itself included; 0: all."""
    layout: str = "zigzag"
    ours: tuple[str, ...] = ONE_LAYOUT
    """Systems of ringflash; see bench_ring.spelled."""
    peers: tuple[str, ...] = CAUSAL_PEERS
    rounds: int | None = None
    """Readings, where the usual number takes too long."""
    long: bool = False
    """Whether one pass takes so long that only a forward pass is spent on warming up, and none on a timeline."""

    def mask(self) -> Mask:
        return _mask(self.lengths, self.window)

    def single(self, world: int) -> tuple[int, Mask]:
        """Tokens and mask of one rank's share of the work as one GPU would have it alone, without any exchange.

        One sequence: as long as has the same area, ``seqlen / sqrt(world)``; with a window ``seqlen / world``. Documents:
        those longer than ``seqlen / world`` shortened by ``sqrt(world)``, and of the others, by length, every world-th.
        """
        if self.lengths:
            long = [round(n / math.sqrt(world)) for n in self.lengths if n > self.seqlen // world]
            short = sorted((n for n in self.lengths if n <= self.seqlen // world), reverse=True)[world // 2 :: world]
            lengths = (*long, *short)
            return sum(lengths), _mask(lengths, 0)
        tokens = self.seqlen // world if self.window else round(self.seqlen / math.sqrt(world) / 256) * 256
        return tokens, _mask((), self.window)


def _mask(lengths: tuple[int, ...], window: int) -> Mask:
    return Mask.documents(lengths) if lengths else Mask.causal(window or None)


def pairs(mask: Mask, seqlen: int) -> int:
    """Visible pairs, per head."""
    return int(area(mask.bands((0, seqlen), (0, seqlen)).rows).sum())


def least_rows(mask: Mask, layout: Layout) -> int:
    """Key rows that must reach some rank: for every rank those that its queries see and it does not hold. Runs of stride 1."""
    total = 0
    for rank, runs in enumerate(layout.ranks):
        seen = np.zeros(layout.seqlen, dtype=np.bool_)
        for run in runs:
            assert run.stride == 1, layout.name
            for start, stop in mask.bands((run.start, run.stop), (0, layout.seqlen)).rows[:, 2:4].tolist():
                seen[start:stop] = True
        seen[layout.positions(rank)] = False
        total += int(seen.sum())
    return total


_SHORT = lognormal(4 * K, 128 * K)

WORKS = {
    work.name: work
    for work in (
        Work("causal_32k", 32 * K),
        Work("causal_64k", 64 * K),
        Work("causal_128k", 128 * K, ours=BOTH_LAYOUTS),
        Work("causal_256k", 256 * K, ours=(*BOTH_LAYOUTS, "ringflash_lean"), peers=CAUSAL_PEERS[:3], rounds=3),
        Work("causal_512k", 512 * K, peers=CAUSAL_PEERS[:2], rounds=2, long=True),
        Work("causal_1m", 1024 * K, peers=CAUSAL_PEERS[:1], rounds=1, long=True),
        Work("mha_64k", 64 * K, kv_heads=32, ours=HEADS_TOO),
        Work("mha_128k", 128 * K, kv_heads=32, ours=HEADS_TOO),
        Work(
            "documents_4k",
            256 * K,
            lengths=lognormal(4 * K, 256 * K),
            layout="balanced",
            peers=("ulysses_fa4",),
        ),
        Work(
            "documents_mixed",
            256 * K,
            lengths=(*_SHORT[:16], 128 * K, *_SHORT[16:]),
            layout="balanced",
            peers=("ulysses_fa4",),
        ),
        Work("window_1m", 1024 * K, window=4096, layout="contiguous", peers=("ulysses_fa4",)),
    )
}
"""Of the table in the README, and more."""
