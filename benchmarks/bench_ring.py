"""Attention over ranks, ours and peers' side by side: TFLOP/s per GPU of forward and forward + backward, and peak memory.

    torchrun --nproc-per-node 4 -m benchmarks.bench_ring seqlens=[131072] systems=[single,ringflash,ulysses_cudnn]

Causal, batch 1. All systems of a length are read in turn, ``rounds`` times, after they have run for a second to reach the steady
power state; a reading is the slowest rank's mean over about ``work_s`` seconds. "single" is the yardstick: one GPU's attention
over S / sqrt(world) tokens, the same work per GPU without any exchange. Rows go to a JSON-lines file.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import hydra
import torch
import torch.distributed as dist
from omegaconf import DictConfig

import ringflash as rf
from benchmarks import baselines


@dataclass
class Row:
    """One system at one length. Times in ms: 20th, 50th and 80th percentile of the readings."""

    system: str
    seqlen: int
    world: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    gpu: str
    torch: str
    commit: str
    forward_ms: tuple[float, float, float]
    both_ms: tuple[float, float, float]
    forward_tflops: float
    both_tflops: float
    peak_gib: float
    forward_ratio: float = 0.0
    """Of this system's rate to single's in the same run."""
    both_ratio: float = 0.0


class System:
    """One thing to measure: forward and forward + backward of this rank's tensors."""

    def __init__(self, name: str, cfg: DictConfig, seqlen: int, device: torch.device) -> None:
        world = dist.get_world_size()
        self.name, self.single = name, name.startswith("single")
        pairs = seqlen * seqlen / 2
        if cfg.window is not None:
            pairs = seqlen * cfg.window - cfg.window * (cfg.window - 1) / 2
        self.flops = 4 * pairs * cfg.heads * cfg.head_dim / world
        tokens = round((seqlen * seqlen / world) ** 0.5 / 256) * 256 if self.single else seqlen // world
        if self.single:
            self.flops = 4 * tokens * tokens / 2 * cfg.heads * cfg.head_dim

        def normal(heads: int) -> torch.Tensor:
            return torch.randn(1, tokens, heads, cfg.head_dim, device=device, dtype=getattr(torch, cfg.dtype))

        self.q, self.k, self.v = (normal(h).requires_grad_() for h in (cfg.heads, cfg.kv_heads, cfg.kv_heads))
        self.dout = normal(cfg.heads)
        self.attend = self._attend(name, cfg, seqlen)

    def _attend(self, name: str, cfg: DictConfig, seqlen: int) -> Callable[..., torch.Tensor]:
        mask = rf.Mask.causal(cfg.window)
        kind, _, backend = name.partition("_")
        if kind == "single":
            if backend in ("cudnn", "fa2"):
                which = baselines.CUDNN if backend == "cudnn" else baselines.FLASH
                return lambda q, k, v: baselines.sdpa(q, k, v, which)
            return lambda q, k, v: rf.attention(q, k, v, mask=mask, backend=backend or "auto")
        if kind == "ringflash":
            cp = rf.ContextParallel(None, cfg.layout, cfg.schedule, transport=cfg.transport)
            cp.position_ids(seqlen)
            return lambda q, k, v: rf.attention(q, k, v, mask=mask, cp=cp, backend=backend or "auto")
        return baselines.PEERS[name]()

    def forward(self) -> None:
        with torch.no_grad():
            self.attend(self.q, self.k, self.v)
        baselines.leave()

    def both(self) -> None:
        out = self.attend(self.q, self.k, self.v)
        torch.autograd.grad(out, (self.q, self.k, self.v), self.dout)
        baselines.leave()


def reading(run: Callable[[], None], repeats: int) -> float:
    """Milliseconds of one run: the slowest rank's mean over the repeats."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    dist.barrier()
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    torch.cuda.synchronize()
    slowest = torch.tensor([start.elapsed_time(end) / repeats], device="cuda")
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest)


def percentiles(values: list[float]) -> tuple[float, float, float]:
    cuts = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else values * 9
    return round(cuts[1], 4), round(statistics.median(values), 4), round(cuts[7], 4)


def measure(cfg: DictConfig, seqlen: int, device: torch.device, say: Callable[[str], None]) -> list[Row]:
    """All systems at one length, interleaved."""
    systems: list[System] = []
    for name in cfg.systems:
        failed = torch.zeros(1, device=device)
        try:
            system = System(name, cfg, seqlen, device)
            system.forward()
            system.both()
        except Exception:
            failed += 1
            say(f"{name} at {seqlen}: {traceback.format_exc(limit=-3)[-600:]}")
        dist.all_reduce(failed)
        if not failed.item():
            systems.append(system)
    peaks, times = {}, {s.name: ([], []) for s in systems}  # type: ignore[var-annotated]
    for system in systems:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() - sum(x.nbytes for x in (system.q, system.k, system.v, system.dout))
        system.both()
        torch.cuda.synchronize()
        peaks[system.name] = (torch.cuda.max_memory_allocated() - before) / 2**30
    for round_ in range(cfg.rounds + 1):  # the first round brings the chip to its steady state and is not counted
        for system in systems:
            for run, found in zip((system.forward, system.both), times[system.name], strict=True):
                once = reading(run, 1)
                ms = reading(run, max(1, round(cfg.work_s * 1000 / once)))
                if round_:
                    found.append(ms)
    rows = []
    for system in systems:
        f, b = (percentiles(t) for t in times[system.name])
        rows.append(
            Row(
                system.name,
                seqlen,
                dist.get_world_size(),
                cfg.heads,
                cfg.kv_heads,
                cfg.head_dim,
                cfg.dtype,
                torch.cuda.get_device_name(),
                torch.__version__,
                commit(),
                f,
                b,
                round(system.flops / f[1] / 1e9, 1),
                round(3.5 * system.flops / b[1] / 1e9, 1),
                round(peaks[system.name], 2),
            )
        )
    base = next((r for r in rows if r.system.startswith("single")), None)
    for row in rows:
        if base:
            row.forward_ratio = round(row.forward_tflops / base.forward_tflops, 3)
            row.both_ratio = round(row.both_tflops / base.both_tflops, 3)
    return rows


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip()


@hydra.main(version_base="1.3", config_path="conf", config_name="bench_ring")
def main(cfg: DictConfig) -> None:
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    rank = dist.get_rank()
    torch.manual_seed(rank)

    def say(*words: Any) -> None:
        if rank == 0:
            print(*words, flush=True)

    say(f"{'tokens':>8} {'system':26} {'forward':>18} {'ratio':>6} {'fwd + bwd':>18} {'ratio':>6} {'GiB':>6}")
    for seqlen in cfg.seqlens:
        begin = time.monotonic()
        rows = measure(cfg, seqlen, device, say)
        for r in rows:
            say(
                f"{r.seqlen:8d} {r.system:26} {r.forward_ms[1]:9.3f} ms {r.forward_tflops:4.0f} TF {r.forward_ratio:6.3f} "
                f"{r.both_ms[1]:9.3f} ms {r.both_tflops:4.0f} TF {r.both_ratio:6.3f} {r.peak_gib:6.2f}"
            )
        say(f"({time.monotonic() - begin:.0f} s)")
        if rank == 0:
            path = Path(cfg.out)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.writelines(json.dumps(asdict(r)) + "\n" for r in rows)
        torch.cuda.empty_cache()
    if rank == 0 and cfg.plot:
        from benchmarks.plots import ring_table

        ring_table(Path(cfg.out), Path(cfg.plot))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
