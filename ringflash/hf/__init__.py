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

from ringflash.hf.layers import NAME, attend, make_mask
from ringflash.hf.parallel import IGNORED, Parallel, parallelize

__all__ = ["IGNORED", "NAME", "Parallel", "attend", "make_mask", "parallelize"]
