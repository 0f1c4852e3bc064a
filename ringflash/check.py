"""``ringflash check``: every schedule and layout against one device, on this very machine.

Each case is computed by all ranks and by the formula in float64. The error that is fair is that of plain torch: the same formula
on one device in the same dtype. A result passes if its error (relative, Frobenius) is at most twice that, plus a rounding band.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ringflash.api import attention
from ringflash.kernels import NAMES, Problem, choose
from ringflash.kernels.running import accumulate_dtype
from ringflash.launch import ranks as launcher
from ringflash.launch import world as worlds
from ringflash.mask import Mask
from ringflash.options import Parser, at_least_one, size
from ringflash.parallel.context import ContextParallel
from ringflash.testing.cases import DTYPES
from ringflash.testing.oracle import Inputs, Results, dense_attention
from ringflash.testing.tolerance import FLOAT64_TOLERANCE, relative_error

LAYOUTS = ("zigzag", "contiguous", "striped", "balanced")
RESULTS = ("out", "lse", "dq", "dk", "dv", "dsinks")
SCORES = 1 << 24
"""Scores the formula holds at once: 128 MiB in float64. Longer sequences are computed in blocks of query rows."""


@dataclass(frozen=True)
class Way:
    """How a world computes attention."""

    schedule: str
    layout: str
    transport: str = "auto"
    ulysses: int = 1
    inner: int | None = None

    def context(self) -> ContextParallel:
        return ContextParallel(None, self.layout, self.schedule, ulysses=self.ulysses, inner=self.inner, transport=self.transport)


@dataclass(frozen=True)
class Question:
    """One call of attention. ``why`` it is asked is in its name."""

    name: str
    mask: Mask
    softcap: float = 0.0
    sinks: bool = False
    dlse: bool = False


def ways(world: int, quick: bool, device: str = "cpu") -> list[Way]:
    """Every schedule with every layout, and the other transports with one; quickly: each schedule once, the layouts in turn."""
    schedules = [Way("ring", ""), Way("allgather", "")]
    if world > 2:
        schedules.append(Way("staged:2", ""))
    schedules.append(Way("ulysses", ""))
    if 1 < world <= (4 if device == "cuda" else 2):  # a query head of each group for every rank
        schedules.append(Way("ulysses:2", ""))
    if world >= 4 and world % 2 == 0:
        schedules += [Way("hybrid", "", ulysses=2), Way("double_ring", "", inner=world // 2)]
    if quick:
        turn = [LAYOUTS[i % len(LAYOUTS)] for i in range(len(schedules))]
        found = [replace(way, layout=layout) for way, layout in zip(schedules, turn, strict=True)]
    else:
        found = [replace(way, layout=layout) for way in schedules for layout in LAYOUTS]
    found += [Way("allgather", "zigzag", "allgather"), Way("ring", "zigzag", "alltoall")]
    if device == "cuda":  # a double ring passes chunks on: its groups pull them, or nobody does
        for way in schedules:
            transports = ("symmetric",) if way.inner is None else ("domains", "p2p")
            found += [replace(way, layout="zigzag", transport=transport) for transport in transports]
    return found


def questions(seqlen: int, quick: bool) -> list[Question]:
    """Masks with sizes off the edges of chunks and tiles."""
    cuts = sorted({0, seqlen // 7 + 1, seqlen // 3, seqlen // 3 + 1, 3 * seqlen // 4 - 1, seqlen})
    lengths = [b - a for a, b in pairwise(cuts)]
    asked = [
        Question("causal", Mask.causal()),
        Question("full", Mask.full()),
        Question("window, softcap", Mask.causal(window=seqlen // 5 + 1), softcap=20.0),
        Question("documents, sinks", Mask.documents([*lengths[:1], 0, *lengths[1:]]), sinks=True),
        Question("prefix, lse differentiated", Mask.prefix(seqlen // 3 + 1), dlse=True),
    ]
    return [asked[0], asked[2], asked[3]] if quick else asked


@dataclass(frozen=True)
class Shape:
    batch: int
    seqlen: int
    heads: int
    kv_heads: int
    head_dim: int


def make_inputs(question: Question, shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Normally distributed, the same on every rank and for every question."""
    accumulate = accumulate_dtype(dtype)
    q, k, v, dout = (x.to(dtype) for x in _drawn(shape, device)[:4])
    sinks, dlse = (x.to(accumulate) for x in _drawn(shape, device)[4:])
    return Inputs(q, k, v, sinks if question.sinks else None, dout, dlse if question.dlse else None)


@lru_cache(maxsize=1)  # 21 million numbers at the sizes of GPUs
def _drawn(shape: Shape, device: torch.device) -> list[Tensor]:
    """q, k, v, dout, sinks and dlse in float32."""
    generator = torch.Generator().manual_seed(20261120)
    b, s, h, hk, d = shape.batch, shape.seqlen, shape.heads, shape.kv_heads, shape.head_dim
    sizes = ((b, s, h, d), (b, s, hk, d), (b, s, hk, d), (b, s, h, d), (h,), (b, h, s))
    return [torch.randn(size, generator=generator).to(device) for size in sizes]


def formula(inputs: Inputs, mask: Mask, softcap: float, dtype: torch.dtype) -> Results:
    """Forward and gradients of the dense formula in a dtype, in blocks of query rows; shares of dk, dv, dsinks are added in the
    accumulate dtype. The LSE is computed in the accumulate dtype throughout."""
    b, n, h = inputs.q.shape[:3]
    rows = max(1, SCORES // (b * h * n))
    accumulate = accumulate_dtype(dtype)
    k, v = (x.detach().to(dtype).requires_grad_() for x in (inputs.k, inputs.v))
    sinks = None if inputs.sinks is None else inputs.sinks.detach().to(dtype).requires_grad_()
    sums = [torch.zeros_like(x, dtype=accumulate) for x in (k, v, sinks) if x is not None]
    outs, lses, dqs = [], [], []
    key = torch.arange(n, device=inputs.q.device)
    for start in range(0, n, rows):
        block = slice(start, start + rows)
        visible = mask.visible(key[block], key)
        q = inputs.q[:, block].detach().to(dtype).requires_grad_()
        out, lse = dense_attention(q, k, v, visible, softcap=softcap, sinks=sinks)
        roots, grads = [out], [inputs.dout[:, block].to(dtype)]
        if inputs.dlse is not None:
            roots.append(lse)
            grads.append(inputs.dlse[:, :, block].to(dtype))
        dq, *shares = torch.autograd.grad(roots, [x for x in (q, k, v, sinks) if x is not None], grads)
        for total, share in zip(sums, shares, strict=True):
            total += share
        if accumulate != dtype:
            exact_q, exact_k, exact_v = (x.detach().to(accumulate) for x in (q, k, v))
            with torch.no_grad():
                _, lse = dense_attention(exact_q, exact_k, exact_v, visible, softcap=softcap, sinks=inputs.sinks)
        outs.append(out.detach())
        lses.append(lse.detach())
        dqs.append(dq)
    dk, dv, *dsinks = sums
    dsink = dsinks[0] if dsinks else None
    return Results(torch.cat(outs, 1), torch.cat(lses, 2), torch.cat(dqs, 1), dk.to(dtype), dv.to(dtype), dsink)


def measured(inputs: Inputs, question: Question, backend: str, cp: ContextParallel | None) -> tuple[Results, str]:
    """What ringflash gives for the whole sequence, and the kernel's name: on one device, or by all ranks, every one of which gets
    the whole result. The LSE is asked for with the gradients only where it is differentiated: that may take another kernel."""
    q, k, v = leaves = [_local(x, 1, cp).detach().clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    sinks = None if inputs.sinks is None else inputs.sinks.detach().clone().requires_grad_()
    options: dict[str, Any] = {"mask": question.mask, "softcap": question.softcap, "sinks": sinks, "cp": cp, "backend": backend}
    if inputs.dlse is None:
        with torch.no_grad():
            lse = attention(q, k, v, **options, return_lse=True)[1]
        out = attention(q, k, v, **options)
        roots, grads = [out], [_local(inputs.dout, 1, cp)]
    else:
        out, lse = attention(q, k, v, **options, return_lse=True)
        roots, grads = [out, lse], [_local(inputs.dout, 1, cp), _local(inputs.dlse, 2, cp)]
    dq, dk, dv, *dsinks = torch.autograd.grad(roots, [*leaves, *([] if sinks is None else [sinks])], grads)
    dsink = dsinks[0] if dsinks else None
    if cp is None:
        return Results(out.detach(), lse.detach(), dq, dk, dv, dsink), _kernel(inputs, question, backend)
    if dsink is not None:
        dist.all_reduce(dsink, group=cp.group)
    out, dq, dk, dv = (cp.unshard(x.detach(), dim=1) for x in (out, dq, dk, dv))
    _, kernel, _ = list(cp.agreed.values())[-1]
    return Results(out, cp.unshard(lse.detach(), dim=2), dq, dk, dv, dsink), kernel.name


def _local(x: Tensor, dim: int, cp: ContextParallel | None) -> Tensor:
    return x if cp is None else cp.shard(x, dim=dim)


def _kernel(inputs: Inputs, question: Question, backend: str) -> str:
    """The kernel that one device chooses."""
    wishes = {"softcap": question.softcap > 0, "dlse": question.dlse, "needs_grad": True}
    return choose(backend, Problem.of(inputs.q, inputs.k, inputs.v, **wishes)).name


def errors(given: Results, truth: Results) -> dict[str, float]:
    """Relative Frobenius errors by name; infinite where shapes differ, NaN where a result has any."""
    exact = dict(truth.items())
    found = {}
    for name, x in given.items():
        found[name] = relative_error(x, exact[name]) if x.shape == exact[name].shape else float("inf")
    return found


def band(name: str, dtype: torch.dtype) -> float:
    """What rounding alone may add: half a unit of the result's last place, or eight units of float32's, in which everything is
    accumulated (the order of adding differs). In float64, plain torch is the truth itself, and 1e-12 is what is asked."""
    if dtype == torch.float64:
        return FLOAT64_TOLERANCE
    rounded = torch.float32 if name in ("lse", "dsinks") else dtype
    return max(torch.finfo(rounded).eps / 2, 8 * torch.finfo(torch.float32).eps)


@dataclass
class Row:
    """One line of the table."""

    schedule: str
    layout: str
    transport: str
    kernel: str
    errors: dict[str, float]
    wrong: tuple[str, ...] = ()
    verdict: str = ""

    @classmethod
    def head(cls) -> str:
        words = [*("schedule", "layout", "transport", "kernel"), *RESULTS]
        return "".join(f"{w:<12}" if i < 4 else f"{w:>9} " for i, w in enumerate(words))

    def __str__(self) -> str:
        numbers = "".join(
            f"{self.errors[n]:9.1e}{'*' if n in self.wrong else ' '}" if n in self.errors else " " * 10 for n in RESULTS
        )
        return (
            "".join(f"{w:<12}" for w in (self.schedule, self.layout, self.transport, self.kernel)) + numbers + f" {self.verdict}"
        )


class Check:
    """The run of one rank. Rank 0 prints, and alone knows the truth."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.options, self.device = options, device
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        on_gpu = device.type == "cuda"
        self.shape = Shape(
            batch=1,
            seqlen=options.seqlen or (8192 if on_gpu else 384 if options.quick else 512),
            heads=8 if on_gpu else 4,
            kv_heads=2,
            head_dim=128 if on_gpu else 32,
        )
        self.contexts: dict[Way, ContextParallel] = {}
        self.passed = self.failed = 0
        self.refusals: dict[str, int] = {}

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)

    def run(self) -> int:
        begin, s = time.monotonic(), self.shape
        self.say(
            f"ringflash check: {self.world} ranks on {self.device.type} ({dist.get_backend()}), {s.seqlen:,} tokens, "
            f"{s.heads} query and {s.kv_heads} key heads of {s.head_dim}\n"
            "errors against the formula in float64, relative, in the Frobenius norm; fair is up to twice plain torch's\n"
            "on one device plus a rounding band; * marks what is more"
        )
        for dtype in self.options.dtype:
            # All questions of a dtype go through the same contexts, as the layers of a model do. To make one is not free: over
            # symmetric memory every buffer is a rendezvous.
            self.contexts.clear()
            for question in questions(s.seqlen, self.options.quick):
                self._ask(question, DTYPES[dtype])
        for reason, n in self.refusals.items():
            self.say(f"refused {n} times: {reason}")
        verdict = [self.passed > 0 and not self.failed]
        dist.broadcast_object_list(verdict, device=self.device)  # all ranks end with the same exit code
        self.say(
            f"{'PASS' if verdict[0] else 'FAIL'}: {self.passed} of {self.passed + self.failed} cases pass, "
            f"{time.monotonic() - begin:.0f} s"
        )
        return 0 if verdict[0] else 1

    def _ask(self, question: Question, dtype: torch.dtype) -> None:
        inputs = make_inputs(question, self.shape, dtype, self.device)
        self.say(f"\n{str(dtype).removeprefix('torch.')}, {question.name}\n{Row.head()}")
        truth = fair = None
        if self.rank == 0:
            truth = formula(inputs, question.mask, question.softcap, torch.float64)
            fair = errors(formula(inputs, question.mask, question.softcap, dtype), truth)
            self.say(str(Row("plain torch", "", "", "", fair)))
        for way in (None, *ways(self.world, self.options.quick, self.device.type)):
            row = self._row(way, inputs, question, truth, fair)
            if row is not None:
                self.passed += row.verdict == "PASS"
                self.failed += row.verdict == "FAIL"
                self.say(str(row))

    def _row(
        self, way: Way | None, inputs: Inputs, question: Question, truth: Results | None, fair: dict[str, float] | None
    ) -> Row | None:
        """One case, by all ranks (way None: by rank 0 alone); the row on rank 0."""
        if way is None and self.rank:
            return None
        cp = None if way is None else self._context(way).for_mask(question.mask)
        names = ("one device", "", "") if way is None or cp is None else (way.schedule, way.layout, cp.transport_name)
        try:
            given, kernel = measured(inputs, question, self.options.backend, cp)
        except ValueError as error:
            if way is not None:
                self.contexts.pop(way, None)  # the next question begins anew
            reason = str(error).splitlines()[0]
            self.refusals[reason] = self.refusals.get(reason, 0) + 1
            return Row(*names, self.options.backend, {}, verdict="refused") if self.rank == 0 else None
        if truth is None or fair is None:
            return None
        found = errors(given, truth)
        wrong = tuple(n for n in found if not found[n] <= 2 * fair[n] + band(n, inputs.q.dtype))  # a NaN is wrong
        return Row(*names, kernel, found, wrong, "FAIL" if wrong else "PASS")

    def _context(self, way: Way) -> ContextParallel:
        if way not in self.contexts:
            self.contexts[way] = way.context()
        return self.contexts[way]


def read(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="ringflash check", description="Compares every schedule with one device, on this machine.")
    parser.add_argument("--world", type=int, help="ranks to start (default: one per GPU if there are several, else 4 on the CPU)")
    parser.add_argument("--seqlen", metavar="S", help="tokens of the whole sequence (default 8192 on GPUs, 512 on the CPU)")
    parser.add_argument("--dtype", action="append", choices=list(DTYPES), help="may be repeated (default float32 and bfloat16)")
    parser.add_argument("--backend", default="auto", choices=("auto", *NAMES), help="kernel to use (default auto)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if every rank has a GPU, else cpu")
    parser.add_argument("--quick", action="store_true", help="fewer masks, one layout per schedule")
    options = parser.parse_args(argv)
    options.dtype = options.dtype or ["float32", "bfloat16"]
    try:
        options.seqlen = None if options.seqlen is None else at_least_one("--seqlen", size("--seqlen", options.seqlen))
        options.world = None if options.world is None else at_least_one("--world", options.world)
    except ValueError as error:
        parser.error(str(error))
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0 all pass, 1 some do not, 2 impossible options."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = read(arguments)
    gpus = torch.cuda.device_count()
    if worlds.launcher() is None:
        world = options.world or (gpus if gpus > 1 and options.device != "cpu" else 4)
        if options.device == "cuda" and world > gpus:
            print(f"ringflash check: --device cuda needs a GPU a rank; there are {gpus} for {world} ranks", file=sys.stderr)
            return 2
        return launcher.start("ringflash.check", arguments, world)
    device = join(options.device)
    try:
        return Check(options, device).run()
    finally:
        worlds.leave()


def join(kind: str | None) -> torch.device:
    """Enters the group that torchrun describes: NCCL with this rank's GPU, or gloo. Raises ValueError under another launcher."""
    if worlds.launcher() != "torchrun":
        raise ValueError("start this command plainly, or with torchrun")
    local, here = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if kind is None:
        kind = "cuda" if 1 < here <= torch.cuda.device_count() else "cpu"
    if kind == "cpu":
        torch.set_num_threads(max(1, worlds.cores() // here))
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device


if __name__ == "__main__":
    sys.exit(main())
