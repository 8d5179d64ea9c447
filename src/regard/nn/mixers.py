"""Every mixer of the library by name, under one call: what shells like `regard.models.SmallLM` are filled with.

`build_mixer("lightning", dim=128, num_heads=4)` gives the layer itself, (B, N, dim) -> (B, N, dim). What a layer may have beside that,
found by its signature and not by its type:

- a second result (always, or with `return_aux=True`): a scalar, or what has a scalar `balance_loss`, which training adds to the task's
  loss (`run_mixer` keeps it apart);
- `layer(x, state=..., return_state=True) -> (y, state)`, or `layer.step(x (B, 1, dim), state) -> (y, state)`: decoding (`decode_mixer`).
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import bad_value, require, require_int, require_name, require_tensor

__all__ = [
    "MIXERS",
    "MixerKind",
    "build_mixer",
    "can_decode",
    "decode_mixer",
    "mixer_names",
    "run_mixer",
    "state_bytes",
]


@dataclass(frozen=True)
class MixerKind:
    """How a name becomes a layer.

    Attributes:
        target: "module:Class" below `regard.nn`; built as `Class(dim, num_heads=..., causal=..., **options)`. Of `num_heads`, `causal`,
            `layer_idx`, `num_layers`, `max_len` and `grid` it is given those that it takes.
        options: of this name, before the caller's. causal, full: whether it can be causal, and whether it can see everything.
        layout: "sequence", (B, N, C); "grid", (B, height * width, C) of a grid known in advance; or "map", (B, C, H, W).
    """

    target: str
    options: Mapping[str, Any] = field(default_factory=dict)
    causal: bool = True
    full: bool = True
    layout: str = "sequence"

    @property
    def layer(self) -> type[nn.Module]:
        return _find(self.target)


def _kind(target: str, can: str = "causal full", layout: str = "sequence", **options: Any) -> MixerKind:
    return MixerKind(target, options, "causal" in can.split(), "full" in can.split(), layout)


MIXERS: dict[str, MixerKind] = {
    # softmax, all keys or some of them
    "softmax": _kind(".sequence.softmax_attention:SoftmaxAttention"),
    "sliding_window": _kind(".sequence.softmax_attention:SoftmaxAttention", "causal", window=64),
    "gated": _kind(".sequence.gated_attention:GatedAttention"),
    "gated_headwise": _kind(".sequence.gated_attention:GatedAttention", gate="headwise"),
    "similarity": _kind(".sequence.similarity_attention:SimilarityAttention"),
    "sigmoid": _kind(".sequence.similarity_attention:SimilarityAttention", similarity="sigmoid", normalize="none"),
    "softmax_off_by_one": _kind(".sequence.similarity_attention:SimilarityAttention", normalize="sum+1"),
    "mixture_of_heads": _kind(".sequence.mixture_of_heads:MixtureOfHeadAttention", shared=1, active=2),
    "query_norm_heads": _kind(".sequence.query_norm_heads:QueryNormHeadAttention"),
    "relative_conv": _kind(".sequence.rcmha:RelativeConvAttention"),
    "selective": _kind(".sequence.selective_attention:SelectiveAttention", "causal", variant="paper"),
    "selective_position": _kind(".sequence.selective_attention:SelectiveAttention", "causal"),
    "dynamic_mask": _kind(".sequence.dynamic_mask_attention:DynamicMaskAttention", keep=64),
    "routing": _kind(
        ".sequence.routing_attention:RoutingAttention", num_clusters=4, window=32, block=32, variant="paper"
    ),
    "sparse_linear": _kind(
        ".sequence.sparse_linear_attention:SparseLinearAttention", "causal", causal=True, k=8, width=16, max_len=2048
    ),
    "combiner": _kind(".sequence.combiner_attention:CombinerAttention", segment=16),
    "long_short": _kind(
        ".sequence.long_short_attention:CausalLongShortAttention", "causal", chunk=16, window=32, memory=64
    ),
    "probsparse": _kind(".sequence.probsparse_attention:ProbSparseAttention", "full"),
    "nystrom": _kind(".sequence.landmark_mixers:NystromAttention", "full"),
    # a state in place of the softmax
    "linear": _kind(".sequence.linear_attention:LinearAttention", feature_map="elu+1"),
    "linear_relu": _kind(".sequence.linear_attention:LinearAttention", feature_map="relu"),
    "linear_symmetric": _kind(".sequence.linear_attention:LinearAttention", feature_map="symmetric_softmax"),
    "hedgehog": _kind(".sequence.hedgehog:HedgehogAttention"),
    "based": _kind(".sequence.based:BasedLinearAttention"),
    "gated_conv": _kind(".sequence.based:GatedShortConv", "causal"),
    "linear_decay": _kind(
        ".sequence.linear_attention:LinearAttention",
        "causal",
        feature_map="silu",
        normalize=False,
        decay="token",
        out_norm=True,
    ),
    "lightning": _kind(".sequence.lightning_attention:LightningAttention", "causal"),
    "performer": _kind(".sequence.kernel_mixers:PerformerAttention", "full"),
    "cosformer": _kind(".sequence.kernel_mixers:CosformerAttention", "full"),
    "s4d": _kind(".sequence.s4d:S4D"),
    # tokens of an image
    "agent": _kind(".spatial.agent_attention:AgentAttention", "full", "grid", agent_num=4),
    "inline": _kind(".spatial.inline_attention:InLineAttention", "full", "grid"),
    "magnitude": _kind(".spatial.magnitude_attention:MagnitudeAwareAttention", "full", "map"),
    "selective_scan_2d": _kind(".spatial.selective_scan_2d:SelectiveScan2D", "full", "map"),
    "relu_floor": _kind(".spatial.l2vit_blocks:ReluLinearAttention", "full"),
    "key_driven": _kind(".sequence.grouped_query_attention:GroupedQueryAttention", "full", allocation="key_norm"),
    "single_head": _kind(".spatial.single_head_self_attention:SingleHeadSelfAttention", "full", "map"),
    "linear_normalized": _kind(".sequence.linear_attention:NormalizedLinearAttention", "causal"),
    "qlstm": _kind(".sequence.qlstm:QLSTM", "causal"),
    "rat": _kind(".sequence.recurrent_chunks:RATAttention", "causal"),
    "gated_recurrence": _kind(".sequence.recurrent_chunks:GatedRecurrence", "causal"),
    "gated_mlp": _kind(".sequence.deconstructed:GatedMLPMixer", "causal"),
    "taylor": _kind(".sequence.deconstructed:TaylorAttention"),
    "cumulative_score": _kind(".sequence.deconstructed:CumulativeScoreAttention", "causal"),
    "fixed_map": _kind(".sequence.deconstructed:FixedMapAttention", "causal"),
    "titans_lmm": _kind(".sequence.neural_memory:NeuralMemory", "causal"),
    "titans_mac": _kind(".sequence.titans:TitansMAC", "causal"),
    "titans_mag": _kind(".sequence.titans:TitansMAG", "causal"),
    "titans_mal": _kind(".sequence.titans:TitansMAL", "causal"),
}
"""Name -> how to build it. One line a mixer; add yours."""


@cache
def _find(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module, __package__), name)


@cache
def _takes(target: str) -> frozenset[str]:
    """Named arguments of a class, those that it passes on to its bases with `**options` included."""
    names: set[str] = set()
    for base in _find(target).__mro__:
        if "__init__" not in vars(base) or base is nn.Module:
            continue
        parameters = inspect.signature(base.__init__).parameters.values()  # type: ignore[misc]
        names |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return frozenset(names - {"self"})


def takes(name: str, option: str) -> bool:
    """Whether the mixer called `name` has this option."""
    return option in _takes(MIXERS[require_name("mixer", name, MIXERS)].target)


def mixer_names(causal: bool | None = None, layout: str | None = "sequence") -> list[str]:
    """Names of mixers that can be causal (True), see everything (False) or either (None), of one layout (None: any)."""
    return [
        name
        for name, kind in MIXERS.items()
        if (causal is None or (kind.causal if causal else kind.full)) and layout in (None, kind.layout)
    ]


def build_mixer(
    name: str,
    dim: int,
    num_heads: int,
    causal: bool = True,
    *,
    layer_idx: int = 0,
    num_layers: int = 1,
    max_len: int | None = None,
    grid: tuple[int, int] | None = None,
    **options: Any,
) -> nn.Module:
    """The layer called `name`, dim channels in and out.

    Args:
        name: one of `MIXERS`. dim, num_heads: as every mixer has them. causal: whether a token sees no later ones.
        layer_idx, num_layers: which layer of how many, for those whose decay depends on it. max_len: longest sequence, for those that
            must know. grid: (height, width) of an image's tokens, for the layout "grid". options: the layer's own, over those of
            `MIXERS[name]`.

    Raises:
        ValueError: an unknown name, an option that the layer does not have, or a pattern that it cannot do.
    """
    kind = MIXERS[require_name("mixer", name, MIXERS)]
    require_int("dim", dim, 1)
    require_int("num_heads", num_heads, 1)
    if not (kind.causal if causal else kind.full):
        able = ", ".join(mixer_names(causal, kind.layout))
        raise bad_value("mixer", name, f"one that can be {'causal' if causal else 'bidirectional'}: {able}")
    known = _takes(kind.target) | set(kind.options)
    for option in options:
        require(option in known, "options", option, f"one of {name!r}: {', '.join(sorted(known))}")
    if kind.layout == "grid" and grid is None:
        raise bad_value("grid", grid, f"(height, width) of the tokens, for the mixer {name!r}")
    given: dict[str, Any] = {
        "num_heads": num_heads, "layer_idx": layer_idx, "num_layers": num_layers, "max_len": max_len, "causal": causal, "grid": grid,
    }  # fmt: skip
    given = {key: value for key, value in given.items() if key in known and value is not None}
    return kind.layer(dim, **{**given, **kind.options, **options})


def run_mixer(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """(what the layer makes of x, its own loss or None)."""
    out = layer(x, return_aux=True) if _forward_has(layer, "return_aux") else layer(x)
    if isinstance(out, Tensor):
        return out, None
    y, aux = out[0], out[1] if len(out) > 1 else None
    aux = getattr(aux, "balance_loss", aux)
    return y, aux if isinstance(aux, Tensor) and aux.dim() == 0 else None


def _forward_has(layer: nn.Module, *names: str) -> bool:
    return set(inspect.signature(layer.forward).parameters).issuperset(names)


def can_decode(layer: nn.Module) -> bool:
    """Whether the layer goes on from a state, and so needs no token twice."""
    if not getattr(layer, "causal", True):
        return False
    return _forward_has(layer, "state", "return_state") or callable(getattr(layer, "step", None))


def decode_mixer(layer: nn.Module, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
    """x (B, N, dim), the tokens after those that `state` has seen (None: the first ones) -> (their outputs, the next state).

    Raises ValueError where the layer keeps no state (`can_decode`).
    """
    require_tensor("x", x, dims=3, floating=True)
    if not can_decode(layer):
        raise bad_value(
            "layer", type(layer).__name__, "a causal mixer with a state: `forward(x, state=, return_state=)` or `step`"
        )
    if _forward_has(layer, "state", "return_state"):
        return layer(x, state=state, return_state=True)
    outs = []
    for token in x.split(1, dim=1):
        out, state = layer.step(token, state)  # type: ignore[operator]
        outs.append(out)
    return torch.cat(outs, dim=1) if outs else x, state


def state_bytes(state: Any) -> int:
    """Bytes of all tensors in a state, whatever it is made of (tensors, tuples, lists, mappings, dataclasses, objects with `nbytes`)."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, Mapping):
        return sum(map(state_bytes, state.values()))
    if isinstance(state, (tuple, list)):
        return sum(map(state_bytes, state))
    if dataclasses.is_dataclass(state) and not isinstance(state, type):
        return sum(state_bytes(getattr(state, one.name)) for one in dataclasses.fields(state))
    return int(getattr(state, "nbytes", 0))
