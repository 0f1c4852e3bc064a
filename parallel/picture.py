"""A picture of a plan: which rank computes which part of the score matrix, and what every rank does when.

matplotlib is imported when a picture is drawn, never with ringflash.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ringflash.mask import Mask, overlaps
from ringflash.parallel.cost import Forecast, PassForecast, predict_all
from ringflash.parallel.explain import mask_text, size_text, time_text
from ringflash.parallel.layout import Layout
from ringflash.parallel.memory import Shape
from ringflash.parallel.plan import steps_of
from ringflash.parallel.sharding import Sharding
from ringflash.parallel.tables import Tables, for_schedule, measured
from ringflash.slices import IntArray, area, tighten

FloatArray = npt.NDArray[np.float64]

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442", "#999999")
"""Okabe and Ito's colours, which people with any kind of colour vision can tell apart."""

CELLS = 512
"""Pixels of a side of the score matrix where it is not drawn as polygons. Shorter sequences are drawn token by token."""

MOST_POLYGONS = 12_000
INK, SOFT, LINE, CHUNKS, GRADIENTS, HEADS, IDLE = ("#22252A", "#5F6670", "#E3E6EA", "#5B7DA8", "#A06AA8", "#3F4754", "#E4E7EB")
THIN = 0.02
"""Share of the keys that a query sees on average, below which an inset shows the first tokens larger."""

CROWDED = 16
"""Ranks up to which steps are numbered and transfers drawn."""

PALEST = 0.62
"""Share of white in the colour of the last step; the local step has none."""


def draw_plan(
    cp: Sharding,
    mask: Mask,
    seqlen: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    path: str | Path,
    *,
    batch: int = 1,
    dtype_bytes: int | None = None,
    tables: Tables | None = None,
) -> None:
    """Writes a PNG (or whatever the path's ending says) of the plans of all ranks.

    cp: a ContextParallel or a SimulatedWorld. seqlen: global. tables: of the forecast; default those of this machine.
    dtype_bytes: of an element of q, k, v; default 2, or 4 where this machine has no GPU.
    Raises ValueError for what cannot be planned, ImportError without matplotlib.
    """
    plans = [cp.plan(rank, mask, seqlen, seqlen, heads, kv_heads) for rank in range(cp.world)]
    schedule = plans[0].key.schedule
    if tables is None:
        import torch

        kind = "cuda" if torch.cuda.is_available() else "cpu"
        tables = for_schedule(measured(kind), schedule)
        dtype_bytes = dtype_bytes or (2 if kind == "cuda" else 4)
    shape = Shape(batch, head_dim, head_dim, dtype_bytes or 2)
    forecasts = predict_all(plans, tables.device, tables.link, shape)
    figure = _figure(forecasts, mask)
    figure.savefig(path, dpi=150)


def _figure(forecasts: Sequence[Forecast], mask: Mask) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    first = forecasts[0]
    key, shape = first.plan.key, first.shape
    figure = Figure(figsize=(15, 7.5))
    left, right = figure.add_axes((0.06, 0.09, 0.375, 0.75)), figure.add_axes((0.5, 0.15, 0.485, 0.69))
    title = f"{mask_text(mask)}  ·  {key.q_layout.name} layout  ·  {key.schedule} schedule  ·  {_ranks(key.world)}"
    dtype = {2: "16-bit", 4: "float32", 8: "float64"}.get(shape.dtype_bytes, f"{shape.dtype_bytes} bytes an element")
    facts = [
        f"{key.q_layout.seqlen:,} tokens",
        f"{key.heads} query and {key.kv_heads} key heads of {shape.head_dim}, {dtype}, batch {shape.batch}",
        f"predicted for {first.device.name}, {first.link.name}",
        f"busiest rank {first.balance:.2f} x the mean",
        f"peak memory {size_text(max(f.backward.memory.total for f in forecasts))}",
    ]
    figure.text(0.0145, 0.955, title, fontsize=15, fontweight="bold", color=INK, va="center")
    figure.text(0.0145, 0.915, "  ·  ".join(facts), fontsize=10, color=SOFT, va="center")
    colours = rank_colours(first.plan.rings)
    _draw_matrix(left, first, mask, colours)
    _draw_timeline(right, forecasts, colours)
    return figure


def _ranks(n: int) -> str:
    return "1 rank" if n == 1 else f"{n} ranks"


def rank_colours(n: int) -> FloatArray:
    """(n, 3) RGB: the palette, or for more ranks than it has an even scale of growing lightness."""
    from matplotlib import colormaps
    from matplotlib.colors import to_rgb

    if n <= len(PALETTE):
        return np.array([to_rgb(c) for c in PALETTE[:n]])
    return np.asarray(colormaps["viridis"](np.linspace(0.0, 0.97, n)))[:, :3]


def _paled(colours: FloatArray, step: IntArray, n_steps: int) -> FloatArray:
    """Colours (n, 3) mixed with white, the more the later the step."""
    share = PALEST * np.asarray(step)[..., None] / max(n_steps - 1, 1)
    return np.asarray(colours * (1 - share) + share)


# The score matrix


def regions(mask: Mask, layout: Layout) -> tuple[IntArray, IntArray, IntArray]:
    """The visible bands of positions, cut where ranks change: rows (n, 6), and the ranks of their queries and keys.

    For layouts of unstrided runs.
    """
    assert all(run.stride == 1 for runs in layout.ranks for run in runs)
    runs = sorted((run.start, run.stop, rank) for rank, runs in enumerate(layout.ranks) for run in runs)
    start, stop, rank = np.array(runs, dtype=np.int64).reshape(-1, 3).T
    rows = mask.bands((0, layout.seqlen), (0, layout.seqlen)).rows
    rows, q_rank = _cut(rows, 0, start, stop, rank)
    rows = np.concatenate([rows, q_rank[:, None]], axis=1)
    rows, k_rank = _cut(rows, 2, start, stop, rank)
    return rows[:, :6], rows[:, 6], k_rank


def _cut(rows: IntArray, column: int, start: IntArray, stop: IntArray, rank: IntArray) -> tuple[IntArray, IntArray]:
    band, run = overlaps(rows[:, column], rows[:, column + 1], start, stop)
    cut = rows[band].copy()
    cut[:, column] = np.maximum(cut[:, column], start[run])
    cut[:, column + 1] = np.minimum(cut[:, column + 1], stop[run])
    tight, keep = tighten(cut)
    return tight, rank[run][keep]


def polygons(rows: IntArray) -> FloatArray:
    """(n, 6, 2): the outline of bands as (key, query) corners."""
    q0, q1, k0, k1, lo, hi = rows.T
    left_bend, right_bend = np.clip(k0 - lo, q0, q1), np.clip(k1 - hi - 1, q0, q1)
    left = [(np.maximum(k0, q + lo), q) for q in (q0, left_bend, q1)]
    right = [(np.minimum(k1, q + hi + 1), q) for q in (q1, right_bend, q0)]
    return np.stack([np.stack(corner, axis=1) for corner in (*left, *right)], axis=1).astype(np.float64)


def coverage(mask: Mask, first: int, length: int, cells: int) -> FloatArray:
    """(cells, cells): the visible share of every cell of the square of positions ``[first, first + length)``."""
    bands = mask.bands((first, first + length), (first, first + length))
    edges = first + np.arange(cells + 1, dtype=np.int64) * length // cells
    index = np.arange(cells)
    rows, row = _cut(bands.rows, 0, edges[:-1], edges[1:], index)
    rows = np.concatenate([rows, row[:, None]], axis=1)
    rows, column = _cut(rows, 2, edges[:-1], edges[1:], index)
    pairs = np.zeros((cells, cells))
    if bands.modulus > 1 and cells == length:  # one pair a cell: seen or not
        seen = (rows[:, 2] - rows[:, 0]) % bands.modulus == 0
        pairs[rows[seen, 6], column[seen]] = 1
        return pairs
    np.add.at(pairs, (rows[:, 6], column), area(rows) / bands.modulus)
    size = np.diff(edges)
    return np.asarray(pairs / np.outer(size, size))


def _raster(mask: Mask, layout: Layout, first: int, length: int, steps: IntArray, colours: FloatArray) -> FloatArray:
    """(cells, cells, 4): the square of positions as an image, every cell in the colour of the rank of its middle."""
    cells = min(CELLS, length)
    owner = _owners(layout)[first + (np.arange(cells) * 2 + 1) * length // (2 * cells)]
    seen = coverage(mask, first, length, cells)
    step = steps[owner[:, None], owner[None, :]]
    image = np.ones((cells, cells, 4))
    image[..., :3] = _paled(colours[owner][:, None, :], step, int(steps.max()) + 1)
    image[..., 3] = np.where(seen > 0, 0.3 + 0.7 * np.sqrt(np.minimum(seen, 1)), 0.0)
    return image


def _owners(layout: Layout) -> IntArray:
    """The rank of every position."""
    owners = np.empty(layout.seqlen, np.int64)
    for rank, runs in enumerate(layout.ranks):
        for run in runs:
            owners[run.start : run.stop : run.stride] = rank
    return owners


def _draw_matrix(axes: Any, forecast: Forecast, mask: Mask, colours: FloatArray) -> None:
    from matplotlib.collections import PolyCollection

    key, n = forecast.plan.key, forecast.plan.key.q_layout.seqlen
    layout = key.q_layout.merged(key.schedule.ulysses)
    steps = steps_of(key)
    strided = any(run.stride > 1 for runs in layout.ranks for run in runs)
    axes.set(xlim=(0, n), ylim=(n, 0), aspect="equal", xlabel="key (position in tokens)", ylabel="query (position in tokens)")
    who = "ring rank" if key.schedule.ulysses > 1 else "rank"
    note, inset = f"colour: the {who} that computes it; paler: in a later step", 0
    extent = (0, n, n, 0)
    if n <= CELLS:
        axes.imshow(_raster(mask, layout, 0, n, steps, colours), extent=extent, interpolation="nearest", zorder=2)
    elif strided:
        axes.imshow(_silhouette(mask, n), extent=extent, interpolation="nearest", zorder=2)
        inset = min(n, max(32, 4 * layout.world))
        note = f"every {who} everywhere, token by token; inset: the first {inset:,} tokens"
    else:
        rows, q_rank, k_rank = regions(mask, layout)
        if len(rows) <= MOST_POLYGONS:
            faces = _paled(colours[q_rank], steps[q_rank, k_rank], int(steps.max()) + 1)
            sparse = mask.bands((0, n), (0, n)).modulus > 1
            look: dict[str, Any] = {"edgecolors": "none", "alpha": 0.6} if sparse else {"edgecolors": faces, "linewidths": 0.5}
            axes.add_collection(PolyCollection(list(polygons(rows)), facecolors=faces, zorder=2, **look))
        else:
            axes.imshow(_raster(mask, layout, 0, n, steps, colours), extent=extent, interpolation="nearest", zorder=2)
        mean = int(area(rows).sum()) // n
        if mean < THIN * n:
            inset = min(n, 1 << (32 * mean + 64).bit_length())
            note += f"; inset: the first {_tokens(inset, inset)} tokens"
    if inset:
        _draw_zoom(axes, mask, layout, inset, steps, colours)
    axes.set_title(note, fontsize=9, color=SOFT, loc="left")
    ticks = [i * n / 4 for i in range(5)] if n >= 8 else list(range(n + 1))
    axes.set_xticks(ticks, [_tokens(x, n) for x in ticks])
    axes.set_yticks(ticks, [_tokens(x, n) for x in ticks])
    axes.grid(color=LINE, linewidth=0.6, zorder=0)
    _quiet(axes)


def _silhouette(mask: Mask, n: int) -> FloatArray:
    """(cells, cells, 4): what is visible at all, in grey."""
    seen = coverage(mask, 0, n, CELLS)
    image = np.full((CELLS, CELLS, 4), 0.6)
    image[..., 3] = np.where(seen > 0, 0.25 + 0.6 * np.sqrt(np.minimum(seen, 1)), 0.0)
    return image


def _draw_zoom(axes: Any, mask: Mask, layout: Layout, n: int, steps: IntArray, colours: FloatArray) -> None:
    """The first n tokens, in the corner that a causal mask leaves empty."""
    inset = axes.inset_axes((0.56, 0.56, 0.42, 0.42), zorder=5)
    inset.imshow(_raster(mask, layout, 0, n, steps, colours), extent=(0, n, n, 0), interpolation="nearest")
    inset.set_xticks([0, n], ["0", _tokens(n, n)])
    inset.set_yticks([0, n], ["0", _tokens(n, n)])
    inset.tick_params(labelsize=8, colors=INK)
    for spine in inset.spines.values():
        spine.set(color=INK, linewidth=0.8)


def _tokens(x: float, n: int) -> str:
    if x == 0:
        return "0"
    if n >= 1 << 20 and n % (1 << 18) == 0:
        return f"{x / (1 << 20):g}M"
    if n >= 1 << 13 and n % (1 << 10) == 0:
        return f"{x / (1 << 10):g}k"
    return f"{x:,.0f}"


# The timeline


def _draw_timeline(axes: Any, forecasts: Sequence[Forecast], colours: FloatArray) -> None:
    world = len(forecasts)
    forward_end = max(f.forward.total_s for f in forecasts)
    whole = forward_end + max(f.backward.total_s for f in forecasts)
    gap = 0.02 * whole
    for forecast in forecasts:
        y, colour = forecast.plan.key.rank, colours[forecast.plan.rank]
        for offset, times in ((0.0, forecast.forward), (forward_end + gap, forecast.backward)):
            _draw_pass(axes, times, y, offset, colour, crowded=world > CROWDED, least=0.018 * whole)
    axes.axvline(1e3 * (forward_end + gap / 2), color=INK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    every = max(1, world // CROWDED)
    axes.set_yticks(list(range(0, world, every)), [f"rank {r}" if world <= 16 else str(r) for r in range(0, world, every)])
    axes.set(xlim=(0, 1e3 * (whole + gap)), ylim=(max(world, 3) - 0.45, -0.6), xlabel="time (ms, predicted)")
    if world > CROWDED:
        axes.set_ylabel("rank")
    for start, name, backward in ((0.0, "forward", False), (forward_end + gap, "backward", True)):
        total, details = _pass_label(forecasts, name, backward)
        where = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "annotation_clip": False}
        axes.annotate(total, (1e3 * start, 1.0), (0, 17), fontsize=10.5, color=INK, fontweight="bold", **where)
        axes.annotate(details, (1e3 * start, 1.0), (0, 5), fontsize=8.5, color=SOFT, **where)
    axes.grid(axis="x", color=LINE, linewidth=0.6, zorder=0)
    _legend(axes, forecasts, tuple(colours[0]))
    _quiet(axes)


def _pass_label(forecasts: Sequence[Forecast], name: str, backward: bool) -> tuple[str, str]:
    """How long a pass takes; the rate of visible pairs and the longest waiting of a rank."""
    passes = [f.backward if backward else f.forward for f in forecasts]
    end = max(p.total_s for p in passes)
    waiting = max(p.exposed_s for p in passes) / end if end else 0.0
    rate = sum(f.flop(backward) for f in forecasts) / len(forecasts) / end / 1e12 if end else 0.0
    speed = f"{rate:,.0f} TFLOP/s" if rate >= 10 else f"{1e3 * rate:,.0f} GFLOP/s"
    return f"{name} {time_text(end)}", f"{speed}, {100 * waiting:.0f} % waiting"


def _draw_pass(axes: Any, times: PassForecast, y: int, offset: float, colour: FloatArray, crowded: bool, least: float) -> None:
    """One rank's pass: computing above, all else hatched (waiting, copying heads), what is under way in two thin lines below."""
    n_steps = len(times.steps)
    bars, faces, waits = [], [], []
    idle_since = 0.0
    for group, steps in enumerate(times.groups):
        for n, step in ((n, step) for n, step in enumerate(steps) if step.compute_s > 0):
            start = step.start_s + step.wait_s
            waits.append((idle_since, start - idle_since))
            idle_since = start + step.compute_s
            bars.append((1e3 * (offset + start), 1e3 * step.compute_s))
            faces.append(_paled(colour, np.array(n), n_steps))
            if step.compute_s > least and not crowded:
                ink = "white" if faces[-1] @ (0.3, 0.6, 0.1) < 0.55 else INK
                middle = 1e3 * (offset + start + step.compute_s / 2)
                text = _number(n, n_steps, group, len(times.groups))
                axes.text(middle, y - 0.09, text, ha="center", va="center", fontsize=8, color=ink, zorder=4)
    waits.append((idle_since, times.total_s - idle_since))
    waits = [(1e3 * (offset + start), 1e3 * length) for start, length in waits if length > 1e-9 * times.total_s]
    across = (y - 0.46, 0.92) if crowded else (y - 0.4, 0.62)
    axes.broken_barh(bars, across, facecolors=faces, edgecolor="white", linewidth=0 if crowded or n_steps > 32 else 0.4, zorder=3)
    look: dict[str, Any] = (
        {"facecolor": IDLE} if crowded else {"facecolor": "white", "edgecolor": SOFT, "hatch": "//////", "linewidth": 0.4}
    )
    axes.broken_barh(waits, across, zorder=3, **look)
    for what, shade, low in (("chunks", CHUNKS, 0.25), ("gradients", GRADIENTS, 0.34), ("heads", HEADS, 0.25)):
        spans = [(1e3 * (offset + f.start_s), 1e3 * (f.stop_s - f.start_s)) for f in times.flights if f.what == what]
        if not crowded:
            axes.broken_barh(spans, (y + low, 0.07), facecolor=shade, edgecolor=shade, linewidth=0.6, zorder=3)


def _number(step: int, n_steps: int, group: int, n_groups: int) -> str:
    """What stands in a bar: the step, of the only group of heads, or the group."""
    if n_groups == 1:
        return str(step)
    return str(group) if n_steps == 1 else f"{group}.{step}"


def _legend(axes: Any, forecasts: Sequence[Forecast], colour: Any) -> None:
    from matplotlib.patches import Patch

    crowded = len(forecasts) > CROWDED
    passes = [p for f in forecasts for p in (f.forward, f.backward)]
    words = "paler: a later step"
    if len(passes[0].groups) > 1 and not crowded:
        words = "group of heads" if all(len(p.steps) == 1 for p in passes) else "group of heads.step"
    entries = [Patch(facecolor=colour, label=f"computing ({words})")]
    flown = {flight.what for p in passes for flight in p.flights}
    if any(p.exposed_s > 0 for p in passes):
        look: dict[str, Any] = {"facecolor": IDLE} if crowded else {"facecolor": "white", "edgecolor": SOFT, "hatch": "//////"}
        entries.append(Patch(label="waiting", **look))
    for what, shade, label in (
        ("chunks", CHUNKS, "chunks under way"),
        ("gradients", GRADIENTS, "gradients under way"),
        ("heads", HEADS, "exchange of heads"),
    ):
        if what in flown and not crowded:
            entries.append(Patch(facecolor=shade, label=label))
    place = {"loc": "upper right", "bbox_to_anchor": (1.0, -0.09), "ncols": len(entries), "columnspacing": 1.4}
    axes.legend(handles=entries, frameon=False, fontsize=9, handlelength=1.6, **place)


def _quiet(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(SOFT)
    axes.tick_params(colors=INK, labelsize=9)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
