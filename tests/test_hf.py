"""Hugging Face models on ringflash, against their own eager attention: on one device, and over ranks."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

transformers = pytest.importorskip("transformers", minversion="5")

from ringflash import ContextParallel, Mask, hf  # noqa: E402
from ringflash.testing.rank_pool import RankPool  # noqa: E402

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
TURNS = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}

FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "qwen3, heads are normalised": ("Qwen3ForCausalLM", "Qwen3Config", {}),
    "mistral, windows": ("MistralForCausalLM", "MistralConfig", {"sliding_window": 7}),
    "gemma2, softcap, its own scale": (
        "Gemma2ForCausalLM", "Gemma2Config", {"sliding_window": 7, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0},
    ),
    "gemma3, windows in turn": ("Gemma3ForCausalLM", "Gemma3TextConfig", TURNS),
    "gpt-oss, sinks and windows": (
        "GptOssForCausalLM", "GptOssConfig", {**TURNS, "num_local_experts": 2, "num_experts_per_tok": 1, "rope_parameters": None},
    ),
    "llama4, chunks": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {
            "intermediate_size_mlp": 48,
            "num_local_experts": 2,
            "attention_chunk_size": 8,
            "layer_types": ["chunked_attention", "full_attention"],
            "no_rope_layers": [1, 1],
            "moe_layers": [],
        },
    ),
}  # fmt: skip
PACKED = (11, 1, 25)
S = sum(PACKED)
CLOSE = 1e-5
"""Relative, in float32: some tens of its eps."""


def make(family: str, attn_implementation: str, **changes: Any) -> Any:
    model, config, options = FAMILIES[family]
    torch.manual_seed(0)
    settings = getattr(transformers, config)(**{**SIZES, **options, **changes})
    made = getattr(transformers, model)._from_config(settings, attn_implementation=attn_implementation).float()
    for name, parameter in made.named_parameters():
        if name.endswith("sinks"):  # made empty
            torch.nn.init.normal_(parameter)
    return made


def tokens(batch: int = 1, length: int = S) -> Tensor:
    return torch.randint(1, 64, (batch, length), generator=torch.Generator().manual_seed(1))


def positions(lengths: tuple[int, ...]) -> Tensor:
    return torch.cat([torch.arange(n) for n in lengths])[None]


def difference(a: Tensor, b: Tensor) -> float:
    """Relative, in the Frobenius norm."""
    return float((a - b).norm() / b.norm().clamp(min=1e-30)) if a.numel() else 0.0


def packs(family: str) -> bool:
    return "chunks" not in family  # which would begin anew in every sequence: refused


def eager(model: Any, batch: dict[str, Any]) -> Tensor:
    """Logits of eager attention on one device; of packed sequences, of each by itself."""
    if "position_ids" not in batch:
        return model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits  # type: ignore[no-any-return]
    sequences = batch["input_ids"].split(PACKED, dim=1)
    return torch.cat([model(input_ids=ids, use_cache=False).logits for ids in sequences], dim=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_device_computes_what_eager_attention_does(family: str) -> None:
    model = make(family, "eager").eval()
    batches: list[dict[str, Any]] = [{"input_ids": tokens(2)}]
    if packs(family):
        batches.append({"input_ids": tokens(), "position_ids": positions(PACKED)})
    with torch.no_grad():
        expected = [eager(model, batch) for batch in batches]
        model.set_attn_implementation(hf.NAME)
        found = [model(**batch, use_cache=False).logits for batch in batches]
    assert max(map(difference, found, expected)) < CLOSE


@pytest.mark.parametrize("family", ["llama", "mistral, windows", "gpt-oss, sinks and windows"])
def test_one_device_generates_with_a_cache(family: str) -> None:
    texts = []
    for name in ("eager", hf.NAME):
        model = make(family, name).eval()
        texts.append(model.generate(tokens(2, 9), max_new_tokens=12, do_sample=False))
    assert torch.equal(*texts) and texts[0].shape == (2, 21)


def batch_of(kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same batch for a parallelized model and for eager attention on one device."""
    ids = tokens(2 if kind in ("two rows", "padded") else 1, 4 if kind == "a token a rank" else S)
    labels = ids.clone()
    labels[0, : ids.shape[1] // 3] = hf.IGNORED
    batch: dict[str, Any] = {"input_ids": ids, "labels": labels}
    if kind == "padded":
        mask = torch.ones_like(ids)
        mask[1, 20:] = 0
        labels[1, 20:] = hf.IGNORED
        batch["attention_mask"] = mask
    if kind == "packed":
        batch["position_ids"] = positions(PACKED)
    if kind == "packed by ends":
        ends = torch.tensor([0, *PACKED], dtype=torch.int32).cumsum(0)
        same = {**batch, "position_ids": positions(PACKED)}
        return {**same, "cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 25, "max_length_k": 25}, same
    if kind == "nothing to learn on a rank":
        labels[:, 5:] = hf.IGNORED
        labels[:, :5] = ids[:, :5]
    return batch, batch


def gradients_of(model: Any, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()  # type: ignore[no-untyped-call]
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


def worst(rank: int, family: str, kind: str, layout: str, gradients: str, checkpoints: bool) -> dict[str, float]:
    """The largest differences of a parallelized model's loss, logits and gradients to eager attention's on one device."""
    own, everything = batch_of(kind)
    alone, together = make(family, "eager").train(), make(family, "eager").train()
    if checkpoints:
        together.gradient_checkpointing_enable()
    cp = ContextParallel(layout=layout)
    handle = hf.parallelize(together, cp, gradients)
    out = together(**own)
    grads = gradients_of(together, out.loss)
    for x in grads.values():
        dist.all_reduce(x)
        x /= cp.world if gradients == "mean" else 1
    logits = eager(alone, everything)
    loss = alone.loss_function(logits, everything["labels"], alone.config.vocab_size)
    expected = gradients_of(alone, loss)
    norm = torch.stack([x.norm() for x in expected.values()]).norm()
    found = {"loss": difference(out.loss.detach(), loss.detach())}
    found["gradients"] = max(float((grads[n] - x).norm() / norm) for n, x in expected.items())
    if kind != "padded":  # padding sees what it likes
        documents = Mask.documents(PACKED) if kind.startswith("packed") else Mask.causal()
        found["logits"] = difference(out.logits.detach(), cp.for_mask(documents).shard(logits.detach()))
    handle.remove()
    assert together.config._attn_implementation == "eager"
    together.set_attn_implementation(hf.NAME)
    with torch.no_grad():  # on one device
        found["after"] = difference(together(**everything, use_cache=False).loss, loss.detach())
    return found


def objections(found: list[dict[str, float]]) -> list[str]:
    return [f"rank {r}, {what}: {x:.2e}" for r, one in enumerate(found) for what, x in one.items() if not x < CLOSE]


@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_compute_what_one_device_does(ranks: Callable[[int], RankPool], family: str) -> None:
    for kind in ("two rows", "packed") if packs(family) else ("two rows",):
        assert not objections(ranks(4).run(worst, family, kind, "zigzag", "mean", False)), kind


@pytest.mark.parametrize(
    ("kind", "layout", "gradients", "checkpoints"),
    [
        ("two rows", "contiguous", "sum", False),
        ("two rows", "zigzag:2", "mean", True),
        ("packed", "balanced", "mean", False),
        ("packed by ends", "balanced", "sum", True),
        ("padded", "zigzag", "mean", False),
        ("a token a rank", "contiguous", "mean", False),
        ("nothing to learn on a rank", "contiguous", "mean", False),
    ],
)
def test_batches_and_layouts(ranks: Callable[[int], RankPool], kind: str, layout: str, gradients: str, checkpoints: bool) -> None:
    assert not objections(ranks(4).run(worst, "mistral, windows", kind, layout, gradients, checkpoints))


def said_of(call: Callable[[], Any]) -> str:
    """The words of its ValueError, or "nothing"."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return "nothing"


def refused(rank: int) -> dict[str, str]:
    """What is said of calls that cannot be done exactly."""
    ids, cp = tokens(), ContextParallel()
    model = make("llama", "eager")
    handle = hf.parallelize(model, cp)
    left, right = torch.ones_like(ids), torch.ones_like(ids)
    left[:, :3] = 0
    right[:, 30:] = 0
    calls: dict[str, dict[str, Any]] = {
        "short": {"input_ids": ids[:, :1]},
        "left padding": {"attention_mask": left},
        "labels of padding": {"attention_mask": right, "labels": ids},
        "4D mask": {"attention_mask": torch.ones(1, 1, S, S)},
        "cache": {"past_key_values": transformers.DynamicCache()},
        "logits": {"logits_to_keep": 1},
        "strange": {"token_type_ids": torch.zeros_like(ids)},
        "ends": {"cu_seq_lens_q": torch.tensor([0, S - 1])},
        "rope": {"position_ids": torch.zeros(3, 1, S, dtype=torch.long)},
        "rows": {"input_ids": tokens(2), "position_ids": torch.cat([positions(PACKED), torch.arange(S)[None]])},
        "labels": {"labels": torch.tensor([1])},
        "bias": {"attention_bias": torch.tensor(1.0)},
        "no input": {"input_ids": None},
    }
    said = {name: said_of(lambda options=options: model(**{"input_ids": ids, **options})) for name, options in calls.items()}
    said["twice"] = said_of(lambda: hf.parallelize(model, cp))
    said["copy"] = said_of(lambda: copy.deepcopy(model))
    model.loss_function = lambda logits, **_: logits.float().mean()
    said["another loss"] = said_of(lambda: model(input_ids=ids, labels=ids))
    handle.remove()
    model.loss_function = lambda logits, **_: logits.float().mean()
    handle = hf.parallelize(model, cp)
    said["own loss"] = said_of(lambda: model(input_ids=ids, labels=ids))
    handle.remove()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    hf.parallelize(model.train(), cp)
    said["dropout"] = said_of(lambda: model(input_ids=ids))
    model.eval()
    said["none"] = said_of(lambda: model(input_ids=ids))  # and goes on after all these
    chunks = make("llama4, chunks", "eager")
    hf.parallelize(chunks, cp)
    said["chunks"] = said_of(lambda: chunks(input_ids=ids, position_ids=positions(PACKED)))
    skips = make("llama", "eager")
    hf.parallelize(skips, cp)
    skips.model.layers[1].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)  # type: ignore[method-assign]
    said["layers"] = said_of(lambda: skips(input_ids=ids))
    routed = make("gpt-oss, sinks and windows", "eager")
    hf.parallelize(routed, cp)
    routed.config.output_router_logits = True
    said["router"] = said_of(lambda: routed(input_ids=ids))
    return said


def test_what_cannot_be_done_exactly_is_refused_on_all_ranks(ranks: Callable[[int], RankPool]) -> None:
    expected = {
        "short": "1 x 1 tokens leave some of 2 ranks none",
        "left padding": "must stand at the ends of sequences",
        "labels of padding": "padding has labels",
        "4D mask": "attention_mask must be a tensor (B, S)",
        "cache": "generate with the handle removed",
        "logits": "logits_to_keep counts from the end",
        "strange": "token_type_ids: ringflash does not know whether to shard it",
        "ends": f"must pack one row of {S} tokens",
        "rope": "position_ids must be (B, S)",
        "rows": "pack all sequences in one row",
        "labels": f"labels must be (B, S) = (1, {S})",
        "bias": "passes attention_bias to its attention",
        "no input": "needs input_ids (B, S)",
        "twice": "parallelized already",
        "copy": "cannot be copied",
        "another loss": "returns another loss than the cross-entropy of its tokens",
        "own loss": "only the mean cross-entropy over tokens",
        "dropout": "attention dropout is not supported, got 0.1",
        "none": "nothing",
        "chunks": "chunked attention over packed sequences is not supported",
        "layers": "only 1 of 2 layers attended through ringflash",
        "router": "output_router_logits",
    }
    for said in ranks(2).run(refused):
        assert said.keys() == expected.keys()
        assert not {name: said[name] for name, words in expected.items() if words not in said[name]}


def refused_models(rank: int) -> dict[str, str]:
    cp = ContextParallel()
    layers = make("gemma3, windows in turn", "eager")
    layers.config.layer_types = ["linear_attention", "full_attention"]
    small = {k: v for k, v in SIZES.items() if k not in ("num_key_value_heads", "head_dim")}
    roberta = transformers.RobertaForCausalLM(transformers.RobertaConfig(**small, is_decoder=True))
    said = {"padding counts": said_of(lambda: (hf.parallelize(roberta, cp), roberta(input_ids=tokens())))}
    models = {
        "dynamic": make("llama", "eager", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}),
        "layers": layers,
        "router": make("gpt-oss, sinks and windows", "eager", output_router_logits=True),
        "tuning": make("llama4, chunks", "eager", no_rope_layers=[1, 0], attn_temperature_tuning=True),
        "positions": transformers.BartForCausalLM(transformers.BartConfig(d_model=32, encoder_layers=1, decoder_layers=1)),
        "no model": torch.nn.Linear(2, 2),
    }
    return said | {name: said_of(lambda model=model: hf.parallelize(model, cp)) for name, model in models.items()}


def test_models_that_cannot_be_sharded_are_refused(ranks: Callable[[int], RankPool]) -> None:
    (said, _) = ranks(2).run(refused_models)
    assert 'rope_type "dynamic" depends on the longest position' in said["dynamic"]
    assert "layers of kind linear_attention mix tokens without attention" in said["layers"]
    assert "output_router_logits" in said["router"]
    assert "count positions from this rank's first token" in said["tuning"]
    assert "takes no position_ids" in said["positions"]
    assert "counts positions by itself, from its padding token on" in said["padding counts"]
    assert "Linear is no model of transformers" in said["no model"]


def disagreeing(rank: int) -> dict[str, str]:
    """What is said where ranks are not given the same, and the difference of what comes afterwards."""
    model = make("llama", "eager")
    ids = tokens()
    expected = model(input_ids=ids, labels=ids).loss.detach()
    hf.parallelize(model, ContextParallel())
    model(input_ids=ids, labels=ids)  # so that all kinds of calls are known
    other = ids.clone()
    other[0, 3] += rank
    masked = ids.clone()
    masked[0, 5 : 5 + rank] = hf.IGNORED
    cases: dict[str, dict[str, Any]] = {
        "tokens": {"input_ids": other},
        "labels": {"labels": masked},
        "length": {"input_ids": ids[:, : S - rank], "labels": ids[:, : S - rank]},
        "no labels": {"labels": None if rank else ids},
        "packing": {"position_ids": positions(PACKED) if rank else torch.arange(S)[None]},
        "refused": {"attention_mask": torch.zeros_like(ids)} if rank else {},
        "strange error": {"attention_mask": {"full": 1}} if rank else {},
    }
    said = {name: said_of(lambda case=case: model(**{"input_ids": ids, "labels": ids, **case})) for name, case in cases.items()}
    said["afterwards"] = f"{difference(model(input_ids=ids, labels=ids).loss.detach(), expected):.1e}"
    return said


def test_ranks_that_are_not_given_the_same_are_told(ranks: Callable[[int], RankPool]) -> None:
    first, second = ranks(2).run(disagreeing)
    differ = {
        "tokens": "input_ids: rank 0: checksum ",
        "labels": "labels: rank 0: checksum ",
        "length": f"tokens: rank 0: 1 x {S}; rank 1: 1 x {S - 1}.",
        "no labels": "labels: rank 0: checksum ",
        "packing": "packed sequences: rank 0: none; rank 1: 3, ",
    }
    for said in (first, second):
        for name, what in differ.items():
            assert said[name].startswith(f"the ranks disagree on {what}"), (name, said[name])
        assert float(said["afterwards"]) < CLOSE
    for name, words in (("refused", "must stand at the ends"), ("strange error", "got dict")):
        assert first[name] == f"rank 1 refused: {second[name]}" and words in second[name]


def otherwise(rank: int) -> dict[str, float]:
    """Differences to one device where models are called in other ways."""
    ids = tokens()
    model, found = make("llama", "eager"), {}
    teacher = make("mistral, windows", hf.NAME)
    with torch.no_grad():
        logits, loss = model(input_ids=ids).logits, model(input_ids=ids, labels=ids).loss
        taught = teacher(input_ids=ids).logits
    cp = ContextParallel()
    handle = hf.parallelize(model, cp)
    own = cp.for_mask(Mask.causal()).shard(logits)
    with torch.inference_mode():
        found["inference"] = difference(model(input_ids=ids, position_ids=torch.arange(S)[None]).logits, own)
        found["tuple"] = difference(model(input_ids=ids, labels=ids, return_dict=False)[0], loss)
        found["by place"] = difference(model(ids).logits, own)
    with torch.no_grad():
        found["bfloat16"] = 1e-3 * difference(_bfloat16(model, ids), own)  # 3e-3 of rounding
        found["compiled"] = difference(torch.compile(model, backend="eager")(input_ids=ids, labels=ids).loss, loss)
        inside: list[Tensor] = []
        hook = model.model.layers[0].register_forward_hook(lambda *_: inside.append(teacher(input_ids=ids).logits))
        found["around another"] = difference(model(input_ids=ids).logits, own)
        found["another"] = difference(inside[0], taught)
        hook.remove()

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        hook = model.model.layers[1].register_forward_hook(interrupt)
        with contextlib.suppress(KeyboardInterrupt):
            model(input_ids=ids)
        hook.remove()
        handle.remove()
        handle.remove()
        model.set_attn_implementation(hf.NAME)
        found["interrupted"] = difference(model(input_ids=ids).logits, logits)
    return found


def _bfloat16(model: Any, ids: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits: Tensor = model(input_ids=ids).logits
    return logits.float()


def test_other_ways_to_call_a_model(ranks: Callable[[int], RankPool]) -> None:
    assert not objections(ranks(2).run(otherwise))


def test_a_mask_that_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match="or_mask in it, which ringflash does not know"):
        hf.make_mask(1, 4, 4, mask_function=transformers.masking_utils.or_masks(transformers.masking_utils.causal_mask_function))
    with pytest.raises(ValueError, match="caches of a fixed length"):
        hf.make_mask(1, 1, 64, q_offset=8, mask_function=transformers.masking_utils.causal_mask_function)
    with pytest.raises(ValueError, match='gradients must be "mean"'):
        hf.parallelize(torch.nn.Linear(2, 2), None, "product")  # type: ignore[arg-type]
