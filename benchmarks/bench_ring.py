"""Attention over ranks, ours and peers' side by side: TFLOP/s per GPU of forward and forward + backward, peak memory, and what
transfers kept the kernels waiting.

    torchrun --nproc-per-node 4 -m benchmarks.bench_ring works=[causal_128k,documents_4k] systems=[single,ringflash]

Works are those of works.py, all causal, batch 1. All systems of a work are read in turn, ``rounds`` times; a reading is the
slowest rank's mean over about ``work_s`` seconds. "single" is the yardstick: one GPU's attention on its share of the work
(`Work.single`), without any exchange. FLOPs are those of the visible pairs, per head: 4 D forward, 14 D forward + backward.

Afterwards one more pass of ringflash is recorded with CUDA events (`ringflash.parallel.trace`): how long the computing stream
waited for transfers, on the slowest rank, and the timeline picture. Rows go to a JSON-lines file after every work.
"""

from __future__ import annotations

import gc
import json
import os
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hydra
import torch
import torch.distributed as dist
from omegaconf import DictConfig

import ringflash as rf
from benchmarks import baselines, plots
from benchmarks.rows import Percentiles, append, commit, percentiles, rotated
from benchmarks.works import WORKS, Work, least_rows, pairs
from ringflash.kernels import Problem, choose
from ringflash.parallel import trace
from ringflash.parallel.plan import Plan, row_bytes
from ringflash.parallel.schedule import SCHEDULES

GIB = 2**30
PASSES = ("forward", "both")
"""Methods of a System that are timed."""
SHORT = 32768
"""Tokens of a work on which a long one's kernels are tried."""


@dataclass
class Row:
    """One system on one work. Times in ms: 20th, 50th and 80th percentile of the readings. None: does not apply."""

    work: str
    system: str
    seqlen: int
    world: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    layout: str
    gpu: str
    torch: str
    commit: str
    readings: int
    forward_ms: Percentiles
    both_ms: Percentiles
    forward_tflops: float
    both_tflops: float
    peak_gib: float
    """Of forward + backward with inputs and results: torch's allocator, and what the system took of the device beside it."""
    budget_gib: float | None = None
    """q, k, v, out, lse and their gradients, and two stage buffers: see `budget`."""
    forward_ratio: float | None = None
    """Of this system's rate to single's in the same run."""
    both_ratio: float | None = None
    forward_over_peer: float | None = None
    """Of this system's rate to the fastest peer's in the same run; the peers are all but single and ringflash."""
    both_over_peer: float | None = None
    forward_exposed_ms: float | None = None
    """How long the computing stream waited for transfers in one recorded pass, on the slowest rank."""
    backward_exposed_ms: float | None = None
    rows_moved: int | None = None
    """Key rows that reach some rank in a forward pass, by the plan."""
    rows_least: int | None = None
    """Key rows that must reach some rank with this layout: see `works.least_rows`."""
    gib_moved: float | None = None
    """On all wires together in forward + backward, by the plan."""
    gib_least: float | None = None
    """With the least key rows: K and V twice, and their gradients in float32 once."""


def spelled(system: str) -> tuple[str, str, str]:
    """What a system's name says, KIND[_KERNEL][@WAY]: "single", "ringflash" or a word of a peer's name; a kernel, or "lean"; a
    layout in place of the work's, or a schedule."""
    name, _, way = system.partition("@")
    kind, _, kernel = name.partition("_")
    return kind, kernel, way


def is_peer(system: str) -> bool:
    return spelled(system)[0] not in ("single", "ringflash")


class System:
    """One thing to measure: forward and forward + backward of this rank's tensors."""

    def __init__(self, name: str, work: Work, cfg: DictConfig, device: torch.device) -> None:
        world, self.outside = dist.get_world_size(), _outside()
        self.name = name
        self.plan: Plan | None = None
        self.backend = "auto"
        kind, backend, way = spelled(name)
        layout, schedule = (work.layout, way) if way.partition(":")[0] in SCHEDULES else (way or work.layout, cfg.schedule)
        mask, tokens = work.mask(), work.seqlen // world
        area = pairs(mask, work.seqlen) / world
        self.attend: Callable[..., torch.Tensor]
        if kind == "single":
            tokens, mask = work.single(world)
            area = pairs(mask, tokens)
            if backend in ("cudnn", "fa2"):
                self.attend = baselines.single(backend, work.window, work.lengths)
            else:
                self.attend = lambda q, k, v: rf.attention(q, k, v, mask=mask, backend=backend or "auto")
        elif kind == "ringflash":
            lean = backend == "lean"
            self.backend, memory_budget = ("auto", "lean") if lean else (backend or "auto", cfg.memory_budget)
            cp = rf.ContextParallel(None, layout, schedule, transport=cfg.transport, memory_budget=memory_budget).for_mask(mask)
            cp.position_ids(work.seqlen)
            self.plan = cp.plan(dist.get_rank(), mask, work.seqlen, work.seqlen, work.heads, work.kv_heads)
            if cp.transport(device).name == "symmetric":  # where "auto" may train by another schedule than it infers by
                size = getattr(torch, cfg.dtype).itemsize
                self.plan = cp.trading(self.plan, cfg.head_dim, cfg.head_dim, size) or self.plan
            tokens = cp.layout_of(work.seqlen).lengths[dist.get_rank()]
            self.attend = lambda q, k, v: rf.attention(q, k, v, mask=mask, cp=cp, backend=self.backend)
        else:
            self.attend = baselines.distributed(name, work.window, work.lengths)
        self.flops = 4 * area * work.heads * cfg.head_dim

        def normal(heads: int) -> torch.Tensor:
            return torch.randn(1, tokens, heads, cfg.head_dim, device=device, dtype=getattr(torch, cfg.dtype))

        self.q, self.k, self.v = (normal(h).requires_grad_() for h in (work.heads, work.kv_heads, work.kv_heads))
        self.dout = normal(work.heads)
        self.peak = 0.0
        self.ms: dict[str, list[float]] = {run: [] for run in PASSES}

    def forward(self) -> None:
        with torch.no_grad():
            self.attend(self.q, self.k, self.v)
        baselines.leave()

    def both(self) -> None:
        out = self.attend(self.q, self.k, self.v)
        torch.autograd.grad(out, (self.q, self.k, self.v), self.dout)
        baselines.leave()

    def measured_both(self) -> None:
        """`both`, with its peak memory, in GiB, into ``peak``."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() - sum(x.nbytes for x in (self.q, self.k, self.v, self.dout))
        self.both()
        torch.cuda.synchronize()
        self.peak = (torch.cuda.max_memory_allocated() - before + max(0, _outside() - self.outside)) / GIB


def _outside() -> int:
    """Bytes of the device in use that torch's allocator does not hold: symmetric memory, NCCL's buffers, workspaces."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def budget(plan: Plan, head_dim: int, dtype_bytes: int) -> int:
    """Bytes of q, k, v, out, lse and their gradients, and of K and V of two of the plan's largest stages."""
    heads, kv_heads = plan.key.heads, plan.key.kv_heads
    kv_row = 2 * kv_heads * head_dim * dtype_bytes
    tensors = plan.q_len * heads * (2 * head_dim * dtype_bytes + 4) + plan.k_len * kv_row
    return 2 * tensors + 2 * max((step.rows for step in plan.steps[1:]), default=0) * kv_row


def wire_bytes(plan: Plan, rows: int, head_dim: int, dtype_bytes: int, takes_delta: bool) -> tuple[int, int]:
    """Bytes that reach this rank in forward + backward by the plan; and what so many key rows take, K and V travelling.

    takes_delta: of the kernel, as for `Plan.backward`.
    """
    back = plan.backward(head_dim, head_dim, dtype_bytes, takes_delta)
    kv = row_bytes(plan, "kv", head_dim, head_dim, dtype_bytes)
    what = row_bytes(plan, back.key.travels, head_dim, head_dim, dtype_bytes)
    return plan.rows_received() * kv.out + back.rows_received() * (what.out + what.home), rows * (2 * kv.out + kv.home)


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
    return _slowest(start.elapsed_time(end) / repeats)


def _slowest(ms: float) -> float:
    value = torch.tensor([ms], device="cuda")
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return float(value)


def _everywhere(total: int) -> int:
    value = torch.tensor([total], device="cuda")
    dist.all_reduce(value)
    return int(value)


def started(name: str, work: Work, cfg: DictConfig, device: torch.device, say: Callable[..., None]) -> System | None:
    """The system, run once (a long work: forward only); None, with a word, where it cannot do the work on some rank."""
    failed, system = torch.zeros(1, device=device), None
    try:
        if work.long:  # kernels are loaded, or compiled, on a short one
            System(name, replace(work, seqlen=SHORT), cfg, device).both()
        system = System(name, work, cfg, device)
        system.forward() if work.long else system.measured_both()
    except Exception as error:
        failed += 1
        reason = str(error) if isinstance(error, (ValueError, ImportError)) else traceback.format_exc(limit=-3)[-600:]
        say(f"{work.name}: {name} is left out: {reason}")
        baselines.leave()
    dist.all_reduce(failed)
    return None if failed.item() else system


def measure(
    work: Work, cfg: DictConfig, device: torch.device, say: Callable[..., None]
) -> tuple[list[Row], list[dict[str, Any]]]:
    """All systems on one work, interleaved; and the spans of a recorded pass of the first of ringflash's, of all ranks."""
    names = cfg.systems or ("single", *work.ours, *work.peers)
    systems = [s for name in names if (s := started(name, work, cfg, device, say)) is not None]
    rounds = work.rounds if work.rounds is not None else cfg.rounds
    repeats: dict[tuple[str, str], int] = {}
    if not work.long:  # brings the chip to its steady state
        repeats = {
            (s.name, run): max(1, round(cfg.work_s * 1000 / reading(getattr(s, run), 1))) for s in systems for run in PASSES
        }
        for system in systems:
            for run in PASSES:
                reading(getattr(system, run), repeats[system.name, run])
    for first in range(rounds):
        for system in rotated(systems, first):
            for run in PASSES:
                call = system.measured_both if work.long and run == "both" else getattr(system, run)
                system.ms[run].append(reading(call, repeats.get((system.name, run), 1)))
    rows = [row_of(system, work, cfg) for system in systems]
    spans: list[dict[str, Any]] = []
    for system, row in zip(systems, rows, strict=True):
        if system.plan is None:
            continue
        if not work.long:
            found, row.forward_exposed_ms, row.backward_exposed_ms = recorded(system, work.name)
            spans = spans or found
        if system.plan.key.schedule.ulysses == 1:  # these count what a ring moves
            row.budget_gib = round(_slowest(budget(system.plan, cfg.head_dim, system.q.element_size()) / GIB), 2)
            row.rows_moved = _everywhere(system.plan.rows_received())
            row.rows_least = least_rows(work.mask(), system.plan.key.k_layout)
            takes_delta = choose(system.backend, Problem.of(system.q, system.k, system.v, needs_grad=True)).extras.delta
            moved, least = wire_bytes(system.plan, row.rows_least, cfg.head_dim, system.q.element_size(), takes_delta)
            row.gib_moved, row.gib_least = round(_everywhere(moved) / GIB, 4), round(least / GIB, 4)
    compare(rows)
    return rows, spans


def row_of(system: System, work: Work, cfg: DictConfig) -> Row:
    layout = system.plan.key.q_layout.name if system.plan is not None else ""
    forward, both = (percentiles(system.ms[run]) for run in PASSES)
    return Row(
        work.name, system.name, work.seqlen, dist.get_world_size(), work.heads, work.kv_heads, cfg.head_dim, cfg.dtype, layout,
        torch.cuda.get_device_name(), torch.__version__, commit(cfg.commit), len(system.ms["both"]), forward, both,
        round(system.flops / forward[1] / 1e9, 1), round(3.5 * system.flops / both[1] / 1e9, 1),
        round(_slowest(system.peak), 2),
    )  # fmt: skip


def compare(rows: Sequence[Row]) -> None:
    """Fills in every row's ratios to single and to the fastest peer."""
    base = next((r for r in rows if r.system.startswith("single")), None)
    peers = [r for r in rows if is_peer(r.system)]
    for row in rows:
        if base:
            row.forward_ratio = round(row.forward_tflops / base.forward_tflops, 4)
            row.both_ratio = round(row.both_tflops / base.both_tflops, 4)
        if peers:
            row.forward_over_peer = round(row.forward_tflops / max(p.forward_tflops for p in peers), 4)
            row.both_over_peer = round(row.both_tflops / max(p.both_tflops for p in peers), 4)


def recorded(system: System, work: str) -> tuple[list[dict[str, Any]], float | None, float | None]:
    """All ranks' spans of one forward + backward pass, and how long forward and backward waited on the slowest rank, ms.

    None where nothing was marked.
    """
    dist.barrier()
    system.both()  # steady state: the recorded pass is queued behind it
    dist.all_reduce(torch.zeros(1, device="cuda"))  # ends on all ranks at the same time, to some microseconds: the clocks' zero
    with trace.record() as recorder:
        out = system.attend(system.q, system.k, system.v)
        trace.begin("turn")
        trace.end("turn")
        torch.autograd.grad(out, (system.q, system.k, system.v), system.dout)
    spans = recorder.spans()
    begin = next(s.start for s in spans if s.what == "turn")  # between the passes
    spans = [s for s in spans if s.what != "turn"]
    if not spans:
        return [], None, None
    forward = _slowest(trace.total([s for s in spans if s.start < begin], trace.WAIT))
    backward = _slowest(trace.total([s for s in spans if s.start >= begin], trace.WAIT))
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, spans)
    rows = [{"work": work, "rank": rank, **s._asdict()} for rank, found in enumerate(gathered) for s in found]
    return rows, round(forward, 3), round(backward, 3)


def line(r: Row) -> str:
    def part(value: float | None) -> str:
        return "      " if value is None else f"{value:6.3f}"

    return (
        f"{r.work:15} {r.system:26} {r.forward_ms[1]:9.3f} ms {r.forward_tflops:4.0f} TF "
        f"{part(r.forward_ratio)} {part(r.forward_over_peer)} {r.both_ms[1]:9.3f} ms {r.both_tflops:4.0f} TF "
        f"{part(r.both_ratio)} {part(r.both_over_peer)} {r.peak_gib:6.2f}"
    )


def summary(rows: Sequence[Row]) -> list[str]:
    """Of ringflash on every work: ratios to single and to the best peer, forward / forward + backward, and what it cost."""
    lines = []
    for r in (r for r in rows if spelled(r.system)[0] == "ringflash"):
        peers = [p for p in rows if p.work == r.work and is_peer(p.system)]
        best = max(peers, key=lambda p: p.both_tflops).system if peers else "no peer"
        exposed = "" if r.forward_exposed_ms is None else f", waits {r.forward_exposed_ms:.2f} / {r.backward_exposed_ms:.2f} ms"
        moved = f", moved {r.gib_moved / r.gib_least:.3f} x the least bytes" if r.gib_moved and r.gib_least else ""
        lines.append(
            f"{r.work:15} {r.system:18} of single {r.forward_ratio} / {r.both_ratio}, "
            f"x best peer {r.forward_over_peer} / {r.both_over_peer} ({best}), "
            f"peak {r.peak_gib} GiB of a budget of {r.budget_gib}{exposed}{moved}"
        )
    return lines


@hydra.main(version_base="1.3", config_path="conf", config_name="bench_ring")
def main(cfg: DictConfig) -> None:
    if unknown := set(cfg.works) - set(WORKS):
        raise ValueError(f"unknown works {sorted(unknown)}; allowed: {', '.join(WORKS)}")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    rank = dist.get_rank()
    torch.manual_seed(rank)
    dist.all_to_all_single(torch.empty(1024, device=device), torch.ones(1024, device=device))  # NCCL's buffers are nobody's

    def say(*words: Any) -> None:
        if rank == 0:
            print(*words, flush=True)

    pass_ = f"{'single':>6} {'peer':>6}"
    say(f"{'work':15} {'system':26} {'forward':>20} {pass_} {'fwd + bwd':>20} {pass_} {'GiB':>6}")
    everything: list[Row] = []
    for name in cfg.works:
        begin = time.monotonic()
        rows, spans = measure(WORKS[name], cfg, device, say)
        for r in rows:
            say(line(r))
        say(f"({time.monotonic() - begin:.0f} s)")
        everything += rows
        if rank == 0:
            append(Path(cfg.out), rows)
            if spans:
                Path(cfg.out).with_suffix(f".{name}.json").write_text(json.dumps(spans))
        gc.collect()
        torch.cuda.empty_cache()
    for text in summary(everything):
        say(text)
    if rank == 0 and cfg.plot:
        plots.ring_table(Path(cfg.out), Path(cfg.plot))
    if rank == 0 and cfg.timeline:
        for name in cfg.works:
            if (found := Path(cfg.out).with_suffix(f".{name}.json")).exists():
                plots.timeline(found, Path(cfg.timeline) / f"timeline_{name}.png")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
