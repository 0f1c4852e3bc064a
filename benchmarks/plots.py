"""Pictures of benchmark rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.rows import load

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666", "#F0E442")
"""Okabe and Ito's palette: told apart by every eye."""

INK, SOFT, FAINT = "#22252A", "#5F6670", "#E3E6EA"

LABELS = {
    "hopper": "ringflash",
    "hopper_float32": "ringflash, into float32",
    "hopper_dense": "ringflash, dense at the mean length",
    "cudnn": "cuDNN",
    "fa2": "FlashAttention-2",
    "flash_attn_4": "FlashAttention-4",
    "flash_attn_4_varlen": "FlashAttention-4, packed",
    "single": "one GPU, no exchange",
    "ringflash": "ringflash",
    "ringflash@zigzag:8": "ringflash, layout zigzag:8",
    "ringflash@ulysses": "ringflash, heads traded",
    "ringflash_lean": "ringflash, lean memory",
    "ring_flash_attn_fa4": "ring-flash-attn, FA4 kernels",
    "ring_flash_attn_fa2": "ring-flash-attn, FA2 kernels",
    "ulysses_cudnn": "Ulysses + cuDNN",
    "ulysses_fa4": "Ulysses + FA4",
    "torch_cp_allgather_cudnn": "torch context_parallel, cuDNN",
    "torch_cp_allgather_fa2": "torch context_parallel, FA2",
    "single_sdpa": "one GPU, cuDNN kernels",
    "ringflash_sdpa": "ringflash on cuDNN kernels",
}


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _bars(
    axis: Any,
    values: Sequence[dict[str, float]],
    labels: Sequence[str],
    colours: dict[str, str],
    numbers: bool,
    pale: Sequence[set[str]] = (),
) -> None:
    """Groups of bars: values by system, one dict a group; ``pale``: of each group, the systems to draw so."""
    present = {system: colour for system, colour in colours.items() if any(system in group for group in values)}
    width = 0.84 / max(1, len(present))
    for i, (system, colour) in enumerate(present.items()):
        have = [(x, group[system]) for x, group in enumerate(values) if system in group]
        places = [x + (i - (len(present) - 1) / 2) * width for x, _ in have]
        bars = axis.bar(places, [v for _, v in have], width * 0.94, color=colour, label=LABELS.get(system, system))
        for bar, (x, _) in zip(bars, have, strict=True):
            bar.set_alpha(0.45 if pale and system in pale[x] else 1.0)
        if numbers:
            axis.bar_label(bars, [f"{v:.0f}" for _, v in have], fontsize=6, color=SOFT)
    axis.set_xticks(range(len(labels)), labels, fontsize=8)
    axis.set_xlim(-0.6, len(labels) - 0.4)
    axis.margins(y=0.12)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(SOFT)
    axis.tick_params(colors=SOFT, length=0)
    axis.grid(axis="y", color=FAINT, linewidth=0.8)
    axis.set_axisbelow(True)


KERNEL_PANELS = (
    ("head dim 128, 16 query and 16 key heads", "dense_128", "16/16"),
    ("head dim 128, 32 query and 8 key heads", "dense_128", "32/8"),
    ("head dim 64, 32 heads", "dense_64", ""),
    ("head dim 256, 8 heads", "dense_256", ""),
    ("packed documents of 64k tokens and windows, head dim 128, 16 heads", ("documents", "windows"), ""),
)
KERNEL_COLOURS = {
    "hopper": COLOURS[0],
    "hopper_float32": COLOURS[5],
    "flash_attn_4": COLOURS[4],
    "flash_attn_4_varlen": COLOURS[7],
    "cudnn": COLOURS[3],
    "fa2": COLOURS[6],
}


def kernel_table(path: Path, out: Path) -> None:
    """Bars of bench_kernel's rows, forward left and backward right; over each group our rate over the best peer's."""
    latest = {(r["direction"], r["suite"], r["case"], r["system"]): r for r in load(path)}
    present = {r["system"] for r in latest.values()}
    colours = {system: colour for system, colour in KERNEL_COLOURS.items() if system in present}
    panels = [p for p in KERNEL_PANELS if any(_in_panel(r, p) for r in latest.values())]
    ceiling = next((r["tflops"] for r in latest.values() if r["suite"] == "ceiling"), None)
    plt = _pyplot()
    figure, axes = plt.subplots(
        len(panels), 2, figsize=(17, 0.6 + 2.5 * len(panels)), squeeze=False, sharey="row", layout="constrained"
    )
    for panel, row in zip(panels, axes, strict=True):
        for axis, direction in zip(row, ("forward", "backward"), strict=True):
            rows = [r for r in latest.values() if r["direction"] == direction and _in_panel(r, panel) and r["system"] in colours]
            cases = list(dict.fromkeys(r["case"] for r in rows))
            cases.sort(key=lambda c: c.startswith("causal"))  # full first; otherwise as measured
            groups = [{r["system"]: r["tflops"] for r in rows if r["case"] == case} for case in cases]
            _bars(axis, groups, [_short(case) for case in cases], colours, numbers=False)
            for x, case in enumerate(cases):
                ratio = next((r["ratio"] for r in rows if (r["case"], r["system"]) == (case, "hopper")), None)
                if ratio:
                    height = max(groups[x].values())
                    colour = COLOURS[2] if ratio >= 1 else COLOURS[1]
                    axis.text(x, height * 1.02, f"{ratio:.2f}", ha="center", va="bottom", fontsize=7.5, color=colour)
            if ceiling:
                axis.axhline(ceiling, color=SOFT, linewidth=0.8, linestyle=(0, (4, 4)))
            axis.set_title(f"{direction}: {panel[0]}", loc="left", fontsize=10, color=INK)
        row[0].set_ylabel("TFLOP/s", color=SOFT)
    some = next(iter(latest.values()))
    figure.suptitle(
        f"Attention kernels, {some['gpu']}, {some['dtype']}; above the bars: ringflash over the better peer", x=0.01, ha="left"
    )
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()]
    words = [LABELS[s] for s in colours]
    if ceiling:
        handles.append(plt.Line2D([], [], color=SOFT, linewidth=0.8, linestyle=(0, (4, 4))))
        words.append("large matrix product")
    figure.legend(handles, words, loc="outside lower center", ncols=len(words), frameon=False)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def _in_panel(row: dict[str, Any], panel: tuple[str, str | tuple[str, ...], str]) -> bool:
    _, suites, heads = panel
    return row["suite"] in ((suites,) if isinstance(suites, str) else suites) and row["case"].endswith(heads)


def _short(case: str) -> str:
    """ "causal 65536 16/16" -> "causal\n64k" """
    words = case.split()
    if words[0] in ("causal", "full"):
        return f"{words[0]}\n{_tokens(int(words[1]))}"
    if words[0] == "documents":
        return " ".join(words[1:]) + "\ntokens"
    return case.replace(" at ", "\nat ")


def _tokens(n: int) -> str:
    return f"{n // 2**20}M" if n >= 2**20 else f"{n // 1024}k"


RING_COLOURS = {
    "single": COLOURS[6],
    "ringflash": COLOURS[0],
    "ringflash@zigzag:8": "#004C7A",
    "ringflash@ulysses": "#2F7F6F",
    "ringflash_lean": COLOURS[5],
    "ring_flash_attn_fa4": COLOURS[2],
    "ulysses_fa4": COLOURS[4],
    "ulysses_cudnn": COLOURS[3],
    "torch_cp_allgather_cudnn": COLOURS[1],
}


def ring_table(path: Path, out: Path) -> None:
    """Bars of bench_ring's rows: TFLOP/s per GPU by work and system, forward above, forward + backward below.

    The latest row of each cell; pale where it is of an earlier commit than the last row of all.
    """
    latest = {}
    for row in load(path):
        latest[row.get("work") or f"causal_{_tokens(row['seqlen']).lower()}", row["system"]] = row
    works = list(dict.fromkeys(work for work, _ in latest))
    works.sort(
        key=lambda w: (not w.startswith("causal"), w.partition("_")[0], latest[next(k for k in latest if k[0] == w)]["seqlen"])
    )
    spare = iter(COLOURS[7:] + COLOURS)
    systems = dict.fromkeys((*RING_COLOURS, *(system for _, system in latest)))
    colours = {s: RING_COLOURS.get(s) or next(spare) for s in systems if any(s == system for _, system in latest)}
    last = row["commit"]
    plt = _pyplot()
    figure, axes = plt.subplots(2, 1, figsize=(max(9.0, 1.7 * len(works)), 8), sharex=True, layout="constrained")
    for axis, key, title in zip(axes, ("forward", "both"), ("forward", "forward + backward"), strict=True):
        groups = [{s: latest[work, s][f"{key}_tflops"] for s in colours if (work, s) in latest} for work in works]
        old = [{s for s in colours if (work, s) in latest and latest[work, s]["commit"] != last} for work in works]
        _bars(axis, groups, [w.replace("_", "\n") for w in works], colours, numbers=True, pale=old)
        axis.set_ylabel("TFLOP/s per GPU", color=SOFT)
        axis.set_title(title, loc="left", color=INK)
    some = next(iter(latest.values()))
    title = f"Attention over {some['world']} x {some['gpu']}, head dim {some['head_dim']}, {some['dtype']}"
    if any(r["commit"] != last for r in latest.values()):
        title += "; pale: a run of an earlier commit"
    figure.suptitle(title, x=0.01, ha="left")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()]
    figure.legend(handles, [LABELS.get(s, s) for s in colours], loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(out, dpi=150)
    plt.close(figure)


LANES = ("compute", "chunks", "gradients", "heads")
SPAN_COLOURS = {
    "forward": "#0072B2",
    "backward": "#009E73",
    "copy": "#E69F00",
    "pack": "#56B4E9",
    "add": "#CC79A7",
    "wait": "#D55E00",
}
SPAN_WORDS = {
    "forward": "forward kernel",
    "backward": "backward kernel",
    "copy": "transfer",
    "pack": "packing",
    "add": "adding gradients",
    "wait": "waiting for others",
}


def timeline(path: Path, out: Path) -> None:
    """A recorded pass: for every rank one lane a stream, on it kernels by step, transfers by peer, and what it waited for."""
    spans = json.loads(path.read_text())
    ranks = sorted({s["rank"] for s in spans})
    lanes = [lane for lane in LANES if any(s["lane"] == lane for s in spans)]
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(16, 1.6 + 0.42 * len(ranks) * (len(lanes) + 0.6)), layout="constrained")
    begin = min(s["start"] for s in spans)
    last = max(s["stop"] for s in spans) - begin
    ticks, words = [], []
    for i, rank in enumerate(ranks):
        for j, lane in enumerate(lanes):
            y = -(i * (len(lanes) + 0.6) + j)
            ticks.append(y)
            words.append(f"rank {rank}, {lane}" if not j else lane)
            for s in (s for s in spans if (s["rank"], s["lane"]) == (rank, lane)):
                start, length = s["start"] - begin, s["stop"] - s["start"]
                waits = s["what"] == "wait"
                if waits and lane != "compute":  # a copy engine that waits costs nobody anything
                    axis.barh(y, length, 0.12, start, color=FAINT, zorder=1)
                    continue
                axis.barh(
                    y,
                    length,
                    0.8,
                    start,
                    color=SPAN_COLOURS[s["what"]],
                    edgecolor="white",
                    linewidth=0.4,
                    zorder=3 if waits else 2,
                )
                if length > 0.02 * last and s["what"] in ("forward", "backward", "copy"):
                    text = f"from {s['peer']}" if s["what"] == "copy" else f"step {s['step']}"
                    axis.text(start + length / 2, y, text, ha="center", va="center", fontsize=7, color="white", zorder=4)
    axis.set_yticks(ticks, words, fontsize=8)
    axis.set_xlim(0, last * 1.005)
    axis.set_xlabel("ms", color=SOFT)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(colors=SOFT, length=0)
    waited = {
        rank: sum(s["stop"] - s["start"] for s in spans if s["rank"] == rank and (s["lane"], s["what"]) == ("compute", "wait"))
        for rank in ranks
    }
    axis.set_title(
        f"{spans[0]['work']}: one forward and backward pass over {len(ranks)} GPUs, from event timestamps; "
        f"the slowest rank's kernels waited {max(waited.values()):.2f} of {last:.1f} ms",
        loc="left", fontsize=10, color=INK,
    )  # fmt: skip
    used = [what for what in SPAN_COLOURS if any(s["what"] == what for s in spans)]
    handles = [plt.Rectangle((0, 0), 1, 1, color=SPAN_COLOURS[what]) for what in used]
    figure.legend(handles, [SPAN_WORDS[w] for w in used], loc="outside lower center", ncols=len(used), frameon=False)
    figure.savefig(out, dpi=150)
    plt.close(figure)
