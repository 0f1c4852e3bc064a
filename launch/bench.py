"""``ringflash bench``: measures this machine's kernels and links, and writes the tables that ``ringflash plan`` predicts with.

The device: attention on one device at a few sizes, full and causal, forward and backward; what the masked tiles of a causal mask
cost is what its time exceeds that of its full tiles by. The link: messages of growing size between rank 0 and the next, both ways
at once, as a ring sends them.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

import ringflash as rf
from ringflash import env
from ringflash.check import join
from ringflash.launch import ranks as launcher
from ringflash.launch import world as worlds
from ringflash.options import Parser
from ringflash.parallel import tables
from ringflash.parallel.layout import make_layout
from ringflash.parallel.plan import make_plan
from ringflash.parallel.schedule import Schedule
from ringflash.parallel.tables import DeviceTable, Link, LinkTable, Rate, Tables
from ringflash.parallel.work import Work, work_of
from ringflash.parallel.world import PlanKey

Op = Callable[[], object]


@dataclass(frozen=True)
class Sizes:
    """What is measured on a kind of device."""

    dtype: torch.dtype
    head_dims: tuple[int, ...]
    heads: int
    seqlen: int
    message_bytes: tuple[int, ...]
    copy_bytes: int
    tile: int


GPU = Sizes(torch.bfloat16, (64, 128, 256), 16, 16384, tuple(4**i << 20 for i in range(5)), 1 << 30, 128)
CPU = Sizes(torch.float32, (64, 128), 2, 2048, (1 << 16, 1 << 20, 1 << 24), 1 << 26, 64)


class Clock:
    """Seconds of work on one device: the median of several runs after warming up."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats

    def seconds(self, work: Op) -> float:
        for _ in range(max(2, self.repeats // 3)):
            work()
        return statistics.median(self._once(work) for _ in range(self.repeats))

    def _once(self, work: Op) -> float:
        if self.device.type != "cuda":
            begin = time.perf_counter()
            work()
            return time.perf_counter() - begin
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        work()
        stop.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(stop)) / 1e3


def forward_and_backward(
    clock: Clock, shape: tuple[int, int, int, int], dtype: torch.dtype, mask: rf.Mask
) -> tuple[float, float]:
    """Seconds of one attention (B, S, H, D), forward and backward."""
    q, k, v = (torch.randn(shape, device=clock.device, dtype=dtype, requires_grad=True) for _ in range(3))
    dout = torch.randn(shape, device=clock.device, dtype=dtype)
    out = rf.attention(q, k, v, mask=mask)
    forward = clock.seconds(lambda: rf.attention(q, k, v, mask=mask))
    backward = clock.seconds(lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True))
    return forward, backward


def tiles(mask: rf.Mask, seqlen: int, tile: int) -> Work:
    """The tiles of one head on one device."""
    layout = make_layout("contiguous", seqlen, 1)
    return work_of(make_plan(PlanKey(mask, layout, layout, Schedule(), 1, 1, 0)).steps[0].parts, tile)


def measure_device(device: torch.device, sizes: Sizes, clock: Clock) -> DeviceTable:
    """The device's table."""
    launch = launch_s(clock, sizes.dtype)
    rates = tuple(measure_rate(clock, sizes, head_dim, launch) for head_dim in sizes.head_dims)
    a, b = (torch.zeros(sizes.copy_bytes // 4, device=device) for _ in range(2))
    copied = 2 * sizes.copy_bytes / clock.seconds(lambda: b.copy_(a)) / 1e9
    on_gpu = device.type == "cuda"
    units = torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else torch.get_num_threads()
    name = torch.cuda.get_device_name(device) if on_gpu else f"CPU, {units} thread{'s' if units > 1 else ''}"
    return DeviceTable(name, sizes.tile, units, rates, launch, copied)


def launch_s(clock: Clock, dtype: torch.dtype) -> float:
    """What a call costs that computes next to nothing."""
    q = torch.randn(1, 16, 1, 64, device=clock.device, dtype=dtype)
    with torch.no_grad():
        return clock.seconds(lambda: rf.attention(q, q, q))


def measure_rate(clock: Clock, sizes: Sizes, head_dim: int, launch: float) -> Rate:
    """Rates of full and of masked tiles at a head_dim, from a full and a causal mask.

    Full at the whole length; masked at a quarter of it (and four sequences), where masked tiles are a larger share of the work.
    """
    found = []
    whole, quarter = (1, sizes.seqlen, sizes.heads, head_dim), (4, sizes.seqlen // 4, sizes.heads, head_dim)
    full_s = forward_and_backward(clock, whole, sizes.dtype, rf.Mask.full())
    near_s = forward_and_backward(clock, quarter, sizes.dtype, rf.Mask.full())
    causal_s = forward_and_backward(clock, quarter, sizes.dtype, rf.Mask.causal())
    work, causal = (tiles(mask, sizes.seqlen // 4, sizes.tile) for mask in (rf.Mask.full(), rf.Mask.causal()))
    for i, per_pair in enumerate((4 * head_dim, 10 * head_dim)):
        tera = sizes.tile**2 * sizes.heads * per_pair / 1e12  # FLOP of one tile of all heads
        full = tiles(rf.Mask.full(), sizes.seqlen, sizes.tile).full_tiles * tera / (full_s[i] - launch)
        # Full tiles take there what they take without a mask; the rest of the time is the masked tiles'.
        left = causal_s[i] - launch - (near_s[i] - launch) * causal.full_tiles / work.full_tiles
        masked = 4 * causal.masked_tiles * tera / left if left > 0 else full
        found.append((full, min(masked, full)))
    return Rate(head_dim, *found[0], *found[1])


def measure_link(device: torch.device, sizes: Sizes, repeats: int) -> Link:
    """Messages between ranks 0 and 1, both ways at once; all ranks must call it."""
    rank, points, latency = dist.get_rank(), [], math.inf
    for nbytes in (1 << 10, *sizes.message_bytes):
        mine, theirs = (torch.zeros(nbytes, dtype=torch.uint8, device=device) for _ in range(2))

        def exchange(mine: torch.Tensor = mine, theirs: torch.Tensor = theirs) -> None:
            ops = [dist.P2POp(dist.isend, mine, 1 - rank), dist.P2POp(dist.irecv, theirs, 1 - rank)]
            for work in dist.batch_isend_irecv(ops):
                work.wait()

        dist.barrier()
        seconds = Clock(device, repeats).seconds(exchange) if rank < 2 else 0.0
        slowest = torch.tensor([seconds], device=device, dtype=torch.float32)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        seconds = float(slowest)
        if nbytes < sizes.message_bytes[0]:
            latency = seconds
        else:
            points.append((nbytes, nbytes / seconds / 1e9))
    return Link(tuple(points), latency)


def report(found: Tables) -> str:
    """The tables for people."""
    device, link = found.device, found.link.fast
    lines = [
        f"device  {device.name}: tiles of {device.tile}, launch {1e6 * device.launch_s:.0f} us, "
        f"memory {device.memory_GBps:,.0f} GB/s"
    ]
    lines.append(f"{'':8}{'head_dim':>9}{'forward full':>14}{'masked':>9}{'backward full':>15}{'masked':>9}  TFLOP/s")
    for r in device.rates:
        cells = (r.forward_full_TFLOPS, r.forward_masked_TFLOPS, r.backward_full_TFLOPS, r.backward_masked_TFLOPS)
        width = (14, 9, 15, 9)
        lines.append(f"{'':8}{r.head_dim:>9}" + "".join(f"{c:>{w}.3g}" for c, w in zip(cells, width, strict=True)))
    lines.append(f"link    {found.link.name}: latency {1e6 * link.latency_s:.0f} us")
    lines += [f"{'':8}{nbytes / (1 << 20):>9.3g} MiB {rate:>9.3g} GB/s" for nbytes, rate in link.points]
    return "\n".join(lines)


def run(options: argparse.Namespace, device: torch.device) -> int:
    """The measurements of one rank; rank 0 writes and prints."""
    kind = device.type
    sizes, default = (GPU, tables.DEFAULTS["cuda"]) if kind == "cuda" else (CPU, tables.DEFAULTS["cpu"])
    first = dist.get_rank() == 0
    path = Path(options.out).expanduser() if options.out else env.tables_path()
    link = default.link
    if dist.get_world_size() > 1:
        fast = measure_link(device, sizes, options.repeats)
        link = LinkTable(f"{dist.get_backend()}, measured; between nodes {link.name}", fast, link.slow, link.node)
    if first:
        table = measure_device(device, sizes, Clock(device, options.repeats))
        when = time.strftime("%Y-%m-%d")
        found = Tables(table, link, f"measured by ringflash bench on {when}, torch {torch.__version__}")
        print(report(found))
        tables.write(path, kind, found)
        print(f"written to {path}; ringflash plan uses it" + ("" if path == env.tables_path() else f" with --tables {path}"))
    dist.barrier()  # the other ranks' devices idle meanwhile, as they would not if they measured too
    return 0


def read(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="ringflash bench", description="Measures this machine for the forecasts of `ringflash plan`.")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU")
    parser.add_argument("--out", metavar="FILE", help=f"where to write (default {env.TABLES.name}, {env.TABLES.default})")
    parser.add_argument("--repeats", type=int, default=9, help="runs of which the median counts (default 9)")
    options = parser.parse_args(argv)
    if options.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {options.repeats}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = read(arguments)
    gpus = torch.cuda.device_count()
    if options.device == "cuda" and not gpus:
        raise ValueError("--device cuda, but torch sees no GPU here")
    kind = options.device or ("cuda" if gpus else "cpu")
    if worlds.launcher() is None:
        # With one GPU there is no link to measure; on a CPU two processes make one.
        return launcher.start("ringflash.launch.bench", [*arguments, "--device", kind], min(gpus, 2) if kind == "cuda" else 2)
    try:
        return run(options, join(kind))
    finally:
        worlds.leave()


if __name__ == "__main__":
    sys.exit(main())
