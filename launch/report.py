"""What a run leaves for people: the comparison with one device, the loss curve, the picture of the plan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from ringflash.launch import world as worlds
from ringflash.launch.trainer import DTYPES, Trainer

_LIMITS = {"float32": (1e-5, 1e-4), "bfloat16": (1e-3, 2e-2)}
"""Largest relative difference of loss and gradients. Same arithmetic in another order: some hundred units of the last place in
float32. In bfloat16 each rank rounds its share of a weight's gradient (2^-9) before the float32 sum.
"""


@dataclass(frozen=True)
class Verdict:
    """Many ranks against one on the same sequence: losses, gradient norms, ``||g_many - g_one|| / ||g_one||`` and its worst
    parameter.
    """

    ranks: int
    loss: tuple[float, float]
    norm: tuple[float, float]
    difference: float
    worst: tuple[str, float]
    limits: tuple[float, float]

    @property
    def passed(self) -> bool:
        loss = _relative(*self.loss)
        gradient = max(self.difference, _relative(*self.norm))
        return loss <= self.limits[0] and gradient <= self.limits[1]  # a NaN fails

    def __str__(self) -> str:
        return (
            f"check: {self.ranks} ranks against 1 on the same sequence\n"
            f"  loss           {self.loss[0]:.7f} | {self.loss[1]:.7f}   relative difference {_relative(*self.loss):.1e}\n"
            f"  gradient norm  {self.norm[0]:.7f} | {self.norm[1]:.7f}   relative difference {_relative(*self.norm):.1e}\n"
            f"  gradients      norm of the difference {self.difference:.1e}, "
            f"worst parameter {self.worst[0]} {self.worst[1]:.1e}\n"
            f"  {'PASS' if self.passed else 'FAIL'} (limits: loss {self.limits[0]:.0e}, gradients {self.limits[1]:.0e})"
        )


def verify(trainer: Trainer) -> Verdict | None:
    """Compute loss and gradients of the next sequence with all ranks of a replica and with rank 0 alone. Collective; the
    verdict is rank 0's, the other ranks get None if it passed.

    Leaves the gradients changed. Raises nothing on a failed comparison: the caller decides.
    """
    sample = trainer.corpus.train.sample(trainer.state.sequences, documents=trainer.config.data.documents)
    flat = trainer.flat
    flat.zero_()
    loss = trainer.loss(sample)
    loss.backward()
    dist.all_reduce(flat, group=trainer.cp_group)
    many, many_loss = flat.clone(), float(loss.detach())
    if not trainer.world.first:
        return None
    threads = torch.get_num_threads()
    torch.set_num_threads(worlds.cores())  # the other ranks sleep meanwhile
    flat.zero_()
    one = trainer.loss_on_one_device(sample)
    one.backward()
    torch.set_num_threads(threads)
    named = [(name, p) for name, p in trainer.model.named_parameters() if p.requires_grad]
    parts = zip(
        many.split([p.numel() for _, p in named] + [many.numel() - sum(p.numel() for _, p in named)]), named, strict=False
    )
    by_name = {name: _difference(a, p.grad.flatten()) for a, (name, p) in parts if p.grad is not None}
    return Verdict(
        trainer.cp.world,
        (many_loss, float(one.detach())),
        (float(many.norm()), float(flat.norm())),
        _difference(many, flat),
        max(by_name.items(), key=lambda item: item[1]),
        _LIMITS[trainer.config.machine.dtype],
    )


def _relative(a: float, b: float) -> float:
    return abs(a - b) / abs(b)


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def loss_curve(trainer: Trainer, path: Path) -> None:
    """PNG of the whole history: training loss of every step, validation points, and the unigram model's loss as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    history, config = trainer.state.history, trainer.config
    steps = [(row["step"], row["loss"]) for row in history if "loss" in row]
    points = [(row["step"], row["validation"]) for row in history if "validation" in row]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(*zip(*steps, strict=True), color="tab:blue", linewidth=1.2, label="training, one sequence per point")
    if points:
        axes.plot(*zip(*points, strict=True), "o", color="tab:orange", label="validation")
    unigram = trainer.corpus.unigram_loss(trainer.corpus.validation)
    axes.axhline(unigram, color="grey", linestyle="--", linewidth=1, label=f"unigram model, {unigram:.3f}")
    axes.set(
        xlabel=f"step ({config.batch * config.seqlen:,} tokens each)",
        ylabel="loss (nats per byte)",
        title=f"{trainer.size:,} parameters, {config.seqlen:,} tokens of context over {trainer.cp.world} ranks",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plan_picture(trainer: Trainer, path: Path) -> None:
    """PNG of the plan of one layer: who computes what, when."""
    from ringflash.parallel.picture import draw_plan

    dtype = DTYPES[trainer.config.machine.dtype]
    model, documents = trainer.config.model, trainer.config.data.documents
    mask = trainer.mask_of(trainer.corpus.train.sample(0, documents=documents))
    draw_plan(
        trainer.cp.for_mask(mask),
        mask,
        trainer.config.seqlen,
        model.heads,
        model.kv_heads,
        model.head_dim,
        path,
        dtype_bytes=dtype.itemsize,
    )
