"""What sparse methods for causal language models share: which layers stay dense, and which models they can serve."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..._checks import bad_type, require_int
from ..call import AttentionCall, UnsupportedModelError

DenseLayers = int | Sequence[int]


def check_dense_layers(dense_layers: Any) -> None:
    """An int >= 0 (that many first layers), or layer numbers (negative from the end)."""
    if isinstance(dense_layers, int):
        require_int("dense_layers", dense_layers, 0)
    elif not isinstance(dense_layers, Sequence) or not all(isinstance(layer, int) for layer in dense_layers):
        raise bad_type("dense_layers", dense_layers, "an int (that many first layers) or a sequence of layer numbers")


def stays_dense(dense_layers: DenseLayers, layer: int, num_layers: int) -> bool:
    """Whether `layer` of `num_layers` is one of the dense layers."""
    if isinstance(dense_layers, int):
        return layer < dense_layers
    return layer in dense_layers or layer - num_layers in dense_layers


def windowed(call: AttentionCall) -> bool:
    """Whether the layer's own sliding window already hides a part of the context."""
    return call.window is not None and call.window < call.seen


def require_causal(method: object, model: nn.Module) -> None:
    """Raise `UnsupportedModelError` unless some attention of `model` is causal; warn where the method leaves every layer dense."""
    if not any(getattr(module, "is_causal", False) for module in model.modules()):
        raise UnsupportedModelError(
            f"model: {type(model).__name__} has no causal self-attention, and {type(method).__name__} is for causal models only"
        )
    dense = getattr(method, "dense_layers", 0)
    number = getattr(text_config(model), "num_hidden_layers", None)
    if isinstance(number, int) and number and all(stays_dense(dense, layer, number) for layer in range(number)):
        warnings.warn(
            f"{type(method).__name__}: dense_layers={dense!r} leaves all {number} layers of {type(model).__name__} dense, "
            "so nothing is saved and nothing changes; use fewer",
            stacklevel=3,
        )


def text_config(model: nn.Module) -> Any:
    """The configuration of the model's text decoder, or None."""
    config = getattr(model, "config", None)
    get = getattr(config, "get_text_config", None)
    return get(decoder=True) if get is not None else config
