"""038 MASFormer: one full layer among block-sparse ones brings far information across, and attention costs what the plan says."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...integrations.transformers import attach
from ...methods.sparse.mas_former import MASFormer
from ...ops import masks
from ...ops.attention import attention
from .claim import Outcome, Scale
from .timing import times

PAPER, SLUG = "038", "mas-former"
SAYS = (
    "MASFormer: long-range dependencies need full attention in a few layers only; with the others block-sparse, quality is near that "
    "of a fully dense model while attention costs up to 75% less."
)
DENSE, MIXED, SPARSE = "all layers full", "the first of four layers full", "no layer full"
CLASSES = 8


def measure(scale: Scale) -> Outcome:
    context, block, steps = scale.pick((128, 8, 400), (64, 8, 4))
    length = scale.pick(8192, 1024)
    out = Outcome(
        f"a 4-layer model trained to recall its first token, {context} tokens in blocks of {block}; {length} tokens (time)",
        "a seed, or a round",
    )
    _recall(out, scale, context, block, steps)
    _time(out, scale, length)
    out.note = "Length, width and steps of the training were chosen over eight trials, because models this small often learn nothing."
    return out


def _recall(out: Outcome, scale: Scale, context: int, block: int, steps: int) -> None:
    """The first of many tokens has to be told at the end: out of reach of four layers of two blocks each."""
    ways = {DENSE: None, MIXED: MASFormer(1, block=block), SPARSE: MASFormer(0, block=block)}
    for label, method in ways.items():
        found = [_trained(method, context, steps, seed) for seed in range(scale.pick(2, 1))]
        out.add(label, "share of first tokens recalled", "", found)
    dense, mixed, sparse = (out.row(label, "share of first tokens recalled").mean for label in (DENSE, MIXED, SPARSE))
    out.check("recalled with the first layer full, of all-full", mixed / max(dense, 1e-9), at_least=0.95)
    out.check("recalled with no full layer (chance 0.12)", sparse, at_most=0.25)


def _trained(method: MASFormer | None, context: int, steps: int, seed: int) -> float:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    tokens = {"vocab_size": 2 * CLASSES + 1, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **tokens, max_position_embeddings=context)).train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    with attach(model, *([method] if method else [])):
        for _ in range(steps):
            ids = _samples(context, 16, generator)
            loss = F.cross_entropy(_last_logits(model, ids), ids[:, 0])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        ids = _samples(context, 128, generator)
        with torch.no_grad():
            return float((_last_logits(model, ids).argmax(-1) == ids[:, 0]).float().mean())


def _samples(context: int, count: int, generator: torch.Generator) -> Tensor:
    ids = torch.randint(CLASSES, 2 * CLASSES, (count, context), generator=generator)
    ids[:, 0] = torch.randint(0, CLASSES, (count,), generator=generator)
    ids[:, -1] = 2 * CLASSES
    return ids


def _last_logits(model: Any, ids: Tensor) -> Tensor:
    return model(ids, use_cache=False, logits_to_keep=1).logits[:, -1, :CLASSES]


def _time(out: Outcome, scale: Scale, length: int) -> None:
    """Attention of six layers, SmolLM2-shaped heads: one in six full, as 4 of 24 in the paper."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, length, 64, generator=generator) for heads in (9, 3, 3))
    method = MASFormer([0], block=length // 8, left_blocks=0)
    plan = method.plan(6)
    rules = [rule.mask() for (rule,) in plan.layers]
    kinds = {id(rule): masks.causal if rule is None else rule & masks.causal for rule in rules}
    one = times(
        {
            str(name): partial(attention, q, k, v, mask=mask)
            for name, mask in zip(("full", "sparse"), _distinct(kinds, rules))
        },
        rounds=scale.pick(3, 1),
        inner=scale.pick(2, 1),
    )
    dense = [6 * full for full in one["full"]]
    mixed = [full + 5 * sparse for full, sparse in zip(one["full"], one["sparse"])]
    out.add("six full layers", "attention time", "s", dense)
    row = out.add("one full layer in six", "attention time", "s", mixed, against="six full layers")
    density = plan.density(length)
    out.add("one full layer in six", "share of the causal pairs", "", density)
    out.add("one full layer in six", "the paper's cost", "", method.cost(length, 6))
    reached = [density / ratio for ratio in row.ratios or []]
    spread = (max(reached) - min(reached)) / 2
    out.check("attention time, of all-full", row.ratio, at_most=0.4, spread=row.spread)  # type: ignore[arg-type]
    out.check("share of the ideal speed-up", sum(reached) / len(reached), at_least=0.6, spread=spread)
    out.check("the paper's cost with own blocks of an eighth", method.cost(length, 6), at_most=0.275)


def _distinct(kinds: dict[int, Any], rules: list[Any]) -> list[Any]:
    return [kinds[id(rules[0])], kinds[id(rules[1])]]
