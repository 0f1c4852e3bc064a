"""A plan and its forecast as text: what `ringflash plan` and ``plan.explain()`` say."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import replace

from ringflash.mask import Mask
from ringflash.parallel.cost import Forecast, PassForecast, StepForecast
from ringflash.parallel.memory import Shape
from ringflash.parallel.plan import Plan, traffic

LONGEST = 18
"""Steps that `explain` lists; of longer plans it shows both ends."""


def explain(plan: Plan, forecast: Forecast, *, chosen: str = "", kernel: str = "", source: str = "") -> str:
    """A plan and its forecast as text for people, at most about 40 lines.

    chosen: why "auto" means this schedule, if it was "auto". kernel: what computes it, if known. source: of the tables.
    """
    key, shape, device, link = plan.key, forecast.shape, forecast.device, forecast.link
    cross = "" if key.q_layout.seqlen == key.k_layout.seqlen else f"{key.q_layout.seqlen:,} queries on "
    dims = f"{shape.head_dim}" if shape.head_dim == shape.head_dim_v else f"{shape.head_dim} (values {shape.head_dim_v})"
    heads = (
        f"{key.heads} query heads, {key.kv_heads} key heads of {dims}, batch {shape.batch}, {shape.dtype_bytes} bytes an element"
    )
    facts = [
        ("mask", mask_text(key.mask)),
        ("sequence", f"{cross}{key.k_layout.seqlen:,} tokens, layout {key.q_layout.name}"),
        ("rank", f"{key.rank} of {key.world}, with {plan.q_lengths[plan.member]:,} tokens in {_runs_text(plan)}"),
        (
            "schedule",
            f"{key.schedule}, {len(plan.steps)} step{'s' if len(plan.steps) > 1 else ''}"
            + (f" (auto: {chosen})" if chosen else ""),
        ),
        ("heads", heads + _groups_text(plan)),
        *([("kernel", kernel)] if kernel else []),
        ("predicted", f"for {device.name}, {link.name}" + (f" ({source})" if source else "")),
    ]
    gradients = "backward, deterministic" if shape.deterministic else "backward"
    for name, times in (("forward", forecast.forward), (gradients, forecast.backward)):
        parts = "; ".join(f"{what} {size_text(nbytes)}" for what, nbytes in times.memory.items)
        facts.append(("memory", f"peak {size_text(times.memory.total)} {name}: {parts}"))
    facts += [("travels", travels_text(plan, shape))] if plan.rings > 1 else []
    busiest = max(forecast.areas)
    ranks = [rank for rank, area in enumerate(forecast.areas) if area == busiest]
    who = "all ranks alike" if len(ranks) == len(forecast.areas) else f"rank {ranks[0]} has most"
    facts.append(("balance", f"{forecast.balance:.3f} (work of the busiest rank over the mean; {who})"))
    lines = [_fact(*fact) for fact in facts]
    ends = [_pass_text("forward", forecast, False), _pass_text("backward", forecast, True)]
    if forecast.back is plan:
        tables = _table(plan, forecast.steps, forecast.forward, forecast.backward)
    else:
        most = LONGEST // 2 - 2
        tables = _table(plan, forecast.steps, forecast.forward, None, most)
        tables += ["", "backward:", *_table(forecast.back, forecast.backward_steps, None, forecast.backward, most)]
    return "\n".join([*lines, "", *tables, "", *ends])


def travels_text(plan: Plan, shape: Shape) -> str:
    """What travels in the two passes, and what the backward pass of the whole world would move either way."""
    dims = shape.head_dim, shape.head_dim_v, shape.dtype_bytes
    part, batch = plan.of_one_group(), shape.batch * plan.key.groups
    kv, q = (batch * traffic(part, travels, *dims).nbytes for travels in ("kv", "q"))
    words = {"kv": "K, V", "q": "Q, dO"}
    chosen, other = (replace(shape, takes_delta=x).backward(part).key.travels for x in (shape.takes_delta, not shape.takes_delta))
    why = "" if plan.key.schedule.travels == "auto" else ", as asked for"
    if chosen != other:
        kinds = ("for a kernel that takes delta in place of out", "for one that needs out")
        this, that = kinds if shape.takes_delta else reversed(kinds)
        why = f" {this}, {words[other]} {that}"
    moved = f"with K, V all ranks move {size_text(kv)} in it, with Q, dO {size_text(q)}"
    return f"forward K, V; backward {words[chosen]}{why} ({moved})"


def _groups_text(plan: Plan) -> str:
    """Which heads a rank works on, and in how many groups."""
    groups, share, trades = plan.key.groups, plan.of_one_group().share, len(plan.shares) > 1
    order = "one on its way while another is computed" if trades else "one after the other"
    many = f"; in {groups} groups, {order}" if groups > 1 else ""
    if not trades:
        return many
    if not share.q_heads:
        return f"; none here{many}"
    here = f"{share.q_heads * groups} query heads" if many else f"query heads {share.q0} to {share.q1 - 1}"
    return f"; here {here}{many}"


def _fact(name: str, text: str) -> str:
    return textwrap.fill(text, 120, initial_indent=f"{name:<10} ", subsequent_indent=" " * 11)


def mask_text(mask: Mask) -> str:
    """A mask in a few words: its name, and its options that are set."""
    return " & ".join(_mask_text(part) for part in mask.parts())


def _mask_text(mask: Mask) -> str:
    if mask == Mask.full():
        return "full"
    name, _, options = repr(mask).partition("(")
    told = ", ".join(option for option in options.removesuffix(")").split(", ") if not option.endswith("=None"))
    if name in ("Causal", "Dilated"):
        told = told.replace("size=", "window=")  # as their constructors spell it
    return f"{name.lower()}({told})" if told else name.lower()


def size_text(nbytes: float) -> str:
    """Bytes with three digits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1000 or unit == "GiB":
            break
        nbytes /= 1024
    return f"{nbytes:.0f} {unit}" if nbytes >= 100 or nbytes == int(nbytes) else f"{nbytes:.3g} {unit}"


def time_text(seconds: float) -> str:
    """A duration with three digits."""
    if seconds >= 1:
        return f"{seconds:.3g} s" if seconds < 100 else f"{seconds:,.0f} s"
    return f"{1e3 * seconds:.3g} ms"


def count_text(n: float) -> str:
    """A count with three digits."""
    for unit in ("", "k", "M", "G", "T"):
        if n < 1000 or unit == "T":
            break
        n /= 1000
    return f"{n:.0f}{unit}" if n >= 100 or n == int(n) else f"{n:.3g}{unit}"


def _runs_text(plan: Plan) -> str:
    runs = plan.key.q_layout.ranks[plan.key.rank]
    some = ", ".join(f"{r.start}:{r.stop}" + (f":{r.stride}" if r.stride > 1 else "") for r in runs[:3])
    return f"{len(runs)} run{'s' if len(runs) != 1 else ''} ({some}{', ...' if len(runs) > 3 else ''})" if runs else "no run"


def _pass_text(name: str, forecast: Forecast, backward: bool) -> str:
    times = forecast.backward if backward else forecast.forward
    rate = forecast.flop(backward) / times.total_s / 1e12 if times.total_s else 0.0
    heads = times.enter_s + times.leave_s
    parts = [f"{time_text(times.compute_s)} computing", f"{time_text(times.waiting_s)} waiting"]
    if heads:
        parts.append(f"{time_text(heads)} for the exchange of heads")
    rate_text = f"{rate:.0f} TFLOP/s" if rate >= 1 else f"{1e3 * rate:.0f} GFLOP/s"
    return f"{name:<10} {time_text(times.total_s)}: {', '.join(parts)}; {rate_text} of visible pairs"


def _table(
    plan: Plan, steps: Sequence[StepForecast], forward: PassForecast | None, backward: PassForecast | None, most: int = LONGEST
) -> list[str]:
    """One line a step; steps in a row that compute and move nothing share one, and the middle of a long plan is left out."""
    chunks = "chunks of ring rank" if len(plan.shares) > 1 else "chunks of rank"
    passes = [(name, times) for name, times in (("forward", forward), ("backward", backward)) if times is not None]
    head = ["step", chunks, "rows", "slices", "pairs", "unmasked", "in", "out"]
    head += [word for name, _ in passes for word in (name, "waits")]
    rows: list[list[str]] = []
    idle: list[int] = []
    for n, (step, f) in enumerate(zip(plan.steps, steps, strict=True)):
        if n and not (f.work.visible or f.bytes_in or f.bytes_out):
            idle = [idle[0] if idle else n, n]
            rows = [*(rows if idle[0] == n else rows[:-1]), [f"{idle[0]}" if idle[0] == n else f"{idle[0]}-{n}", "none"]]
            continue
        idle = []
        owners = [chunk.owner for chunk in step.chunks] or [plan.rank] * step.local
        cells = [str(n), _owners_text(owners), f"{step.rows:,}", f"{f.work.slices:,}"]
        cells += [count_text(f.work.visible), f"{100 * f.work.full / f.work.visible:.0f} %" if f.work.visible else "-"]
        cells += [size_text(f.bytes_in), size_text(f.bytes_out)]
        cells += [f"{1e3 * s:.3f}" for _, times in passes for s in (times.steps[n].compute_s, times.steps[n].wait_s)]
        rows.append(cells)
    rows = [head, *([*row, *[""] * (len(head) - len(row))] for row in rows)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [
        "  ".join(c.ljust(w) if i == 1 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))) for row in rows
    ]
    hidden = len(lines) - 1 - most
    if hidden > 1:
        lines[1 + most // 2 : 1 + most // 2 + hidden] = [f"... {hidden} more lines ..."]
    what = "Q, dO" if plan.key.travels == "q" else "K and V"
    times = "times in ms" + (f" over {plan.key.groups} groups" if plan.key.groups > 1 else "")
    return [
        *(line.rstrip() for line in lines),
        f"pairs: visible ones per head; unmasked: in tiles without a mask; in, out: {what}; {times}",
    ]


def _owners_text(owners: Sequence[int]) -> str:
    if len(owners) > 4:
        return f"{owners[0]}, {owners[1]}, ... {owners[-1]} ({len(owners)})"
    return ", ".join(map(str, owners)) or "-"
