"""The attention forward on one GPU, ours and peers' side by side, in visible-area TFLOP/s.

    python -m benchmarks.bench_kernel suites=[dense_128,documents] systems=[hopper,cudnn,flash_attn_4]

Under its power cap a GPU moves by some per cent from second to second, so all systems of a case are read in turn, ``rounds``
times, each reading about ``work_ms`` long, and medians are compared. FLOPs are 2 (D + Dv) per visible pair and head. Rows go to
a JSON-lines file. The suite "epilogues" compares ours with itself: starting, continuing, staying in float32, two chunks in one
launch.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from benchmarks import baselines
from ringflash.kernels import hopper
from ringflash.slices import UNBOUNDED, Slices

Run = Callable[[], object]
DOCUMENTS_TOKENS = 65536


@dataclass(frozen=True)
class Case:
    """One problem: sizes, and the mask in the two languages that kernels speak."""

    name: str
    S: int
    H: int
    Hkv: int
    D: int
    causal: bool
    lengths: tuple[int, ...] = ()
    """Of packed documents; empty: one sequence."""
    window: int = 0
    """Keys a row sees, itself included; 0: all."""

    def slices(self) -> Slices:
        if self.lengths:
            ends = np.cumsum(self.lengths).tolist()
            return Slices.from_rows([(e - n, e, e - n, e, -UNBOUNDED, 0) for n, e in zip(self.lengths, ends, strict=True)])
        if self.window:
            return Slices.from_rows([(0, self.S, 0, self.S, 1 - self.window, 0)])
        return Slices.causal(self.S, self.S) if self.causal else Slices.full_rectangle(self.S, self.S)


def dense(D: int, lengths: tuple[int, ...], heads: tuple[tuple[int, int], ...]) -> list[Case]:
    return [
        Case(f"{'causal' if causal else 'full'} {S} {H}/{Hkv}", S, H, Hkv, D, causal)
        for H, Hkv in heads
        for S in lengths
        for causal in (False, True)
    ]


def lognormal(mean: int, total: int, seed: int = 0) -> tuple[int, ...]:
    """Document lengths drawn log-normal (sigma 1) with that mean, 16 to 16k, that fill `total` tokens."""
    rng = np.random.default_rng(seed)
    lengths: list[int] = []
    while sum(lengths) < total:
        lengths.append(int(np.clip(rng.lognormal(np.log(mean) - 0.5, 1.0), 16, 16384)))
    lengths[-1] -= sum(lengths) - total
    return tuple(lengths)


def documents() -> list[Case]:
    S = DOCUMENTS_TOKENS
    kinds = {"1 x 64k": (S,), "16 x 4k": (4096,) * 16, "log-normal 2k": lognormal(2048, S), "512 x 128": (128,) * 512}
    return [Case(f"documents {name}", S, 16, 16, 128, True, lengths) for name, lengths in kinds.items()]


SUITES: dict[str, list[Case]] = {
    "dense_128": dense(128, (1024, 2048, 4096, 8192, 16384, 32768, 65536), ((16, 16), (32, 8))),
    "dense_64": dense(64, (1024, 4096, 16384), ((32, 32),)),
    "dense_256": dense(256, (1024, 4096, 16384), ((8, 8),)),
    "documents": documents(),
    "windows": [Case(f"window {w} at 64k", 65536, 16, 16, 128, True, window=w) for w in (1024, 4096)],
}


@dataclass
class Row:
    """One system on one case. Times in ms: 20th, 50th and 80th percentile of the readings."""

    suite: str
    case: str
    system: str
    batch: int
    seqlen: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    ms: tuple[float, float, float]
    tflops: float
    ratio: float
    """Of this system's rate to the best other system's in the same readings; of an epilogue to the first one's."""
    gpu: str = field(default_factory=torch.cuda.get_device_name)
    torch: str = torch.__version__
    commit: str = field(default_factory=lambda: _commit())


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def systems(case: Case, names: list[str], q: Tensor, k: Tensor, v: Tensor) -> Iterator[tuple[str, Run]]:
    """What each of the named systems runs; those that cannot do the case are left out."""
    slices, scale = case.slices(), case.D**-0.5
    one_sequence = not case.lengths and not case.window
    for name in names:
        if name == "hopper":
            yield name, lambda: hopper.KERNEL.forward(q, k, v, slices, scale=scale)
        elif name in ("cudnn", "fa2") and one_sequence:
            backend = baselines.CUDNN if name == "cudnn" else baselines.FLASH
            yield name, lambda backend=backend: baselines.sdpa(q, k, v, backend, case.causal)  # type: ignore[misc]
        elif name == "flash_attn_4" and importlib.util.find_spec("flash_attn") is not None:
            yield name, _flash_attn_4(case, q, k, v)


def _flash_attn_4(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Run:
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

    if not case.lengths:
        window = (case.window - 1, 0) if case.window else (None, None)
        return lambda: flash_attn_func(q, k, v, causal=case.causal, window_size=window)
    ends = torch.tensor(np.cumsum((0, *case.lengths)), dtype=torch.int32, device=q.device)
    q_packed, k_packed, v_packed, longest = q[0], k[0], v[0], max(case.lengths)
    return lambda: flash_attn_varlen_func(
        q_packed, k_packed, v_packed,
        cu_seqlens_q=ends, cu_seqlens_k=ends, max_seqlen_q=longest, max_seqlen_k=longest, causal=case.causal,
    )  # fmt: skip


def read(runs: dict[str, Run], cfg: DictConfig) -> dict[str, list[float]]:
    """Milliseconds of one run of each, ``rounds`` readings taken in turn."""

    def time(run: Run, repeats: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / repeats

    for run in runs.values():
        run()
    repeats = {name: max(2, round(cfg.work_ms / time(run, 2))) for name, run in runs.items()}
    found: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(cfg.rounds + 1):
        for name, run in runs.items():
            ms = time(run, repeats[name])
            if round_:
                found[name].append(ms)
    return found


def percentiles(values: list[float]) -> tuple[float, float, float]:
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return round(cuts[1], 4), round(statistics.median(values), 4), round(cuts[7], 4)


def compare(suite: str, case: Case, cfg: DictConfig) -> list[Row]:
    batch, dtype = max(1, cfg.tokens // case.S), getattr(torch, cfg.dtype)
    q, k, v = (torch.randn(batch, case.S, h, case.D, device="cuda", dtype=dtype) for h in (case.H, case.Hkv, case.Hkv))
    found = read(dict(systems(case, list(cfg.systems), q, k, v)), cfg)
    flops = 4 * batch * case.H * case.D * case.slices().area()
    rates = {name: flops / statistics.median(ms) / 1e9 for name, ms in found.items()}
    rows = []
    for name, ms in found.items():
        best = max((r for other, r in rates.items() if other != name), default=rates[name])
        sizes = (batch, case.S, case.H, case.Hkv, case.D, cfg.dtype)
        rows.append(Row(suite, case.name, name, *sizes, percentiles(ms), round(rates[name], 1), round(rates[name] / best, 3)))
    return rows


def epilogues(cfg: DictConfig) -> Iterator[list[Row]]:
    """What continuing, staying in float32 and a second chunk cost: ours beside ours."""
    H, Hkv, D, scale, dtype = 32, 8, 128, 128**-0.5, getattr(torch, cfg.dtype)
    for S in (8192, 32768):
        if cfg.max_len < S:
            continue
        q = torch.randn(1, S, H, D, device="cuda", dtype=dtype)
        k, v = (torch.randn(1, 2 * S, Hkv, D, device="cuda", dtype=dtype) for _ in range(2))
        carry = torch.randn(1, S, H, D, device="cuda"), torch.randn(1, H, S, device="cuda")
        one, half = Slices.full_rectangle(S, 2 * S), Slices.full_rectangle(S, S)
        two = Slices.from_rows([(0, S, 0, S, -UNBOUNDED, UNBOUNDED), (0, S, S, 2 * S, -UNBOUNDED, UNBOUNDED)])

        def run(slices: Slices, q: Tensor = q, k: Tensor = k, v: Tensor = v, **options: Any) -> Run:
            return lambda: hopper.KERNEL.forward(q, k, v, slices, scale=scale, **options)

        groups: list[tuple[Slices, dict[str, Run]]] = [
            (half, {
                "start, finish": run(half),
                "start, stay float32": run(half, finish=False),
                "continue, finish": run(half, carry=carry),
                "continue, stay float32": run(half, carry=carry, finish=False),
            }),
            (one, {"one chunk": run(one), "two chunks": run(two)}),
        ]  # fmt: skip
        for slices, runs in groups:
            found = read(runs, cfg)
            rates = {name: 4 * H * D * slices.area() / statistics.median(ms) / 1e9 for name, ms in found.items()}
            base = next(iter(rates.values()))
            sizes = (1, S, H, Hkv, D, cfg.dtype)
            yield [
                Row(
                    "epilogues",
                    f"full {S} 32/8",
                    name,
                    *sizes,
                    percentiles(ms),
                    round(rates[name], 1),
                    round(rates[name] / base, 3),
                )
                for name, ms in found.items()
            ]


def draw(rows: list[Row], path: str) -> None:
    """Bars of TFLOP/s per case, one colour per system."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in rows if r.suite != "epilogues"]
    cases = list(dict.fromkeys((r.suite, r.case) for r in rows))
    names = list(dict.fromkeys(r.system for r in rows))
    figure, axes = plt.subplots(figsize=(max(6.0, 0.45 * len(cases)), 5))
    for n, name in enumerate(names):
        mine = {(r.suite, r.case): r.tflops for r in rows if r.system == name}
        axes.bar(
            [i + n * 0.8 / len(names) for i in range(len(cases))], [mine.get(c, 0.0) for c in cases], 0.8 / len(names), label=name
        )
    labels = [f"{case} ({suite.removeprefix('dense_')})" for suite, case in cases]
    axes.set_xticks([i + 0.3 for i in range(len(cases))], labels, rotation=60, ha="right", fontsize=7)
    axes.set_ylabel("TFLOP/s, forward, visible area")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


@hydra.main(version_base="1.3", config_path="conf", config_name="bench_kernel")
def main(cfg: DictConfig) -> None:
    unknown = set(cfg.suites) - {*SUITES, "epilogues"}
    if unknown:
        raise ValueError(f"unknown suites {sorted(unknown)}; allowed: {', '.join([*SUITES, 'epilogues'])}")
    torch.manual_seed(0)
    rows: list[Row] = []
    out = Path(cfg.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a") as file:
        for suite in cfg.suites:
            cases = [c for c in SUITES.get(suite, []) if cfg.max_len >= c.S]
            for group in epilogues(cfg) if suite == "epilogues" else (compare(suite, c, cfg) for c in cases):
                rows += group
                file.writelines(json.dumps(asdict(r)) + "\n" for r in group)
                cells = "  ".join(f"{r.system} {r.tflops:.0f} ({r.ratio:.3f})" for r in group)
                print(f"{group[0].suite:10} {group[0].case:24} {cells}", flush=True)
    if cfg.plot:
        draw(rows, cfg.plot)


if __name__ == "__main__":
    main()
