"""The benchmarks as far as they run without a GPU: works, ratios, summaries, options and pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend

import ringflash as rf
from ringflash.mask import Mask
from ringflash.parallel.layout import make_layout
from ringflash.simulated import SimulatedWorld
from ringflash.testing.rank_pool import RankPool

hydra = pytest.importorskip("hydra")
pytest.importorskip("matplotlib")

from hydra.core.hydra_config import HydraConfig  # noqa: E402

from benchmarks import baselines, bench_kernel, bench_ring, plots, rows, works  # noqa: E402
from benchmarks.bench_kernel import SUITES, Case, Group, Run  # noqa: E402
from benchmarks.works import WORKS, Work  # noqa: E402

PNG = b"\x89PNG"
WHERE = ("a GPU", "2.11", "abc1234")


def compose(name: str, *overrides: str) -> Any:
    """A benchmark's options with what was typed."""
    with hydra.initialize_config_dir(str(Path(rows.__file__).parent / "conf"), version_base="1.3"):
        return hydra.compose(name, list(overrides), return_hydra_config=True)


def test_percentiles_and_summary() -> None:
    assert rows.percentiles([3.0]) == (3.0, 3.0, 3.0)
    assert rows.percentiles([float(i) for i in range(11)]) == (2.0, 5.0, 8.0)
    text = rows.summary([("a", 2.0), ("b", 0.5), ("c", 1.0)])
    assert text == "geometric mean 1.000, worst 0.500 (b), 2 of 3 at 1 or above"


def test_turns_begin_with_another_one_every_round() -> None:
    assert [rows.rotated("abc", n) for n in range(4)] == [list("abc"), list("bca"), list("cab"), list("abc")]
    assert rows.rotated([], 3) == []


def test_the_commit_given_goes_first() -> None:
    assert rows.commit("abc1234") == "abc1234"
    assert rows.commit() != ""


@pytest.mark.parametrize("typed", ["6772738", "12e4567", "1234567", "abc1234", "0123456", "'6772738'", "00e0123", "1e-7abc"])
def test_a_commit_is_what_was_typed(typed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hydra takes some hashes for numbers; of 12e4567 it makes infinity."""
    cfg = compose("bench_ring", "rounds=2", f"commit={typed}")
    monkeypatch.setattr(HydraConfig.instance(), "cfg", cfg)
    assert rows.commit(cfg.commit) == typed.strip("'")


def test_rows_of_files_have_commits_as_text(tmp_path: Path) -> None:
    (tmp_path / "rows").write_text('{"commit": 6772738, "x": 1}\n{"commit": "abc1234"}\n{"x": 2}\n')
    assert rows.load(tmp_path / "rows") == [{"commit": "6772738", "x": 1}, {"commit": "abc1234"}, {"x": 2}]


@pytest.mark.parametrize(("mean", "total"), [(2048, 65536), (4096, 262144), (4096, 131072), (128, 16384)])
def test_drawn_documents_fill_the_tokens_at_the_mean(mean: int, total: int) -> None:
    lengths = works.lognormal(mean, total)
    assert sum(lengths) == total and len(lengths) == total // mean and min(lengths) >= 16
    assert lengths == works.lognormal(mean, total)


@pytest.mark.parametrize("work", WORKS.values(), ids=list(WORKS))
def test_single_has_a_rank_s_share_of_the_work(work: Work) -> None:
    tokens, mask = work.single(4)
    mask.check(tokens, tokens)
    assert tokens <= work.seqlen / 2
    share = works.pairs(mask, tokens) / (works.pairs(work.mask(), work.seqlen) / 4)
    assert share == pytest.approx(1, rel=0.12 if work.lengths else 0.01)


def test_pairs_are_the_visible_ones() -> None:
    for mask in (Mask.causal(), Mask.causal(7), Mask.documents((5, 20, 15))):
        assert works.pairs(mask, 40) == int(mask.visible(torch.arange(40), torch.arange(40)).sum())


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "balanced"])
@pytest.mark.parametrize("mask", [Mask.causal(), Mask.causal(9), Mask.documents((30, 50, 16))], ids=repr)
def test_least_rows_are_those_that_queries_see_elsewhere(layout: str, mask: Mask) -> None:
    built = make_layout(layout, 96, 4, mask)
    expected = 0
    for rank in range(4):
        own = torch.from_numpy(built.positions(rank))
        seen = set(torch.arange(96)[mask.visible(own, torch.arange(96)).any(0)].tolist())
        expected += len(seen - set(own.tolist()))
    assert works.least_rows(mask, built) == expected


def test_the_window_work_moves_the_least() -> None:
    work = WORKS["window_1m"]
    world = SimulatedWorld(4, work.layout)
    plans = [world.plan(rank, work.mask(), work.seqlen, work.seqlen, work.heads, work.kv_heads) for rank in range(4)]
    moved = sum(plan.rows_received() for plan in plans)
    assert works.least_rows(work.mask(), plans[0].key.k_layout) == 3 * 4095 <= moved <= 1.2 * 3 * 4095


def test_bytes_on_the_wire() -> None:
    world = SimulatedWorld(4, "contiguous", "ring")
    plans = [world.plan(rank, Mask.full(), 4096, 4096, 8, 2) for rank in range(4)]
    rows = works.least_rows(Mask.full(), plans[0].key.k_layout)
    found = [bench_ring.wire_bytes(plan, rows, 64, 2, takes_delta=True) for plan in plans]
    row = 2 * 2 * 64  # K and V of 2 heads, elements
    assert {least for _, least in found} == {rows * row * (2 + 2 + 4)}
    assert sum(moved for moved, _ in found) == rows * row * (2 + 2 + 4)
    # With as many key heads, queries travel to kernels that take delta: of 8 heads Q, dO and 16 bytes, and dQ in float32.
    plans = [world.plan(rank, Mask.full(), 4096, 4096, 8, 8) for rank in range(4)]
    moved = [sum(bench_ring.wire_bytes(plan, rows, 64, 2, takes)[0] for plan in plans) for takes in (True, False)]
    row = 8 * 64
    assert moved == [rows * (4 * row + 4 * row + 8 * 16 + 4 * row), rows * 2 * row * (2 + 2 + 4)]


def test_the_memory_budget_counts_tensors_and_two_stages() -> None:
    plan = SimulatedWorld(4, "zigzag", "ring").plan(0, Mask.causal(), 4096, 4096, 8, 2)
    n, d = 1024, 64
    q, kv, lse = n * 8 * d * 2, 2 * n * 2 * d * 2, n * 8 * 4
    assert bench_ring.budget(plan, d, 2) == 2 * (2 * q + kv + lse) + 2 * kv


def test_works_are_named_as_they_are_asked_for() -> None:
    for name, work in WORKS.items():
        assert name == work.name
        assert not work.lengths or sum(work.lengths) == work.seqlen


def test_cases_speak_of_the_same_mask_twice() -> None:
    for case in (c for suite in SUITES.values() for c in suite if c.S <= 1024 or c.lengths or c.window):
        mask = Mask.documents(case.lengths) if case.lengths else Mask.causal(case.window or None) if case.causal else Mask.full()
        assert case.slices().area() == works.pairs(mask, case.S)
    assert {len(suite) for suite in (SUITES["dense_128"], SUITES["dense_64"], SUITES["documents"])} == {28, 6, 4}
    assert len(bench_kernel.DETERMINISTIC) == 16


def group(runs: dict[str, float], against: dict[str, str] | None = None, suite: str = "dense_128", **sizes: object) -> Group:
    case = Case("causal 1024 16/16", 1024, 16, 16, 128, True, **sizes)  # type: ignore[arg-type]
    return Group(suite, case, "forward", 16, {name: Run(lambda: None, flops) for name, flops in runs.items()}, against or {})


def test_ratios_are_to_the_fastest_peer() -> None:
    found = {"hopper": [1.0, 2.0, 3.0], "cudnn": [4.0, 4.0, 4.0], "flash_attn_4": [2.5, 2.5, 2.5]}
    made = bench_kernel.rows_of(group(dict.fromkeys(found, 1e9)), found, "bfloat16", WHERE)
    assert [(r.system, r.peer, r.ratio) for r in made] == [
        ("hopper", "flash_attn_4", 1.25),
        ("cudnn", "flash_attn_4", 0.625),
        ("flash_attn_4", "flash_attn_4", 1.0),
    ]
    assert made[0].ms == (1.4, 2.0, 2.6) and made[0].tflops == 0.5
    assert "hopper 0 (1.250)" in bench_kernel.line(made)
    (text,) = bench_kernel.summaries(made)
    assert "worst 1.250 (causal 1024 16/16), 1 of 1" in text


def test_without_a_peer_there_is_no_ratio() -> None:
    found = {"hopper": [2.0, 2.0], "hopper_dense": [1.0, 1.0]}
    made = bench_kernel.rows_of(group({"hopper": 1.8e9, "hopper_dense": 1e9}), found, "bfloat16", WHERE)
    assert [(r.peer, r.ratio, r.of_dense) for r in made] == [(None, None, 0.9), (None, None, None)]
    assert list(bench_kernel.summaries(made)) == []


def test_own_suites_compare_with_the_named_one() -> None:
    found = {"one chunk": [1.0, 1.0], "two chunks": [1.25, 1.25]}
    made = bench_kernel.rows_of(group(dict.fromkeys(found, 1e9), dict.fromkeys(found, "one chunk")), found, "bfloat16", WHERE)
    assert [(r.peer, r.ratio) for r in made] == [("one chunk", 1.0), ("one chunk", 0.8)]
    assert len(list(bench_kernel.summaries(made))) == 1


def test_a_system_that_fails_or_differs_is_left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def fails() -> Run:
        raise RuntimeError("no such kernel")

    x = torch.ones(2, 3)
    makers = {
        "hopper": lambda: Run(lambda: x, 1.0),
        "absent": lambda: None,
        "broken": fails,
        "packed": lambda: Run(lambda: x.reshape(6) * 1.001, 1.0),
        "wrong": lambda: Run(lambda: (x * 1.1,), 1.0),
        "nan": lambda: Run(lambda: x * float("nan"), 1.0),
    }
    assert list(bench_kernel.started("case", makers)) == ["hopper", "packed"]  # type: ignore[arg-type]
    said = capsys.readouterr().out
    assert "broken is left out: RuntimeError: no such kernel" in said
    assert "wrong is left out: its results differ" in said and "nan is left out" in said


def ring_row(work: str, system: str, forward: float, both: float) -> bench_ring.Row:
    ms = (1.0, 1.0, 1.0)
    return bench_ring.Row(work, system, 131072, 4, 32, 8, 128, "bfloat16", "zigzag", *WHERE, 5, ms, ms, forward, both, 2.0)


def test_ring_ratios_and_summary() -> None:
    made = [
        ring_row("causal_128k", "single", 600.0, 500.0),
        ring_row("causal_128k", "ringflash", 570.0, 490.0),
        ring_row("causal_128k", "ulysses_cudnn", 500.0, 400.0),
        ring_row("causal_128k", "ring_flash_attn_fa4", 300.0, 450.0),
    ]
    bench_ring.compare(made)
    assert [(r.forward_ratio, r.both_over_peer) for r in made[:2]] == [(1.0, 1.1111), (0.95, 1.0889)]
    (text,) = bench_ring.summary(made)
    assert "of single 0.95 / 0.98, x best peer 1.14 / 1.0889 (ring_flash_attn_fa4)" in text
    assert "600 TF" in bench_ring.line(made[0])


def dealt(rank: int, world: int, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    """What one process of bench_kernel reads: suite, case, direction."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world))
    cfg, deal = compose("bench_kernel"), bench_kernel.Deal()
    return [
        (group.suite, group.case.name, group.direction)
        for suite in cfg.suites
        for direction in ("forward", "backward")
        for group in bench_kernel.groups(suite, direction, cfg, deal)
    ]


def test_processes_share_the_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    def group(suite: str, case: Case, direction: str, cfg: Any) -> Group:
        return Group(suite, case, direction, 1, {})

    monkeypatch.setattr(bench_kernel, "against_peers", group)
    for suite, direction in bench_kernel.OWN_SUITES.items():
        monkeypatch.setattr(bench_kernel, suite, lambda cfg, s=suite, d=direction: iter([group(s, SUITES["windows"][0], d, cfg)]))
    everything = dealt(0, 1, monkeypatch)
    assert len(everything) == 2 * sum(map(len, SUITES.values())) + len(bench_kernel.OWN_SUITES)
    shares = [dealt(rank, 3, monkeypatch) for rank in range(3)]
    assert sorted(x for share in shares for x in share) == sorted(everything)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_systems_name_says_kernel_and_layout() -> None:
    assert bench_ring.spelled("ringflash") == ("ringflash", "", "")
    assert bench_ring.spelled("ringflash@zigzag:8") == ("ringflash", "", "zigzag:8")
    assert bench_ring.spelled("ringflash_lean@striped") == ("ringflash", "lean", "striped")
    assert bench_ring.spelled("single_cudnn")[:2] == ("single", "cudnn")
    ours = {system for work in WORKS.values() for system in work.ours}
    assert not any(map(bench_ring.is_peer, ours)) and all(bench_ring.is_peer(p) for w in WORKS.values() for p in w.peers)
    assert compose("bench_ring", "systems=[single,ringflash@zigzag:8]").systems[1] == "ringflash@zigzag:8"


@pytest.mark.parametrize("module", [bench_kernel, bench_ring], ids=lambda m: m.__name__)
def test_options_compose(module: ModuleType) -> None:
    name = module.__name__.rpartition(".")[2]
    cfg = compose(name, "commit=abc1234", "rounds=2")
    assert cfg.commit == "abc1234" and cfg.rounds == 2
    if name == "bench_kernel":
        assert set(cfg.suites) == {*SUITES, *bench_kernel.OWN_SUITES} and set(cfg.systems) <= set(bench_kernel.SYSTEMS)
    else:
        assert set(cfg.works) == set(WORKS)


def test_peers_do_only_what_they_can() -> None:
    with pytest.raises(ValueError, match="causal masks without windows"):
        baselines.distributed("ulysses_cudnn", 4096, ())
    with pytest.raises(ValueError, match="unknown system"):
        baselines.distributed("nobody", 0, ())
    with pytest.raises(ValueError, match="causal masks"):
        baselines.single("cudnn", 0, (1, 2))
    for work in WORKS.values():
        for peer in work.peers:
            assert peer == "ulysses_fa4" or (peer in baselines.PEERS and not work.window and not work.lengths)


def ulysses_on_rank(rank: int) -> float:
    torch.manual_seed(0)
    full = [torch.randn(1, 32, h, 8, dtype=torch.float64) for h in (4, 2, 2, 4)]
    cp = rf.ContextParallel(None, "contiguous", "ring")
    results = []
    for attend in (
        baselines.ulysses(lambda q, k, v: baselines.sdpa(q, k, v, SDPBackend.MATH)),
        lambda q, k, v: rf.attention(q, k, v, mask=Mask.causal(), cp=cp),
    ):
        q, k, v, dout = (cp.shard(x).requires_grad_() for x in full)
        out = attend(q, k, v)
        results.append((out, *torch.autograd.grad(out, (q, k, v), dout)))
    return max(float((x - y).abs().max()) for x, y in zip(*results, strict=True))


def test_the_ulysses_peer_computes_the_same(ranks: Callable[[int], RankPool]) -> None:
    assert max(ranks(2).run(ulysses_on_rank)) < 1e-12


def test_pictures_of_all_suites(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    product = Group("ceiling", Case("product", 8192, 1, 1, 8192, False), "forward", 1, {"product": Run(lambda: None, 1.5e12)})
    made = bench_kernel.rows_of(product, {"product": [2.0, 2.0]}, "bfloat16", WHERE)
    for direction in ("forward", "backward"):
        for suite, cases in SUITES.items():
            for case in cases:
                systems = [s for s in bench_kernel.SYSTEMS if direction == "backward" or s != "hopper_float32"]
                g = Group(suite, case, direction, 1, {name: Run(lambda: None, 1e12) for name in systems})
                found = {name: random.uniform(1.5, 2.5, 5).tolist() for name in systems}
                made += bench_kernel.rows_of(g, found, "bfloat16", WHERE)
    rows.append(tmp_path / "kernel.jsonl", made)
    assert rows.load(tmp_path / "kernel.jsonl")[0] == json.loads(json.dumps(asdict(made[0])))
    plots.kernel_table(tmp_path / "kernel.jsonl", tmp_path / "kernel.png")
    assert (tmp_path / "kernel.png").read_bytes()[:4] == PNG


def test_pictures_of_rings_and_of_a_pass(tmp_path: Path) -> None:
    made = [ring_row(work, s, 500.0 + i, 450.0) for work in WORKS for i, s in enumerate(("single", "ringflash", "ulysses_fa4"))]
    rows.append(tmp_path / "ring.jsonl", made)
    with (tmp_path / "ring.jsonl").open("a") as file:  # a row as they were before works had names
        old = SimpleNamespace(**asdict(made[0]))
        file.write(json.dumps({k: v for k, v in vars(old).items() if k != "work"}) + "\n")
    plots.ring_table(tmp_path / "ring.jsonl", tmp_path / "ring.png")
    assert (tmp_path / "ring.png").read_bytes()[:4] == PNG
    spans = [
        {
            "work": "causal_128k",
            "rank": rank,
            "lane": lane,
            "what": what,
            "step": step,
            "peer": peer,
            "start": start,
            "stop": stop,
        }
        for rank in range(2)
        for lane, what, step, peer, start, stop in (
            ("compute", "forward", 0, None, 0.0, 3.0),
            ("chunks", "wait", 1, 1, 0.0, 0.5),
            ("chunks", "copy", 1, 1, 0.5, 2.0),
            ("compute", "wait", 1, None, 3.0, 3.1),
            ("compute", "backward", 0, None, 3.1, 9.0),
            ("gradients", "copy", 1, 1, 7.0, 8.0),
        )
    ]
    (tmp_path / "spans.json").write_text(json.dumps(spans))
    plots.timeline(tmp_path / "spans.json", tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").read_bytes()[:4] == PNG
