"""The community's Routing Transformer layer: lucidrains/routing-transformer @ 3f6c461 (MIT), read for numbers.

After Roy et al. (2020, arXiv 2003.05997), and different from the authors' layer (`nn/sequence/routing_attention.py`) in most details:
clusters of queries and keys on the unit sphere, scores scaled by 1 / sqrt(d), a mask by true positions, centroids started from the data
and moved after the backward pass.

What differs: local heads have no relative positions of their own (the package `local-attention` brings them there).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..._checks import require, require_int, require_tensor
from ...ops.attention import attention
from ...ops.groups import gather_groups, group_attention, scatter_groups
from ...ops.kmeans import balanced_clusters, cluster_affinity, spherical_kmeans, spherical_kmeans_step
from .local_blocks import local_mask

SELF_SCORE = -5e4  # of a token's own key where queries and keys are shared: looked at only when there is nothing else


class SphericalKMeans(nn.Module):
    """Centroids of unit length, (H, C, d); `initted` tells whether they have been started from data."""

    means: Tensor
    initted: Tensor

    def __init__(self, num_heads: int, num_clusters: int, head_dim: int) -> None:
        super().__init__()
        self.register_buffer("means", torch.randn(num_heads, num_clusters, head_dim))
        self.register_buffer("initted", torch.tensor(False))


class KmeansAttention(nn.Module):
    """Attention within clusters of equal size: each centroid takes the `window` queries and the keys nearest to it.

    A token in several clusters gets the mean of what it finds there (divided by their number + 1e-5), one in none gets zeros. Which
    tokens share a cluster depends on the whole sequence, also in a causal layer.

    Args:
        num_heads, head_dim: of q, k and v. num_clusters: centroids a head. window: queries (and keys) a cluster.
        causal: whether a query sees keys at later positions. shared_qk: keys are the queries, normalised; a token sees itself only where it
            sees nothing else. receives_context: keys and values come from another sequence; `context_window` keys a cluster.
        num_mem_kv: learned keys and values in each cluster; at least 1 where causal without shared_qk, since a query might find nothing.
        dropout: of the weights. decay: of the centroids' moving average. commitment: weight of the loss.
        auto_update: move the centroids in the backward pass of each training step; False leaves it to a call of `update()`.

    Shapes: `forward(q (B, H, N, d), k (B, H, M, d), v (B, H, M, d), query_mask=None, key_mask=None) -> (out (B, H, N, d), loss)`; masks are
    bool (B, N) and (B, M), True for real tokens (the key mask defaults to the query mask). The first forward starts the centroids
    from its data, unless a state dict brought them. Masked tokens take part in routing, as in the code this follows.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        num_clusters: int = 8,
        window: int = 64,
        context_window: int | None = None,
        causal: bool = False,
        shared_qk: bool = False,
        receives_context: bool = False,
        num_mem_kv: int = 0,
        dropout: float = 0.0,
        decay: float = 0.999,
        commitment: float = 1e-4,
        auto_update: bool = True,
    ) -> None:
        super().__init__()
        context_window = window if context_window is None else context_window
        for name, value, least in (
            ("num_heads", num_heads, 1),
            ("head_dim", head_dim, 1),
            ("num_clusters", num_clusters, 1),
            ("window", window, 1),
            ("context_window", context_window, 1),
            ("num_mem_kv", num_mem_kv, 0),
        ):
            require_int(name, value, least)
        require(not (causal and receives_context), "causal", causal, "False with receives_context")
        self.num_heads, self.head_dim, self.num_clusters = num_heads, head_dim, num_clusters
        self.window, self.context_window = window, context_window
        self.causal, self.shared_qk, self.receives_context = bool(causal), bool(shared_qk), bool(receives_context)
        self.dropout, self.decay, self.commitment = float(dropout), float(decay), float(commitment)
        self.auto_update = bool(auto_update)
        self.kmeans = SphericalKMeans(num_heads, num_clusters, head_dim)
        memories = max(num_mem_kv, 1 if causal and not shared_qk else 0)
        self.mem_key = nn.Parameter(torch.randn(num_heads, num_clusters, memories, head_dim))
        self.mem_value = nn.Parameter(torch.randn(num_heads, num_clusters, memories, head_dim))
        self._new_means: Tensor | None = None
        self._num_new = 0

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, query_mask: Tensor | None = None, key_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        for name, x in (("q", q), ("k", k), ("v", v)):
            require_tensor(name, x, dims=4, floating=True)
            fits = x.shape[1] == self.num_heads and x.shape[3] == self.head_dim and x.shape[0] == q.shape[0]
            require(fits, name, f"shape {tuple(x.shape)}", f"({q.shape[0]}, {self.num_heads}, N, {self.head_dim})")
        length, kv_len = q.shape[2], k.shape[2]
        require(v.shape[2] == kv_len, "v", f"length {v.shape[2]}", f"k's length {kv_len}")
        if not self.receives_context:
            require(kv_len == length, "k", f"length {kv_len}", f"q's length {length} without receives_context")
            key_mask = query_mask if key_mask is None else key_mask
        together = self.shared_qk and not self.receives_context
        affinity, loss = self._route(q if together else torch.cat((q, k), dim=2))
        if together:
            k = F.normalize(k, dim=-1)
            q_index = k_index = balanced_clusters(affinity, self.window)
        else:
            q_index = balanced_clusters(affinity[:, :, :length], self.window)
            k_index = balanced_clusters(
                affinity[:, :, length:], self.context_window if self.receives_context else self.window
            )
        keys, values = (
            torch.cat((memory.to(q.dtype).expand(q.shape[0], -1, -1, -1, -1), gather_groups(x, k_index)), dim=3)
            for memory, x in ((self.mem_key, k), (self.mem_value, v))
        )
        out = group_attention(
            gather_groups(q, q_index),
            keys,
            values,
            bias=self._bias(q_index, k_index, query_mask, key_mask, q.dtype),
            scale=self.head_dim**-0.5,
            dropout=self.dropout if self.training else 0.0,
        )
        out = scatter_groups(out, q_index, length, eps=1e-5)
        if self.training and self.auto_update and out.requires_grad:
            out.register_hook(self._after_backward)
        return out, loss

    @torch.no_grad()
    def update(self) -> None:
        """Move the centroids towards those of the training forwards since the last update (their mean)."""
        if self._new_means is None:
            raise RuntimeError("KmeansAttention.update needs a forward in training mode before it")
        self.kmeans.means.lerp_(self._new_means.to(self.kmeans.means.dtype), 1.0 - self.decay)
        self._new_means, self._num_new = None, 0

    def _after_backward(self, grad: Tensor) -> None:
        if self._new_means is not None:  # a second backward through the same forward moves nothing
            self.update()

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Affinities (B, H, N, C) and the loss; in training also remembers where the centroids should go."""
        kmeans = self.kmeans
        if not bool(kmeans.initted):
            with torch.no_grad():
                kmeans.means.copy_(spherical_kmeans(x.detach(), self.num_clusters))
                kmeans.initted.fill_(True)
        unit = F.normalize(x, dim=-1)
        with torch.no_grad():
            affinity = cluster_affinity(unit, kmeans.means)
            nearest = affinity.argmax(-1)
        heads = torch.arange(self.num_heads, device=x.device)[:, None]
        loss = F.mse_loss(unit, kmeans.means[heads, nearest].to(unit.dtype)) * self.commitment
        if self.training:
            with torch.no_grad():
                new = spherical_kmeans_step(unit, kmeans.means, nearest)
                if self._new_means is not None:
                    new = (self._new_means * self._num_new + new) / (self._num_new + 1)
                self._new_means, self._num_new = new, self._num_new + 1
        return affinity, loss

    def _bias(
        self, q_index: Tensor, k_index: Tensor, query_mask: Tensor | None, key_mask: Tensor | None, dtype: torch.dtype
    ) -> Tensor | None:
        """What is added to the scores, (B, H, C, wq, memories + wk): a large negative number for what a query does not see.

        Finite, as in the code this follows: a query that sees nothing at all averages over what there is.
        """
        queries, keys = q_index[..., :, None], k_index[..., None, :]
        least = torch.finfo(dtype).min
        bias = torch.zeros(torch.broadcast_shapes(queries.shape, keys.shape), dtype=dtype, device=q_index.device)
        seen: list[Tensor] = []
        for mask, index, axis in ((query_mask, q_index, -1), (key_mask, k_index, -2)):
            if mask is not None:
                require_tensor("query_mask" if axis == -1 else "key_mask", mask, dims=2)
                real = mask[:, None, None].expand(*index.shape[:3], -1).gather(3, index)
                seen.append(real.unsqueeze(axis))
        if self.causal:
            seen.append(queries >= keys)
        for keep in seen:
            bias = bias.masked_fill(~keep, least)
        if self.shared_qk:
            bias = bias.masked_fill(queries == keys, SELF_SCORE)
        return F.pad(bias, (self.mem_key.shape[2], 0)) if seen or self.shared_qk else None


class KmeansSelfAttention(nn.Module):
    """Self-attention of `KmeansAttention` heads and local heads, as the community's `SelfAttention`.

    Args:
        dim: channels in and out. num_heads: all heads, `local_heads` of them local. head_dim: default dim // num_heads.
        num_clusters, window: of the routing heads. local_window: block of the local heads, which see their own block and
            `local_radius` blocks before it (not causal: also after).
        other arguments: as in `KmeansAttention`.

    Shapes: `forward(x (B, N, dim), mask=None) -> (y (B, N, dim), loss)`, mask bool (B, N), True for real tokens.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        local_heads: int = 0,
        num_clusters: int = 8,
        window: int = 64,
        local_window: int | None = None,
        local_radius: int = 1,
        head_dim: int | None = None,
        causal: bool = False,
        shared_qk: bool = False,
        num_mem_kv: int = 0,
        attn_drop: float = 0.0,
        decay: float = 0.999,
        commitment: float = 1e-4,
        auto_update: bool = True,
    ) -> None:
        super().__init__()
        require_int("num_heads", num_heads, 1)
        require(0 <= local_heads <= num_heads, "local_heads", local_heads, f"at most num_heads, {num_heads}")
        if head_dim is None:
            require(dim % num_heads == 0, "dim", dim, f"a multiple of num_heads, {num_heads}, or a head_dim")
            head_dim = dim // num_heads
        self.dim, self.head_dim, self.local_heads = dim, head_dim, local_heads
        self.routed_heads, self.causal, self.attn_drop = num_heads - local_heads, bool(causal), float(attn_drop)
        self.local_window = require_int("local_window", window if local_window is None else local_window, 1)
        self.local_radius = require_int("local_radius", local_radius, 0)
        if local_heads:
            self.local_to_qkv = nn.Linear(dim, 3 * head_dim * local_heads)
        inner = head_dim * self.routed_heads
        self.to_q, self.to_v = nn.Linear(dim, inner, bias=False), nn.Linear(dim, inner, bias=False)
        self.to_k = None if shared_qk else nn.Linear(dim, inner, bias=False)
        self.global_attn = None
        if self.routed_heads:
            self.global_attn = KmeansAttention(
                self.routed_heads,
                head_dim,
                num_clusters=num_clusters,
                window=window,
                causal=causal,
                shared_qk=shared_qk,
                num_mem_kv=num_mem_kv,
                dropout=attn_drop,
                decay=decay,
                commitment=commitment,
                auto_update=auto_update,
            )
        self.to_out = nn.Linear(head_dim * num_heads, dim, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        require_tensor("x", x, dims=3, floating=True)
        require(x.shape[2] == self.dim, "x", f"shape {tuple(x.shape)}", f"(B, N, {self.dim})")
        outs, loss = [], x.new_zeros(())
        if self.local_heads:
            q, k, v = (self._heads(part) for part in self.local_to_qkv(x).chunk(3, dim=-1))
            outs.append(self._local(q, k, v, mask))
        if self.global_attn is not None:
            q, v = self._heads(self.to_q(x)), self._heads(self.to_v(x))
            k = q if self.to_k is None else self._heads(self.to_k(x))
            out, loss = self.global_attn(q, k, v, query_mask=mask)
            outs.append(out)
        return self.to_out(torch.cat(outs, dim=1).transpose(1, 2).flatten(2)), loss

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _local(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        near = local_mask(self.local_window, self.local_radius, self.causal, mask)
        return attention(q, k, v, mask=near, dropout=self.attn_drop if self.training else 0.0)

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same names; what the package `local-attention` keeps (positions of the local heads) is left out."""
        return {name: value for name, value in state.items() if not name.startswith("local_attn.")}
