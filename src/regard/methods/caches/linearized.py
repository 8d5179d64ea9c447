"""A pretrained model with linear attention in place of its softmax, and a state in place of its KV cache.

The Hedgehog & the Porcupine (Zhang et al. 2024, arXiv 2402.04347), its conversions; code read for numbers: the authors' later
HazyResearch/lolcats @ 375df84 (Apache-2.0). No architecture is patched: rotary embedding, projections and everything else stay the
model's own. What differs from lolcats: bidirectional models, padding, any mask, states that follow beams and batches, their float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..._checks import bad_value, require
from ...nn.sequence.learned_maps import MapPair, heads_for
from ...ops.reference import weighted_values
from ...ops.state.linear import linear_attention
from ...ops.state.linear_state import LinearState
from ...ops.state.linear_weights import linear_attention_weights
from ..call import AttentionCall, Method, UnsupportedModelError
from .layer import AttendingLayer
from .linear_maps import as_maps, load_linear_maps, softmax_layers

__all__ = ["Linearized", "LinearizedEncoder", "LinearizedLayer", "linearized_weights"]


@dataclass
class Linearized(Method):
    """Softmax layers become linear attention: phi_q(q) (sum phi_k(k) v) / phi_q(q) (sum phi_k(k)), without 1 / sqrt(d).

    Maps come from `regard.methods.linear_maps` and are taught by `regard.losses.fit_linear_maps`; an untaught conversion is of no use.
    While generating, a layer keeps one matrix a head, whatever the length. Layers without maps stay as they are, so do those with a
    sliding window. For models that attend in both directions (BERT) there is `LinearizedEncoder`.

    Args:
        maps: `MapPair`s by layer number, or the file they are in. eps: added to the sum of the weights.

    Causal and padding masks run in time linear in the length; any other mask is honoured by way of the quadratic weights.

    Raises:
        UnsupportedModelError (from `attach`): layers that are not softmax attention, or maps of other sizes. ValueError: position biases
        or sink logits in the model's own attention, which a state cannot honour; a cache that is to take tokens back.
    """

    maps: Mapping[Any, nn.Module] | nn.ModuleDict | str | Path | None = None
    eps: float = 1e-12

    def __post_init__(self) -> None:
        if isinstance(self.maps, (str, Path)):
            self.maps = load_linear_maps(self.maps)
        self.made = getattr(self.maps, "made", None)  # how they were made, for files
        self.maps = as_maps(self.maps)
        require(self.eps >= 0, "eps", self.eps, "a number >= 0")

    def pair(self, layer: int) -> MapPair | None:
        """The maps of a layer, or None."""
        return self.maps.get(str(layer))  # type: ignore[union-attr, return-value, operator]

    def check(self, model: nn.Module) -> None:
        layers, heads, kv_heads, head_dim = softmax_layers(model)
        odd = [layer for layer in self.maps if int(layer) not in layers]  # type: ignore[union-attr]
        if odd:
            raise UnsupportedModelError(
                f"model: {type(model).__name__} has softmax layers {layers}, and Linearized has maps for {odd}"
            )
        for pair in self.maps.values():  # type: ignore[union-attr]
            for one, allowed in ((pair.q, {1, heads}), (pair.k, {1, heads, kv_heads})):
                made_for = getattr(one, "num_heads", heads), getattr(one, "head_dim", head_dim)
                if made_for[0] not in allowed or made_for[1] != head_dim:
                    raise UnsupportedModelError(
                        f"model: {type(model).__name__} has {heads} query and {kv_heads} kv heads of {head_dim}, the maps are for "
                        f"{made_for[0]} of {made_for[1]}"
                    )

    def applies(self, call: AttentionCall) -> bool:
        return super().applies(call) and self.pair(call.layer) is not None

    def cache(self, model: nn.Module) -> Any:
        from transformers.cache_utils import DynamicLayer

        from .decoder import ragged_layers

        def make(layer: int) -> Any:
            pair = self.pair(layer)
            return DynamicLayer() if pair is None else LinearizedLayer(pair, self.eps)

        return ragged_layers(model, make, type(self).__name__)

    def attend(self, call: AttentionCall) -> Tensor | None:
        if isinstance(call.cache, LinearizedLayer):
            return call.cache.attend(call)
        pair = self.pair(call.layer)
        assert pair is not None
        k, v = heads_for(pair.k, call.k, call.v)
        causal, keys, known = _plain_mask(call)
        if known:
            map_k = pair.k if keys is None else _only(pair.k, keys)
            options: Any = {"feature_map": (pair.q, map_k), "normalize": True, "causal": causal, "eps": self.eps}
            return linear_attention(call.q, k, v, **options)  # type: ignore[return-value]
        weights = linearized_weights(call, pair, self.eps)
        return weighted_values(weights, v).to(call.q.dtype)


@dataclass
class LinearizedEncoder(Linearized):
    """`Linearized` for models that attend in both directions (BERT, ViT): one state of all keys, and no cache."""

    cache = Method.cache


def linearized_weights(call: AttentionCall, pair: MapPair, eps: float = 1e-12) -> Tensor:
    """The weights (B, H, N, M) with which a converted layer reads the values of a call, float32 or float64; quadratic."""
    k, _ = heads_for(pair.k, call.k, call.v)
    causal = call.mask is None and call.causal and call.q_len > 1
    return linear_attention_weights(call.q, k, feature_map=(pair.q, pair.k), causal=causal, mask=call.mask, eps=eps)


def _plain_mask(call: AttentionCall) -> tuple[bool, Tensor | None, bool]:
    """(causal, keys that exist (B, M) or None for all, True) where that says all of the call's mask; else (..., False)."""
    if call.mask is None:
        causal = call.causal and call.q_len > 1
        return causal, None, not causal or call.q_len == call.kv_len
    known = getattr(call.mask, "linear_keys", None)
    if known is None:
        known = call.mask.linear_keys = _read_mask(call.mask, call.q_len == call.kv_len)  # type: ignore[attr-defined]
    return known


def _read_mask(mask: Tensor, square: bool) -> tuple[bool, Tensor | None, bool]:
    keys = mask[:, 0, -1]
    if mask.shape[1] != 1:
        return False, None, False
    if bool((mask == keys[:, None, None]).all()):  # one set of keys for every query
        return False, None if bool(keys.all()) else keys, True
    low = torch.ones(mask.shape[2:], dtype=torch.bool, device=mask.device).tril() & keys[:, None, None]
    if square and bool((mask == low).all()):
        return True, None if bool(keys.all()) else keys, True
    return True, None, False


def _only(feature_map: Callable[[Tensor], Tensor], keys: Tensor) -> Callable[[Tensor], Tensor]:
    """The map with features of zero for keys (B, M) that do not exist."""
    return lambda x: feature_map(x).masked_fill(~keys[:, None, :, None], 0)


class LinearizedLayer(AttendingLayer):
    """The cache layer of `Linearized`: the state of its linear attention, of one size for any length.

    Attributes:
        state: a `LinearState`, or None before the first token.
    """

    is_croppable = False

    def __init__(self, pair: MapPair, eps: float) -> None:
        self.pair, self.eps = pair, eps
        super().__init__()

    def clear(self) -> None:
        self.state: LinearState | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return 0 if self.state is None else self.state.nbytes

    def map_rows(self, fn: Callable[[Tensor], Tensor]) -> None:
        if self.state is not None:
            assert self.state.normaliser is not None
            self.state = LinearState(fn(self.state.kv), fn(self.state.normaliser))

    def drop_last(self, count: int) -> None:
        raise bad_value(
            "crop", -count, "a cache that can take tokens back, which a state cannot: they are summed into it"
        )

    def attend(self, call: AttentionCall) -> Tensor:
        keys, values, before = self.take(call)
        keys, values = heads_for(self.pair.k, keys, values)
        map_k: Callable[[Tensor], Tensor] = self.pair.k
        if self.latest_start > before:
            assert self.start is not None
            place = torch.arange(before, before + keys.shape[2], device=keys.device)
            map_k = _only(self.pair.k, place >= self.start[:, None])
        out, self.state = linear_attention(
            call.q,
            keys,
            values,
            feature_map=(self.pair.q, map_k),
            normalize=True,
            state=self.state,
            return_state=True,
            eps=self.eps,
        )  # type: ignore[misc]
        return out
