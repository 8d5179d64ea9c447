"""Which experts of a mixture work on what: activation maps of prompts, and experts that set one class of prompts apart.

Paper: Dahlke, Vehreschild et al. (TNG) 2025, "Mixture of Tunable Experts: Behavior Modification of DeepSeek-R1 at Inference Time" (arXiv
2502.11096), functional token resonance imaging. No code was published.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import bad_type, require, require_name, require_tensor
from ..methods.routers import Router, find_routers, router_choice
from .head_scores import HeadScores

__all__ = ["expert_activation", "expert_contrast"]


@torch.no_grad()
def expert_activation(
    model: nn.Module, inputs: Iterable[Mapping[str, Tensor] | Tensor], *, weight: str = "count", per_token: bool = False
) -> Tensor:
    """How much each expert works on each prompt, (prompts, L, E) float64; NaN in layers without a router.

    Args:
        model: a mixture of experts of transformers; what is attached takes part.
        inputs: batches, as the tokenizer gives them, or input ids (B, N). Padding does not count.
        weight: "count": the tokens that chose the expert; "gate": the sum of its weights over them.
        per_token: divide by the number of tokens, so that prompts of different lengths compare.
    """
    require_name("weight", weight, ("count", "gate"))
    found = find_routers(model)
    layers = max(
        getattr(getattr(model, "config", None), "num_hidden_layers", 0) or 0, 1 + max(router.layer for router in found)
    )
    experts = max(router.num_experts for router in found)
    maps = []
    for batch in inputs:
        given = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
        ids = given.get("input_ids")
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            raise bad_type("inputs", ids, "batches with input_ids (B, N)")
        mask = given.get("attention_mask")
        real = torch.ones_like(ids, dtype=torch.float64) if mask is None else mask.double()
        table = torch.full((ids.shape[0], layers, experts), torch.nan, dtype=torch.float64)
        hooks = [router.module.register_forward_hook(_counter(router, real.cpu(), table, weight)) for router in found]
        try:
            model(**given, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        maps.append(table / real.sum(1).cpu()[:, None, None] if per_token else table)
    require(bool(maps), "inputs", "none", "at least one batch")
    return torch.cat(maps)


def expert_contrast(maps: Tensor, labels: Sequence[Any], target: Any, *, rule: str = "difference") -> HeadScores:
    """How much more each expert works on one class of prompts than on all others, as a table of (layer, expert).

        maps = regard.lens.expert_activation(model, prompts)
        contrast = regard.lens.expert_contrast(maps, labels, "refused")
        contrast.top(10)        # [(layer, expert), ...]
        contrast.random(10, exclude=contrast.top(10))

    Args:
        maps: (prompts, L, E). labels: the class of each prompt. target: the class to set apart.
        rule: "difference" of the class means, the paper's; "ratio": (A - B) / (A + B), A and B the means.
    """
    require_tensor("maps", maps, dims=3, floating=True)
    require_name("rule", rule, ("difference", "ratio"))
    require(len(labels) == len(maps), "labels", f"{len(labels)} labels", f"{len(maps)}, one a prompt")
    inside = torch.tensor([label == target for label in labels])
    require(
        bool(inside.any()) and not bool(inside.all()),
        "target",
        target,
        "a class that some prompts have and some have not",
    )
    ours, others = maps[inside].mean(0), maps[~inside].mean(0)
    table = ours - others
    if rule == "ratio":
        total = ours + others
        table = torch.where(total != 0, table / torch.where(total != 0, total, 1.0), 0.0)
        table = torch.where(ours.isnan(), torch.nan, table)
    info = {"target": str(target), "prompts": int(inside.sum()), "others": int((~inside).sum()), "rule": rule}
    return HeadScores(table, name=f"contrast of {target}", info=info, unit="expert")


def _counter(router: Router, real: Tensor, table: Tensor, weight: str) -> Callable[..., None]:
    """A hook that writes what a router chose into `table` (B, L, E); `real` (B, N) says which tokens count."""

    def keep(_module: nn.Module, _given: Any, output: Any) -> None:
        _, weights, chosen = router_choice(output, router)
        need = f"{real.numel()}, one a token"
        require(len(chosen) == real.numel(), "model", f"{len(chosen)} routed tokens", need)
        each = (weights.double() if weight == "gate" else torch.ones_like(weights, dtype=torch.float64)).cpu()
        each = each * real.reshape(-1, 1)
        counts = torch.zeros(len(real), router.num_experts, dtype=torch.float64)
        counts.scatter_add_(1, chosen.cpu().reshape(len(real), -1), each.reshape(len(real), -1))
        table[:, router.layer, : router.num_experts] = counts

    return keep
