"""The feature maps of a whole converted model: made for it, written to a file, read from one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..._checks import bad_type, bad_value, require, require_name
from ..._files import write_whole
from ...nn.sequence.learned_maps import LEARNED_MAPS, MapPair, build_map_pair
from ...ops.state.feature_maps import FEATURE_MAPS
from ..call import UnsupportedModelError
from ..layer_spec import LayerSpec, check_layers, in_layers

__all__ = ["linear_maps", "load_linear_maps", "map_metadata", "save_linear_maps", "softmax_layers"]

_KEY = "linear_maps"


def softmax_layers(model: nn.Module) -> tuple[list[int], int, int, int]:
    """Numbers of the model's softmax attention layers that see everything before them; query heads, kv heads and head_dim.

    Raises `UnsupportedModelError` for a model without softmax attention, or with layers of another kind (state space, linear
    attention, convolution) that a conversion knows nothing of. Layers with a sliding window of their own are left out.
    """
    config: Any = getattr(model, "config", None)
    name = type(model).__name__
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    heads = getattr(config, "num_attention_heads", None)
    count = getattr(config, "num_hidden_layers", None)
    if not isinstance(heads, int) or not isinstance(count, int):
        raise UnsupportedModelError(
            f"model: {name} has no softmax attention layers to convert (its config tells of no attention heads); need a transformers "
            "language model with softmax attention"
        )
    kinds = list(getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or [])
    other = sorted(set(kinds) - {"full_attention", "sliding_attention", "attention"})
    if other:
        where = [layer for layer, kind in enumerate(kinds) if kind in other]
        raise UnsupportedModelError(
            f"model: layers {where[:6]}{'...' if len(where) > 6 else ''} of {name} are {', '.join(other)}, not softmax attention; only "
            "models whose layers are all softmax attention can be converted"
        )
    layers = [layer for layer in range(count) if not kinds or kinds[layer] != "sliding_attention"]
    if not layers:
        raise UnsupportedModelError(
            f"model: every layer of {name} has a sliding window already; there is none to convert"
        )
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return layers, heads, kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def linear_maps(
    model: nn.Module, kind: str = "hedgehog", *, layers: LayerSpec = None, share_kv: bool = False, **options: Any
) -> nn.ModuleDict:
    """Fresh feature maps for the softmax layers of a transformers model: layer number -> `MapPair` (`q` and `k`).

    Args:
        kind: a name in `regard.nn.LEARNED_MAPS` ("hedgehog", "t2r", "learned_elu", ...) or of a map without weights ("elu+1", "relu", ...).
        layers: which to convert; None: all (layers with a sliding window of their own never are).
        share_kv: one key map for each kv head; False: one for each query head, as the authors have it.
        options: of learned maps (`feature_dim`, `tie`, `init`, `bias`, ...; see `regard.nn.LearnedFeatureMap`).

    Raises:
        UnsupportedModelError: a model whose layers are not softmax attention. ValueError, TypeError: arguments.
    """
    if not isinstance(model, nn.Module):
        raise bad_type("model", model, "a transformers model")
    require_name("kind", kind, [*LEARNED_MAPS, *FEATURE_MAPS])
    check_layers(layers)
    found, heads, kv_heads, head_dim = softmax_layers(model)
    chosen = [layer for layer in found if in_layers(layers, layer, max(found) + 1)]
    require(bool(chosen), "layers", layers, f"some of {found}")
    made = {
        "kind": kind, "layers": chosen, "num_heads": heads, "head_dim": head_dim, "num_kv_heads": kv_heads if share_kv else heads,
        "options": options,
    }  # fmt: skip
    return _build(made).to(next(model.parameters()).device)


def save_linear_maps(maps: nn.ModuleDict, path: str | Path) -> Path:
    """Write maps to one safetensors file, whole or not at all, with all that is needed to make them again."""
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in maps.state_dict().items()}
    return write_whole(path, save(tensors, map_metadata(maps)))


def map_metadata(maps: nn.ModuleDict) -> dict[str, str]:
    """What a file of maps says of how they are made."""
    made = getattr(maps, "made", None)
    if made is None:
        raise bad_type("maps", maps, "maps made by `linear_maps` or `load_linear_maps`")
    return {_KEY: json.dumps(made)}


def load_linear_maps(source: str | Path) -> nn.ModuleDict:
    """Maps out of a file of `save_linear_maps`, `fit_linear_maps` or `fit_lora`. Raises ValueError where it holds none."""
    from safetensors import SafetensorError, safe_open

    path = Path(source)
    require(path.is_file(), "source", str(path), "a file that is there")
    try:
        with safe_open(str(path), framework="pt") as file:
            made = json.loads((file.metadata() or {}).get(_KEY, "null"))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise bad_value("source", f"{path} ({error})", "a whole safetensors file of feature maps") from error
    require(made is not None, "source", str(path), "a file with feature maps in it")
    return maps_from(made, state)


def maps_from(made: Mapping[str, Any], state: Mapping[str, Tensor], prefix: str = "") -> nn.ModuleDict:
    """Maps as `made` says, with the tensors of `state` below `prefix`, or with those that have no prefix."""
    maps = _build(dict(made))
    ours = maps.state_dict()
    held = {name: state[key] for name in ours if (key := prefix + name if prefix + name in state else name) in state}
    missing = sorted(set(ours) - set(held))
    require(not missing, "source", f"no {', '.join(missing[:4])}", "every tensor of the maps")
    maps.load_state_dict(held)
    return maps.eval()


def _build(made: dict[str, Any]) -> nn.ModuleDict:
    given = (
        {"num_kv_heads": made["num_kv_heads"], **made["options"]} if made["kind"] in LEARNED_MAPS else made["options"]
    )
    maps = nn.ModuleDict(
        {str(n): build_map_pair(made["kind"], made["num_heads"], made["head_dim"], **given) for n in made["layers"]}
    )
    maps.made = made  # type: ignore[assignment]
    return maps


def as_maps(maps: Any) -> Mapping[str, MapPair]:
    """What a method was given as maps, checked: layer number -> pair."""
    if isinstance(maps, (nn.ModuleDict, Mapping)):
        maps = {str(layer): pair for layer, pair in maps.items()}
    if not isinstance(maps, Mapping) or not maps or not all(isinstance(pair, MapPair) for pair in maps.values()):
        raise bad_type("maps", maps, "pairs of maps by layer number (`linear_maps`, `load_linear_maps`), or their file")
    return maps
