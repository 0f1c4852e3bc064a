"""`ringflash train`: options, data, steps, checkpoints on other numbers of ranks, and how real jobs end.

Jobs that end badly are real ones: processes started by the command, real signals, and a look at what is left afterwards.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ringflash.launch import checkpoint, config, elastic, train
from ringflash.launch.data import IGNORE, SEPARATOR, Corpus, load_corpus
from ringflash.launch.progress import clock
from ringflash.launch.report import Verdict
from ringflash.launch.trainer import Trainer, learning_rate
from ringflash.launch.world import StopRequest, World
from ringflash.testing.rank_pool import RankPool

Ranks = Callable[[int], RankPool]
History = list[dict[str, float]]
Finished = tuple[Path, list[str], History]

TINY = [
    "machine=cpu",
    "seqlen=128",
    "model.dim=32",
    "model.heads=4",
    "model.kv_heads=2",
    "model.head_dim=8",
    "model.ffn_dim=64",
    "model.windows=[40,0]",
    "optimizer.lr=1e-2",
]


WORDS = """To be or not to be that is the question Whether tis nobler in the mind to suffer The slings and arrows of outrageous
fortune Or to take arms against a sea of troubles And by opposing end them"""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of text: 40 files of 300 words, one of them in a subfolder, and a binary one."""
    folder = tmp_path_factory.mktemp("text")
    words = WORDS.split()
    generator = np.random.default_rng(0)
    (folder / "sub").mkdir()
    for number in range(40):
        chosen = generator.choice(len(words), 300)
        name = f"sub/{number}.txt" if number == 7 else f"{number}.txt"
        (folder / name).write_text(" ".join(words[i] for i in chosen) + "\n")
    (folder / "picture.bin").write_bytes(b"\x89PNG\0\0\0")
    return folder


def corpus_of(text: Path, seqlen: int = 128, seed: int = 0, validation: float = 0.1) -> Corpus:
    return load_corpus(str(text), pattern=None, validation=validation, seqlen=seqlen, seed=seed)


# --- options -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("steps=many", "could not be converted to Integer"),
        ("stepz=3", "'stepz'"),
        ("model.colour=3", "'colour'"),
        ("model=huge", "model/huge"),
        ("seqlen=0", "seqlen=0 is not possible; it must be at least 1"),
        ("model.kv_heads=3", "a divisor of model.heads=4"),
        ("model.head_dim=7", "even"),
        ("model.windows=[-1]", "windows"),
        ("parallel.layout=random", "parallel.layout='random' is not possible: unknown layout 'random'; allowed are contiguous"),
        ("parallel.layout=zigzag:0", "zigzag:K (K times forth and back, at least 1)"),
        ("parallel.dp=2", "batch=1 is not possible; it must be divisible by parallel.dp=2"),
        ("data.validation=1.5", "between 0 and 1"),
        ("machine.dtype=float8", "float32 or bfloat16"),
        ("machine.device=tpu", "cpu or cuda"),
        ("parallel.timeout_s=0", "more than 0"),
        ("parallel.schedule=double_ring", "parallel.inner=0 is not possible; it must be the ranks of one fast-linked group"),
        ("parallel.schedule=double_ring:8", "parallel.inner=0 is not possible; it must be the ranks of one fast-linked group"),
        ("parallel.schedule=rings", "parallel.schedule='rings' is not possible: unknown schedule 'rings'; allowed are auto"),
        ("parallel.inner=2", "it must be 0 for parallel.schedule=auto"),
        ("parallel.transport=carrier", "auto or p2p"),
        ("parallel.transport=symmetric", "another one with machine=cpu"),
        ("parallel.transport=allgather", "unless parallel.schedule=allgather"),
        ("a b", "a b"),
    ],
)
def test_a_wrong_option_is_one_clear_line(option: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        config.compose(["machine=cpu", option])
    assert "\n" not in str(caught.value)


def test_ranks_that_cannot_be_arranged() -> None:
    options = config.compose([*TINY, "parallel.dp=2", "batch=2", "parallel.ulysses=2"])
    config.check_world(options, 8)
    with pytest.raises(ValueError, match=r"6 ranks cannot be arranged.*multiple of 4"):
        config.check_world(options, 6)
    for schedule in ("double_ring", "double_ring:8"):
        rings = config.compose([*TINY, f"parallel.schedule={schedule}", "parallel.inner=2"])
        config.check_world(rings, 4)
    with pytest.raises(ValueError, match="inner=2 does not divide the 3 ranks"):
        config.check_world(rings, 3)


def test_groups_and_command_line_win_over_defaults() -> None:
    options = config.compose(["machine=cpu", "model=small_gpu", "model.layers=3"])
    assert (options.model.layers, options.model.dim, options.seqlen) == (3, 1024, 8192)
    assert options.run_dir.startswith("outputs/train/20")


def test_where_cuda_is_available_the_gpu_options_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    options = config.compose([])
    assert (options.machine.device, options.machine.dtype) == ("cuda", "bfloat16")
    assert (options.model.dim, options.seqlen, options.ranks) == (1024, 131072, 0)
    assert config.compose(["model=tiny"]).model == config.ModelConfig()
    assert config.compose(["machine=cpu"]).machine.device == "cpu"


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "hydra", None)
    assert train.main(["machine=cpu"]) == 2
    assert "hydra is not installed; try: pip install '.[train]' in the source folder" in capsys.readouterr().err


def test_groups_hold_the_documented_defaults() -> None:
    """conf/model/tiny.yaml repeats the dataclass's defaults; they must not drift apart."""
    assert config.compose(["machine=cpu"]).model == config.ModelConfig()


def test_help_shows_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--help"]) == 0
    shown = capsys.readouterr().out

    def names(of: Any, prefix: str = "") -> Iterator[str]:
        for field in dataclasses.fields(of):
            value = getattr(of, field.name)
            yield from names(value, f"{prefix}{field.name}.") if dataclasses.is_dataclass(value) else [prefix + field.name]

    options = list(names(config.TrainConfig()))
    assert len(options) > 40
    assert [o for o in options if f"  {o}=" not in shown] == []


def test_learning_rate_warms_up_and_comes_down() -> None:
    options = config.compose([*TINY, "steps=100", "optimizer.lr=1.0", "optimizer.warmup=4", "optimizer.final_lr=0.1"])
    rates = [learning_rate(options, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == pytest.approx(1.0, rel=0.01)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, rel=0.01)


# --- data ----------------------------------------------------------------------------------------------------------------


def test_an_epoch_holds_every_byte_once(text: Path) -> None:
    split = corpus_of(text, seqlen=97).train
    stream = torch.cat([split.sample(n).tokens for n in range(split.sequences_per_epoch)]).numpy()
    assert len(split.text) - 97 < len(stream) <= len(split.text)
    leftover = np.bincount(split.text, minlength=256) - np.bincount(stream, minlength=256)
    assert leftover.min() >= 0
    assert leftover.sum() == len(split.text) - len(stream)


def test_order_depends_on_the_seed_and_the_epoch_alone(text: Path) -> None:
    a, b, other = (corpus_of(text, seed=s).train for s in (3, 3, 4))
    far = a.sequences_per_epoch + 1
    assert torch.equal(a.sample(far).tokens, b.sample(far).tokens)  # b never saw a sequence before this one
    assert not torch.equal(a.sample(1).tokens, a.sample(far).tokens)
    assert not torch.equal(a.sample(1).tokens, other.sample(1).tokens)


def test_packed_documents_start_with_the_separator_and_are_not_predicted_across(text: Path) -> None:
    split = corpus_of(text, seqlen=6000).train
    sample = split.sample(0, documents=True)
    assert sum(sample.lengths) == 6000
    assert len(sample.lengths) > 2
    starts = np.cumsum(sample.lengths)[:-1]
    assert (sample.tokens[starts] == SEPARATOR).all()
    assert torch.equal(torch.nonzero(sample.labels == IGNORE).flatten(), torch.from_numpy(starts))
    plain = split.sample(0)
    assert torch.equal(plain.labels, plain.tokens)
    assert torch.equal(plain.tokens, sample.tokens)


def test_validation_split_is_by_name(text: Path) -> None:
    corpus = corpus_of(text, validation=0.25)
    held = corpus.validation.text.tobytes()
    assert corpus.files == 40
    assert corpus.skipped == 1
    assert len(held) + len(corpus.train.text) == sum((p.stat().st_size + 1) for p in text.rglob("*.txt"))
    contents = {p: bytes([SEPARATOR]) + p.read_bytes() for p in text.rglob("*.txt")}
    assert sum(len(c) for c in contents.values() if c in held) == len(held)


def test_one_file_is_split_by_its_tail(tmp_path: Path) -> None:
    file = tmp_path / "one.txt"
    file.write_text("abcdefgh" * 1000)
    corpus = corpus_of(file)
    assert len(corpus.validation.text) == 800
    assert len(corpus.train.text) == 7201
    assert corpus.train.text[0] == SEPARATOR


def test_too_little_text_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(ValueError, match=r"6 bytes|has 0 bytes, fewer than one sequence of seqlen=128"):
        corpus_of(tmp_path)
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        corpus_of(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"data\.pattern"):
        load_corpus(str(tmp_path), pattern="*.md", validation=0.1, seqlen=1, seed=0)


def test_unigram_loss_is_the_entropy(tmp_path: Path) -> None:
    file = tmp_path / "two.txt"
    file.write_bytes(b"ab" * 50_000)
    corpus = corpus_of(file)
    assert corpus.unigram_loss(corpus.train) == pytest.approx(np.log(2), abs=0.01)


# --- steps and checkpoints in real ranks ---------------------------------------------------------------------------------


class Quiet:
    """A progress display that shows nothing."""

    def step(self, number: int, loss: float, seconds: float) -> None:
        pass

    def say(self, text: str) -> None:
        pass


class NeverStop(StopRequest):
    """Nobody asks to stop; installs no signal handler into the pool's ranks."""

    def __init__(self) -> None:
        self.signal = None
        self._parent = os.getppid()


def train_on_rank(rank: int, arguments: list[str]) -> History:
    """Run all steps with the ranks of a pool; the history."""
    from ringflash.launch.world import Activity

    size, store = dist.get_world_size(), dist.distributed_c10d._get_default_store()
    world = World(rank, size, rank, size, torch.device("cpu"), store)
    trainer = Trainer(config.compose(arguments), world)
    assert not trainer.train(NeverStop(), Quiet(), Activity())  # type: ignore[arg-type]
    return trainer.state.history


def losses(history: History) -> dict[float, float]:
    return {row["step"]: row["loss"] for row in history if "loss" in row}


@pytest.fixture(scope="module")
def finished(ranks: Ranks, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run of 8 steps on 4 ranks with checkpoints after 2, 4, 6, 8 of which three are kept: folder, options, history."""
    run = tmp_path_factory.mktemp("out") / "first"
    options = [*TINY, f"data.path={text}", "steps=8", "checkpoint.every=2", "checkpoint.keep=3", "evaluation.every=4"]
    histories = ranks(4).run(train_on_rank, [*options, f"out={run.parent}", f"run_dir={run}", "resume=never"])
    assert all(losses(h) == losses(histories[0]) for h in histories)
    return run, options, histories[0]


def test_checkpoints_are_complete_and_the_oldest_go(finished: Finished) -> None:
    run, _, history = finished
    names = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert names == ["latest", "step-00000004", "step-00000006", "step-00000008"]
    newest = checkpoint.latest(run)
    assert newest is not None
    state = checkpoint.read_state(newest)
    assert (state.step, state.sequences, state.finished) == (8, 8, True)
    assert state.history == history
    assert [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] == history


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_resumed_on_other_ranks_the_curve_is_the_same(ranks: Ranks, finished: Finished, tmp_path: Path, world: int) -> None:
    run, options, history = finished
    start = run / "checkpoints" / "step-00000004"
    resumed = ranks(world).run(train_on_rank, [*options, f"run_dir={tmp_path / 'run'}", f"resume={start}"])[0]
    assert [row["step"] for row in resumed] == [row["step"] for row in history]
    for key in ("loss", "lr", "grad_norm", "validation"):
        got, want = ([row[key] for row in h if key in row] for h in (resumed, history))
        assert got == pytest.approx(want, rel=2e-5), key


def test_a_double_ring_changes_only_who_computes(ranks: Ranks, finished: Finished, tmp_path: Path) -> None:
    _, options, history = finished
    ring = ["parallel.schedule=double_ring", "parallel.inner=2", "parallel.transport=alltoall", "resume=never"]
    shared = ranks(4).run(train_on_rank, [*options, f"run_dir={tmp_path / 'run'}", *ring])[0]
    assert list(losses(shared).values()) == pytest.approx(list(losses(history).values()), rel=2e-5)


def test_replicas_and_packed_documents_change_only_who_computes(ranks: Ranks, text: Path, tmp_path: Path) -> None:
    options = [*TINY, f"data.path={text}", "data.documents=true", "seqlen=1500", "batch=2", "steps=3", "resume=never"]
    alone = ranks(1).run(train_on_rank, [*options, f"run_dir={tmp_path / 'a'}"])[0]
    shared = ranks(4).run(train_on_rank, [*options, f"run_dir={tmp_path / 'b'}", "parallel.dp=2", "parallel.layout=balanced"])[0]
    assert list(losses(shared).values()) == pytest.approx(list(losses(alone).values()), rel=2e-5)


def test_resume_chooses(finished: Finished, tmp_path: Path) -> None:
    run, options, _ = finished
    now = config.as_dict(config.compose(options))
    assert checkpoint.resolve("never", run.parent, now)[0] is None
    assert checkpoint.resolve("auto", tmp_path, now) == (None, f"fresh start (no run in {tmp_path})")
    assert "finished" in checkpoint.resolve("auto", run.parent, now)[1]
    assert checkpoint.resolve(str(run), run.parent, now)[0] == run / "checkpoints" / "step-00000008"

    interrupted = tmp_path / "later" / "checkpoints"
    interrupted.mkdir(parents=True)
    (interrupted / "step-00000004").symlink_to(run / "checkpoints" / "step-00000004")
    (interrupted / "latest").write_text("step-00000004\n")
    assert checkpoint.resolve("auto", tmp_path, now)[0] == interrupted / "step-00000004"
    longer = {**now, "steps": 9}
    assert "steps=8, not 9" in checkpoint.resolve("auto", tmp_path, longer)[1]
    assert checkpoint.resolve(str(interrupted.parent), tmp_path, longer)[0] == interrupted / "step-00000004"
    other = {**now, "model": {**now["model"], "dim": 64}}
    with pytest.raises(ValueError, match=r"model\.dim=32, not 64"):
        checkpoint.resolve(str(run), run.parent, other)
    with pytest.raises(ValueError, match="neither a checkpoint nor a run"):
        checkpoint.resolve(str(tmp_path / "nothing"), run.parent, now)


def test_a_half_written_checkpoint_is_never_taken(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    (folder / "step-00000002.partial").mkdir(parents=True)
    assert checkpoint.latest(tmp_path / "run") is None
    (folder / "latest").write_text("step-00000002\n")
    assert checkpoint.latest(tmp_path / "run") is None
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        checkpoint.read_state(folder / "step-00000002.partial")


def test_verdict_fails_on_a_difference_and_on_nan() -> None:
    good = Verdict(4, (2.0, 2.0), (1.0, 1.0), 1e-6, ("w", 1e-6), (1e-5, 1e-4))
    assert good.passed
    assert "PASS" in str(good)
    for change in ({"loss": (2.001, 2.0)}, {"norm": (1.1, 1.0)}, {"difference": 1e-3}, {"difference": float("nan")}):
        bad = dataclasses.replace(good, **change)
        assert not bad.passed
        assert "FAIL" in str(bad)


def test_clock() -> None:
    assert [clock(s) for s in (0, 59.6, 61, 3600)] == ["0:00", "1:00", "1:01", "1:00:00"]


# --- whole jobs ----------------------------------------------------------------------------------------------------------


TRAIN = ("-m", "ringflash.launch.train")


class Job:
    """A real `ringflash train` in its own process group, with the default signals that an interactive shell gives."""

    def __init__(self, *arguments: str, command: tuple[str, ...] = TRAIN, **environment: str):
        names = (
            "RANK",
            "WORLD_SIZE",
            "LOCAL_RANK",
            "LOCAL_WORLD_SIZE",
            "MASTER_ADDR",
            "MASTER_PORT",
        )  # this test may run in a rank
        inherited = {k: v for k, v in os.environ.items() if k not in names}
        self.process = subprocess.Popen(
            [sys.executable, "-u", *command, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**inherited, **environment},
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
        )
        self.lines: list[str] = []
        self.seen: set[int] = set()

    def wait_for(self, pattern: str) -> None:
        """Read output until a line matches."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if re.search(pattern, line):
                self.seen |= set(self.ranks().values())
                return
        raise AssertionError(f"the job ended with {self.process.wait()} before {pattern!r}:\n" + "\n".join(self.lines))

    def ranks(self) -> dict[int, int]:
        """Process id of every rank that runs now."""
        found = {}
        for folder in Path("/proc").iterdir():
            try:
                if folder.name.isdigit() and int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1]) == self.process.pid:
                    variables = dict(v.split("=", 1) for v in (folder / "environ").read_text().split("\0") if "=" in v)
                    found[int(variables["RANK"])] = int(folder.name)
            except (OSError, KeyError, IndexError):
                continue
        return found

    def end(self, timeout: float = 120) -> int:
        """Wait for the exit code and for the ranks to be gone."""
        rest, _ = self.process.communicate(timeout=timeout)
        self.lines += rest.splitlines()
        until = time.monotonic() + 10
        while any(running(pid) for pid in self.seen) and time.monotonic() < until:
            time.sleep(0.1)
        assert [pid for pid in self.seen if running(pid)] == [], "ranks outlived the job"
        return self.process.returncode

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in (self.process.pid, *self.seen, *self.ranks().values()):
            if running(pid):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the ranks' processes in /proc")


def endless(text: Path, out: Path) -> list[str]:
    where = [f"data.path={text}", f"out={out}"]
    return [*TINY, *where, "steps=1000000", "log_every_s=0.1", "checkpoint.every=3", "parallel.timeout_s=60"]


def test_whole_job(text: Path, tmp_path: Path) -> None:
    """Four ranks started by the command: it learns, agrees with one rank, draws, and rank 0 alone leaves files."""
    with Job(*TINY, f"data.path={text}", f"out={tmp_path}", "seqlen=512", "steps=40", "evaluation.every=20") as job:
        assert job.end(timeout=300) == 0, job.output
    assert "Traceback" not in job.output
    assert re.search(r"check: 4 ranks against 1[\s\S]*PASS", job.output), job.output
    result = re.search(r"validation loss ([\d.]+) nats per byte against ([\d.]+) of the unigram model", job.output)
    assert result is not None
    assert float(result[1]) < float(result[2]) - 0.2
    assert re.search(r"step +\d+/40 +loss [\d.]+ +[\d,]+ tokens/s +ETA \d+:\d\d", job.output)
    (run,) = tmp_path.iterdir()
    assert sorted(p.name for p in run.iterdir()) == [".hydra", "checkpoints", "loss.png", "metrics.jsonl", "plan.png"]
    for picture in ("loss.png", "plan.png"):
        assert (run / picture).read_bytes().startswith(b"\x89PNG")


@needs_proc
def test_ctrl_c_saves_and_the_next_start_continues(text: Path, tmp_path: Path) -> None:
    with Job(*endless(text, tmp_path)) as job:
        job.wait_for(r"^step ")
        assert sorted(job.ranks()) == [0, 1, 2, 3]
        job.process.send_signal(signal.SIGINT)
        assert job.end() == 130, job.output
    assert "Traceback" not in job.output
    (line,) = [line for line in job.lines if "interrupted" in line]
    step = int(re.search(r"all 4 ranks stopped after step (\d+)", line)[1])  # type: ignore[index]
    assert checkpoint.read_state(checkpoint.latest(next(tmp_path.iterdir())) or tmp_path).step == step
    with Job(*endless(text, tmp_path), "ranks=2") as job:
        job.wait_for(rf"continuing .*step-{step:08d}")
        job.wait_for(rf"^step +{step + 1}/")
        job.process.send_signal(signal.SIGTERM)
        assert job.end() == 143, job.output


@needs_proc
def test_ctrl_c_while_starting_is_quiet(text: Path, tmp_path: Path) -> None:
    with Job(*endless(text, tmp_path), "ranks=2") as job:
        until = time.monotonic() + 60
        while len(job.ranks()) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        job.seen |= set(job.ranks().values())
        job.process.send_signal(signal.SIGINT)
        assert job.end() == 130, job.output
    assert "Traceback" not in job.output
    assert re.fullmatch(r"ringflash train: interrupted; no new checkpoint was written", job.output.strip()), job.output
    assert not any(tmp_path.iterdir())


def test_a_run_that_never_began_leaves_no_folder(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    with Job(*TINY, f"data.path={data}", f"out={out}", "ranks=2") as job:
        assert job.end() == 2, job.output
    assert "data.pattern" in job.output
    assert not any(out.iterdir())


def alone_of_two(text: Path, out: Path, timeout_s: int) -> tuple[list[str], dict[str, str]]:
    """Arguments and environment of rank 0 of two ranks; nobody starts the other one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    arguments = [*endless(text, out), f"run_dir={out / 'run'}", f"parallel.timeout_s={timeout_s}"]
    return arguments, {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_rank_that_waits_for_the_others(text: Path, tmp_path: Path, number: signal.Signals) -> None:
    """In the middle of joining, which no Python signal handler interrupts."""
    arguments, environment = alone_of_two(text, tmp_path, timeout_s=300)
    with Job(*arguments, command=TRAIN, **environment) as job:
        until = time.monotonic() + 60
        while time.monotonic() < until:  # the store listens: rank 0 is joining
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", int(environment["MASTER_PORT"]))) == 0:
                    break
            time.sleep(0.1)
        time.sleep(0.5)
        job.process.send_signal(number)
        assert job.end(timeout=10) == -number, job.output
    assert job.output == ""


def test_a_rank_that_misses_the_others_says_so_in_one_line(text: Path, tmp_path: Path) -> None:
    arguments, environment = alone_of_two(text, tmp_path, timeout_s=2)
    with Job(*arguments, command=TRAIN, **environment) as job:
        assert job.end(timeout=60) == elastic.LOST_PEER, job.output
    said = [line for line in job.lines if line.startswith("ringflash train:")]
    assert len(said) == 1, job.output
    assert said[0].startswith("ringflash train: while starting: rank 0 could not join the other ranks (")
    assert "Traceback" not in job.output


@pytest.mark.parametrize(("codes", "code"), [((-15, -2), 130), ((-15, -15), 143), ((130, -15), 130)])
def test_ranks_ended_by_a_signal_while_starting(codes: tuple[int, int], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    failures = {rank: SimpleNamespace(exitcode=c, pid=1, timestamp=0) for rank, c in enumerate(codes)}
    assert elastic._explain(failures, {}) == code
    assert capsys.readouterr().err == "ringflash train: interrupted; no new checkpoint was written\n"


@needs_proc
def test_a_killed_rank_ends_the_job_and_is_named(text: Path, tmp_path: Path) -> None:
    with Job(*endless(text, tmp_path), "ranks=3") as job:
        job.wait_for(r"^step +([4-9]|\d\d)")
        os.kill(job.ranks()[2], signal.SIGKILL)
        assert job.end(timeout=60) == 1, job.output
    (line,) = [line for line in job.lines if line.startswith("ringflash train: rank")]
    assert re.search(r"rank 2 \(pid \d+\) was killed by SIGKILL in step \d+; the other ranks were ended; ", line)
    assert re.search(r"last checkpoint .*step-\d+, the same command continues from it", line)
    assert "Traceback" not in job.output


@needs_proc
@pytest.mark.slow  # torch's launcher gives the stalled rank half a minute to react to SIGTERM
def test_a_stalled_rank_ends_the_job_and_is_named(text: Path, tmp_path: Path) -> None:
    with Job(*endless(text, tmp_path), "parallel.timeout_s=10") as job:  # four ranks have to join within that, too
        job.wait_for(r"^step +([4-9]|\d\d)")
        os.kill(job.ranks()[1], signal.SIGSTOP)
        assert job.end() == 1, job.output
    assert re.search(r"in step \d+: no sign of life from rank 1; ", job.lines[-1]), job.output
    assert "Traceback" not in job.output


@needs_proc
def test_no_rank_outlives_a_killed_launcher(text: Path, tmp_path: Path) -> None:
    with Job(*endless(text, tmp_path), "ranks=2") as job:
        job.wait_for(r"^step ")
        job.process.kill()
        assert job.end() == -signal.SIGKILL
    assert checkpoint.latest(next(tmp_path.iterdir())) is not None


@pytest.mark.multigpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_whole_job_on_gpus(text: Path, tmp_path: Path) -> None:
    """One NCCL rank per GPU, bfloat16, heads that the kernels take."""
    shape = ["model=tiny", "model.dim=128", "model.heads=4", "model.kv_heads=2", "model.head_dim=64", "seqlen=4096"]
    with Job("machine=gpu", *shape, f"data.path={text}", f"out={tmp_path}", "steps=20", "optimizer.lr=4e-3") as job:
        assert job.end(timeout=300) == 0, job.output
    assert "Traceback" not in job.output
    assert re.search(rf"check: {torch.cuda.device_count()} ranks against 1[\s\S]*PASS", job.output), job.output


def test_failed_check_is_a_failed_job(text: Path, tmp_path: Path) -> None:
    """One rank, limits that nothing can meet."""
    code = (
        "import sys; from ringflash.launch import report, train; "
        "report._LIMITS = {'float32': (-1.0, -1.0)}; sys.exit(train.main(sys.argv[1:]))"
    )
    arguments = [*TINY, f"data.path={text}", f"out={tmp_path}", "steps=1", f"run_dir={tmp_path / 'run'}"]
    one = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    with Job(*arguments, command=("-c", code), **one) as job:
        assert job.end() == 1, job.output
    assert "FAIL" in job.output
    assert "Traceback" not in job.output


def test_under_torchrun_a_mistake_is_said_once(tmp_path: Path) -> None:
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "ringflash.launch.train")
    with Job(*TINY, f"data.path={tmp_path}", f"out={tmp_path / 'out'}", command=launch) as job:
        assert job.end() == 1  # torchrun's own code
    assert len([line for line in job.lines if line.startswith("ringflash train:")]) == 1
    assert "data.pattern" in job.output


def test_a_mistake_is_one_line_and_code_2(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    assert train.main(["machine=cpu", "steps=-1"]) == 2
    said = capfd.readouterr()
    assert said.err == "ringflash train: steps=-1 is not possible; it must be at least 1.\n"
    assert said.out == ""
