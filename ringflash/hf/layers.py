"""What layers of transformers' models call: a mask once a forward pass, attention once a layer."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from ringflash.api import attention
from ringflash.hf.masks import Words, documents_of, ends_early, lengths_of, read
from ringflash.mask import Mask
from ringflash.parallel.context import ContextParallel

NAME = "ring_attention"
"""For ``attn_implementation``. Not "ringflash": transformers takes every name with "flash" in it for FlashAttention."""

PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""What says where packed sequences begin, beside position ids (DataCollatorWithFlattening)."""
HARMLESS = (
    *PACKED, "position_ids", "cache_position", "use_cache", "output_hidden_states", "output_router_logits", "return_dict",
    "labels", "shift_labels", "num_items_in_batch", "logits_to_keep", "is_causal", "position_embeddings", "layer_idx",
)  # fmt: skip
"""What layers pass on to attention that does not change it, or is in the mask already."""

T = TypeVar("T", bound=Callable[..., Any])


def eager(function: T) -> T:
    """Not for torch.compile to trace: plans and handshakes are Python, and the kernels are compiled already."""
    return torch.compiler.disable(function)  # type: ignore[no-any-return]


@dataclass
class Pass:
    """One forward call of a parallelized model, until it returns."""

    cp: ContextParallel
    config: Any
    """Of the text model; another model's layers are not its own."""
    seqlen: int
    documents: tuple[int, ...] | None
    """Lengths of packed sequences."""
    padded: bool
    """Whether sequences of the batch end early."""
    calls: int = 0
    """Of the attention function."""
    loss: Tensor | None = None
    """This rank's share, as the model's loss function returned it."""


@dataclass(frozen=True)
class Seen:
    """What a model hands to its layers in place of a mask tensor.

    q_length, kv_length: of the tensors that it is for. documents: lengths of packed sequences, if these are known. packs: whether
    position ids may still tell them: some models, such as gpt-oss, ask for no mask of packed sequences. of: the pass of a
    parallelized model.
    """

    words: Words
    q_length: int
    kv_length: int
    documents: tuple[int, ...] | None = None
    packs: bool = False
    of: Pass | None = None

    def mask(self, position_ids: Any) -> Mask:
        documents = self.documents
        if documents is None and self.packs and isinstance(position_ids, Tensor) and position_ids.dim() == 2:
            documents = documents_of(position_ids)
        return self.words.mask(documents)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):
            raise AttributeError(name)
        raise ValueError(f"the model looks into its mask (.{name}), which {NAME} never makes: this model is not supported")

    def __getitem__(self, key: object) -> NoReturn:
        raise ValueError(f"the model cuts its mask, which {NAME} never makes: this model is not supported")


current: ContextVar[Pass | None] = ContextVar("ringflash_hf_pass", default=None)
"""The forward call that is being computed."""


@eager
def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    config: Any = None,
    **_: Any,
) -> Seen:
    """What transformers calls to have a mask made, once a forward call and kind of layer (AttentionMaskInterface).

    Raises ValueError for masks that are not supported.
    """
    if mask_function is None:
        raise ValueError("transformers passed no mask function: a version of it that ringflash does not know")
    words, now = read(mask_function), current.get()
    if now is not None and config is now.config:
        if now.padded and not words.causal:
            raise ValueError("padding needs a causal mask, under which nobody sees what stands behind: pack sequences instead")
        return Seen(words, q_length, kv_length, now.documents, of=now)
    if int(q_offset) + int(q_length) != int(kv_offset) + int(kv_length):
        raise ValueError(
            f"keys {kv_offset} to {kv_offset + kv_length - 1} do not end with queries {q_offset} to {q_offset + q_length - 1}: "
            "caches of a fixed length, and attention between two sequences, are not supported"
        )
    if words.chunk is not None and (q_offset or kv_offset):
        raise ValueError("chunked attention over a cache is not supported: it depends on where the first key stands")
    if attention_mask is not None and ends_early(attention_mask.bool()) and not (words.causal and q_length == kv_length):
        raise ValueError("padding needs a causal mask and no cache: pack sequences, or generate for one length at a time")
    packs = words.causal and attention_mask is None and not q_offset and q_length == kv_length
    documents = None if words.packed is None else lengths_of(words.packed)
    return Seen(words, int(q_length), int(kv_length), documents, packs)


@eager
def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **further: Any,
) -> tuple[Tensor, None]:
    """What a layer calls (AttentionInterface): query (B, H, S, D), key and value (B, Hkv, S, D) -> (B, S, H, D).

    s_aux: attention sinks (H,). Raises ValueError for what cannot be done exactly.
    """
    where = type(module).__name__
    if not isinstance(attention_mask, Seen):
        raise ValueError(
            f"{where} was given {type(attention_mask).__name__} as its mask, not what ringflash.hf made: ready-made masks, and "
            "models that make their own, are not supported"
        )
    if dropout:
        raise ValueError(f"{where}: attention dropout is not supported, got {dropout}; set attention_dropout=0")
    if strange := [name for name, x in further.items() if x is not None and x is not False and name not in HARMLESS]:
        raise ValueError(f"{where} passes {', '.join(strange)} to its attention, which {NAME} does not know")
    seen, now = attention_mask, attention_mask.of
    if (query.shape[2], key.shape[2]) != (seen.q_length, seen.kv_length):
        given = f"{query.shape[2]} queries and {key.shape[2]} keys"
        raise ValueError(f"{where} has {given}, but its mask is for {seen.q_length} and {seen.kv_length}")
    if sliding_window is not None and not seen.words.bounded and sliding_window < (now.seqlen if now else seen.kv_length):
        raise ValueError(f"{where} has a window of {sliding_window}, but the mask it was given has none")
    mask = seen.mask(further.get("position_ids"))
    if torch.is_autocast_enabled(query.device.type):  # rotary embeddings come in float32, as for torch's own attention
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    if now is not None:
        now.calls += 1
    out = attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        mask=mask,
        scale=scaling,
        softcap=softcap or 0.0,
        sinks=s_aux,
        cp=None if now is None else now.cp,
    )
    assert isinstance(out, Tensor)
    return out, None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, make_mask)
