"""070 PrFlashAttention and staircase quantisation: chance against a plain window, fewer bits with age against equal bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...integrations.transformers import attach
from ...methods import PrFlashAttention, SlidingWindow, StaircaseQuantCache
from ...methods.call import Method
from ...ops import masks
from ...ops.mask_bernoulli import distance_probability
from ..tasks import divergence
from ..text import token_windows
from .claim import Outcome, Scale
from .language import next_log_probs

PAPER, SLUG = "070", "prflash-attention"
SAYS = (
    "A position paper without measurements: blocks that take part by chance save work while the model still sees the whole past, and "
    "a cache whose older tokens have fewer bits loses less than one with the same bits everywhere."
)
CHANCE, WINDOW = "blocks by chance", "sinks and window, as many pairs"
STAIRS, EQUAL = "8, 4 and 2 bits by age", "4 bits for all"
KL, KL_DECODED = "KL from dense, second half", "KL from dense, decoded tokens"


def measure(scale: Scale) -> Outcome:
    context = scale.pick(512, 192)
    out = Outcome(f"{context} tokens of English prose, no training", "a text")
    _density(out, scale)
    model, tokenizer = scale.language_model()
    texts = token_windows(tokenizer, context, scale.pick(2, 1))
    _chance(out, model, texts, scale)
    _stairs(out, model, texts, scale)
    out.note = "The probability 1 / (1 + distance)^gamma and the steps of the staircase are our choices: the paper gives neither."
    return out


def _density(out: Outcome, scale: Scale) -> None:
    """Blocks that take part, over many draws, beside the probabilities."""
    n, seeds = 32, scale.pick(400, 100)
    distance = (torch.arange(n)[:, None] - torch.arange(n)).abs()
    past = torch.ones(n, n).tril()
    expected = float((distance_probability(distance, 1.0) * past).sum())
    found = []
    for seed in range(seeds):
        kept = masks.distance_bernoulli(1, sink=0, seed=seed).materialize(n, n, num_heads=8)[0]
        found.append(float((kept * past).sum(dim=(1, 2)).mean()) / expected)
    mean = sum(found) / len(found)
    out.add(CHANCE, "blocks that take part, of those expected", "", mean)
    out.check("distance from 1 of the blocks that take part over those expected", abs(mean - 1), at_most=0.01, digits=3)


def _chance(out: Outcome, model: Any, texts: Sequence[list[int]], scale: Scale) -> None:
    context, block = len(texts[0]), scale.pick(32, 16)
    dense = [next_log_probs(model, ids[:-1], context // 2) for ids in texts]
    for gamma in (0.5, 1.0):
        blocks = -(-context // block)
        i = torch.arange(blocks)
        shares = distance_probability((i[:, None] - i).abs(), gamma)
        shares[:, 0] = 1.0
        pairs = float((shares * torch.ones(blocks, blocks).tril()).sum()) * block * block
        ways: dict[str, Method] = {
            CHANCE: PrFlashAttention(gamma=gamma, block_size=block),
            WINDOW: SlidingWindow(max(1, _window(pairs, context) - block), sink=block),
        }
        for label, method in ways.items():
            with attach(model, method):
                found = [next_log_probs(model, ids[:-1], context // 2) for ids in texts]
            values = [divergence(a, b) for a, b in zip(dense, found)]
            name = f"{label}, gamma {gamma:g}"
            out.add(name, KL, "nats", values, against=None if label == CHANCE else f"{CHANCE}, gamma {gamma:g}")
        first, second = (out.row(f"{label}, gamma {gamma:g}", KL).mean for label in (CHANCE, WINDOW))
        share = pairs / (context * (context + 1) / 2)
        out.add(f"{CHANCE}, gamma {gamma:g}", "pairs of blocks read, of causal attention", "", share)
        out.check(
            f"KL from dense by chance over that of a window, {share:.0%} of the pairs", first / second, at_most=1.0
        )


def _window(pairs: float, context: int) -> int:
    """The causal window that reads as many pairs."""
    return next(w for w in range(1, context + 1) if w * (w + 1) / 2 + (context - w) * w >= pairs or w == context)


def _stairs(out: Outcome, model: Any, texts: Sequence[list[int]], scale: Scale) -> None:
    """Both caches hold four bits a number on average; tokens after the prompt are decoded one by one."""
    context, decoded, group = len(texts[0]), scale.pick(16, 4), scale.pick(32, 16)
    prompt = context - decoded
    # x tokens at 8 bits, y at 4 and x at 2 would be 4 bits and more: 8 a + 4 b + 2 c = 4 (a + b + c), so c = 2 a
    few = prompt // 6 // group * group
    middle = (prompt - 3 * few) // group * group
    ways = {
        STAIRS: StaircaseQuantCache(steps=((few, 8), (middle, 4), (None, 2)), group=group),
        EQUAL: StaircaseQuantCache(steps=((None, 4),), group=group),
    }
    dense = [_decoded(model, ids, decoded) for ids in texts]
    for label, method in ways.items():
        with attach(model, method):
            found = [_decoded(model, ids, decoded) for ids in texts]
        values = [divergence(a, b) for a, b in zip(dense, found)]
        out.add(label, KL_DECODED, "nats", values, against=None if label == STAIRS else STAIRS)
    first, second = (out.row(label, KL_DECODED).mean for label in (STAIRS, EQUAL))
    out.check(f"KL from dense with {STAIRS} over that with {EQUAL}", first / max(second, 1e-12), at_most=1.0)


@torch.no_grad()
def _decoded(model: Any, ids: list[int], last: int) -> Tensor:
    """Log-probabilities at the last positions, the tokens before them fed one by one after a prefill, (last, V)."""
    tokens = torch.tensor([ids], device=model.device)
    out = model(tokens[:, : len(ids) - last], use_cache=True, logits_to_keep=1)
    rows = []
    for position in range(len(ids) - last, len(ids)):
        out = model(tokens[:, position : position + 1], past_key_values=out.past_key_values, use_cache=True)
        rows.append(out.logits[0, -1].float().log_softmax(-1).cpu())
    return torch.stack(rows)
