"""What `regard compare` measures on one prompt: quality after a prompt has been read, and what reading and decoding cost.

Each task prefills a prompt and then decodes a given continuation token by token, so that methods which act in prefill, in decoding
or in the cache are all exercised. Times are wall clock; cache bytes are those of the allocated storages.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..methods.caches import kv_bytes


@dataclass
class Reading:
    """One prompt read and one continuation decoded.

    Attributes:
        prompt_nll: mean negative log-likelihood (nats) of the prompt's second half. decode_nll: of the continuation.
        log_probs: (T, V) float32 next-token log-probabilities for each token of the continuation.
        answer_log_prob: summed log-probability of the continuation.
        prefill_seconds, decode_seconds: for the prompt; per decoded token (median).
        kv_bytes: largest size of the cache.
    """

    prompt_nll: float
    decode_nll: float
    log_probs: Tensor
    answer_log_prob: float
    prefill_seconds: float
    decode_seconds: float
    kv_bytes: int


@torch.no_grad()
def read(model: Any, prompt: Sequence[int], continuation: Sequence[int]) -> Reading:
    """Prefill `prompt`, then decode `continuation` with the true tokens fed back."""
    device = model.device
    ids = torch.tensor([list(prompt)], device=device)
    wait(device)
    began = time.perf_counter()
    out = model(ids, use_cache=True, logits_to_keep=len(prompt) // 2 + 1)
    wait(device)
    prefill = time.perf_counter() - began
    half = out.logits.shape[1] - 1
    prompt_nll = (
        float(torch.nn.functional.cross_entropy(out.logits[0, :-1].float(), ids[0, -half:])) if half else float("nan")
    )
    cache = out.past_key_values
    largest = kv_bytes(cache)
    logits, seconds = [out.logits[0, -1]], []
    for token in continuation[:-1]:
        step = torch.tensor([[token]], device=device)
        wait(device)
        began = time.perf_counter()
        out = model(step, past_key_values=cache, use_cache=True)
        wait(device)
        seconds.append(time.perf_counter() - began)
        logits.append(out.logits[0, -1])
        cache = out.past_key_values
    largest = max(largest, kv_bytes(cache))
    log_probs = torch.stack(logits).float().log_softmax(-1).cpu()
    picked = log_probs.gather(1, torch.tensor(list(continuation))[:, None])[:, 0]
    return Reading(
        prompt_nll=prompt_nll,
        decode_nll=-float(picked.mean()),
        log_probs=log_probs,
        answer_log_prob=float(picked.sum()),
        prefill_seconds=prefill,
        decode_seconds=float(torch.tensor(seconds).median()) if seconds else float("nan"),
        kv_bytes=largest,
    )


@torch.no_grad()
def loss_by_position(model: Any, prompt: Sequence[int], parts: int, most: int = 512) -> list[float]:
    """Mean negative log-likelihood (nats) of each of `parts` equal pieces of the prompt, read in one pass.

    Logits are made for at most `most` evenly spread positions of a piece, because all of them would not fit for long prompts.
    """
    ids = torch.tensor([list(prompt)], device=model.device)
    bounds = torch.linspace(0, len(prompt) - 1, parts + 1).long().tolist()
    picked = [torch.linspace(a, b - 1, min(most, b - a)).long().unique() for a, b in pairwise(bounds)]
    keep = torch.cat(picked).to(model.device)
    logits = model(ids, use_cache=True, logits_to_keep=keep).logits[0].float()
    losses = torch.nn.functional.cross_entropy(logits, ids[0, keep + 1], reduction="none").cpu()
    return [float(part.mean()) for part in losses.split([len(p) for p in picked])]


def wait(device: torch.device) -> None:
    """Let a GPU finish, so that the clock measures work and not its queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def divergence(dense: Tensor, other: Tensor) -> float:
    """Mean KL(dense || other) in nats over positions; log-probabilities (T, V)."""
    return float((dense.exp() * (dense - other)).sum(-1).mean())
