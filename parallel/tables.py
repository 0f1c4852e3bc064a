"""What a machine can do, as numbers: a table of its device and one of its links.

The cost model reads them, `ringflash bench` writes them. There are defaults for an H200 with NVLink and for one CPU core with
gloo; ``measured`` returns what ``ringflash bench`` found on this machine, if it was run.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ringflash import env
from ringflash.parallel.schedule import Schedule

MB = 1 << 20


@dataclass(frozen=True)
class Rate:
    """What kernels reach at one head_dim, in TFLOP/s of computed tiles: full ones, and masked ones (computed whole).

    FLOP per score: ``2 (D + Dv)`` forward, ``6 D + 4 Dv`` backward.
    """

    head_dim: int
    forward_full_TFLOPS: float
    forward_masked_TFLOPS: float
    backward_full_TFLOPS: float
    backward_masked_TFLOPS: float


@dataclass(frozen=True)
class DeviceTable:
    """One device.

    tile         rows and columns of the square tiles that kernels compute.
    units        tiles of rows that run at the same time; with fewer the rates are not reached.
    rates        by head_dim; the nearest one counts.
    launch_s     cost of one kernel call, seconds.
    memory_GBps  of a device copy, bytes read and bytes written counted both.
    """

    name: str
    tile: int
    units: int
    rates: tuple[Rate, ...]
    launch_s: float
    memory_GBps: float

    def rate(self, head_dim: int) -> Rate:
        """The rates of the nearest measured head_dim."""
        return min(self.rates, key=lambda rate: abs(math.log(rate.head_dim / head_dim)))


@dataclass(frozen=True)
class Link:
    """One direction of a rank's connection: ``points`` (bytes, GB/s), ascending, as measured with single messages."""

    points: tuple[tuple[int, float], ...]
    latency_s: float

    def GBps(self, nbytes: float) -> float:  # noqa: N802 (a unit)
        """The rate of a message, interpolated over the logarithm of its size, constant beyond the ends."""
        (first, rate), *_ = self.points
        if nbytes <= first:
            return rate
        for (a, low), (b, high) in zip(self.points, self.points[1:], strict=False):
            if nbytes <= b:
                return low + (high - low) * math.log(nbytes / a) / math.log(b / a)
        return self.points[-1][1]

    def time_s(self, nbytes: float, messages: int = 1) -> float:
        """Seconds until ``nbytes`` in so many messages, posted together, have arrived.

        Messages posted together fill the link together, so the rate is that of their sum; each after the first costs a latency.
        Below the smallest measured size, time falls linearly to the latency.
        """
        if not messages:
            return 0.0
        first, rate = self.points[0]
        if nbytes < first:
            whole = first / rate / 1e9
            once = self.latency_s + max(0.0, whole - self.latency_s) * nbytes / first
        else:
            once = nbytes / self.GBps(nbytes) / 1e9
        return once + (messages - 1) * self.latency_s


@dataclass(frozen=True)
class LinkTable:
    """The links of a rank: ``fast`` inside a node of so many neighbouring ranks, ``slow`` between nodes."""

    name: str
    fast: Link
    slow: Link
    node: int

    def is_slow(self, a: int, b: int) -> bool:
        """Whether two ranks of the group are in different nodes."""
        return a // self.node != b // self.node

    def between(self, slow: bool) -> Link:
        return self.slow if slow else self.fast


@dataclass(frozen=True)
class Tables:
    """What a forecast is made of. ``source`` says where the numbers are from."""

    device: DeviceTable
    link: LinkTable
    source: str


H200 = DeviceTable(
    # cuDNN, 16k tokens, bfloat16, random inputs; masked tiles from what a causal mask costs at 4k tokens.
    name="H200",
    tile=128,
    units=132,
    rates=(Rate(64, 450, 200, 440, 200), Rate(128, 600, 200, 530, 200), Rate(256, 650, 180, 355, 200)),
    launch_s=10e-6,
    memory_GBps=4250,
)
NVLINK = LinkTable(
    # NCCL send/recv between two of four H200, 18 NVLinks each. Between nodes: what one 400 Gb/s port a GPU gives on paper.
    name="NVLink (NCCL), 400 Gb/s between nodes",
    fast=Link(((MB, 19), (4 * MB, 61), (16 * MB, 140), (64 * MB, 227), (256 * MB, 277)), latency_s=20e-6),
    slow=Link(((MB, 15), (4 * MB, 28), (16 * MB, 38), (64 * MB, 43), (256 * MB, 45)), latency_s=30e-6),
    node=8,
)
PULLED = LinkTable(
    # Copy engines pulling from symmetric memory, the same two H200 (transport "symmetric").
    name="NVLink (copy engines), 400 Gb/s between nodes",
    fast=Link(((MB, 73), (4 * MB, 174), (16 * MB, 292), (64 * MB, 350), (256 * MB, 364)), latency_s=10e-6),
    slow=NVLINK.slow,
    node=8,
)
CPU = DeviceTable(
    # One core with AVX-512, processor time, float32 at 2k tokens, torch's CPU flash operator.
    name="CPU core",
    tile=64,
    units=1,
    rates=(Rate(64, 0.08, 0.014, 0.077, 0.013), Rate(128, 0.084, 0.017, 0.082, 0.016)),
    launch_s=150e-6,
    memory_GBps=20,
)
GLOO = LinkTable(
    # gloo between two processes of one machine; between machines, 10 Gb/s Ethernet on paper.
    name="gloo",
    fast=Link(((1 << 16, 0.6), (MB, 1.1), (16 * MB, 1.2)), latency_s=100e-6),
    slow=Link(((1 << 16, 0.3), (MB, 0.9), (16 * MB, 1.1)), latency_s=200e-6),
    node=64,
)
DEFAULTS = {
    "cuda": Tables(H200, NVLINK, "defaults measured on H200"),
    "cpu": Tables(CPU, GLOO, "defaults measured on one CPU core"),
}


def measured(kind: str, path: Path | None = None) -> Tables:
    """The tables of a kind of device, "cuda" or "cpu": what `ringflash bench` wrote to ``path`` (default
    ``env.tables_path()``), or the defaults where it was not run.

    Raises ValueError for a file that holds something else.
    """
    if kind not in DEFAULTS:
        raise ValueError(f"there are tables for {' and '.join(DEFAULTS)}, got {kind!r}")
    path = env.tables_path() if path is None else path
    if not path.is_file():
        return DEFAULTS[kind]
    return read(path).get(kind, DEFAULTS[kind])


def for_schedule(tables: Tables, schedule: Schedule) -> Tables:
    """The tables, with a double ring's inner group as the node: that is what it says about the links."""
    if schedule.name != "double_ring":
        return tables
    return replace(tables, link=replace(tables.link, node=schedule.inner * schedule.ulysses))


def read(path: Path) -> dict[str, Tables]:
    """The tables of a file, by kind of device. Raises ValueError if it holds something else, OSError if it cannot be read."""
    try:
        found = json.loads(path.read_text())
        return {
            kind: Tables(_device(entry["device"]), _link_table(entry["link"]), entry["source"]) for kind, entry in found.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} holds no tables of `ringflash bench` ({what}); write it anew or remove it") from error


def write(path: Path, kind: str, tables: Tables) -> None:
    """Puts the tables of a kind of device into a file, beside those of other kinds that it may hold."""
    found = {k: asdict(t) for k, t in (read(path) if path.is_file() else {}).items()}
    found[kind] = asdict(tables)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=2) + "\n")


def _device(entry: dict[str, Any]) -> DeviceTable:
    rates = tuple(Rate(**rate) for rate in entry["rates"])
    if not rates or any(value <= 0 for rate in entry["rates"] for value in rate.values()):
        raise ValueError("rates must be given and positive")
    return DeviceTable(**{**entry, "rates": rates})


def _link(entry: dict[str, Any]) -> Link:
    points = tuple((int(nbytes), float(rate)) for nbytes, rate in entry["points"])
    if not points or any(nbytes <= 0 or rate <= 0 for nbytes, rate in points) or list(points) != sorted(points):
        raise ValueError("a link's points must be positive and ascending")
    return Link(points, float(entry["latency_s"]))


def _link_table(entry: dict[str, Any]) -> LinkTable:
    return LinkTable(entry["name"], _link(entry["fast"]), _link(entry["slow"]), int(entry["node"]))
