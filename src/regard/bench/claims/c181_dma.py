"""181 DMA: a learned bias keeps the tokens that matter: recall as with full attention, where a window of the same size fails."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...losses.runner import fit
from ...nn.sequence.dynamic_mask_attention import DynamicMaskAttention
from ...ops.attention import attention
from ...ops.dynamic_mask import dynamic_mask_attention
from ...ops.masks import causal
from .claim import Outcome, Scale
from .timing import times

PAPER, SLUG = "181", "dma"
SAYS = (
    "DMA: keeping a small number of keys by a learned, value-based bias recalls as well as full attention, where a sliding window of the "
    "same size does not, and costs what it keeps."
)
KEYS, VALUES, FILLER, ASKED = 32, 16, 32, 8
FULL, LEARNED, WINDOW = "full attention", "DMA", "sliding window of the same size"
ACCURACY = "queries answered right"


class _Recall(nn.Module):
    """Items (a key with its value, or filler), then keys to look up: one attention layer and an MLP."""

    def __init__(self, keep: int, learn: bool, dim: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(KEYS + VALUES + FILLER + 1, dim)
        self.attention = DynamicMaskAttention(dim, 4, keep=keep, form="linear")
        if learn:
            nn.init.constant_(
                self.attention.A, 1.0
            )  # at 0 every key is equal and the choice has no gradient to begin with
        else:
            self.attention.A.requires_grad_(False)  # stays 0: full attention, or the last `keep` keys
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, VALUES))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        x = self.embed(first) + self.embed(second)
        return self.head(x + self.attention(x, backend="sdpa"))[:, -ASKED:]  # short rows: a matrix is cheapest


def measure(scale: Scale) -> Outcome:
    length, items, steps = scale.pick(128, 48), 16, scale.pick(300, 3)
    keep = 24
    out = Outcome("", "a batch of 16 sequences")
    for label, size, learn in ((FULL, length + ASKED, False), (LEARNED, keep, True), (WINDOW, keep, False)):
        torch.manual_seed(0)
        model = _Recall(size, learn)
        fit(
            model,
            partial(_loss, model, length, items),
            lambda number: number,
            steps=steps,
            lr=3e-3,
            warmup=20,
            schedule="cosine",
            progress=False,
        )
        model.eval()
        with torch.no_grad():
            right = []
            for seed in range(10**6, 10**6 + scale.pick(8, 1)):
                first, second, answer = _batch(seed, length, items)
                right.append(float((model(first, second).argmax(-1) == answer).float().mean()))
        out.add(label, ACCURACY, "", right)
    full, learned, window = (out.row(label, ACCURACY).mean for label in (FULL, LEARNED, WINDOW))
    out.check(f"{ACCURACY}: DMA over full attention", learned / max(full, 1e-9), at_least=0.95)
    out.check(f"{ACCURACY}: lead of DMA over the window", learned - window, at_least=0.3)
    told = _time(out, scale)
    out.setting = (
        f"{items} items among {length} tokens of filler, {ASKED} looked up after them, one layer of 4 heads keeping {keep} keys, trained "
        f"{steps} steps; {told}"
    )
    out.note = f"Answered right: full {full:.2f}, DMA {learned:.2f}, window {window:.2f} (chance {1 / VALUES:.2f})."
    return out


def _loss(model: nn.Module, length: int, items: int, number: int) -> Tensor:
    first, second, answer = _batch(number, length, items)
    return F.cross_entropy(model(first, second).flatten(0, 1), answer.flatten())


def _batch(seed: int, length: int, items: int, batch: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    none = KEYS + VALUES + FILLER
    keys = torch.rand(batch, KEYS, generator=g).argsort(-1)[:, :items]
    values = torch.randint(VALUES, (batch, items), generator=g)
    where = torch.rand(batch, length, generator=g).argsort(-1)[:, :items]
    first = KEYS + VALUES + torch.randint(FILLER, (batch, length), generator=g)
    second = torch.full((batch, length), none)
    first.scatter_(1, where, keys)
    second.scatter_(1, where, KEYS + values)
    asked = torch.rand(batch, items, generator=g).argsort(-1)[:, :ASKED]
    first = torch.cat((first, keys.gather(1, asked)), dim=1)
    second = torch.cat((second, torch.full((batch, ASKED), none)), dim=1)
    return first, second, values.gather(1, asked)


@torch.no_grad()
def _time(out: Outcome, scale: Scale) -> str:
    """Attention of one decoded token, the choice of its keys included."""
    length, keep = scale.pick((32768, 2048), (2048, 128))
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, n, 64, generator=g) for h, n in ((9, 1), (3, length), (3, length)))
    bias = torch.randn(1, 3, length, generator=g)
    ways = {
        "dense": partial(attention, q, k, v, mask=causal),
        "DMA": partial(dynamic_mask_attention, q, k, v, bias, keep),
    }
    found = times(ways, rounds=scale.pick(5, 1), inner=scale.pick(5, 1))
    out.add("dense", "attention of a decoded token", "s", found["dense"])
    row = out.add("DMA", "attention of a decoded token", "s", found["DMA"], against="dense")
    assert row.ratio is not None
    out.check("time of a decoded token over dense, choice included", row.ratio, at_most=0.3, spread=row.spread)
    return f"decoding at {length} tokens keeping {keep}, 9 query and 3 kv heads of 64, float32"
