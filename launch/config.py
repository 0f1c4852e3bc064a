"""The configuration of ``ringflash train``: every option with its default, its meaning and its limits.

The dataclasses are the schema: Hydra checks names and types against them, ``check`` the rest. ``conf/`` holds the values. Hydra
is imported when training starts, never with ``ringflash`` itself.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ringflash.parallel.context import TRANSPORTS
from ringflash.parallel.layout import read_kind
from ringflash.parallel.schedule import make_schedule, read_schedule


def _option(default: Any, meaning: str) -> Any:
    return field(default=default, metadata={"help": meaning})


@dataclass
class ModelConfig:
    layers: int = _option(2, "transformer blocks")
    dim: int = _option(192, "width of the residual stream")
    heads: int = _option(4, "query heads")
    kv_heads: int = _option(2, "key/value heads; divides heads")
    head_dim: int = _option(32, "width of one head; even")
    ffn_dim: int = _option(512, "width of the SwiGLU feed-forward")
    windows: list[int] = field(
        default_factory=lambda: [64, 0],
        metadata={"help": "attention windows of the layers, repeated over the depth; 0 sees everything"},
    )
    rope_base: float = _option(10000.0, "base of the rotary frequencies")
    recompute: bool = _option(False, "redo the feed-forward in backward instead of keeping it (less memory)")


@dataclass
class DataConfig:
    path: str | None = _option(None, "a file or a folder of text; null is the standard library of this Python")
    pattern: str | None = _option(None, "file names to take from a folder; null is *.py for the standard library, else *")
    documents: bool = _option(False, "packed documents: a token sees its own document only")
    validation: float = _option(0.05, "share of the text held out")


@dataclass
class OptimizerConfig:
    lr: float = _option(4e-3, "peak learning rate of AdamW")
    warmup: int = _option(3, "steps of linear warm-up")
    final_lr: float = _option(0.1, "learning rate at the end of the cosine, as a share of the peak")
    beta1: float = _option(0.9, "decay of the first moment")
    beta2: float = _option(0.95, "decay of the second moment")
    weight_decay: float = _option(0.01, "decoupled weight decay of matrices")
    clip: float = _option(1.0, "largest gradient norm; 0 does not clip")


@dataclass
class ParallelConfig:
    layout: str = _option("zigzag", "contiguous | zigzag | zigzag:K | striped | balanced")
    schedule: str = _option("auto", "when keys and values move; see ringflash plan")
    ulysses: int = _option(1, "ranks that exchange heads for sequence inside the context-parallel group")
    inner: int = _option(0, "ranks of one fast-linked group, for schedule=double_ring or double_ring:K; 0 is none")
    transport: str = _option("auto", "auto | p2p | alltoall | allgather (schedule=allgather only) | symmetric or domains (cuda)")
    dp: int = _option(1, "data-parallel replicas; each has ranks / dp ranks and its own sequences")
    backend: str = _option("auto", "attention kernel; see ringflash env")
    timeout_s: float = _option(120.0, "a rank that says nothing for so long is given up")


@dataclass
class EvaluationConfig:
    every: int = _option(20, "steps between validations")
    sequences: int = _option(2, "validation sequences, always the same ones")


@dataclass
class CheckpointConfig:
    every: int = _option(25, "steps between checkpoints; 0 writes one at the end and on Ctrl-C only")
    keep: int = _option(2, "newest checkpoints that are kept")


@dataclass
class MachineConfig:
    device: str = _option("cpu", "cpu (gloo) | cuda (NCCL, one GPU a rank)")
    dtype: str = _option("float32", "float32 | bfloat16 (autocast over float32 parameters)")


@dataclass
class TrainConfig:
    ranks: int = _option(4, "ranks to start when no launcher did; 0 is one per GPU")
    seqlen: int = _option(8192, "tokens of one sequence, all ranks together")
    batch: int = _option(1, "sequences per step, all replicas together; divisible by parallel.dp")
    steps: int = _option(60, "optimizer steps of the whole run")
    seed: int = _option(0, "seed of parameters and data order")
    out: str = _option("outputs/train", "folder of all runs")
    run_dir: str = _option("", "folder of this run; normally OUT/DATE_TIME")
    resume: str = _option("auto", "auto (the newest unfinished run in out) | never | path of a run or checkpoint")
    log_every_s: float = _option(5.0, "seconds between log lines when the output is no terminal")
    verify: bool = _option(True, "at the end, compare loss and gradients with one device on the whole sequence")
    machine: MachineConfig = field(default_factory=MachineConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


DEVICES = ("cpu", "cuda")
DTYPES = ("float32", "bfloat16")
CONF = Path(__file__).resolve().parent / "conf"


def register() -> None:
    """Tell Hydra the schema that ``conf/train.yaml`` starts from."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="schema", node=TrainConfig)


def with_machine(arguments: Sequence[str]) -> list[str]:
    """``arguments``, with ``machine=gpu`` in front where CUDA is available and the user named no machine."""
    if torch.cuda.is_available() and not any(a.startswith("machine=") for a in arguments):
        return ["machine=gpu", *arguments]
    return list(arguments)


def compose(arguments: Sequence[str]) -> TrainConfig:
    """The checked configuration for ``key=value`` arguments. Writes nothing, so every rank may call it.

    Raises ValueError with Hydra's explanation for an unknown key or a value of the wrong type.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    register()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            node = hydra_compose("train", overrides=with_machine(arguments))
        return typed(node)
    except (HydraException, OmegaConfBaseException) as error:
        reasons = [
            str(e).strip().splitlines()[0].rstrip(".") for e in (error, error.__cause__) if e is not None and str(e).strip()
        ]
        raise ValueError(f"{'; '.join(reasons)}. `ringflash train --help` lists the options.") from error


def typed(node: Any) -> TrainConfig:
    """A composed configuration as checked dataclasses. Raises ValueError for impossible values."""
    from omegaconf import OmegaConf

    config = OmegaConf.to_object(node)
    assert isinstance(config, TrainConfig)
    check(config)
    return config


def check(config: TrainConfig) -> None:
    """Raise ValueError for a value that is of the right type and still impossible."""
    for key in ("seqlen", "batch", "steps", "parallel.ulysses", "parallel.dp", "evaluation.sequences", "checkpoint.keep"):
        _require(_get(config, key) >= 1, key, config, "at least 1")
    for key in ("layers", "dim", "heads", "kv_heads", "head_dim", "ffn_dim"):
        _require(_get(config, f"model.{key}") >= 1, f"model.{key}", config, "at least 1")
    for key in ("ranks", "optimizer.warmup", "optimizer.clip", "checkpoint.every", "evaluation.every", "parallel.inner"):
        _require(_get(config, key) >= 0, key, config, "at least 0")
    for key in ("parallel.timeout_s", "log_every_s", "optimizer.lr"):
        _require(_get(config, key) > 0, key, config, "more than 0")
    names = {
        "machine.device": DEVICES,
        "machine.dtype": DTYPES,
        "parallel.transport": TRANSPORTS,
    }
    for key, allowed in names.items():
        _require(_get(config, key) in allowed, key, config, " or ".join(allowed))
    _require(0 < config.data.validation < 1, "data.validation", config, "between 0 and 1")
    _require(
        config.model.heads % config.model.kv_heads == 0,
        "model.kv_heads",
        config,
        f"a divisor of model.heads={config.model.heads}",
    )
    _require(config.model.head_dim % 2 == 0, "model.head_dim", config, "even: RoPE turns pairs")
    _require(all(w >= 0 for w in config.model.windows), "model.windows", config, "a list of windows in tokens, 0 for none")
    _require(config.batch % config.parallel.dp == 0, "batch", config, f"divisible by parallel.dp={config.parallel.dp}")
    parallel = config.parallel
    try:
        read_kind(parallel.layout)
    except ValueError as error:
        raise ValueError(f"parallel.layout={parallel.layout!r} is not possible: {error}.") from None
    try:
        double = read_schedule(parallel.schedule)[0] == "double_ring"
    except ValueError as error:
        raise ValueError(f"parallel.schedule={parallel.schedule!r} is not possible: {error}.") from None
    if double:
        _require(parallel.inner >= 1, "parallel.inner", config, "the ranks of one fast-linked group for double_ring, at least 1")
    else:
        _require(parallel.inner <= 1, "parallel.inner", config, f"0 for parallel.schedule={parallel.schedule}")
    if parallel.transport in ("symmetric", "domains"):
        _require(config.machine.device == "cuda", "parallel.transport", config, "another one with machine=cpu")
    if parallel.transport == "symmetric":
        _require(not double, "parallel.transport", config, "domains, or another one, with double_ring")
    if parallel.transport == "allgather":
        plain = parallel.schedule == "allgather" and parallel.ulysses == 1
        _require(plain, "parallel.transport", config, "another one unless parallel.schedule=allgather parallel.ulysses=1")
    if config.machine.device == "cuda":
        _require(torch.cuda.is_available(), "machine.device", config, "cpu here: torch sees no CUDA device (machine=cpu)")


def check_world(config: TrainConfig, world: int) -> None:
    """Raise ValueError unless ``world`` ranks can be arranged as the configuration asks."""
    dp, ulysses = config.parallel.dp, config.parallel.ulysses
    if world % (dp * ulysses):
        raise ValueError(
            f"{world} ranks cannot be arranged as parallel.dp={dp} x parallel.ulysses={ulysses} x ring; "
            f"start a multiple of {dp * ulysses} ranks or change one of the two."
        )
    schedule = make_schedule(config.parallel.schedule, world // dp, ulysses, config.parallel.inner or None)
    schedule.check_groups(config.model.heads, config.model.kv_heads)


def _get(config: TrainConfig, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), config)


def _require(condition: bool, key: str, config: TrainConfig, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{key}={_get(config, key)!r} is not possible; it must be {allowed}.")


def as_dict(config: TrainConfig) -> dict[str, Any]:
    """The configuration as plain nested dictionaries, for JSON."""
    return dataclasses.asdict(config)


def help_text() -> str:
    """One line per option: key, default, meaning; then the groups and Hydra's own switches."""
    lines = [
        "usage: ringflash train [key=value ...]",
        "",
        "Trains a byte-level GPT on real text, every sequence sharded over all ranks.",
        "Starts its ranks itself unless torchrun, mpirun or srun did.",
        "",
        "options (with the defaults of machine=cpu model=tiny):",
    ]
    for key, value, meaning in _options(compose(["machine=cpu"])):
        lines.append(f"  {key + '=' + _shown(value):<36} {meaning}")
    groups = {folder.name: sorted(f.stem for f in folder.glob("*.yaml")) for folder in sorted(CONF.iterdir()) if folder.is_dir()}
    lines += ["", "groups (sets of options; machine=gpu is chosen by itself where CUDA is available):"]
    lines += [f"  {name + '=' + '|'.join(choices):<36} launch/conf/{name}/" for name, choices in groups.items()]
    lines += [
        "",
        "Hydra's switches work too: --cfg job prints the composed configuration, -m key=a,b runs one job after another,",
        "--hydra-help lists them all.",
        "",
        "examples:",
        "  ringflash train steps=100 data.path=~/books 'data.pattern=*.txt'",
        "  ringflash train ranks=8 seqlen=16384 parallel.layout=striped data.documents=true",
        "  torchrun --nproc-per-node 4 -m ringflash.launch.train machine=gpu parallel.ulysses=2",
    ]
    return "\n".join(lines)


def _options(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            yield from _options(value, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, value, item.metadata["help"]


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
