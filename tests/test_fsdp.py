"""FSDP2 around attention over ranks: parameters sharded over all ranks, each sequence over some; gradients of one device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import ringflash as rf
from ringflash.launch.config import ModelConfig
from ringflash.launch.model import GPT, Context
from ringflash.testing import RankPool

Pools = Callable[[int], RankPool]

DP, CP, S = 2, 2, 203
MODEL = ModelConfig(layers=2, dim=48, heads=4, kv_heads=2, head_dim=16, ffn_dim=64, windows=[30, 0])
MASKS = {"one sequence": rf.Mask.causal(), "documents": rf.Mask.documents([50, 0, 120, 33])}


def made(recompute: bool) -> GPT:
    """The same on every rank, and nothing in it zero."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(**{**vars(MODEL), "recompute": recompute})).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.1)
    return model


def batches() -> list[Tensor]:
    """Of every replica."""
    make = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (1, S), generator=make) for _ in range(DP)]


def alone(mask: rf.Mask) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients on one device: the mean over the replicas."""
    model, losses = made(False), []
    for tokens in batches():
        logits = model(tokens, Context(None, torch.arange(S), model.masks(mask)))
        cut = [int(n) for n in torch.tensor(getattr(mask, "lengths", (S,))).cumsum(0) if n]
        labels = torch.cat([tokens[:, 1:], torch.full((1, 1), -100)], dim=1)
        labels[:, [n - 1 for n in cut]] = -100
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))
    loss = torch.stack(losses).mean()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def sharded(rank: int, mask: rf.Mask, layout: str, recompute: bool) -> tuple[float, dict[str, Tensor]]:
    """The same by four ranks."""
    mesh = init_device_mesh("cpu", (DP, CP), mesh_dim_names=("dp", "cp"))
    cp = rf.ContextParallel(mesh["cp"], layout).for_mask(mask)
    model = made(recompute)
    for block in model.blocks:
        fully_shard(block, mesh=mesh["dp", "cp"]._flatten())
    fully_shard(model, mesh=mesh["dp", "cp"]._flatten())
    tokens = batches()[mesh.get_local_rank("dp")]
    logits = model(cp.shard(tokens), Context(cp, cp.position_ids(S), model.masks(mask)))
    loss = cp.cross_entropy(logits, cp.shard_labels(tokens))
    (loss * CP).backward()  # FSDP averages over all ranks; those of one sequence hold shares that add up
    total = loss.detach() / DP
    dist.all_reduce(total, group=mesh["dp"].get_group())
    found = {}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor) and isinstance(parameter.grad, DTensor), name
        found[name] = parameter.grad.full_tensor()
    return total.item(), found


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(("mask", "layout"), [("one sequence", "zigzag"), ("documents", "balanced")])
def test_gradients_are_those_of_one_device(ranks: Pools, mask: str, layout: str, recompute: bool) -> None:
    loss, gradients = alone(MASKS[mask])
    for found, shards in ranks(DP * CP).run(sharded, MASKS[mask], layout, recompute):
        assert abs(found - loss) < 1e-12 * loss
        assert shards.keys() == gradients.keys()
        for name, gradient in gradients.items():
            error = float((shards[name] - gradient).norm() / gradient.norm())
            assert error < 1e-12, f"{name}: {error:.1e}"
