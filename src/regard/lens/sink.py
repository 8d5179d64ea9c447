"""The attention-sink metric, and what goes with a sink: keys and values at it are small, hidden states large.

When Attention Sink Emerges in Language Models: An Empirical View (Gu et al. 2024, ICLR 2025, arXiv 2410.10781); code read for numbers:
sail-sg/Attention-Sink @ af49727 (MIT), `eval_sink_open_source.py`, `eval_activations_open_source.py`. What differs: any weights, a
`regard.record` or the layers of a model of ours can be asked, not only a transformers model with eager attention; a table of heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import bad_type, bad_value, require, require_int, require_tensor
from ..ops.sink_calibration import key_means
from .head_scores import HeadScores
from .record import Record

__all__ = ["activation_norms", "column_importance", "model_weights", "sink_rate", "sink_scores"]

EPSILON = 0.3


def column_importance(weights: Tensor, slots: int = 0) -> Tensor:
    """How much each key draws: its mean weight over the queries that may see it, `I_k = sum_(i >= k) A[i, k] / (N - k)`.

    Args:
        weights: (..., N, slots + N), causal (nothing above the diagonal), as they come from a forward pass of N tokens.
        slots: first columns that every query sees and no token stands for (`SimilarityAttention(slot=...)`).

    Returns:
        (..., slots + N), in at least float32. Uniform causal attention gives the first token (1 + 1/2 + ... + 1/N) / N.
    """
    require_tensor("weights", weights, floating=True)
    require_int("slots", slots)
    fits = weights.dim() >= 2 and weights.shape[-2] > 0 and weights.shape[-1] == weights.shape[-2] + slots
    require(fits, "weights", f"shape {tuple(weights.shape)}", f"(..., N, {slots} + N), N >= 1")
    return key_means(weights)


def sink_rate(
    weights: Tensor | Sequence[Tensor] | Record, epsilon: float = EPSILON, key: int | None = 0, *, slots: int = 0
) -> Any:
    """The study's metric: percent of (sample, layer, head) in which a key's importance is above `epsilon`.

    Args:
        weights: (..., N, slots + N), leading dimensions of any number (samples, layers, heads); a sequence of them, one a layer, as
            transformers gives with `output_attentions=True`; or a `regard.record`, best of texts cut to one length (64 in the paper)
            without padding.
        epsilon: above it a key is a sink for a head; a number in [0, 1). key: which key, from 0, slots included; None: all.
        slots: as of `column_importance`.

    Returns:
        a float in [0, 100]; with `key=None`, a tensor (slots + N,) of them.
    """
    require(0.0 <= epsilon < 1.0, "epsilon", epsilon, "a number in [0, 1)")
    layers = _layers(weights)
    drawn = [column_importance(layer, slots) for layer in layers]
    above = [(layer > epsilon).double().reshape(-1, layer.shape[-1]) for layer in drawn]
    lengths = {layer.shape[-1] for layer in above}
    require(len(lengths) == 1, "weights", f"layers of {sorted(lengths)} keys", "layers of one length")
    rates = 100.0 * torch.cat(above).mean(0)
    if key is None:
        return rates.float()
    require_int("key", key)
    require(key < len(rates), "key", key, f"less than the {len(rates)} keys")
    return float(rates[key])


def sink_scores(record: Record, epsilon: float = EPSILON, key: int = 0) -> HeadScores:
    """The metric head by head: the share of samples, in [0, 1], in which `key`'s importance for that head is above `epsilon`."""
    require(0.0 <= epsilon < 1.0, "epsilon", epsilon, "a number in [0, 1)")
    require_int("key", key)
    table = []
    for layer in record.layers:
        importance = column_importance(record.weights(layer))
        require(key < importance.shape[-1], "key", key, f"less than the {importance.shape[-1]} keys")
        table.append((importance[..., key] > epsilon).float().mean(0).cpu())
    return HeadScores(torch.stack(table), name="sink rate", info={"epsilon": epsilon, "key": key})


@torch.no_grad()
def model_weights(model: nn.Module, inputs: Any, **options: Any) -> list[Tensor]:
    """Attention weights of a model of ours, (B, H, N, N) a layer in the order of the forward pass.

    Those of every module in it that has `attention_weights(x)` (`SoftmaxAttention` and what is built on it). For transformers models
    there is `regard.record`.

    Args:
        inputs: what the model is called with. options: of `attention_weights`, such as `slots=True`.
    Raises:
        ValueError: no such module ran.
    """
    found: list[Tensor] = []
    layers: list[Any] = [module for module in model.modules() if callable(getattr(module, "attention_weights", None))]
    with ExitStack() as stack:
        for layer in layers:
            hook = layer.register_forward_pre_hook(
                lambda one, given: found.append(one.attention_weights(given[0], **options))
            )
            stack.callback(hook.remove)
        model(inputs)
    if not found:
        raise bad_value("model", type(model).__name__, "a model with layers that have `attention_weights`")
    return found


@torch.no_grad()
def activation_norms(record: Record) -> dict[str, Tensor]:
    """How long the vectors at each place are, and where queries point: the signs of a sink at the first token.

    Args:
        record: of a language model, with `keep="qkv"`.
    Returns:
        "key", "value": mean L2 norm over samples and kv heads; "query_sink_cosine": mean cosine between each query and the first key,
        over samples and heads: (L, N) each, float32. Rotary positions change no norm, and the cosine is the one that attention sees.
    """
    if not isinstance(record, Record):
        raise bad_type("record", record, "a regard.record(..., keep='qkv')")
    rows: dict[str, list[Tensor]] = {"key": [], "value": [], "query_sink_cosine": []}
    for layer in record.layers:
        call = record.call(layer)
        require(call.v.shape[2] == call.k.shape[2], "record", "no values", "a record made with keep='qkv'")
        q, k, v = call.q.float(), call.k.float(), call.v.float()
        first = k[:, :, :1].repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        rows["key"].append(k.norm(dim=-1).mean((0, 1)).cpu())
        rows["value"].append(v.norm(dim=-1).mean((0, 1)).cpu())
        rows["query_sink_cosine"].append(torch.cosine_similarity(q, first, dim=-1).mean((0, 1)).cpu())
    return {name: torch.stack(row) for name, row in rows.items()}


def _layers(weights: Any) -> list[Tensor]:
    if isinstance(weights, Record):
        return [weights.weights(layer) for layer in weights.layers]
    if isinstance(weights, Tensor):
        return [weights]
    if isinstance(weights, Sequence) and weights and all(isinstance(layer, Tensor) for layer in weights):
        return list(weights)
    raise bad_type("weights", weights, "a tensor (..., N, N), a sequence of them, or a regard.record")
