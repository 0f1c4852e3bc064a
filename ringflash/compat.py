"""flash-attn's functions by their own names and signatures, on ``ringflash.attention``.

``from ringflash.compat import flash_attn_func`` takes the place of ``from flash_attn import flash_attn_func``: on any device and
dtype that ringflash has a kernel for, differentiable, and over a group of ranks with the one additional argument ``cp``.

What differs: dropout, ALiBi and paged keys are refused; the log-sum-exp of a row that sees nothing is -inf, and is
differentiable; the third value of ``return_attn_probs=True`` is None. ``max_seqlen_*`` are not needed and not read. The borders
of variable-length sequences are read on the host, which waits for the device that they are on.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor

from ringflash.mask import Mask

if TYPE_CHECKING:
    from ringflash.parallel.context import ContextParallel

Result = Tensor | tuple[Tensor, Tensor, None]
"""out, or with ``return_attn_probs`` (out, lse, None)."""

WindowSize = tuple[int | None, int | None]


class _Options(TypedDict):
    """What ``ringflash.attention`` gets beside tensors and mask."""

    scale: float | None
    softcap: float
    deterministic: bool
    cp: ContextParallel | None


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    cp: ContextParallel | None = None,
) -> Result:
    """Attention of q (B, Sq, H, D) over k (B, Sk, Hkv, D), v (B, Sk, Hkv, Dv).

    causal and window_size are aligned at the end: query i sees keys ``i + Sk - Sq - left .. i + Sk - Sq + right``, -1 or None
    being unlimited; causal sets right = 0. Returns out (B, Sq, H, Dv), with return_attn_probs (out, lse (B, H, Sq), None).
    ValueError for a dropout_p other than 0, for alibi_slopes, and for whatever ``ringflash.attention`` refuses.
    """
    from ringflash.api import attention

    _refuse(dropout_p, alibi_slopes)
    options = _Options(scale=softmax_scale, softcap=softcap, deterministic=deterministic, cp=cp)
    mask = _window_mask(causal, window_size)
    if not return_attn_probs:
        return attention(q, k, v, mask=mask, **options)
    return *attention(q, k, v, mask=mask, return_lse=True, **options), None


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    cp: ContextParallel | None = None,
) -> Result:
    """``flash_attn_func`` of qkv (B, S, 3, H, D)."""
    q, k, v = _unpack(qkv, "qkv", 5, 3)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        deterministic=deterministic,
        return_attn_probs=return_attn_probs,
        cp=cp,
    )


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    cp: ContextParallel | None = None,
) -> Result:
    """``flash_attn_func`` of q (B, Sq, H, D) and kv (B, Sk, 2, Hkv, D)."""
    k, v = _unpack(kv, "kv", 5, 2)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        deterministic=deterministic,
        return_attn_probs=return_attn_probs,
        cp=cp,
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    cp: ContextParallel | None = None,
) -> Result:
    """Attention inside each of several sequences laid one after another: q (Tq, H, D), k (Tk, Hkv, D), v (Tk, Hkv, Dv).

    cu_seqlens_q, cu_seqlens_k: (n + 1,) ascending borders from 0 to Tq and Tk; sequence i of q sees keys of sequence i of k, by
    the rule of ``flash_attn_func``. With ``cp``, q, k, v are this rank's rows, the borders those of the whole packed sequence,
    and the borders of q and k must be the same. Returns out (Tq, H, Dv), with return_attn_probs (out, lse (H, Tq), None).
    """
    _refuse(dropout_p, alibi_slopes)
    if block_table is not None:
        raise ValueError("block_table: paged keys are not supported; gather the pages into k and v first")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3:
            raise ValueError(f"{name} must have the shape (total tokens, heads, head_dim), got {tuple(x.shape)}")
    borders_q = _borders(cu_seqlens_q, "cu_seqlens_q", None if cp else q.shape[0])
    borders_k = borders_q if cu_seqlens_k is cu_seqlens_q else _borders(cu_seqlens_k, "cu_seqlens_k", None if cp else k.shape[0])
    if len(borders_q) != len(borders_k):
        n_q, n_k = len(borders_q) - 1, len(borders_k) - 1
        raise ValueError(f"cu_seqlens_q has {n_q} sequences, cu_seqlens_k has {n_k}; give as many of both")
    options = _Options(scale=softmax_scale, softcap=softcap, deterministic=deterministic, cp=cp)
    mask = _window_mask(causal, window_size)
    if borders_q == borders_k:  # documents of one packed sequence
        lengths = [b - a for a, b in pairwise(borders_q)]
        out, lse = _attend(q, k, v, Mask.documents(lengths, causal=False) & mask, return_attn_probs, options)
    elif cp is not None:
        raise ValueError("with cp, the sequences of q and k must have the same lengths: cu_seqlens_q and cu_seqlens_k differ")
    else:
        spans = zip(pairwise(borders_q), pairwise(borders_k), strict=True)
        parts = [_attend(q[a:b], k[c:d], v[c:d], mask, return_attn_probs, options) for (a, b), (c, d) in spans]
        out = torch.cat([out for out, _ in parts])
        lse = torch.cat([lse for _, lse in parts], dim=1)
    return (out, lse, None) if return_attn_probs else out


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    cp: ContextParallel | None = None,
) -> Result:
    """``flash_attn_varlen_func`` of qkv (T, 3, H, D)."""
    q, k, v = _unpack(qkv, "qkv", 4, 3)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        deterministic=deterministic,
        return_attn_probs=return_attn_probs,
        cp=cp,
    )


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    cp: ContextParallel | None = None,
) -> Result:
    """``flash_attn_varlen_func`` of q (Tq, H, D) and kv (Tk, 2, Hkv, D)."""
    k, v = _unpack(kv, "kv", 4, 2)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        deterministic=deterministic,
        return_attn_probs=return_attn_probs,
        cp=cp,
    )


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, with_lse: bool, options: _Options) -> tuple[Tensor, Tensor]:
    """out (S, H, Dv) and lse (H, S) of one sequence q (S, H, D); an empty (H, 0) if the lse is not asked for.

    An lse that may be differentiated limits the choice of kernels, so it is not computed unasked.
    """
    from ringflash.api import attention

    q, k, v = q[None], k[None], v[None]
    if not with_lse:
        return attention(q, k, v, mask=mask, **options)[0], q.new_empty(q.shape[2], 0)
    out, lse = attention(q, k, v, mask=mask, return_lse=True, **options)
    return out[0], lse[0]


def _refuse(dropout_p: float, alibi_slopes: Tensor | None) -> None:
    if dropout_p != 0.0:
        raise ValueError(
            f"dropout_p={dropout_p} is not supported: attention here is exact; pass dropout_p=0.0 (also when training)"
        )
    if alibi_slopes is not None:
        raise ValueError("alibi_slopes are not supported; pass None and use rotary or another position encoding of q and k")


def _window_mask(causal: bool, window_size: WindowSize) -> Mask:
    """-1 or None is unlimited; causal takes the place of the right side."""
    if not isinstance(window_size, tuple | list) or len(window_size) != 2:
        raise ValueError(f"window_size must be (left, right), -1 being unlimited, got {window_size!r}")
    left, right = (None if side is None or side < 0 else side for side in window_size)
    return Mask.window(left, 0 if causal else right)


def _unpack(packed: Tensor, name: str, dims: int, n: int) -> tuple[Tensor, ...]:
    """The n tensors packed in the third dim from the end."""
    if packed.dim() != dims or packed.shape[-3] != n:
        tokens = "batch, sequence" if dims == 5 else "total tokens"
        raise ValueError(f"{name} must have the shape ({tokens}, {n}, heads, head_dim), got {tuple(packed.shape)}")
    return packed.unbind(-3)


def _borders(cu_seqlens: Tensor, name: str, total: int | None) -> list[int]:
    """The borders as a list; ValueError unless they ascend from 0 to total."""
    if cu_seqlens.dim() != 1 or not len(cu_seqlens) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be int32 (n + 1,), got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}")
    borders: list[int] = cu_seqlens.tolist()
    if borders[0] != 0 or any(b < a for a, b in pairwise(borders)):
        raise ValueError(f"{name} must start at 0 and never descend, got {borders[:8]}{'...' if len(borders) > 8 else ''}")
    if total is not None and borders[-1] != total:
        raise ValueError(f"{name} ends at {borders[-1]}, but its tensor has {total} tokens; they must be the same")
    return borders
