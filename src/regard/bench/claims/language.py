"""What claims on language models share: log-probabilities of given tokens, in one forward or decoded one by one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def answer_log_prob(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> float:
    """Summed log-probability of `answer` after `prompt`, in nats, in one forward (methods act as in a prefill)."""
    return float(token_log_probs(model, [*prompt, *answer], len(answer)).sum())


@torch.no_grad()
def token_log_probs(model: Any, ids: Sequence[int], last: int) -> Tensor:
    """Log-probability of each of the `last` tokens given those before it, (last,) float32."""
    rows = next_log_probs(model, ids[:-1], last)
    return rows.gather(1, torch.tensor(list(ids[-last:]))[:, None])[:, 0]


@torch.no_grad()
def next_log_probs(model: Any, ids: Sequence[int], last: int = 1) -> Tensor:
    """Log-probabilities of the next token at the `last` positions, (last, V) float32 on the CPU."""
    out = model(torch.tensor([list(ids)], device=model.device), use_cache=True, logits_to_keep=last)
    return out.logits[0].float().log_softmax(-1).cpu()


@torch.no_grad()
def filled_cache(model: Any, ids: Sequence[int]) -> Any:
    """The model's own cache after reading `ids`."""
    return model(torch.tensor([list(ids)], device=model.device), use_cache=True, logits_to_keep=1).past_key_values


@torch.no_grad()
def decoded_log_prob(model: Any, cache: Any, last: int, answer: Sequence[int]) -> float:
    """Summed log-probability of `answer`, decoded token by token from a copy of `cache`; `last` is the prompt's last token, not in it."""
    cache, total, token = copy.deepcopy(cache), 0.0, last
    for wanted in answer:
        out = model(torch.tensor([[token]], device=model.device), past_key_values=cache, use_cache=True)
        total += float(out.logits[0, -1].float().log_softmax(-1)[wanted])
        token = wanted
    return total
