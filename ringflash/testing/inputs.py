"""Random tensors of a case, the same for the same case on every rank; and the same tensors in other storage."""

from __future__ import annotations

import torch
from torch import Tensor

from ringflash.testing.cases import Case
from ringflash.testing.oracle import Inputs


def make_inputs(case: Case, device: torch.device | str = "cpu") -> Inputs:
    """Normally distributed tensors in the case's dtype (dlse in the dtype of the LSE)."""
    generator = torch.Generator().manual_seed(case.seed)
    dtype = case.torch_dtype
    lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(device)

    b, h, g = case.batch, case.heads, case.kv_heads
    return Inputs(
        q=normal(b, case.q_len, h, case.head_dim),
        k=normal(b, case.k_len, g, case.head_dim),
        v=normal(b, case.k_len, g, case.head_dim_v),
        dout=normal(b, case.q_len, h, case.head_dim_v),
        sinks=normal(h, dtype=lse_dtype) if case.sinks else None,
        dlse=normal(b, h, case.q_len, dtype=lse_dtype) if case.dlse else None,
    )


def spread(x: Tensor, how: str) -> Tensor:
    """The same values (B, S, H, D) with other strides, NaN between them."""
    if how == "every third row":
        longer = x.new_full((x.shape[0], 3 * x.shape[1], *x.shape[2:]), torch.nan)
        longer[:, 1::3] = x
        return longer[:, 1::3]
    if how == "heads first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "batch inside":
        return x.movedim(0, 2).contiguous().movedim(2, 0)
    if how == "every second element":
        return torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]
    assert how == "inside a wider dim", how  # and so off any alignment
    wider = x.new_full((*x.shape[:-1], x.shape[-1] + 3), torch.nan)
    wider[..., 1:-2] = x
    return wider[..., 1:-2]
