"""What a context does to whole-sequence tensors, on real ranks: shard, unshard, position_ids, labels and the loss over them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from ringflash import ContextParallel, Mask, attention
from ringflash.testing import RankPool

Ranks = Callable[[int], RankPool]

LAYOUTS = ("contiguous", "zigzag", "striped", "balanced")
LENGTHS = (1, 2, 7, 16, 33)


def context(layout: str, mask: Mask | None = None) -> ContextParallel:
    cp = ContextParallel(layout=layout, timeout_s=60.0)
    return cp.for_mask(mask or Mask.causal()) if layout == "balanced" or mask is not None else cp


def there_and_back(rank: int, layout: str) -> None:
    cp = context(layout)
    for length in LENGTHS:
        ids = cp.position_ids(length)
        assert ids.dtype == torch.int64 and ids.dim() == 1
        assert torch.equal(cp.shard(torch.arange(length), dim=0), ids), "shard takes the rows that position_ids names"
        for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
            full = torch.randn(2, length, 3).mul(100).to(dtype)  # the ranks' seeds are the same
            local = cp.shard(full)
            assert torch.equal(local, full[:, ids])
            assert torch.equal(cp.unshard(local), full), "moved data is the same bits"
        for dim in (0, 2, -1):
            full = torch.randn([length if d == dim % 3 else 2 for d in range(3)])
            local = cp.shard(full, dim=dim)
            assert torch.equal(local, full.index_select(dim, ids)) and torch.equal(cp.unshard(local, dim=dim), full)


@pytest.mark.parametrize("world", [1, 3, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_there_and_back(ranks: Ranks, world: int, layout: str) -> None:
    ranks(world).run(there_and_back, layout)


def gradients_of_moving(rank: int, layout: str) -> None:
    cp = context(layout)
    for length in LENGTHS:
        ids = cp.position_ids(length)
        full = torch.randn(2, length, 3, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(2, length, 3, dtype=torch.float64)[:, ids]  # the same size on all ranks: draws stay equal
        (grad,) = torch.autograd.grad((cp.shard(full) * weight).sum(), full)
        expected = torch.zeros_like(full)
        expected[:, ids] = weight
        assert torch.equal(grad, expected), "shard's gradient is the own rows'"
        local = full.detach()[:, ids].requires_grad_()
        weights = torch.randn(cp.world, 2, length, 3, dtype=torch.float64)  # one for each rank's copy of the whole
        (grad,) = torch.autograd.grad((cp.unshard(local) * weights[rank]).sum(), local)
        assert torch.allclose(grad, weights.sum(0)[:, ids], rtol=1e-14), "every rank's copy adds to the gradient"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_moving(ranks: Ranks, layout: str) -> None:
    ranks(3).run(gradients_of_moving, layout)


def labels_of(rank: int, layout: str, lengths: list[int] | None) -> None:
    for length in (sum(lengths),) if lengths else LENGTHS:
        cp = context(layout, Mask.documents(lengths) if lengths else None)
        tokens = torch.arange(2 * length).reshape(2, length) + 7
        ids = cp.position_ids(length)
        expected = torch.full((2, len(ids)), -100)
        ends = set(torch.tensor(lengths or [length]).cumsum(0).sub(1).tolist())
        for i, p in enumerate(ids.tolist()):
            if p not in ends:
                expected[:, i] = tokens[:, p + 1]
        assert torch.equal(cp.shard_labels(tokens), expected), "the next token of the sequence, not of the shard"
        assert torch.equal(cp.shard_labels(tokens.T, dim=0), expected.T)
        assert (cp.shard_labels(tokens, ignore_index=-1) == expected.where(expected != -100, -1)).all()


@pytest.mark.parametrize("lengths", [None, [5, 0, 1, 10, 1]])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_labels_are_shifted_before_they_are_cut(ranks: Ranks, layout: str, lengths: list[int] | None) -> None:
    ranks(4).run(labels_of, layout, lengths)


def loss_of(rank: int, layout: str, valid: list[int], length: int) -> tuple[float, torch.Tensor, float, torch.Tensor]:
    """Loss and parameter gradient over the ranks, and by one device."""
    cp = context(layout)
    x = torch.randn(2, length, 6, dtype=torch.float64)
    weight = torch.randn(6, 11, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(11, (2, length))
    labels[:, [p for p in range(length) if p not in valid]] = -100
    loss = cp.cross_entropy(cp.shard(x) @ weight, cp.shard(labels))
    (grad,) = torch.autograd.grad(loss, weight)
    alone = F.cross_entropy((x @ weight).flatten(0, 1), labels.flatten(), reduction="sum") / max(1, int((labels != -100).sum()))
    (alone_grad,) = torch.autograd.grad(alone, weight)
    return float(loss), grad, float(alone), alone_grad


@pytest.mark.parametrize(
    ("valid", "why"), [(list(range(13)), "all"), ([0, 1, 12], "uneven"), ([5], "one rank's only"), ([], "none anywhere")]
)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_the_loss_is_the_mean_over_all_ranks_valid_tokens(ranks: Ranks, layout: str, valid: list[int], why: str) -> None:
    answers = ranks(4).run(loss_of, layout, valid, 13)
    for loss, _, alone, _ in answers:
        assert abs(loss - alone) < 1e-12, "the value is the global mean on every rank"
    summed = torch.stack([grad for _, grad, _, _ in answers]).sum(0)
    assert torch.allclose(summed, answers[0][3], rtol=1e-12, atol=1e-14), "gradients are shares: they add up"


def test_a_loss_with_a_rank_that_holds_nothing(ranks: Ranks) -> None:
    answers = ranks(4).run(loss_of, "contiguous", [0, 1], 2)
    assert all(abs(loss - alone) < 1e-12 for loss, _, alone, _ in answers)
    assert torch.allclose(torch.stack([g for _, g, _, _ in answers]).sum(0), answers[0][3], rtol=1e-12, atol=1e-14)


def attend_several_times(rank: int) -> list[float]:
    """One context, lengths and masks that change from call to call; the deviations from one device."""
    cp = ContextParallel(timeout_s=60.0)
    deviations = []
    for length, mask in [
        (16, Mask.causal()),
        (17, Mask.causal()),
        (16, Mask.full()),
        (5, Mask.causal()),
        (17, Mask.causal(window=3)),
    ] * 2:
        q, k, v = (torch.randn(1, length, 2, 8, dtype=torch.float64) for _ in range(3))
        out = cp.unshard(attention(*(cp.shard(x) for x in (q, k, v)), mask=mask, cp=cp))
        deviations.append(float((out - attention(q, k, v, mask=mask)).abs().max()))
    return deviations


def test_one_context_serves_changing_lengths_and_masks(ranks: Ranks) -> None:
    for deviations in ranks(4).run(attend_several_times):
        assert max(deviations) < 1e-12
