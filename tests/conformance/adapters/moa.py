"""MoA: influence blocks, candidates with their losses and densities, cache sizes, and the static ring cache."""

import torch
from torch import nn

from regard.lens.attention_influence import influence_blocks
from regard.lens.span_search import span_candidates, span_densities, span_losses
from regard.methods import AttentionCall, HeadPlan
from regard.methods.caches.planned import PlannedLayer
from regard.methods.plans import Window


def search(case):
    given, options = case.inputs, case.meta["official_kwargs"]
    out = {}
    for size, name in ((options["influence"]["block"], "blocks"), (1, "tokens")):
        parts = []
        for layer in range(options["influence"]["layers"]):
            q, k, v, grad = (given[f"influence.{part}{layer}"] for part in "qkvg")
            parts.append(influence_blocks(AttentionCall(nn.Identity(), layer, q, k, v, causal=True), grad, size))
        out[f"influence.{name}"] = torch.stack(parts)
    how = options["search"]
    alpha, beta = span_candidates(how["lengths"], how["extend"], alpha_interval=how["alpha_interval"])
    out |= {"search.alpha": alpha, "search.beta": beta}
    for length in how["lengths"]:
        out[f"search.loss{length}"] = span_losses(given[f"search.importance{length}"], alpha, beta)
    for length in (*how["lengths"], *how["extend"]):
        out[f"search.density{length}"] = span_densities(alpha, beta, length).float()
    out["search.layout"] = _layouts(alpha, beta, given["search.ids"].tolist())
    spans = HeadPlan.from_spans(given["cache.alphas"], given["cache.betas"])
    for length in options["cache"]["lengths"]:
        for new in options["cache"]["new"]:
            plan = HeadPlan.from_spans(*spans.spans(), reserve=new)
            settled = [[rule.at(length) for rule in rules] for rules in plan.layers]
            sizes = [[rule.sink + rule.window for rule in rules] for rules in settled]
            out[f"cache.size.{length}.{new}"] = torch.tensor(sizes)
            out[f"cache.static.{length}.{new}"] = torch.tensor([[rule.sink for rule in rules] for rules in settled])
    return out


def _layouts(alpha, beta, chosen, blocks=16):
    """The block map of a candidate: what `span_losses` says is dropped when one block alone has influence."""
    alone = torch.eye(blocks * blocks).view(-1, blocks, blocks)
    dropped = span_losses(alone, alpha[chosen], beta[chosen]) > 0
    causal = torch.ones(blocks, blocks).tril().bool()
    return (~dropped.T.reshape(-1, blocks, blocks) & causal).to(torch.uint8)


def cache(case):
    """Keys of each head lie one head after the other: sinks, then the ring. A slot never written is zero there."""
    options, out = case.meta["official_kwargs"], {}
    real = case.inputs["attention_mask"]
    for number, (sizes, static) in enumerate(zip(options["cache_size"], options["static_size"])):
        rules = [Window(sink, size - sink) for size, sink in zip(sizes, static)]
        layer = PlannedLayer(lambda seen, heads, kv, rules=rules: rules)
        k, v = case.inputs["k"][number], case.inputs["v"][number]
        for step, (first, last) in enumerate([(0, 10), *((t, t + 1) for t in range(10, 17))]):
            piece = slice(first, last)
            layer.update(k[:, :, piece], v[:, :, piece])
            t, j = torch.arange(first, last)[:, None], torch.arange(last)
            mask = ((j <= t) & real[:, None, :last].bool())[:, None]
            call = AttentionCall(
                nn.Identity(), number, k[:, :, piece], k[:, :, piece], v[:, :, piece], mask=mask, cache=layer
            )
            layer.attend(call)
            if step == 0:
                out |= {
                    f"prefill_{name}{number}": t
                    for name, t in _stored(layer, rules, last).items()
                    if name not in ("next", "value")
                }
        out |= {f"{name}{number}": t for name, t in _stored(layer, rules, 17).items()}
    return out


def _stored(layer, rules, seen):
    keys, values, kept, after = [], [], [], []
    offset, length = 0, (seen - layer.start)[:, None]
    for head, rule in enumerate(rules):
        group = next(group for group in layer.groups if head in group.heads.tolist())
        row, size = group.heads.tolist().index(head), rule.sink + rule.window
        held = group.positions(seen, layer.start).expand(2, -1, -1)[:, 0] >= 0
        for parts, stored in ((keys, group.keys), (values, group.values)):
            one = stored[:, row] * held[..., None]
            parts.append(nn.functional.pad(one, (0, 0, 0, size - one.shape[1])))
        kept.append(nn.functional.pad(held, (0, size - held.shape[1])))
        after.append(offset + group.slots.of(length[..., None], length[..., None] + 1)[:, 0])
        offset += size
    valid = torch.cat([part.sum(1, keepdim=True) for part in kept], 1)
    return {
        "key": torch.cat(keys, 1),
        "value": torch.cat(values, 1),
        "mask": torch.cat(kept, 1).long(),
        "valid": valid,
        "next": torch.cat(after, 1),
    }
