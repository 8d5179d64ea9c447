"""The gates of a whole model: made for it, written to a file, read from one, or from the authors' checkpoints."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..._checks import bad_type, bad_value, require
from ..._files import write_whole
from ...nn.sequence.attention_gate import GATE_TYPES, AttentionGate, DecodeAttentionGate
from .layers import text_config

Gates = Mapping[str, nn.Module] | nn.ModuleDict  # layer number -> gate, as a `ModuleDict` holds them
_OPTIONS = ("num_heads", "num_kv_heads", "head_dim", "gate_dim", "block_size", "k_pool")
_LAYER = re.compile(r"(?:^|\.)(\d+)\.(?:self_attn\.attn_gate\.)?(?=(?:mask_|attngate_|linear_|norm_))")


def seer_gates(model: nn.Module, *, decode: bool = False, **options: Any) -> nn.ModuleDict:
    """Fresh gates for every layer of a transformers model, as `ModuleDict` from layer number to gate.

    Args:
        decode: `DecodeAttentionGate`s (SeerAttention-R) in place of `AttentionGate`s.
        options: of the gate's class (`gate_dim`, `block_size`, `q_pool`, `k_pool`, ...).
    """
    config = text_config(model)
    require(hasattr(config, "num_attention_heads"), "model", type(model).__name__, "a transformers language model")
    heads = config.num_attention_heads
    sizes = {
        "num_heads": heads,
        "num_kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
    }
    kind = DecodeAttentionGate if decode else AttentionGate
    gates = {str(layer): kind(**sizes, **options) for layer in range(config.num_hidden_layers)}
    device = next(model.parameters()).device
    return nn.ModuleDict(gates).to(device)


def save_seer_gates(gates: Gates, path: str | Path) -> Path:
    """Write gates to one safetensors file, whole or not at all, with all that is needed to make them again."""
    from safetensors.torch import save

    tensors = {
        f"{layer}.{name}": tensor.detach().cpu().contiguous()
        for layer, gate in gates.items()
        for name, tensor in gate.state_dict().items()
    }
    return write_whole(path, save(tensors, gate_metadata(gates)))


def gate_metadata(gates: Gates) -> dict[str, str]:
    """What a file of gates says of how they are made."""
    first: Any = next(iter(gates.values()))
    made = {name: getattr(first, name) for name in _OPTIONS}
    if isinstance(first, DecodeAttentionGate):
        made |= {"decode": True, "q_head_pool": first.q_head_pool, "qk_norm": first.norm_q is not None}
    else:
        made |= {"q_pool": first.q_pool, "force_double": first.linear_q is not None}
    return {"seer_gates": json.dumps(made)}


def load_seer_gates(
    source: str | Path | Mapping[str, Tensor],
    model: nn.Module | None = None,
    gate_type: str | None = None,
    **options: Any,
) -> nn.ModuleDict:
    """Gates out of a file of `save_seer_gates`, or of the authors' checkpoints.

    Args:
        source: a safetensors file, a `.pth` file of tensors (`attn_gate_weights.pth`), or a state dict.
        model: the model that they are for; needed where the file does not tell (the authors' do not).
        gate_type: how the authors' gates pool, "Qavg_Kmaxminavg" by default (decoding gates: "Kmaxminavg"); their files
            do not tell that either. options: further ones of the gate's class, such as `block_size` and `q_head_pool`.

    Raises:
        ValueError: what is there does not fit, or holds no gates.
    """
    state, made = _read(source)
    by_layer: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        found = _LAYER.search(name)
        if found:
            by_layer.setdefault(found.group(1), {})[name[found.end() :]] = tensor
    require(bool(by_layer), "source", "no gate in it", "tensors named as `save_seer_gates` or the authors name them")
    if made is None:
        require(model is not None, "model", None, "the model that the gates are for, as the file does not tell")
        made = _sizes(by_layer, model, gate_type) | options
    kind = DecodeAttentionGate if made.pop("decode", False) else AttentionGate
    gates = nn.ModuleDict()
    for layer in sorted(by_layer, key=int):
        gates[layer] = gate = kind(**made)
        given, need = gate.official_keys(by_layer[layer]), gate.state_dict()
        if {n: t.shape for n, t in given.items()} != {n: t.shape for n, t in need.items()}:
            got, wanted = ({n: tuple(t.shape) for n, t in x.items()} for x in (given, need))
            raise bad_value("source", f"layer {layer} with {got}", f"{wanted}; is it another gate_type?")
        gate.load_state_dict(given)
    return gates


def as_gates(gates: Any, kind: type[nn.Module]) -> Gates:
    """What a method was given as gates, checked: layer number -> gate."""
    if isinstance(gates, (str, Path)):
        gates = load_seer_gates(gates)
    if isinstance(gates, (nn.ModuleDict, Mapping)):
        gates = {str(layer): gate for layer, gate in gates.items()}
    if not isinstance(gates, Mapping) or not gates or not all(isinstance(gate, kind) for gate in gates.values()):
        raise bad_type(
            "gates", gates, f"{kind.__name__}s by layer number (`seer_gates`, `load_seer_gates`), or their file"
        )
    return gates


def _read(source: Any) -> tuple[Mapping[str, Tensor], dict[str, Any] | None]:
    if isinstance(source, Mapping):
        return source, None
    path = Path(source)
    if not path.exists():
        raise bad_value("source", str(path), "a file that is there")
    if path.suffix in (".pth", ".pt", ".bin"):
        return torch.load(path, map_location="cpu", weights_only=True), None
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        made = (file.metadata() or {}).get("seer_gates")
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(made) if made else None  # noqa: SIM118


def _sizes(by_layer: dict[str, dict[str, Tensor]], model: Any, gate_type: str | None) -> dict[str, Any]:
    """Options of the authors' gates from their shapes, the model and the name of their type."""
    first = next(iter(by_layer.values()))
    decode = any(name.startswith("attngate_") for name in first)
    fresh = next(iter(seer_gates(model).values()))
    made: dict[str, Any] = {name: getattr(fresh, name) for name in ("num_heads", "num_kv_heads", "head_dim")}
    made["gate_dim"] = first["attngate_linear_k.weight" if decode else "mask_linear_k.weight"].shape[-1]
    name = gate_type or ("Kmaxminavg" if decode else "Qavg_Kmaxminavg")
    q_pool, k_pool = GATE_TYPES.get(name if not decode else f"Qavg_{name}", (None, None))
    if q_pool is None:
        raise bad_value("gate_type", gate_type, 'a name such as "Qavg_Kmaxminavg" (decoding gates: "Kmaxminavg")')
    made["k_pool"] = k_pool
    if decode:
        query = first.get("attngate_linear_q.weight")
        pool = "Qavg" if query is None else "Qproj" if query.dim() == 4 else "Qavgproj"
        return made | {"decode": True, "q_head_pool": pool, "qk_norm": "attngate_qnorm.weight" in first}
    return made | {"q_pool": q_pool, "force_double": "mask_linear_q.weight" in first}
