"""The byte-level GPT: sharding changes neither loss nor gradients, positions are global, layers get their windows."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import ringflash as rf
from ringflash.launch.config import ModelConfig
from ringflash.launch.model import GPT, VOCABULARY, Context, rotary_table, rotate
from ringflash.testing.rank_pool import RankPool

Ranks = Callable[[int], RankPool]
SMALL = {"layers": 2, "dim": 24, "heads": 4, "kv_heads": 2, "head_dim": 8, "ffn_dim": 40}


def make_model(**changes: object) -> GPT:
    """A small float64 model whose output weights are not zero, so that every parameter has a gradient."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(**{**SMALL, **changes})).double()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def make_mask(lengths: list[int] | None) -> rf.Mask:
    return rf.Mask.causal() if lengths is None else rf.Mask.documents(lengths, causal=True)


def tokens_of(seqlen: int) -> Tensor:
    return torch.randint(VOCABULARY, (1, seqlen), generator=torch.Generator().manual_seed(1))


def one_device(seqlen: int, lengths: list[int] | None, windows: list[int]) -> list[Tensor]:
    """Loss and all gradients without any other rank, attention by the formula itself."""
    model, mask, tokens = make_model(windows=windows), make_mask(lengths), tokens_of(seqlen)
    logits = model(tokens, Context(None, torch.arange(seqlen), model.masks(mask), "reference"))
    labels = F.pad(tokens[:, 1:], (0, 1), value=-100)
    if lengths is not None:
        for end in torch.tensor(lengths).cumsum(0):
            labels[0, end - 1] = -100
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def on_rank(rank: int, seqlen: int, layout: str, lengths: list[int] | None, windows: list[int]) -> list[Tensor]:
    """The same on one rank of the pool, gradients summed over all."""
    model, mask, tokens = make_model(windows=windows), make_mask(lengths), tokens_of(seqlen)
    cp = rf.ContextParallel(None, layout=layout).for_mask(mask)
    logits = model(cp.shard(tokens), Context(cp, cp.position_ids(seqlen), model.masks(mask)))
    loss = cp.cross_entropy(logits, cp.shard_labels(tokens))
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    for gradient in gradients:
        dist.all_reduce(gradient)
    return [loss.detach(), *gradients]


@pytest.mark.parametrize(
    ("world", "seqlen", "layout", "lengths", "windows"),
    [
        (4, 64, "zigzag", None, [0]),
        (4, 67, "zigzag", None, [5, 0]),  # not divisible; local and global layers
        (3, 50, "striped", None, [0]),
        (4, 3, "zigzag", None, [0]),  # a rank without any token
        (4, 61, "balanced", [20, 1, 0, 40], [0]),  # a document of one token has no label at all
        (2, 61, "contiguous", [20, 1, 0, 40], [7]),
    ],
)
def test_sharded_equals_one_device(
    ranks: Ranks, world: int, seqlen: int, layout: str, lengths: list[int] | None, windows: list[int]
) -> None:
    expected = one_device(seqlen, lengths, windows)
    for answer in ranks(world).run(on_rank, seqlen, layout, lengths, windows):
        assert len(answer) == len(expected) == 1 + len(list(make_model().parameters()))
        for got, want in zip(answer, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)


def test_first_loss_is_that_of_no_knowledge() -> None:
    torch.manual_seed(0)
    model = GPT(ModelConfig(**SMALL))  # type: ignore[arg-type]
    logits = model(tokens_of(16), Context(None, torch.arange(16), model.masks(rf.Mask.causal())))
    assert float(F.cross_entropy(logits[0], tokens_of(16)[0]).detach()) == pytest.approx(math.log(VOCABULARY))


def test_model_is_causal() -> None:
    model = make_model().float()
    context = Context(None, torch.arange(32), model.masks(rf.Mask.causal()))
    tokens, changed = tokens_of(32), tokens_of(32)
    changed[0, 20] = (changed[0, 20] + 1) % VOCABULARY
    difference = (model(tokens, context) - model(changed, context)).abs().amax(-1)[0]
    assert bool((difference[:20] == 0).all())
    assert bool((difference[20:] > 0).all())


def test_recompute_changes_no_gradient() -> None:
    plain, redone = make_model(), make_model(recompute=True)
    for model in (plain, redone):
        context = Context(None, torch.arange(16), model.masks(rf.Mask.causal()))
        model(tokens_of(16), context).square().mean().backward()
    for a, b in zip(plain.parameters(), redone.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0)


def test_windows_repeat_over_the_depth() -> None:
    model = make_model(layers=5, windows=[16, 0])
    causal = rf.Mask.causal()
    local = causal & rf.Mask.causal(window=16)
    assert model.masks(causal) == [local, causal, local, causal, local]


def test_rotation_depends_on_the_distance_alone() -> None:
    generator = torch.Generator().manual_seed(2)
    q, k = (torch.randn(1, 1, 1, 16, generator=generator, dtype=torch.float64).float() for _ in range(2))

    def score(i: int, j: int) -> float:
        turned = (rotate(x, rotary_table(torch.tensor([p]), 16, 10000.0)) for x, p in ((q, i), (k, j)))
        return float((next(turned) * next(turned)).sum())

    assert score(7, 3) == pytest.approx(score(1_000_007, 1_000_003), abs=1e-5)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3


def test_rotation_keeps_the_norm_and_the_dtype() -> None:
    x = torch.randn(2, 8, 3, 16)
    turned = rotate(x, rotary_table(torch.arange(8), 16, 10000.0))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(turned[:, 0], x[:, 0])
    assert rotate(x.bfloat16(), rotary_table(torch.arange(8), 16, 10000.0)).dtype == torch.bfloat16
