"""The gates of SeerAttention: small networks that predict which blocks of the attention map matter.

Gao et al., "SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs" (2024, arXiv 2410.13276); the decoding gate is that of
Gao et al., "SeerAttention-R: Sparse Attention Adaptation for Long Reasoning" (2025, arXiv 2506.08889). Code read for numbers (MIT):
microsoft/SeerAttention @ aba03e3, `seer_attn/prefill_sparse/attn_gate.py`, `seer_attn/decode_sparse/attn_gate_{inf,training}.py`.

Gates see queries and keys BEFORE rotary embedding and turn what they make of them with angles of their own, `rotary = (cos, sin)`
as the ecosystem has them: (B|1, blocks or rows, R), R <= gate_dim, the second half repeating the first (NeoX order).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor, nn

from ..._checks import bad_value, require, require_int, require_name, require_tensor
from ...ops.select.summaries import block_summary
from ..layers import rename_keys
from .rotary import rotate

POOLS = {"max": "max", "min": "min", "avg": "mean"}
GATE_TYPES = {
    f"Q{''.join(q)}_K{''.join(k)}": (q, k)
    for n in (1, 2, 3)
    for m in (1, 2, 3)
    for q in combinations(POOLS, n)
    for k in combinations(POOLS, m)
}
"""The authors' names of gate types: how queries and how keys are pooled, "Qavg_Kmaxminavg" for one."""
HEAD_POOLS = {"Qproj", "Qavgproj", "Qavg", "Qorig"}
Rotary = tuple[Tensor, Tensor]


def turned(x: Tensor, rotary: Rotary | None) -> Tensor:
    """x (B, H, n, D) turned by (cos, sin), each (B|1, n, R); channels from R on stay. None: x."""
    return x if rotary is None else rotate(x, (rotary[0][:, None], rotary[1][:, None]))


def pool(x: Tensor, block: int, pools: Sequence[str]) -> Tensor:
    """(..., N, D) -> (..., ceil(N / block), len(pools) * D), in x's dtype; the last block is pooled over the tokens it has."""
    return torch.cat([block_summary(x, block, POOLS[name]) for name in pools], dim=-1).to(x.dtype)


class HeadLinear(nn.Module):
    """A linear layer for each head, without bias: (B, num_heads, n, in) -> (B, num_heads, n, out); weight (num_heads, in, out).

    Fewer heads than `num_heads` are repeated, each for its group.
    """

    def __init__(self, num_heads: int, in_features: int, out_features: int, std: float | None = 0.02) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.weight = nn.Parameter(torch.empty(num_heads, in_features, out_features))
        if std is None:
            nn.init.xavier_uniform_(self.weight)
        else:
            nn.init.normal_(self.weight, std=std)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] < self.num_heads:
            x = x.repeat_interleave(self.num_heads // x.shape[1], dim=1)
        return torch.matmul(x, self.weight)

    def extra_repr(self) -> str:
        return f"num_heads={self.weight.shape[0]}, {self.weight.shape[-2]} -> {self.weight.shape[-1]}"


def _check_heads(num_heads: int, num_kv_heads: int) -> None:
    require_int("num_heads", num_heads, 1)
    require_int("num_kv_heads", num_kv_heads, 1)
    require(num_heads % num_kv_heads == 0, "num_kv_heads", num_kv_heads, f"a divisor of num_heads = {num_heads}")


def _check_pools(name: str, pools: Sequence[str]) -> tuple[str, ...]:
    if isinstance(pools, str) or not pools:
        raise bad_value(name, pools, f"one or more of {', '.join(POOLS)}")
    return tuple(require_name(name, one, POOLS) for one in pools)


class AttentionGate(nn.Module):
    """SeerAttention's gate for prompts: scores every block of queries against every block of keys.

    Queries and keys are pooled over `block_size` tokens, projected head by head, turned, and multiplied.

    Args:
        num_heads, num_kv_heads, head_dim: of the attention layer.
        gate_dim: width of the gate. block_size: tokens a block.
        q_pool, k_pool: poolings whose results stand side by side, of "max", "min", "avg".
        force_double: project queries too. They are anyway with several q pools or gate_dim != head_dim; then the keys' projection
            has one weight a kv head, else one a query head.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        gate_dim: int = 128,
        block_size: int = 64,
        q_pool: Sequence[str] = ("avg",),
        k_pool: Sequence[str] = ("max", "min", "avg"),
        force_double: bool = False,
    ) -> None:
        super().__init__()
        _check_heads(num_heads, num_kv_heads)
        for name, value in (("head_dim", head_dim), ("gate_dim", gate_dim), ("block_size", block_size)):
            require_int(name, value, 1)
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.gate_dim, self.block_size = gate_dim, block_size
        self.q_pool, self.k_pool = _check_pools("q_pool", q_pool), _check_pools("k_pool", k_pool)
        double = len(self.q_pool) > 1 or gate_dim != head_dim or force_double
        self.linear_q = HeadLinear(num_heads, len(self.q_pool) * head_dim, gate_dim) if double else None
        self.linear_k = HeadLinear(num_kv_heads if double else num_heads, len(self.k_pool) * head_dim, gate_dim)

    @classmethod
    def of_type(cls, name: str, num_heads: int, num_kv_heads: int, head_dim: int, **options: object) -> AttentionGate:
        """By the authors' name, "Qavg_Kmaxminavg" for one (`GATE_TYPES`)."""
        q_pool, k_pool = GATE_TYPES[require_name("name", name, GATE_TYPES)]
        return cls(num_heads, num_kv_heads, head_dim, q_pool=q_pool, k_pool=k_pool, **options)  # type: ignore[arg-type]

    def queries(self, q: Tensor, rotary: Rotary | None = None) -> Tensor:
        """q (B, H, N, D) -> (B, H, ceil(N / block_size), gate_dim)."""
        pooled = pool(q, self.block_size, self.q_pool)
        return turned(pooled if self.linear_q is None else self.linear_q(pooled), rotary)

    def keys(self, k: Tensor, rotary: Rotary | None = None) -> Tensor:
        """k (B, Hkv, M, D) -> (B, H, ceil(M / block_size), gate_dim)."""
        found = turned(self.linear_k(pool(k, self.block_size, self.k_pool)), rotary)
        return found.repeat_interleave(self.num_heads // found.shape[1], dim=1)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        rotary: Rotary | tuple[Rotary, Rotary] | None = None,
        mask: Tensor | None = None,
        softmax: bool = False,
    ) -> Tensor:
        """Block scores, causal unless `mask` says otherwise.

        Args:
            q: (B, H, N, head_dim), k: (B, Hkv, M, head_dim), before rotary embedding.
            rotary: (cos, sin) at the first position of each block; a pair of such pairs: for queries, for keys. None: no turning.
            mask: over blocks, broadcastable to (B, H, nQ, nK): bool, True where a block may be seen (others get -1e9), or added.
                None: causal; the queries are the last ones, and M - N is a multiple of the block size.
            softmax: over the key blocks.
        Returns:
            (B, H, nQ, nK), logits or probabilities.
        """
        require_tensor("q", q, dims=4, floating=True)
        require_tensor("k", k, dims=4, floating=True)
        for name, x, heads in (("q", q, self.num_heads), ("k", k, self.num_kv_heads)):
            fits = x.shape[1] == heads and x.shape[3] == self.head_dim
            require(fits, name, f"shape {tuple(x.shape)}", f"(B, {heads}, N, {self.head_dim})")
        past = k.shape[2] - q.shape[2]
        aligned = past >= 0 and past % self.block_size == 0
        require(aligned or mask is not None, "k", f"{past} keys before the queries", "whole blocks of them, or a mask")
        for_q, for_k = rotary if rotary is not None and isinstance(rotary[0], tuple) else (rotary, rotary)
        logits = self.queries(q, for_q) @ self.keys(k, for_k).transpose(-1, -2) * self.gate_dim**-0.5  # type: ignore[arg-type]
        if mask is None:
            rows, columns = logits.shape[2:]
            allowed = torch.ones(rows, columns, dtype=torch.bool, device=q.device).tril_(columns - rows)
            logits = logits + torch.zeros_like(logits[:1, :1]).masked_fill_(~allowed, torch.finfo(logits.dtype).min)
        elif mask.dtype == torch.bool:
            logits = logits.masked_fill(~mask, -1e9)
        else:
            logits = logits + mask
        return logits.softmax(-1) if softmax else logits

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """`mask_linear_q`, `mask_linear_k` are our `linear_q`, `linear_k`."""
        return rename_keys(state, (r"^mask_linear_", "linear_"))

    def extra_repr(self) -> str:
        return f"block_size={self.block_size}, q_pool={self.q_pool}, k_pool={self.k_pool}"


class DecodeAttentionGate(nn.Module):
    """SeerAttention-R's gate for decoding: scores every block of keys for one token, once a kv head.

    Args:
        num_heads, num_kv_heads, head_dim: of the attention layer.
        gate_dim: width of the gate. block_size: keys a block. k_pool: as in `AttentionGate`.
        q_head_pool: how the query heads of a kv head become one gate query: "Qproj" (a linear layer of all of them together),
            "Qavgproj" (of their mean), "Qavg" (their mean), "Qorig" (each is scored, scores are averaged).
        qk_norm: RMSNorm on both sides, before turning.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        gate_dim: int = 128,
        block_size: int = 64,
        k_pool: Sequence[str] = ("max", "min", "avg"),
        q_head_pool: str = "Qproj",
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        _check_heads(num_heads, num_kv_heads)
        for name, value in (("head_dim", head_dim), ("gate_dim", gate_dim), ("block_size", block_size)):
            require_int(name, value, 1)
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.gate_dim, self.block_size, self.group = gate_dim, block_size, num_heads // num_kv_heads
        self.k_pool = _check_pools("k_pool", k_pool)
        self.q_head_pool = require_name("q_head_pool", q_head_pool, sorted(HEAD_POOLS))
        if q_head_pool in ("Qavg", "Qorig"):
            require(gate_dim == head_dim, "gate_dim", gate_dim, f"head_dim = {head_dim} with {q_head_pool}")
        self.linear_q: nn.Module | None = None
        if q_head_pool == "Qproj":
            self.linear_q = HeadLinear(num_kv_heads, self.group * head_dim, gate_dim, std=None)
        elif q_head_pool == "Qavgproj":
            self.linear_q = HeadLinear(num_kv_heads, head_dim, gate_dim, std=None)
        self.linear_k = HeadLinear(num_kv_heads, len(self.k_pool) * head_dim, gate_dim, std=None)
        self.norm_q = nn.RMSNorm(gate_dim, eps=1e-6) if qk_norm else None
        self.norm_k = nn.RMSNorm(gate_dim, eps=1e-6) if qk_norm else None

    def queries(self, q: Tensor, rotary: Rotary | None = None) -> Tensor:
        """q (B, H, N, D) -> (B, Hkv, N, gate_dim), with "Qorig" (B, H, N, gate_dim). rotary: (cos, sin) at the rows' positions."""
        if self.q_head_pool == "Qproj":
            q = q.unflatten(1, (self.num_kv_heads, self.group)).transpose(2, 3).flatten(-2)
        elif self.q_head_pool in ("Qavg", "Qavgproj"):
            q = q.unflatten(1, (self.num_kv_heads, self.group)).mean(2)
        q = q if self.linear_q is None else self.linear_q(q)
        return turned(q if self.norm_q is None else self.norm_q(q), rotary)

    def keys(self, k: Tensor, rotary: Rotary | None = None) -> Tensor:
        """k (B, Hkv, M, D) -> (B, Hkv, ceil(M / block_size), gate_dim). rotary: (cos, sin) at the first position of each block."""
        return self.project(pool(k, self.block_size, self.k_pool), rotary)

    def project(self, pooled: Tensor, rotary: Rotary | None = None) -> Tensor:
        """Pooled keys (B, Hkv, n, len(k_pool) * D) as gate keys (B, Hkv, n, gate_dim)."""
        found = self.linear_k(pooled)
        return turned(found if self.norm_k is None else self.norm_k(found), rotary)

    def scores(self, queries: Tensor, keys: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits (B, Hkv, N, blocks) from `queries(...)` and `keys(...)`; where a bool mask is False -1e20, a float one is added."""
        if self.q_head_pool == "Qorig":
            queries = queries.unflatten(1, (self.num_kv_heads, self.group)).mean(2)
        logits = queries @ keys.transpose(-1, -2) / math.sqrt(self.gate_dim)
        if mask is None:
            return logits
        return logits.masked_fill(~mask, -1e20) if mask.dtype == torch.bool else logits + mask

    def forward(
        self, q: Tensor, k: Tensor, rotary: tuple[Rotary, Rotary] | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """As in training: logits of every row for every block, (B, Hkv, N, ceil(M / block_size)).

        q, k: before rotary embedding, (B, H, N, D) and (B, Hkv, M, D). rotary: for the rows, for the blocks. mask: default causal,
        the queries being the last positions: blocks that begin after the row get -1e20.
        """
        for_q, for_k = (None, None) if rotary is None else rotary
        keys = self.keys(k, for_k)
        if mask is None:
            starts = torch.arange(keys.shape[2], device=k.device) * self.block_size
            mask = starts <= (torch.arange(q.shape[2], device=q.device) + k.shape[2] - q.shape[2])[:, None]
        return self.scores(self.queries(q, for_q), keys, mask)

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' `attngate_linear_q`, ...: the head-pooling weight (Hkv, group, D, G) is our (Hkv, group * D, G)."""
        renamed = rename_keys(state, (r"^attngate_linear_", "linear_"), (r"^attngate_([qk])norm\.", r"norm_\1."))
        weight = renamed.get("linear_q.weight")
        if weight is not None and weight.dim() == 4:
            renamed["linear_q.weight"] = weight.flatten(1, 2)
        return renamed
