"""Pictures of benchmark rows."""

from __future__ import annotations

import json
from pathlib import Path

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666")
"""Okabe and Ito's palette: told apart by every eye."""


def ring_table(rows: Path, out: Path) -> None:
    """Bars of bench_ring's rows: TFLOP/s per GPU by length and system, forward above, forward + backward below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    latest = {}
    for line in rows.read_text().splitlines():
        row = json.loads(line)
        latest[row["seqlen"], row["system"]] = row
    lengths = sorted({length for length, _ in latest})
    systems = list(dict.fromkeys(system for _, system in latest))
    figure, axes = plt.subplots(2, 1, figsize=(9, 7), sharex=True, constrained_layout=True)
    width = 0.8 / len(systems)
    for axis, key, title in zip(axes, ("forward", "both"), ("forward", "forward + backward"), strict=True):
        for i, system in enumerate(systems):
            have = [(x, latest[length, system]) for x, length in enumerate(lengths) if (length, system) in latest]
            places = [x + (i - (len(systems) - 1) / 2) * width for x, _ in have]
            bars = axis.bar(places, [r[f"{key}_tflops"] for _, r in have], width, label=system, color=COLOURS[i % len(COLOURS)])
            axis.bar_label(bars, [f"{r[f'{key}_tflops']:.0f}" for _, r in have], fontsize=7)
        axis.set_ylabel("TFLOP/s per GPU")
        axis.set_title(title, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].set_xticks(range(len(lengths)), [f"{n // 1024}k tokens" for n in lengths])
    some = next(iter(latest.values()))
    heads = f"{some['heads']} query and {some['kv_heads']} key heads of {some['head_dim']}"
    figure.suptitle(f"Causal attention, {heads}, {some['world']} x {some['gpu']}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(out, dpi=150)
    plt.close(figure)
