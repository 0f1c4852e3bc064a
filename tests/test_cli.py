"""The command: what it prints, what it writes, and how it says that an option is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ringflash import Mask, check, cli, env
from ringflash.launch import bench
from ringflash.options import lengths, read_mask, size
from ringflash.parallel import tables
from ringflash.testing import dense_results, relative_error, visibility

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _no_tables_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RINGFLASH_TABLES", str(tmp_path / "tables.json"))


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(arguments) == 0
    return capsys.readouterr().out


def test_without_a_command_it_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    first = capsys.readouterr().out
    assert said(capsys, "--help") == first
    assert all(f"    {command} " in first for command in ("env", "plan", "check", "bench", "train"))
    assert len(first.splitlines()) < 25


def test_env_is_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, "env").splitlines()
    names, values = zip(*env.describe(), strict=True)
    assert [line.split("  ")[0].strip() for line in lines] == list(names)
    column = max(map(len, names)) + 2
    assert [line[column:] for line in lines] == list(values)


# Masks as text


@pytest.mark.parametrize(
    ("text", "mask"),
    [
        ("full", Mask.full()),
        ("causal", Mask.causal()),
        ("causal:4k", Mask.causal(window=4096)),
        ("window:7,none", Mask.window(7, None)),
        ("window:none,0", Mask.window(None, 0)),
        ("documents:3,0,4x2", Mask.documents([3, 0, 4, 4])),
        ("documents:3,4,noncausal", Mask.documents([3, 4], causal=False)),
        ("prefix:100", Mask.prefix(100)),
        ("chunked:1k", Mask.chunked(1024)),
        ("dilated:4", Mask.dilated(4)),
        ("dilated:4,16", Mask.dilated(4, 16)),
    ],
)
def test_masks_are_read(text: str, mask: Mask) -> None:
    assert read_mask(text) == mask


def test_block_maps_are_read_from_files(tmp_path: Path) -> None:
    table = np.array([[True, False], [True, True]])
    np.save(tmp_path / "map.npy", table)
    (tmp_path / "map.txt").write_text("1 0\n11\n\n")
    for name in ("map.npy", "map.txt"):
        assert read_mask(f"blocks:{tmp_path / name},64") == Mask.blocks(table, 64)
    (tmp_path / "bad.txt").write_text("10\n1\n")
    with pytest.raises(ValueError, match=r"bad\.txt must hold a line of 0 and 1 for every row"):
        read_mask(f"blocks:{tmp_path / 'bad.txt'},64")


def test_sizes_and_lengths(tmp_path: Path) -> None:
    assert [size("n", text) for text in ("17", "4k", "1M", "1,024")] == [17, 4096, 1 << 20, 1024]
    (tmp_path / "lengths").write_text("5 6\n7x2\n")
    assert lengths(f"@{tmp_path / 'lengths'}") == [5, 6, 7, 7] == lengths("5,6,7x2")


def problem(*arguments: str) -> tuple[Mask, int]:
    return cli.read_problem(cli._parser().parse_args(["plan", *arguments]))


def test_options_make_one_problem(tmp_path: Path) -> None:
    assert problem("--seqlen", "128k") == (Mask.causal(), 131_072)
    assert problem("--seqlen", "9", "--mask", "causal", "--window", "4") == (Mask.causal(window=4), 9)
    assert problem("--documents", "5,4") == (Mask.documents([5, 4]), 9)
    assert problem("--documents", "5,4", "--window", "2") == (Mask.documents([5, 4], window=2), 9)
    assert problem("--documents", "5,4", "--mask", "full") == (Mask.documents([5, 4], causal=False), 9)
    assert problem("--documents", "5,4", "--mask", "prefix:2") == (Mask.prefix(2) & Mask.documents([5, 4], causal=False), 9)
    assert problem("--mask", "documents:5,4", "--mask", "dilated:2") == (Mask.documents([5, 4]) & Mask.dilated(2), 9)
    assert problem("--mask", "dilated:2", "--window", "3", "--seqlen", "9") == (Mask.dilated(2, 3), 9)
    (tmp_path / "lengths").write_text("5\n4\n")
    assert problem("--documents-file", str(tmp_path / "lengths")) == (Mask.documents([5, 4]), 9)


# plan

PLAN = ("plan", "--seqlen", "1048576", "--world", "64", "--schedule", "ring", "--kv-heads", "8")


def test_plan_explains_one_rank(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, *PLAN, "--mask", "causal", "--window", "4096", "--rank", "5")
    assert "causal(window=4096)" in text and "5 of 64" in text and "H200" in text and "balance" in text
    text = said(capsys, "plan", "--seqlen", "4k", "--world", "4")
    assert "staged(rows=98304)" in text and "(auto: stages of about 98,304 remote tokens, 1,024 a chunk)" in text


def test_plan_lists_all_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "plan", "--seqlen", "8k", "--world", "6", "--layout", "contiguous", "--rank", "all", "--tables", "cpu")
    assert "travels forward K, V; backward" in text
    rows = [line.split() for line in text.splitlines() if line.split()[:1] in [[str(r)] for r in range(6)]]
    assert [row[1] for row in rows] == ["1,365", "1,365", "1,366", "1,365", "1,365", "1,366"]
    assert "balance 1.8" in text and "CPU core" in text


def test_plan_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(said(capsys, *PLAN, "--json"))
    assert found["world"] == 64 and len(found["steps"]) == 64 and found["balance"] == 1.0
    assert sum(step["visible"] for step in found["steps"]) * found["heads"] == found["areas"][0]
    assert found["forward"]["total_s"] >= found["forward"]["compute_s"] > 0 < found["backward"]["memory_bytes"]
    assert len(json.loads(said(capsys, "plan", "--seqlen", "64", "--world", "3", "--rank", "all", "--json"))) == 3
    again = json.loads(said(capsys, *PLAN, "--json", "--deterministic"))
    more = again["backward"]["memory_bytes"] - found["backward"]["memory_bytes"]
    assert 0 < more < 257 << 20, "sums of a deterministic backward"
    assert again["forward"] == found["forward"]


def test_plan_draws(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    said(capsys, "plan", "--seqlen", "8k", "--world", "2", "--picture", str(tmp_path / "plan.png"))
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_plan_takes_the_tables_of_this_machine(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    mine = tables.Tables(tables.CPU, tables.GLOO, "measured for this test")
    tables.write(tmp_path / "tables.json", "cuda", mine)
    assert "measured for this test" in said(capsys, "plan", "--seqlen", "64")
    assert "defaults measured on H200" in said(capsys, "plan", "--seqlen", "64", "--tables", "h200")
    tables.write(tmp_path / "others.json", "cpu", mine)
    assert "measured for this test" in said(capsys, "plan", "--seqlen", "64", "--tables", str(tmp_path / "others.json"))


def test_copy_engines_are_faster(capsys: pytest.CaptureFixture[str]) -> None:
    plan = ("plan", "--seqlen", "32k", "--mask", "full", "--kv-heads", "32", "--schedule", "allgather", "--json")
    sent, pulled = (json.loads(said(capsys, *plan, "--transport", name))["forward"] for name in ("p2p", "symmetric"))
    assert 0 < pulled["exposed_s"] < sent["exposed_s"]


def test_plan_tells_by_which_schedule_auto_trains(capsys: pytest.CaptureFixture[str]) -> None:
    plan = ("plan", "--seqlen", "64k", "--world", "4", "--tables", "h200", "--transport")
    told = {
        (name, keys): " ".join(said(capsys, *plan, name, "--kv-heads", keys).split())
        for name, keys in (("symmetric", "32"), ("symmetric", "8"), ("p2p", "32"))
    }
    assert "ring(ulysses=4), 1 step (auto: in training; without gradients a ring, stages of about" in told["symmetric", "32"]
    assert all("staged(rows=98304)" in text for which, text in told.items() if which != ("symmetric", "32"))


def test_plan_tells_in_how_many_groups_heads_are_traded(capsys: pytest.CaptureFixture[str]) -> None:
    plan = ("plan", "--seqlen", "64k", "--world", "4", "--schedule")
    assert "in 2 groups, one on its way while another is computed" in " ".join(said(capsys, *plan, "ulysses").split())
    assert "here query heads 0 to 7" in said(capsys, *plan, "ulysses:1")
    one, two = (json.loads(said(capsys, *plan, name, "--json")) for name in ("ulysses:1", "ulysses"))
    for times in ("forward", "backward"):
        assert 0 < two[times]["exchange_of_heads_s"] < one[times]["exchange_of_heads_s"]
        assert two[times]["total_s"] < one[times]["total_s"]
    assert [sum(step["visible"] for step in found["steps"]) for found in (one, two)] == [65_536 * 65_537 // 2] * 2


def test_a_double_ring_says_what_is_a_node(capsys: pytest.CaptureFixture[str]) -> None:
    double = ("plan", "--seqlen", "64k", "--world", "16", "--schedule", "double_ring", "--inner", "4", "--json")
    assert json.loads(said(capsys, *double))["link"]["node"] == 4
    assert json.loads(said(capsys, *double, "--node", "2"))["link"]["node"] == 2


def test_a_double_ring_may_be_told_its_pieces(capsys: pytest.CaptureFixture[str]) -> None:
    plan = ("plan", "--seqlen", "64k", "--world", "4", "--inner", "2", "--schedule")
    assert "double_ring(inner=2, pieces=16)" in said(capsys, *plan, "double_ring:16")


WRONG = [
    ("plan", "--seqlen is missing"),
    ("plan --seqlen 12x", "--seqlen must be a number of tokens such as 4096, 128k or 1M, got '12x'"),
    ("plan --seqlen 9 --mask frob", "--mask 'frob' is not understood"),
    ("plan --seqlen 9 --mask full:3", "--mask 'full:3' is not understood"),
    ("plan --seqlen 9 --mask dilated", "--mask dilated takes 1 to 2 numbers, got 'dilated'"),
    ("plan --seqlen 9 --mask window:3", "--mask 'window:3' is not understood"),
    ("plan --seqlen 9 --mask full --window 3", "--window is for a causal, documents or dilated mask"),
    ("plan --seqlen 9 --mask documents:4,4", "document lengths sum to 8, but the sequence has 9"),
    ("plan --documents 4 --documents-file x", "give one of them"),
    ("plan --documents 4yy", "a document's length must be a number of tokens"),
    ("plan --documents-file /no/such/file", "/no/such/file: No such file or directory"),
    ("plan --seqlen 9 --world 0", "--world must be at least 1, got 0"),
    ("plan --seqlen 9 --heads 3 --kv-heads 2", "--heads 3 is no multiple of --kv-heads 2"),
    ("plan --seqlen 9 --heads many", "argument --heads: invalid int value: 'many'"),
    ("plan --seqlen 9 --layout spiral", "unknown layout 'spiral'; allowed are contiguous, zigzag, striped, balanced, zigzag:K"),
    ("plan --seqlen 9 --schedule rings", "double_ring, staged:K (K chunks a stage), ulysses:K (heads in K groups), double"),
    ("plan --seqlen 9 --schedule staged:0", "unknown schedule 'staged:0'; allowed are auto, ring, "),
    ("plan --seqlen 0", "--seqlen must be at least 1, got 0"),
    ("plan --documents 0,0", "the sum of the documents' lengths must be at least 1, got 0"),
    ("plan --seqlen 9 --queries 0", "--queries must be at least 1, got 0"),
    ("plan --seqlen 9 --picture x.foo", "--picture x.foo must end in .png, .pdf or .svg"),
    ("plan --seqlen 9 --picture x", "--picture x must end in .png, .pdf or .svg"),
    ("plan --seqlen 9 --picture x.png --queries 3", "--picture shows whole sequences; leave --queries out"),
    ("plan --seqlen 9k --world 513 --rank all", "--rank all is for up to 512 ranks, got --world 513; give one rank"),
    ("plan --seqlen 9 --schedule hybrid --ulysses 3", "ulysses=3 does not divide the 8 ranks"),
    ("plan --seqlen 9 --rank 8", "--rank 8 is none of the ranks 0 to 7"),
    ("plan --seqlen 9 --queries 10", "--queries 10 are more than the 9 tokens"),
    ("plan --seqlen 9 --node 0", "--node must be at least 1, got 0"),
    ("plan --seqlen 9 --transport symmetric --tables cpu", "--transport symmetric has times of the H200 only"),
    ("frob", "invalid choice: 'frob'"),
    ("check --world 0", "--world must be at least 1, got 0"),
    ("check --dtype int8", "argument --dtype: invalid choice: 'int8'"),
    ("check --backend frob", "argument --backend: invalid choice: 'frob'"),
    ("bench --repeats 0", "--repeats must be at least 1, got 0"),
]


@pytest.mark.parametrize(("line", "reason"), WRONG, ids=[line for line, _ in WRONG])
def test_a_mistake_is_one_line_and_exit_code_2(line: str, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and reason in err and len(err.splitlines()) == 1 and err.startswith("ringflash")


def test_a_missing_package_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def without_hydra(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'hydra'", name="hydra")

    monkeypatch.setattr(cli.importlib, "import_module", without_hydra)
    assert cli.main(["train", "steps=3"]) == 2
    assert (
        capsys.readouterr().err
        == "ringflash train: hydra is not installed; try: pip install '.[train]' in ringflash's source folder\n"
    )


def test_arguments_are_handed_over_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    class Module:
        @staticmethod
        def main(arguments: list[str]) -> int:
            seen.append(arguments)
            return 7

    monkeypatch.setattr(cli.importlib, "import_module", lambda name: seen.append(name) or Module)
    assert cli.main(["train", "--help", "model.heads=3"]) == 7
    assert cli.main(["bench", "--repeats", "3"]) == 7
    assert seen == ["ringflash.launch.train", ["--help", "model.heads=3"], "ringflash.launch.bench", ["--repeats", "3"]]


# check


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_formula_in_blocks_is_the_dense_one(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "SCORES", 1000)  # of 2 heads and 50 keys: blocks of 10 rows
    for question in check.questions(50, quick=False):
        inputs = check.make_inputs(question, check.Shape(1, 50, 2, 1, 8), dtype, torch.device("cpu"))
        whole = dense_results(inputs, visibility(question.mask, 50, 50), dtype=dtype, softcap=question.softcap)
        blocks = dict(check.formula(inputs, question.mask, question.softcap, dtype).items())
        assert blocks.keys() == dict(whole.items()).keys()
        for name, x in whole.items():
            assert relative_error(blocks[name], x.double()) < {8: 1e-14, 4: 1e-6, 2: 2e-2}[dtype.itemsize], name


@pytest.fixture
def one_rank(tmp_path: Path) -> Any:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def run_check(*arguments: str) -> int:
    options = check.read(["--quick", "--seqlen", "64", "--dtype", "float32", *arguments])
    return check.Check(options, torch.device("cpu")).run()


@pytest.mark.usefixtures("one_rank")
def test_check_fails_what_is_a_little_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_check() == 0
    assert "FAIL" not in capsys.readouterr().out
    exact = check.attention

    def wrong(*args: Any, mask: Mask, **options: Any) -> Any:
        return exact(*args, mask=Mask.causal(window=15) if mask == Mask.causal(window=13) else mask, **options)

    monkeypatch.setattr(check, "attention", wrong)
    assert run_check() == 1
    out = capsys.readouterr().out
    failed = [line for line in out.splitlines() if line.endswith(" FAIL")]
    assert len(failed) == len(check.ways(1, quick=True)) + 1 and all("*" in line for line in failed)
    assert out.splitlines()[-1].startswith("FAIL: ")


@pytest.mark.usefixtures("one_rank")
def test_check_says_what_a_kernel_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_check("--backend", "sdpa") == 1  # nothing was compared
    out = capsys.readouterr().out
    assert "refused" in out and "backend='sdpa' cannot compute attention" in out and "0 of 0 cases pass" in out


def test_every_schedule_is_checked_where_it_fits() -> None:
    names = {(way.schedule, way.layout) for way in check.ways(4, quick=False)}
    schedules = ("ring", "allgather", "staged:2", "ulysses", "hybrid", "double_ring")
    assert names == {(schedule, layout) for schedule in schedules for layout in check.LAYOUTS}
    pulled = {way.schedule for way in check.ways(4, quick=False, device="cuda") if way.transport == "symmetric"}
    assert pulled == {*schedules, "ulysses:2"} - {"double_ring"}
    assert "ulysses:2" in {way.schedule for way in check.ways(2, quick=True)}
    assert {way.schedule for way in check.ways(3, quick=True)} == {"ring", "allgather", "staged:2", "ulysses"}


def command(*arguments: str, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ringflash.cli", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=timeout_s
    )


def test_a_pipe_that_closes_early_is_no_error() -> None:
    script = f"{sys.executable} -m ringflash.cli plan --seqlen 1M --world 16 --rank all --json | head -1"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (done.stdout, done.stderr) == ("[\n", "")


def test_check_with_two_real_ranks() -> None:
    done = command("check", "--world", "2", "--quick", "--seqlen", "96", "--device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("ringflash check: 2 ranks on cpu (gloo), 96 tokens")
    rows = [line for line in lines if line.endswith("PASS")]
    assert len(rows) == 2 * 3 * (1 + len(check.ways(2, quick=True)))  # dtypes, masks, one device and all ways
    assert lines[-1].startswith(f"PASS: {len(rows)} of {len(rows)} cases pass")


# bench


def test_masked_tiles_cost_what_a_causal_mask_takes_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = bench.Sizes(torch.float32, (64,), heads=2, seqlen=256, message_bytes=(), copy_bytes=0, tile=16)

    def times(clock: object, shape: tuple[int, ...], dtype: torch.dtype, mask: Mask) -> tuple[float, float]:
        """A device of 2 TFLOP/s on full tiles and 0.5 on masked ones, half of that backward; 1 ms a call."""
        work = bench.tiles(mask, shape[1], 16)
        tera = shape[0] * shape[2] * 16 * 16 * 4 * shape[3] / 1e12
        forward = tera * (work.full_tiles / 2 + work.masked_tiles / 0.5)
        return forward + 1e-3, 2 * 2.5 * forward + 1e-3

    monkeypatch.setattr(bench, "forward_and_backward", times)
    rate = bench.measure_rate(bench.Clock(torch.device("cpu"), 1), sizes, 64, launch=1e-3)
    assert (rate.forward_full_TFLOPS, rate.forward_masked_TFLOPS) == pytest.approx((2.0, 0.5))
    assert (rate.backward_full_TFLOPS, rate.backward_masked_TFLOPS) == pytest.approx((1.0, 0.25))


@pytest.mark.slow
def test_bench_writes_what_plan_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = command("bench", "--device", "cpu", "--repeats", "1", "--out", str(tmp_path / "mine.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    found = tables.read(tmp_path / "mine.json")["cpu"]
    assert [rate.head_dim for rate in found.device.rates] == [64, 128] and found.link.fast.latency_s > 0
    text = said(capsys, "plan", "--seqlen", "8k", "--tables", str(tmp_path / "mine.json"))
    assert "measured by ringflash bench" in text
