"""The routers of a mixture of experts: where they are in a transformers model, how their choice is read, and how it is changed.

transformers' routers (Mixtral, Qwen-MoE, OLMoE, DeepSeek-V3, GLM-4-MoE, gpt-oss, Phi-MoE, ...) are modules of one form: they return logits
(T, E), weights (T, k) and the chosen experts (T, k) for T tokens, and the experts take weights and choice from there. So one hook serves
all of them; a router of another form is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .._checks import require, require_int, require_name
from .method import UnsupportedModelError

__all__ = ["Router", "excluding", "force_experts", "find_routers", "router_choice", "suppress_experts"]


@dataclass(frozen=True, eq=False)
class Router:
    """One router: the number of the block it is in, the module, how many experts it chooses from, and how many a token gets."""

    layer: int
    module: nn.Module
    num_experts: int
    top_k: int


def find_routers(model: nn.Module) -> list[Router]:
    """The routers of a model, by block. Raises `UnsupportedModelError` where there is none, or one of another form."""
    found: list[Router] = []
    others: set[str] = set()
    for path, module in model.named_modules():
        name = type(module).__name__
        experts, top_k = getattr(module, "num_experts", None), getattr(module, "top_k", None)
        if "Router" not in name and "Gate" not in name and "Gating" not in name:
            continue
        if not isinstance(experts, int) or not isinstance(top_k, int) or not hasattr(module, "weight"):
            if "Router" in name:
                others.add(name)
            continue
        numbers = [int(part) for part in path.split(".") if part.isdigit()]
        found.append(Router(numbers[0] if numbers else len(found), module, experts, top_k))
    if not found:
        why = (
            f"its {', '.join(sorted(others))} is of a form that regard does not know" if others else "it has no router"
        )
        raise UnsupportedModelError(f"model: {type(model).__name__} is no mixture of experts that can be tuned: {why}")
    return sorted(found, key=lambda router: router.layer)


def router_choice(output: Any, router: Router) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, weights, experts) out of what a router's forward gave."""
    fits = (
        isinstance(output, tuple)
        and len(output) == 3
        and all(isinstance(part, Tensor) for part in output)
        and output[1].shape == output[2].shape
        and not output[2].is_floating_point()
    )
    if not fits:
        raise UnsupportedModelError(
            f"model: {type(router.module).__name__} does not return (logits, weights (T, k), experts (T, k))"
        )
    return output


def suppress_experts(weights: Tensor, experts: Tensor, suppressed: Tensor, renormalise: bool = True) -> Tensor:
    """Weights (T, k) with those of suppressed experts at 0; nobody takes their place.

    Args:
        weights: (T, k). experts: (T, k) int64. suppressed: (E,) bool. renormalise: scale what is left of a row to the row's sum before.

    A row that had suppressed experts alone is 0.
    """
    kept = weights.masked_fill(suppressed.to(experts.device)[experts], 0.0)
    return _to_sum(kept, weights.sum(-1, keepdim=True)) if renormalise else kept


def force_experts(
    weights: Tensor, experts: Tensor, forced: list[int], weight: str | float = "mean", renormalise: bool = True
) -> tuple[Tensor, Tensor]:
    """Put experts into every row's choice: (weights, experts), each (T, k).

    A forced expert that a row did not choose takes the place of the row's weakest choice (never of another forced one), with the mean
    weight of the row, or the given share of the row's sum. One that was chosen anyway keeps its weight.

    Args:
        weights: (T, k). experts: (T, k). forced: at most k different experts. renormalise: scale rows to their sums before.
    """
    require(len(forced) <= weights.shape[-1], "force", forced, f"at most k = {weights.shape[-1]} experts a layer")
    total, made, chosen = weights.sum(-1, keepdim=True), weights, experts
    held = torch.zeros_like(experts, dtype=torch.bool)
    for expert in forced:
        there = chosen == expert
        held |= there
        weakest = made.masked_fill(held | there, float("inf")).argmin(-1, keepdim=True)
        place = torch.zeros_like(held).scatter(-1, weakest, True) & ~there.any(-1, keepdim=True)
        given = made.mean(-1, keepdim=True) if weight == "mean" else float(weight) * total
        made = torch.where(place, given.to(made.dtype), made)
        chosen = torch.where(place, expert, chosen)
        held |= place
    return (_to_sum(made, total) if renormalise else made), chosen


def _to_sum(weights: Tensor, wanted: Tensor) -> Tensor:
    total = weights.sum(-1, keepdim=True)
    return torch.where(total != 0, weights * wanted / torch.where(total != 0, total, 1.0), weights)


class excluding(TorchFunctionMode):
    """Within, the logits that `router` computes from its own weight are -inf for the suppressed experts: they are never in the running,
    and the next best take their places, by whatever rule the router has."""

    def __init__(self, router: Router, suppressed: Tensor) -> None:
        super().__init__()
        self.weight, self.suppressed = getattr(router.module, "weight"), suppressed  # noqa: B009 - a Parameter, not a Module

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is nn.functional.linear and out.shape[-1] == len(self.suppressed):
            return out.masked_fill(self.suppressed.to(out.device), float("-inf"))
        return out


def experts_by_layer(name: str, pairs: Any, found: list[Router]) -> dict[int, list[int]]:
    """{layer: experts} from (layer, expert) pairs or such a mapping, held against the routers of a model."""
    listed = [(la, e) for la, es in pairs.items() for e in es] if hasattr(pairs, "items") else list(pairs or ())
    sizes = {router.layer: router.num_experts for router in found}
    table: dict[int, list[int]] = {}
    for layer, expert in listed:
        layer, expert = int(layer), int(expert)
        require(layer in sizes, name, f"layer {layer}", f"layers with a router, {sorted(sizes)}")
        require(
            0 <= expert < sizes[layer], name, f"expert {expert} of layer {layer}", f"experts in [0, {sizes[layer]})"
        )
        table.setdefault(layer, [])
        if expert not in table[layer]:
            table[layer].append(expert)
    return table


def tune(
    router: Router, suppress: list[int], force: list[int], mode: str, weight: str | float, renormalise: bool
) -> Callable[..., Any]:
    """A replacement for the router's forward: (original, *args) -> (logits, weights, experts)."""
    require_name("mode", mode, ("zero", "exclude"))
    require_int("top_k", router.top_k, 1)
    suppressed = torch.zeros(router.num_experts, dtype=torch.bool)
    suppressed[suppress] = True
    if mode == "exclude":
        left = router.num_experts - len(suppress)
        require(
            left >= router.top_k,
            "suppress",
            f"{len(suppress)} experts of layer {router.layer}",
            f"{router.top_k} left to choose from",
        )

    def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if suppress and mode == "exclude":
            with excluding(router, suppressed):
                logits, weights, experts = router_choice(original(*args, **kwargs), router)
        else:
            logits, weights, experts = router_choice(original(*args, **kwargs), router)
        if suppress:
            weights = suppress_experts(weights, experts, suppressed, renormalise)
        if force:
            weights, experts = force_experts(weights, experts, force, weight, renormalise)
        return logits, weights, experts

    return forward
