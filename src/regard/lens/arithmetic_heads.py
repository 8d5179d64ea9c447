"""Which heads and MLPs a model calculates with.

Paper: Zhang et al. 2024, "Interpreting and Improving Large Language Models in Arithmetic Calculation" (ICML 2024, arXiv
2409.01659). No code is published; what the abstract leaves open is set here: the neutral prompts
(`regard.testbeds.circuits.arithmetic` makes them), the measure (change of the answer's probability as a share of it) and which
prompts count (those whose answer has at least `min_probability`).

A head is patched on its way to the logits: it writes what it wrote on a prompt with the same numbers and no relation between
them, while all other heads are held and the MLPs run freely. Heads that calculate show strongly NEGATIVE effects. What they look
at is `span_mass(model, batch.clean, batch.spans, queries=["last"])`; without them: `MaskHeads(heads, mode="mean",
means=mean_head_outputs(...))`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import require, require_fraction, require_tensor
from .head_scores import HeadScores
from .logit_metrics import AnswerProbability
from .patch_effects import path_effects
from .patch_work import Inputs, ids_and_mask, some_rows
from .patching import Patcher

__all__ = ["arithmetic_heads", "mean_head_outputs"]


def arithmetic_heads(
    model: Any,
    clean: Inputs,
    corrupted: Inputs,
    right: Tensor,
    *,
    of: str = "head",
    min_probability: float = 0.1,
    **options: Any,
) -> HeadScores:
    """Effect of each head (or MLP) on the probability of the right answer, as a share of it; -1: without its work the answer is gone.

        batch = regard.testbeds.circuits.arithmetic(tokenizer, 64)
        effect = arithmetic_heads(model, batch.clean, batch.corrupted, batch.right)
        key = effect.top(0.05, largest=False)

    Args:
        clean, corrupted: prompts as in `path_effects`. right: (P,) token ids. of: "head" or "mlp".
        min_probability: prompts whose answer the model gives less are left out. options: of `path_effects`.

    Raises `ValueError` where no prompt is left.
    """
    require_fraction("min_probability", min_probability)
    require_tensor("right", right, dims=1)
    one, other = ids_and_mask("clean", clean), ids_and_mask("corrupted", corrupted)
    fits = len(right) == len(one["input_ids"])
    require(fits, "right", f"shape {tuple(right.shape)}", f"({len(one['input_ids'])},), one token a prompt")
    kept = []
    for begin in range(0, len(right), 16):
        rows = torch.arange(begin, min(begin + 16, len(right)))
        part = some_rows(one, rows)
        logits = Patcher(model, part, part, positions=-1).base_logits
        kept.append(AnswerProbability(right[rows])(logits, torch.arange(len(rows))).cpu() >= min_probability)
    rows = torch.cat(kept).nonzero()[:, 0]
    require(len(rows) > 0, "clean", f"no prompt whose answer has a probability of {min_probability}", "at least one")
    metric = AnswerProbability(right[rows.to(right.device)])
    found = path_effects(
        model, some_rows(one, rows), some_rows(other, rows), metric, of=of, **{"relative": "base", **options}
    )
    found.info |= {"left out": len(right) - len(rows)}
    return found


def mean_head_outputs(model: Any, inputs: Inputs, position: int | None = None) -> Tensor:
    """Mean output of each head over prompts (and over tokens), (L, H, Dv), for `MaskHeads(mode="mean")`.

    Args:
        inputs: ids (P, T), or a mapping with a left-padded mask; padding does not count. position: of one token alone; None: all.
    """
    given = ids_and_mask("inputs", inputs)
    patcher = Patcher(model, given, given, positions=position)
    mask = given.get("attention_mask", torch.ones_like(given["input_ids"]))[:, patcher.positions].to(patcher.keep)
    weight = (mask / mask.sum())[:, None, :, None]
    layers = [
        (patcher.base["head", layer] * weight.to(patcher.base["head", layer].dtype)).sum((0, 2))
        for layer in range(patcher.num_layers)
    ]
    return torch.stack(layers)
