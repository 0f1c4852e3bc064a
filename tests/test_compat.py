"""flash-attn's functions: signatures, alignment, packing, and what is refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from ringflash import compat
from ringflash.testing.oracle import dense_attention

TIGHT = {"rtol": 1e-12, "atol": 1e-12}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def visible(q_len: int, k_len: int, causal: bool, window: tuple[int, int]) -> Tensor:
    """flash-attn's documented rule, aligned at the end."""
    offset = torch.arange(k_len) - (torch.arange(q_len)[:, None] + k_len - q_len)
    left, right = window[0], 0 if causal else window[1]
    left, right = (side if side >= 0 else 1 << 40 for side in (left, right))
    return (offset >= -left) & (offset <= right)


def assert_same_gradients(out: Tensor, exact_out: Tensor, inputs: tuple[Tensor, ...]) -> None:
    dout = normal(*out.shape, seed=3)
    for got, exact in zip(torch.autograd.grad(out, inputs, dout), torch.autograd.grad(exact_out, inputs, dout), strict=True):
        torch.testing.assert_close(got, exact, **TIGHT)


WINDOWS = [(-1, -1), (2, 1), (-1, 2), (4, -1), (0, 0)]
MASKS = [*((False, window) for window in WINDOWS), (True, (-1, -1)), (True, (3, -1)), (True, (3, 7))]


@pytest.mark.parametrize(("causal", "window"), MASKS, ids=str)
@pytest.mark.parametrize(("q_len", "k_len"), [(9, 9), (5, 12), (12, 5), (1, 7), (7, 1)], ids=str)
class TestDense:
    def test_output_lse_and_gradients(self, q_len: int, k_len: int, causal: bool, window: tuple[int, int]) -> None:
        q = normal(2, q_len, 4, 8).requires_grad_()
        k, v = (normal(2, k_len, 2, 8, seed=seed).requires_grad_() for seed in (1, 2))
        out, lse, probs = compat.flash_attn_func(q, k, v, causal=causal, window_size=window, return_attn_probs=True)
        exact_out, exact_lse = dense_attention(q, k, v, visible(q_len, k_len, causal, window))
        assert probs is None
        torch.testing.assert_close(out, exact_out, **TIGHT)
        torch.testing.assert_close(lse, exact_lse, **TIGHT)
        assert_same_gradients(out, exact_out, (q, k, v))

    def test_packed_forms(self, q_len: int, k_len: int, causal: bool, window: tuple[int, int]) -> None:
        q, kv, qkv = normal(2, q_len, 4, 8), normal(2, k_len, 2, 2, 8, seed=1), normal(2, q_len, 3, 2, 8, seed=2)
        how: dict[str, Any] = {"causal": causal, "window_size": window, "softmax_scale": 0.3, "softcap": 4.0}
        exact = compat.flash_attn_func(q, kv[:, :, 0], kv[:, :, 1], **how)
        torch.testing.assert_close(compat.flash_attn_kvpacked_func(q, kv, **how), exact, **TIGHT)
        exact = compat.flash_attn_func(*qkv.unbind(2), **how)
        torch.testing.assert_close(compat.flash_attn_qkvpacked_func(qkv, **how), exact, **TIGHT)


def borders(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@pytest.mark.parametrize(("causal", "window"), MASKS, ids=str)
@pytest.mark.parametrize(
    ("q_lengths", "k_lengths"),
    [([5, 1, 9], [5, 1, 9]), ([4, 0, 6], [4, 0, 6]), ([5, 1, 9], [7, 3, 9]), ([3, 4, 0, 2], [1, 0, 5, 2]), ([6], [9])],
    ids=str,
)
class TestVariableLength:
    def test_is_each_sequence_alone(
        self, q_lengths: list[int], k_lengths: list[int], causal: bool, window: tuple[int, int]
    ) -> None:
        q = normal(sum(q_lengths), 4, 8).requires_grad_()
        k, v = (normal(sum(k_lengths), 2, 8, seed=seed).requires_grad_() for seed in (1, 2))
        cu_q, cu_k = borders(q_lengths), borders(k_lengths)
        lengths = (cu_q, cu_k, max(q_lengths), max(k_lengths))
        how: dict[str, Any] = {"causal": causal, "window_size": window}
        out, lse, _ = compat.flash_attn_varlen_func(q, k, v, *lengths, **how, return_attn_probs=True)
        exact = []
        for (a, b), (c, d) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
            exact.append(dense_attention(q[None, a:b], k[None, c:d], v[None, c:d], visible(b - a, d - c, causal, window)))
        exact_out, exact_lse = torch.cat([out[0] for out, _ in exact]), torch.cat([lse[0] for _, lse in exact], dim=1)
        torch.testing.assert_close(out, exact_out, **TIGHT)
        torch.testing.assert_close(lse, exact_lse, **TIGHT)
        assert lse.shape == (4, sum(q_lengths))
        torch.testing.assert_close(compat.flash_attn_varlen_func(q, k, v, *lengths, **how), out, **TIGHT)
        kv = torch.stack([k, v], dim=1)
        torch.testing.assert_close(compat.flash_attn_varlen_kvpacked_func(q, kv, *lengths, **how), out, **TIGHT)
        assert_same_gradients(out, exact_out, (q, k, v))


def test_variable_length_of_packed_qkv() -> None:
    qkv = normal(15, 3, 2, 8)
    cu = borders([4, 0, 11])
    exact = compat.flash_attn_varlen_func(*qkv.unbind(1), cu, cu, 11, 11, causal=True)
    torch.testing.assert_close(compat.flash_attn_varlen_qkvpacked_func(qkv, cu, 11, causal=True), exact, **TIGHT)


SIGNATURES: dict[Callable[..., Any], str] = {
    compat.flash_attn_func: "q k v",
    compat.flash_attn_qkvpacked_func: "qkv",
    compat.flash_attn_kvpacked_func: "q kv",
    compat.flash_attn_varlen_func: "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k",
    compat.flash_attn_varlen_qkvpacked_func: "qkv cu_seqlens max_seqlen",
    compat.flash_attn_varlen_kvpacked_func: "q kv cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k",
}
COMMON = "dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic return_attn_probs"


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f.__name__)
def test_positions_are_flash_attns(function: Callable[..., Any]) -> None:
    """Positional calls written for flash-attn 2.8 mean the same here."""
    parameters = inspect.signature(function).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    expected = f"{SIGNATURES[function]} {COMMON}".split()
    assert positional == expected + (["block_table"] if function is compat.flash_attn_varlen_func else [])
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    assert defaults["dropout_p"] == 0.0 and defaults["window_size"] == (-1, -1) and defaults["softcap"] == 0.0
    assert defaults["softmax_scale"] is None and defaults["causal"] is False and defaults["return_attn_probs"] is False


class TestRefusals:
    q, kv, qkv = normal(1, 6, 2, 8), normal(1, 6, 2, 2, 8), normal(1, 6, 3, 2, 8)
    packed = normal(6, 3, 2, 8)
    cu = borders([2, 4])

    def varlen(self, **how: Any) -> Any:
        arguments: dict[str, Any] = {"cu_seqlens_q": self.cu, "cu_seqlens_k": self.cu, "max_seqlen_q": 4, "max_seqlen_k": 4}
        q, k, v = self.packed.unbind(1)
        return compat.flash_attn_varlen_func(**{"q": q, "k": k, "v": v, **arguments, **how})

    @pytest.mark.parametrize(
        "how", [{"dropout_p": 0.1}, {"alibi_slopes": torch.ones(2)}, {"window_size": 5}, {"window_size": (1, 2, 3)}], ids=str
    )
    def test_what_is_not_supported(self, how: dict[str, Any]) -> None:
        (name,) = how
        with pytest.raises(ValueError, match=name):
            compat.flash_attn_func(self.q, self.q, self.q, **how)
        with pytest.raises(ValueError, match=name):
            compat.flash_attn_kvpacked_func(self.q, self.kv, **how)
        with pytest.raises(ValueError, match=name):
            compat.flash_attn_qkvpacked_func(self.qkv, **how)
        with pytest.raises(ValueError, match=name):
            self.varlen(**how)

    @pytest.mark.parametrize(
        ("how", "words"),
        [
            ({"block_table": torch.zeros(1, 1, dtype=torch.int32)}, "paged keys"),
            ({"q": normal(1, 6, 2, 8)}, r"q must have the shape \(total tokens, heads, head_dim\), got \(1, 6, 2, 8\)"),
            ({"cu_seqlens_q": torch.tensor([0, 2, 5], dtype=torch.int32)}, "cu_seqlens_q ends at 5, but its tensor has 6 tokens"),
            ({"cu_seqlens_k": torch.tensor([1, 2, 6], dtype=torch.int32)}, "cu_seqlens_k must start at 0"),
            ({"cu_seqlens_k": torch.tensor([0, 4, 2, 6], dtype=torch.int32)}, "never descend"),
            ({"cu_seqlens_k": torch.tensor([0, 2, 2, 6], dtype=torch.int32)}, "cu_seqlens_q has 2 sequences, cu_seqlens_k has 3"),
            ({"cu_seqlens_q": torch.tensor([0.0, 6.0])}, "cu_seqlens_q must be int32"),
        ],
    )
    def test_of_variable_length(self, how: dict[str, Any], words: str) -> None:
        with pytest.raises(ValueError, match=words):
            self.varlen(**how)

    def test_packed_shapes(self) -> None:
        with pytest.raises(ValueError, match=r"qkv must have the shape \(batch, sequence, 3, heads, head_dim\), got \(1, 6, 2"):
            compat.flash_attn_qkvpacked_func(self.kv)
        with pytest.raises(ValueError, match=r"kv must have the shape \(batch, sequence, 2, heads, head_dim\)"):
            compat.flash_attn_kvpacked_func(self.q, self.qkv)
        with pytest.raises(ValueError, match=r"qkv must have the shape \(total tokens, 3, heads, head_dim\)"):
            compat.flash_attn_varlen_qkvpacked_func(self.qkv, self.cu, 4)

    def test_lengths_that_differ_cannot_be_shared_by_ranks(self) -> None:
        with pytest.raises(ValueError, match="with cp, the sequences of q and k must have the same lengths"):
            self.varlen(cu_seqlens_k=borders([3, 3]), cp=object())


def test_lse_is_not_computed_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A differentiable lse limits the choice of kernels."""
    from ringflash import api

    asked: list[bool] = []

    def attention(q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False, **_: Any) -> Any:
        asked.append(return_lse)
        return (q, q[..., 0].transpose(1, 2)) if return_lse else q

    monkeypatch.setattr(api, "attention", attention)
    q = normal(1, 6, 2, 8)
    cu = borders([2, 4])
    for probs in (False, True):
        compat.flash_attn_func(q, q, q, return_attn_probs=probs)
        compat.flash_attn_varlen_func(q[0], q[0], q[0], cu, cu, 4, 4, return_attn_probs=probs)
    assert asked == [False, False, True, True]
