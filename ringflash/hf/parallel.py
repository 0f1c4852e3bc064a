"""A model's forward calls over the ranks of a context."""

from __future__ import annotations

import functools
import hashlib
import inspect
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from ringflash.hf.layers import NAME, PACKED, Pass, current, eager
from ringflash.hf.masks import documents_of, ends_early
from ringflash.mask import Mask
from ringflash.parallel.context import ContextParallel

IGNORED = -100
"""The label of a token without one."""

LAYERS = ("full_attention", "sliding_attention", "chunked_attention")
"""Kinds of layers that see other tokens through attention alone."""
LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Kinds of rotary embeddings whose frequencies depend on the longest position that a call sees."""
SHARDED = ("input_ids", "inputs_embeds", "position_ids", "labels", "shift_labels")
PARALLEL = "ringflash_parallel"
"""A parallelized model's attribute."""


class _Everybody(torch.autograd.Function):
    """The sum of all ranks' shares of a loss, on every rank; its gradient is that of the own share, times a factor."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, group: dist.ProcessGroup, factor: float) -> Tensor:
        ctx.factor = factor
        total = share.detach().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * ctx.factor, None, None


class Parallel:
    """A model whose forward calls are shared by the ranks of a context, until ``remove()``."""

    def __init__(self, model: PreTrainedModel, cp: ContextParallel, factor: float) -> None:
        self.model, self.cp, self.factor = model, cp, factor
        self.config = model.config.get_text_config()
        self.before = model.config._attn_implementation
        self.own = {name: model.__dict__[name] for name in ("forward", "_loss_function") if name in model.__dict__}
        self.whole, self.own_loss = model.forward, model.loss_function
        self.signature = inspect.signature(model.forward)

        @functools.wraps(model.forward)
        def forward(*args: Any, **given: Any) -> Any:
            return self._call(*args, **given)

        model.set_attn_implementation(NAME)
        model.__dict__ |= {"forward": forward, "_loss_function": self._loss, PARALLEL: self}

    def remove(self) -> None:
        """Makes the model what it was. Nothing happens a second time."""
        if self.model.__dict__.get(PARALLEL) is self:
            for name in ("forward", "_loss_function", PARALLEL):
                del self.model.__dict__[name]
            self.model.__dict__ |= self.own
            self.model.set_attn_implementation(self.before)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise ValueError("a parallelized model cannot be copied: remove() what parallelize returned first")

    def _call(self, *args: Any, **given: Any) -> Any:
        words, now = self._enter(args, given)
        token = current.set(now)
        try:
            output = self.whole(**words)
        finally:
            current.reset(token)
        return self._leave(output, now, "labels" in words)

    @eager
    def _enter(self, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[dict[str, Any], Pass]:
        """The arguments of the whole batch -> those of this rank's tokens. Raises ValueError on all ranks if one of them cannot,
        or if they do not have the same batch: they agree before anything is sent."""
        agreement = self.cp.agreement
        try:
            words = self._arguments(args, given)
            documents, padded = self._checked(words)
            B, S = _first(words).shape[:2]
            facts = {"tokens": f"{B} x {S}", "packed sequences": _short(documents), "padding": str(padded)}
            facts |= {name: _print_of(words.get(name)) for name in (*SHARDED, "num_items_in_batch")}
        except Exception as error:  # of whatever kind: the other ranks wait
            agreement.refuse(error)
            raise
        agreement.agree(facts)
        view = self.cp.for_mask(Mask.causal() if documents is None else Mask.documents(documents))  # for a balanced layout
        for name in (n for n in SHARDED if n in words):
            words[name] = view.shard(words[name], dim=1)
        B, local = _first(words).shape[:2]
        # All there: transformers would take the jumps in local positions for the beginnings of packed sequences.
        words |= {"attention_mask": torch.ones(B, local, dtype=torch.long, device=_first(words).device), "use_cache": False}
        return words, Pass(view, self.config, S, documents, padded)

    def _arguments(self, args: tuple[Any, ...], given: dict[str, Any]) -> dict[str, Any]:
        """What was passed, by name, but None."""
        try:
            bound = self.signature.bind(*args, **given)
        except TypeError as error:
            raise ValueError(f"{type(self.model).__name__}: {error}") from None
        words = dict(bound.arguments)
        for name, parameter in self.signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                words |= words.pop(name, {})
            if parameter.kind is inspect.Parameter.VAR_POSITIONAL and words.pop(name, ()):
                raise ValueError("a parallelized model takes its arguments by name")
        return {k: v for k, v in words.items() if v is not None}

    def _checked(self, words: dict[str, Any]) -> tuple[tuple[int, ...] | None, bool]:
        """Fills in positions and labels of the whole batch; lengths of packed sequences, and whether there is padding."""
        for name in ("past_key_values", "cache"):
            if name in words:
                raise ValueError(f"{name}: a parallelized model computes whole sequences; generate with the handle removed")
        keep = words.get("logits_to_keep", 0)
        if isinstance(keep, Tensor) or keep != 0:
            raise ValueError("logits_to_keep counts from the end of the sequence, which one rank holds: select afterwards")
        if words.get("output_router_logits") or getattr(self.config, "output_router_logits", False):
            raise ValueError("output_router_logits: a balancing loss over local tokens is not that of the sequence")
        first = _first(words)
        B, S = first.shape[:2]
        known = (*SHARDED, *PACKED, "attention_mask", "num_items_in_batch")
        if strange := [k for k, v in words.items() if k not in known and isinstance(v, Tensor) and v.dim()]:
            allowed = ", ".join(SHARDED)
            raise ValueError(f"{', '.join(strange)}: ringflash does not know whether to shard it; sharded are {allowed}")
        padding = words.pop("attention_mask", None)
        if padding is not None and (not isinstance(padding, Tensor) or padding.shape != (B, S)):
            got = tuple(padding.shape) if isinstance(padding, Tensor) else type(padding).__name__
            raise ValueError(f"attention_mask must be a tensor (B, S) = {(B, S)}, got {got}")
        documents = _packing(words, B, S, packs=padding is None)
        if "position_ids" not in words:
            if any(hasattr(module, "create_position_ids_from_input_ids") for module in self.model.modules()):
                raise ValueError("this model counts positions by itself, from its padding token on: pass position_ids (B, S)")
            words["position_ids"] = torch.arange(S, device=first.device)[None]
        if words["position_ids"].shape not in ((B, S), (1, S)):
            raise ValueError(f"position_ids must be (B, S) = {(B, S)}, got {tuple(words['position_ids'].shape)}")
        words["position_ids"] = words["position_ids"].expand(B, S)
        padded = padding is not None and ends_early(padding.bool())
        if "labels" in words:
            words.setdefault("shift_labels", F.pad(words["labels"], (0, 1), value=IGNORED)[..., 1:])
            for name in ("labels", "shift_labels"):
                if words[name].shape != (B, S):
                    raise ValueError(f"{name} must be (B, S) = {(B, S)}, one a token, got {tuple(words[name].shape)}")
            if padding is not None and bool(((words["shift_labels"] != IGNORED) & ~padding.bool()).any()):
                raise ValueError(f"padding has labels: its logits are not those of one device; give it {IGNORED}")
            words.setdefault("num_items_in_batch", (words["shift_labels"] != IGNORED).sum().clamp(min=1))
        else:
            words.pop("shift_labels", None)
        if not B or not all(self.cp.for_mask(Mask.causal()).layout_of(S).lengths):
            raise ValueError(f"{B} x {S} tokens leave some of {self.cp.world} ranks none, which transformers cannot compute")
        return documents, padded

    @eager
    def _loss(self, *args: Any, **given: Any) -> Any:
        """The model's loss function, watched."""
        loss = self.own_loss(*args, **given)
        now = current.get()
        if now is not None and now.config is self.config:
            if self.own_loss is not ForCausalLMLoss or given.get("shift_labels") is None:
                name = getattr(self.own_loss, "__name__", repr(self.own_loss))
                raise ValueError(f"{name}: only the mean cross-entropy over tokens (ForCausalLMLoss) can be taken over ranks")
            now.loss = loss
        return loss

    @eager
    def _leave(self, output: Any, now: Pass, labelled: bool) -> Any:
        """The loss of this rank's tokens -> the mean over all ranks'."""
        layers = self.config.num_hidden_layers
        if now.calls < layers:
            raise ValueError(
                f"only {now.calls} of {layers} layers attended through ringflash; others would see this rank's tokens alone"
            )
        if not labelled:
            return output
        share = output[0] if isinstance(output, tuple) else getattr(output, "loss", None)
        if now.loss is None or share is not now.loss:
            raise ValueError(
                f"{type(self.model).__name__} returns another loss than the cross-entropy of its tokens (ForCausalLMLoss), which "
                "cannot be taken over ranks: leave labels out, and see ContextParallel.cross_entropy"
            )
        loss = _Everybody.apply(share, now.cp.group, self.factor)  # type: ignore[no-untyped-call]
        if isinstance(output, tuple):
            return (loss, *output[1:])
        output.loss = loss
        return output


def _first(words: dict[str, Any]) -> Tensor:
    """The input of a batch: (B, S) or (B, S, D)."""
    first = words.get("input_ids", words.get("inputs_embeds"))
    if not isinstance(first, Tensor) or first.dim() < 2:
        raise ValueError("a parallelized model needs input_ids (B, S) or inputs_embeds (B, S, D) of the whole batch")
    return first


def _packing(words: dict[str, Any], B: int, S: int, packs: bool) -> tuple[int, ...] | None:
    """Lengths of packed sequences: of cu_seq_lens_q, or where position ids begin anew, as transformers reads them."""
    ends = words.get("cu_seq_lens_q")
    for name in PACKED:
        words.pop(name, None)
    if ends is not None:
        lengths = torch.diff(ends).tolist()
        if B != 1 or int(ends[0]) or sum(lengths) != S or min(lengths, default=0) < 0:
            raise ValueError(f"cu_seq_lens_q must pack one row of {S} tokens, got a batch of {B} and {ends.tolist()}")
        return tuple(lengths)
    positions = words.get("position_ids")
    return documents_of(positions) if packs and positions is not None and positions.dim() == 2 else None


def _print_of(x: Any) -> str:
    """What tells contents apart: of a tensor a checksum, its sum weighted by place, modulo 2^64."""
    if not isinstance(x, Tensor) or not x.dim():
        return "none" if x is None else str(int(x))
    flat = x.detach().reshape(-1)
    flat = flat.float().view(torch.int32) if flat.is_floating_point() else flat
    places = torch.arange(1, flat.numel() + 1, device=x.device)
    return f"checksum {int((flat.long() * (places * 0x5851F42D + 0x14057B7F)).sum()) % (1 << 64):016x}"


def _short(documents: tuple[int, ...] | None) -> str:
    """Lengths of packed sequences in a few words that tell them apart."""
    if documents is None:
        return "none"
    return f"{len(documents)}, {hashlib.sha1(repr(documents).encode()).hexdigest()[:8]}"


def parallelize(model: PreTrainedModel, cp: ContextParallel, gradients: str = "mean") -> Parallel:
    """Makes a causal language model of transformers compute its share of every batch; ``remove()`` of what it returns undoes it.

    Every rank of ``cp`` then calls the model with the same whole batch: input_ids (or inputs_embeds), labels, position_ids, all
    (B, S), any length that leaves no rank without tokens. Tokens, positions and labels (shifted first) are sharded by the
    context's layout; sequences packed in one row (position ids that begin anew, without attention_mask; or cu_seq_lens_q) see
    only themselves, and a "balanced" layout balances them. Out come the logits of the local tokens (``cp.for_mask(..).unshard``
    puts them together) and the loss, the mean over all ranks' tokens, on every rank (0 if no token has a label). Padding may
    stand at the ends of sequences; its logits are not those of one device.

    gradients: "mean" where parameter gradients are then averaged over the ranks, as DDP and FSDP do; "sum" where they are summed.

    Raises ValueError for models that mix tokens other than by attention, or whose positions do not come from position_ids alone;
    and when called, on all ranks, for what cannot be computed exactly and for batches that are not the same on all of them.
    """
    if gradients not in ("mean", "sum"):
        raise ValueError(f'gradients must be "mean" (averaged over ranks) or "sum", got {gradients!r}')
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"{type(model).__name__} is no model of transformers; of a wrapper (PEFT, DDP) give what is inside")
    if PARALLEL in model.__dict__:
        raise ValueError("the model is parallelized already: remove() what parallelize returned first")
    text = model.config.get_text_config()
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError("encoder-decoder models are not supported")
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise ValueError(f"{type(model).__name__} takes no position_ids: ranks could not tell it where their tokens stand")
    if other := sorted(set(getattr(text, "layer_types", None) or ()) - set(LAYERS)):
        raise ValueError(f"layers of kind {', '.join(other)} mix tokens without attention; supported are {', '.join(LAYERS)}")
    if kind := next((k for k in _rope_types(text) if k in LENGTH_DEPENDENT), None):
        raise ValueError(f'rope_type "{kind}" depends on the longest position of a call, which differs between ranks')
    if getattr(text, "attn_temperature_tuning", False) and not all(getattr(text, "no_rope_layers", None) or [1]):
        raise ValueError("attn_temperature_tuning: layers without rotary embedding count positions from this rank's first token")
    if getattr(text, "output_router_logits", False):
        raise ValueError("output_router_logits: a balancing loss over local tokens is not that of the sequence; set it to False")
    return Parallel(model, cp, float(cp.world) if gradients == "mean" else 1.0)


def _rope_types(config: Any) -> list[str]:
    """All kinds of rotary embeddings that a configuration names, of all kinds of layers."""
    found: list[str] = []
    waiting = [getattr(config, name, None) for name in ("rope_parameters", "rope_scaling")]
    while waiting:
        here = waiting.pop()
        if isinstance(here, dict):
            found += [here[k] for k in ("rope_type", "type") if isinstance(here.get(k), str)]
            waiting += [v for v in here.values() if isinstance(v, dict)]
    return found
