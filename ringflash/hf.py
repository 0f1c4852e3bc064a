"""Hugging Face models on ringflash: one device by ``attn_implementation``, many by one line.

    import ringflash.hf

    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation=ringflash.hf.NAME)  # one device
    ringflash.hf.parallelize(model, cp)  # every rank calls it with the whole batch and computes its share of the tokens
    loss = model(input_ids=ids, labels=ids).loss  # the mean over all ranks' tokens, on every rank

A model's own mask reaches the kernels: `transformers` hands its mask functions to the attention implementation, and what they say
(causal, sliding window, chunks, packed sequences) becomes a `Mask`. Position ids that begin anew, without attention_mask, always
part packed sequences, also in models and calls whose eager attention lets them see each other (gpt-oss; a prompt with a cache).
What is not understood is refused; nothing is dropped.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from ringflash.api import attention
from ringflash.mask import Mask
from ringflash.parallel.context import ContextParallel

NAME = "ring_attention"
"""For ``attn_implementation``. Not "ringflash": transformers takes every name with "flash" in it for FlashAttention."""

IGNORED = -100
"""The label of a token without one."""

LAYERS = ("full_attention", "sliding_attention", "chunked_attention")
"""Kinds of layers that see other tokens through attention alone."""
LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Kinds of rotary embeddings whose frequencies depend on the longest position that a call sees."""
SHARDED = ("input_ids", "inputs_embeds", "position_ids", "labels", "shift_labels")
PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""What says where packed sequences begin, beside position ids (DataCollatorWithFlattening)."""
HARMLESS = (
    *PACKED, "position_ids", "cache_position", "use_cache", "output_hidden_states", "output_router_logits", "return_dict",
    "labels", "shift_labels", "num_items_in_batch", "logits_to_keep", "is_causal", "position_embeddings", "layer_idx",
)  # fmt: skip
"""What layers pass on to attention that does not change it, or is in the mask already."""


FACTS = ("sizes", "packed sequences", "padding", *SHARDED, "num_items_in_batch")
"""Of a batch: what ranks compare."""
PARALLEL = "ringflash_parallel"
"""A parallelized model's attribute."""

T = TypeVar("T", bound=Callable[..., Any])


def _eager(function: T) -> T:
    """Not for torch.compile to trace: plans and handshakes are Python, and the kernels are compiled already."""
    return torch.compiler.disable(function)  # type: ignore[no-any-return]


@dataclass
class _Pass:
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
class _Seen:
    """What a model hands to its layers in place of a mask tensor.

    q_length, kv_length: of the tensors that it is for. documents: lengths of packed sequences, if these are known. packs: whether
    position ids may still tell them: some models, such as gpt-oss, ask for no mask of packed sequences. of: the pass of a
    parallelized model.
    """

    words: _Words
    q_length: int
    kv_length: int
    documents: tuple[int, ...] | None = None
    packs: bool = False
    of: _Pass | None = None

    def mask(self, position_ids: Any) -> Mask:
        documents = self.documents
        if documents is None and self.packs and isinstance(position_ids, Tensor) and position_ids.dim() == 2:
            documents = _documents(position_ids)
        return self.words.mask(documents)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):
            raise AttributeError(name)
        raise ValueError(f"the model looks into its mask (.{name}), which {NAME} never makes: this model is not supported")

    def __getitem__(self, key: object) -> NoReturn:
        raise ValueError(f"the model cuts its mask, which {NAME} never makes: this model is not supported")


_current: ContextVar[_Pass | None] = ContextVar("ringflash_hf_pass", default=None)


# What a mask function says


@dataclass(frozen=True)
class _Words:
    """A mask function of transformers.masking_utils, read. ``window``: keys before a query that it sees, itself included;
    ``around``: distance on both sides; ``packed``: which sequence each token is in, (B, S)."""

    causal: bool = False
    window: int | None = None
    around: int | None = None
    chunk: int | None = None
    packed: Tensor | None = None

    def __and__(self, other: _Words) -> _Words:
        def least(a: int | None, b: int | None) -> int | None:
            return min((x for x in (a, b) if x is not None), default=None)

        if self.chunk is not None and other.chunk is not None and self.chunk != other.chunk:
            raise ValueError(f"chunks of {self.chunk} and of {other.chunk} tokens in one mask are not supported")
        return _Words(
            self.causal or other.causal,
            least(self.window, other.window),
            least(self.around, other.around),
            self.chunk if self.chunk is not None else other.chunk,
            self.packed if self.packed is not None else other.packed,
        )

    @property
    def bounded(self) -> bool:
        """Whether there is a bound on how far a query sees."""
        return (self.window, self.around, self.chunk) != (None, None, None)

    def mask(self, documents: tuple[int, ...] | None) -> Mask:
        """The Mask; documents: lengths of packed sequences."""
        if documents is not None and self.chunk is not None:
            raise ValueError("chunked attention over packed sequences is not supported: chunks would begin anew in each of them")
        if self.window is not None and not self.causal:
            raise ValueError("a window of keys before the query is supported with a causal mask only")
        mask = Mask.causal(self.window) if self.causal else Mask.full()
        if documents is not None:
            mask = Mask.documents(documents, causal=self.causal, window=self.window)
        if self.around is not None:
            mask = mask & Mask.window(self.around, self.around)
        return mask if self.chunk is None else mask & Mask.chunked(self.chunk)


def _read_chunks(chunk_size: int, left_padding: Tensor) -> _Words:
    if bool((left_padding != 0).any()):
        raise ValueError("chunked attention with padding on the left is not supported: pad on the right")
    return _Words(chunk=int(chunk_size))


READERS: dict[str, Callable[..., _Words]] = {
    "causal_mask_function": lambda: _Words(causal=True),
    "bidirectional_mask_function": _Words,
    "and_masks.<locals>.and_mask": lambda mask_functions: _read_all(mask_functions),
    "sliding_window_overlay.<locals>.inner_mask": lambda sliding_window: _Words(window=int(sliding_window)),
    "sliding_window_bidirectional_overlay.<locals>.inner_mask": lambda sliding_window: _Words(around=int(sliding_window)),
    "chunked_overlay.<locals>.inner_mask": _read_chunks,
    # Distances inside a sequence are those of the whole row: but for chunks, which are refused, positions need not begin anew.
    "remap_positions_for_packed_sequence.<locals>.inner_mask": lambda mask_function, position_ids: _read(mask_function),
    "packed_sequence_mask_function.<locals>.inner_mask": lambda packed_sequence_mask: _Words(packed=packed_sequence_mask),
}
"""By the name of a function of transformers.masking_utils: what it says, from what it captured."""


def _read(function: Callable[..., Any]) -> _Words:
    name = getattr(function, "__qualname__", repr(function))
    captured = dict(inspect.getclosurevars(function).nonlocals) if inspect.isfunction(function) else {}
    reader = READERS.get(name) if getattr(function, "__module__", "") == "transformers.masking_utils" else None
    if reader is None or not inspect.signature(reader).parameters.keys() >= captured.keys():
        raise ValueError(
            f"the model's mask has {name} in it, which ringflash does not know; known are causal and bidirectional masks, "
            'sliding windows, chunks and packed sequences. Use attn_implementation="sdpa" for this model'
        )
    return reader(**captured)


def _read_all(functions: Iterable[Callable[..., Any]]) -> _Words:
    words = _Words()
    for function in functions:
        words = words & _read(function)
    return words


@_eager
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
) -> _Seen:
    """What transformers calls to have a mask made, once a forward call and kind of layer (AttentionMaskInterface).

    Raises ValueError for masks that are not supported.
    """
    if mask_function is None:
        raise ValueError("transformers passed no mask function: a version of it that ringflash does not know")
    words, now = _read(mask_function), _current.get()
    if now is not None and config is now.config:
        if now.padded and not words.causal:
            raise ValueError("padding needs a causal mask, under which nobody sees what stands behind: pack sequences instead")
        return _Seen(words, q_length, kv_length, now.documents, of=now)
    if int(q_offset) + int(q_length) != int(kv_offset) + int(kv_length):
        raise ValueError(
            f"keys {kv_offset} to {kv_offset + kv_length - 1} do not end with queries {q_offset} to {q_offset + q_length - 1}: "
            "caches of a fixed length, and attention between two sequences, are not supported"
        )
    if words.chunk is not None and (q_offset or kv_offset):
        raise ValueError("chunked attention over a cache is not supported: it depends on where the first key stands")
    if attention_mask is not None and _ends_early(attention_mask.bool()) and not (words.causal and q_length == kv_length):
        raise ValueError("padding needs a causal mask and no cache: pack sequences, or generate for one length at a time")
    packs = words.causal and attention_mask is None and not q_offset and q_length == kv_length
    documents = None if words.packed is None else _lengths(words.packed)
    return _Seen(words, int(q_length), int(kv_length), documents, packs)


def _ends_early(attention_mask: Tensor) -> bool:
    """Whether rows of a bool (B, S) have padding. ValueError where it is not at their ends."""
    if bool(attention_mask.all()):
        return False
    if bool((attention_mask[:, 1:] & ~attention_mask[:, :-1]).any()) or not bool(attention_mask[:, 0].all()):
        raise ValueError("padding must stand at the ends of sequences (padding_side='right'); or pack sequences in one row")
    return True


def _lengths(sequence: Tensor) -> tuple[int, ...]:
    """Lengths of packed sequences, from which one each token is in, (B, S); the same in all rows, or ValueError."""
    if bool((sequence != sequence[:1]).any()):
        raise ValueError("rows of a batch that are packed differently are not supported: pack all sequences in one row")
    return tuple(torch.unique_consecutive(sequence[0], return_counts=True)[1].tolist())


_packed = WeakTensorKeyDictionary()
"""Of position ids that were looked at, with their version: all layers of a call get the same ones, and a look is a wait."""


def _documents(position_ids: Tensor) -> tuple[int, ...] | None:
    """Lengths of packed sequences, where position ids (B, S) begin anew; None where they do not."""
    counted = not position_ids.is_inference()  # those of inference mode have no version
    version: int
    documents: tuple[int, ...] | None
    version, documents = _packed.get(position_ids, (-1, None)) if counted else (-1, None)
    if version < 0 or version != position_ids._version:
        documents = None
        if position_ids.shape[1]:
            jumps = torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1) != 1
            documents = _lengths(jumps.cumsum(-1)) if bool(jumps.any()) else None
        if counted:
            _packed[position_ids] = position_ids._version, documents
    return documents


@_eager
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
    if not isinstance(attention_mask, _Seen):
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


# Over ranks


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
        token = _current.set(now)
        try:
            output = self.whole(**words)
        finally:
            _current.reset(token)
        return self._leave(output, now, "labels" in words)

    @_eager
    def _enter(self, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[dict[str, Any], _Pass]:
        """The arguments of the whole batch -> those of this rank's tokens. Raises the same ValueError on all ranks, or on all
        that one of them did, if one rank cannot, or if they do not have the same batch."""
        words: dict[str, Any] = {}
        error: Exception | None = None
        facts: dict[str, Tensor | int] = dict.fromkeys(FACTS, 0)
        documents, padded = None, False
        try:
            words = self._arguments(args, given)
            documents, padded = self._checked(words)
            facts |= {"sizes": _digest(_first(words).shape), "packed sequences": _digest(documents), "padding": padded}
            facts |= {name: _print_of(words[name]) for name in FACTS if name in words}
        except Exception as found:  # of whatever kind: the other ranks wait
            error = found
        self._agree(facts, error)
        S = _first(words).shape[1]
        view = self.cp.for_mask(Mask.causal() if documents is None else Mask.documents(documents))  # for a balanced layout
        for name in (n for n in SHARDED if n in words):
            words[name] = view.shard(words[name], dim=1)
        B, local = _first(words).shape[:2]
        # All there: transformers would take the jumps in local positions for the beginnings of packed sequences.
        words |= {"attention_mask": torch.ones(B, local, dtype=torch.long, device=_first(words).device), "use_cache": False}
        return words, _Pass(view, self.config, S, documents, padded)

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
        padded = padding is not None and _ends_early(padding.bool())
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

    def _agree(self, facts: dict[str, Tensor | int], error: Exception | None) -> None:
        """Raises the own error, or a ValueError if another rank has one or another batch; every rank asks in every call, before
        anything else is sent."""
        device = next(self.model.parameters()).device
        said = torch.stack([torch.as_tensor(x, device=device, dtype=torch.int64) for x in (error is not None, *facts.values())])
        everybody = said.new_empty((self.cp.world, len(said)))
        dist.all_gather_into_tensor(everybody.view(-1), said, group=self.cp.group)
        if error is not None:
            raise error
        rows = everybody.tolist()
        if refused := [str(rank) for rank, row in enumerate(rows) if row[0]]:
            raise ValueError(f"rank {', '.join(refused)} refused this call: its own error says why")
        for rank, row in enumerate(rows):
            if differ := [name for name, a, b in zip(facts, row[1:], rows[0][1:], strict=True) if a != b]:
                raise ValueError(
                    f"ranks 0 and {rank} were not given the same batch; what differs: {', '.join(differ)}. Every rank of a "
                    "context passes the whole batch, and its share is cut out here: no distributed sampler among these ranks"
                )

    @_eager
    def _loss(self, *args: Any, **given: Any) -> Any:
        """The model's loss function, watched."""
        loss = self.own_loss(*args, **given)
        now = _current.get()
        if now is not None and now.config is self.config:
            if self.own_loss is not ForCausalLMLoss or given.get("shift_labels") is None:
                name = getattr(self.own_loss, "__name__", repr(self.own_loss))
                raise ValueError(f"{name}: only the mean cross-entropy over tokens (ForCausalLMLoss) can be taken over ranks")
            now.loss = loss
        return loss

    @_eager
    def _leave(self, output: Any, now: _Pass, labelled: bool) -> Any:
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
    return _documents(positions) if packs and positions is not None and positions.dim() == 2 else None


def _print_of(x: Tensor | int) -> Tensor | int:
    """A number that tells contents apart: of a tensor its sum, weighted by place, modulo 2^64."""
    if not isinstance(x, Tensor):
        return x
    flat = x.detach().reshape(-1)
    flat = flat.float().view(torch.int32) if flat.is_floating_point() else flat
    places = torch.arange(1, flat.numel() + 1, device=x.device)
    return (flat.long() * (places * 0x5851F42D + 0x14057B7F)).sum()


def _digest(x: Any) -> int:
    """A number of 63 bits that is the same on all ranks, unlike ``hash``."""
    return int.from_bytes(hashlib.sha1(repr(x).encode()).digest()[:8], "big") >> 1


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
