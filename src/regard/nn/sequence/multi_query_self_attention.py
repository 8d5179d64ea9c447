"""Self-attention whose queries are averages of the last few tokens: several windows side by side, their results mixed.

Collaboration and Transition: Distilling Item Transitions into Multi-Query Self-Attention for Sequential Recommendation (Zhu et al., WSDM
2024, arXiv 2311.01056). Code read for numbers: zhuty16/MQSA-TED @ 91c9001 (no licence), `MQSA_TED.py`. What differs: any number of windows
and weights in place of two; what stands where there is no token is zero in front of the last norm, as there, but is never attended from.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..._checks import bad_value, require, require_int, require_tensor
from ...ops.attention import attention
from .pre_norm import require_rate

__all__ = ["AveragedQueryBlock", "MultiQuerySelfAttention", "trailing_mean"]

EPS = 1e-24  # of every norm, as released


def trailing_mean(x: Tensor, exists: Tensor, window: int) -> Tensor:
    """Mean of the last `window` tokens up to each, those that exist: x (B, N, C), exists (B, N) bool -> (B, N, C); 0 where there are none.

    x must be 0 where there is no token.
    """
    require_int("window", window, 1)
    total, count = x, exists.to(x.dtype)[..., None]
    here = count
    for back in range(1, min(window, x.shape[1])):
        total = total + F.pad(x, (0, 0, back, 0))[:, : x.shape[1]]
        count = count + F.pad(here, (0, 0, back, 0))[:, : x.shape[1]]
    return total / count.clamp(min=1)


class AveragedQueryBlock(nn.Module):
    """One block: queries from the normed trailing mean of x, keys and values from x, causal; added to the queries' source; norm; MLP.

    Args:
        dim, num_heads. window: tokens a query is the mean of; 1 is the block of SASRec. dropout: of attention weights and in the MLP.
    """

    def __init__(self, dim: int, num_heads: int = 1, window: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.dim, self.num_heads = require_int("dim", dim, 1), require_int("num_heads", num_heads, 1)
        require(dim % num_heads == 0, "dim", dim, f"a multiple of num_heads ({num_heads})")
        self.window, self.dropout = require_int("window", window, 1), require_rate("dropout", dropout)
        self.query_norm, self.norm = nn.LayerNorm(dim, eps=EPS), nn.LayerNorm(dim, eps=EPS)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim) for _ in range(3))
        self.fc1, self.fc2 = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, exists: Tensor) -> Tensor:
        """x (B, N, dim), 0 where `exists` (B, N) is False -> the same, 0 there too."""
        source = self.query_norm(trailing_mean(x, exists, self.window))
        q, k, v = self._heads(source, x)
        out = attention(q, k, v, mask=self._mask(exists), dropout=self.dropout if self.training else 0.0)
        h = self.norm(rearrange(out, "b h n d -> b n (h d)") + source)
        inner = F.dropout(torch.relu(self.fc1(h)), self.dropout, self.training)
        return (h + F.dropout(self.fc2(inner), self.dropout, self.training)) * exists[..., None]

    @torch.no_grad()
    def attention_weights(self, x: Tensor, exists: Tensor) -> Tensor:
        """Who looks at whom, (B, num_heads, N, N); rows of padding hold their own place alone."""
        q, k, _ = self._heads(self.query_norm(trailing_mean(x, exists, self.window)), x)
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~self._mask(exists), -torch.inf)
        return scores.softmax(-1)

    def _heads(self, source: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (
            rearrange(made, "b n (h d) -> b h n d", h=self.num_heads)
            for made in (self.q_proj(source), self.k_proj(x), self.v_proj(x))
        )
        return q, k, v

    @staticmethod
    def _mask(exists: Tensor) -> Tensor:
        """(B, 1, N, N): what exists and is not later, and always oneself."""
        own = torch.eye(exists.shape[1], dtype=torch.bool, device=exists.device)
        return ((exists[:, None] & torch.ones_like(own).tril()) | own)[:, None]


class MultiQuerySelfAttention(nn.Module):
    """Branches of blocks, one a window, each with weights of its own; their normed results mixed: (B, N, dim) -> (B, N, dim).

    Args:
        dim, num_heads, dropout: as `AveragedQueryBlock`. depth: blocks of each branch.
        windows: of the branches' queries. Short ones follow the last step (sharp, varying), long ones what a user likes (steady, biased).
        weights: of the branches, summing to 1.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        windows: Sequence[int] = (1, 3),
        weights: Sequence[float] = (0.5, 0.5),
        *,
        depth: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        require(len(windows) > 0, "windows", windows, "at least one")
        if len(weights) != len(windows) or abs(sum(weights) - 1) > 1e-6:
            raise bad_value("weights", tuple(weights), f"one for each of {len(windows)} windows, summing to 1")
        self.dim, self.weights = dim, tuple(float(weight) for weight in weights)
        self.branches = nn.ModuleList(
            nn.ModuleList(
                AveragedQueryBlock(dim, num_heads, window, dropout) for _ in range(require_int("depth", depth, 1))
            )
            for window in windows
        )
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=EPS) for _ in windows)

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """x (B, N, dim); padding_mask: (B, N), nonzero for tokens that exist. What comes out where there is none means nothing."""
        return sum(weight * out for weight, out in zip(self.weights, self.of_branches(x, padding_mask)))  # type: ignore[return-value]

    def of_branches(self, x: Tensor, padding_mask: Tensor | None = None) -> list[Tensor]:
        """What each branch gives, before they are mixed."""
        require_tensor("x", x, dims=3, floating=True)
        require(x.shape[2] == self.dim, "x", f"shape {tuple(x.shape)}", f"(B, N, {self.dim})")
        exists = x.new_ones(x.shape[:2], dtype=torch.bool) if padding_mask is None else padding_mask.bool()
        require(
            exists.shape == x.shape[:2],
            "padding_mask",
            f"shape {tuple(exists.shape)}",
            f"{tuple(x.shape[:2])}, that of x",
        )
        made = []
        for blocks, norm in zip(self.branches, self.norms):
            h = x * exists[..., None]
            for block in blocks:  # type: ignore[attr-defined]
                h = block(h, exists)
            made.append(norm(h))
        return made

    def extra_repr(self) -> str:
        return f"windows={tuple(blocks[0].window for blocks in self.branches)}, weights={self.weights}"  # type: ignore[index]
