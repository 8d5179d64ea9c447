"""Grouped-query attention in which groups may be of different sizes, set by the norms of the keys; and its perturbed form.

Beyond Uniform Query Distribution: Key-Driven Grouped Query Attention (Khan et al., 2024, arXiv 2408.08454). Code read for numbers:
zohaib-khan5040/key-driven-gqa @ 8fee9d6 (MIT), `modules/attention/{gqa,kdgqa,dgqa,pgqa}.py`.

What differs: where the authors divide zero by zero and never return (one group, equal norms, "diff" on the same batch twice), heads are
shared evenly; the step that their training loop sets is counted by the layer; an allocation can be frozen for inference, where theirs
depends on the other samples of the batch and on the calls before. Their paper speaks of Gaussian noise on attention maps, their code
puts uniform noise on outputs: both are here. No cache: these are layers of vision transformers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..._checks import require, require_int, require_name, require_tensor
from ...ops.attention import attention
from ...ops.query_allocation import allocate_queries, key_norms, kv_head_of
from .pre_norm import require_rate

__all__ = ["GroupedQueryAttention", "convert_to_grouped", "pool_heads"]

ALLOCATIONS = ("uniform", "key_norm", "key_norm_ema", "key_norm_diff")
NOISES = ("none", "output_uniform", "map_gaussian")


class GroupedQueryAttention(nn.Module):
    """(B, N, dim) -> the same: every token attends to every token; query heads share the keys and values of their group.

    Args:
        dim, num_heads: channels and query heads. num_kv_heads: groups, default num_heads // 2.
        allocation: how many query heads, in order, each group has:
            "uniform": equally many (num_heads must be a multiple of num_kv_heads);
            "key_norm" (KDGQA): in proportion to the norms of the keys less the smallest of them, found anew at each call;
            "key_norm_ema" (DGQA): to 0.9 norms + 0.1 cache; "key_norm_diff" (DGQA): to |cache - norms|. In training a new allocation is
                made at steps 0, `every`, 2 `every`, ... and the cache becomes (cache + norms) / `every`; in evaluation at each call, the
                cache becoming the norms. Rounding is made good at random (torch's global generator, as released);
            a list of whole numbers that sum to num_heads: fixed.
        every: steps of training between allocations of DGQA (1 in the authors' class, 300 in their configuration). `step` counts
            training calls; set it to 0 where an epoch begins to do as their loop does.
        noise: PGQA: "output_uniform" (released) subtracts from each head's output uniform noise with a zeroed diagonal, of the output's
            own mean and deviation, in evaluation too; "map_gaussian" (the paper's words) subtracts Gaussian noise of a map's own mean
            and deviation a row from the attention map, its diagonal left alone. Needs the N x N maps then. Default "none".
        qkv_bias; attn_drop, proj_drop: dropout of weights and output, in [0, 1).

    Allocations by norms look at the whole batch, so the output of a sample depends on the others: `freeze()` fixes the last one.
    `allocation` (a list of ints) tells what the last call used.
    """

    cache: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        allocation: str | Sequence[int] = "uniform",
        *,
        every: int = 1,
        noise: str = "none",
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads = require_int("dim", dim, 1), require_int("num_heads", num_heads, 1)
        require(dim % num_heads == 0, "dim", dim, f"a multiple of num_heads ({num_heads})")
        groups = max(1, num_heads // 2) if num_kv_heads is None else require_int("num_kv_heads", num_kv_heads, 1)
        require(groups <= num_heads, "num_kv_heads", groups, f"at most num_heads ({num_heads})")
        self.num_kv_heads, self.every = groups, require_int("every", every, 1)
        self.noise = require_name("noise", noise, NOISES)
        self.rule = require_name("allocation", allocation, ALLOCATIONS) if isinstance(allocation, str) else "fixed"
        if self.rule == "uniform":
            require(num_heads % groups == 0, "num_kv_heads", groups, f"a divisor of num_heads ({num_heads})")
        if not isinstance(allocation, str):
            kv_head_of(allocation, num_heads)
            require(len(allocation) == groups, "allocation", list(allocation), f"{groups} numbers, one a group")
            self.allocation = list(allocation)
        else:
            self.allocation = allocate_queries(torch.ones(groups), num_heads)
        self.step = 0
        head_dim = dim // num_heads
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.k, self.v = (nn.Linear(dim, groups * head_dim, bias=qkv_bias) for _ in range(2))
        self.proj, self.proj_drop = nn.Linear(dim, dim), nn.Dropout(require_rate("proj_drop", proj_drop))
        self.attn_drop = require_rate("attn_drop", attn_drop)
        if self.rule in ("key_norm_ema", "key_norm_diff"):
            self.register_buffer("cache", torch.zeros(groups))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """attn_mask: broadcastable to (B, num_heads, N, N); bool, True where a token may be seen, or numbers added to the scores.
        is_causal: no token sees later ones. Both as timm's blocks pass them; norms of keys are of all tokens, masked or not.
        """
        require_tensor("x", x, dims=3, floating=True)
        require(x.shape[2] == self.dim, "x", f"shape {tuple(x.shape)}", f"(B, N, {self.dim})")
        q, k, v = (
            projected.unflatten(-1, (heads, -1)).transpose(1, 2)
            for projected, heads in (
                (self.q(x), self.num_heads),
                (self.k(x), self.num_kv_heads),
                (self.v(x), self.num_kv_heads),
            )
        )
        self._allocate(k)
        dropout = self.attn_drop if self.training else 0.0
        bias = attn_mask if attn_mask is not None and attn_mask.is_floating_point() else None
        mask = attn_mask if bias is None else None
        if is_causal:
            past = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
            mask = past if mask is None else mask & past
        equal = len(set(self.allocation)) == 1
        if not equal or self.noise == "map_gaussian":  # heads of one size are the op's own grouping
            index = kv_head_of(self.allocation, self.num_heads, x.device)
            k, v = k[:, index], v[:, index]
        if self.noise == "map_gaussian":
            scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
            for added in (bias, mask):
                if added is not None:
                    scores = scores + added if added.is_floating_point() else scores.masked_fill(~added, float("-inf"))
            out = nn.functional.dropout(_perturb_maps(scores.softmax(dim=-1)), dropout) @ v
        else:
            out = attention(q, k, v, mask=mask, bias=bias, dropout=dropout)
        if self.noise == "output_uniform":
            out = torch.cat([_perturb(part) for part in out.split(self.allocation, dim=1)], dim=1)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))

    def freeze(self, allocation: Sequence[int] | None = None) -> GroupedQueryAttention:
        """From now on the allocation is this one (default: that of the last call), whatever the keys are; returns self."""
        if allocation is not None:
            kv_head_of(allocation, self.num_heads)
            require(
                len(allocation) == self.num_kv_heads, "allocation", list(allocation), f"{self.num_kv_heads} numbers"
            )
            self.allocation = list(allocation)
        self.rule = "fixed"
        return self

    @torch.no_grad()
    def _allocate(self, k: Tensor) -> None:
        if self.rule in ("uniform", "fixed"):
            return
        if self.rule == "key_norm":
            norms = key_norms(k)
            self.allocation = allocate_queries(norms - norms.min(), self.num_heads)
            return
        step, self.step = self.step, self.step + self.training
        if self.training and step % self.every:
            return
        norms, cache = key_norms(k), self.cache.to(k.device)
        wanted = 0.9 * norms + 0.1 * cache if self.rule == "key_norm_ema" else (cache - norms).abs()
        self.allocation = allocate_queries(wanted, self.num_heads, fix="random")
        self.cache = ((cache + norms) / self.every if self.training else norms).to(self.cache.dtype)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, allocation={self.rule!r}, noise={self.noise!r}"


def _perturb(out: Tensor) -> Tensor:
    """Less uniform noise (one draw for the batch) that has each head's own mean and deviation; out (B, h, N, D) of one group."""
    if out.shape[1] == 0 or out.shape[2] * out.shape[3] < 2:
        return out
    flat = out.flatten(2)
    noise = torch.rand(flat.shape[1:], device=out.device, dtype=torch.float32).to(out.dtype)
    noise = noise.masked_fill(torch.eye(*noise.shape, dtype=torch.bool, device=out.device), 0)
    spread = noise.std(dim=-1, keepdim=True)
    noise = (noise - noise.mean(dim=-1, keepdim=True)) / torch.where(spread == 0, 1.0, spread)
    return (flat - (noise * flat.std(dim=-1, keepdim=True) + flat.mean(dim=-1, keepdim=True))).view_as(out)


def _perturb_maps(weights: Tensor) -> Tensor:
    """Less Gaussian noise of each row's mean and deviation, the diagonal left as it is; weights (B, H, N, N)."""
    if weights.shape[-1] < 2:
        return weights
    noise = torch.randn_like(weights) * weights.std(dim=-1, keepdim=True) + weights.mean(dim=-1, keepdim=True)
    return weights - noise.masked_fill(torch.eye(weights.shape[-1], dtype=torch.bool, device=weights.device), 0)


def pool_heads(weight: Tensor, num_heads: int, num_kv_heads: int) -> Tensor:
    """Mean of the heads of each group: a projection's weight (num_heads * D, dim) or bias (num_heads * D,) -> (num_kv_heads * D, ...)."""
    require_tensor("weight", weight, floating=True)
    divides = num_heads % require_int("num_kv_heads", num_kv_heads, 1) == 0
    require(divides, "num_kv_heads", num_kv_heads, f"a divisor of num_heads ({num_heads})")
    require(weight.shape[0] % num_heads == 0, "weight", f"shape {tuple(weight.shape)}", f"{num_heads} heads of rows")
    return weight.unflatten(0, (num_kv_heads, num_heads // num_kv_heads, -1)).mean(dim=1).flatten(0, 1)


def convert_to_grouped(
    model: nn.Module, num_kv_heads: int, allocation: str | Sequence[int] = "uniform", **options: object
) -> list[str]:
    """Replace, in place, every timm-style attention (fused `qkv`, `proj`, `num_heads`) of a vision transformer; names of those replaced.

    Keys and values of the heads of a group are averaged; everything else stays. The result wants some training ("uptraining").

    Args:
        num_kv_heads: groups, a divisor of each attention's heads. allocation, options: as `GroupedQueryAttention`.

    Raises:
        ValueError: nothing in the model is such an attention, or one of them normalises its queries and keys.
    """
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "qkv", None), nn.Linear)
        and isinstance(getattr(module, "proj", None), nn.Linear)
        and isinstance(getattr(module, "num_heads", None), int)
        and name
    ]
    require(bool(found), "model", type(model).__name__, "one with attentions that have qkv, proj and num_heads")
    made = []
    for name, module in found:
        for norm in ("q_norm", "k_norm", "norm"):
            plain = isinstance(getattr(module, norm, None), (nn.Identity, type(None)))
            require(
                plain, f"{name}.{norm}", type(getattr(module, norm, None)).__name__, "an attention without norms inside"
            )
        qkv, heads = module.qkv, module.num_heads
        dim = qkv.in_features
        require(qkv.out_features == 3 * dim, f"{name}.qkv", qkv.out_features, f"3 * dim ({3 * dim}) rows")
        layer = GroupedQueryAttention(
            dim,
            heads,
            num_kv_heads,
            allocation,
            qkv_bias=qkv.bias is not None,
            attn_drop=_rate(module, "attn_drop"),
            proj_drop=_rate(module, "proj_drop"),
            **options,  # type: ignore[arg-type]
        ).to(device=qkv.weight.device, dtype=qkv.weight.dtype)
        state = {f"proj.{kind}": value for kind, value in module.proj.state_dict().items()}
        for kind, value in qkv.state_dict().items():
            q, k, v = value.chunk(3)
            pooled = (pool_heads(part, heads, num_kv_heads) for part in (k, v))
            state |= dict(zip((f"q.{kind}", f"k.{kind}", f"v.{kind}"), (q, *pooled)))
        layer.load_state_dict(state, strict=False)
        made.append((name, layer.train(module.training)))
    for name, layer in made:  # only once every one of them is known to fit
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer)
    return [name for name, _ in made]


def _rate(module: nn.Module, name: str) -> float:
    drop = getattr(module, name, 0.0)
    return float(drop.p) if isinstance(drop, nn.Dropout) else 0.0
