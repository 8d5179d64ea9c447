"""Routing attention, Roy et al., "Efficient Content-Based Sparse Attention with Routing Transformers" (2020, TACL 2021, arXiv 2003.05997).

Code read for numbers: google-research/google-research @ 0c1bbe5, `routing_transformer/utils.py` (Apache-2.0, TensorFlow 1), run from the
copy in martiansideofthemoon/hurdles-longform-qa @ 805baf7. The community's PyTorch layer, which computes something else, is
`nn/sequence/kmeans_attention.py`.

What differs: sequences only (the code also takes images in blocks), self-attention only, no `token_bias`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..._checks import bad_type, require, require_int, require_name, require_shape, require_tensor
from ...ops.attention import attention
from ...ops.groups import gather_groups, group_attention, scatter_groups
from ...ops.kmeans import balanced_clusters
from ..layers import rename_keys
from .local_blocks import local_groups, local_mask, strided_groups
from .online_kmeans import OnlineKMeans
from .relative_positions import RelativePositions
from .routing_names import OFFICIAL_NAMES

KINDS = ("cluster", "cluster_strided", "strided", "local")


class RoutingState(NamedTuple):
    """The past of a `RoutingAttention` in decoding: queries, keys and values (B, H, n, d) of all heads."""

    q: Tensor
    k: Tensor
    v: Tensor


class RoutingAttention(nn.Module):
    """Self-attention whose heads look at tokens of the same cluster, at tokens nearby, or at every so-many-th token.

    A routing ("cluster") head normalises queries and keys (LayerNorm without scale and bias, so there is no 1 / sqrt(d) any more),
    and each of its `num_clusters` centroids takes the `window` tokens nearest to it; tokens attend within their cluster, and a token
    in several clusters gets the mean. The centroids follow the data by moving averages while training. Which tokens share a cluster
    depends on the whole sequence, also in a causal layer: the attention itself never looks ahead, but routing does (use `step` to
    decode; it routes over the past alone).

    Args:
        dim: channels in and out. num_heads: all heads; those not named below are routing heads.
        local_heads: heads that see their own block of `block` tokens and `flange` tokens before it (not causal: also after).
        strided_heads: heads that see every `block`-th token. cluster_strided_heads: like routing heads, but a centroid takes tokens
            spread evenly over its order of affinity.
        num_clusters: centroids a head. window: tokens a cluster, about N / num_clusters.
        block, flange: of the local heads; `flange` a multiple of `block` (default `block`).
        causal: whether a token sees later ones. share_qk: routing heads use their queries as keys (default: `causal`).
        key_dim, value_dim: channels of all keys and values together, default `dim`.
        relative: kinds of head ("cluster", "cluster_strided", "strided", "local") with learned relative positions of at most
            `max_relative`, between ranks in a cluster.
        attn_drop: dropout of attention weights.
        commitment: weight of the clustering loss. decay: of the moving averages. ema: False trains the centroids by gradient.
        routing: "kmeans" or "hash": sign patterns of fixed random projections in place of centroids (num_clusters a power of two).
        variant: "released" (default): as the authors' code. There the sequence is padded to whole blocks with zero tokens that take
            part in routing; results are divided by the number of clusters + 0.01; one matrix mixes the channels of each head's
            output; the loss of shared queries and keys counts twice; the counts of the moving averages mix up the heads; and a
            causal mask compares ranks in the cluster, which with `share_qk=False` lets tokens see later ones (a warning says so).
            "paper": padding is left out, plain means, no such matrix, each token once, a mask by true positions.

    Shapes: `forward(x (B, N, dim), mask=None) -> (y (B, N, dim), loss)`; mask bool (B, N), True for real tokens; `loss` a scalar to be
    added to the task's loss. `step(x (B, 1, dim), state=None) -> (y, state)` decodes.

    Raises:
        ValueError, TypeError: counts that do not fit, wrong shapes.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        local_heads: int | None = None,
        strided_heads: int = 0,
        cluster_strided_heads: int = 0,
        num_clusters: int = 8,
        window: int = 64,
        block: int = 64,
        flange: int | None = None,
        causal: bool = True,
        share_qk: bool | None = None,
        key_dim: int | None = None,
        value_dim: int | None = None,
        relative: Sequence[str] = (),
        max_relative: int = 64,
        attn_drop: float = 0.0,
        commitment: float = 1e-4,
        decay: float = 0.99,
        ema: bool = True,
        routing: str = "kmeans",
        variant: str = "released",
    ) -> None:
        super().__init__()
        local_heads = num_heads // 2 if local_heads is None else local_heads
        flange = block if flange is None else flange
        for name, value, least in (
            ("dim", dim, 1),
            ("num_heads", num_heads, 1),
            ("local_heads", local_heads, 0),
            ("strided_heads", strided_heads, 0),
            ("cluster_strided_heads", cluster_strided_heads, 0),
            ("num_clusters", num_clusters, 1),
            ("window", window, 1),
            ("block", block, 1),
            ("flange", flange, 0),
            ("max_relative", max_relative, 1),
        ):
            require_int(name, value, least)
        require(flange % block == 0, "flange", flange, f"a multiple of block, {block}")
        require_name("routing", routing, ("kmeans", "hash"))
        require_name("variant", variant, ("released", "paper"))
        for kind in relative:
            require_name("relative", kind, KINDS)
        others = local_heads + strided_heads + cluster_strided_heads
        require(others <= num_heads, "num_heads", num_heads, f"at least the {others} heads of other kinds")
        counts = (num_heads - others, cluster_strided_heads, strided_heads, local_heads)
        require(
            cluster_strided_heads <= counts[0],
            "cluster_strided_heads",
            cluster_strided_heads,
            f"at most the routing heads, {counts[0]}",
        )
        sizes = {"key_dim": dim if key_dim is None else key_dim, "value_dim": dim if value_dim is None else value_dim}
        for name, size in sizes.items():
            require_int(name, size, 1)
            require(size % num_heads == 0, name, size, f"a multiple of num_heads, {num_heads}")
        self.dim, self.num_heads, self.counts = dim, num_heads, dict(zip(KINDS, counts))
        self.num_clusters, self.window, self.block, self.flange = num_clusters, window, block, flange
        self.causal, self.share_qk = bool(causal), bool(causal if share_qk is None else share_qk)
        self.attn_drop, self.commitment = float(attn_drop), float(commitment)
        self.routing, self.variant = routing, variant
        if variant == "released" and self.causal and not self.share_qk and counts[0]:
            warnings.warn(
                "RoutingAttention: causal with share_qk=False, as released, compares ranks and lets tokens see later ones; "
                'variant="paper" masks by true positions',
                stacklevel=2,
            )
        key, value = sizes["key_dim"] // num_heads, sizes["value_dim"] // num_heads
        self.to_q = nn.Linear(dim, sizes["key_dim"], bias=False)
        self.to_k = nn.Linear(dim, sizes["key_dim"], bias=False)
        self.to_v = nn.Linear(dim, sizes["value_dim"], bias=False)
        self.mix = nn.Linear(value, value, bias=False) if variant == "released" else nn.Identity()
        self.proj = nn.Linear(sizes["value_dim"], dim, bias=False)
        self.clusters = nn.ModuleDict()
        self.projections = nn.ParameterDict()
        for kind in KINDS[:2]:
            heads = self.counts[kind]
            if heads and (routing == "kmeans" or kind == "cluster_strided"):
                own_decay = decay if kind == "cluster" else 0.99  # nobody hands it on to the strided ones
                self.clusters[kind] = OnlineKMeans(heads, num_clusters, key, decay=own_decay, ema=ema)
            elif heads:
                bits = num_clusters.bit_length() - 1
                require(2**bits == num_clusters, "num_clusters", num_clusters, "a power of two for hashing")
                planes = torch.randn(heads, bits, key)
                self.projections[kind] = nn.Parameter(planes, requires_grad=False)
        self.relative = nn.ModuleDict(
            {
                kind: RelativePositions(max_relative, key, value)
                for kind in KINDS
                if kind in relative and self.counts[kind]
            }
        )

    # The layer

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        require_tensor("x", x, dims=3, floating=True)
        require(x.shape[2] == self.dim, "x", f"shape {tuple(x.shape)}", f"(B, N, {self.dim})")
        batch, length, _ = x.shape
        if mask is not None:
            fits = isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == (batch, length)
            got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else mask
            require(fits, "mask", got, f"bool ({batch}, {length}), True for real tokens")
            x = x.masked_fill(~mask[..., None], 0.0)
        if length == 0:
            return x, x.new_zeros(())
        q, k, v = self._qkv(x)
        real = torch.ones(batch, length, dtype=torch.bool, device=x.device) if mask is None else mask
        rest = -length % self.block if self.variant == "released" else 0
        if rest:
            q, k, v = (F.pad(t, (0, 0, 0, rest)) for t in (q, k, v))
            real = F.pad(real, (0, rest))
        outs, losses = [], [x.new_zeros(())]
        for kind, (q_part, k_part, v_part) in self._by_kind(q, k, v):
            if kind in KINDS[:2]:
                out, loss = self._routed(kind, q_part, k_part, v_part, real)
                losses.append(loss)
            else:
                out = getattr(self, f"_{kind}")(q_part, k_part, v_part, real)
            outs.append(out)
        return self._out(torch.cat(outs, dim=1)[:, :, :length]), torch.stack(losses).sum()

    @torch.no_grad()
    def step(self, x: Tensor, state: RoutingState | None = None) -> tuple[Tensor, RoutingState]:
        """Decode one token: what `forward` over all tokens so far gives for the last one, routing over these tokens alone.

        (As released, `forward` also pads to whole blocks; the two agree where the length is a multiple of `block`, in eval mode.)

        Args:
            x: (B, 1, dim). state: of the step before; None at the start.
        """
        require_tensor("x", x, dims=3, floating=True)
        require(x.shape[1:] == (1, self.dim), "x", f"shape {tuple(x.shape)}", f"(B, 1, {self.dim})")
        require(self.causal, "causal", False, "True to decode")
        new = self._qkv(x)
        if state is not None:
            if not isinstance(state, RoutingState):
                raise bad_type("state", state, "a RoutingState")
            for name, old, fresh in zip(RoutingState._fields, state, new):
                require_shape(f"state.{name}", old, (*fresh.shape[:2], None, fresh.shape[3]))
            new = tuple(torch.cat([old, fresh], dim=2) for old, fresh in zip(state, new))  # type: ignore[assignment]
        state = RoutingState(*new)
        outs = []
        for kind, (q, k, v) in self._by_kind(*state):
            step = self._routed_last if kind in KINDS[:2] else self._fixed_last
            outs.append(step(kind, q, k, v))
        return self._out(torch.cat(outs, dim=1)), state

    def _qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (
            to(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for to in (self.to_q, self.to_k, self.to_v)
        )
        return q * q.shape[-1] ** -0.5, k, v

    def _by_kind(self, *tensors: Tensor):
        counts = [self.counts[kind] for kind in KINDS]
        parts = zip(*(t.split(counts, dim=1) for t in tensors))
        return [(kind, part) for kind, part in zip(KINDS, parts) if self.counts[kind]]

    def _out(self, heads: Tensor) -> Tensor:
        return self.proj(self.mix(heads).transpose(1, 2).flatten(2))

    @property
    def _dropout(self) -> float:
        return self.attn_drop if self.training else 0.0

    # Heads that route

    def _normed(self, kind: str, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, bool]:
        """Normalised queries and keys, and whether they are the same."""
        shared = self.share_qk and kind == "cluster"
        q = F.layer_norm(q, q.shape[-1:], eps=1e-6)
        return q, q if shared else F.layer_norm(k, k.shape[-1:], eps=1e-6), shared

    def _affinity(self, kind: str, x: Tensor) -> Tensor:
        if kind in self.clusters:
            clusters = self.clusters[kind]
            assert isinstance(clusters, OnlineKMeans)
            return clusters.affinity(x)
        planes = self.projections[kind].to(x.dtype)
        above = torch.einsum("bhnd,hpd->bhnp", x.detach(), planes) > 0
        bucket = (above.long() << torch.arange(planes.shape[1], device=x.device)).sum(-1)
        return F.one_hot(bucket, self.num_clusters).to(x.dtype)

    def _lists(self, kind: str, affinity: Tensor, real: Tensor | None) -> Tensor:
        return balanced_clusters(affinity, self.window, keep=real, strided=kind == "cluster_strided")

    def _routed(self, kind: str, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        q, k, shared = self._normed(kind, q, k)
        paper = self.variant == "paper"
        q_affinity = self._affinity(kind, q)
        k_affinity = q_affinity if shared else self._affinity(kind, k)
        q_index = self._lists(kind, q_affinity, real if paper else None)
        k_index = q_index if shared else self._lists(kind, k_affinity, real if paper else None)
        out = self._within(kind, q, k, v, q_index, k_index, real)
        out = scatter_groups(out, q_index, q.shape[2], eps=0.0 if paper else 1e-2)
        return out, self._cluster_loss(kind, q, k, shared, real, q_affinity, k_affinity)

    def _within(
        self, kind: str, q: Tensor, k: Tensor, v: Tensor, q_index: Tensor, k_index: Tensor, real: Tensor
    ) -> Tensor:
        """Attention inside clusters, (B, H, C, w, d)."""
        keys = real[:, None, None].expand(*k_index.shape[:3], -1).gather(3, k_index.clamp(min=0)) & (k_index >= 0)
        keep = keys[..., None, :]
        rank = torch.arange(q_index.shape[3], device=q.device)
        distance = rank - rank[:, None]
        if self.causal and self.variant == "paper":
            keep = keep & (k_index[..., None, :] <= q_index[..., :, None])
        elif self.causal:
            keep = keep & (distance <= 0)
        own = gather_groups(q, q_index), gather_groups(k, k_index), gather_groups(v, k_index)
        if kind in self.relative:
            return self.relative[kind](*own, keep, distance, self._dropout)
        return group_attention(*own, mask=keep, scale=1.0, dropout=self._dropout)

    def _cluster_loss(
        self, kind: str, q: Tensor, k: Tensor, shared: bool, real: Tensor, q_affinity: Tensor, k_affinity: Tensor
    ) -> Tensor:
        """The clustering loss; in training also a step of the centroids."""
        if kind not in self.clusters:
            return q.new_zeros(())
        clusters = self.clusters[kind]
        assert isinstance(clusters, OnlineKMeans)
        commitment = self.commitment if kind == "cluster" else 1e-4
        paper = self.variant == "paper"
        items, nearest = (
            [q] if shared else [q, k],
            [a.argmax(-1) for a in ((q_affinity,) if shared else (q_affinity, k_affinity))],
        )
        # a token is real to the centroids unless its vector is zero, which is how the authors' code knows padding
        counted = [real[:, None].expand(x.shape[:3]) & (x.detach() != 0).any(-1) for x in items]
        loss = q.new_zeros(())
        for x, near, keep in zip(items, nearest, counted):
            loss = loss + clusters.loss(x, near, commitment, keep if paper else None)
        if shared and not paper:
            loss = 2 * loss
        if self.training and clusters.ema:
            clusters.update(list(zip(items, counted)), nearest, together=paper, mixed_counts=not paper)
        return loss

    def _routed_last(self, kind: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, shared = self._normed(kind, q, k)
        length = q.shape[2]
        q_index = self._lists(kind, self._affinity(kind, q), None)
        k_index = q_index if shared else self._lists(kind, self._affinity(kind, k), None)
        member = q_index[..., -1:] == length - 1  # lists are ascending: the last token stands last
        own = gather_groups(k, k_index), gather_groups(v, k_index)
        query = q[:, :, None, -1:].expand(-1, -1, self.num_clusters, -1, -1)
        if kind in self.relative:
            rank = torch.arange(k_index.shape[3], device=q.device)[None] - q_index.shape[3] + 1
            out = self.relative[kind](query, *own, torch.ones_like(rank, dtype=torch.bool), rank, 0.0)
        else:
            out = group_attention(query, *own, scale=1.0)
        count = member.sum(2)[..., None]
        eps = 0.0 if self.variant == "paper" else 1e-2
        return (out * member[..., None]).sum(2) / (count + eps).clamp(min=eps or 1.0)

    # Heads with a fixed pattern

    def _local(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        if "local" not in self.relative:
            near = local_mask(self.block, self.flange // self.block, self.causal, real)
            return attention(q, k, v, mask=near, scale=1.0, dropout=self._dropout)
        rows, columns, distance = local_groups(q.shape[2], self.block, self.flange, self.causal, device=q.device)
        # as released, positions of queries are counted from the END of what they see; with tokens after them that is off by the flange
        shift = 0 if self.causal or self.variant == "paper" else self.flange
        out = self._grouped("local", q, k, v, rows, columns, distance, real, shift)
        return out.flatten(2, 3)[:, :, : q.shape[2]]

    def _strided(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        index, distance = strided_groups(q.shape[2], self.block, device=q.device)
        seen = real if self.variant == "paper" else torch.ones_like(real)
        out = self._grouped("strided", q, k, v, index, index, distance, seen)
        return scatter_groups(out, index.expand(*q.shape[:2], -1, -1), q.shape[2], reduce="sum")

    def _grouped(
        self,
        kind: str,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rows: Tensor,
        columns: Tensor,
        distance: Tensor,
        real: Tensor,
        shift: int = 0,
    ) -> Tensor:
        """Attention of groups that are the same for all samples and heads: rows (G, n) on columns (G, m)."""
        q_index, k_index = (x.expand(*q.shape[:2], -1, -1) for x in (rows, columns))
        keep = (k_index >= 0) & real[:, None, None].expand(*k_index.shape[:3], -1).gather(3, k_index.clamp(min=0))
        keep = keep[..., None, :] & (distance <= 0) if self.causal else keep[..., None, :]
        own = gather_groups(q, q_index), gather_groups(k, k_index), gather_groups(v, k_index)
        if kind in self.relative:
            return self.relative[kind](*own, keep, distance - shift, self._dropout)
        return group_attention(*own, mask=keep, scale=1.0, dropout=self._dropout)

    def _fixed_last(self, kind: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.shape[2]
        last = length - 1
        if kind == "local":
            first = max(0, last // self.block * self.block - self.flange)
            keys, distance = slice(first, length), torch.arange(first - last, 1, device=q.device)[None]
        else:
            keys = slice(last % self.block, length, self.block)
            distance = torch.arange(-(last // self.block), 1, device=q.device)[None]
        q, k, v = q[:, :, -1:], k[:, :, keys], v[:, :, keys]
        if kind in self.relative:
            return self.relative[kind](q, k, v, torch.ones_like(distance, dtype=torch.bool), distance, 0.0)
        return attention(q, k, v, scale=1.0)

    # The authors' names

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """TensorFlow variables of `multihead_attention_nd`, under any scope, to ours; kernels are transposed."""
        kernels = {name: name.endswith("/kernel") for name in state}
        renamed = rename_keys(
            {name: value.T if kernels[name] else value for name, value in state.items()}, *OFFICIAL_NAMES
        )
        require(len(renamed) == len(state), "state", f"{len(state)} variables", "the variables of one layer")
        return renamed
