"""Reading a language model before its last layer: early-exit logits, how far they are from the final ones, and their contrast.

Layers are counted as transformers counts `hidden_states`: 0 is the embedding, `c` the input of layer c, and the number of layers,
N, the output after the final norm. Shared by LargePiG (189) and by DoLa-style contrastive decoding (Chuang et al. 2023, arXiv
2309.03883), of which `contrast` is the step that LargePiG's code carries along.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..._checks import bad_value, require, require_name
from ..call import UnsupportedModelError

__all__ = [
    "candidate_layers",
    "contrast",
    "decoder_layers",
    "early_exit_logits",
    "js_divergence",
    "relative_top_mask",
    "text_config",
]


def text_config(model: nn.Module) -> Any:
    """The config of the part that writes text (the model's own, or the text part of a multimodal one)."""
    config = getattr(model, "config", None)
    if config is None:
        raise UnsupportedModelError(f"model: {type(model).__name__} has no config, need a transformers language model")
    return config.get_text_config(decoder=True)


def decoder_layers(model: Any) -> nn.ModuleList:
    """The blocks of the decoder, in order."""
    config = text_config(model)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"model: {type(model).__name__} is an encoder-decoder, need a decoder-only language model"
        )
    count = getattr(config, "num_hidden_layers", None)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    for part in (decoder, model):
        for module in part.modules() if part is not None else ():
            if isinstance(module, nn.ModuleList) and len(module) == count:
                return module
    raise UnsupportedModelError(f"model: found no list of {count} layers in {type(model).__name__}")


def candidate_layers(num_layers: int, layers: Sequence[int] | None = None, argument: str = "candidates") -> list[int]:
    """Layer numbers to exit at, checked and made positive; None: every second one of the upper half, as in the authors' scripts
    (16, 18, ..., 30 of 32)."""
    if layers is None:
        return list(range(num_layers // 2, num_layers, 2)) or [0]
    numbers = [layer if layer >= 0 else num_layers + 1 + layer for layer in layers]
    if not numbers or not all(0 <= number <= num_layers for number in numbers):
        raise bad_value(
            argument, list(layers), f"one or more layer numbers in [0, {num_layers}], counted as hidden states"
        )
    return numbers


def early_exit_logits(
    model: Any, hidden: Tensor | Sequence[Tensor], layers: Sequence[int] | None = None, norm: bool = False
) -> Tensor:
    """Logits that the output head gives for the hidden states of earlier layers.

    Args:
        model: a language model with `get_output_embeddings()`.
        hidden: the hidden states (..., C) of one layer, or all of them (`output_hidden_states=True`), of which `layers` picks.
        layers: layer numbers into `hidden` (0 ... N); None with a single tensor.
        norm: apply the model's final norm first. The authors' code does not; the last hidden state is normed in transformers already.

    Returns:
        float32 logits (..., V), or (len(layers), ..., V). A final soft cap of the model (Gemma 2) applies here too.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        raise UnsupportedModelError(f"model: {type(model).__name__} has no output head, need a language model")
    final_norm = _final_norm(model) if norm else None
    if not isinstance(hidden, Tensor):
        last = len(hidden) - 1
        numbers = candidate_layers(last, layers)
        states = [final_norm(hidden[i]) if final_norm is not None and i < last else hidden[i] for i in numbers]
        return torch.stack([_through(model, head, state) for state in states])
    return _through(model, head, final_norm(hidden) if final_norm is not None else hidden)


def _through(model: nn.Module, head: nn.Module, hidden: Tensor) -> Tensor:
    logits = head(hidden).float()
    cap = getattr(text_config(model), "final_logit_softcapping", None)
    return cap * torch.tanh(logits / cap) if cap else logits


def _final_norm(model: Any) -> nn.Module:
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    for name in ("norm", "ln_f", "final_layer_norm", "final_layernorm"):
        found = getattr(decoder, name, None)
        if isinstance(found, nn.Module):
            return found
    raise UnsupportedModelError(f"model: found no final norm in {type(model).__name__}; use norm=False")


def js_divergence(mature: Tensor, early: Tensor, variant: str = "released") -> Tensor:
    """How far early-exit predictions are from the mature ones.

    Args:
        mature: logits (..., V). early: logits (L, ..., V), one for each candidate layer.
        variant: with p, q the two softmaxes and M = (p + q) / 2,
            "released": 1/2 (KL(M || p) + KL(M || q)) / V. The authors' code passes M as the target of `kl_div`, which turns the
            divergences round, and takes the mean over the vocabulary; hence values of about 1e-3 / V.
            "paper": the Jensen-Shannon divergence, 1/2 (KL(p || M) + KL(q || M)), at most log 2.

    Returns:
        (L, ...), natural logarithm, >= 0 up to rounding, 0 where the two agree.
    """
    require_name("variant", variant, ("released", "paper"))
    log_p, log_q = mature.log_softmax(-1), early.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    mean = 0.5 * (p + q)
    log_mean = torch.where(mean > 0, mean, 1.0).log()
    if variant == "paper":
        return 0.5 * (_kl(p, log_p, log_mean) + _kl(q, log_q, log_mean))
    return 0.5 * (_kl(mean, log_mean, log_p) + _kl(mean, log_mean, log_q)) / mature.shape[-1]


def _kl(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Sum over the vocabulary of p (log p - log q); tokens without mass count nothing."""
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)


def relative_top_mask(logits: Tensor, relative_top: float) -> Tensor:
    """Tokens, bool (..., V), whose probability is below `relative_top` times that of the likeliest."""
    require(0.0 < relative_top <= 1.0, "relative_top", relative_top, "a fraction in (0, 1]")
    log_probs = logits.log_softmax(-1)
    return log_probs < log_probs.amax(-1, keepdim=True) + torch.tensor(relative_top, dtype=torch.float64).log().to(
        log_probs
    )


def contrast(
    mature: Tensor, early: Tensor, divergence: Tensor, relative_top: float = 0.1, filter_value: float = -torch.inf
) -> Tensor:
    """DoLa's contrast: log p - log q with q from the candidate layer that differs most.

    Args:
        mature: logits (..., V). early: (L, ..., V). divergence: (L, ...), from `js_divergence`.
        relative_top: tokens less likely than this fraction of the likeliest get `filter_value`; 0 = no filter.

    Returns:
        scores (..., V), up to a constant per row the logits of the contrasted distribution. Each row picks its own layer (the
        authors' batched code averages the divergence over the batch first; its scripts use a batch of one).
    """
    pick = divergence.argmax(0)
    index = pick[None, ..., None].expand(1, *early.shape[1:])
    base = early.gather(0, index)[0]
    scores = mature.log_softmax(-1) - base.log_softmax(-1)
    if relative_top == 0.0:
        return scores
    return scores.masked_fill(relative_top_mask(mature, relative_top), filter_value)
