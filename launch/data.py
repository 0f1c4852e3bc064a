"""Real text as bytes: the corpus, its validation split, and sequences in an order that depends on the seed alone.

Every rank reads the whole corpus (tens of megabytes) and cuts the same sequences from it, so nothing is scattered; which tokens
of a sequence a rank keeps is the layout's business (``cp.shard``). A sequence is addressed by its number: the n-th sequence of
a run is the same for every number of ranks, which is what makes a run resumable on a different number of them.
"""

from __future__ import annotations

import functools
import hashlib
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int64]

SEPARATOR = 0
"""First byte of every document. NUL does not occur in text, so it costs no vocabulary entry."""
IGNORE = -100
"""Label of a token that is not predicted (``torch.nn.functional.cross_entropy``'s default)."""
_BINARY_PROBE = 8192
_INSTALLED_PACKAGES = ("site-packages", "dist-packages", "__pycache__")


@dataclass(frozen=True)
class Sample:
    """One sequence: ``tokens`` (S,) int64, ``labels`` (S,) int64 *not yet shifted*, and the lengths of its documents (sum S).

    With packed documents the first token of a document is no label: the token before it belongs to somebody else.
    """

    tokens: Tensor
    labels: Tensor
    lengths: tuple[int, ...]


class Split:
    """One side of the split: documents, and the endless stream of sequences cut from them.

    Each epoch concatenates all documents in a new random order, cuts the stream every ``seqlen`` bytes and shuffles the pieces,
    so that a long document does not fill many steps in a row. What is left over at the end of an epoch is dropped.
    """

    def __init__(self, documents: Sequence[Bytes], seqlen: int, seed: int, name: str):
        self.name, self.seqlen, self.seed = name, seqlen, seed
        self.text: Bytes = np.concatenate(documents) if documents else np.empty(0, np.uint8)
        self._lengths = np.array([len(d) for d in documents], np.int64)
        self._starts = np.cumsum(self._lengths) - self._lengths
        self.sequences_per_epoch = len(self.text) // seqlen
        if self.sequences_per_epoch == 0:
            raise ValueError(
                f"The {name} text has {len(self.text):,} bytes, fewer than one sequence of seqlen={seqlen:,} tokens; "
                f"give more text (data.path), a larger data.validation share, or a smaller seqlen."
            )

    @functools.lru_cache(maxsize=2)  # noqa: B019 - a Split lives as long as the process
    def _epoch(self, epoch: int) -> tuple[Integers, Integers, Integers]:
        """Order of the documents in this epoch, where each one ends in the epoch's stream, and the order of the pieces."""
        generator = np.random.default_rng((self.seed, epoch))
        order = generator.permutation(len(self._lengths))
        return order, np.cumsum(self._lengths[order]), generator.permutation(self.sequences_per_epoch)

    def _pieces(self, number: int) -> Iterator[Bytes]:
        epoch, place = divmod(number, self.sequences_per_epoch)
        order, ends, pieces = self._epoch(epoch)
        position, stop = pieces[place] * self.seqlen, (pieces[place] + 1) * self.seqlen
        index = int(np.searchsorted(ends, position, side="right"))
        while position < stop:
            document = order[index]
            offset = position - (ends[index] - self._lengths[document])
            length = int(min(ends[index], stop) - position)
            start = self._starts[document] + offset
            yield self.text[start : start + length]
            position, index = position + length, index + 1

    def sample(self, number: int, *, documents: bool = False) -> Sample:
        """Sequence ``number`` of the run (0-based, without end). ``documents`` keeps packed documents apart in the labels."""
        pieces = list(self._pieces(number))
        tokens = torch.from_numpy(np.concatenate(pieces)).long()
        lengths = tuple(len(p) for p in pieces)
        labels = tokens.clone()
        if documents:
            labels[torch.tensor(lengths).cumsum(0)[:-1]] = IGNORE
        return Sample(tokens, labels, lengths)


@dataclass(frozen=True)
class Corpus:
    """Train and validation text, and what identifies them: ``digest`` must agree between ranks and with a resumed checkpoint."""

    train: Split
    validation: Split
    files: int
    skipped: int
    source: str
    digest: str

    def unigram_loss(self, split: Split) -> float:
        """Cross-entropy (nats per byte) on ``split`` of the best model that ignores all context: byte frequencies of the
        training text.

        One count is added to every byte value, so that a byte which only the validation text has costs a finite amount.
        """
        counts = np.bincount(self.train.text, minlength=256).astype(np.float64) + 1.0
        frequency = np.bincount(split.text, minlength=256) / len(split.text)
        return float(-(frequency * np.log(counts / counts.sum())).sum())


def load_corpus(path: str | None, *, pattern: str | None, validation: float, seqlen: int, seed: int) -> Corpus:
    """Read ``path`` (a file, a folder, or None for the standard library of this Python) and split it.

    ``pattern`` filters a folder's files by name (default: ``*.py`` for the standard library, every file for a folder of your
    own); files with a NUL byte near their start are taken for binary and skipped. A document belongs to the validation side by
    the hash of its relative path, so adding files never moves another one across. Where that leaves a side with less than one
    sequence (one file, say), the tail of the text becomes the validation side. Raises ValueError if there is not enough text.
    """
    root = Path(path).expanduser() if path is not None else Path(sysconfig.get_path("stdlib"))
    pattern = pattern or ("*.py" if path is None else "*")
    names, documents, skipped = _read(root, pattern)
    if not documents:
        raise ValueError(f"No text files match data.pattern={pattern!r} under data.path={str(root)!r}; check both.")
    held_out = [_fraction(name) < validation for name in names]
    train = [d for d, out in zip(documents, held_out, strict=True) if not out]
    held = [d for d, out in zip(documents, held_out, strict=True) if out]
    if min(sum(map(len, train)), sum(map(len, held))) < seqlen:
        tail = max(int(sum(map(len, documents)) * validation), seqlen)
        train, held = _cut_tail(documents, tail)
    digest = hashlib.blake2b(digest_size=8)
    for document in (*train, *held):
        digest.update(document.data)
    return Corpus(
        Split(train, seqlen, seed, "training"),
        Split(held, seqlen, seed, "validation"),
        len(documents),
        skipped,
        str(root),
        digest.hexdigest(),
    )


def _read(root: Path, pattern: str) -> tuple[list[str], list[Bytes], int]:
    """Relative names and contents of all text files, in a fixed order, and how many were skipped as binary or unreadable."""
    if root.is_file():
        files = [root]
    elif root.is_dir():
        files = sorted(
            p for p in root.rglob(pattern) if p.is_file() and not set(p.parts[len(root.parts) :]) & set(_INSTALLED_PACKAGES)
        )
    else:
        raise ValueError(
            f"data.path={str(root)!r} is neither a file nor a folder; give an existing one or null for Python's own sources."
        )
    names, documents, skipped = [], [], 0
    for file in files:
        try:
            content = file.read_bytes()
        except OSError:
            skipped += 1
            continue
        if not content or b"\0" in content[:_BINARY_PROBE]:
            skipped += 1
            continue
        names.append(file.name if file == root else file.relative_to(root).as_posix())
        documents.append(np.frombuffer(bytes([SEPARATOR]) + content, np.uint8))
    return names, documents, skipped


def _cut_tail(documents: Sequence[Bytes], tail: int) -> tuple[list[Bytes], list[Bytes]]:
    """The documents in two lists, the second with the last ``tail`` bytes; the document across the border is cut."""
    end = sum(map(len, documents))
    border = max(end - tail, 0)
    train, held, start = [], [], 0
    for document in documents:
        cut = min(max(border - start, 0), len(document))
        train += [document[:cut]] if cut else []
        held += [document[cut:]] if cut < len(document) else []
        start += len(document)
    return train, held


def _fraction(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") / 2.0**64
