"""SEA: a linear attention estimates the attention map, the best of it is then attended to exactly.

Lee et al., "SEA: Sparse Linear Attention with Estimated Attention Mask" (ICLR 2024, arXiv 2310.01777). Code read for numbers (no
licence): gmlwns2000/sea-attention @ 5609413, `src/models/perlin_attention/` (`PerlinAttention`).

What differs from the code: scores are always scaled by 1/sqrt(D) (theirs, not causal, only when a teacher is there); inputs are not
modified; the jitter of causal training is clamped to the number of visible keys (theirs: to an index). Variant "paper" leaves
padded keys out of the linear attention's normaliser, so that padding changes less (the convolutions still see it).
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ..._checks import require, require_fraction, require_int, require_name, require_tensor
from ...ops.attention import attention
from ...ops.stretch import COMPETITIONS, compete_for_bins, stretch, stretch_mask, stretched_selection
from .attention_estimator import AttentionEstimator


@dataclass
class SparseLinearRecord:
    """What one forward of `EstimatedSparseAttention` estimated and chose; `regard.losses.sea_distillation` reads it.

    Attributes:
        q, k: (B, H, N, D) as given. scale: factor on q k^T. causal.
        keys: bool (B, N), tokens that exist, or None. scores_m, probs_m: estimate over bins, (B, H, N, K). bins: those kept, bool.
        scales: (B, H, N, 2), sigmoids of the two mixing scales: on the attention, and on it against the average value.
        context: (B, H, N, D), the result. jitter: of the bins of this forward, or None. oversample, k.
    """

    q: Tensor
    k: Tensor
    scale: float
    causal: bool
    keys: Tensor | None
    scores_m: Tensor
    probs_m: Tensor
    bins: Tensor
    scales: Tensor
    context: Tensor
    jitter: Tensor | None = None
    oversample: float = 1.0
    per_query: int = 7

    def visible(self) -> Tensor:
        """Bool (B|1, 1, N|1, N): which keys a query may see."""
        length = self.q.shape[2]
        if self.causal:
            return torch.ones(length, length, dtype=torch.bool, device=self.q.device).tril()[None, None]
        if self.keys is None:
            return torch.ones(1, 1, 1, length, dtype=torch.bool, device=self.q.device)
        return self.keys[:, None, None]

    def kept(self) -> Tensor:
        """Bool (B, H, N, N): the keys that are attended to. The dense matrix, for looking and for training."""
        return stretch_mask(self.bins, self.visible(), self.oversample, self.per_query)

    def scores(self) -> Tensor:
        """(B, H, N, N): the estimate over keys, before the softmax; far below all others where a query does not see."""
        low = torch.finfo(self.scores_m.dtype).min / 2
        return stretch(self.scores_m, self.visible(), low, self.jitter)

    def weights(self) -> Tensor:
        """(B, H, N, N): the exact softmax over the kept keys, times the first scale."""
        scores = (self.q @ self.k.transpose(-1, -2) * self.scale).masked_fill(~self.kept(), -torch.inf)
        return scores.softmax(-1).nan_to_num(0.0) * self.scales[..., :1]


class EstimatedSparseAttention(nn.Module):
    """SEA on given queries, keys and values: (B, H, N, D) each -> (B, H, N, D).

    Memory grows with N: the estimate is N x width, and keys are chosen and read as lists.

    Args:
        num_heads, head_dim. k: keys that a head and query look at on average; heads of a query compete for them. width: bins of the
            estimate. causal: whether queries see only keys up to themselves. max_len: longest sequence (causal only).
        competition: see `regard.ops.stretch.compete_for_bins`; causal needs "causal_batch". oversample: choose so many times more bins,
            then thin the keys.
        redraw_every: see `AttentionEstimator`. variant: "released" or "paper", see the head of this file.

    Loads state dicts of the authors' `PerlinAttention`.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        k: int = 7,
        width: int = 128,
        causal: bool = False,
        max_len: int = 2048,
        competition: str = "causal_batch",
        oversample: float = 1.0,
        redraw_every: int = 1000,
        variant: str = "released",
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("num_heads", num_heads, 1),
            ("head_dim", head_dim, 2),
            ("k", k, 1),
            ("width", width, 1),
        ):
            require_int(name, value, least)
        require_int("max_len", max_len, 1)
        require_name("competition", competition, COMPETITIONS)
        require(
            not causal or competition == "causal_batch",
            "competition",
            competition,
            "'causal_batch' in causal attention",
        )
        require(oversample >= 1.0, "oversample", oversample, "a number >= 1")
        self.num_heads, self.head_dim, self.k, self.width, self.causal = num_heads, head_dim, k, width, causal
        self.competition, self.oversample = competition, float(oversample)
        self.variant = require_name("variant", variant, ("released", "paper"))
        self.estimator = AttentionEstimator(num_heads, head_dim, width, causal, max_len, redraw_every)
        self.scaler = nn.Linear(2 * head_dim, 2)

    def estimate(self, q: Tensor, k: Tensor, v: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """The estimated attention over bins, (B, H, N, width), rows sum to 1 (padded queries: 0)."""
        return self.forward(q, k, v, padding_mask, return_record=True)[1].probs_m

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        padding_mask: Tensor | None = None,
        return_record: bool = False,
        backend: str = "auto",
    ) -> Any:
        """Args:
            q, k, v: (B, H, N, D), queries not scaled. padding_mask: (B, N), nonzero for tokens that exist (not causal only; a causal
                batch is padded on the right, where nothing looks).
        Returns:
            (B, H, N, D), or (that, SparseLinearRecord).
        """
        keys = self._check(q, k, v, padding_mask)
        scale = self.head_dim**-0.5
        if keys is not None:
            v = v.masked_fill(~keys[:, None, :, None], 0)
        seen_q = q * scale if self.causal else q  # the authors hand scaled queries to the causal estimator
        scores, encoding = self.estimator(seen_q, k, v, keys, exclude=self.variant == "paper")
        probs = scores.softmax(-1)
        if keys is not None:
            probs = probs * keys[:, None, :, None]
        length = q.shape[2]
        if self.causal:
            lengths = torch.arange(1, length + 1, device=q.device)[None].expand(q.shape[0], -1)
        else:
            lengths = (
                keys.sum(-1, keepdim=True) if keys is not None else torch.full((q.shape[0], 1), length, device=q.device)
            )
        bins = compete_for_bins(probs.detach(), lengths, self.k, self.competition, keys, self.oversample)
        selection = stretched_selection(bins, causal=self.causal, keys=keys, oversample=self.oversample, k=self.k)
        context = attention(q, k, v, selection=selection, scale=scale, backend=backend)
        scales = self.scaler(encoding).sigmoid()
        out = context * (scales[..., :1] * scales[..., 1:]) + (1 - scales[..., 1:]) * self._average(v, probs, keys)
        if not return_record:
            return out
        jitter = None
        if self.training and self.causal and random.random() < 0.1:
            jitter = torch.rand(1, 1, length, length, device=q.device) * 1.5 - 0.75
        return out, SparseLinearRecord(
            q, k, scale, self.causal, keys, scores, probs, bins, scales, out, jitter, self.oversample, self.k
        )

    def _average(self, v: Tensor, probs: Tensor, keys: Tensor | None) -> Tensor:
        """What is mixed in: the running mean of the values, or their mean by the estimated weights of all queries."""
        if self.causal:
            return v.cumsum(2) / torch.arange(1, v.shape[2] + 1, device=v.device, dtype=v.dtype)[:, None]
        visible = torch.ones(1, v.shape[2], dtype=torch.bool, device=v.device) if keys is None else keys
        weight = stretch(probs.mean(2, keepdim=True), visible[:, None, None], 0.0)
        return weight @ v

    def _check(self, q: Tensor, k: Tensor, v: Tensor, padding_mask: Tensor | None) -> Tensor | None:
        for name, x in (("q", q), ("k", k), ("v", v)):
            require_tensor(name, x, dims=4, floating=True)
            fits = x.shape[1] == self.num_heads and x.shape[3] == self.head_dim and x.shape == q.shape
            require(fits, name, f"shape {tuple(x.shape)}", f"(B, {self.num_heads}, N, {self.head_dim})")
        if padding_mask is None:
            return None
        require(
            not self.causal, "padding_mask", "a mask", "None in causal attention: pad on the right, where nothing looks"
        )
        require_tensor("padding_mask", padding_mask)
        need = f"shape {(q.shape[0], q.shape[2])}"
        require(
            tuple(padding_mask.shape) == (q.shape[0], q.shape[2]),
            "padding_mask",
            f"shape {tuple(padding_mask.shape)}",
            need,
        )
        keys = padding_mask.bool()
        require(bool(keys.any(-1).all()), "padding_mask", "a row of nothing but padding", "a token in every row")
        return keys

    def official_keys(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' names to ours; what no computation reads is dropped, and of the causal kernels the masked rows."""
        convs = {"0": "conv1", "2": "conv2", "5": "conv3"}
        out = {}
        for name, tensor in state.items():
            name = name.replace(".module.", ".")
            found = re.fullmatch(r"attention_predictor_cnn\.(\d)\.net\.(\d)\.(weight|bias)", name)
            if name == "performer.projection_matrix":
                out["estimator.projection"] = tensor
            elif name == "v_eye_learned_causal" and self.causal:
                out["estimator.positions"] = tensor[0, 0]
            elif match := re.fullmatch(r"attention_predictor_(enc|dec_row|dec_scaler)\.(\d)\.(\w+)", name):
                part, index, kind = match.groups()
                ours = {
                    "enc": f"estimator.encoder.{index}",
                    "dec_row": "estimator.row_decoder",
                    "dec_scaler": "scaler",
                }[part]
                out[f"{ours}.{kind}"] = tensor
            elif found:
                _, index, kind = found.groups()
                if kind == "weight" and self.causal:
                    tensor = tensor[:, :, : tensor.shape[3]]
                out[f"estimator.{convs[index]}.{kind}"] = tensor
            elif match := re.fullmatch(r"attention_predictor_cnn\.([02])\.(weight|bias)", name):
                norm = "norm_in" if match.group(1) == "0" else "norm_out"
                out[f"estimator.{norm}.{match.group(2)}"] = tensor
            elif name in self.state_dict():
                out[name] = tensor
        return out


class SparseLinearAttention(nn.Module):
    """SEA as a layer: (B, N, dim) -> (B, N, dim), projections around `EstimatedSparseAttention`.

    Args:
        dim, num_heads: dim a multiple of num_heads. bias: of the projections. dropout: of the result, in training.
        options: `k`, `width`, `causal`, `max_len`, ... of `EstimatedSparseAttention`.
    """

    def __init__(self, dim: int, num_heads: int, *, bias: bool = True, dropout: float = 0.0, **options: Any) -> None:
        super().__init__()
        require_int("dim", dim, 1)
        require_int("num_heads", num_heads, 1)
        require(dim % num_heads == 0, "dim", dim, f"a multiple of num_heads ({num_heads})")
        require_fraction("dropout", dropout)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=bias) for _ in range(4))
        self.core = EstimatedSparseAttention(num_heads, dim // num_heads, **options)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, padding_mask: Tensor | None = None, return_record: bool = False) -> Any:
        """x (B, N, dim) -> (B, N, dim); with `return_record`, (that, SparseLinearRecord)."""
        require_tensor("x", x, dims=3, floating=True)
        require(
            x.shape[2] == self.q_proj.in_features, "x", f"shape {tuple(x.shape)}", f"(B, N, {self.q_proj.in_features})"
        )
        q, k, v = (
            rearrange(p(x), "b n (h d) -> b h n d", h=self.core.num_heads)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        out, record = self.core(q, k, v, padding_mask, return_record=True)
        y = self.dropout(self.o_proj(rearrange(out, "b h n d -> b n (h d)")))
        return (y, record) if return_record else y
