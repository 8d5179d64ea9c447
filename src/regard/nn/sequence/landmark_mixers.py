"""Attention through few vectors: ABC (learned slots), Nyströmformer and LARA (means of segments).

ABC: Attention with Bounded-memory Control (Peng et al. 2022, arXiv 2110.02488); Nyströmformer (Xiong et al. 2021, arXiv 2102.03902);
LARA: Linear Complexity Randomized Self-attention Mechanism (Zheng et al. 2022, arXiv 2204.04667). Code read for numbers: CAB's package
efficient_attention (Shark-NLP/CAB @ 0e49696, MIT). What differs is said at each class.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..._checks import require_int, require_name
from .pattern_attention import ProjectedAttention, segment_means, softmax_over_keys

__all__ = ["BoundedMemoryAttention", "LinearRandomizedAttention", "NystromAttention"]

_CHUNK = 64


def _masked(scores: Tensor, keys: Tensor | None) -> Tensor:
    """Scores (B, H, R, M), -inf at padding keys (B, M)."""
    return scores if keys is None else scores.masked_fill(~keys.bool()[:, None, None], float("-inf"))


def _softmax(scores: Tensor, keys: Tensor | None) -> Tensor:
    """Over the keys of scores (B, H, R, M), padding (B, M) left out."""
    return softmax_over_keys(scores, None if keys is None else keys.bool()[:, None, None])


class BoundedMemoryAttention(ProjectedAttention):
    """ABC: keys and values are gathered into `landmarks` slots, each a learned softmax-weighted mean, and queries attend to the slots.

    All four patterns. Causal self: a slot at time t holds the means up to t. variant="paper" (default): that. "released": CAB's causal
    form never sums over the past: each token sees itself alone, weighed by its share of the slot. Non-causal forms are the same.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        causal: bool = False,
        cross: bool = False,
        landmarks: int = 16,
        variant: str = "paper",
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, causal, cross, **options)
        require_int("landmarks", landmarks, 1)
        self.variant = require_name("variant", variant, ("paper", "released"))
        self.compress_k = nn.Parameter(torch.empty(self.head_dim, landmarks))
        self.compress_v = nn.Parameter(torch.empty(self.head_dim, landmarks))
        for weight in (self.compress_k, self.compress_v):
            nn.init.xavier_uniform_(weight, gain=2**-0.5)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None) -> Tensor:
        q = q * self.head_dim**-0.5
        slots_k = (k @ self.compress_k).transpose(-1, -2)  # (B, H, R, M)
        slots_v = (v @ self.compress_v).transpose(-1, -2)
        if not self.causal or self.cross:
            k, v = _softmax(slots_k, keys) @ k, _softmax(slots_v, keys) @ v
            return (q @ k.transpose(-1, -2)).softmax(-1) @ v
        slots_k, slots_v = _masked(slots_k, keys), _masked(slots_v, keys)
        if self.variant == "released":
            own_k, own_v = (torch.exp(s - torch.logcumsumexp(s, -1)) for s in (slots_k, slots_v))
            scores = (q * k).sum(-1, keepdim=True) * own_k.transpose(-1, -2)
            return (scores.softmax(-1) * own_v.transpose(-1, -2)).sum(-1, keepdim=True) * v
        outs, state_k, state_v = [], None, None
        for start in range(0, q.shape[2], _CHUNK):
            piece = slice(start, start + _CHUNK)
            held_k, state_k = _running_means(slots_k[..., piece], k[:, :, piece], state_k)
            held_v, state_v = _running_means(slots_v[..., piece], v[:, :, piece], state_v)
            weights = torch.einsum("bhnd,bhrnd->bhnr", q[:, :, piece], held_k).softmax(-1)
            outs.append(torch.einsum("bhnr,bhrnd->bhnd", weights, held_v))
        return torch.cat(outs, dim=2)


def _running_means(
    scores: Tensor, x: Tensor, before: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Softmax-weighted means of x (B, H, n, D) up to each place, for each row of scores (B, H, R, n): (B, H, R, n, D).

    before: the log of the weights' sum and the mean (B, H, R, 1), (B, H, R, D) of what came earlier; the same for all is returned.
    """
    place = torch.arange(scores.shape[-1], device=scores.device)
    seen = scores[..., None, :].masked_fill(place > place[:, None], float("-inf"))  # (B, H, R, n, n)
    if before is not None:
        seen = torch.cat([seen, before[0][..., None].expand(*seen.shape[:-1], 1)], dim=-1)
    total = seen.logsumexp(-1, keepdim=True)
    weights = torch.exp(seen - total.clamp(min=torch.finfo(seen.dtype).min))  # nothing seen yet: all zero
    means = weights[..., : scores.shape[-1]] @ x[:, :, None]
    if before is not None:
        means = means + weights[..., -1:] * before[1][..., None, :]
    return means, (total[..., -1, :], means[..., -1, :])


class NystromAttention(ProjectedAttention):
    """Nyströmformer: softmax(Q K~) pinv(softmax(Q~ K~)) softmax(Q~ K) V with Q~, K~ the means of `landmarks` segments. Non-causal self.

    The pseudo-inverse is six steps of an iteration. variant "released" (default): scores are divided by D, not by sqrt(D) (q and k both
    by sqrt(D)), and the iteration starts from the largest column sum of the whole batch, so that results depend a little on batch
    mates. "paper": by sqrt(D), and each head starts from its own. Sequences no longer than `landmarks` get exact attention. Padding
    keys count as zeros in the means, as released. conv_kernel: a depthwise convolution of v over time is added.
    """

    patterns = frozenset({"NS"})

    def __init__(
        self,
        dim: int,
        num_heads: int,
        causal: bool = False,
        cross: bool = False,
        landmarks: int = 16,
        conv_kernel: int | None = None,
        variant: str = "released",
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, causal, cross, **options)
        self.landmarks = require_int("landmarks", landmarks, 1)
        self.variant = require_name("variant", variant, ("released", "paper"))
        self.conv = None
        if conv_kernel is not None:
            pad = require_int("conv_kernel", conv_kernel, 1) // 2
            self.conv = nn.Conv2d(
                num_heads, num_heads, (conv_kernel, 1), padding=(pad, 0), bias=False, groups=num_heads
            )

    def mix(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None) -> Tensor:
        if keys is not None:
            k, v = (t * keys[:, None, :, None].to(t.dtype) for t in (k, v))
        power = -0.5 if self.variant == "released" else -0.25
        q, k = q * self.head_dim**power, k * self.head_dim**power
        if q.shape[2] <= self.landmarks:
            out = _softmax(q @ k.transpose(-1, -2), keys) @ v
        else:
            few_q, few_k = segment_means(q, self.landmarks), segment_means(k, self.landmarks)
            left = (q @ few_k.transpose(-1, -2)).softmax(-1)
            middle = (few_q @ few_k.transpose(-1, -2)).softmax(-1)
            right = _softmax(few_q @ k.transpose(-1, -2), keys)
            out = left @ self._inverse(middle) @ (right @ v)
        return out if self.conv is None else out + self.conv(v)

    def _inverse(self, matrix: Tensor, steps: int = 6) -> Tensor:
        eye = torch.eye(matrix.shape[-1], device=matrix.device, dtype=matrix.dtype)
        columns = matrix.sum(-2)
        largest = columns.max() if self.variant == "released" else columns.amax(-1)[..., None, None]
        inverse = matrix.transpose(-1, -2) / largest
        for _ in range(steps):
            near = matrix @ inverse
            inverse = 0.25 * inverse @ (13 * eye - near @ (15 * eye - near @ (7 * eye - near)))
        return inverse


class LinearRandomizedAttention(ProjectedAttention):
    """LARA: randomised attention with a proposal for each of `landmarks` segments, combined by importance weights. Non-causal self.

    In training the proposals' samples are random (mean + noise); otherwise they are the means. antithetic: noise and its negative.
    optimal: importance weights also count the length of the values. adaptive: learned linear maps on the means. Padding keys are left
    out of the sums over values, but not of the segments' means and normalisers, as released.
    """

    patterns = frozenset({"NS"})

    def __init__(
        self,
        dim: int,
        num_heads: int,
        causal: bool = False,
        cross: bool = False,
        landmarks: int = 16,
        antithetic: bool = False,
        optimal: bool = False,
        adaptive: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, causal, cross, **options)
        self.landmarks, self.antithetic, self.optimal = require_int("landmarks", landmarks, 1), antithetic, optimal
        self.q_bar_proj = nn.Linear(self.head_dim, self.head_dim) if adaptive else None
        self.k_bar_proj = nn.Linear(self.head_dim, self.head_dim) if adaptive else None

    def mix(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None) -> Tensor:
        mean_q, mean_k = segment_means(q, self.landmarks), segment_means(k, self.landmarks)
        if self.q_bar_proj is not None and self.k_bar_proj is not None:
            mean_q, mean_k = self.q_bar_proj(mean_q), self.k_bar_proj(mean_k)
        mean = mean_q + mean_k
        sample = mean
        if self.training:
            noise = torch.randn_like(mean)
            if self.antithetic:
                mean, noise = torch.cat([mean, mean], 2), torch.cat([noise, -noise], 2)
            sample = mean + noise
        scale = self.head_dim**-0.5

        def log_features(x: Tensor) -> Tensor:
            """(B, H, N, D) -> (B, H, C, N): log of the positive feature of each sample."""
            return scale * (sample @ x.transpose(-1, -2) - x.square().sum(-1)[:, :, None] / 2)

        log_k = log_features(k)
        of_mean = scale * ((sample * mean).sum(-1) - mean.square().sum(-1) / 2)
        values = _softmax(log_k, keys) @ v  # (B, H, C, D)
        stratum = scale * mean @ q.transpose(-1, -2)
        if self.optimal:
            stratum = stratum + (v.norm(dim=-1) + 1e-10).log()[:, :, None]
        log_weights = stratum + log_features(q) + log_k.logsumexp(-1, keepdim=True) - of_mean[..., None]
        return log_weights.softmax(2).transpose(-1, -2) @ values

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors keep the maps of the means one level down, in `lara`."""
        return {name.removeprefix("lara."): tensor for name, tensor in state.items()}
