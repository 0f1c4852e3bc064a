"""The cost model: tables, counted work, and times against small plans worked out by hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ringflash import SimulatedWorld
from ringflash.mask import Mask
from ringflash.parallel import tables
from ringflash.parallel.cost import Forecast, predict, predict_all
from ringflash.parallel.explain import explain
from ringflash.parallel.memory import Shape
from ringflash.parallel.plan import Plan, make_plan
from ringflash.parallel.schedule import Schedule
from ringflash.parallel.tables import DeviceTable, Link, LinkTable, Rate, Tables
from ringflash.parallel.transport.simulated import Mailbox
from ringflash.parallel.work import Work, rank_areas, visible_pairs, work_of
from ringflash.slices import Slices
from ringflash.testing import draw, visibility

# Round numbers: 1 TFLOP/s on full tiles, 0.5 on masked ones; backward half of that; a link of 1 GB/s that costs nothing to use.
DEVICE = DeviceTable("test", tile=16, units=1, rates=(Rate(64, 1.0, 0.5, 0.5, 0.25),), launch_s=0.0, memory_GBps=1e12)
ONE_GBPS = Link(((1, 1.0),), latency_s=0.0)
LINK = LinkTable("test", ONE_GBPS, ONE_GBPS, node=1000)
SHAPE = {"head_dim": 16, "dtype_bytes": 2}


def plans(mask: Mask, schedule: str, world: int, seqlen: int, layout: str = "contiguous", **options: int) -> list[Plan]:
    simulated = SimulatedWorld(world, layout, schedule, **options).for_mask(mask)  # type: ignore[arg-type]
    return [simulated.plan(rank, mask, seqlen, seqlen, 2, 1) for rank in range(world)]


def test_a_link_is_interpolated_in_the_logarithm_of_the_size() -> None:
    link = Link(((1024, 1.0), (16 * 1024, 3.0)), latency_s=1e-7)
    assert link.GBps(4 * 1024) == pytest.approx(2.0)
    assert link.GBps(1 << 40) == 3.0
    assert link.time_s(4 * 1024) == pytest.approx(4 * 1024 / 2e9)
    assert link.time_s(4 * 1024, messages=3) == pytest.approx(4 * 1024 / 2e9 + 2e-7)
    assert link.time_s(0) == 1e-7 and link.time_s(0, messages=0) == 0.0
    assert link.time_s(1023.999) == pytest.approx(link.time_s(1024), rel=1e-4)  # no jump where the table begins


def test_the_nearest_head_dim_counts() -> None:
    assert tables.H200.rate(96).head_dim == 128 and tables.H200.rate(80).head_dim == 64 and tables.H200.rate(512).head_dim == 256


def test_tables_are_read_as_they_were_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "below" / "tables.json"
    monkeypatch.setenv("RINGFLASH_TABLES", str(path))
    assert tables.measured("cuda") is tables.DEFAULTS["cuda"]
    mine = Tables(DEVICE, LINK, "a test")
    tables.write(path, "cuda", mine)
    tables.write(path, "cpu", tables.DEFAULTS["cpu"])
    assert tables.measured("cuda") == mine and tables.measured("cpu") == tables.DEFAULTS["cpu"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "JSONDecodeError"),
        ("[]", "AttributeError"),
        ('{"cuda": {}}', "KeyError: 'device'"),
        (
            json.dumps({"cuda": dataclasses.asdict(Tables(dataclasses.replace(DEVICE, rates=()), LINK, ""))}),
            "rates must be given",
        ),
        (
            json.dumps(
                {"cuda": dataclasses.asdict(Tables(DEVICE, dataclasses.replace(LINK, slow=Link(((9, 1.0), (3, 1.0)), 0.0)), ""))}
            ),
            "points must be positive and ascending",
        ),
    ],
)
def test_a_file_that_holds_something_else_is_named(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "tables.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"tables\.json holds no tables.*{reason}"):
        tables.measured("cuda", path)


def brute_work(slices: Slices, tile: int) -> Work:
    """Every tile looked at, score by score."""
    q_len, k_len = int(slices.table[:, 1].max()), int(slices.table[:, 3].max())
    seen = np.zeros((-(-q_len // tile) * tile, -(-k_len // tile) * tile), dtype=bool)
    i, j = np.indices(seen.shape)
    for s in slices:
        seen |= (s.q0 <= i) & (i < s.q1) & (s.k0 <= j) & (j < s.k1) & (s.lo <= j - i) & (j - i <= s.hi)
    cells = seen.reshape(seen.shape[0] // tile, tile, -1, tile).sum((1, 3))
    full = int((cells == tile * tile).sum())
    masked = int((cells > 0).sum()) - full
    rows = int((cells.sum(1) > 0).sum())
    return Work(1, len(slices), int(seen.sum()), full * tile * tile, full, masked, rows)


def test_work_counts_tiles_as_looking_at_every_score_does() -> None:
    # One Slice at a time: several of the same rows may fill a tile between them, which kernels compute as masked all the same.
    seen = 0
    for case in (draw(seed, worlds=(1, 2, 3)) for seed in range(80)):
        world = SimulatedWorld(case.world, case.build_layout(), case.build_schedule(), ulysses=case.ulysses, inner=case.inner)
        plan = world.for_mask(case.build_mask()).plan(0, case.build_mask(), case.q_len, case.k_len, case.heads, case.kv_heads)
        for part in (part for step in plan.steps for part in step.parts):
            for i in range(len(part.slices)):
                one = dataclasses.replace(part, slices=part.slices[i : i + 1])
                assert work_of([one], 4) == brute_work(one.slices, 4), (case, one)
                seen += 1
    assert seen > 200


def test_documents_share_the_tile_at_their_border() -> None:
    slices = Slices.from_rows([(0, 24, 0, 24, -99, 0), (24, 64, 24, 64, -99, 0)])
    plan = plans(Mask.documents([24, 40]), "ring", 1, 64)[0]
    assert plan.steps[0].parts[0].slices == slices
    assert work_of(plan.steps[0].parts, 16) == brute_work(slices, 16)


@pytest.mark.parametrize("seed", range(120))
def test_visible_pairs_of_every_query(seed: int) -> None:
    case = draw(seed)
    mask = case.build_mask()
    expected = visibility(mask, case.q_len, case.k_len).sum(1).numpy()
    assert np.array_equal(visible_pairs(mask, case.q_len, case.k_len), expected)


@pytest.mark.parametrize("schedule", ["ring", "hybrid"])
def test_areas_are_those_of_the_plans(schedule: str) -> None:
    some = plans(Mask.causal(window=37), schedule, 4, 128, "zigzag", ulysses=2 if schedule == "hybrid" else 1)
    areas = rank_areas(some[0].key)
    assert list(areas) == [plan.area * plan.share.q_heads for plan in some]
    assert predict(some[1], DEVICE, LINK, **SHAPE).balance == pytest.approx(max(areas) / (sum(areas) / 4))


def flop(n_tiles: int, per_pair: int) -> float:
    return n_tiles * 16 * 16 * 2 * per_pair  # two heads


def test_one_rank_is_compute_alone() -> None:
    (plan,) = plans(Mask.causal(), "ring", 1, 64)
    found = predict(plan, DEVICE, LINK, **SHAPE)
    # 4 x 4 tiles of 16: 4 on the diagonal, 6 below it. 4 * D FLOP a pair forward, 10 * D backward.
    forward = flop(6, 64) / 1e12 + flop(4, 64) / 0.5e12
    assert found.forward.total_s == pytest.approx(forward)
    assert found.backward.total_s == pytest.approx(flop(6, 160) / 0.5e12 + flop(4, 160) / 0.25e12)
    assert found.forward.exposed_s == found.backward.exposed_s == 0.0
    assert found.flop(backward=False) == plan.area * 2 * 64
    assert found.steps[0].work == Work(1, 1, 64 * 65 // 2, 6 * 256, 6, 4, 4)


def chunk_bytes(rows: int, nbytes: int) -> int:
    return rows * 32 * nbytes  # one key head, D + Dv = 32


def test_a_transfer_longer_than_a_step_is_exposed_by_what_is_left() -> None:
    found = predict(plans(Mask.full(), "ring", 3, 96)[0], DEVICE, LINK, **SHAPE)
    step = flop(4, 64) / 1e12
    hop = chunk_bytes(32, 2) / 1e9
    assert hop > step
    # Step 1's chunk was posted at 0, step 2's when step 1's had arrived and before it was computed.
    waits = [0.0, hop - step, hop - step]
    assert [t.wait_s for t in found.forward.steps] == pytest.approx(waits)
    assert found.forward.total_s == pytest.approx(2 * hop + step)
    assert [t.transfer_s for t in found.forward.steps] == pytest.approx([0.0, hop, hop])
    assert [s.bytes_in for s in found.steps] == [0, chunk_bytes(32, 2), chunk_bytes(32, 2)]
    assert [s.bytes_out for s in found.steps] == [0, chunk_bytes(32, 2), chunk_bytes(32, 2)]
    assert [s.home_in for s in found.steps] == [0, chunk_bytes(32, 4), chunk_bytes(32, 4)]


def test_gradients_leave_after_their_step_and_only_the_last_are_waited_for() -> None:
    slow = dataclasses.replace(DEVICE, rates=(Rate(64, 0.01, 0.01, 0.01, 0.01),))
    found = predict(plans(Mask.full(), "ring", 3, 96)[0], slow, LINK, **SHAPE)
    step = flop(4, 160) / 0.01e12
    home = chunk_bytes(32, 4) / 1e9
    assert step > 2 * home
    assert [t.wait_s for t in found.backward.steps] == [0.0, 0.0, 0.0]
    assert found.backward.tail_s == pytest.approx(home)
    assert found.backward.total_s == pytest.approx(3 * step + home)
    assert [f.start_s for f in found.backward.flights if f.what == "gradients"] == pytest.approx([2 * step, 3 * step])


def test_all_gather_fills_one_link_with_all_chunks() -> None:
    found = predict(plans(Mask.full(), "allgather", 4, 128)[0], DEVICE, LINK, **SHAPE)
    hop, step = 3 * chunk_bytes(32, 2) / 1e9, flop(4, 64) / 1e12
    assert found.forward.total_s == pytest.approx(hop + 3 * step)
    assert found.steps[1].bytes_in == 3 * chunk_bytes(32, 2)


def test_a_rank_waits_for_one_that_is_late() -> None:
    # Contiguous and causal: rank 1 computes twice what rank 0 does. Nobody waits for rank 0; the sender of gradients is late.
    both = predict_all(plans(Mask.causal(), "ring", 2, 64), DEVICE, LINK, Shape(1, 16, 16, 2))
    first, second = both
    hop, home = chunk_bytes(32, 2) / 1e9, chunk_bytes(32, 4) / 1e9
    assert first.forward.total_s == pytest.approx(max(hop, first.forward.compute_s))
    assert second.backward.total_s == pytest.approx(
        second.backward.compute_s + max(0.0, hop - second.backward.steps[0].compute_s) + home
    )
    assert first.backward.total_s == pytest.approx(second.backward.total_s)  # its gradients come when rank 1 has computed them
    assert first.areas == (2 * 32 * 33 // 2, 2 * (32 * 33 // 2 + 32 * 32))


def test_a_double_ring_hides_the_slow_link_behind_a_whole_inner_ring() -> None:
    slow = LinkTable("test", ONE_GBPS, Link(((1, 0.25),), 0.0), node=2)
    step, hop = flop(4, 64) / 1e12, chunk_bytes(32, 2) / 1e9
    found = predict_all(plans(Mask.full(), "double_ring", 4, 128, inner=2), DEVICE, slow, Shape(1, 16, 16, 2))[0]
    # Step 2 needs the slow link's chunk, posted at 0: it takes four hops. Step 3's comes over the fast link after that.
    assert found.forward.total_s == pytest.approx(4 * hop + hop + step)
    assert {f.step for f in found.forward.flights if f.slow} == {2}


def test_the_exchange_of_heads_is_exposed() -> None:
    found = predict(plans(Mask.full(), "ulysses", 2, 64)[0], DEVICE, LINK, **SHAPE)
    # Of 32 rows one of two query heads, and the one key head that both need; back: one head of out.
    enter, leave = 32 * (16 + 32) * 2 / 1e9, 32 * 16 * 2 / 1e9
    assert found.forward.enter_s == pytest.approx(enter)
    assert found.forward.leave_s == pytest.approx(leave)
    assert found.forward.total_s == pytest.approx(enter + leave + found.forward.compute_s)


def traded(groups: int, device: DeviceTable = DEVICE, kv_heads: int = 8) -> Forecast:
    """Two ranks of 32 rows trade eight query heads."""
    world = SimulatedWorld(2, "contiguous", Schedule("ring", ulysses=2, head_groups=groups))
    return predict(world.plan(0, Mask.full(), 64, 64, 8, kv_heads), device, LINK, **SHAPE)


SLOW = dataclasses.replace(DEVICE, rates=(Rate(64, 0.01, 0.01, 0.01, 0.01),))
Q_BYTES = 32 * 4 * 16 * 2
"""Of 32 rows the four heads of the other rank, D = 16; as many of key heads where there are eight."""


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_of_groups_of_heads_the_first_way_in_and_the_last_way_home_are_exposed(groups: int) -> None:
    found, tiles = traded(groups, SLOW), 16 * 256 * 4
    # In: q, k, v, and dO; home: out, and dq, dk, dv in the inputs' dtype, since nobody shares a key head.
    for times, enter, leave, per_pair in ((found.forward, 3, 1, 64), (found.backward, 1, 3, 160)):
        enter_s, leave_s, compute_s = enter * Q_BYTES / 1e9, leave * Q_BYTES / 1e9, tiles * per_pair / 0.01e12
        assert compute_s / groups > enter_s + leave_s
        assert len(times.groups) == groups and times.compute_s == pytest.approx(compute_s)
        assert times.enter_s == pytest.approx(enter_s / groups) and times.leave_s == pytest.approx(leave_s / groups)
        assert times.total_s == pytest.approx(compute_s + (enter_s + leave_s) / groups)
        starts = [enter_s / groups + i * compute_s / groups for i in range(groups)]
        assert [steps[0].start_s for steps in times.groups] == pytest.approx(starts)


@pytest.mark.parametrize("groups", [2, 4])
def test_of_groups_of_heads_transfers_that_take_longer_than_kernels_decide(groups: int) -> None:
    found = traded(groups).forward
    assert found.compute_s < Q_BYTES / 1e9  # of a group less than its way home
    assert found.total_s == pytest.approx(4 * Q_BYTES / 1e9)
    assert found.exposed_s == pytest.approx(found.total_s - found.compute_s)
    assert traded(1).forward.total_s == pytest.approx(found.total_s + found.compute_s)


def test_the_copies_of_an_exchange_are_not_hidden() -> None:
    slow = dataclasses.replace(SLOW, memory_GBps=1.0)
    # Read and written: q, k, v of the own rows; out that leaves, and when it is there, of the own rows.
    enter_s, leave_s = 2 * 3 * 2 * Q_BYTES / 1e9, 2 * 3 * Q_BYTES / 1e9
    for groups in (1, 4):
        times, travels = traded(groups, slow).forward, 1 if groups == 1 else 0
        # Of groups the second is packed while the first is on its way, and the last but one unpacked while the last is.
        assert times.enter_s == pytest.approx(enter_s + travels * 3 * Q_BYTES / 1e9)
        assert times.leave_s == pytest.approx(leave_s + travels * Q_BYTES / 1e9)
        assert times.total_s == pytest.approx(times.compute_s + times.enter_s + times.leave_s)


@pytest.mark.parametrize(
    ("ranks", "schedule", "seqlen", "kv_heads"),
    [(3, Schedule("ring", head_groups=2), 96, 2), (4, Schedule("double_ring", inner=2, head_groups=2), 32_768, 8)],
    ids=str,
)
def test_groups_without_an_exchange_come_one_after_the_other(ranks: int, schedule: Schedule, seqlen: int, kv_heads: int) -> None:
    """Each with the steps of the whole: a double ring's pieces do not depend on heads."""
    world = SimulatedWorld(ranks, "zigzag", schedule)
    some = [world.plan(rank, Mask.causal(), seqlen, seqlen, 2 * kv_heads, kv_heads) for rank in range(ranks)]
    other = [make_plan(plan.key.of_one_group(2)) for plan in some]
    for whole, part in zip(*(predict_all(of, DEVICE, LINK, Shape(1, 16, 16, 2)) for of in (some, other)), strict=True):
        assert whole.forward.total_s == pytest.approx(2 * part.forward.total_s)
        for a, b in ((whole.forward, part.forward), (whole.backward, part.backward)):
            assert len(a.groups) == 2 and len(a.flights) == 2 * len(b.flights)
            assert a.compute_s == pytest.approx(2 * b.compute_s) and a.total_s == pytest.approx(a.compute_s + a.exposed_s)
        assert [s.bytes_in for s in whole.steps] == [2 * s.bytes_in for s in part.steps]
        assert [s.home_in for s in whole.backward_steps] == [2 * s.home_in for s in part.backward_steps]
        assert len(whole.backward_steps) == len(whole.backward.steps)
        assert whole.flop(True) == 2 * part.flop(True) and whole.areas == tuple(2 * area for area in part.areas)


TRADES = [
    (1, 2, 8, 8, "heads of one owner: gradients in 16 bits"),
    (2, 2, 8, 8, ""),
    (4, 2, 8, 8, ""),
    (1, 2, 8, 1, "a key head that both share: gradients in float32"),
    (1, 4, 6, 2, "keys laid out once per query head"),
    (2, 4, 8, 2, "of each group of four query heads, one key head for four members"),
    (2, 4, 10, 2, "groups of heads that the members do not divide"),
]


@pytest.mark.parametrize("rings", [1, 2])
@pytest.mark.parametrize(("groups", "ulysses", "heads", "kv_heads", "why"), TRADES)
def test_what_a_forecast_moves_is_what_the_ranks_send(
    rings: int, groups: int, ulysses: int, heads: int, kv_heads: int, why: str
) -> None:
    world = SimulatedWorld(rings * ulysses, "zigzag", Schedule("ring", ulysses=ulysses, head_groups=groups))
    some = [world.plan(rank, Mask.causal(), 64, 64, heads, kv_heads) for rank in range(world.world)]
    found = predict_all(some, DEVICE, LINK, Shape(1, 16, 16, 2))
    q, k, v = (torch.randn(1, 64, n, 16, dtype=torch.bfloat16, requires_grad=True) for n in (heads, kv_heads, kv_heads))
    mailbox = Mailbox()
    out = world.attention(q, k, v, mask=Mask.causal(), mailbox=mailbox)
    assert isinstance(out, torch.Tensor)
    forward = mailbox.bytes_sent.total()
    out.sum().backward()
    for times, sent in (("forward", forward), ("backward", mailbox.bytes_sent.total() - forward)):
        flights = [flight for f in found for flight in getattr(f, times).flights]
        assert sum(f.bytes_out for f in flights) == sum(f.bytes_in for f in flights) == sent, (why, times)
        assert len([f for f in getattr(found[0], times).flights if f.what == "heads"]) <= 2 * groups
    assert sum(found[0].areas) == 64 * 65 // 2 * heads and found[1].areas == found[0].areas
    assert [f.flop(backward=False) for f in found] == [64 * area for area in found[0].areas]


def test_few_tiles_do_not_fill_a_device() -> None:
    wide = dataclasses.replace(DEVICE, units=80)
    plan = plans(Mask.full(), "ring", 1, 64)[0]
    one, many = (predict(plan, device, LINK, **SHAPE).forward.total_s for device in (DEVICE, wide))
    assert many == pytest.approx(10 * one)  # 4 row tiles of 2 heads, room for 80


def text_of(plan: Plan, **options: str) -> tuple[str, Forecast]:
    forecast = predict(plan, tables.H200, tables.NVLINK)
    return explain(plan, forecast, **options), forecast


def test_explain_says_everything_in_forty_lines() -> None:
    world = SimulatedWorld(64, "zigzag", "ring")
    text, forecast = text_of(
        world.plan(3, Mask.causal(), 1 << 20, 1 << 20, 32, 8), chosen="long chunks", kernel="hopper", source="here"
    )
    assert len(text.splitlines()) <= 40 and max(map(len, text.splitlines())) <= 130
    for words in (
        "mask       causal\n",
        "1,048,576 tokens, layout zigzag",
        "3 of 64, with 16,384 tokens in 2 runs (24576:32768, 1015808:1024000)",
        "ring, 64 steps (auto: long chunks)",
        "32 query heads, 8 key heads of 128",
        "kernel     hopper",
        "H200, NVLink",
        "(here)",
        "more lines",
        f"forward    {1e3 * forecast.forward.total_s:.3g} ms",
        "balance    1.000 (work of the busiest rank over the mean; all ranks alike)",
    ):
        assert words in text, words


def test_a_forecast_is_of_a_kind_of_kernel_and_says_of_which() -> None:
    def text(takes_delta: bool, kv_heads: int = 8) -> tuple[str, str]:
        plan = SimulatedWorld(4, "zigzag", "ring").plan(0, Mask.causal(), 4096, 4096, 8, kv_heads)
        forecast = predict(plan, tables.H200, tables.NVLINK, takes_delta=takes_delta)
        return forecast.back.key.travels, " ".join(explain(plan, forecast).split())

    kinds = "for a kernel that takes delta in place of out", "for one that needs out"
    travels, words = text(True)
    assert travels == "q" and f"backward Q, dO {kinds[0]}, K, V {kinds[1]} (" in words
    travels, words = text(False)
    assert travels == "kv" and f"backward K, V {kinds[1]}, Q, dO {kinds[0]} (" in words
    assert "backward K, V (" in text(True, kv_heads=1)[1], "the same for both kinds"


def test_memory_is_of_deterministic_gradients_where_asked_for() -> None:
    plan = SimulatedWorld(4, "zigzag", "ring").plan(0, Mask.causal(), 8192, 8192, 32, 8)
    free, exact = (plan.explain(deterministic=deterministic) for deterministic in (False, True))
    assert "workspace" not in free and "deterministic" not in free
    assert "backward, deterministic: workspace of the kernel 256 MiB" in " ".join(exact.split())
    forecasts = [predict(plan, tables.H200, tables.NVLINK, deterministic=deterministic) for deterministic in (False, True)]
    assert forecasts[0].forward.memory == forecasts[1].forward.memory
    assert 0 < forecasts[1].backward.memory.total - forecasts[0].backward.memory.total < 257 << 20


def test_explain_of_a_plan_with_idle_steps_and_shared_heads() -> None:
    text, _ = text_of(SimulatedWorld(8, "contiguous", "ring").plan(2, Mask.documents([3072, 5120]), 8192, 8192, 4, 2))
    assert " 3-4  none" in text
    text, _ = text_of(SimulatedWorld(8, "zigzag", "hybrid", ulysses=4).plan(5, Mask.causal(), 8192, 8192, 8, 2))
    assert "chunks of ring rank" in text and "here query heads 2 to 3" in text and "exchange of heads" in text


def test_explain_tells_groups_of_heads() -> None:
    def heads(schedule: str | Schedule) -> str:
        plan = SimulatedWorld(4, "zigzag", schedule).plan(1, Mask.causal(), 8192, 8192, 8, 8)
        text, forecast = text_of(plan)
        assert max(map(len, text.splitlines())) <= 130 and ("times in ms over" in text) == (len(forecast.forward.groups) > 1)
        return " ".join(text.partition("heads      ")[2].partition("predicted ")[0].split())

    bytes_ = "batch 1, 2 bytes an element"
    assert heads("ulysses").endswith(f"{bytes_}; here query heads 2 to 3")
    assert heads("ulysses:2").endswith(f"{bytes_}; here 2 query heads; in 2 groups, one on its way while another is computed")
    assert heads(Schedule("ring", head_groups=2)).endswith(f"{bytes_}; in 2 groups, one after the other")
    assert heads("ring").endswith(bytes_)


def test_a_plan_explains_itself() -> None:
    text = plans(Mask.causal(), "ring", 4, 4096, layout="zigzag")[1].explain(device="cpu")
    assert "rank       1 of 4" in text and "zigzag" in text and "peak" in text
