"""HyperAttention, Han et al., "HyperAttention: Long-context Attention in Near-Linear Time" (2023, ICLR 2024, arXiv 2310.05869).
Code read for numbers: insuhan/hyper-attn @ 68b91e9 (Apache-2.0), `HyperAttention`.

Keys that matter to a query mostly point its way: queries and keys are sorted by a hash of their direction and attend within blocks of
that order; what lies outside the block is estimated from keys drawn at random. A causal mask is halved again and again: the two
triangles recurse, the square between them has no mask.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .._checks import bad_type, bad_value, require, require_int, require_name, require_tensor
from . import scores
from .attention import attention
from .groups import gather_groups, group_attention, select_rows
from .masks import causal as causal_mask
from .reference import accumulation_dtype, merge_lse
from .select.angular_lsh import angular_lsh, draw_projections

Parts = tuple[Tensor, Tensor]


def hyper_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    block_size: int = 256,
    samples: int | Sequence[Tensor] = 256,
    projections: int | Tensor = 7,
    min_len: int = 4096,
    scale: float | None = None,
    soft_cap: float | None = None,
    dropout: float = 0.0,
    variant: str = "paper",
    collision_mask: bool | None = None,
    generator: torch.Generator | None = None,
    share_draws: bool = False,
    return_lse: bool = False,
    backend: str = "auto",
) -> Any:
    """Approximate softmax attention in near-linear time: blocks of an LSH order exactly, the rest from sampled keys.

    Where queries are few, attention is exact: without a mask for fewer than `min_len` queries, with a causal mask up to `min_len` of
    them (so the recursion ends in exact triangles). Keys before the first query (M > N, causal) are attended without a mask.
    Differentiable in q, k and v; memory grows linearly with the lengths. With a causal mask no row reads a later key or value; but rows
    are sorted within their half of the recursion, so a later query can change which block an earlier one falls into.

    Args:
        q: (B, H, N, D). k: (B, Hkv, M, D). v: (B, Hkv, M, Dv). H is a multiple of Hkv.
        causal: queries are the last N positions of the keys and see none after their own; needs M >= N.
        block_size: keys a block; 0 leaves the blocks out.
        samples: keys drawn (with replacement) for each head and square; 0 leaves them out. Or the draws themselves: int64 (B, heads, m)
            for each square in the order of the computation (deepest level of the recursion first; level l has H * 2^l heads, head h
            before its halves), numbers of keys in sorted order.
        projections: random planes of the hash, at most 62; 0 keeps the order of the tokens. Or the directions, (D, r) or (1, 1, D, r).
        min_len: see above; at least 1.
        scale: factor on q k^T, default D ** -0.5. soft_cap: scores become cap * tanh(scores / cap). dropout: on the weights.
        variant: "paper" (default): sampled keys that lie in a query's own block do not count twice, the padding of the last block
            takes no part, and neighbouring buckets differ in one plane. "released": what the authors' float32 and flash-attn
            code computes, in which the mask for such keys is never applied, zero keys pad the last block, and buckets are numbered by
            the Gray code. Not the default, since the mask that the code prepares is a dead switch.
        collision_mask: leave sampled keys of the own block out (True), or count them (False). None: as `variant` has it. "released"
            with True is what the authors' half-precision kernel computes.
        generator: for the random draws, the planes first (default: torch's own). The draws follow the authors': with their planes
            and torch's seed set alike, the same keys are drawn.
        share_draws: draw once for all samples of the batch, so that a row does not depend on how many there are.
        return_lse: also return the log-sum-exps (B, H, N), estimates like the output. backend: as in `regard.ops.attention`.

    Returns:
        (B, H, N, Dv), and with `return_lse` the log-sum-exps. It is random: only rows that are treated exactly do not depend on the draw.

    Raises:
        ValueError, TypeError: shapes or options that do not fit, or both blocks and samples left out.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        require_tensor(name, x, dims=4, floating=True)
    require_int("block_size", block_size, 0)
    require_int("min_len", min_len, 1)
    require_name("variant", variant, ("paper", "released"))
    if collision_mask not in (None, True, False):
        raise bad_type("collision_mask", collision_mask, "True, False or None")
    draws = _draws(samples)
    if not causal and q.shape[2] >= min_len:
        require(block_size > 0 or draws.count != 0, "samples", 0, "at least 1 when block_size is 0")
    if causal:
        require(k.shape[2] >= q.shape[2], "k", f"{k.shape[2]} keys", f"at least q's {q.shape[2]} rows when causal")
    if isinstance(projections, Tensor):
        planes = projections
    else:
        require(require_int("projections", projections) <= 62, "projections", projections, "at most 62")
        planes = draw_projections(q.shape[3], projections, generator=generator, device=q.device)
    work = _Work(
        block_size=block_size,
        draws=draws,
        planes=planes.to(q.device),
        min_len=min_len,
        variant=variant,
        mask_collisions=variant == "paper" if collision_mask is None else collision_mask,
        generator=generator,
        share_draws=share_draws,
        options={
            "scale": scale,
            "score_mod": None if soft_cap is None else scores.soft_cap(soft_cap),
            "dropout": dropout,
            "backend": backend,
            "return_lse": True,
        },
    )
    if causal:
        past = k.shape[2] - q.shape[2]
        out, lse = work.causal(q, k[:, :, past:], v[:, :, past:])
        if past:
            out, lse = work.merge((out, lse), work.square(q, k[:, :, :past], v[:, :, :past]))
    else:
        out, lse = work.square(q, k, v)
    return (out, lse) if return_lse else out


@dataclass(frozen=True)
class _Draws:
    """How many keys a square draws, or what it draws."""

    count: int | None
    given: Iterator[Tensor] | None = None


def _draws(samples: int | Sequence[Tensor]) -> _Draws:
    if isinstance(samples, Sequence) and not isinstance(samples, str):
        return _Draws(None, iter([require_tensor("samples", each, dims=3) for each in samples]))
    if isinstance(samples, Tensor):
        raise bad_type("samples", samples, "an int or a list of index tensors")
    return _Draws(require_int("samples", samples))


@dataclass
class _Work:
    """One call. Halves of the causal recursion stand in the batch: row b * 2^level + half."""

    block_size: int
    draws: _Draws
    planes: Tensor
    min_len: int
    variant: str
    mask_collisions: bool
    generator: torch.Generator | None
    share_draws: bool
    options: dict[str, Any]

    def causal(self, q: Tensor, k: Tensor, v: Tensor, halves: int = 1) -> Parts:
        """Attention under the causal triangle, as many queries as keys; the batch holds `halves` stretches of each sequence."""
        length = q.shape[2]
        if length <= self.min_len:
            return attention(q, k, v, mask=causal_mask, **self.options)
        if length % 2:  # nobody but itself sees the token that is added
            q, k, v = (F.pad(x, (0, 0, 0, 1)) for x in (q, k, v))
        half = q.shape[2] // 2
        out, lse = self.causal(_halved(q), _halved(k), _halved(v), 2 * halves)
        out, lse = (x.unflatten(0, (-1, 2)).transpose(1, 2).flatten(2, 3) for x in (out, lse))
        below = self.square(q[:, :, half:], k[:, :, :half], v[:, :, :half], halves)
        low_out, low_lse = self.merge((out[:, :, half:], lse[:, :, half:]), below)
        out = torch.cat([out[:, :, :half], low_out], dim=2)[:, :, :length]
        return out, torch.cat([lse[:, :, :half], low_lse], dim=2)[:, :, :length]

    def merge(self, first: Parts, second: Parts) -> Parts:
        if self.variant == "paper":
            return merge_lse([first[0], second[0]], [first[1], second[1]])
        # as released, epsilon and all: where the second part outweighs the first by 1 / epsilon, the log-sum-exp is cut off
        share = torch.sigmoid(first[1] - second[1])
        weight = share[..., None].to(first[0].dtype)
        lse = first[1] - (share.to(first[0].dtype) + torch.finfo(first[1].dtype).eps).log()
        return weight * first[0] + (1 - weight) * second[0], lse

    def square(self, q: Tensor, k: Tensor, v: Tensor, halves: int = 1) -> Parts:
        """Attention without a mask."""
        rows, kv_len = q.shape[2], k.shape[2]
        if rows < self.min_len or kv_len == 0:
            return attention(q, k, v, **self.options)
        if self.block_size == 0:
            return self._sampled_only(q, k, v, halves)
        blocks = -(-kv_len // self.block_size)
        padded = -(-rows // self.block_size) * self.block_size
        block_q = padded // blocks if padded % blocks == 0 else -(-rows // blocks)
        released = self.variant == "released"
        q_order, k_order = self._order(q), self._order(k)
        q_index = _blocks(q_order, blocks, block_q)
        k_index = _blocks(k_order, blocks, self.block_size)
        own_q, own_k, own_v = gather_groups(q, q_index), gather_groups(k, k_index), gather_groups(v, k_index)
        dead = None if released or kv_len == blocks * self.block_size else (k_index < 0)[:, :, :, None, :]
        many = rows > block_q and kv_len > self.block_size
        drawn = self._draw(q, kv_len, halves) if many else None
        if drawn is None:
            out, lse = self._blocks_alone(own_q, own_k, own_v, dead)
        else:
            far_k, far_v = (_drawn_rows(x, k_order, drawn)[:, :, None].expand(-1, -1, blocks, -1, -1) for x in (k, v))
            bias = self._sample_bias(drawn, kv_len, blocks, accumulation_dtype(q.dtype))
            if released:
                near = group_attention(own_q, own_k, own_v, **self.options)
                weight = math.log(kv_len / drawn.shape[2])
                far_bias = (bias - weight) if self.mask_collisions else None
                far = group_attention(own_q, far_k, far_v, bias=far_bias, **self.options)
                out, lse = self.merge(near, (far[0], far[1] + weight))
            else:
                shared = q.shape[1] // k.shape[1]
                own_bias = bias.new_zeros(k_index.shape[:3] + (1, self.block_size))
                if dead is not None:
                    own_bias = own_bias.masked_fill(dead, -torch.inf)
                own_k, own_v, own_bias = (x.repeat_interleave(shared, dim=1) for x in (own_k, own_v, own_bias))
                keys, values = torch.cat([own_k, far_k], dim=3), torch.cat([own_v, far_v], dim=3)
                bias = torch.cat([own_bias, bias], dim=-1)
                out, lse = group_attention(own_q, keys, values, bias=bias, **self.options)
        back = q_order.argsort(dim=2)
        return select_rows(out.flatten(2, 3), back), lse.flatten(2, 3).gather(2, back)

    def _blocks_alone(self, q: Tensor, k: Tensor, v: Tensor, dead: Tensor | None) -> Parts:
        bias = None
        if dead is not None:
            shared = q.shape[1] // k.shape[1]
            bias = torch.zeros(dead.shape, dtype=accumulation_dtype(q.dtype), device=q.device)
            bias = bias.masked_fill(dead, -torch.inf).repeat_interleave(shared, dim=1)
        return group_attention(q, k, v, bias=bias, **self.options)

    def _sampled_only(self, q: Tensor, k: Tensor, v: Tensor, halves: int) -> Parts:
        kv_len = k.shape[2]
        drawn = self._draw(q, kv_len, halves)
        if drawn is None:
            raise bad_value("samples", 0, "at least 1 when block_size is 0")
        order = self._order(k)
        out, lse = attention(q, _drawn_rows(k, order, drawn), _drawn_rows(v, order, drawn), **self.options)
        return out, lse + math.log(kv_len / drawn.shape[2])

    def _order(self, x: Tensor) -> Tensor:
        """Token numbers sorted by bucket, ties in order, (B, Hx, length)."""
        if self.planes.shape[-1] == 0:
            return torch.arange(x.shape[2], device=x.device).expand(*x.shape[:3])
        return angular_lsh(x, self.planes, variant=self.variant).sort(dim=2, stable=True).indices

    def _draw(self, q: Tensor, kv_len: int, halves: int) -> Tensor | None:
        """Numbers of drawn keys in sorted order, (B, H, m), or None for no samples."""
        batch, heads = q.shape[0] // halves, q.shape[1]
        if self.draws.given is not None:
            drawn = next(self.draws.given, None)
            if drawn is None:
                raise bad_value("samples", "too few draws", "one for each square that is not treated exactly")
            shape = (batch, heads * halves)
            require(drawn.shape[:2] == shape, "samples", f"shape {tuple(drawn.shape)}", f"({batch}, {shape[1]}, m)")
            if drawn.numel():
                low, high = int(drawn.min()), int(drawn.max())
                require(low >= 0 and high < kv_len, "samples", f"indices {low} to {high}", f"keys in [0, {kv_len})")
        else:
            size = (1 if self.share_draws else batch, heads * halves, int(self.draws.count or 0))
            where = self.generator.device if self.generator is not None else q.device
            drawn = torch.randint(kv_len, size, generator=self.generator, device=where) if size[2] else None
            drawn = None if drawn is None else drawn.expand(batch, -1, -1)
        if drawn is None or drawn.shape[2] == 0:
            return None
        drawn = drawn.to(q.device).unflatten(1, (heads, halves))
        return drawn.transpose(1, 2).flatten(0, 1)

    def _sample_bias(self, drawn: Tensor, kv_len: int, blocks: int, dtype: torch.dtype) -> Tensor:
        """What each block of queries adds to the scores of drawn keys, (B, H, blocks, 1, m)."""
        weight = math.log(kv_len / drawn.shape[2])
        bias = torch.full((*drawn.shape[:2], blocks, 1, drawn.shape[2]), weight, dtype=dtype, device=drawn.device)
        if not self.mask_collisions:
            return bias
        own = torch.arange(blocks, device=drawn.device)[:, None, None]
        return bias.masked_fill((drawn // self.block_size)[:, :, None, None, :] == own, -torch.inf)


def _halved(x: Tensor) -> Tensor:
    """(B, H, 2n, D) -> (2B, H, n, D), first half first."""
    return x.unflatten(2, (2, -1)).transpose(1, 2).flatten(0, 1)


def _blocks(order: Tensor, blocks: int, size: int) -> Tensor:
    """(B, H, N) as (B, H, blocks, size), -1 where it has ended."""
    return F.pad(order, (0, blocks * size - order.shape[2]), value=-1).unflatten(2, (blocks, size))


def _drawn_rows(x: Tensor, order: Tensor, drawn: Tensor) -> Tensor:
    """Rows of x (B, Hkv, M, D) that stand at `drawn` (B, H, m) in `order` (B, Hkv, M): (B, H, m, D)."""
    batch, heads, count = drawn.shape
    number = order.gather(2, drawn.reshape(batch, x.shape[1], -1))
    return select_rows(x, number).reshape(batch, heads, count, x.shape[3])
