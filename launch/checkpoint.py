"""Checkpoints that any number of ranks can write and any other number can resume.

One folder per checkpoint: torch.distributed.checkpoint's files (parameters, optimiser state, random state) and ``state.json``
(step, data position, configuration, history). It is written beside its final name and renamed when complete; the file
``latest`` is replaced last. So a run killed at any moment leaves a complete checkpoint or none, never half of one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ringflash.launch.world import World

_LATEST = "latest"
_STATE = "state.json"
_PARTIAL = ".partial"

IDENTITY = ("seqlen", "batch", "seed", "model", "data")
"""Options that decide what is computed: a checkpoint continues only under the same ones."""
SCHEDULE = ("steps", "optimizer")
"""Options that decide how: an interrupted run is continued by itself only if these are the same too."""


@dataclass
class State:
    """Where a run is, beside its tensors. ``sequences`` is the data position: how many sequences were consumed.

    ``history`` holds one dictionary per step (step, loss, lr, grad_norm, seconds) and per validation (step, validation), from
    the first step on, whatever number of times the run was resumed.
    """

    step: int
    sequences: int
    digest: str
    config: dict[str, Any]
    history: list[dict[str, float]] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return self.step >= int(self.config["steps"])


def save(folder: Path, state: State, model: nn.Module, optimizer: Optimizer, world: World, *, keep: int) -> Path:
    """Write the checkpoint of ``state.step`` under ``folder`` and drop all but the ``keep`` newest. Collective; returns its
    path.
    """
    import torch.distributed.checkpoint as dcp

    target = folder / f"step-{state.step:08d}"
    partial = target.with_name(target.name + _PARTIAL)
    if world.first:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob("*" + _PARTIAL):
            shutil.rmtree(leftover)
    world.barrier()
    dcp.save(_tensors(model, optimizer), checkpoint_id=partial)  # type: ignore[attr-defined]
    if world.first:
        (partial / _STATE).write_text(json.dumps(dataclasses.asdict(state)))
        if target.exists():  # the same step of a run resumed in place
            shutil.rmtree(target)
        partial.rename(target)
        pointer = folder / (_LATEST + _PARTIAL)
        pointer.write_text(target.name + "\n")
        os.replace(pointer, folder / _LATEST)
        for old in sorted(folder.glob("step-*"))[:-keep]:
            if old != target:
                shutil.rmtree(old)
    world.barrier()
    return target


def load(path: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Read parameters, optimiser state and random state from a checkpoint. Collective. Call before gradients exist."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_state_dict

    tensors = _tensors(model, optimizer)
    dcp.load(tensors, checkpoint_id=path)  # type: ignore[attr-defined]
    set_state_dict(model, optimizer, model_state_dict=tensors["model"], optim_state_dict=tensors["optimizer"])
    torch.set_rng_state(tensors["random"])


def _tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """All tensors of a run under names that do not depend on the number of ranks. Every rank holds them whole;
    torch.distributed.checkpoint writes each only once.
    """
    from torch.distributed.checkpoint.state_dict import get_state_dict

    parameters, optimiser_state = get_state_dict(model, optimizer)
    return {"model": parameters, "optimizer": optimiser_state, "random": torch.get_rng_state()}


def read_state(path: Path) -> State:
    """``state.json`` of a checkpoint. Raises ValueError if it is not a complete checkpoint."""
    try:
        return State(**json.loads((path / _STATE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{str(path)!r} is not a complete checkpoint ({error}); give a folder named step-... of a run."
        ) from error


def latest(run: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    folder = run / "checkpoints"
    try:
        path = folder / (folder / _LATEST).read_text().strip()
    except OSError:
        return None
    return path if (path / _STATE).is_file() else None


def resolve(resume: str, out: Path, config: dict[str, Any]) -> tuple[Path | None, str]:
    """The checkpoint to start from (None for a fresh start) and one sentence that says why.

    "auto" looks at the newest run under ``out`` and takes it if it was interrupted and has the same configuration. A path names
    a run or a checkpoint; ValueError if it holds none, or one that computes something else.
    """
    if resume == "never":
        return None, "fresh start (resume=never)"
    if resume != "auto":
        given = Path(resume).expanduser()
        path = given if (given / _STATE).is_file() else latest(given)
        if path is None:
            raise ValueError(f"resume={resume!r} is neither a checkpoint nor a run with one; give such a folder, auto or never.")
        changed = differences(read_state(path).config, config, IDENTITY)
        if changed:
            raise ValueError(f"resume={resume!r} was written under {'; '.join(changed)}; use the same values, or resume=never.")
        return path, f"continuing {path}"
    pointers = sorted(out.glob(f"*/checkpoints/{_LATEST}"), key=lambda p: p.stat().st_mtime)
    newest = latest(pointers[-1].parent.parent) if pointers else None
    if newest is None:
        return None, f"fresh start (no run in {out})"
    state = read_state(newest)
    if state.finished:
        return None, f"fresh start (the newest run in {out} is finished)"
    changed = differences(state.config, config, IDENTITY + SCHEDULE)
    if changed:
        return None, f"fresh start (the interrupted run {newest.parent.parent} has {'; '.join(changed)})"
    return newest, f"continuing {newest}"


def differences(old: dict[str, Any], new: dict[str, Any], keys: tuple[str, ...], prefix: str = "") -> list[str]:
    """``key=old, not new`` for every option under ``keys`` that differs."""
    found = []
    for key in keys:
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, tuple(sorted(a.keys() | b.keys())), f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}={a!r}, not {b!r}")
    return found
