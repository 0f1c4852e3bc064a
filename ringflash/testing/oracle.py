"""The oracle: dense attention on the whole sequence, written as its formula, in any dtype.

In float64 it is what results are compared with; in the dtype of a case it is the plain torch computation whose own error says
how large an error is fair (see ``tolerance.py``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ringflash.mask import Mask

SCORES = 1 << 22
"""Scores the formula holds at once, where one key head has no more: 32 MiB in float64, of which a gradient holds ten. Heads are
independent, and small tensors are quicker, too: 1.8 -> 1.4 s for 8 heads and 1,024 tokens on one core."""


@dataclass(frozen=True)
class Inputs:
    """Whole-sequence tensors of one attention call and the gradients that flow into its results."""

    q: Tensor  # (B, Sq, H, D)
    k: Tensor  # (B, Sk, Hkv, D)
    v: Tensor  # (B, Sk, Hkv, Dv)
    sinks: Tensor | None  # (H,)
    dout: Tensor  # (B, Sq, H, Dv)
    dlse: Tensor | None  # (B, H, Sq); None: the LSE is not differentiated


@dataclass(frozen=True)
class Results:
    """What one attention call gives, and its gradients."""

    out: Tensor  # (B, Sq, H, Dv)
    lse: Tensor  # (B, H, Sq)
    dq: Tensor  # (B, Sq, H, D)
    dk: Tensor  # (B, Sk, Hkv, D)
    dv: Tensor  # (B, Sk, Hkv, Dv)
    dsinks: Tensor | None  # (H,)

    def items(self) -> list[tuple[str, Tensor]]:
        """(name, tensor) of everything that is there."""
        found = [(f.name, getattr(self, f.name)) for f in fields(self)]
        return [(name, tensor) for name, tensor in found if tensor is not None]

    def cpu(self) -> Results:
        """The same in host memory."""
        dsinks = None if self.dsinks is None else self.dsinks.cpu()
        return Results(self.out.cpu(), self.lse.cpu(), self.dq.cpu(), self.dk.cpu(), self.dv.cpu(), dsinks)


def by_heads(inputs: Inputs) -> list[Inputs]:
    """The inputs as they are, or of each key head and its query heads alone where all scores are more than SCORES."""
    b, rows, heads = inputs.q.shape[:3]
    keys, n = inputs.k.shape[1:3]
    if n < 2 or b * heads * rows * keys <= SCORES:
        return [inputs]
    split = (inputs.q.tensor_split(n, 2), inputs.k.tensor_split(n, 2), inputs.v.tensor_split(n, 2))
    sinks = [None] * n if inputs.sinks is None else inputs.sinks.tensor_split(n)
    dlse = [None] * n if inputs.dlse is None else inputs.dlse.tensor_split(n, 1)
    return [Inputs(*x) for x in zip(*split, sinks, inputs.dout.tensor_split(n, 2), dlse, strict=True)]


def joined(parts: Sequence[Results]) -> Results:
    """Results of all heads from those of ``by_heads``."""
    if len(parts) == 1:
        return parts[0]
    dims = {"out": 2, "lse": 1, "dq": 2, "dk": 2, "dv": 2, "dsinks": 0}
    whole = {name: torch.cat([getattr(part, name) for part in parts], dims[name]) for name, _ in parts[0].items()}
    dsinks = whole.pop("dsinks", None)
    return Results(dsinks=dsinks, **whole)


def visibility(mask: Mask, q_len: int, k_len: int) -> Tensor:
    """(q_len, k_len) bool: the mask on the whole sequence, the queries at the end of the keys."""
    k_pos = torch.arange(k_len)
    return mask.visible(torch.arange(q_len) + k_len - q_len, k_pos)


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``out = softmax(mask(cap(scale q k^T)), sink) v`` and ``lse = log(sum exp(scores) + exp(sink))``.

    visible: (Sq, Sk) bool. Shapes as in Inputs; everything is computed in the dtype of q. cap(s) = softcap * tanh(s / softcap),
    the identity for softcap 0. A row that sees nothing has out 0, lse -inf (with sinks: its sink) and passes no gradient.
    """
    heads, group = q.shape[2], q.shape[2] // max(k.shape[2], 1)
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = (q @ k.transpose(-1, -2)) * scale  # (B, H, Sq, Sk)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        column = sinks.to(scores.dtype).reshape(1, heads, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], dim=-1)  # a key that takes weight and gives nothing
        lse = scores.logsumexp(-1)
        weights = scores.softmax(-1)[..., :-1]
    else:
        lonely = ~visible.any(-1)  # (Sq,); a softmax over nothing is NaN, in its gradient too, so these rows get another one
        lse = scores.masked_fill(lonely[:, None], 0.0).logsumexp(-1) if visible.shape[1] else scores.sum(-1)
        lse = lse.masked_fill(lonely, -torch.inf)
        weights = scores.masked_fill(lonely[:, None], 0.0).softmax(-1).masked_fill(lonely[:, None], 0.0)
    return (weights @ v).transpose(1, 2), lse


def dense_results(
    inputs: Inputs, visible: Tensor, *, dtype: torch.dtype, scale: float | None = None, softcap: float = 0.0
) -> Results:
    """Forward and all gradients of ``dense_attention`` with every tensor, incoming gradients included, in ``dtype``."""
    return joined([_results(x, visible, dtype, scale, softcap) for x in by_heads(inputs)])


def dense_lse(inputs: Inputs, visible: Tensor, *, dtype: torch.dtype, scale: float | None = None, softcap: float = 0.0) -> Tensor:
    """The log-sum-exp of ``dense_results`` alone."""
    found = []
    for x in by_heads(inputs):
        q, k, v = (t.detach().to(dtype) for t in (x.q, x.k, x.v))
        sinks = None if x.sinks is None else x.sinks.detach().to(dtype)
        found.append(dense_attention(q, k, v, visible, scale=scale, softcap=softcap, sinks=sinks)[1])
    return torch.cat(found, 1)


def _results(inputs: Inputs, visible: Tensor, dtype: torch.dtype, scale: float | None, softcap: float) -> Results:
    leaves = [x.detach().to(dtype).requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    if inputs.sinks is not None:
        leaves.append(inputs.sinks.detach().to(dtype).requires_grad_())
    sinks = leaves[3] if inputs.sinks is not None else None
    q, k, v = leaves[:3]
    out, lse = dense_attention(q, k, v, visible, scale=scale, softcap=softcap, sinks=sinks)
    roots, grads = [out], [inputs.dout.to(dtype)]
    if inputs.dlse is not None:
        roots.append(lse)
        grads.append(inputs.dlse.to(dtype))
    dq, dk, dv, *dsinks = torch.autograd.grad(roots, leaves, grads)
    return Results(out.detach(), lse.detach(), dq, dk, dv, dsinks[0] if dsinks else None)


def magnitudes(inputs: Inputs, visible: Tensor, *, scale: float | None = None, softcap: float = 0.0) -> tuple[Results, Results]:
    """How large the summed terms of each result are: the scale of its rounding errors, in float64.

    Every result is a sum, and a sum whose terms are each rounded by a relative ``eps`` is off by at most ``eps`` times the sum of
    their absolute values, however much they cancel. Returns two sets of such sums: for what is rounded to the tensors' dtype (the
    factors of the second product, the result), and for what is rounded to the accumulate dtype: the scores, whose absolute
    error becomes the relative error of the weights (``d exp(s) = exp(s) ds``), the slope of the cap, and the LSE.
    """
    rounded, accumulated = zip(*(_magnitudes(x, visible, scale, softcap) for x in by_heads(inputs)), strict=True)
    return joined(rounded), joined(accumulated)


def _magnitudes(inputs: Inputs, visible: Tensor, scale: float | None, softcap: float) -> tuple[Results, Results]:
    doubles = Inputs(*(None if x is None else x.detach().double() for x in vars(inputs).values()))  # type: ignore[arg-type]
    q, k, v, dout = (x.transpose(1, 2) for x in (doubles.q, doubles.k, doubles.v, doubles.dout))
    group = q.shape[1] // max(k.shape[1], 1)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    _, lse = dense_attention(doubles.q, doubles.k, doubles.v, visible, scale=scale, softcap=softcap, sinks=doubles.sinks)

    score = q @ k.transpose(-1, -2) * scale  # (B, H, Sq, Sk), as all that follow
    slope = torch.ones_like(score)
    if softcap:
        score = softcap * torch.tanh(score / softcap)
        slope = 1 - (score / softcap) ** 2
    weight = torch.where(visible, (score - lse[..., None]).exp(), 0.0)
    # Our kernels for 16-bit inputs take tanh(x) as 1 - 2 / (1 + exp 2x): two terms of up to 1, so a capped score is known to 2
    # eps of the cap; what backend computed is not known here. (A polynomial for small scores would know it to eps of itself, and
    # takes 8-15 % of the forward: LOG.md.)
    cap_size = 2 * softcap if inputs.q.dtype in (torch.bfloat16, torch.float16) else 0.0
    score_size = torch.where(visible, q.abs() @ k.abs().transpose(-1, -2) * abs(scale) + cap_size, 0.0)
    row_size = score_size.amax(-1, keepdim=True) if score.shape[-1] else score_size.sum(-1, keepdim=True)
    jitter = 1 + score_size + row_size  # a weight errs with its own score and with the row's LSE
    dweight = dout.abs() @ v.abs().transpose(-1, -2)
    delta = (dout.abs() * (weight @ v.abs())).sum(-1, keepdim=True)
    if doubles.dlse is not None:
        delta = delta + doubles.dlse.abs()[..., None]
    dscore = weight * (dweight + delta) * abs(scale)

    def summed(weight: Tensor, dscore: Tensor, delta: Tensor, lse_size: Tensor) -> Results:
        out, dq = weight @ v.abs(), dscore @ k.abs()
        dk, dv = dscore.transpose(-1, -2) @ q.abs(), weight.transpose(-1, -2) @ dout.abs()
        dk, dv = (x.reshape(len(x), -1, group, *x.shape[2:]).sum(2) for x in (dk, dv))
        out, dq, dk, dv = (x.transpose(1, 2) for x in (out, dq, dk, dv))
        dsinks = None
        if doubles.sinks is not None:
            dsinks = ((doubles.sinks[:, None] - lse).exp() * delta[..., 0]).sum((0, 2))
        return Results(out, lse_size, dq, dk, dv, dsinks)

    lse_size = 1 + lse.masked_fill(lse == -torch.inf, 0.0).abs() + row_size[..., 0]
    return (
        summed(weight, dscore * slope, delta, torch.zeros_like(lse)),
        summed(weight * jitter, dscore * jitter, delta * jitter.amax(-1, keepdim=True) if score.shape[-1] else delta, lse_size),
    )
