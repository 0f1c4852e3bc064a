"""One run: model, data and optimiser of a rank, the training step, and the loop around it.

Two reductions per step cross ranks outside attention: the loss (inside ``cp.cross_entropy``) and one all-reduce of a flat
buffer that every gradient is a view of. That buffer's tail carries the loss for display and the wish to stop, so that all ranks
leave the loop after the same step without a message of its own.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import ringflash as rf
from ringflash.launch import checkpoint
from ringflash.launch.config import TrainConfig, as_dict
from ringflash.launch.data import IGNORE, Corpus, Sample, load_corpus
from ringflash.launch.model import GPT, Context
from ringflash.launch.progress import Progress
from ringflash.launch.world import Activity, StopRequest, World

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_TAIL = 2  # loss, wish to stop


class Trainer:
    """Everything one rank holds. ``state`` says where the run is; ``run_dir`` and ``corpus`` are the same on all ranks."""

    def __init__(self, config: TrainConfig, world: World):
        self.config, self.world = config, world
        self.run_dir = Path(_agreed(config.run_dir, world))
        self.corpus = load_corpus(
            config.data.path,
            pattern=config.data.pattern,
            validation=config.data.validation,
            seqlen=config.seqlen,
            seed=config.seed,
        )
        _check_same_text(self.corpus, world)
        parallel = config.parallel
        mesh = init_device_mesh(world.device.type, (parallel.dp, world.size // parallel.dp), mesh_dim_names=("dp", "cp"))
        self.replica = mesh.get_local_rank("dp")
        self.cp_group = mesh["cp"].get_group()
        self.cp = rf.ContextParallel(
            mesh["cp"],
            layout=parallel.layout,
            schedule=parallel.schedule,
            ulysses=parallel.ulysses,
            inner=parallel.inner or None,
            transport=parallel.transport,
            timeout_s=parallel.timeout_s,
        )
        torch.manual_seed(config.seed)
        self.model = GPT(config.model).to(world.device)
        self.optimizer = _optimizer(self.model, config)
        self.loaded = ""  # the checkpoint this run continues from
        self.state, self.resumed = self._start()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.flat = torch.zeros(sum(p.numel() for p in self.parameters) + _TAIL, device=world.device)
        for parameter, view in zip(self.parameters, self.flat[:-_TAIL].split([p.numel() for p in self.parameters]), strict=True):
            parameter.grad = view.view_as(parameter)

    @property
    def size(self) -> int:
        """Number of trained parameters."""
        return sum(p.numel() for p in self.parameters)

    def _start(self) -> tuple[checkpoint.State, str]:
        """The state to start from, tensors loaded, and the sentence that says which. Rank 0 looks, so that all ranks agree."""
        choice: list[str | None] = [None, ""]
        if self.world.first:
            found, why = checkpoint.resolve(self.config.resume, Path(self.config.out), as_dict(self.config))
            choice = [str(found) if found else None, why]
        dist.broadcast_object_list(choice)
        path, why = choice[0], str(choice[1])
        if path is None:
            return checkpoint.State(0, 0, self.corpus.digest, as_dict(self.config)), why
        state = checkpoint.read_state(Path(path))
        if state.digest != self.corpus.digest:
            raise ValueError(
                f"{path} was trained on other text (digest {state.digest}, now {self.corpus.digest}); "
                f"restore the files under {self.corpus.source}, or use resume=never."
            )
        checkpoint.load(Path(path), self.model, self.optimizer)
        state.config = as_dict(self.config)
        self.loaded = path
        return state, why

    # --- one sequence -------------------------------------------------------------------------------------------------

    def mask_of(self, sample: Sample) -> rf.Mask:
        """Causal, or causal inside each packed document."""
        return rf.Mask.documents(sample.lengths, causal=True) if self.config.data.documents else rf.Mask.causal()

    def loss(self, sample: Sample) -> Tensor:
        """Mean loss of a sequence sharded over this replica's ranks; its gradient is this rank's share."""
        mask = self.mask_of(sample)
        cp, device = self.cp.for_mask(mask), self.world.device
        tokens = cp.shard(sample.tokens[None], dim=1).to(device)
        labels = cp.shard_labels(sample.labels[None], dim=1, ignore_index=IGNORE).to(device)
        positions = cp.position_ids(self.config.seqlen).to(device)
        result: Tensor = cp.cross_entropy(self._logits(tokens, positions, mask, cp), labels)
        return result

    def loss_on_one_device(self, sample: Sample) -> Tensor:
        """The same loss without any other rank: the whole sequence here."""
        device = self.world.device
        positions = torch.arange(self.config.seqlen, device=device)
        labels = F.pad(sample.labels[1:], (0, 1), value=IGNORE).to(device)
        logits = self._logits(sample.tokens[None].to(device), positions, self.mask_of(sample), None)
        return F.cross_entropy(logits[0], labels, ignore_index=IGNORE)

    def _logits(self, tokens: Tensor, positions: Tensor, mask: rf.Mask, cp: rf.ContextParallel | None) -> Tensor:
        dtype = DTYPES[self.config.machine.dtype]
        context = Context(cp, positions, self.model.masks(mask), self.config.parallel.backend)
        with torch.autocast(self.world.device.type, dtype=dtype, enabled=dtype != torch.float32):
            logits: Tensor = self.model(tokens, context)
        return logits

    # --- one step -----------------------------------------------------------------------------------------------------

    def step(self, stop: StopRequest) -> tuple[dict[str, float], bool]:
        """One optimiser step; its row of the history, and whether some rank wants to stop. Collective.

        Sequences are numbered over the whole run, so the numbers of ranks and of replicas change nothing but who computes them.
        """
        started = time.perf_counter()
        each = self.config.batch // self.config.parallel.dp
        self.flat.zero_()
        for number in range(each):
            loss = self.loss(
                self.corpus.train.sample(
                    self.state.sequences + self.replica * each + number, documents=self.config.data.documents
                )
            )
            (loss / self.config.batch).backward()
            self.flat[-2] += loss.detach() / self.config.batch / self.cp.world
        self.flat[-1] = float(stop.wanted)
        dist.all_reduce(self.flat)
        mean, wishes = self.flat[-_TAIL:].tolist()
        norm = float(torch.linalg.vector_norm(self.flat[:-_TAIL]))
        if not math.isfinite(norm) or not math.isfinite(mean):
            raise ValueError(
                f"step {self.state.step + 1}: loss {mean}, gradient norm {norm}; lower optimizer.lr or raise optimizer.warmup."
            )
        if 0 < self.config.optimizer.clip < norm:
            self.flat[:-_TAIL] *= self.config.optimizer.clip / norm
        lr = learning_rate(self.config, self.state.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.state.step += 1
        self.state.sequences += self.config.batch
        row = {
            "step": self.state.step,
            "loss": mean,
            "lr": lr,
            "grad_norm": norm,
            "seconds": time.perf_counter() - started,
        }
        return row, wishes > 0

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss of the first sequences of the validation split. Every replica computes all of them."""
        split, documents = self.corpus.validation, self.config.data.documents
        count = self.config.evaluation.sequences
        return sum(float(self.loss(split.sample(number, documents=documents))) for number in range(count)) / count

    # --- the loop -----------------------------------------------------------------------------------------------------

    def train(self, stop: StopRequest, progress: Progress, activity: Activity) -> bool:
        """Run until the last step or until some rank is asked to stop; True if it was. Ends with a checkpoint either way."""
        every, due = self.config.evaluation.every, self.config.checkpoint.every
        self._log(*self.state.history)
        stopped = False
        while self.state.step < self.config.steps and not stopped:
            activity.now = f"in step {self.state.step + 1}"
            row, stopped = self.step(stop)
            progress.step(self.state.step, row["loss"], row["seconds"])
            last = self.state.step == self.config.steps
            rows = [row]
            if not stopped and (last or (every and self.state.step % every == 0)):
                rows.append({"step": self.state.step, "validation": self.validate()})
                progress.say(f"step {self.state.step:>5}/{self.config.steps}  validation loss {rows[-1]['validation']:.3f}")
            self.state.history += rows
            self._log(*rows)
            if last or stopped or (due and self.state.step % due == 0):
                activity.now = f"while saving step {self.state.step}"
                activity.saved = str(self.save())
        return stopped

    def save(self) -> Path:
        """Write a checkpoint of the present step. Collective."""
        keep = self.config.checkpoint.keep
        return checkpoint.save(self.run_dir / "checkpoints", self.state, self.model, self.optimizer, self.world, keep=keep)

    def _log(self, *rows: dict[str, float]) -> None:
        if self.world.first:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            with open(self.run_dir / "metrics.jsonl", "a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine down to ``final_lr`` of the peak; ``step`` counts from 0."""
    settings = config.optimizer
    warm = min(1.0, (step + 1) / (settings.warmup + 1))
    cosine = 0.5 * (1 + math.cos(math.pi * step / config.steps))
    return settings.lr * warm * (settings.final_lr + (1 - settings.final_lr) * cosine)


def _optimizer(model: GPT, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW; weight decay for matrices only."""
    settings = config.optimizer
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(settings.beta1, settings.beta2), fused=True)


def _agreed(run_dir: str, world: World) -> str:
    """Rank 0's folder, on all ranks: its name holds the time, and ranks started by hand read different clocks."""
    choice = [run_dir]
    dist.broadcast_object_list(choice)
    return choice[0]


def _check_same_text(corpus: Corpus, world: World) -> None:
    """Raise ValueError on all ranks if their hosts hold different text."""
    digests: list[str] = [""] * world.size
    dist.all_gather_object(digests, corpus.digest)
    if len(set(digests)) > 1:
        others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        raise ValueError(
            f"Ranks {others} read other text under {corpus.source} than rank 0 (another Python version or another copy?); "
            f"give all hosts the same files by data.path."
        )
