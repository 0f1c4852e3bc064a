"""Hugging Face models over several GPUs, in bfloat16, against float32 on one of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

transformers = pytest.importorskip("transformers", minversion="5")

from ringflash import ContextParallel, hf  # noqa: E402
from ringflash.testing import RankPool, gpu_places  # noqa: E402

PLACES = gpu_places()

pytestmark = [pytest.mark.multigpu, pytest.mark.skipif(PLACES < 2, reason="needs two GPUs, or one for several ranks")]

SIZES = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "mistral, windows": ("MistralForCausalLM", "MistralConfig", {"sliding_window": 300}),
    "gemma2, softcap": ("Gemma2ForCausalLM", "Gemma2Config", {"sliding_window": 300, "attn_logit_softcapping": 20.0}),
    "gpt-oss, sinks": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {"sliding_window": 300, "num_local_experts": 2, "num_experts_per_tok": 2, "rope_parameters": None},
    ),
}
S = 1531


def made(family: str, dtype: torch.dtype) -> Any:
    model, config, options = FAMILIES[family]
    torch.manual_seed(0)
    settings = getattr(transformers, config)(**{**SIZES, **options})
    built = getattr(transformers, model)._from_config(settings, attn_implementation="eager").float()
    for name, parameter in built.named_parameters():
        if name.endswith("sinks"):  # made empty
            torch.nn.init.normal_(parameter)
    return built.to("cuda", dtype)


def results(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """Loss and gradients, in float32."""
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach().float()} | {
        n: torch.zeros_like(p).float() if p.grad is None else p.grad.float() for n, p in model.named_parameters()
    }


def errors(rank: int, family: str) -> dict[str, tuple[float, float]]:
    """Of loss and of all gradients together: the parallelized model's error and that of eager attention on one GPU, in bfloat16,
    against float32 on one GPU."""
    torch.cuda.set_device(rank)
    ids = torch.randint(1, SIZES["vocab_size"], (2, S), generator=torch.Generator().manual_seed(1)).cuda()
    exact, plain = (results(made(family, dtype), ids) for dtype in (torch.float32, torch.bfloat16))
    model = made(family, torch.bfloat16)
    hf.parallelize(model, ContextParallel(layout="zigzag:2"))
    ours = results(model, ids)
    for name, x in ours.items():
        if name != "loss":
            dist.all_reduce(x, op=dist.ReduceOp.AVG)

    def norm(x: dict[str, Tensor]) -> float:
        return float(torch.stack([(x[n] - exact[n]).norm() for n in exact if n != "loss"]).norm())

    return {
        "loss": (float((ours["loss"] - exact["loss"]).abs()), float((plain["loss"] - exact["loss"]).abs()) + 1e-3),
        "gradients": (norm(ours), norm(plain)),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_over_gpus_is_as_exact_as_on_one(gpus: Callable[[int], RankPool], family: str) -> None:
    for found in gpus(min(PLACES, 4)).run(errors, family, timeout_s=120.0):
        assert not {what: pair for what, pair in found.items() if not pair[0] <= 2 * pair[1]}
