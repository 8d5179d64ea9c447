"""One target looks over a long history in two stages: a search keeps a few places, attention over them makes the vector.

Long-Sequence Recommendation Models Need Decoupled Embeddings (Feng et al., ICLR 2025, arXiv 2410.02604), the attention of DARE, TWIN and
DIN. Code read for numbers: thuml/DARE @ c72e087 (no licence), `model/attention_pytorch.py`, `model/din_pytorch.py`. What differs: only the
chosen places are attended to, where the code masks the others; `variant="paper"` gives padding no weight (see there).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..._checks import require, require_int, require_name, require_tensor

__all__ = ["TargetAttended", "TargetAttention"]


@dataclass
class TargetAttended:
    """What a search and the attention over it give.

    Attributes:
        out: (B, Dv). whole: (B, Dv), attention over all places that may be searched. scores: (B, T), about -2^32 where nothing may be
            looked at. chosen: (B, K) int64 places. weights: (B, K) of them.
    """

    out: Tensor
    whole: Tensor
    scores: Tensor
    chosen: Tensor
    weights: Tensor


class TargetAttention(nn.Module):
    """q (B, D) of a target, k (B, T, D) and v (B, T, Dv) of its user's history -> `TargetAttended`.

    Args:
        parts: widths of the parts of q and k, each with a scaled dot product of its own, summed: (meaning, position). They sum to D.
        score: "dot"; or "learned", DIN's: an MLP on [q, k, q - k, q * k] of D, divided by D.
        search: which places are kept: "soft", the `top_k` of largest score (no gradient passes through the choice); "recent", the last
            `top_k` of those that the mask allows ("hard" search, if the mask is the target's category); None: all.
        top_k: places to keep; histories that are shorter keep all. hidden: width of the learned score.
        variant: "released": a history with fewer than `top_k` places is filled up with padding, which weighs as its vectors say; recent
            search scores meaning over all of D. "paper": padding weighs nothing (an empty history gives zeros), parts stay parts.
    """

    def __init__(
        self,
        parts: Sequence[int],
        *,
        score: str = "dot",
        search: str | None = "soft",
        top_k: int = 20,
        hidden: int = 36,
        variant: str = "released",
    ) -> None:
        super().__init__()
        require(len(parts) > 0, "parts", parts, "at least one")
        self.parts = tuple(require_int("parts", part, 1) for part in parts)
        self.score, self.top_k = require_name("score", score, ("dot", "learned")), require_int("top_k", top_k, 1)
        require(search in ("soft", "recent", None), "search", search, "'soft', 'recent' or None")
        self.search, self.variant = search, require_name("variant", variant, ("released", "paper"))
        if score == "learned":
            self.mlp = nn.Sequential(nn.Linear(4 * sum(parts), hidden), nn.PReLU(init=0.1), nn.Linear(hidden, 1))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> TargetAttended:
        """mask: (B, T), nonzero where the history may be searched; default everywhere."""
        require_tensor("k", k, dims=3, floating=True)
        batch, places, dim = k.shape
        require(dim == sum(self.parts), "k", f"shape {tuple(k.shape)}", f"(B, T, {sum(self.parts)})")
        require(tuple(q.shape) == (batch, dim), "q", f"shape {tuple(q.shape)}", f"({batch}, {dim})")
        require(tuple(v.shape[:2]) == (batch, places), "v", f"shape {tuple(v.shape)}", f"({batch}, {places}, Dv)")
        there = k.new_ones(batch, places, dtype=torch.bool) if mask is None else mask > 0
        require(there.shape == k.shape[:2], "mask", f"shape {tuple(there.shape)}", f"({batch}, {places})")
        raw = self.raw_scores(q, k)
        kept = min(self.top_k, places)
        if self.search == "recent":
            age = torch.arange(places - 1, -1, -1, device=k.device)
            chosen = (age + places * ~there).topk(kept, dim=1, largest=False).indices.sort(1).values
            if self.variant == "released":
                there = torch.zeros_like(there).scatter(1, chosen, True)
            else:
                there = there & torch.zeros_like(there).scatter(1, chosen, True)
        scores = raw.masked_fill(~there, _nothing(raw.dtype))
        if self.search is None:
            chosen = torch.arange(places, device=k.device).expand(batch, -1)
        elif self.search == "soft":
            chosen = scores.detach().topk(kept, dim=1).indices
        whole = self._weights(scores, there)
        if self.search == "soft" and self.variant == "released":
            weights = raw.gather(1, chosen).softmax(1)
        else:
            weights = self._weights(scores.gather(1, chosen), there.gather(1, chosen))
        values = v.gather(1, chosen[..., None].expand(-1, -1, v.shape[2]))
        return TargetAttended(_sum(weights, values), _sum(whole, v), scores, chosen, weights)

    def raw_scores(self, q: Tensor, k: Tensor) -> Tensor:
        """(B, T), nothing masked."""
        if self.score == "learned":
            target = q[:, None].expand_as(k)
            return self.mlp(torch.cat((target, k, target - k, target * k), dim=2))[..., 0] / q.shape[1]
        if self.search == "recent" and self.variant == "released" and len(self.parts) > 1:
            ahead = sum(self.parts[:-1])  # as released: meaning over the whole vectors
            pieces = [(q, k), (q[:, ahead:], k[..., ahead:])]
        else:
            pieces = list(zip(q.split(self.parts, dim=1), k.split(self.parts, dim=2)))
        dots = [torch.einsum("bd,btd->bt", one, other) * one.shape[1] ** -0.5 for one, other in pieces]
        return torch.stack(dots).sum(0)

    def _weights(self, scores: Tensor, there: Tensor) -> Tensor:
        weights = scores.softmax(1)
        return weights if self.variant == "released" else weights * there

    def extra_repr(self) -> str:
        return (
            f"parts={self.parts}, score={self.score}, search={self.search}, top_k={self.top_k}, variant={self.variant}"
        )


def _sum(weights: Tensor, values: Tensor) -> Tensor:
    return torch.einsum("bt,btd->bd", weights, values)


def _nothing(dtype: torch.dtype) -> float:
    return max(-(2.0**32) + 1, torch.finfo(dtype).min)
