"""What the rows of both benchmarks share: percentiles, where a row was measured, files of rows, and their summaries."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
Percentiles = tuple[float, float, float]


def percentiles(values: Sequence[float]) -> Percentiles:
    """20th, 50th and 80th percentile."""
    cuts = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else list(values) * 9
    return round(cuts[1], 4), round(statistics.median(values), 4), round(cuts[7], 4)


def commit(given: str | float | None = None) -> str:
    """The commit that rows name: the given one (of a copy without git), else git's, else "unknown".

    A number is what Hydra made of commit=6772738 or commit=12e4567 (infinity): then it is read again from Hydra's own record of
    what was typed.
    """
    if isinstance(given, str):
        return given
    if given is not None:
        from hydra.core.hydra_config import HydraConfig

        typed = dict(word.lstrip("+").partition("=")[::2] for word in HydraConfig.get().overrides.task)  # the last one counts
        return typed.get("commit", str(given))
    try:
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def append(path: Path, rows: Iterable[Any]) -> None:
    """Adds dataclasses to a JSON-lines file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)


def load(path: Path) -> list[dict[str, Any]]:
    """A file's rows. Some of an earlier day have a commit of digits alone as a number."""
    found = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return [row | {"commit": str(row["commit"])} if "commit" in row else row for row in found]


def rotated(items: Sequence[T], first: int) -> list[T]:
    """All items in their order, round and round, beginning with another one for every ``first``."""
    at = first % max(1, len(items))
    return [*items[at:], *items[:at]]


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(math.log(v) for v in values))


def summary(cells: Sequence[tuple[str, float]]) -> str:
    """Named ratios in one line: geometric mean, the worst cell, and how many reach 1."""
    name, worst = min(cells, key=lambda cell: cell[1])
    reached = sum(ratio >= 1.0 for _, ratio in cells)
    mean = geometric_mean([ratio for _, ratio in cells])
    return f"geometric mean {mean:.3f}, worst {worst:.3f} ({name}), {reached} of {len(cells)} at 1 or above"
