"""125 CCA-Attention: cheaper prefill, a small cache, and a better use of it than a window; pooling by significance against plain means."""

from __future__ import annotations

import math
from functools import partial

import torch

from ...integrations.transformers import attach
from ...methods.caches.ragged import kv_bytes
from ...methods.call import Method
from ...methods.sparse.baselines import SlidingWindow
from ...methods.sparse.cca_attention import CCAAttention
from ...ops import masks
from ...ops.attention import attention
from ...ops.core_context import core_context_attention
from ..text import token_windows
from .claim import Outcome, Scale
from .language import filled_cache, token_log_probs
from .timing import times

PAPER, SLUG = "125", "cca"
SAYS = (
    "CCA-Attention: core tokens for old groups and a window of recent tokens keep the quality of full attention at a fraction of its cost "
    "(several times faster at long contexts, a much smaller cache); pooling by significance beats mean and max pooling."
)
PERPLEXITY = "perplexity of the second half"
CCA, MEAN, MAX, WINDOW = (
    "core context",
    "mean-pooled groups",
    "max-pooled groups",
    "window of as many entries, with 4 sinks",
)


def measure(scale: Scale) -> Outcome:
    context, length = scale.pick(1536, 200), scale.pick(16384, 512)
    group, window = scale.pick((16, 256), (8, 32))
    out = Outcome(
        f"{context} tokens, groups of {group}, window {window}, no fine-tuning; {length} tokens, 9 heads of 64, 3 kv heads (time)",
        "a text or a round",
    )
    _quality(out, scale, context, group, window)
    _time(out, scale, length)
    return out


def _quality(out: Outcome, scale: Scale, context: int, group: int, window: int) -> None:
    model, tokenizer = scale.language_model()
    entries = window + group - 1 + context // group
    texts = token_windows(tokenizer, context, scale.pick(3, 1))
    ways: dict[str, Method | None] = {
        "dense": None,
        CCA: CCAAttention(group, window),
        MEAN: CCAAttention(group, window, pool="mean"),
        MAX: CCAAttention(group, window, pool="max"),
        WINDOW: SlidingWindow(entries - 4, sink=4),
    }
    for label, method in ways.items():
        with attach(model, *([method] if method else [])):
            found = [math.exp(-float(token_log_probs(model, ids, context // 2).mean())) for ids in texts]
            out.add(label, PERPLEXITY, "", found, against=None if label == "dense" else "dense")
            if label in ("dense", CCA):
                size = kv_bytes(filled_cache(model, texts[0]))
                out.add(label, "KV cache", "bytes", size, against=None if label == "dense" else "dense")
    perplexity = {label: out.row(label, PERPLEXITY) for label in ways}
    out.check("perplexity, of the dense model's", perplexity[CCA].ratio or math.inf, at_most=1.1)
    for label in (MEAN, MAX, WINDOW):
        out.check(f"perplexity, of that with {label}", perplexity[CCA].mean / perplexity[label].mean, at_most=1.0)
    share = entries / context
    measured = out.row(CCA, "KV cache").ratio or math.inf
    # both stores are rounded up to 32 entries
    out.check(f"KV cache, of the dense one (planned {share:.2f})", measured, at_most=share + 64 / context)
    out.note = "The paper fine-tunes for about 1000 steps with the method; here it is put on the model as it is."


def _time(out: Outcome, scale: Scale, length: int) -> None:
    heads, kv_heads = scale.pick((9, 3), (2, 1))
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads if i == 0 else kv_heads, length, 64, generator=g) for i in range(3))
    group, window = scale.pick((16, 1024), (8, 64))
    found = times(
        {
            "dense": partial(attention, q, k, v, mask=masks.causal),
            CCA: partial(core_context_attention, q, k, v, group=group, window=window),
        },
        rounds=scale.pick(3, 1),
        inner=1,
    )
    out.add("dense", "attention of a prefill", "s", found["dense"])
    row = out.add(CCA, "attention of a prefill", "s", found[CCA], against="dense")
    out.check(f"speed-up of the attention of {length} tokens", 1 / (row.ratio or math.inf), at_least=2.0)
