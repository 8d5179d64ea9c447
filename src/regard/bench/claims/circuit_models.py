"""What the claims about circuits share: a model that reads the tasks' words, and the prompts that it answers right."""

from __future__ import annotations

from typing import Any

import torch

from ...testbeds.circuits import word_tokenizer
from ...testbeds.pairs import PairBatch
from .claim import Scale


def circuit_model(scale: Scale) -> tuple[Any, Any]:
    """The language model; in the quick form a small random one that knows the words."""
    if not scale.quick:
        return scale.language_model()
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = word_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **sizes)).eval()
    return model, tokenizer


def answered(scale: Scale, model: Any, batch: PairBatch, most: int, how: str = "likeliest") -> PairBatch:
    """At most so many of the prompts that the model answers right (in the quick form, of all).

    how: "likeliest": no other token is likelier. "choice": no other choice. "pair": the corrupted prompt's answer is not.
    """
    if not scale.quick:
        if how == "pair":
            batch = batch.rows(batch.logit_difference()(batch.logits(model), torch.arange(len(batch))) > 0)
        else:
            batch = batch.solved(model, among_choices=how == "choice")
    return batch.rows(range(min(most, len(batch))))
