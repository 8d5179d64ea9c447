"""CCA-Attention on a pretrained model, Chen et al. (2024, ICML 2025, arXiv 2412.12465); no code is published.

The computation is `regard.ops.core_context_attention`, the cache `methods/caches/core_context.py`. No parameters are added: a
pretrained model takes it as it is, and the paper fine-tunes it so (about 1000 steps).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from ...ops.core_context import check_sizes, core_context_attention
from ..caches.core_context import CoreContextLayer, plainly_causal
from ..caches.decoder import decoder_config, find_rotary, ragged_layers
from ..call import AttentionCall, Method, UnsupportedModelError
from ..layer_spec import LayerSpec, check_layers, in_layers
from .layers import require_causal, windowed

_rotary_of: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


@dataclass
class CCAAttention(Method):
    """Old tokens are seen as one pooled token for every `group` of them, the last `window` one by one, in prefill, decoding and training.

    The cache holds N / group core tokens and the last window + group - 1 tokens. Groups are counted from each row's first real
    token. A prompt of at most `window` tokens is exact. Layers whose own sliding window is shorter than the context, and layers not
    in `layers`, are left as they are.

    Args:
        group: tokens a core token stands for. window: tokens seen one by one (the query's own included); up to group - 1 more.
        pool: "cca" (by the attention of the group's last token), "mean" or "max".
        per_head: pooling weights of each kv head's own instead of the layer's.
        layers: None (all), numbers (negative from the end), "first:n", "last:n", "odd" or "even".

    Raises (from `attach`):
        UnsupportedModelError: the model has no causal self-attention, or rotary positions of a kind that keys cannot be moved by.
    """

    group: int = 16
    window: int = 1024
    pool: str = "cca"
    per_head: bool = False
    layers: LayerSpec = None

    def __post_init__(self) -> None:
        check_sizes(self.group, self.window, self.pool)
        check_layers(self.layers)

    def check(self, model: nn.Module) -> None:
        require_causal(self, model)
        self.cache(model)  # says why, where it cannot

    def cache(self, model: nn.Module) -> Any:
        from transformers.cache_utils import DynamicLayer

        name = type(self).__name__
        rotate, total = _rotation(model), decoder_config(model, name).num_hidden_layers

        def make(number: int) -> Any:
            if not in_layers(self.layers, number, total):
                return DynamicLayer()
            return CoreContextLayer(self.group, self.window, self.pool, self.per_head, rotate)

        return ragged_layers(model, make, name)

    def attend(self, call: AttentionCall) -> Tensor | None:
        cached = isinstance(call.cache, CoreContextLayer)
        if not cached and (call.cache is not None or windowed(call)):
            return None
        if not plainly_causal(call):
            raise ValueError(
                f"attention_mask: got one that hides more than left padding and the future in layer {call.layer}, "
                f"need a causal one for {type(self).__name__}: its groups are counted along the whole row"
            )
        if cached:
            return call.cache.attend(call)
        return core_context_attention(
            call.q,
            call.k,
            call.v,
            group=self.group,
            window=self.window,
            pool=self.pool,
            per_head=self.per_head,
            rotate=None if call.session is None else _rotation(call.session.model),
            start=None if call.mask is None else call.start,
            scale=call.scale,
            soft_cap=call.soft_cap,
            dropout=call.dropout,
            backend=call.backend,
        )


def _rotation(model: nn.Module) -> Any:
    """How the model's rotated keys are moved, found once a model; None where it has no rotary positions."""
    if model not in _rotary_of:
        move = find_rotary(model)
        if move is None and any("rotary" in name.rpartition(".")[2] for name, _ in model.named_modules()):
            raise UnsupportedModelError(
                f"CCAAttention moves keys to the last token of their group, and {type(model).__name__} has rotary positions of a kind "
                "(dynamic, longrope, or its own) that cannot be moved"
            )
        _rotary_of[model] = move
    return _rotary_of[model]
