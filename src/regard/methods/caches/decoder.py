"""What a KV-cache method needs to know of a model: its decoder's config, its layers, and its rotary embedding."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from ..call import UnsupportedModelError


def decoder_config(model: nn.Module, method: str) -> Any:
    """The config of the model's text decoder, or an error saying why a KV-cache method cannot serve it."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise UnsupportedModelError(
            f"{method}: {type(model).__name__} has no transformers config, so no KV cache to shape"
        )
    config = config.get_text_config(decoder=True)
    generates = getattr(model, "can_generate", lambda: False)() or getattr(config, "is_decoder", False)
    if not generates and not hasattr(config, "use_cache"):
        raise UnsupportedModelError(f"{method}: {type(model).__name__} is no decoder with a KV cache")
    return config


def kv_heads(config: Any) -> int:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def ragged_layers(model: nn.Module, make: Any, method: str) -> Any:
    """A transformers `Cache` with `make(layer number)` for each layer that attends to everything; sliding-window layers keep their own."""
    from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache

    config = decoder_config(model, method)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds - {"full_attention", "sliding_attention"}:
        raise UnsupportedModelError(
            f"{method}: {type(model).__name__} has layers of kinds {sorted(kinds)}, not only attention"
        )
    plain = DynamicCache(config=config).layers
    if len(plain) < config.num_hidden_layers:
        plain = [DynamicLayer() for _ in range(config.num_hidden_layers)]
    sliding = [getattr(layer, "is_sliding", False) for layer in plain]
    if all(sliding):
        raise UnsupportedModelError(
            f"{method}: every layer of {type(model).__name__} has a sliding window already, so there is no past to shape"
        )
    layers = [layer if slides else make(i) for i, (layer, slides) in enumerate(zip(plain, sliding))]
    cache = Cache(layers=layers)
    if getattr(model.config, "is_encoder_decoder", False):
        return EncoderDecoderCache(cache, DynamicCache())
    return cache


def find_rotary(model: nn.Module) -> Any:
    """The model's rotary embedding as `move(keys, by)`, in its own convention; None where there is none of constant frequencies.

    `move(keys (B, H, n, D), by)` turns rotated keys forward by `by` positions: (B,), one for a row, or (B, n), one for each entry.
    """
    embedding = next(
        (m for n, m in model.named_modules() if n.split(".")[-1] == "rotary_emb" and hasattr(m, "inv_freq")), None
    )
    if embedding is None or getattr(embedding, "rope_type", "default") in ("dynamic", "longrope"):
        return None
    rotate_half = getattr(sys.modules[type(embedding).__module__], "rotate_half", None)
    if rotate_half is None:
        return None

    def move(keys: Tensor, by: Tensor) -> Tensor:
        steps = by[:, None] if by.dim() == 1 else by
        turns = embedding.forward(keys.float(), steps)  # not through hooks: who watches them is to hear the model alone
        cos, sin = (part.float() / embedding.attention_scaling for part in turns)
        cos, sin = cos[:, None], sin[:, None]
        turned, rest = keys[..., : cos.shape[-1]].float(), keys[..., cos.shape[-1] :]
        turned = turned * cos + rotate_half(turned) * sin
        return torch.cat([turned.to(keys.dtype), rest], dim=-1)

    return move
