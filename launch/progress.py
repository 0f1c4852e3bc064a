"""What rank 0 shows while it trains: a live bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType


class Progress:
    """Context manager. ``step`` after every step, ``say`` for anything else; silent on all ranks but the first.

    tokens/s and ETA come from the last steps only, so that a slow first step (start-up, plans) or another load does not linger
    in them.
    """

    _MEMORY = 0.8  # weight of the past in the running mean of step times

    def __init__(self, steps: int, done: int, *, tokens_per_step: int, every_s: float, shown: bool):
        self._steps, self._done, self._tokens_per_step, self._every_s, self._shown = steps, done, tokens_per_step, every_s, shown
        self._step_s, self._seen = 0.0, 0
        self._last_line = 0.0
        self._bar = _bar(steps, done) if shown and sys.stdout.isatty() else None

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._bar:
            self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)
        elif self._shown:
            print(text, flush=True)

    def step(self, number: int, loss: float, seconds: float) -> None:
        """``number`` steps are done, the last one with this loss in this time."""
        if self._seen < 2:  # the first step sets everything up: it counts only until there is another
            self._step_s = seconds
        else:
            self._step_s = self._MEMORY * self._step_s + (1 - self._MEMORY) * seconds
        self._seen += 1
        speed = self._tokens_per_step / self._step_s
        left = (self._steps - number) * self._step_s
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=number, loss=f"{loss:.3f}", speed=f"{speed:,.0f}", left=clock(left))
        elif self._shown and (time.monotonic() - self._last_line >= self._every_s or number == self._steps):
            self._last_line = time.monotonic()
            print(f"step {number:>5}/{self._steps}  loss {loss:.3f}  {speed:>9,.0f} tokens/s  ETA {clock(left)}", flush=True)


def clock(seconds: float) -> str:
    """m:ss, or h:mm:ss."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def _bar(steps: int, done: int):  # type: ignore[no-untyped-def]  # rich is imported when there is a terminal
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (
        TextColumn("training"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("{task.fields[speed]} tokens/s"),
        TextColumn("ETA {task.fields[left]}"),
    )
    bar = Progress(*columns, expand=True)
    bar.add_task("train", total=steps, completed=done, loss="-", speed="-", left="-")
    return bar
