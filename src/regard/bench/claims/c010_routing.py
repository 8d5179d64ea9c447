"""010 Routing Transformer: clusters hold more of the attention than other sets of equal size, and cost grows as n^1.5."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ...lens.record import record
from ...nn.sequence.routing_attention import RoutingAttention
from ...ops import masks
from ...ops.attention import attention
from ...ops.kmeans import balanced_clusters, cluster_affinity, spherical_kmeans
from ..text import token_windows
from .claim import Outcome, Scale
from .timing import slope, times

PAPER, SLUG = "010", "routing"
SAYS = (
    "Routing Transformer: attention within k-means clusters of queries and keys finds the keys that matter, better than local or strided "
    "patterns of equal size, and costs n^1.5 instead of n^2."
)
MASS = "attention mass read, first 4 keys and the last 32 left out"
ROUTED, RANDOM, STRIDED = "keys of the query's clusters", "random keys", "every so-many-th key"
SINK, NEAR = 4, 32


def measure(scale: Scale) -> Outcome:
    context, lengths = scale.pick(2048, 192), scale.pick((2048, 4096, 8192, 16384), (256, 512))
    out = Outcome(
        f"queries and keys of SmolLM2 at {context} tokens; layers of random weights at up to {lengths[-1]} tokens (time)",
        "a layer, or a round",
    )
    _mass(out, scale, context)
    _time(out, scale, lengths)
    return out


@torch.no_grad()
def _mass(out: Outcome, scale: Scale, context: int) -> None:
    """Real queries and keys, normalised as routing heads do; centroids by k-means on them. No training of the model."""
    model, tokenizer = scale.language_model()
    depth = model.config.get_text_config().num_hidden_layers
    layers = sorted({round(i * (depth - 1) / 5) for i in range(6)})
    seen = record(model, torch.tensor([token_windows(tokenizer, context, 1)[0]]), layers=layers)
    clusters = max(2, math.isqrt(context) // 2)
    found: dict[str, list[float]] = {ROUTED: [], RANDOM: [], STRIDED: []}
    share = []
    for layer in layers:
        q, k = seen.q(layer), seen.k(layer)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        rows, key = torch.arange(context // 2, context), torch.arange(context)
        allowed = (key >= SINK) & (key <= rows[:, None] - NEAR)
        weights = seen.weights(layer, rows=rows)[0] * allowed
        routed = _routed(q, k, clusters, context // clusters)[:, rows] & allowed
        count = routed.sum(-1)
        g = torch.Generator().manual_seed(layer)
        draw = torch.rand(weights.shape, generator=g).masked_fill(~allowed, 2.0)
        rank = draw.argsort(-1).argsort(-1)
        room = allowed.sum(-1)
        step = (room / count.clamp(min=1)).clamp(min=1.0)[..., None]
        place = (rows[:, None] - NEAR - key).clamp(min=0)
        strided = (((place + 1) / step).floor() > (place / step).floor()) & allowed
        total = weights.sum(-1).clamp(min=1e-9)
        for label, chosen in ((ROUTED, routed), (RANDOM, rank < count[..., None]), (STRIDED, strided)):
            found[label].append(float(((weights * chosen).sum(-1) / total).mean()))
        share.append(float((count / room).mean()))
    for label, values in found.items():
        out.add(label, MASS, "", values, against=None if label == ROUTED else ROUTED)
    out.add(ROUTED, "share of the keys read", "", share)
    for label in (RANDOM, STRIDED):
        lead = out.row(ROUTED, MASS).mean - out.row(label, MASS).mean
        out.check(f"mass read, lead over {label}", lead, at_least=0.05)


def _routed(q: Tensor, k: Tensor, clusters: int, width: int) -> Tensor:
    """Bool (H, N, N): whether a key shares a cluster with a query."""
    unit_q, unit_k = (F.layer_norm(x, x.shape[-1:]) for x in (q, k))
    means = spherical_kmeans(torch.cat([unit_q, unit_k], dim=2), clusters, generator=torch.Generator().manual_seed(0))
    near = q.new_zeros(2, q.shape[1], clusters, q.shape[2])
    for side, unit in zip(near, (unit_q, unit_k)):
        side.scatter_(-1, balanced_clusters(cluster_affinity(unit, means), width)[0], 1.0)
    return torch.einsum("hcn,hcm->hnm", near[0], near[1]) > 0


def _time(out: Outcome, scale: Scale, lengths: tuple[int, ...]) -> None:
    """Time of the layer with about sqrt(n) clusters of about sqrt(n) tokens, routing heads alone; exact attention beside it."""
    dim, heads = scale.pick((256, 4), (32, 2))
    things = {}
    for n in lengths:
        clusters = max(2, round(math.sqrt(n)))
        layer = RoutingAttention(dim, heads, local_heads=0, num_clusters=clusters, window=n // clusters, block=1).eval()
        x = torch.randn(1, n, dim, generator=torch.Generator().manual_seed(n))
        things[f"routing, {n} tokens"] = partial(layer, x)
        q = x.unflatten(-1, (heads, -1)).transpose(1, 2)
        things[f"exact, {n} tokens"] = partial(attention, q, q, q, mask=masks.causal)
    found = times(things, rounds=scale.pick(3, 1), inner=1)
    for n in lengths:
        out.add(f"exact, {n} tokens", "time", "s", found[f"exact, {n} tokens"])
        out.add(f"routing, {n} tokens", "time", "s", found[f"routing, {n} tokens"], against=f"exact, {n} tokens")
    growth = slope(list(lengths), [out.row(f"routing, {n} tokens", "time").mean for n in lengths])
    out.check("exponent of the growth of time with length", growth, at_most=1.65)
    ratio = out.row(f"routing, {lengths[-1]} tokens", "time").ratio or math.inf
    out.check(f"time of that of exact attention at {lengths[-1]} tokens (projections included)", ratio, at_most=1.0)
