"""A byte-level GPT in plain torch modules, sharded over a context-parallel group: RoPE, RMSNorm, GQA, SwiGLU.

The model never sees the whole sequence. Every rank runs it on its own tokens; only ``rf.attention`` talks to other ranks. So the
code is that of a single-device model with two exceptions: positions are global ones, handed in, and attention is told ``cp``.

Shapes: B batch, S tokens held by this rank, E model width, H query heads, G key/value heads, D head dim, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ringflash as rf
from ringflash.launch.config import ModelConfig

VOCABULARY = 256


@dataclass(frozen=True)
class Context:
    """What one forward pass needs beside the tokens: where they are and who may see whom.

    ``cp`` None runs the whole sequence on this device. ``positions`` is (S,), the global position of each local token.
    ``masks`` holds one mask per layer.
    """

    cp: rf.ContextParallel | None
    positions: Tensor
    masks: Sequence[rf.Mask]
    backend: str = "auto"


def rotary_table(positions: Tensor, head_dim: int, base: float) -> Tensor:
    """cos and sin of RoPE's angles, (2, S, D/2) float32, for global ``positions`` (S,) (Su et al., RoFormer, section 3.2).

    Angles are formed in float64: at a million tokens a float32 angle is off by up to 0.03 rad.
    """
    pairs = torch.arange(head_dim // 2, device=positions.device, dtype=torch.float64)
    angle_SP = positions.to(torch.float64)[:, None] * base ** (-2.0 * pairs / head_dim)
    return torch.stack((angle_SP.cos(), angle_SP.sin())).float()


def rotate(x_BSHD: Tensor, table: Tensor) -> Tensor:
    """Turn each pair (x[d], x[d + D/2]) by its position's angle, in float32 at least; the result has x's dtype."""
    cos, sin = table[:, None, :, None, :]
    a, b = at_least_float32(x_BSHD).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x_BSHD.dtype)


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or as it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Attention(nn.Module):
    """Grouped-query self-attention over the whole group of ranks, with RMS-normalised queries and keys.

    Normalising q and k bounds the scores, which is what allows the high learning rate of a short run.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.q = nn.Linear(config.dim, self.heads * self.head_dim, bias=False)
        self.kv = nn.Linear(config.dim, 2 * self.kv_heads * self.head_dim, bias=False)
        self.out = nn.Linear(self.heads * self.head_dim, config.dim, bias=False)
        self.q_norm, self.k_norm = nn.RMSNorm(self.head_dim), nn.RMSNorm(self.head_dim)

    def forward(self, x_BSE: Tensor, table: Tensor, mask: rf.Mask, context: Context) -> Tensor:
        q = self.q(x_BSE).unflatten(-1, (self.heads, self.head_dim))
        k, v = self.kv(x_BSE).unflatten(-1, (2, self.kv_heads, self.head_dim)).unbind(2)
        # Under autocast q and k are bfloat16 here, while norm and rotation are done in the float32 of their weights and tables.
        q = rotate(self.q_norm(at_least_float32(q)), table).to(v.dtype)
        k = rotate(self.k_norm(at_least_float32(k)), table).to(v.dtype)
        out_BSHD = rf.attention(q, k, v, mask=mask, cp=context.cp, backend=context.backend)
        result: Tensor = self.out(out_BSHD.flatten(2))
        return result


class SwiGLU(nn.Module):
    """Gated feed-forward, ``down(silu(gate x) * up x)`` (Shazeer, GLU Variants Improve Transformer)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_up = nn.Linear(config.dim, 2 * config.ffn_dim, bias=False)
        self.down = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x_BSE: Tensor) -> Tensor:
        gate, up = self.gate_up(x_BSE).chunk(2, dim=-1)
        result: Tensor = self.down(F.silu(gate) * up)
        return result


class Block(nn.Module):
    """Pre-norm residual block. With ``recompute`` the feed-forward part is redone in backward; attention never is: redoing it
    would move every key and value through the ring a second time.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.recompute = config.recompute
        self.attention_norm, self.attention = nn.RMSNorm(config.dim), Attention(config)
        self.ffn_norm, self.ffn = nn.RMSNorm(config.dim), SwiGLU(config)

    def _feed_forward(self, x_BSE: Tensor) -> Tensor:
        result: Tensor = self.ffn(self.ffn_norm(x_BSE))
        return result

    def forward(self, x_BSE: Tensor, table: Tensor, mask: rf.Mask, context: Context) -> Tensor:
        x_BSE = x_BSE + self.attention(self.attention_norm(x_BSE), table, mask, context)
        if self.recompute and torch.is_grad_enabled():
            correction: Tensor = checkpoint(self._feed_forward, x_BSE, use_reentrant=False)
            return x_BSE + correction
        return x_BSE + self._feed_forward(x_BSE)


class GPT(nn.Module):
    """Decoder over bytes: ``forward(tokens_BS, context)`` gives this rank's logits (B, S, V) in float32 (float64 for a float64
    model).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(VOCABULARY, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim)
        self.head = nn.Linear(config.dim, VOCABULARY, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random projections of unit gain; what writes into the residual stream starts at zero, and so do the logits: the first
        loss is ln 256 whatever the depth.
        """
        for name, parameter in self.named_parameters():
            if name == "embedding.weight":
                nn.init.normal_(parameter)
            elif name.endswith(("out.weight", "down.weight", "head.weight")):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=1.0 / math.sqrt(parameter.shape[1]))

    def masks(self, mask: rf.Mask) -> list[rf.Mask]:
        """The mask of every layer: ``mask``, intersected with that layer's window, if the config gives it one (0 is none)."""
        windows = self.config.windows or [0]
        by_window = {w: mask & rf.Mask.causal(window=w) if w else mask for w in windows}
        return [by_window[windows[layer % len(windows)]] for layer in range(self.config.layers)]

    def forward(self, tokens_BS: Tensor, context: Context) -> Tensor:
        x_BSE = self.embedding(tokens_BS)
        table = rotary_table(context.positions, self.config.head_dim, self.config.rope_base)
        for block, mask in zip(self.blocks, context.masks, strict=True):
            x_BSE = block(x_BSE, table, mask, context)
        logits: Tensor = self.head(self.norm(x_BSE))
        return at_least_float32(logits)
