"""078 Kinetics: attention, not parameters, is what long answers cost; chosen blocks buy more quality for a cost than a window or dense."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ...integrations.transformers import attach
from ...methods import GroupedTopK, SlidingWindow
from ...methods.call import AttentionCall, Method
from ..cost import MODELS, decode_cost
from ..kinetics import attention_share, block_topk_cost, dense_cost
from ..tasks import divergence
from ..text import token_windows
from .claim import Outcome, Scale
from .language import filled_cache
from .timing import times

PAPER, SLUG = "078", "kinetics"
SAYS = (
    "Kinetics: at test time attention costs more than parameters, so that larger models become worth while earlier than by "
    "FLOPs alone, and sparse attention (block top-k) buys more accuracy for the same cost than dense."
)
KL, TIME = "KL from dense, decoded", "attention of a decoded token"
BLOCKS, WINDOW = "block top-k", "sinks and window"


def measure(scale: Scale) -> Outcome:
    context, decoded = scale.pick((1536, 48), (160, 4))
    keys = scale.pick(32768, 2048)
    out = Outcome(
        f"{context} tokens and {decoded} decoded ones (quality), one layer's attention at {keys} keys (time), the authors' cost model "
        "(shares)",
        "a text, or a round",
    )
    _costs(out)
    _quality(out, scale, context, decoded)
    _time(out, scale, keys)
    out.note = (
        "Quality is divergence from the dense model on prose, not accuracy of reasoning: a 135M model answers nothing whose accuracy "
        "could be plotted. Costs: Qwen3 shapes, 512 tokens of question, 562.5 FLOPs a byte."
    )
    return out


def _costs(out: Outcome) -> None:
    small, large = MODELS["qwen3-0.6b"], MODELS["qwen3-32b"]
    for length in (1024, 4096, 32768):
        for shape in (small, large):
            cost = dense_cost(shape, 512, length)
            out.add(
                f"{shape.name}, {length} tokens",
                "share of attention in the cost",
                "",
                attention_share(cost, shape, length),
            )
    share = out.row(f"{large.name}, 4096 tokens", "share of attention in the cost").mean
    out.check(
        "share of attention in the cost of 4096 tokens by qwen3-32b, the least of the family", share, at_least=0.5
    )
    ratio = dense_cost(large, 512, 32768).total / dense_cost(small, 512, 32768).total
    by_flops = large.params / small.params
    out.check(
        "qwen3-32b over qwen3-0.6b at 32768 tokens: cost over that by parameters alone", ratio / by_flops, at_most=0.5
    )
    sparse = block_topk_cost(large, 512, 32768, recent=64, block_size=16, topk=60)
    dense = dense_cost(large, 512, 32768)
    out.check(
        "qwen3-32b, 32768 tokens: cost with 1024 keys in blocks over dense", sparse.total / dense.total, at_most=0.25
    )


def _quality(out: Outcome, scale: Scale, context: int, decoded: int) -> None:
    model, tokenizer = scale.language_model()
    shares = {"an eighth": context // 8, "a twentieth": context // 20}
    ways: dict[str, Method | None] = {"dense": None}
    for share, budget in shares.items():
        recent = max(1, budget // 4)
        block = 16 if budget - recent - 4 >= 16 else 1
        ways[f"{BLOCKS}, {share}"] = GroupedTopK(budget, block, 4, recent, dense_layers=0)
        ways[f"{WINDOW}, {share}"] = SlidingWindow(budget - 4, sink=4)
    found: dict[str, list[float]] = {label: [] for label in ways}
    for ids in token_windows(tokenizer, context + decoded, scale.pick(3, 1)):
        dense, cache = None, filled_cache(model, ids[:context])
        for label, method in ways.items():
            rows = _decoded(model, copy.deepcopy(cache), ids[context:], method)
            dense = rows if dense is None else dense
            found[label].append(divergence(dense, rows))
    for label, values in found.items():
        out.add(label, KL, "nats", values)
    for share in shares:
        ratio = out.row(f"{BLOCKS}, {share}", KL).mean / max(out.row(f"{WINDOW}, {share}", KL).mean, 1e-12)
        out.check(f"KL from dense with {share} of the keys: {BLOCKS} over {WINDOW}", ratio, at_most=1.0)


@torch.no_grad()
def _decoded(model: Any, cache: Any, ids: list[int], method: Method | None) -> torch.Tensor:
    """Log-probabilities after each of `ids`, decoded one by one from the cache of a prompt that was read densely."""
    rows = []
    with attach(model, *([method] if method else [])):
        for token in ids:
            out = model(torch.tensor([[token]], device=model.device), past_key_values=cache, use_cache=True)
            rows.append(out.logits[0, -1].float().log_softmax(-1).cpu())
    return torch.stack(rows)


@dataclass
class _Cache:
    """Stands for a cache layer that holds so many tokens."""

    tokens: int

    def get_seq_length(self) -> int:
        return self.tokens


def _time(out: Outcome, scale: Scale, keys: int) -> None:
    budget = keys // 16
    shape = MODELS["smollm2-135m"]
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, shape.num_heads, 1, shape.head_dim, generator=generator)
    k, v = torch.randn(2, 1, shape.num_kv_heads, keys, shape.head_dim, generator=generator)
    methods = {"dense": [], BLOCKS: [GroupedTopK(budget, sink=16, dense_layers=0)]}  # whole blocks of sinks
    cache = _Cache(keys)

    def run(chosen: list[Method]) -> torch.Tensor:
        return AttentionCall(torch.nn.Identity(), 0, q, k, v, num_layers=1, cache=cache).run(chosen)

    things = {label: partial(run, chosen) for label, chosen in methods.items()}
    took = times(things, rounds=scale.pick(5, 1), inner=scale.pick(20, 1), warmup=2)
    out.add("dense", TIME, "s", took["dense"])
    row = out.add(BLOCKS, TIME, "s", took[BLOCKS], against="dense")
    layer = decode_cost(shape, methods[BLOCKS][0], keys - 1, element_bytes=4)
    whole = decode_cost(shape, None, keys - 1, element_bytes=4)
    moved = (layer.kv_bytes + layer.search_bytes) / whole.kv_bytes
    out.add(BLOCKS, "bytes read, predicted share of dense", "", moved)
    out.check(
        f"time of a token's attention with a sixteenth of {keys} keys, choice included, over dense (bytes read: {moved:.2f})",
        row.ratio or 0.0,
        at_most=0.5,
        spread=row.spread,
    )
