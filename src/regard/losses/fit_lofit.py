"""Training LoFiT: first which heads, then a shift for each of those. The model itself stays as it is, bit by bit.

Paper: Yin, Ye, Durrett 2024, "LoFiT: Localized Fine-tuning on LLM Representations" (NeurIPS 2024, arXiv 2406.01563); authors' code:
fc2869/lo-fit (`lofit_trainer.py`, `utils/trainers.py`). What is trained and attached is `regard.methods.HeadAffine`.

What differs from the authors' code: batches are tensors (`MaskedCollator` makes them) and steps are counted, not epochs; the reference
log-probabilities of DPO are computed as they are needed, not beforehand.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import bad_type, require, require_name
from ..integrations.anatomy import blocks, output_projection
from ..integrations.transformers import attach
from ..lens.head_scores import Head, HeadScores
from ..methods.edits.lofit import HeadAffine, LoFiT
from .masked_lm import IGNORE, masked_lm_loss
from .runner import Fitted, fit

__all__ = ["dpo_loss", "fit_lofit", "lofit_heads", "merge_lofit"]

INITIAL = 1e-3


def lofit_heads(
    model: nn.Module,
    data: Any,
    *,
    lr: float = 5e-3,
    l1: float = 5e-4,
    loss: str = "sft",
    beta: float = 0.5,
    seed: int = 42,
    **options: Any,
) -> HeadScores:
    """Step 1, localise: train a scale of every head, and score a head by how far it went from 0.

        scores = regard.losses.lofit_heads(model, batches, steps=100)
        tuned = regard.losses.fit_lofit(model, batches, scores.top(0.03), steps=200)

    Args:
        model: a causal language model that `attach` can join. data: batches as `fit` takes them; see `fit_lofit`.
        l1: factor on the sum of |scale| over all heads, which keeps those at 0 that do not help. lr: 5e-3 for 7B models in the paper.
        loss, beta, seed, options: as of `fit_lofit`.

    Returns:
        `HeadScores`: the L2 norm of each head's scale. The authors keep the best 160 and tune 16 to 48, about 3 % of the heads.
    """
    layers, heads, size = _shape(model)
    every = HeadAffine([(layer, head) for layer in range(layers) for head in range(heads)], size, shift=False)
    fitted = _train(model, every, data, lr, l1, loss, beta, seed, {"label": "lofit heads", **options})
    assert every.scale is not None
    scores = every.scale.detach().float().norm(dim=1).view(layers, heads).cpu()
    return HeadScores(scores, name="lofit", info={"steps": fitted.steps, "lr": lr, "l1": l1, "loss": fitted.losses[-1]})


def fit_lofit(
    model: nn.Module,
    data: Any,
    heads: Iterable[Head] | int | float = 0.03,
    *,
    lr: float = 1e-2,
    loss: str = "sft",
    beta: float = 0.5,
    seed: int = 42,
    select: Mapping[str, Any] | None = None,
    **options: Any,
) -> HeadAffine:
    """Step 2, tune: train a shift of each chosen head. Given a number of heads, step 1 (`lofit_heads`) chooses them first.

    Args:
        model: a causal language model that `attach` can join; its weights must not change, and that is checked.
        data: batches as `regard.losses.fit` takes them. For loss "sft" each as `MaskedCollator` makes it (`input_ids`, `labels` with -100
            for what is not learned, `attention_mask`); for "dpo" {"chosen": such a batch, "rejected": such a batch}, row by row a pair.
        heads: (layer, head) pairs (rows of the authors' .npy will do); or how many (int), or which share of all heads (float).
        lr: 1e-2 for Llama 2 7B in the paper, 8e-3 to 2e-2 for others; AdamW without weight decay, the rate falling linearly to 0, the
            gradient's norm at most 1, as the authors' trainer does by default.
        loss: "sft": cross entropy of the labels; "dpo": preference of the chosen over the rejected text. beta: of DPO.
        seed: of the first vectors (normal, 1e-3) and of `fit`. select: arguments of `lofit_heads`, where it is called.
        options: of `fit` (`steps`, `out`, `save_every`, `resume`, `accumulate`, `progress`, ...). With `out` the run can be killed and
            resumed, and `HeadAffine.load(out)` reads the result.

    Returns:
        `HeadAffine`: K x head_dim numbers; `regard.LoFiT` attaches them, `merge_lofit` writes them into the model. `.fitted` is what `fit`
        returned.
    """
    layers, num_heads, size = _shape(model)
    if isinstance(heads, (int, float)):
        given = {key: value for key, value in options.items() if key in ("steps", "accumulate", "progress")}
        scores = lofit_heads(model, data, **{"loss": loss, "beta": beta, "seed": seed, **given, **dict(select or {})})
        heads = scores.top(heads)
    chosen = [(int(layer), int(head)) for layer, head in heads]
    out_of_range = [head for head in chosen if not (0 <= head[0] < layers and 0 <= head[1] < num_heads)]
    require(not out_of_range, "heads", out_of_range, f"layers in [0, {layers}) and heads in [0, {num_heads})")
    tuned = HeadAffine(chosen, size, scale=False)
    tuned.fitted = _train(model, tuned, data, lr, 0.0, loss, beta, seed, {"label": "lofit", **options})  # type: ignore[assignment]
    return tuned


def dpo_loss(
    chosen: Tensor, rejected: Tensor, chosen_before: Tensor, rejected_before: Tensor, beta: float = 0.5
) -> Tensor:
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290): the mean of -log sigmoid(beta * margin).

    All (B,): summed log-probabilities of the chosen and the rejected texts, by the tuned model and by the one before.
    """
    return -F.logsigmoid(beta * ((chosen - rejected) - (chosen_before - rejected_before))).mean()


@torch.no_grad()
def merge_lofit(model: nn.Module, tuned: HeadAffine) -> None:
    """Write the vectors into the model, for good: the shift becomes a bias of the output projection, the scale its columns.

    The model then gives what it gave with `LoFiT(tuned)` attached, up to rounding. A projection without a bias gets one, which
    transformers' own classes do not look for in a saved checkpoint of most families: keep `tuned` too.
    """
    for block in blocks(model):
        rows = (tuned.heads[:, 0] == block.layer).nonzero()[:, 0].tolist()
        if not rows:
            continue
        projection: Any = output_projection(block.attention)
        turned = type(projection).__name__ == "Conv1D"  # (in, out)
        weight = projection.weight if turned else projection.weight.T
        size = tuned.head_dim
        added = weight.new_zeros(weight.shape[1])
        for row in rows:
            head = int(tuned.heads[row, 1])
            columns = slice(head * size, (head + 1) * size)
            require(columns.stop <= weight.shape[0], "tuned", f"head {head}", f"{weight.shape[0] // size} heads")
            if tuned.shift is not None:
                added += tuned.shift[row].to(weight) @ weight[columns]
            if tuned.scale is not None:
                weight[columns] *= (1.0 + tuned.scale[row].to(weight))[:, None]
        if tuned.shift is not None:
            if projection.bias is None:
                projection.bias = nn.Parameter(added, requires_grad=projection.weight.requires_grad)
            else:
                projection.bias += added


def _train(
    model: nn.Module,
    tuned: HeadAffine,
    data: Any,
    lr: float,
    l1: float,
    loss: str,
    beta: float,
    seed: int,
    options: dict[str, Any],
) -> Fitted:
    require_name("loss", loss, ("sft", "dpo"))
    require(l1 >= 0, "l1", l1, "a number >= 0")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.copy_(INITIAL * torch.randn(parameter.shape, generator=generator))
    device = next(model.parameters()).device
    tuned.to(device)
    method = LoFiT(tuned)

    def loss_of_batch(batch: Any) -> Tensor:
        if loss == "sft":
            got = masked_lm_loss(model, _on(batch, device, "data"))
        else:
            if not isinstance(batch, Mapping) or not {"chosen", "rejected"} <= set(batch):
                raise bad_type("data", batch, "batches {'chosen': ..., 'rejected': ...} for loss='dpo'")
            pair = [_on(batch[name], device, name) for name in ("chosen", "rejected")]
            now = [_label_log_probs(model, part) for part in pair]
            method.enabled = False
            try:
                with torch.no_grad():
                    before = [_label_log_probs(model, part) for part in pair]
            finally:
                method.enabled = True
            got = dpo_loss(now[0], now[1], before[0], before[1], beta)
        return got + l1 * sum(parameter.abs().sum() for parameter in tuned.parameters()) if l1 else got

    options = {"schedule": "linear", "clip": 1.0, "metadata": {"lofit": "{}"}, **options}
    with attach(model, method):
        fitted = fit(
            tuned,
            loss_of_batch,
            data,
            lr=lr,
            seed=seed,
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0),
            frozen=model,
            **options,
        )
    tuned.eval()
    return fitted


def _label_log_probs(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Summed log-probability of the labels of each row, (B,)."""
    given = {key: value for key, value in batch.items() if key not in ("labels", "weights")}
    logits = model(**given, use_cache=False).logits[:, :-1].float()
    labels = batch["labels"][:, 1:]
    return -F.cross_entropy(logits.mT, labels, ignore_index=IGNORE, reduction="none").sum(1)


def _on(batch: Any, device: torch.device, name: str) -> dict[str, Tensor]:
    if not isinstance(batch, Mapping) or not {"input_ids", "labels"} <= set(batch):
        raise bad_type(name, batch, "batches that are mappings with input_ids and labels")
    require(bool((batch["labels"] != IGNORE).any()), name, "a batch without labels", "labels that are not all -100")
    return {key: value.to(device) for key, value in batch.items()}


def _shape(model: nn.Module) -> tuple[int, int, int]:
    """(layers, query heads, size of a head's output)."""
    with attach(model) as session:
        entry: Any = session.entry
        config = entry.config.get_text_config(decoder=True)
        layers = session.num_layers
    heads = config.num_attention_heads
    size = getattr(config, "v_head_dim", None) or getattr(config, "head_dim", None) or config.hidden_size // heads
    return layers, heads, int(size)
