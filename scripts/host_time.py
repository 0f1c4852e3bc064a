"""What a call costs the host: microseconds of Python of a layer's forward, and forward + backward, once its plan is known.

    python scripts/host_time.py [--device cuda]
    torchrun --nproc-per-node 4 scripts/host_time.py [--device cuda] [--schedule ring]

Small shapes, so that the device never holds the host up; nothing is synchronised inside what is timed. "kernel" is the backend's
own part of a forward (on the CPU it computes, on CUDA it launches); "loops alone" has a kernel that only makes its results.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

import ringflash as rf
from ringflash import api
from ringflash.kernels import Kernel
from ringflash.testing import Idle


def microseconds(call: Callable[[], Any], cuda: bool, repeats: int = 30, rounds: int = 15) -> float:
    """Median host time of one call; the device catches up between rounds. On the CPU without what other ranks take."""
    times, now = [], time.perf_counter if cuda else time.thread_time
    for _ in range(rounds):
        begin = now()
        for _ in range(repeats):
            call()
        times.append((now() - begin) / repeats * 1e6)
        if cuda:
            torch.cuda.synchronize()
    return statistics.median(times)


def measure(device: torch.device, cp: rf.ContextParallel | None, kernel: Kernel | None) -> dict[str, float]:
    """Host times by name."""
    q, k, v = (torch.randn(1, 128, heads, 64, device=device, dtype=torch.bfloat16) for heads in (8, 2, 2))
    mask, cuda = rf.Mask.causal(), device.type == "cuda"
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    dout = torch.randn_like(q)

    def forward() -> None:
        with torch.no_grad():
            rf.attention(q, k, v, mask=mask, cp=cp)

    def tracked() -> torch.Tensor:
        return rf.attention(*leaves, mask=mask, cp=cp)

    def both() -> None:
        torch.autograd.grad(tracked(), leaves, dout)

    def own() -> None:
        job = next(iter((api._JOBS if cp is None else cp.jobs).values()))
        part = job.plan.steps[0].parts[0]
        job.kernel.forward(q, k, v, part.slices, scale=job.scale, softcap=0.0, carry=None, finish=True)

    api._JOBS.clear()
    api._alone.cache_clear()
    if cp is not None:
        cp.agreed.clear()
        cp.jobs.clear()
    with patch.object(api, "choose", lambda *_: kernel) if kernel is not None else nullcontext():
        for _ in range(3):
            forward()
            both()
        calls = {"forward, no_grad": forward, "forward": tracked, "forward + backward": both, "kernel": own}
        return {name: microseconds(call, cuda) for name, call in calls.items()}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options.add_argument("--schedule", default="auto")
    options.add_argument("--transport", default="auto")
    args = options.parse_args()
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cuda", rank) if args.device == "cuda" else torch.device("cpu")
    cp = None
    torch.set_num_threads(1)
    if args.device == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
        cp = rf.ContextParallel(schedule=args.schedule, transport=args.transport)
    for name, kernel in (("as it is", None), ("loops alone", Idle())):
        found = measure(device, cp, kernel)
        if rank == 0:
            words = ", ".join(f"{what} {value:.1f}" for what, value in found.items())
            print(f"{world} rank(s), {args.device}, {args.schedule}, {name}: {words} us", flush=True)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
