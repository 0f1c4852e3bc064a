"""``ringflash train``: long-context training across ranks, from the command line to the exit code.

``main`` is the command. Where no launcher started it, it is only the parent: Hydra composes the configuration and torch's elastic
launcher starts the ranks. ``work`` is one rank, whoever started it.

Exit codes: 0 done; 1 failed (a rank died, or the check at the end did); 2 a mistake in the options; 75 a rank that failed
because another one did; 128 + signal stopped on request, with a checkpoint.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from ringflash.launch import config as configs
from ringflash.launch import elastic
from ringflash.launch import world as worlds
from ringflash.launch.config import TrainConfig
from ringflash.launch.elastic import LastWord
from ringflash.launch.world import Activity, Report, StopRequest, World

if TYPE_CHECKING:
    from ringflash.launch.trainer import Trainer

_STARTED = time.monotonic()
_LOST = re.compile(r"gloo|nccl|connection (closed|reset|refused|was)|timed out|broken pipe|socket", re.IGNORECASE)


def main(argv: Sequence[str] | None = None) -> int:
    """The command with its arguments (default: the process's); returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(arguments):
        print(configs.help_text())
        return 0
    if worlds.launcher() is not None:
        return work(arguments)
    try:
        if not any(a.startswith("-") for a in arguments):
            configs.compose(arguments)  # one clear line now instead of Hydra's several
        return _parent(configs.with_machine(arguments))
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("ringflash"):
            raise
        elastic.say(f"{error.name} is not installed; try: pip install '.[train]' in the source folder")
        return 2
    except ValueError as error:
        elastic.say(str(error))
        return 2
    except KeyboardInterrupt:
        return 130


def _parent(arguments: list[str]) -> int:
    """Hand over to Hydra (folders, switches, multirun), which calls back once per job."""
    import hydra
    from hydra.core.hydra_config import HydraConfig

    codes: list[int] = []

    def job(node: Any) -> None:
        runtime = HydraConfig.get()
        folder = Path(runtime.runtime.output_dir)
        quoted = str(folder).replace("\\", r"\\").replace("'", r"\'")
        try:
            codes.append(_start(configs.typed(node), [*runtime.overrides.task, f"run_dir='{quoted}'"]))
        except ValueError as error:
            elastic.say(str(error))
            codes.append(2)
        if codes[-1]:
            _forget(folder)

    configs.register()
    before = sys.argv
    sys.argv = ["ringflash train", *arguments]
    try:
        hydra.main(version_base="1.3", config_path=str(configs.CONF), config_name="train")(job)()
    finally:
        sys.argv = before
    return max(codes, default=0)


def _forget(folder: Path) -> None:
    """Removes the folder that Hydra made for a job, if the job failed before it wrote anything there."""
    if folder.is_dir() and {entry.name for entry in folder.iterdir()} <= {".hydra"}:
        shutil.rmtree(folder)


def _start(config: TrainConfig, arguments: list[str]) -> int:
    """Start the ranks of one job on this host and wait for them."""
    import torch

    ranks = config.ranks or torch.cuda.device_count()
    if ranks < 1:
        raise ValueError("ranks=0 means one per GPU, and torch sees none here; give ranks=4, say.")
    configs.check_world(config, ranks)
    return elastic.launch(ranks, arguments)


def work(arguments: Sequence[str]) -> int:
    """One rank, from joining to leaving; returns its exit code. Only rank 0 prints and writes, unless another rank fails
    alone.
    """
    stop = StopRequest()
    try:
        config = configs.compose(arguments)
        stop.at_once()
        world = worlds.join(config.machine.device, config.parallel.timeout_s)
    except RuntimeError as error:  # torch's DistError among them
        stop.arm()
        code = _not_joined(error)
        sys.stdout.flush()
        os._exit(code)
    except (ValueError, ImportError) as error:  # the same on all ranks
        stop.arm()
        if worlds.environment_rank(os.environ) == 0:
            elastic.say(str(error))
        LastWord("Said", str(error)).leave()
        return 2
    activity = Activity()
    try:
        configs.check_world(config, world.size)
        code = _run(config, world, stop, activity)
    except Exception as error:
        stop.arm()  # the launcher ends all ranks as soon as one has failed; this one still has to say why
        code = _failed(world, error, activity)
        sys.stdout.flush()
        os._exit(code)  # process groups with a broken peer may hang in their destructors
    worlds.leave()
    return code


def _run(config: TrainConfig, world: World, stop: StopRequest, activity: Activity) -> int:
    """Train, verify, draw; the exit code."""
    from ringflash.launch import report
    from ringflash.launch.progress import Progress
    from ringflash.launch.trainer import Trainer

    trainer = Trainer(config, world)
    progress = Progress(
        config.steps,
        trainer.state.step,
        tokens_per_step=config.batch * config.seqlen,
        every_s=config.log_every_s,
        shown=world.first,
    )
    unigram = trainer.corpus.unigram_loss(trainer.corpus.validation)
    activity.saved = trainer.loaded
    stop.arm()
    try:
        world.barrier()
    except RuntimeError:
        if stop.signal is None:
            raise
        os._exit(stop.exit_code)  # the signal ended a rank that had not come so far: nothing to save, nobody to wait for
    with progress:
        for line in _header(trainer, unigram):
            progress.say(line)
        if trainer.train(stop, progress, activity):
            progress.say(
                f"interrupted: all {world.size} ranks stopped after step {trainer.state.step}; checkpoint in "
                f"{trainer.run_dir / 'checkpoints'}; the same command continues"
            )
            LastWord("Stopped").leave()
            return stop.exit_code
        activity.now = "in the final check"
        passed = True
        if config.verify:
            verdict = report.verify(trainer)
            if verdict is not None:
                progress.say(str(verdict))
            outcome = [verdict.passed if verdict is not None else True]
            dist.broadcast_object_list(outcome)
            passed = outcome[0]
        activity.now = "while drawing"
        if world.first:
            report.loss_curve(trainer, trainer.run_dir / "loss.png")
            progress.say(_summary(trainer, unigram))
            report.plan_picture(trainer, trainer.run_dir / "plan.png")
            progress.say(f"loss curve {trainer.run_dir / 'loss.png'}, plan {trainer.run_dir / 'plan.png'}")
        world.barrier()
    if not passed:
        LastWord("Said", "the final check failed").leave()
    return 0 if passed else 1


def _header(trainer: Trainer, unigram: float) -> list[str]:
    config, corpus, parallel = trainer.config, trainer.corpus, trainer.config.parallel
    machine, model = config.machine, config.model
    replicas = f"{parallel.dp} replicas of " if parallel.dp > 1 else ""
    per_rank = f"{config.seqlen / trainer.cp.world:,.0f}"
    mask = "packed documents" if config.data.documents else "causal"
    skipped = f" ({corpus.skipped} skipped)" if corpus.skipped else ""
    return [
        f"ringflash train: {replicas}{trainer.cp.world} ranks on {machine.device}, {machine.dtype}, "
        f"{trainer.world.threads()} CPU threads each",
        f"context  {config.seqlen:,} tokens, {per_rank} a rank, {mask}, layout {parallel.layout}, schedule {parallel.schedule}",
        f"model    {trainer.size:,} parameters, {model.layers} layers, {model.heads} heads of {model.head_dim}, "
        f"{model.kv_heads} for keys and values",
        f"text     {corpus.files:,} files{skipped} from {corpus.source}: {len(corpus.train.text):,} bytes to train on, "
        f"{len(corpus.validation.text):,} held out",
        f"unigram  byte frequencies alone, fitted to the training text, cost {unigram:.3f} nats per byte on the held-out text",
        f"run      {trainer.run_dir}: {trainer.resumed}",
    ]


def _summary(trainer: Trainer, unigram: float) -> str:
    final = next((row["validation"] for row in reversed(trainer.state.history) if "validation" in row), float("nan"))
    return (
        f"done: {trainer.state.step} steps, validation loss {final:.3f} nats per byte against {unigram:.3f} of the unigram "
        f"model, {time.monotonic() - _STARTED:.0f} s since the ranks started"
    )


def _not_joined(error: RuntimeError) -> int:
    """Say that this rank did not reach the others; its exit code. Every rank says so itself: they cannot agree on one."""
    rank = worlds.environment_rank(os.environ)
    first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    text = f"rank {rank} could not join the other ranks ({first_line}); were all started, and do they reach rank 0's host?"
    if not LastWord("Lost", text, "while starting").leave():
        elastic.say(f"while starting: {text}")
    return elastic.LOST_PEER


def _failed(world: World, error: Exception, activity: Activity) -> int:
    """Say once, from the right rank, what happened; the exit code of this rank.

    A rank whose own code failed says so at once. One that only lost contact waits for the others' word, to name who is missing.
    """
    first_line = next(iter(str(error).strip().splitlines()), "")
    lost = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None)
    reports = worlds.roll_call(world, Report(type(error).__name__, str(error), lost), wait_s=3.0 if lost else 0.5)
    silent = [rank for rank, report in reports.items() if report is None]
    guilty = [rank for rank, report in reports.items() if report is not None and not report.lost_peer]
    if not lost:
        same = [rank for rank in guilty if reports[rank] == reports[world.rank]]
        if world.rank == same[0]:
            if not isinstance(error, (ValueError, OSError)):
                traceback.print_exception(error)
            who = "" if len(same) == world.size else f"rank {world.rank}: "
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "  # a ValueError's text is for the user
            elastic.say(f"{activity.now}: {who}{kind}{error}")
        LastWord("Said", first_line, activity.now).leave()
        return 2 if isinstance(error, ValueError) else 1
    if guilty:
        text = f"rank {guilty[0]} failed"
    elif silent:
        text = f"no sign of life from rank {', '.join(map(str, silent))}; {first_line}"
    else:
        text = first_line
    if not LastWord("Lost", text, activity.now, activity.saved).leave() and world.rank == min(set(reports) - set(silent)):
        elastic.say(f"{activity.now}: {text}")
    return elastic.LOST_PEER


if __name__ == "__main__":
    sys.exit(main())
