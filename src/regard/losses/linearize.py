"""Attention transfer: feature maps learn to give the weights of the softmax they are to replace, layer by layer.

The Hedgehog & the Porcupine (Zhang et al. 2024, arXiv 2402.04347), and LoLCATs (Zhang et al. 2024, arXiv 2410.10254) for the error of
the outputs. Code read for numbers: the authors' HazyResearch/lolcats @ 375df84 (Apache-2.0), `src/trainer/distill_attention_xent_mse.py`.
What differs: rows of padding do not count; lolcats lowers its rate when the loss stops falling, here schedules are those of `fit`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import require, require_tensor
from ..methods.caches.linear_maps import linear_maps, map_metadata
from ..methods.caches.linearized import Linearized, linearized_weights
from ..methods.call import AttentionCall, UnsupportedModelError
from ..ops.reference import weighted_values
from .runner import Fitted, fit, layer_loss

__all__ = ["attention_transfer_loss", "fit_linear_maps", "transfer_loss_of_call"]


def attention_transfer_loss(
    predicted: Tensor,
    target: Tensor,
    outputs: Tensor | None = None,
    target_outputs: Tensor | None = None,
    *,
    xent: float = 1.0,
    mse: float = 0.0,
    rows: Tensor | None = None,
) -> Tensor:
    """Cross entropy -sum_j target_ij log predicted_ij, mean over rows, times `xent`, and the outputs' mean squared error, times `mse`.

    Args:
        predicted, target: (B, H, N, M) weights, rows sum to 1. outputs, target_outputs: (B, H, N, D), needed where mse > 0.
        xent, mse: the paper has 1 and 0; lolcats 1 and 1000, or 0 and 1000. rows: bool (B, N), those that count; None: all.
    Returns:
        scalar.
    """
    require_tensor("predicted", predicted, dims=4, floating=True)
    require_tensor("target", target, dims=4, floating=True)
    got, need = f"shape {tuple(target.shape)}", f"predicted's {tuple(predicted.shape)}"
    require(target.shape == predicted.shape, "target", got, need)
    require(xent >= 0 and mse >= 0 and xent + mse > 0, "xent, mse", (xent, mse), "numbers >= 0, not both 0")
    counted = predicted.new_ones(()) if rows is None else rows[:, None].to(predicted.dtype)

    def mean(each: Tensor) -> Tensor:  # (B, H, N)
        return each.mean() if rows is None else (each * counted).sum() / counted.expand_as(each).sum().clamp(min=1)

    total = predicted.new_zeros(())
    if xent:
        total = total - xent * mean((target * predicted.clamp(min=1e-12).log()).sum(-1))
    if mse:
        pair = (outputs, target_outputs)
        require(None not in pair, "outputs, target_outputs", "None", "both, where mse > 0")
        total = total + mse * mean((outputs - target_outputs).square().mean(-1))  # type: ignore[operator]
    return total


def transfer_loss_of_call(
    call: AttentionCall, pair: Any, *, xent: float = 1.0, mse: float = 0.0, eps: float = 1e-12
) -> Tensor:
    """The loss of one layer's maps in one call of the softmax model."""
    if call.biases or call.sinks is not None:
        raise UnsupportedModelError(
            f"model: layer {call.layer} ({type(call.module).__name__}) adds position biases or sink logits to its scores, which linear "
            "attention cannot honour"
        )
    with torch.no_grad():
        target = call.weights()
    predicted = linearized_weights(call, pair, eps)
    rows = None
    if call.mask is not None:  # rows of padding teach nothing
        places = torch.arange(call.position, call.position + call.q_len, device=call.q.device)
        rows = (places >= call.start[:, None]) & call.mask.any(1).any(-1)
        padding = getattr(call.mask, "padding", None)
        if padding is not None and padding.shape[-1] >= call.position + call.q_len:
            rows = rows & padding[:, call.position : call.position + call.q_len].bool()
    made = wanted = None
    if mse:
        made, wanted = weighted_values(predicted, call.v), weighted_values(target, call.v)
    return attention_transfer_loss(predicted, target.to(predicted.dtype), made, wanted, xent=xent, mse=mse, rows=rows)


def fit_linear_maps(
    model: nn.Module,
    data: Any,
    maps: nn.ModuleDict | str | None = None,
    *,
    xent: float = 1.0,
    mse: float = 0.0,
    lr: float = 1e-2,
    eps: float = 1e-12,
    forward: Callable[[Any], Any] | None = None,
    **options: Any,
) -> nn.ModuleDict:
    """Train feature maps for a model by attention transfer; the model stays as it is, bit by bit.

    Each batch runs through the softmax model; at every layer the maps are to give its attention weights. Afterwards:
    `regard.attach(model, regard.Linearized(maps))`, and, to recover the rest, `fit_lora`.

    Args:
        model: a transformers model with softmax attention. data: batches as `fit` takes them: token ids (B, N), or keyword arguments of
            the model (with `attention_mask`, padding does not count).
        maps: what is trained; a kind for fresh ones; None: `linear_maps(model, "hedgehog")`.
        xent, mse: factors of the two losses, see `attention_transfer_loss`; the sum over layers is divided by their number.
        lr: of AdamW (lolcats: 1e-2). eps: of the linear attention. forward: batch -> anything, runs the model, where `data` is neither.
        options: of `fit` (`steps`, `schedule`, `out`, `save_every`, `resume`, ...).
    Returns:
        the maps, in eval mode. What `fit` returned hangs at them as `.fitted`.

    Raises:
        UnsupportedModelError: a model whose layers are not softmax attention. Others: as `fit`.
    """
    maps = linear_maps(model, maps or "hedgehog") if maps is None or isinstance(maps, str) else maps
    Linearized(maps, eps).check(model)
    count = len(maps)

    def loss_of_call(call: AttentionCall) -> Tensor | None:
        if str(call.layer) not in maps or call.kind != "self" or call.tower != call.session.main_tower:
            return None
        return transfer_loss_of_call(call, maps[str(call.layer)], xent=xent, mse=mse, eps=eps) / count

    fitted: Fitted = fit(
        maps,
        layer_loss(model, loss_of_call, forward),
        data,
        lr=lr,
        frozen=model,
        metadata=map_metadata(maps),
        **options,
    )
    maps.fitted = fitted  # type: ignore[assignment]
    return maps.eval()
