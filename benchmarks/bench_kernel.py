"""Attention on one GPU, forward and backward, ours and peers' side by side, in TFLOP/s of the visible area.

    python -m benchmarks.bench_kernel suites=[dense_128,documents] direction=forward systems=[hopper,cudnn,flash_attn_4]

Under its power cap a GPU moves by some per cent from second to second, so all systems of a case are read in turn, ``rounds``
times, each reading about ``work_ms`` long, after ``warm_s`` seconds of the same work; medians are compared. FLOPs are 4 D per
visible pair and head forward, 10 D backward. A system whose results differ from ours, or that fails, is left out with a word.
Rows go to a JSON-lines file as they are measured; every suite ends with its geometric mean and its worst cell.

    torchrun --nproc-per-node 4 -m benchmarks.bench_kernel

deals the cases to four GPUs. A case is read on one of them, with all its systems, so that its ratios are of one chip.

The suites "epilogues" (forward), "ring_steps" and "deterministic" (backward) compare ours with itself; "ceiling" is one large
matrix product, as fast as the chip goes.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import cycle
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import Tensor
from torch.nn.attention import SDPBackend

from benchmarks import baselines, plots
from benchmarks.rows import Percentiles, append, commit, percentiles, rotated, summary
from benchmarks.works import lognormal
from ringflash.kernels import hopper, hopper_backward
from ringflash.slices import UNBOUNDED, Slices

PEERS = ("cudnn", "fa2", "flash_attn_4", "flash_attn_4_varlen")
DOCUMENTS_TOKENS = 65536
MOST_DIFFERENT = 0.02
"""Relative difference from our results above which a system does not compute the same: bf16 kernels differ by 3e-3 to 6e-3."""


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
_SIZES = ((1024, 16), (2048, 16), (4096, 16), (16384, 16), (8192, 32), (32768, 32))
DETERMINISTIC = [
    *(case for case in SUITES["dense_128"] if (case.S, case.H) in _SIZES),
    *(case for case in SUITES["documents"] if len(case.lengths) > 16),
    *SUITES["windows"],
]
OWN_SUITES = {"ceiling": "forward", "epilogues": "forward", "ring_steps": "backward", "deterministic": "backward"}
"""Suites without peers, and their direction."""


@dataclass
class Row:
    """One system on one case. Times in ms: 20th, 50th and 80th percentile of the readings."""

    suite: str
    case: str
    direction: str
    system: str
    batch: int
    seqlen: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    ms: Percentiles
    tflops: float
    peer: str | None
    """The fastest peer in the same readings; in a suite that compares ours with itself, what this is compared with."""
    ratio: float | None
    """Of this system's rate to the peer's."""
    of_dense: float | None
    """Documents: of the rate to the dense causal one at their mean length."""
    peak_mib: float
    """Memory that a call takes, its results included."""
    gpu: str
    torch: str
    commit: str


@dataclass
class Run:
    """One thing to time: a call that returns its results, and its FLOPs."""

    call: Callable[[], Any]
    flops: float
    prepare: Callable[[], object] | None = None
    """Done before every reading, outside it."""
    most: int = 1 << 30
    """Calls of one reading."""
    peak_mib: float = 0.0

    def ms(self, calls: int) -> float:
        """Milliseconds of one call, the mean of so many."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if self.prepare is not None:
            self.prepare()
        else:  # lets the host get ahead, so that no reading begins with a GPU that waits for it
            self.call()
        start.record()
        for _ in range(calls):
            self.call()
        end.record()
        torch.cuda.synchronize()
        ms = float(start.elapsed_time(end))
        return ms / calls

    def measured_ms(self) -> float:
        """Milliseconds of one call, whose memory goes into ``peak_mib``. Not the first: it makes work lists and loads kernels."""
        self.call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        ms = self.ms(1)
        self.peak_mib = round((torch.cuda.max_memory_allocated() - before) / 2**20, 2)
        return ms


@dataclass
class Group:
    """What is read in turn: runs by their system's name, on one case."""

    suite: str
    case: Case
    direction: str
    batch: int
    runs: dict[str, Run]
    against: dict[str, str] = field(default_factory=dict)
    """What a run is compared with; by default the fastest peer."""


@dataclass
class Problem:
    """The tensors of a case."""

    case: Case
    direction: str
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor

    @classmethod
    def random(cls, case: Case, direction: str, batch: int, dtype: torch.dtype) -> Problem:
        heads = (case.H, case.Hkv, case.Hkv, case.H)
        return cls(case, direction, *(torch.randn(batch, case.S, h, case.D, device="cuda", dtype=dtype) for h in heads))

    @cached_property
    def slices(self) -> Slices:
        return self.case.slices()

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.case.D)

    @property
    def flops(self) -> float:
        per_pair = (4 if self.direction == "forward" else 10) * self.case.D
        return float(per_pair * self.q.shape[0] * self.case.H * self.slices.area())

    @cached_property
    def saved(self) -> tuple[Tensor, Tensor, Tensor]:
        """out, lse and delta of a forward pass by our kernel."""
        out, lse = hopper.KERNEL.forward(self.q, self.k, self.v, self.slices, scale=self.scale)
        return out, lse, hopper_backward.delta(self.dout, out, None)

    def zeros(self) -> tuple[Tensor, Tensor, Tensor]:
        """float32 gradients to add into."""
        dq, dk, dv = (torch.zeros(x.shape, device="cuda") for x in (self.q, self.k, self.v))
        return dq, dk, dv

    def add(self, grads: tuple[Tensor, Tensor, Tensor], deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Our backward kernel as a ring step calls it: adds into float32 gradients, delta given."""
        (_, lse, delta), (dq, dk, dv) = self.saved, grads
        hopper_backward.backward(
            self.dout, self.q, self.k, self.v, None, lse, delta, self.slices,
            scale=self.scale, dq=dq, dk=dk, dv=dv, deterministic=deterministic,
        )  # fmt: skip
        return grads

    def run(self, call: Callable[[], Any]) -> Run:
        return Run(call, self.flops)


def whole(p: Problem, deterministic: bool = False) -> Run:
    """Our pass from bf16 to bf16: forward, or backward with delta, zeroing and conversion."""
    if p.direction == "forward":
        return p.run(lambda: hopper.KERNEL.forward(p.q, p.k, p.v, p.slices, scale=p.scale)[0])
    out, lse, _ = p.saved
    return p.run(
        lambda: hopper_backward.gradients(p.dout, p.q, p.k, p.v, out, lse, p.slices, scale=p.scale, deterministic=deterministic)
    )


def added(p: Problem, deterministic: bool = False) -> Run:
    """Our backward kernel alone."""
    grads = p.zeros()
    return p.run(lambda: p.add(grads, deterministic))


def torch_sdpa(p: Problem, backend: SDPBackend) -> Run | None:
    if p.case.lengths or p.case.window:
        return None
    return through_autograd(p, lambda q, k, v: baselines.sdpa(q, k, v, backend, p.case.causal))


def flash_attn_4(p: Problem) -> Run:
    attend = baselines.flash_attn_4(p.case.causal, p.case.window, p.case.lengths)
    return through_autograd(p, attend)


def flash_attn_4_varlen(p: Problem) -> Run | None:
    """A window by the entry for packed documents, of which there is one."""
    if p.case.lengths or not p.case.window or p.q.shape[0] > 1:
        return None
    return through_autograd(p, baselines.flash_attn_4(p.case.causal, p.case.window, (p.case.S,)))


def through_autograd(p: Problem, attend: baselines.Attention) -> Run:
    """A peer by its public entry, or its backward by torch's autograd on a graph that is kept."""
    if p.direction == "forward":
        return p.run(lambda: attend(p.q, p.k, p.v))
    inputs = [x.detach().requires_grad_() for x in (p.q, p.k, p.v)]
    out = attend(*inputs)
    return p.run(lambda: torch.autograd.grad(out, inputs, p.dout, retain_graph=True))


SYSTEMS: dict[str, Callable[[Problem], Run | None]] = {
    "hopper": whole,
    "hopper_float32": lambda p: added(p) if p.direction == "backward" else None,
    "cudnn": lambda p: torch_sdpa(p, baselines.CUDNN),
    "fa2": lambda p: torch_sdpa(p, baselines.FLASH),
    "flash_attn_4": flash_attn_4,
    "flash_attn_4_varlen": flash_attn_4_varlen,
}
"""Each makes its run on a problem; None where it does not apply."""


def started(label: str, makers: dict[str, Callable[[], Run | None]]) -> dict[str, Run]:
    """The runs that can be made and, called once, agree with the first; the others are left out with a word."""
    runs: dict[str, Run] = {}
    expected: list[Tensor] | None = None
    for name, make in makers.items():
        try:
            run = make()
            if run is None:
                continue
            results = run.call()
            torch.cuda.synchronize()
        except Exception as error:
            print(f"{label}: {name} is left out: {type(error).__name__}: {str(error)[:300]}", flush=True)
            continue
        given = [results] if isinstance(results, Tensor) else list(results)
        expected = expected or given
        difference = max(_difference(x, y) for x, y in zip(given, expected, strict=True))
        if not difference < MOST_DIFFERENT:
            print(f"{label}: {name} is left out: its results differ from {next(iter(runs))}'s by {difference:.3g}", flush=True)
            continue
        runs[name] = run
    return runs


def _difference(x: Tensor, expected: Tensor) -> float:
    """Relative, in the Frobenius norm; NaN stays NaN."""
    reference = expected.float()
    return float((x.float().reshape(reference.shape) - reference).norm() / reference.norm())


def against_peers(suite: str, case: Case, direction: str, cfg: DictConfig) -> Group:
    batch = max(1, cfg.tokens // case.S)
    p = Problem.random(case, direction, batch, getattr(torch, cfg.dtype))
    makers: dict[str, Callable[[], Run | None]] = {name: lambda name=name: SYSTEMS[name](p) for name in cfg.systems}  # type: ignore[misc]
    runs = started(f"{suite} {case.name} {direction}", makers)
    if case.lengths and "hopper" in runs:
        runs["hopper_dense"] = dense_run(p)
    return Group(suite, case, direction, batch, runs)


def dense_run(p: Problem) -> Run:
    """The yardstick of packed documents: the same tokens as a batch of causal sequences of the documents' mean length."""
    mean = p.case.S // len(p.case.lengths)
    same = Case(p.case.name, mean, p.case.H, p.case.Hkv, p.case.D, causal=True)
    return whole(Problem(same, p.direction, *(x.reshape(-1, mean, *x.shape[2:]) for x in (p.q, p.k, p.v, p.dout))))


def epilogues(cfg: DictConfig) -> Iterator[Group]:
    """What continuing, staying in float32 and a second chunk cost the forward."""
    for S in (n for n in (8192, 32768) if cfg.max_len >= n):
        half = Case(f"full {S} 32/8", S, 32, 8, 128, causal=False)
        p = Problem.random(half, "forward", 1, getattr(torch, cfg.dtype))
        carry = torch.randn(p.q.shape, device="cuda"), torch.randn(1, half.H, S, device="cuda")

        def step(p: Problem = p, **options: Any) -> Run:
            return p.run(lambda: hopper.KERNEL.forward(p.q, p.k, p.v, p.slices, scale=p.scale, **options))

        runs = {
            "start, finish": step(),
            "start, stay float32": step(finish=False),
            "continue, finish": step(carry=carry),
            "continue, stay float32": step(carry=carry, finish=False),
        }
        yield Group("epilogues", half, "forward", 1, runs, dict.fromkeys(runs, "start, finish"))
        k, v = (torch.cat([x, torch.randn_like(x)], dim=1) for x in (p.k, p.v))
        one, two = ((0, S, 0, 2 * S),), ((0, S, 0, S), (0, S, S, 2 * S))
        runs = {}
        for name, rectangles in (("one chunk", one), ("two chunks", two)):
            slices = Slices.from_rows([(*rectangle, -UNBOUNDED, UNBOUNDED) for rectangle in rectangles])
            runs[name] = Run(
                lambda slices=slices, p=p, k=k, v=v: hopper.KERNEL.forward(p.q, k, v, slices, scale=p.scale),  # type: ignore[misc]
                2 * p.flops,
            )
        yield Group("epilogues", half, "forward", 1, runs, dict.fromkeys(runs, "one chunk"))


def ceiling(cfg: DictConfig) -> Iterator[Group]:
    """What the chip's matrix units give on random data: one large product, by torch."""
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=getattr(torch, cfg.dtype)) for _ in range(2))
    yield Group(
        "ceiling",
        Case("matrix product of 8192", n, 1, 1, n, causal=False),
        "forward",
        1,
        {"product": Run(lambda: a @ b, 2 * n**3)},
    )


def ring_steps(cfg: DictConfig) -> Iterator[Group]:
    """A ring's first backward step, which finds its float32 gradients zero, and a later one, which finds them used."""
    n_sets = 4
    for causal in (False, True):
        case = Case(f"{'causal' if causal else 'full'} 8192 32/8", 8192, 32, 8, 128, causal)
        p = Problem.random(case, "backward", 1, getattr(torch, cfg.dtype))
        runs = {}
        for name in ("first step", "later step"):
            sets = [p.zeros() for _ in range(n_sets)]
            turn = cycle(sets)

            factor = 0.0 if name == "first step" else 1.0  # the same work before every reading

            def prepare(sets: list[tuple[Tensor, Tensor, Tensor]] = sets, factor: float = factor) -> None:
                for x in (x for grads in sets for x in grads):
                    x.mul_(factor)

            runs[name] = Run(
                lambda turn=turn, p=p: p.add(next(turn)),  # type: ignore[misc]
                p.flops,
                prepare,
                most=n_sets,
            )
        yield Group("ring_steps", case, "backward", 1, runs, dict.fromkeys(runs, "first step"))


def deterministic(cfg: DictConfig) -> Iterator[Group]:
    """What gradients that repeat bitwise cost."""
    for case in (c for c in DETERMINISTIC if cfg.max_len >= c.S):
        batch = max(1, cfg.tokens // case.S)
        p = Problem.random(case, "backward", batch, getattr(torch, cfg.dtype))
        runs = {
            "whole": whole(p),
            "whole, deterministic": whole(p, deterministic=True),
            "float32": added(p),
            "float32, deterministic": added(p, deterministic=True),
        }
        yield Group("deterministic", case, "backward", batch, runs, {name: name.split(",")[0] for name in runs})


class Deal:
    """Which of the cases, in their order, this process reads: every one, or under torchrun each process other ones."""

    def __init__(self) -> None:
        self.rank, self.world = (int(os.environ.get(name, at)) for name, at in (("RANK", "0"), ("WORLD_SIZE", "1")))
        self.dealt = 0

    def mine(self) -> bool:
        self.dealt += 1
        return (self.dealt - 1) % self.world == self.rank

    def together(self, rows: Sequence[Row]) -> list[Row]:
        """The rows of all processes, on each of them."""
        if self.world == 1:
            return list(rows)
        dist.init_process_group("gloo")
        found: list[list[Row]] = [[] for _ in range(self.world)]
        dist.all_gather_object(found, list(rows))
        dist.destroy_process_group()
        return [row for some in found for row in some]


def groups(suite: str, direction: str, cfg: DictConfig, deal: Deal) -> Iterator[Group]:
    """Made one after the other, so that one group's tensors are gone before the next one's come."""
    if suite in OWN_SUITES:
        if direction == OWN_SUITES[suite] and deal.mine():
            made = {"ceiling": ceiling, "epilogues": epilogues, "ring_steps": ring_steps, "deterministic": deterministic}
            yield from made[suite](cfg)
        return
    for case in SUITES[suite]:
        if cfg.max_len >= case.S and str(cfg.only) in case.name and deal.mine():
            yield against_peers(suite, case, direction, cfg)


def read(runs: dict[str, Run], cfg: DictConfig) -> dict[str, list[float]]:
    """Milliseconds of one call of each, ``rounds`` readings taken in turn."""
    once = {name: run.measured_ms() for name, run in runs.items()}
    calls = {name: min(run.most, max(1, round(cfg.work_ms / once[name]))) for name, run in runs.items()}
    begin = time.monotonic()
    while True:  # brings the chip to its steady state
        for name, run in runs.items():
            run.ms(calls[name])
        if time.monotonic() - begin >= cfg.warm_s:
            break
    found: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for first in range(cfg.rounds):
        for name in rotated(names, first):  # nobody always runs after the same neighbour
            found[name].append(runs[name].ms(calls[name]))
    return found


def rows_of(group: Group, found: dict[str, list[float]], dtype: str, where: tuple[str, str, str]) -> list[Row]:
    """where: GPU, torch and commit."""
    rates = {name: group.runs[name].flops / statistics.median(ms) / 1e9 for name, ms in found.items()}
    best = max((name for name in rates if name in PEERS), key=lambda name: rates[name], default=None)
    case, rows = group.case, []
    for name, rate in rates.items():
        peer = None if name == "hopper_dense" else group.against.get(name, best)
        yardstick = rates.get("hopper_dense") if name == "hopper" else None
        rows.append(
            Row(
                group.suite, case.name, group.direction, name, group.batch, case.S, case.H, case.Hkv, case.D, dtype,
                percentiles(found[name]), round(rate, 1), peer, round(rate / rates[peer], 4) if peer else None,
                round(rate / yardstick, 4) if yardstick else None, group.runs[name].peak_mib, *where,
            )
        )  # fmt: skip
    return rows


def line(rows: Sequence[Row]) -> str:
    """A group in one line: TFLOP/s, ratios to the best peer (or what it is compared with), part of the dense rate."""
    cells = []
    for r in rows:
        ratio = "" if r.ratio is None or r.peer == r.system else f" ({r.ratio:.3f})"
        cells.append(f"{r.system} {r.tflops:.0f}{ratio}" + ("" if r.of_dense is None else f" [{r.of_dense:.2f} of dense]"))
    return f"{rows[0].direction:8} {rows[0].suite:13} {rows[0].case:24} " + "  ".join(cells)


def summaries(rows: Sequence[Row]) -> Iterator[str]:
    """Of every suite and direction, for each of our systems, the ratios to the best peer (or to what they are compared with)."""
    ours = [r for r in rows if r.ratio is not None and r.system not in PEERS and r.peer != r.system]
    for key in dict.fromkeys((r.direction, r.suite, r.system) for r in ours):
        mine = [r for r in ours if (r.direction, r.suite, r.system) == key]
        text = summary([(r.case, r.ratio or 0.0) for r in mine])
        dense = [(r.case, r.of_dense) for r in mine if r.of_dense is not None]
        more = f"; of the dense rate: {summary(dense)}" if dense else ""
        yield f"{key[0]:8} {key[1]:13} {key[2]:24} {text}{more}"


@hydra.main(version_base="1.3", config_path="conf", config_name="bench_kernel")
def main(cfg: DictConfig) -> None:
    for word, given, allowed in (
        ("suites", cfg.suites, {*SUITES, *OWN_SUITES}),
        ("systems", cfg.systems, SYSTEMS),
        ("direction", [cfg.direction], ("forward", "backward", "both")),
    ):
        if unknown := set(given) - set(allowed):
            raise ValueError(f"unknown {word} {sorted(unknown)}; allowed: {', '.join(sorted(allowed))}")
    deal = Deal()
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    torch.manual_seed(0)
    where = (torch.cuda.get_device_name(), torch.__version__, commit(cfg.commit))
    rows: list[Row] = []
    directions = ("forward", "backward") if cfg.direction == "both" else (cfg.direction,)
    begin = time.monotonic()
    for suite in cfg.suites:
        for direction in directions:
            for group in groups(suite, direction, cfg, deal):
                if not group.runs:
                    continue
                fresh = rows_of(group, read(group.runs, cfg), cfg.dtype, where)
                group.runs.clear()
                rows += fresh
                append(Path(cfg.out), fresh)
                print(f"{time.monotonic() - begin:4.0f} s  {line(fresh)}", flush=True)
    rows = deal.together(rows)
    if deal.rank:
        return
    for text in summaries(rows):
        print(text, flush=True)
    if cfg.plot:
        plots.kernel_table(Path(cfg.out), Path(cfg.plot))


if __name__ == "__main__":
    main()
