"""The table of environment variables, and what `describe` says of this machine."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from ringflash import env, kernels
from ringflash.kernels import NAMES

ROOT = Path(__file__).resolve().parent.parent


def test_the_table_is_complete_and_only_env_reads_the_variables() -> None:
    names = {variable.name for variable in env.VARIABLES}
    assert len(names) == len(env.VARIABLES)
    read = re.compile(r"(environ|getenv)\W{1,6}(get\W{1,3})?RINGFLASH_")
    for folder in ("ringflash", "parallel", "launch", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text()
            assert set(re.findall(r"RINGFLASH_[A-Z_]+[A-Z]", text)) <= names, f"{path} names a variable that env.py does not list"
            assert path.name == "env.py" or not read.search(text), f"{path} reads a variable past env.py"


@pytest.mark.parametrize(
    ("text", "topics"),
    [("", set()), ("plan", {"plan"}), (" plan, kernel,", {"plan", "kernel"}), ("all", set(env.LOG_TOPICS))],
)
def test_log_topics(monkeypatch: pytest.MonkeyPatch, text: str, topics: set[str]) -> None:
    monkeypatch.setenv(env.LOG.name, text)
    assert env.log_topics() == topics


def test_an_unknown_log_topic_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(env.LOG.name, "plan,plam")
    with pytest.raises(ValueError, match="RINGFLASH_LOG names plam; allowed: plan, transport, kernel, all"):
        env.log_topics()


def test_a_topic_prints_only_when_asked_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fresh = {name: log for name, log in logging.root.manager.loggerDict.items() if name != "ringflash.plan"}
    monkeypatch.setattr(logging.root.manager, "loggerDict", fresh)
    monkeypatch.setenv(env.LOG.name, "kernel")
    env.logger("plan").debug("quiet")
    monkeypatch.setenv(env.LOG.name, "plan")
    monkeypatch.setenv("RANK", "3")
    env.logger("plan").debug("loud")
    env.logger("plan").debug("once")
    assert capsys.readouterr().err == "[ringflash.plan rank 3] loud\n[ringflash.plan rank 3] once\n"


def test_host(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (env.HOST.name, "NCCL_HOSTID"):
        monkeypatch.delenv(name, raising=False)
    own = env.host()
    assert own
    monkeypatch.setenv("NCCL_HOSTID", "a")
    assert env.host() == "a"
    monkeypatch.setenv(env.HOST.name, "b")
    assert env.host() == "b"


def test_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(env.TIMEOUT_S.name, raising=False)
    assert env.timeout_s() == float(env.TIMEOUT_S.default)
    monkeypatch.setenv(env.TIMEOUT_S.name, "2.5")
    assert env.timeout_s() == 2.5
    for wrong in ("0", "-1", "inf", "nan", "2 min"):
        monkeypatch.setenv(env.TIMEOUT_S.name, wrong)
        with pytest.raises(ValueError, match=f"RINGFLASH_TIMEOUT_S={wrong}; give a positive number of seconds"):
            env.timeout_s()


def test_ranks_per_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(env.RANKS_PER_GPU.name, "4")
    assert env.ranks_per_gpu() == 4
    for wrong in ("0", "-1", "two", "1.5"):
        monkeypatch.setenv(env.RANKS_PER_GPU.name, wrong)
        with pytest.raises(ValueError, match=f"RINGFLASH_RANKS_PER_GPU={wrong}; give the ranks that tests may start on each GPU"):
            env.ranks_per_gpu()


def test_a_library_that_is_not_there_is_an_error_not_a_fallback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(env.LIBRARY.name, str(tmp_path / "none.so"))
    with pytest.raises(ValueError, match=r"RINGFLASH_LIBRARY=.*none\.so is not a file"):
        env.library_path()
    (tmp_path / "none.so").touch()
    assert env.library_path() == tmp_path / "none.so"


def test_describe_names_everything_and_every_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(env.TIMEOUT_S.name, "7")
    monkeypatch.delenv(env.LOG.name, raising=False)
    rows = dict(env.describe())
    for name in ("python", "torch", "torch CUDA", "library", "nvcc", "NCCL", "gloo", *(v.name for v in env.VARIABLES)):
        assert rows[name], name
    assert "GPUs" in rows or "GPU 0" in rows
    assert {f"kernel {name}" for name in NAMES} == {name for name in rows if name.startswith("kernel ")}
    assert all(rows[f"kernel {name}"].startswith(("available", "no: ")) for name in NAMES)
    assert sum("auto takes it" in value for value in rows.values()) == 1
    assert rows["kernel reference"].startswith("available")
    assert rows[env.TIMEOUT_S.name] == "7"
    assert rows[env.LOG.name] == "(unset: nothing)"


def test_describe_survives_kernels_that_cannot_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(problem: kernels.Problem) -> list[tuple[str, str | None]]:
        raise OSError("no such symbol")

    monkeypatch.setattr(kernels, "explain_choice", broken)
    rows = dict(env.describe())
    assert [rows[f"kernel {name}"] for name in NAMES] == ["cannot be asked: no such symbol"] * len(NAMES)
