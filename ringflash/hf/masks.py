"""What a model's mask says: transformers' mask functions, and packed sequences, read into a Mask."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ringflash.mask import Mask


@dataclass(frozen=True)
class Words:
    """A mask function of transformers.masking_utils, read. ``window``: keys before a query that it sees, itself included;
    ``around``: distance on both sides; ``packed``: which sequence each token is in, (B, S)."""

    causal: bool = False
    window: int | None = None
    around: int | None = None
    chunk: int | None = None
    packed: Tensor | None = None

    def __and__(self, other: Words) -> Words:
        def least(a: int | None, b: int | None) -> int | None:
            return min((x for x in (a, b) if x is not None), default=None)

        if self.chunk is not None and other.chunk is not None and self.chunk != other.chunk:
            raise ValueError(f"chunks of {self.chunk} and of {other.chunk} tokens in one mask are not supported")
        return Words(
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


def _read_chunks(chunk_size: int, left_padding: Tensor) -> Words:
    if bool((left_padding != 0).any()):
        raise ValueError("chunked attention with padding on the left is not supported: pad on the right")
    return Words(chunk=int(chunk_size))


READERS: dict[str, Callable[..., Words]] = {
    "causal_mask_function": lambda: Words(causal=True),
    "bidirectional_mask_function": Words,
    "and_masks.<locals>.and_mask": lambda mask_functions: _read_all(mask_functions),
    "sliding_window_overlay.<locals>.inner_mask": lambda sliding_window: Words(window=int(sliding_window)),
    "sliding_window_bidirectional_overlay.<locals>.inner_mask": lambda sliding_window: Words(around=int(sliding_window)),
    "chunked_overlay.<locals>.inner_mask": _read_chunks,
    # Distances inside a sequence are those of the whole row: but for chunks, which are refused, positions need not begin anew.
    "remap_positions_for_packed_sequence.<locals>.inner_mask": lambda mask_function, position_ids: read(mask_function),
    "packed_sequence_mask_function.<locals>.inner_mask": lambda packed_sequence_mask: Words(packed=packed_sequence_mask),
}
"""By the name of a function of transformers.masking_utils: what it says, from what it captured."""


def read(function: Callable[..., Any]) -> Words:
    name = getattr(function, "__qualname__", repr(function))
    captured = dict(inspect.getclosurevars(function).nonlocals) if inspect.isfunction(function) else {}
    reader = READERS.get(name) if getattr(function, "__module__", "") == "transformers.masking_utils" else None
    if reader is None or not inspect.signature(reader).parameters.keys() >= captured.keys():
        raise ValueError(
            f"the model's mask has {name} in it, which ringflash does not know; known are causal and bidirectional masks, "
            'sliding windows, chunks and packed sequences. Use attn_implementation="sdpa" for this model'
        )
    return reader(**captured)


def _read_all(functions: Iterable[Callable[..., Any]]) -> Words:
    words = Words()
    for function in functions:
        words = words & read(function)
    return words


def ends_early(attention_mask: Tensor) -> bool:
    """Whether rows of a bool (B, S) have padding. ValueError where it is not at their ends."""
    if bool(attention_mask.all()):
        return False
    if bool((attention_mask[:, 1:] & ~attention_mask[:, :-1]).any()) or not bool(attention_mask[:, 0].all()):
        raise ValueError("padding must stand at the ends of sequences (padding_side='right'); or pack sequences in one row")
    return True


def lengths_of(sequence: Tensor) -> tuple[int, ...]:
    """Lengths of packed sequences, from which one each token is in, (B, S); the same in all rows, or ValueError."""
    if bool((sequence != sequence[:1]).any()):
        raise ValueError("rows of a batch that are packed differently are not supported: pack all sequences in one row")
    return tuple(torch.unique_consecutive(sequence[0], return_counts=True)[1].tolist())


_packed = WeakTensorKeyDictionary()
"""Of position ids that were looked at, with their version: all layers of a call get the same ones, and a look is a wait."""


def documents_of(position_ids: Tensor) -> tuple[int, ...] | None:
    """Lengths of packed sequences, where position ids (B, S) begin anew; None where they do not."""
    counted = not position_ids.is_inference()  # those of inference mode have no version
    version: int
    documents: tuple[int, ...] | None
    version, documents = _packed.get(position_ids, (-1, None)) if counted else (-1, None)
    if version < 0 or version != position_ids._version:
        documents = None
        if position_ids.shape[1]:
            jumps = torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1) != 1
            documents = lengths_of(jumps.cumsum(-1)) if bool(jumps.any()) else None
        if counted:
            _packed[position_ids] = position_ids._version, documents
    return documents
