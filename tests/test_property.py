"""Drawn cases in a simulated world: output, LSE and every gradient against the float64 oracle, at the derived tolerance."""

from __future__ import annotations

import pytest
import torch

from ringflash import Mask, SimulatedWorld
from ringflash.testing import Case, dense_attention, draw, make_inputs, objections_simulated, visibility

BATCH, BATCHES = 50, 28

# What once went wrong elsewhere or is easy to get wrong, with the reason.
EDGES = [
    (Case(mask="causal(window=9)", layout="contiguous"), "window = chunk + 1: one row of the next chunk but one"),
    (Case(mask="causal(window=8)", layout="contiguous"), "window = chunk"),
    (Case(mask="causal(window=5)", layout="zigzag"), "window = half a chunk + 1"),
    (Case(world=8, q_len=3, k_len=3), "shorter than the world: ranks without tokens"),
    (Case(world=8, q_len=1, k_len=1, layout="contiguous"), "one token on eight ranks"),
    (Case(world=8, q_len=8, k_len=8, layout="contiguous"), "one-row chunks"),
    (Case(world=8, q_len=16, k_len=16, layout="zigzag"), "one-row pieces"),
    (Case(world=8, q_len=17, k_len=17, layout="striped"), "one row more than the world divides"),
    (Case(mask="documents([0, 8, 0, 0, 7, 1, 16, 0])"), "empty documents, documents of one token, borders on chunk borders"),
    (Case(mask="documents([9, 7, 9, 7])", layout="balanced"), "document borders one off chunk borders"),
    (Case(mask="documents([32])", layout="balanced"), "one document"),
    (Case(mask='blocks(["00", "00"], 16)'), "nobody sees anything"),
    (Case(mask='blocks(["00", "00"], 16)', sinks=True), "nobody sees anything but the sink"),
    (Case(mask='blocks(["10", "00"], 16)', sinks=True, dtype="bfloat16"), "half of the rows see nothing but the sink"),
    (Case(q_len=40, k_len=24), "more queries than keys: the first see nothing"),
    (Case(q_len=1, k_len=33), "one query: decoding"),
    (Case(q_len=5, k_len=64, mask="causal(window=17)", layout="contiguous"), "few queries, most keys unseen"),
    (Case(schedule="ulysses", heads=3, kv_heads=3), "heads that the ranks do not divide"),
    (Case(schedule="ulysses", heads=6, kv_heads=2), "key heads that are fewer than ranks, ratio broken by the shares"),
    (Case(schedule="ulysses", heads=8, kv_heads=1, world=8), "one key head for eight ranks"),
    (Case(schedule="ulysses", heads=2, kv_heads=1, world=8), "ranks without heads"),
    (Case(schedule="ulysses", heads=8, kv_heads=8, head_groups=2), "one group of heads travels under another's kernels"),
    (Case(schedule="ulysses", heads=12, kv_heads=6, head_groups=3, sinks=True, batch=2), "groups of fewer key heads than ranks"),
    (
        Case(schedule="ulysses", heads=20, kv_heads=4, head_groups=4, dtype="bfloat16"),
        "groups of heads that the ranks do not divide",
    ),
    (Case(schedule="hybrid", ulysses=2, heads=8, kv_heads=4, head_groups=2, dlse=False, q_len=31, k_len=31), ""),
    (Case(schedule="ring", heads=4, kv_heads=2, head_groups=2), "groups without an exchange"),
    (Case(schedule="hybrid", ulysses=2, heads=3, kv_heads=1, mask="dilated(3)", layout="striped"), ""),
    (
        Case(schedule="double_ring", inner=2, mask="causal(window=9)", layout="contiguous"),
        "chunks passed on unused",
    ),
    (Case(schedule="double_ring", inner=4, world=8, mask="documents([20, 3, 9])"), ""),
    (Case(schedule="double_ring", inner=1), "a double ring of groups of one is a ring"),
    (Case(schedule="double_ring", inner=4), "a double ring of one group is a ring"),
    (Case(schedule="staged:2", world=6), "a last stage that is not full"),
    (Case(mask="dilated(8)", layout="striped", world=4), "a stride that the layout's divides"),
    (Case(mask="dilated(3)", layout="striped", world=4), "a stride prime to the layout's"),
    (Case(mask="dilated(6, window=2)", layout="striped", world=4), "a stride that shares a factor with the layout's"),
    (Case(mask="dilated(2) & dilated(3)", q_len=33, k_len=33), "two strides make their least common multiple"),
    (Case(mask="prefix(9)", layout="contiguous"), "a prefix of chunk + 1"),
    (Case(mask="chunked(9)", layout="contiguous"), "chunks of the mask that straddle those of the ranks"),
    (Case(mask="window(9, 1)", layout="contiguous"), "a window of chunk + 1 to the left"),
    (Case(softcap=1.0, sinks=True, scale=2.0), ""),
    (Case(scale=0.0), "all scores equal"),
    (Case(scale=-1.0), "a negative scale"),
    (Case(heads=8, kv_heads=2, head_dim=24, head_dim_v=8, batch=2), "Dv differs from D"),
    (Case(dlse=False, dtype="bfloat16", heads=4, kv_heads=2), ""),
    (Case(dtype="float16", heads=4, kv_heads=2), ""),
    (Case(world=1), "one rank is the same path with one step"),
    (Case(world=2, q_len=9, k_len=2300, backend="reference"), "more keys than a tile of the reference"),
    (Case(world=2, q_len=1200, k_len=600, heads=1, kv_heads=1, backend="reference"), "more rows than a tile of the reference"),
    (Case(world=2, q_len=700, k_len=700, heads=1, kv_heads=1, mask="causal(window=300)"), "bands that the CPU backend cuts"),
    (
        Case(world=2, q_len=700, k_len=700, heads=1, kv_heads=1, mask="window(200, 90)", layout="contiguous"),
        "the same, two-sided",
    ),
]


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=f"{i}-{reason or case!r}"[:80]) for i, (case, reason) in enumerate(EDGES)]
)
def test_edges(case: Case) -> None:
    assert objections_simulated([case]) == []


@pytest.mark.parametrize("batch", range(BATCHES))
def test_drawn(batch: int) -> None:
    """1,400 cases in all."""
    wrong = objections_simulated([draw(seed) for seed in range(batch * BATCH, (batch + 1) * BATCH)])
    assert not wrong, "\n".join(wrong)


def test_a_world_balanced_for_one_mask_computes_others() -> None:
    """Layers of a model may have masks of their own over one sharding."""
    case = Case(layout="balanced", q_len=33, k_len=33)
    inputs = make_inputs(case)
    world = SimulatedWorld(4, "balanced").for_mask(Mask.documents([20, 13]))
    for mask in (None, Mask.causal(window=5), Mask.full()):
        visible = visibility(mask or Mask.documents([20, 13]), 33, 33)
        out = world.attention(inputs.q, inputs.k, inputs.v, mask=mask)
        assert torch.allclose(out, dense_attention(inputs.q, inputs.k, inputs.v, visible)[0], rtol=1e-12, atol=1e-12)


def test_queries_may_travel() -> None:
    """In the backward pass, and whatever else is drawn: here where it is easy to get wrong."""
    cases = [
        Case(travels="q"),
        Case(travels="q", dlse=False, dtype="float32", backend="cpu", heads=4, kv_heads=2),
        Case(travels="q", dlse=False, dtype="bfloat16", head_dim=5, head_dim_v=3),
        Case(travels="q", dlse=True, dtype="float16", head_dim=3, head_dim_v=9, backend="reference"),
        Case(travels="q", head_dim=7, head_dim_v=2, batch=2, sinks=True, softcap=2.0, schedule="staged:2", world=6),
        Case(travels="q", mask="dilated(3)", layout="striped", heads=6, kv_heads=3, schedule="hybrid", ulysses=2, sinks=True),
        Case(travels="q", mask="dilated(3)", layout="contiguous", q_len=33, k_len=33, schedule="allgather"),
        Case(travels="q", mask='blocks(["10", "00"], 16)', sinks=True),
        Case(travels="q", q_len=5, k_len=64, mask="causal(window=17)", layout="contiguous"),
        Case(travels="q", q_len=1, k_len=33, trim=False),
        Case(travels="q", schedule="double_ring", inner=2, pieces=2, world=6, mask="causal(window=9)", layout="contiguous"),
        Case(travels="q", world=8, q_len=3, k_len=3, deterministic=True),
        Case(travels="q", world=1),
    ]
    wrong = objections_simulated(cases)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_backends_by_name(backend: str) -> None:
    masks = ("causal()", "window(5, 3)", "documents([9, 0, 23])", "prefix(7)", "dilated(3)")
    cases = [
        Case(mask=mask, backend=backend, dtype=dtype, heads=4, kv_heads=2, dlse=dlse, sinks=dlse)
        for mask in masks
        for dtype in ("float64", "float32", "bfloat16", "float16")
        for dlse in (False, True)
    ]
    wrong = objections_simulated(cases)
    assert not wrong, "\n".join(wrong)
