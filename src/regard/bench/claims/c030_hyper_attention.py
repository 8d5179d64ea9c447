"""030 HyperAttention: near-linear time, blocks of an LSH order that beat random ones, perplexity against layers treated."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

from ...integrations.transformers import attach
from ...lens.record import record
from ...methods.sparse.hyper_attention import HyperAttention
from ...ops import masks
from ...ops.attention import attention
from ...ops.hyper import hyper_attention
from ..text import token_windows
from .claim import Outcome, Scale
from .language import token_log_probs
from .timing import slope, times

PAPER, SLUG = "030", "hyper-attention"
SAYS = (
    "HyperAttention: attention in near-linear time, several times faster than exact attention on long inputs; put into the last layers "
    "of a pretrained model, perplexity rises gently with their number."
)
ERROR, PERPLEXITY = "relative error of the output", "perplexity of the second half"
SORTED, UNSORTED, ALONE = "LSH order", "random order", "samples alone"


def measure(scale: Scale) -> Outcome:
    lengths, context = scale.pick((8192, 16384, 32768), (512, 1024)), scale.pick(1536, 200)
    out = Outcome(
        f"{lengths[-1]} tokens, 9 heads of 64, 3 kv heads (time); {context} tokens of prose (error, perplexity); no training",
        "a round, a layer or a text",
    )
    _time(out, scale, lengths)
    _error(out, scale, context)
    _perplexity(out, scale, context)
    return out


def _time(out: Outcome, scale: Scale, lengths: tuple[int, ...]) -> None:
    heads, kv_heads = scale.pick((9, 3), (2, 1))
    options = scale.pick({"min_len": 4096}, {"min_len": 128, "block_size": 32, "samples": 32})
    things = {}
    for n in lengths:
        g = torch.Generator().manual_seed(n)
        q, k, v = (torch.randn(1, heads if i == 0 else kv_heads, n, 64, generator=g) for i in range(3))
        for causal in (False, True):
            name = f"{n} tokens, {'causal' if causal else 'no mask'}"
            things[f"HyperAttention, {name}"] = partial(hyper_attention, q, k, v, causal=causal, **options)
            if n == lengths[-2]:  # exact attention is quadratic: the longest would take all the time there is
                things[f"exact, {name}"] = partial(attention, q, k, v, mask=masks.causal if causal else None)
    found = times(things, rounds=scale.pick(2, 1), inner=1)
    for label in sorted(things, reverse=True):
        base = label.replace("HyperAttention", "exact")
        out.add(label, "time", "s", found[label], against=base if base != label and base in things else None)
    for kind in ("no mask", "causal"):
        row = out.row(f"HyperAttention, {lengths[-2]} tokens, {kind}", "time")
        out.check(f"speed-up over exact at {lengths[-2]} tokens, {kind}", 1 / (row.ratio or math.inf), at_least=2.0)
        mine = [out.row(f"HyperAttention, {n} tokens, {kind}", "time").mean for n in lengths]
        # n log n grows by the exponent 1 + 1 / ln n, about 1.1 here
        out.check(f"exponent of the growth of time with length, {kind}", slope(list(lengths), mine), at_most=1.3)


@torch.no_grad()
def _error(out: Outcome, scale: Scale, context: int) -> None:
    """On real queries, keys and values, no mask (the square that causal attention recurses into), equal numbers of keys read."""
    model, tokenizer = scale.language_model()
    depth = model.config.get_text_config().num_hidden_layers
    layers = sorted({round(i * (depth - 1) / 4) for i in range(5)})
    seen = record(model, torch.tensor([token_windows(tokenizer, context, 1)[0]]), layers=layers, keep="qkv")
    half = context // 2
    block, drawn = half // 8, half // 8
    ways: dict[str, dict[str, Any]] = {
        SORTED: {"block_size": block, "samples": drawn},
        UNSORTED: {"block_size": block, "samples": drawn, "projections": 0},
        ALONE: {"block_size": 0, "samples": block + drawn},
    }
    found: dict[str, list[float]] = {label: [] for label in ways}
    for layer in layers:
        q, k = seen.q(layer), seen.k(layer)
        rows, keys, values = q[:, :, half:], k[:, :, :half], seen.call(layer).v[:, :, :half]
        shuffle = torch.randperm(half, generator=torch.Generator().manual_seed(layer))
        exact = attention(rows, keys, values)
        for label, options in ways.items():
            k_in, v_in = (keys[:, :, shuffle], values[:, :, shuffle]) if label == UNSORTED else (keys, values)
            draws = [
                hyper_attention(rows, k_in, v_in, min_len=1, generator=torch.Generator().manual_seed(seed), **options)
                for seed in range(scale.pick(4, 1))
            ]
            errors = [float((draw - exact).norm() / exact.norm()) for draw in draws]
            found[label].append(sum(errors) / len(errors))
    for label, errors in found.items():
        out.add(label, ERROR, "", errors, against=None if label == SORTED else SORTED)
    for label in (UNSORTED, ALONE):
        out.check(
            f"error with the LSH order, of that with {label}",
            1 / (out.row(label, ERROR).ratio or math.inf),
            at_most=1.0,
        )


def _perplexity(out: Outcome, scale: Scale, context: int) -> None:
    model, tokenizer = scale.language_model()
    depth = model.config.get_text_config().num_hidden_layers
    windows = token_windows(tokenizer, context, scale.pick(2, 1))
    least = context // 4
    counts = sorted({0, depth // 6, depth // 3, depth // 2})
    for count in counts:
        method = HyperAttention(
            layers=f"last:{count}", min_len=least, block_size=least // 4, samples=least // 4, projections=7
        )
        with attach(model, method):
            perplexity = [math.exp(-float(token_log_probs(model, ids, context // 2).mean())) for ids in windows]
        out.add(
            f"last {count} of {depth} layers",
            PERPLEXITY,
            "",
            perplexity,
            against=f"last 0 of {depth} layers" if count else None,
        )
    row = out.row(f"last {counts[-1]} of {depth} layers", PERPLEXITY)
    own = out.row(f"last 0 of {depth} layers", PERPLEXITY).mean
    # the paper: from 5.6 to 6.3 with half of the layers of ChatGLM2 at 32k tokens
    out.check(f"perplexity with half of the layers, of {own:.1f} with none", row.ratio or math.inf, at_most=1.3)
