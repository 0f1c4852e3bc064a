"""The oracle against torch's own attention and against finite differences, and the judge against results that are wrong."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ringflash.testing import Case, Judge, Results, dense_attention, dense_results, draw, make_inputs, simulate, visibility
from ringflash.testing.runs import judge_of


@pytest.mark.parametrize("text", ["full()", "causal()", "causal(window=5)", "documents([3, 9, 4])"])
def test_the_oracle_is_torchs_attention(text: str) -> None:
    case = Case(mask=text, q_len=16, k_len=16, heads=4, kv_heads=2, batch=2, head_dim_v=24)
    x, visible = make_inputs(case), visibility(case.build_mask(), 16, 16)
    out, lse = dense_attention(x.q, x.k, x.v, visible)
    q, k, v = (t.transpose(1, 2) for t in (x.q, x.k, x.v))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True).transpose(1, 2)
    assert torch.allclose(out, expected, rtol=1e-13, atol=1e-13)
    scores = (q @ k.repeat_interleave(2, 1).transpose(-1, -2) / math.sqrt(8)).masked_fill(~visible, -math.inf)
    assert torch.allclose(lse, scores.logsumexp(-1), rtol=1e-13)


def test_a_sink_is_a_key_with_a_zero_value() -> None:
    case = Case(mask="full()", q_len=6, k_len=6, heads=2, sinks=True)
    x = make_inputs(case)
    assert x.sinks is not None
    one = torch.ones(6, 6, dtype=torch.bool)
    out, lse = dense_attention(x.q, x.k, x.v, one, sinks=x.sinks)
    scores = torch.einsum("bihd,bjhd->bhij", x.q, x.k) / math.sqrt(8)
    weights = torch.cat([scores, x.sinks.reshape(1, 2, 1, 1).expand(1, 2, 6, 1)], -1).softmax(-1)
    values = torch.cat([x.v, torch.zeros(1, 1, 2, 8, dtype=x.v.dtype)], 1)
    assert torch.allclose(out, torch.einsum("bhij,bjhd->bihd", weights, values), rtol=1e-13, atol=1e-13)
    assert torch.allclose(lse.exp(), scores.exp().sum(-1) + x.sinks.exp().reshape(1, 2, 1), rtol=1e-13)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_gradients_are_slopes(sinks: bool, softcap: float) -> None:
    """By torch's finite differences, rows that see nothing included."""
    case = Case(mask='blocks(["10", "00"], 3)', q_len=6, k_len=6, heads=2, kv_heads=1, sinks=sinks)
    x, visible = make_inputs(case), visibility(case.build_mask(), 6, 6)
    leaves = [t.clone().requires_grad_() for t in (x.q, x.k, x.v, x.sinks) if t is not None]

    def both(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = dense_attention(*tensors[:3], visible, softcap=softcap, sinks=tensors[3] if sinks else None)
        return out, lse if sinks else lse[:, :, :3]  # the others are -inf without sinks

    assert torch.autograd.gradcheck(both, leaves)


def test_rows_that_see_nothing() -> None:
    case = Case(mask='blocks(["00", "11"], 4)', q_len=8, k_len=8, sinks=True)
    x, visible = make_inputs(case), visibility(case.build_mask(), 8, 8)
    alone = dense_results(replace(x, sinks=None), visible, dtype=torch.float64)
    assert (alone.out[:, :4] == 0).all() and alone.lse[:, :, :4].isneginf().all() and (alone.dq[:, :4] == 0).all()
    assert all(t.isfinite().all() for name, t in alone.items() if name != "lse")
    with_sinks = dense_results(x, visible, dtype=torch.float64)
    assert x.sinks is not None
    assert (with_sinks.out[:, :4] == 0).all()
    assert torch.allclose(with_sinks.lse[:, :, :4], x.sinks[None, :, None].expand(1, 2, 4))


def wrong_by(results: Results, name: str, factor: float, place: tuple[int, ...] = (0, 20, 0)) -> Results:
    spoilt = getattr(results, name).clone()
    spoilt[place] *= factor
    return replace(results, **{name: spoilt})


@pytest.mark.parametrize(("dtype", "factor"), [("float64", 1 + 1e-10), ("float32", 1 + 2e-5), ("bfloat16", 1.5)])
def test_the_judge_sees_one_row_that_is_a_little_off(dtype: str, factor: float) -> None:
    case = Case(mask="full()", dtype=dtype, q_len=48, k_len=48, heads=4, kv_heads=2, sinks=True)
    judge, right = judge_of(case), simulate(case)
    assert judge.objections(right) == []
    for name in ("out", "dq", "dk", "dv"):
        assert len(judge.objections(wrong_by(right, name, factor))) == 1, name
    assert len(judge.objections(wrong_by(right, "lse", factor if dtype != "bfloat16" else 1 + 2e-5, (0, 0, -1)))) == 1


def test_the_judge_sees_what_is_not_there_or_of_another_kind() -> None:
    case = Case(dtype="bfloat16", sinks=True, mask='blocks(["01", "01"], 16)')
    judge, right = judge_of(case), simulate(case)
    assert judge.objections(replace(right, dsinks=None)) == ["dsinks is missing"]
    assert "dtype" in judge.objections(replace(right, out=right.out.float()))[0]
    assert "dtype" in judge.objections(replace(right, lse=right.lse.bfloat16()))[0]
    assert "shape" in judge.objections(replace(right, dk=right.dk[:, 1:]))[0]
    assert "nan" in judge.objections(replace(right, dv=right.dv * math.nan))[0]
    assert "-inf" in judge.objections(replace(right, lse=right.lse.masked_fill(right.lse == right.lse, -math.inf)))[0]


def test_plain_torch_passes_its_own_judge() -> None:
    for seed in range(60):
        case = draw(seed)
        visible = visibility(case.build_mask(), case.q_len, case.k_len)
        x = make_inputs(case)
        plain = dense_results(x, visible, dtype=case.torch_dtype, scale=case.scale, softcap=case.softcap)
        lse = dense_results(
            x, visible, dtype=torch.float64 if case.dtype == "float64" else torch.float32, scale=case.scale, softcap=case.softcap
        ).lse
        judge = Judge(x, visible, scale=case.scale, softcap=case.softcap)
        assert judge.objections(replace(plain, lse=lse)) == [], repr(case)


def test_a_case_replays_from_its_own_words() -> None:
    for seed in range(200):
        case = draw(seed)
        assert eval(repr(case), {"Case": Case}) == case == draw(seed)
