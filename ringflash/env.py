"""Every environment variable that ringflash reads, in one table, and what this machine offers.

No other module reads ``os.environ`` for a setting of ours. The launchers' own variables (``RANK``, ``LOCAL_RANK``, ...) belong to
torchrun, MPI and Slurm and are not listed here.
"""

from __future__ import annotations

import logging
import math
import os
import platform
import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

LOG_TOPICS = ("plan", "transport", "kernel")


@dataclass(frozen=True)
class Variable:
    """One environment variable: its name, its value when unset (as text) and what it does."""

    name: str
    default: str
    meaning: str


LOG = Variable("RINGFLASH_LOG", "", f"topics that log to stderr, comma-separated: {', '.join(LOG_TOPICS)}, or all")
LIBRARY = Variable("RINGFLASH_LIBRARY", "", "path of libringflash_cuda.so, instead of the one in the package")
TIMEOUT_S = Variable("RINGFLASH_TIMEOUT_S", "300", "seconds after which a rank that does not answer is reported as lost")
CUDA = Variable("RINGFLASH_CUDA", "AUTO", "when building: AUTO builds the CUDA library if nvcc is there, ON insists, OFF never")
CUDA_ARCHS = Variable("RINGFLASH_CUDA_ARCHS", "80;90a-real", "when building: CUDA architectures, as CMake spells them")
TABLES = Variable("RINGFLASH_TABLES", "~/.cache/ringflash/tables.json", "what `ringflash bench` measured, for `ringflash plan`")
LAUNCHER_PID = Variable("RINGFLASH_LAUNCHER_PID", "", "set by `ringflash train` for the ranks it starts; not to be set by hand")
HOST = Variable("RINGFLASH_HOST", "", "name of this host, instead of NCCL_HOSTID's or its own: ranks of one host share memory")
RANKS_PER_GPU = Variable("RINGFLASH_RANKS_PER_GPU", "1", "tests of several GPUs: how many ranks may share one, for want of GPUs")

VARIABLES = (LOG, LIBRARY, TIMEOUT_S, TABLES, HOST, CUDA, CUDA_ARCHS, LAUNCHER_PID, RANKS_PER_GPU)


def value(variable: Variable) -> str:
    """The variable's text, or its default when it is unset or empty."""
    return os.environ.get(variable.name) or variable.default


def log_topics() -> frozenset[str]:
    """The topics of ``RINGFLASH_LOG``. ValueError if one is unknown."""
    topics = {word.strip() for word in value(LOG).split(",")} - {""}
    if unknown := sorted(topics - {*LOG_TOPICS, "all"}):
        raise ValueError(f"{LOG.name} names {', '.join(unknown)}; allowed: {', '.join(LOG_TOPICS)}, all (comma-separated)")
    return frozenset(LOG_TOPICS if "all" in topics else topics)


def logger(topic: str) -> logging.Logger:
    """The logger ``ringflash.<topic>``: to stderr, from DEBUG up, if ``RINGFLASH_LOG`` names the topic, else as configured."""
    assert topic in LOG_TOPICS, topic
    log = logging.getLogger(f"ringflash.{topic}")
    if topic in log_topics() and not log.handlers:
        handler = logging.StreamHandler()
        rank = os.environ.get("RANK", "")
        handler.setFormatter(logging.Formatter(f"[%(name)s{' rank ' + rank if rank else ''}] %(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.DEBUG)
        log.propagate = False
    return log


def library_path() -> Path | None:
    """The library that ``RINGFLASH_LIBRARY`` names, or None when unset. ValueError if there is no such file."""
    text = value(LIBRARY)
    if not text:
        return None
    path = Path(text)
    if not path.is_file():
        raise ValueError(f"{LIBRARY.name}={text} is not a file; give the path of libringflash_cuda.so, or unset it")
    return path


def timeout_s() -> float:
    """Seconds of ``RINGFLASH_TIMEOUT_S``. ValueError unless it is a positive finite number."""
    text = value(TIMEOUT_S)
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"{TIMEOUT_S.name}={text}; give a positive number of seconds, for example {TIMEOUT_S.default}")
    return seconds


def ranks_per_gpu() -> int:
    """Ranks of ``RINGFLASH_RANKS_PER_GPU``. ValueError unless it is a positive number."""
    text = value(RANKS_PER_GPU)
    if not (text.isascii() and text.isdigit() and int(text)):
        raise ValueError(f"{RANKS_PER_GPU.name}={text}; give the ranks that tests may start on each GPU, for example 4")
    return int(text)


def host() -> str:
    """What this rank's host is called: ranks with one name may share memory. NCCL's own override counts, as it does for NCCL."""
    boot = Path("/proc/sys/kernel/random/boot_id")  # the same in all containers of a machine, where host names differ
    return value(HOST) or os.environ.get("NCCL_HOSTID") or (boot.read_text().strip() if boot.exists() else socket.gethostname())


def tables_path() -> Path:
    """The file of ``RINGFLASH_TABLES``; it need not exist."""
    return Path(value(TABLES)).expanduser()


def _nvcc() -> str:
    path = shutil.which("nvcc")
    if path is None:
        return "not on PATH"
    try:
        text = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"{path} does not run: {error}"
    release = next((line.split("release", 1)[1].strip() for line in text.splitlines() if "release" in line), "unknown release")
    return f"{release} ({path})"


def _library() -> str:
    from ringflash import ops

    try:
        library = ops.library()
    except (OSError, RuntimeError, ValueError) as error:
        return f"cannot be used: {error}"
    if library is None:
        return "none (built without nvcc): torch's kernels only"
    hopper = "with" if library.rf_has_hopper() else "without"
    return f"{library._name}, ABI {library.rf_abi_version()}, {hopper} Hopper kernels"


def _kernels() -> list[tuple[str, str]]:
    """A row per backend: available for the most usual problem on this machine's device, or why not."""
    import torch

    from ringflash.kernels import NAMES, Problem, explain_choice

    gpu = torch.cuda.is_available()
    capability = torch.cuda.get_device_capability() if gpu else None
    problem = Problem(
        device="cuda" if gpu else "cpu",
        capability=capability,
        dtype=torch.bfloat16,
        head_dim=128,
        head_dim_v=128,
        heads=32,
        kv_heads=32,
    )
    try:
        found = explain_choice(problem)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        return [(f"kernel {name}", f"cannot be asked: {error}") for name in NAMES]
    chosen = next((name for name, reason in found if reason is None), None)
    rows = []
    for name, reason in found:
        able = "available; auto takes it for bfloat16, head_dim 128" if name == chosen else "available"
        rows.append((f"kernel {name}", able if reason is None else f"no: {' '.join(reason.split())}"))
    return rows


def describe() -> list[tuple[str, str]]:
    """(name, value) rows for people: versions, library, devices, kernels, environment. Never raises for what is missing."""
    import torch
    import torch.distributed as dist

    rows = [
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", torch.__version__),
        ("torch CUDA", torch.version.cuda or "none (CPU build)"),
        ("library", _library()),
        ("nvcc", _nvcc()),
    ]
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus == 0:
        rows.append(("GPUs", "none"))
    for index in range(gpus):
        p = torch.cuda.get_device_properties(index)
        memory = f"{p.total_memory / 2**30:.0f} GiB"
        rows.append((f"GPU {index}", f"{p.name}, capability {p.major}.{p.minor}, {p.multi_processor_count} SMs, {memory}"))
    if dist.is_available() and dist.is_nccl_available():
        rows.append(("NCCL", ".".join(str(part) for part in torch.cuda.nccl.version())))
    else:
        rows.append(("NCCL", "none"))
    rows.append(("gloo", "yes" if dist.is_available() and dist.is_gloo_available() else "none"))
    rows += _kernels()
    for variable in VARIABLES:
        given = os.environ.get(variable.name)
        rows.append((variable.name, given if given else f"(unset: {variable.default or 'nothing'})"))
    return rows
