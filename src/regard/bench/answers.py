"""Scoring given answers: the log-probability that a model, with or without methods attached, gives to an answer after a prompt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import require, require_tensor
from ..integrations.transformers import attach
from ..methods.call import AttentionCall, Method
from ..methods.decoders.largepig import LargePiG

__all__ = ["answer_scores"]


@torch.no_grad()
def answer_scores(
    model: nn.Module, prompt: Tensor | Sequence[int], answers: Iterable[Tensor | Sequence[int]], *methods: Method
) -> Tensor:
    """Sum over an answer's tokens of log P(token | prompt and answer so far), for each answer.

    Args:
        model: a causal language model. prompt: its token ids, (P,), P >= 1. answers: token ids of each answer, at least one token.
        methods: what to attach. A `LargePiG` scores with its mixture (its `lm_score`); other methods act on the model as they do
            in a prefill.

    Returns:
        float64 (number of answers,), natural logarithm, on the CPU.
    """
    piglet = next((method for method in methods if isinstance(method, LargePiG)), None)
    device = next(model.parameters()).device
    prefix = _ids("prompt", prompt, device)
    scores = []
    with attach(model, *methods) as session:
        wanted = [] if piglet is None else piglet.wanted_layers(session.num_layers)
        rows: dict[int, Tensor] = {}

        def keep(call: AttentionCall) -> None:
            if call.kind == "self" and call.tower == session.main_tower and call.layer in wanted:
                rows[call.layer] = call.weights(rows=slice(len(prefix) - 1, call.q_len - 1)).mean(1)

        session.observers.append(keep)
        for answer in answers:
            ids = torch.cat([prefix, _ids("answers", answer, device)])[None]
            out: Any = model(ids, use_cache=False, output_hidden_states=piglet is not None)
            if piglet is not None:
                attention = torch.stack([rows[layer] for layer in wanted]).mean(0)
                each = piglet.token_log_probs(model, out.hidden_states, attention, ids, len(prefix))
            else:
                log_probs = out.logits[:, len(prefix) - 1 : -1].float().log_softmax(-1)
                each = log_probs.gather(-1, ids[:, len(prefix) :, None])[..., 0]
            scores.append(each.double().sum())
    require(bool(scores), "answers", "none", "at least one")
    return torch.stack(scores).cpu()


def _ids(name: str, ids: Tensor | Sequence[int], device: torch.device) -> Tensor:
    tensor = require_tensor(name, torch.as_tensor(ids, device=device), dims=1)
    require(len(tensor) > 0, name, "no token", "at least one token")
    return tensor.long()
