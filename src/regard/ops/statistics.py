"""What a set of queries reads of each key: sums of softmax rows, without the N x M matrix.

`attention_column_sums` adds up the attention that every key receives (heavy hitters: H2O, LOOK-M), `window_scores` only what the
last queries give (SnapKV and its kin). Rows are computed in blocks; where the log-sum-exp of the rows is known from a forward
pass (`attention(..., return_lse=True)`, any backend), it is used, and the keys may then be a part of those that the rows read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._checks import bad_value, require, require_int, require_name, require_tensor
from .masks import Mask, as_mask, dense
from .reference import accumulation_dtype, softmax_with_lse

_BLOCK_ELEMENTS = 1 << 20  # scores held at once, 4 MiB in float32: they stay in the cache
_COLUMNS = 256  # width of the stretches of keys that a mask is asked about
_GROUPS = ("sum", "mean", "max", "none")


def attention_column_sums(
    q: Tensor,
    k: Tensor,
    *,
    mask: Mask | Callable[..., Tensor] | Tensor | None = None,
    score_mod: Callable[..., Tensor] | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    q_offset: int | None = None,
    lse: Tensor | None = None,
    last: int | None = None,
    group: str = "sum",
) -> Tensor:
    """The attention that each key receives: softmax rows added up over the queries.

    Args:
        q: (B, H, N, D). k: (B, Hkv, M, D), H a multiple of Hkv.
        mask, score_mod, bias, scale, q_offset: as in `regard.ops.attention`. (A causal prompt needs `mask=regard.masks.causal`.)
        lse: (B, H, N), the log-sum-exp of each row over everything that it reads; None: over the keys given here.
        last: count only the last `last` queries (all where there are fewer); None = all.
        group: what the query heads of one kv head come to: "sum", "mean", "max", or "none" for one result a query head.

    Returns:
        (B, Hkv, M), or (B, H, M) with group="none", float32 (float64 stays). Without `lse` and groups the sum over keys is the number
        of queries that may see anything. Temporary memory is bounded (4 MiB of scores, or one row of all heads); differentiable.

    Raises:
        ValueError, TypeError: shapes that do not fit, unknown `group`, `last` below 1.
    """
    for name, tensor in (("q", q), ("k", k)):
        require_tensor(name, tensor, dims=4, floating=True)
    batch, heads, q_len, dim = q.shape
    kv_heads, kv_len = k.shape[1:3]
    require(k.shape[0] == batch and k.shape[3] == dim, "k", f"shape {tuple(k.shape)}", f"({batch}, Hkv, M, {dim})")
    if kv_heads == 0 or heads % kv_heads:
        raise bad_value("k", f"{kv_heads} kv heads", f"a divisor of q's {heads} heads")
    require_name("group", group, _GROUPS)
    if last is not None:
        require_int("last", last, 1)
    if lse is not None:
        want = (batch, heads, q_len)
        require(tuple(lse.shape) == want, "lse", f"shape {tuple(lse.shape)}", f"(B, H, N) = {want}")
    dtype = accumulation_dtype(q.dtype)
    rows = _Rows(q, k, dtype, mask, score_mod, bias, scale, kv_len - q_len if q_offset is None else q_offset)
    total = torch.zeros(batch, heads, kv_len, dtype=dtype, device=q.device)
    first = 0 if last is None else max(0, q_len - last)
    step = max(1, _BLOCK_ELEMENTS // max(1, batch * heads * kv_len))
    for low in range(first, q_len, step):
        high = min(low + step, q_len)
        start, scores, surely = rows.scores(low, high)
        if scores is None:
            continue
        if lse is None:
            weights = torch.softmax(scores, -1) if surely else softmax_with_lse(scores)[0]
        else:
            top = lse[:, :, low:high].to(dtype)
            top = top.masked_fill(top == -torch.inf, torch.inf)[..., None]
            weights = torch.exp(scores - top) if rows.differentiates else scores.sub_(top).exp_()
        total[:, :, start : start + scores.shape[-1]] += weights.sum(2)
    return _over_groups(total, kv_heads, group)


def window_scores(
    q: Tensor,
    k: Tensor,
    window: int = 32,
    *,
    pool: str | None = None,
    kernel: int = 5,
    group: str = "mean",
    **options: Any,
) -> Tensor:
    """The mean attention that the last `window` queries give to each key, (B, Hkv, M).

    Args:
        q, k, options: as in `attention_column_sums`. window: queries counted, from the end (fewer where there are fewer).
        pool: None, "avg" or "max": smooth along the keys before the window, so that neighbours of a read key stay with it.
            kernel: odd width of it. The window's own keys are left as they are.
        group: as in `attention_column_sums`.
    """
    require_int("window", window, 1)
    if pool is not None:
        require_name("pool", pool, ("avg", "max"))
        require(require_int("kernel", kernel, 1) % 2 == 1, "kernel", kernel, "an odd width")
    sums = attention_column_sums(q, k, last=window, group=group, **options) / max(1, min(window, q.shape[2]))
    before = k.shape[2] - window
    if pool is None or before <= 0:
        return sums
    smooth = torch.nn.functional.avg_pool1d if pool == "avg" else torch.nn.functional.max_pool1d
    earlier = smooth(sums[..., :before], kernel, stride=1, padding=kernel // 2)
    return torch.cat([earlier, sums[..., before:]], dim=-1)


def _over_groups(total: Tensor, kv_heads: int, group: str) -> Tensor:
    if group == "none":
        return total
    by_group = total.unflatten(1, (kv_heads, -1))
    return by_group.amax(2) if group == "max" else by_group.sum(2) if group == "sum" else by_group.mean(2)


class _Rows:
    """Scores of some query rows at a time, over the stretch of keys that any of them may see."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        dtype: torch.dtype,
        mask: Any,
        score_mod: Any,
        bias: Tensor | None,
        scale: float | None,
        q_offset: int,
    ) -> None:
        self.q, self.keys = q, k.to(dtype).transpose(-1, -2)
        self.dtype, self.score_mod, self.q_offset = dtype, score_mod, q_offset
        self.bias = None if bias is None else bias[(None,) * (4 - bias.dim())]
        self.scale = q.shape[-1] ** -0.5 if scale is None else scale
        if isinstance(mask, Tensor):
            mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
            mask = mask.expand(*mask.shape[:3], k.shape[2])
            if mask.shape[2] > 1:  # rows of the tensor are rows of q, wherever q's positions begin
                mask = dense(mask, q_offset=q_offset)
        self.mask = None if mask is None else as_mask(mask)
        given = (q, k, *(() if bias is None else (bias,)), *getattr(score_mod, "tensors", ()))
        self.differentiates = torch.is_grad_enabled() and any(t.requires_grad for t in given)
        self.b = torch.arange(q.shape[0], device=q.device).view(-1, 1, 1, 1)
        self.h = torch.arange(q.shape[1], device=q.device).view(1, -1, 1, 1)

    def scores(self, low: int, high: int) -> tuple[int, Tensor | None, bool]:
        """First key and scores (B, H, high - low, keys) of rows [low, high), a tensor of its own; None where they see nothing. And
        whether every row surely sees something."""
        start, stop, mixed, surely = self._stretch(low, high)
        if stop <= start:
            return start, None, False
        batch, heads = self.q.shape[:2]
        kv_heads = self.keys.shape[1]
        rows = self.q[:, :, low:high].to(self.dtype) * self.scale
        grouped = rows.reshape(batch, kv_heads, -1, rows.shape[-1])
        scores = (grouped @ self.keys[..., start:stop]).view(batch, heads, high - low, stop - start)
        qi = torch.arange(low + self.q_offset, high + self.q_offset, device=scores.device).view(1, 1, -1, 1)
        ki = torch.arange(start, stop, device=scores.device).view(1, 1, 1, -1)
        if self.score_mod is not None:
            scores = torch.broadcast_to(self.score_mod(scores, self.b, self.h, qi, ki), scores.shape)
            surely = False
        if self.bias is not None:
            bias = self.bias if self.bias.shape[2] == 1 else self.bias[:, :, low:high]
            scores = scores + (bias if bias.shape[3] == 1 else bias[..., start:stop]).to(self.dtype)
            surely = False
        if self.mask is None or mixed[1] <= mixed[0]:
            return start, scores.clone() if self.score_mod is not None else scores, surely
        if self.differentiates or self.score_mod is not None:
            return start, scores.masked_fill(~self.mask.keep(self.b, self.h, qi, ki), -torch.inf), surely
        part = slice(mixed[0] - start, mixed[1] - start)
        scores[..., part].masked_fill_(~self.mask.keep(self.b, self.h, qi, ki[..., part]), -torch.inf)
        return start, scores, surely

    def _stretch(self, low: int, high: int) -> tuple[int, int, tuple[int, int], bool]:
        """[start, stop) of the keys that rows [low, high) may see, as far as the mask tells; the part of it, [a, b), outside of
        which they surely see everything; and whether there is such an outside."""
        kv_len = self.keys.shape[-1]
        if self.mask is None or kv_len == 0:
            return 0, kv_len, (0, 0), kv_len > 0
        lower = torch.arange(0, kv_len, _COLUMNS).view(1, 1, 1, -1)
        upper = (lower + _COLUMNS - 1).clamp(max=kv_len - 1)
        first, final = (torch.tensor(x + self.q_offset).view(1, 1, 1, 1) for x in (low, high - 1))
        device = self.b.device
        b = self.b if self.mask.varies_batch else self.b[:1]
        h = self.h if self.mask.varies_head else self.h[:, :1]
        some, every = self.mask.bounds(b, h, *(x.to(device) for x in (first, final, lower, upper)))
        some = some.reshape(-1, some.shape[-1]).any(0).expand(lower.shape[-1])
        seen = some.nonzero()[:, 0].tolist()
        if not seen:
            return 0, 0, (0, 0), False
        every = every.reshape(-1, every.shape[-1]).all(0).expand(lower.shape[-1])[seen[0] : seen[-1] + 1]
        unsure = [seen[0] + i for i in (~every).nonzero()[:, 0].tolist()]
        mixed = (unsure[0] * _COLUMNS, min(kv_len, (unsure[-1] + 1) * _COLUMNS)) if unsure else (0, 0)
        return seen[0] * _COLUMNS, min(kv_len, (seen[-1] + 1) * _COLUMNS), mixed, bool(every.any())
