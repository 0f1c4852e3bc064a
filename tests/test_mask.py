"""Masks: their oracle against the definitions of DESIGN section 6 written naively, and their bands against their oracle."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from ringflash.mask import Mask
from ringflash.testing import draw, read_mask, visibility


@dataclass(frozen=True)
class Rule:
    """A mask as a predicate of two positions; ``&`` is both."""

    sees: Callable[[int, int], bool]

    def __and__(self, other: Rule) -> Rule:
        return Rule(lambda q, k: self.sees(q, k) and other.sees(q, k))


def causal(window: int | None = None) -> Rule:
    return Rule(lambda q, k: q >= k and (window is None or q - k < window))


def two_sided(left: int | None, right: int | None) -> Rule:
    return Rule(lambda q, k: (left is None or q - left <= k) and (right is None or k <= q + right))


def documents(lengths: list[int], causal: bool = True, window: int | None = None) -> Rule:
    document = [d for d, length in enumerate(lengths) for _ in range(length)]

    def sees(q: int, k: int) -> bool:
        inside = (not causal or k <= q) and (window is None or abs(q - k) < window)
        return document[q] == document[k] and inside

    return Rule(sees)


def blocks(rows: list[str], block_size: int) -> Rule:
    return Rule(lambda q, k: rows[q // block_size][k // block_size] == "1")


def dilated(stride: int, window: int | None = None) -> Rule:
    return Rule(lambda q, k: (q - k) % stride == 0 and (window is None or abs(q - k) < window * stride))


RULES = {
    "full": lambda: Rule(lambda q, k: True),
    "causal": causal,
    "window": two_sided,
    "documents": documents,
    "prefix": lambda n: Rule(lambda q, k: k <= q or k < n),
    "chunked": lambda size: Rule(lambda q, k: q // size == k // size),
    "blocks": blocks,
    "dilated": dilated,
}

# (mask, q_len, k_len, why)
EDGES = [
    ("full()", 5, 7, "other lengths"),
    ("causal()", 7, 7, ""),
    ("causal()", 3, 7, "fewer queries: the last ones"),
    ("causal()", 7, 3, "more queries: the first see nothing"),
    ("causal(window=1)", 5, 5, "only itself"),
    ("causal(window=5)", 5, 5, "as wide as the sequence"),
    ("causal(window=4)", 5, 5, "one less than the sequence"),
    ("causal(window=3)", 4, 9, ""),
    ("window(0, 0)", 5, 5, "only itself"),
    ("window(2, None)", 6, 6, "left bounded"),
    ("window(None, 1)", 6, 6, "right bounded"),
    ("window(2, 1)", 4, 6, ""),
    ("window(1, 2)", 6, 4, "more queries than keys"),
    ("documents([5])", 5, 5, "one document is causal"),
    ("documents([0, 3, 0, 0, 4, 1, 0])", 8, 8, "empty documents at both ends and inside"),
    ("documents([3, 4, 1], causal=False)", 8, 8, ""),
    ("documents([3, 4, 1], window=2)", 8, 8, ""),
    ("documents([3, 4, 1], causal=False, window=2)", 8, 8, "a two-sided window"),
    ("documents([1, 1, 1, 1])", 4, 4, "documents of one token"),
    ("prefix(0)", 5, 5, "no prefix is causal"),
    ("prefix(3)", 6, 6, ""),
    ("prefix(9)", 6, 6, "a prefix longer than the sequence is full"),
    ("prefix(3)", 2, 6, ""),
    ("chunked(1)", 4, 4, ""),
    ("chunked(3)", 7, 7, "a last chunk that is cut"),
    ("chunked(3)", 4, 8, ""),
    ("chunked(3)", 8, 4, "queries before position 0"),
    ('blocks(["10", "01"], 3)', 5, 5, "a last block that is cut"),
    ('blocks(["101", "010", "111"], 2)', 6, 6, ""),
    ('blocks(["000", "111", "101"], 2)', 3, 6, ""),
    ('blocks(["111", "000", "111", "000"], 2)', 5, 5, "a map larger than the sequence"),
    ("dilated(1)", 4, 4, "every position"),
    ("dilated(3)", 8, 8, ""),
    ("dilated(3, window=1)", 8, 8, "only itself"),
    ("dilated(3, window=2)", 8, 8, ""),
    ("dilated(2, window=2)", 3, 8, ""),
    ("dilated(20)", 8, 8, "a stride beyond the sequence"),
    ("causal() & dilated(2)", 8, 8, ""),
    ("causal(window=5) & chunked(4) & dilated(2)", 9, 9, ""),
    ("documents([3, 0, 5]) & prefix(2)", 8, 8, ""),
    ('blocks(["10", "11"], 4) & causal()', 8, 8, ""),
    ("dilated(2) & dilated(3)", 13, 13, "two strides make their least common multiple"),
    ("chunked(3) & chunked(4)", 13, 13, ""),
    ("window(0, None) & causal()", 5, 5, "leaves the diagonal"),
]


def naive(text: str, q_len: int, k_len: int) -> np.ndarray:
    rule = read_mask(text, RULES)
    shift = k_len - q_len
    return np.array([[rule.sees(i + shift, j) for j in range(k_len)] for i in range(q_len)], dtype=bool).reshape(q_len, k_len)


def painted(mask: Mask, q_len: int, k_len: int) -> np.ndarray:
    """How many bands show each pair."""
    shift = k_len - q_len
    bands = mask.bands((shift, k_len), (0, k_len))
    seen = np.zeros((q_len, k_len), dtype=int)
    q, k = np.arange(shift, k_len)[:, None], np.arange(k_len)[None, :]
    for q0, q1, k0, k1, lo, hi in bands.rows.tolist():
        seen += (q0 <= q) & (q < q1) & (k0 <= k) & (k < k1) & (lo <= k - q) & (k - q <= hi) & ((k - q) % bands.modulus == 0)
    return seen


@pytest.mark.parametrize(("text", "q_len", "k_len", "why"), EDGES)
def test_oracle_and_bands_are_the_definition(text: str, q_len: int, k_len: int, why: str) -> None:
    mask, expected = read_mask(text), naive(text, q_len, k_len)
    assert np.array_equal(visibility(mask, q_len, k_len).numpy(), expected)
    assert np.array_equal(painted(mask, q_len, k_len), expected.astype(int)), "every visible pair is in exactly one band"


@pytest.mark.parametrize("first", range(0, 600, 100))
def test_drawn_masks_are_their_definition(first: int) -> None:
    for seed in range(first, first + 100):
        case = draw(seed, max_len=40)
        mask, expected = case.build_mask(), naive(case.mask, case.q_len, case.k_len)
        assert np.array_equal(visibility(mask, case.q_len, case.k_len).numpy(), expected), repr(case)
        assert np.array_equal(painted(mask, case.q_len, case.k_len), expected.astype(int)), repr(case)


@pytest.mark.parametrize(("text", "n"), [(text, k_len) for text, q_len, k_len, _ in EDGES if q_len == k_len])
def test_bands_inside_a_part_of_the_sequence(text: str, n: int) -> None:
    mask = read_mask(text)
    whole = visibility(mask, n, n).numpy()
    for q0, q1, k0, k1 in [(0, n, 0, n), (1, 3, 0, n), (0, n, 2, 5), (2, 4, 1, 4), (3, 3, 0, n), (0, n, n, n), (n - 1, n, 0, 1)]:
        bands = mask.bands((q0, q1), (k0, k1))
        seen = np.zeros((n, n), dtype=int)
        q, k = np.arange(n)[:, None], np.arange(n)[None, :]
        for a, b, c, d, lo, hi in bands.rows.tolist():
            assert q0 <= a < b <= q1 and k0 <= c < d <= k1, "bands stay inside the spans and are not empty"
            seen += (a <= q) & (q < b) & (c <= k) & (k < d) & (lo <= k - q) & (k - q <= hi) & ((k - q) % bands.modulus == 0)
        expected = np.zeros((n, n), dtype=int)
        expected[q0:q1, k0:k1] = whole[q0:q1, k0:k1]
        assert np.array_equal(seen, expected), (q0, q1, k0, k1)


def test_visible_takes_any_positions_in_any_order() -> None:
    mask = Mask.documents([3, 4]) & Mask.causal(window=2)
    whole = visibility(mask, 7, 7)
    q_pos, k_pos = torch.tensor([6, 0, 3, 3]), torch.tensor([2, 6, 5])
    assert torch.equal(mask.visible(q_pos, k_pos), whole[q_pos][:, k_pos])


def test_masks_are_values() -> None:
    for text in sorted({e[0] for e in EDGES}):
        one, same = read_mask(text), read_mask(text)
        assert one == same and hash(one) == hash(same) and one is not same
        assert pickle.loads(pickle.dumps(one)) == one
    assert Mask.causal() != Mask.causal(window=4)
    assert Mask.documents([3, 4]) != Mask.documents([4, 3])
    assert Mask.documents(torch.tensor([3, 4])) == Mask.documents(np.array([3, 4])) == Mask.documents([3, 4])


def test_equal_masks_of_other_processes_have_equal_hashes() -> None:
    """A mask may travel between ranks; None, for one, hashes by its address before Python 3.12."""
    make = "Mask.documents([3, 4], window=None) & Mask.causal()"
    program = f"import pickle, sys; from ringflash.mask import Mask; sys.stdout.buffer.write(pickle.dumps({make}))"
    sent = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True).stdout
    received, made_here = pickle.loads(sent), Mask.documents([3, 4], window=None) & Mask.causal()
    assert received == made_here
    assert hash(received) == hash(made_here)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Mask.causal(window=0), "window.*at least 1.*0"),
        (lambda: Mask.causal(window=-3), "window.*at least 1.*-3"),
        (lambda: Mask.causal(window=2.5), "window.*integer.*2.5"),
        (lambda: Mask.causal(window=True), "window.*integer.*True"),
        (lambda: Mask.window(-1, 0), "left.*at least 0.*-1"),
        (lambda: Mask.window(0, -1), "right.*at least 0.*-1"),
        (lambda: Mask.documents([3, -1]), "negative.*-1.*index 1"),
        (lambda: Mask.documents([[3, 1]]), "flat list"),
        (lambda: Mask.documents([3.5]), "integers"),
        (lambda: Mask.documents([3], window=0), "window.*at least 1"),
        (lambda: Mask.prefix(-1), "prefix.*at least 0.*-1"),
        (lambda: Mask.chunked(0), "chunk size.*at least 1.*0"),
        (lambda: Mask.blocks(np.ones(3, dtype=bool), 4), "2-D bool"),
        (lambda: Mask.blocks(np.ones((2, 2)), 4), "2-D bool"),
        (lambda: Mask.blocks(np.ones((2, 2), dtype=bool), 0), "block_size.*at least 1"),
        (lambda: Mask.dilated(0), "stride.*at least 1.*0"),
        (lambda: Mask.dilated(2, window=0), "window.*at least 1"),
    ],
)
def test_a_wrong_mask_is_refused_with_what_was_given_and_what_is_allowed(build: Callable[[], Mask], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("text", "q_len", "k_len", "message"),
    [
        ("documents([3, 4])", 8, 8, "sum to 7.*8 queries and 8 keys"),
        ("documents([3, 4])", 6, 7, "sum to 7.*6 queries and 7 keys"),
        ("causal() & documents([3, 4])", 8, 8, "sum to 7"),
        ('blocks(["11", "11"], 3)', 7, 7, "2 x 2 blocks of 3.*7 positions.*3 x 3"),
        ('blocks(["11", "11"], 4)', 8, 7, "8 queries and 7 keys"),
    ],
)
def test_a_mask_that_does_not_fit_the_lengths_is_refused(text: str, q_len: int, k_len: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_mask(text).check(q_len, k_len)


def test_only_masks_combine() -> None:
    with pytest.raises(TypeError):
        Mask.causal() & 3  # type: ignore[operator]
