"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685, by peft), trained with regard's methods attached; resumable.

The last step of a conversion: what attention transfer leaves undone, a short finetuning of the projections recovers (Hedgehog, LoLCATs).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import bad_type, bad_value, require, require_int
from ..methods.caches.linear_maps import map_metadata, maps_from
from ..methods.caches.linearized import Linearized, LinearizedEncoder
from ..methods.method import Method
from .runner import fit

__all__ = ["fit_lora", "load_converted", "next_token_loss"]

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_MAPS, _LORA = "maps.", "lora"


def next_token_loss(model: nn.Module, batch: Any) -> Tensor:
    """Cross entropy of the next token. batch: ids (B, N), or keyword arguments of the model; padding (`attention_mask` 0) is left out."""
    given = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
    logits = model(**{"use_cache": False, **given}).logits[:, :-1]
    labels = given["input_ids"][:, 1:]
    if given.get("attention_mask") is not None:
        labels = labels.masked_fill(given["attention_mask"][:, 1:] == 0, -100)
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)


def fit_lora(
    model: nn.Module,
    data: Any,
    methods: Method | Sequence[Method] = (),
    *,
    loss: Callable[[nn.Module, Any], Tensor] = next_token_loss,
    rank: int = 8,
    alpha: float = 16.0,
    targets: Sequence[str] | str = PROJECTIONS,
    train_maps: bool = False,
    lr: float = 1e-4,
    **options: Any,
) -> nn.Module:
    """Put adapters into a model and train them, and nothing else, with methods attached.

        maps = fit_linear_maps(model, data, steps=500, out="maps.safetensors")
        model = fit_lora(model, data, regard.Linearized(maps), steps=500, out="converted.safetensors")

    Args:
        model: a transformers model, not yet adapted; adapters go into its layers, its own weights stay bit by bit
            (`peft`'s `.unload()` of the result gives it back). data: batches as `fit` and `loss` take them.
        methods: what is attached while training (and is detached afterwards), such as `regard.Linearized(maps)`; none: the plain model.
        loss: (model, batch) -> scalar. rank, alpha, targets: of the adapters (lolcats: 8, 16, the four projections of attention).
        train_maps: of `Linearized`, train the feature maps too.
        lr: of AdamW (lolcats: 1e-4). options: of `fit` (`steps`, `accumulate`, `out`, `save_every`, `resume`, `seed`, ...).
    Returns:
        the `peft` model, in eval mode, with `.fitted`. The file `out` holds adapters and maps: `load_converted(model, out)`.

    Raises:
        ImportError: peft is not installed. ValueError: `targets` fit no layer. Others: as `fit`.
    """
    from ..integrations.transformers import attach

    methods = [methods] if isinstance(methods, Method) else list(methods)
    if not isinstance(model, nn.Module):
        raise bad_type("model", model, "a transformers model")
    settings = {
        "r": require_int("rank", rank, 1),
        "lora_alpha": alpha,
        "target_modules": targets if isinstance(targets, str) else list(targets),
    }
    adapted = _adapted(model, settings, options.get("seed", 0))
    trained = _adapters(adapted)
    metadata = {_LORA: json.dumps(settings)}
    converted = next((method for method in methods if isinstance(method, Linearized)), None)
    holder = None
    if converted is not None:
        holder = nn.ModuleDict(converted.maps)  # type: ignore[arg-type]
        holder.made = converted.made  # type: ignore[assignment]
        metadata |= map_metadata(holder)
        if holder.state_dict():
            trained[_MAPS.rstrip(".")] = holder
    wanted = [(p, p.requires_grad) for p in holder.parameters()] if holder is not None else []
    for parameter, _ in wanted:
        parameter.requires_grad_(train_maps)
    try:
        with attach(adapted, *methods) if methods else nullcontext():
            fitted = fit(
                trained, lambda batch: loss(adapted, batch), data, lr=lr, frozen=adapted, metadata=metadata,
                **{"label": "lora", **options},
            )  # fmt: skip
    finally:
        for parameter, before in wanted:
            parameter.requires_grad_(before)
        for module in trained.values():
            module.eval()
    adapted.eval()
    adapted.fitted = fitted  # type: ignore[assignment]
    return adapted


def load_converted(model: nn.Module, path: str | Path) -> tuple[nn.Module, Linearized | None]:
    """What `fit_lora` wrote, put into the model that it was made from: (the peft model, its `Linearized` or None).

    model, method = load_converted(model, "converted.safetensors")
    with regard.attach(model, method): ...
    """
    from safetensors import safe_open

    path = Path(path)
    require(path.is_file(), "path", str(path), "a file that is there")
    with safe_open(str(path), framework="pt") as file:
        about = file.metadata() or {}
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if _LORA not in about:
        raise bad_value("path", str(path), "a file that `fit_lora` wrote (it holds no adapters)")
    adapted = _adapted(model, json.loads(about[_LORA]), 0)
    for name, module in _adapters(adapted).items():
        found = {key: state[f"{name}.{key}"] for key in module.state_dict() if f"{name}.{key}" in state}
        require(len(found) == len(module.state_dict()), "path", f"no {name}", "adapters for every layer of this model")
        module.load_state_dict(found)
    method = None
    if "linear_maps" in about:
        causal = any(getattr(module, "is_causal", False) for module in model.modules())
        maps = maps_from(json.loads(about["linear_maps"]), state, _MAPS).to(next(model.parameters()).device)
        method = (Linearized if causal else LinearizedEncoder)(maps)
    return adapted.eval(), method


def _adapted(model: nn.Module, settings: Mapping[str, Any], seed: int) -> Any:
    try:
        from peft import LoraConfig, PeftModel, get_peft_model
    except ImportError as error:
        raise ImportError("fit_lora needs peft: pip install 'regard[train]'") from error
    import torch

    if isinstance(model, PeftModel):
        raise bad_value("model", "a peft model", "one without adapters (`.unload()` takes them out)")
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # A is random: a resumed run and a fresh one begin alike
        return get_peft_model(model, LoraConfig(lora_dropout=0.0, bias="none", **settings))  # type: ignore[arg-type]


def _adapters(adapted: nn.Module) -> dict[str, nn.Module]:
    """Name -> the linear maps that LoRA added."""
    found: dict[str, nn.Module] = {
        name: module
        for name, module in adapted.named_modules()
        if (".lora_A." in name or ".lora_B." in name) and isinstance(module, nn.Linear)
    }
    require(bool(found), "targets", "no linear layer by these names", "names of linear layers of the model")
    return found
