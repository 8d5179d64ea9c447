"""Tiny stand-ins that tests share: a tokenizer that knows characters, and small random models."""

from __future__ import annotations

import torch


class CharTokenizer:
    """One token a character (code points folded into `vocab_size`); enough of a tokenizer's interface for our own code."""

    def __init__(self, vocab_size: int = 128) -> None:
        self.vocab_size = vocab_size
        self.eos_token_id = self.pad_token_id = 0
        self.bos_token_id = None

    def __call__(self, text, return_tensors=None, add_special_tokens=True, verbose=True, **_):
        ids = [1 + ord(c) % (self.vocab_size - 1) for c in text]
        if return_tensors == "pt":
            tensor = torch.tensor([ids])
            return {"input_ids": tensor, "attention_mask": torch.ones_like(tensor)}
        return {"input_ids": ids}

    def decode(self, ids, **_):
        return "".join(chr((int(i) - 1) % 128) for i in torch.as_tensor(ids).flatten().tolist())


def tiny_llama(seed: int = 0, **options):
    """A random Llama: 3 layers, 4 heads, 2 kv heads, head_dim 8."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    sizes |= {
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return LlamaForCausalLM(LlamaConfig(**(sizes | options))).eval()
