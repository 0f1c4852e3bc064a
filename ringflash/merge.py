"""The merge of partial results: where attention over two sets of keys becomes attention over their union.

A pair ``(out, lse)`` stands for the unnormalised sum ``exp(lse) * out`` and its weight ``exp(lse)``. Merging adds both, so it is
associative and commutative, and ``(0, -inf)`` is its unit. (The same identity is behind FlashAttention's split over keys,
arXiv:2205.14135 section 3, and ring attention, arXiv:2310.01889.)
"""

from __future__ import annotations

import torch
from torch import Tensor


def merge_(out: Tensor, lse: Tensor, out_part: Tensor, lse_part: Tensor) -> None:
    """Merges ``(out_part, lse_part)`` into ``(out, lse)`` in place:

        lse' = log(exp(lse) + exp(lse_part)),    out' = out * exp(lse - lse') + out_part * exp(lse_part - lse')

    out, out_part: (B, S, H, Dv), lse, lse_part: (B, H, S), any strides. out, lse and lse_part have the accumulate dtype (float32
    or float64), out_part any floating dtype. Nothing overflows at any lse, two empty rows stay empty without a NaN, and the
    side of a row whose lse is -inf is not read.
    """
    if out.is_cuda:
        from ringflash import ops  # noqa: F401  (registers the operator; it takes the formula from here)

        torch.ops.ringflash.merge_(out, lse, out_part, lse_part)
    else:
        merge_torch_(out, lse, out_part, lse_part)


def merge_torch_(out: Tensor, lse: Tensor, out_part: Tensor, lse_part: Tensor) -> None:
    """The same in plain torch."""
    # From the difference, which is exact for close values, not from lse': at lse = 1e4, float32 knows lse' only to 1e-3, and
    # weights formed with it would not add up to 1.
    difference = lse_part - lse
    # 0, or NaN for an lse of +inf, as one pass over all keys would give.
    infinite = torch.relu(lse).mul_(0.0).add_(torch.relu(lse_part).mul_(0.0))
    weight_part = torch.sigmoid(difference).add_(infinite)
    weight = torch.sigmoid(-difference).add_(infinite)
    empty, empty_part = lse.isneginf(), lse_part.isneginf()
    lse.copy_(torch.logaddexp(lse, lse_part))
    if out.is_cuda or bool((empty | empty_part).any()):  # on CUDA, asking would wait for the device
        both = empty & empty_part  # -inf - -inf
        weight.masked_fill_(both, 0.0)
        weight_part.masked_fill_(both, 0.0)
        out.masked_fill_(_per_row(empty), 0.0)
        out_part = out_part.masked_fill(_per_row(empty_part), 0.0)
    out.mul_(_per_row(weight)).addcmul_(out_part.to(out.dtype), _per_row(weight_part))


def _per_row(x_BHS: Tensor) -> Tensor:
    """(B, H, S) -> (B, S, H, 1)."""
    return x_BHS.transpose(1, 2).unsqueeze(-1)
