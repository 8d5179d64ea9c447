"""032 LOOK-M: text is kept, dropped tokens are merged, and a fifth of the cache does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...integrations.transformers import attach
from ...methods import LookM, RecycledAttention
from ...methods.caches import kv_bytes
from ...methods.call import AttentionCall, Method
from ..tasks import divergence, read
from ..text import token_windows
from .claim import Outcome, Scale
from .timing import times

PAPER, SLUG = "032", "look-m"
SAYS = (
    "LOOK-M: with a fifth of the KV cache answers stay close to those of the full one, decoding gets faster (1.3 to 1.5 times at that "
    "budget), keeping the text first helps, and merging what is dropped is better than evicting it, pivot merging best."
)
PIVOT, AVERAGE, WEIGHTED, EVICT = "LOOK-M, pivot", "LOOK-M, averaged", "LOOK-M, weighted", "text prior, evicted"
TWIN, H2O, STREAM = "pivot without text prior", "H2O (prompt only)", "sinks and window"
KL = "KL from dense, decoded text"


def measure(scale: Scale) -> Outcome:
    model, tokenizer = scale.language_model()
    context, steps = scale.pick(512, 128), scale.pick(24, 3)
    text = scale.pick((32, 16), (12, 6))
    out = Outcome(
        f"{context} tokens of real text of which all but the first {text[0]} and the last {text[1]} stand for an image, "
        f"{steps} tokens decoded, a fifth of the cache kept",
        "a prompt, or a round",
    )
    _quality(out, model, tokenizer, context, steps, text, scale.pick(3, 1))
    _cost(out, scale.pick(8192, 1024), scale)
    out.note = (
        "No vision-language model can be had here: a stretch of text plays the image, which is less redundant than an image is, "
        "so that merging has less to gain."
    )
    return out


def _ways(context: int) -> dict[str, Method | None]:
    fifth: dict[str, Any] = {"heavy": 0.1, "recent": 0.1}
    return {
        "dense": None,
        PIVOT: LookM(**fifth),
        AVERAGE: LookM(**fifth, merge="average"),
        WEIGHTED: LookM(**fifth, merge="weighted"),
        EVICT: LookM(**fifth, merge="none"),
        TWIN: LookM(**fifth, text_prior=False),
        H2O: LookM(**fifth, merge="none", text_prior=False, sink=0),
        STREAM: RecycledAttention(int(0.1 * context) * 2, 1 << 30, choice="recent"),
    }


def _quality(
    out: Outcome, model: Any, tokenizer: Any, context: int, steps: int, text: tuple[int, int], prompts: int
) -> None:
    ways = _ways(context)
    found: dict[str, list[float]] = {label: [] for label in ways}
    image = torch.zeros(1, context, dtype=torch.bool)
    image[:, text[0] : context - text[1]] = True
    for ids in token_windows(tokenizer, context + steps, prompts):
        dense = None
        for label, method in ways.items():
            with attach(model, *([method] if method else []), spans={"image": image}):
                rows = read(model, ids[:context], ids[context:]).log_probs
            dense = rows if dense is None else dense
            found[label].append(divergence(dense, rows))
    for label in [STREAM, *(label for label in ways if label not in ("dense", STREAM))]:
        out.add(label, KL, "nats", found[label], against=None if label == STREAM else STREAM)
    for better, worse in ((PIVOT, H2O), (H2O, STREAM), (PIVOT, TWIN), (PIVOT, EVICT), (PIVOT, AVERAGE)):
        ratio = out.row(better, KL).mean / max(out.row(worse, KL).mean, 1e-12)
        out.check(f"KL from dense, {better} over {worse}", ratio, at_most=1.0)


def _cost(out: Outcome, context: int, scale: Scale) -> None:
    """One attention layer of SmolLM2's shape: bytes, and time per decoded token."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, context, 64, generator=generator) for heads in (9, 3, 3))
    things, size = {}, {}
    for label, budget in (("full cache", 1.0), ("a fifth kept", 0.2)):
        layer = LookM(budget, text_prior=False).make_layer(None)
        _attend(layer, q, k, v)
        size[label] = kv_bytes(layer)
        things[label] = lambda layer=layer: _attend(layer, q[:, :, :1], k[:, :, :1], v[:, :, :1])
    for label, seconds in times(things, scale.pick(5, 1), scale.pick(10, 2)).items():
        against = None if label == "full cache" else "full cache"
        out.add(label, "cache of a layer", "bytes", float(size[label]), against=against)
        out.add(label, "attention time per decoded token", "s", seconds, against=against)
    memory, clock = (out.row("a fifth kept", f) for f in ("cache of a layer", "attention time per decoded token"))
    out.check("bytes of the cache, of the full one", memory.ratio, at_most=0.21, digits=3)  # type: ignore[arg-type]
    bound = scale.pick(0.6, 2.0)
    out.check("attention time per token, of the full cache", clock.ratio, at_most=bound, spread=clock.spread)  # type: ignore[arg-type]


@torch.no_grad()
def _attend(layer: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    layer.update(k, v)
    return layer.attend(AttentionCall(nn.Identity(), 0, q, k, v, causal=True, cache=layer, num_layers=1))
