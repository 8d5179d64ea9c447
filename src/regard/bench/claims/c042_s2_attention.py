"""042 S2-Attention: time follows density, heads cover everything together, and different columns per head beat equal ones."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...integrations.transformers import attach
from ...methods.caches.planned import PlannedLayer
from ...methods.caches.ragged import kv_bytes
from ...methods.call import AttentionCall
from ...methods.plans import Full, Rule, Sharded
from ...methods.sparse.s2_attention import S2Attention
from ...ops import masks
from ...ops.attention import attention, attention_backend
from ...ops.masks import Mask
from ..text import needle_prompt, token_windows
from .claim import Outcome, Scale
from .language import answer_log_prob, token_log_probs
from .timing import times

PAPER, SLUG = "042", "s2-attention"
SAYS = (
    "S2-Attention: heads that keep different strided columns cover the whole context together; quality is better than with equal "
    "columns at the same density, time follows density, and each head's cache can drop the blocks that it no longer reads."
)
OWN, EQUAL, KEPT = "own columns per head", "equal columns", ", first block kept for all"
PERPLEXITY, NEEDLE = "perplexity of the second half", "needle log-probability"


def measure(scale: Scale) -> Outcome:
    length, heads, block = scale.pick((8192, 8, 64), (512, 4, 32))
    context = scale.pick(768, 200)
    out = Outcome(
        f"{length} tokens, {heads} heads (time); {context} tokens, no training (quality)", "a round, or a prompt"
    )
    _time(out, scale, length, heads, block)
    _memory(out, scale, scale.pick(32768, 1024), heads, block)
    _quality(out, scale, context)
    return out


def _time(out: Outcome, scale: Scale, length: int, heads: int, block: int) -> None:
    q, k, v = torch.randn(3, 1, heads, length, 64, generator=torch.Generator().manual_seed(0))
    local, strides = scale.pick(4, 2), scale.pick((8, 16, 32), (4,))
    made = {stride: masks.head_sharded(heads, block, local, stride) for stride in strides}
    found = times(
        {"causal dense": partial(attention, q, k, v, mask=masks.causal)}
        | {f"stride {stride}": partial(attention, q, k, v, mask=mask) for stride, mask in made.items()},
        rounds=scale.pick(4, 1),
        inner=scale.pick(3, 1),
    )
    out.add("causal dense", "time", "s", found["causal dense"])
    for stride, mask in made.items():
        row = out.add(f"stride {stride}", "time", "s", found[f"stride {stride}"], against="causal dense")
        blocks = length // block
        pattern = masks.head_sharded(heads, 1, local, stride).materialize(blocks, blocks, num_heads=heads)[0]
        causal = torch.ones(blocks, blocks).tril().bool()
        density = float(pattern.sum() / (heads * causal.sum()))
        out.add(f"stride {stride}", "density of the causal half", "", density)
        backend = attention_backend(q, k, v, mask=mask)
        reached = [density / ratio for ratio in row.ratios or []]
        spread = (max(reached) - min(reached)) / 2
        out.check(
            f"stride {stride} (density {density:.2f}, {backend}): share of the ideal speed-up",
            sum(reached) / len(reached),
            at_least=0.6,
            spread=spread,
        )
        if stride <= heads:
            covered = float((pattern.any(0) & causal).sum() / causal.sum())
            out.add(f"stride {stride}", "causal blocks that some head sees", "", covered)
            out.check(f"stride {stride}: share of the causal blocks that some head sees", covered, at_least=1.0)


def _memory(out: Outcome, scale: Scale, length: int, heads: int, block: int) -> None:
    """Cache of one layer after a long prompt, and its attention for a decoded token: everything kept, and each head its own blocks."""
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 1, heads, length, 64, generator=generator)
    local, stride = scale.pick(4, 2), heads
    sharded = [Sharded(block, local, stride, head) for head in range(heads)]
    ways: dict[str, list[Rule]] = {"everything kept": [Full()] * heads, "own blocks kept": list(sharded)}
    caches = {label: _filled(rules, k, v) for label, rules in ways.items()}
    one = torch.randn(3, 1, heads, 1, 64, generator=generator)

    def step(layer: PlannedLayer) -> None:
        layer.update(one[1], one[2])
        layer.attend(AttentionCall(nn.Identity(), 0, one[0], one[1], one[2], cache=layer))

    found = times({label: partial(step, layer) for label, layer in caches.items()}, rounds=scale.pick(4, 1), inner=8)
    for label, layer in caches.items():
        against = None if label == "everything kept" else "everything kept"
        out.add(label, "KV cache", "bytes", float(kv_bytes(layer)), against=against)
        out.add(label, "attention time per decoded token", "s", found[label], against=against)
    memory, clock = (out.row("own blocks kept", name) for name in ("KV cache", "attention time per decoded token"))
    expected = (local + length / block / stride) * block / length
    out.check("KV bytes, of what band and columns make up", memory.ratio / expected, at_most=1.03)  # type: ignore[operator]
    out.check("attention time per token, of everything kept", clock.ratio, at_most=0.4, spread=clock.spread)  # type: ignore[arg-type]


def _filled(rules: list[Rule], k: Tensor, v: Tensor) -> PlannedLayer:
    layer = PlannedLayer(lambda seen, heads, kv: rules)
    layer.update(k, v)
    call = AttentionCall(nn.Identity(), 0, torch.zeros_like(k[:, :, -1:]), k, v, cache=layer)
    layer.attend(call)  # as one query that sees everything: what it says does not matter here
    return layer


def _quality(out: Outcome, scale: Scale, context: int) -> None:
    """A model trained densely, with the pattern put on it: only the comparison of the two patterns speaks of the paper."""
    model, tokenizer = scale.language_model()
    stride = model.config.get_text_config().num_key_value_heads
    shape = {"block_size": 16, "local_blocks": 4, "stride": stride}
    ways: dict[str, S2Attention | None] = {
        "dense": None,
        OWN: S2Attention(**shape),
        EQUAL: S2Attention(**shape, homogeneous=True),
        OWN + KEPT: FirstBlockKept(**shape),
        EQUAL + KEPT: FirstBlockKept(**shape, homogeneous=True),
    }
    windows = token_windows(tokenizer, context, scale.pick(3, 1))
    prompts = [needle_prompt(tokenizer, context, depth, number) for number in range(3) for depth in (0.3, 0.6)]
    for label, method in ways.items():
        with warnings.catch_warnings():  # that equal columns leave blocks uncovered is the point
            warnings.simplefilter("ignore")
            session = attach(model, *([method] if method else []))
        with session:
            perplexity = [_perplexity(model, ids) for ids in windows]
            needle = [answer_log_prob(model, *prompt) for prompt in prompts[: scale.pick(6, 1)]]
        out.add(label, PERPLEXITY, "", perplexity, against=None if label == "dense" else "dense")
        out.add(label, NEEDLE, "nats", needle)
    for kept in ("", KEPT):
        own, equal = (out.row(label + kept, PERPLEXITY).mean for label in (OWN, EQUAL))
        out.check(f"perplexity with own columns over that with equal ones, untrained{kept}", own / equal, at_most=1.0)
        own, equal = (out.row(label + kept, NEEDLE).mean for label in (OWN, EQUAL))
        out.check(f"needle log-prob, lead over equal columns{kept}, nats", own - equal, at_least=0.0)
    dense = out.row("dense", NEEDLE).mean
    out.note = (
        f"The paper trains with the pattern; here it is put on a dense model without training, stride {stride} on {stride} kv heads. Equal "
        f"columns hold the first block, the attention sink, for every head; own columns do so for one head in {stride} unless it is kept "
        f"for all. Needle with it kept: {dense:.2f} nats dense, {own:.2f} own columns, {equal:.2f} equal ones."
    )


@dataclass
class FirstBlockKept(S2Attention):
    """The pattern, and the first block for every head: what a densely trained model uses as its attention sink."""

    def mask(self, call: AttentionCall) -> Mask:
        return super().mask(call) | masks.sink(self.block_size)


def _perplexity(model: Any, ids: list[int]) -> float:
    return float((-token_log_probs(model, ids, len(ids) // 2).mean()).exp())
