"""Which layers a method treats: the meaning of a method's field `layers`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .._checks import bad_type, require

LayerSpec = Sequence[int] | str | None
_NEED = 'None (all), layer numbers, "first:n", "last:n", "odd" or "even"'


def check_layers(layers: Any) -> None:
    """Raise unless `layers` is None (all), layer numbers (negative from the end), "first:n", "last:n", "odd" or "even"."""
    if isinstance(layers, str):
        _range(layers, 1)
    elif layers is not None and not (isinstance(layers, Sequence) and all(isinstance(layer, int) for layer in layers)):
        raise bad_type("layers", layers, _NEED)


def in_layers(layers: LayerSpec, layer: int, num_layers: int) -> bool:
    """Whether `layers` names `layer`, one of `num_layers`."""
    if layers is None:
        return True
    if isinstance(layers, str):
        return layer in _range(layers, num_layers)
    return layer in layers or layer - num_layers in layers


def _range(layers: str, num_layers: int) -> range:
    end, colon, count = layers.partition(":")
    if end in ("odd", "even") and not colon:
        return range(end == "odd", num_layers, 2)
    require(end in ("first", "last") and count.isdecimal(), "layers", layers, _NEED)
    return range(int(count)) if end == "first" else range(max(0, num_layers - int(count)), num_layers)
