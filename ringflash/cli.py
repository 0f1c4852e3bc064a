"""The ``ringflash`` command: env, plan, check, bench, train."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ringflash.options import MASKS, Parser, at_least_one, check_picture, lengths, read_mask, schedule_name, size

if TYPE_CHECKING:
    from ringflash.mask import Mask
    from ringflash.parallel.cost import Forecast
    from ringflash.parallel.plan import Plan
    from ringflash.parallel.tables import Tables
    from ringflash.simulated import SimulatedWorld

ALL_RANKS = 512
"""Plans that ``--rank all`` makes and prints at most: each takes time and memory in proportion to the world."""

TRAIN_EXTRA = "pip install '.[train]' in ringflash's source folder"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with its arguments (default: the process's); returns the exit code: 2 for a mistake in the options."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    if arguments[:1] in (["train"], ["bench"], ["check"]):  # these read their own arguments
        return _hand_over(arguments[0], arguments[1:])
    try:
        options = parser.parse_args(arguments)
    except SystemExit as stop:  # argparse has said why
        return int(stop.code or 0)
    if options.run is None:
        parser.print_help()
        return 2
    run: Callable[[argparse.Namespace], int] = options.run
    return _guarded(options.command, lambda: run(options))


def _guarded(command: str, run: Callable[[], int]) -> int:
    """The exit code of a command; a user's mistake becomes one line."""
    try:
        code = run()
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at exit
        return 1
    except (ValueError, OSError) as error:
        text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        print(f"ringflash {command}: {text}", file=sys.stderr)
        return 2
    except SystemExit as stop:
        return int(stop.code or 0)


def _hand_over(command: str, arguments: list[str]) -> int:
    """Commands with a module of their own."""
    module = {"check": "ringflash.check", "bench": "ringflash.launch.bench", "train": "ringflash.launch.train"}[command]

    def run() -> int:
        code: int = importlib.import_module(module).main(arguments)
        return code

    try:
        return _guarded(command, run)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("ringflash"):
            raise
        print(f"ringflash {command}: {error.name} is not installed; try: {TRAIN_EXTRA}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    import ringflash

    parser = Parser(
        prog="ringflash",
        description="Exact attention for sequences that do not fit one GPU.",
        epilog="`ringflash COMMAND --help` says more about each.",
    )
    parser.add_argument("--version", action="version", version=f"ringflash {ringflash.__version__}")
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    env = commands.add_parser("env", help="versions, devices, the CUDA library, environment variables")
    env.set_defaults(run=_env)
    _add_plan(commands)
    for name, what in (
        ("check", "every schedule and layout against one device, on this machine"),
        ("bench", "measure this machine's kernels and links for the forecasts of plan"),
        ("train", "train a byte-level GPT on real text across ranks"),
    ):
        commands.add_parser(name, help=what, add_help=False)
    return parser


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser(
        "plan",
        help="what ranks would compute, send and take for a mask, layout and schedule",
        description="Plans attention for a world that need not be there, and predicts its times and memory.",
        epilog=MASKS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = plan.add_argument_group("what is computed")
    what.add_argument("--mask", action="append", metavar="MASK", help="see below; default causal")
    what.add_argument("--window", metavar="W", help="window of the causal, documents or dilated mask, in tokens")
    what.add_argument("--documents", metavar="LENGTHS", help="packed documents; the mask counts inside each")
    what.add_argument("--documents-file", metavar="FILE", help="the same, lengths from a file of numbers")
    what.add_argument("--seqlen", metavar="S", help="tokens of the whole sequence; default: those of the documents")
    what.add_argument("--queries", metavar="N", help="query tokens, at the end of the sequence; default all")
    what.add_argument("--heads", type=int, default=32, help="query heads (default 32)")
    what.add_argument("--kv-heads", type=int, help="key heads (default: as many)")
    what.add_argument("--head-dim", type=int, default=128, help="default 128")
    what.add_argument("--head-dim-v", type=int, help="of the values (default: the same)")
    what.add_argument("--batch", type=int, default=1, help="default 1")
    what.add_argument("--dtype", choices=("bfloat16", "float16", "float32", "float64"), default="bfloat16")
    what.add_argument("--deterministic", action="store_true", help="with the memory of gradients that repeat bit for bit")
    how = plan.add_argument_group("how it is cut and moved")
    how.add_argument("--world", type=int, default=8, help="ranks (default 8)")
    how.add_argument("--layout", default="zigzag", help="contiguous, zigzag (default), zigzag:K, striped, balanced")
    schedules = "auto (default), ring, allgather, staged:K, ulysses[:K], hybrid, double_ring[:K]"
    how.add_argument("--schedule", default="auto", help=schedules)
    how.add_argument("--ulysses", type=int, default=1, metavar="U", help="ranks that trade heads for sequence (hybrid)")
    how.add_argument("--inner", type=int, metavar="I", help="ranks of a fast-linked group (double_ring)")
    how.add_argument(
        "--node", type=int, metavar="N", help="neighbouring ranks on the fast link; default: of the tables, or --inner"
    )
    how.add_argument(
        "--tables", default="auto", help="times of: auto (this machine's GPU if measured, else H200), h200, cpu, FILE"
    )
    how.add_argument(
        "--transport", choices=("p2p", "symmetric"), default="p2p", help="symmetric: the H200's times of copy engines"
    )
    told = plan.add_argument_group("what is told")
    told.add_argument("--rank", default="0", metavar="R", help="the rank whose plan is printed (default 0), or all")
    told.add_argument("--picture", metavar="FILE", help="also draw it, as PNG, PDF or SVG")
    told.add_argument("--json", action="store_true", help="print JSON instead")
    plan.set_defaults(run=_plan)


def _env(options: argparse.Namespace) -> int:
    from ringflash import env

    rows = env.describe()
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    return 0


# plan


def _plan(options: argparse.Namespace) -> int:
    from ringflash.parallel.cost import Shape, predict_all
    from ringflash.simulated import SimulatedWorld

    if options.picture:
        check_picture(options.picture)
        if options.queries:
            raise ValueError("--picture shows whole sequences; leave --queries out")
    mask, seqlen = read_problem(options)
    queries = at_least_one("--queries", size("--queries", options.queries)) if options.queries else seqlen
    for name in ("heads", "head_dim", "batch", "world"):
        at_least_one(f"--{name.replace('_', '-')}", getattr(options, name))
    kv_heads = at_least_one("--kv-heads", options.heads if options.kv_heads is None else options.kv_heads)
    if options.heads % kv_heads:
        raise ValueError(f"--heads {options.heads} is no multiple of --kv-heads {kv_heads}")
    if queries > seqlen:
        raise ValueError(f"--queries {queries} are more than the {seqlen} tokens of the sequence")
    dims = options.head_dim, at_least_one("--head-dim-v", options.head_dim_v or options.head_dim)
    mask.check(queries, seqlen)
    schedule = schedule_name(options.schedule)
    world = SimulatedWorld(options.world, options.layout, schedule, ulysses=options.ulysses, inner=options.inner)
    world = world.for_mask(mask)
    wanted = _ranks(options.rank, options.world)
    tables = _tables(options, world, seqlen)
    dtype_bytes = {"float32": 4, "float64": 8}.get(options.dtype, 2)
    shape = Shape(options.batch, *dims, dtype_bytes, deterministic=options.deterministic)
    plans = [world.plan(rank, mask, queries, seqlen, options.heads, kv_heads) for rank in wanted]
    if options.transport == "symmetric":
        plans = [world.trading(plan, *dims, dtype_bytes) or plan for plan in plans]
    forecasts = predict_all(plans, tables.device, tables.link, shape)
    if options.json:
        print(json.dumps([as_dict(f) for f in forecasts] if options.rank == "all" else as_dict(forecasts[0]), indent=2))
    elif options.rank == "all":
        print(_summary(forecasts, tables))
    else:
        print(_explained(plans[0], forecasts[0], options, world, tables, seqlen))
    if options.picture:
        _draw(options, world, mask, seqlen, kv_heads, shape.dtype_bytes, tables)
    return 0


def _explained(
    plan: Plan, forecast: Forecast, options: argparse.Namespace, world: SimulatedWorld, tables: Tables, seqlen: int
) -> str:
    from ringflash.parallel.explain import explain
    from ringflash.parallel.sharding import STAGE_TOKENS

    chosen = ""
    if options.schedule == "auto":
        here = seqlen * world.ulysses // world.world
        chosen = f"stages of about {STAGE_TOKENS:,} remote tokens, {here:,} a chunk"
        if plan.key.schedule.ulysses > world.ulysses:
            chosen = f"in training; without gradients a ring, {chosen}"
    return explain(plan, forecast, chosen=chosen, source=tables.source)


def _draw(
    options: argparse.Namespace, world: SimulatedWorld, mask: Mask, seqlen: int, kv_heads: int, dtype_bytes: int, tables: Tables
) -> None:
    try:
        from ringflash.parallel.picture import draw_plan

        draw_plan(
            world, mask, seqlen, options.heads, kv_heads, options.head_dim, options.picture,
            batch=options.batch, dtype_bytes=dtype_bytes, tables=tables,
        )  # fmt: skip
    except ModuleNotFoundError as error:
        raise ValueError(f"--picture needs {error.name}; try: {TRAIN_EXTRA}") from error
    print(f"picture {options.picture}", file=sys.stderr)


def _tables(options: argparse.Namespace, world: SimulatedWorld, seqlen: int) -> Tables:
    from ringflash.parallel import tables

    if options.tables == "auto":
        found = tables.measured("cuda")
    elif options.tables in ("h200", "cpu"):
        found = tables.DEFAULTS["cuda" if options.tables == "h200" else "cpu"]
    else:
        held = tables.read(Path(options.tables))
        found = held.get("cuda") or next(iter(held.values()))
    if options.transport == "symmetric":
        if found is not tables.DEFAULTS["cuda"]:
            raise ValueError("--transport symmetric has times of the H200 only; use it with --tables h200")
        found = replace(found, link=tables.PULLED)
    if options.node is not None:
        return replace(found, link=replace(found.link, node=at_least_one("--node", options.node)))
    return tables.for_schedule(found, world.schedule_of(seqlen))


def _ranks(text: str, world: int) -> list[int]:
    if text == "all":
        if world > ALL_RANKS:
            raise ValueError(
                f"--rank all is for up to {ALL_RANKS} ranks, got --world {world}; give one rank, for example --rank 0"
            )
        return list(range(world))
    if not text.isdigit() or int(text) >= world:
        raise ValueError(f"--rank {text} is none of the ranks 0 to {world - 1}; give one of them, or all")
    return [int(text)]


def _summary(forecasts: Sequence[Forecast], tables: Tables) -> str:
    """One line a rank."""
    from ringflash.parallel.explain import count_text, size_text, time_text, travels_text

    head = ["rank", "tokens", "steps", "slices", "pairs", "in", "out", "forward", "waiting", "backward", "waiting", "memory"]
    rows = [head]
    for f in forecasts:
        plan, busy = f.plan, sum(1 for s in f.steps if s.work.visible)
        cells = [str(plan.key.rank), f"{plan.q_lengths[plan.member]:,}", str(busy), f"{sum(s.work.slices for s in f.steps):,}"]
        cells += [count_text(f.areas[plan.key.rank])]
        cells += [size_text(sum(s.bytes_in for s in f.steps)), size_text(sum(s.bytes_out for s in f.steps))]
        for times in (f.forward, f.backward):
            cells += [time_text(times.total_s), time_text(times.exposed_s)]
        rows.append([*cells, size_text(max(f.forward.memory.total, f.backward.memory.total))])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    first = forecasts[0]
    return "\n".join(
        [
            f"schedule {first.plan.key.schedule}, all ranks simulated together",
            f"predicted for {first.device.name}, {first.link.name} ({tables.source})",
            *lines,
            "steps: with something to compute; pairs: visible ones times heads; in, out: K and V of the forward pass",
            f"balance {first.balance:.3f}: work of the busiest rank over the mean",
            *([f"travels {travels_text(first.plan, first.shape)}"] if first.plan.rings > 1 else []),
        ]
    )


def as_dict(forecast: Forecast) -> dict[str, Any]:
    """A forecast as plain data."""
    plan, shape = forecast.plan, forecast.shape
    found: dict[str, Any] = {
        "rank": plan.key.rank,
        "world": plan.key.world,
        "mask": repr(plan.key.mask),
        "layout": plan.key.q_layout.name,
        "runs": [list(run) for run in plan.key.q_layout.ranks[plan.key.rank]],
        "schedule": str(plan.key.schedule),
        "heads": plan.key.heads,
        "kv_heads": plan.key.kv_heads,
        "head_groups": plan.key.groups,
        "shape": asdict(shape),
        "device": asdict(forecast.device),
        "link": asdict(forecast.link),
        "balance": forecast.balance,
        "areas": list(forecast.areas),
    }
    for name, times in (("forward", forecast.forward), ("backward", forecast.backward)):
        found[name] = {
            "total_s": times.total_s,
            "compute_s": times.compute_s,
            "exposed_s": times.exposed_s,
            "exchange_of_heads_s": times.enter_s + times.leave_s,
            "memory_bytes": times.memory.total,
            "memory": dict(times.memory.items),
        }
    back = forecast.back
    found["travels"] = {"forward": plan.key.travels, "backward": back.key.travels}
    for name, p, steps, times in (
        ("steps", plan, forecast.steps, forecast.forward),
        ("backward_steps", back, forecast.backward_steps, forecast.backward),
    ):
        found[name] = [
            {
                "chunks": [chunk.owner for chunk in step.chunks],
                "rows": step.rows,
                **f.work._asdict(),
                **{what: getattr(f, what) for what in ("bytes_in", "bytes_out")},
                **({what: getattr(f, what) for what in ("home_in", "home_out")} if p is not plan or back is plan else {}),
                **time._asdict(),
            }
            for step, f, time in zip(p.steps, steps, times.steps, strict=True)
        ]
    return found


# the problem


def read_problem(options: argparse.Namespace) -> tuple[Mask, int]:
    """The mask and the sequence length that the options name."""
    from ringflash.mask import Causal, Dilated, Documents, Mask

    masks = [read_mask(text) for text in options.mask or ["causal"]]
    if options.documents and options.documents_file:
        raise ValueError("--documents and --documents-file say the same thing twice; give one of them")
    packed = lengths(f"@{options.documents_file}") if options.documents_file else lengths(options.documents or "0")
    if options.documents or options.documents_file:
        # The mask counts inside each document. A causal one is an option of the documents: one mask instead of two.
        plain = [m for m in masks if m in (Mask.causal(), Mask.full())]
        masks = [m for m in masks if m not in plain]
        masks.append(Mask.documents(packed, causal=Mask.causal() in plain))
    if options.window is not None:
        window = size("--window", options.window)
        fits = [i for i, m in enumerate(masks) if isinstance(m, (Causal, Documents, Dilated)) and m.size is None]
        if not fits:
            raise ValueError("--window is for a causal, documents or dilated mask without a window of its own")
        masks[fits[0]] = _windowed(masks[fits[0]], window)
    totals = [sum(m.lengths) for m in masks if isinstance(m, Documents)]
    if options.seqlen is None and not totals:
        raise ValueError("--seqlen is missing: the tokens of the whole sequence, for example --seqlen 128k")
    mask = masks[0]
    for other in masks[1:]:
        mask = mask & other
    if options.seqlen is None:
        return mask, at_least_one("the sum of the documents' lengths", totals[0])
    return mask, at_least_one("--seqlen", size("--seqlen", options.seqlen))


def _windowed(mask: Mask, window: int) -> Mask:
    from ringflash.mask import Dilated, Documents, Mask

    if isinstance(mask, Documents):
        return Mask.documents(mask.lengths, causal=mask.is_causal, window=window)
    return Mask.dilated(mask.stride, window) if isinstance(mask, Dilated) else Mask.causal(window)


if __name__ == "__main__":
    sys.exit(main())
