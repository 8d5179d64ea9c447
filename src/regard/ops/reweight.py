"""Multiplying attention weights on chosen keys and renormalising, and the exact additive form of it.

For one row of softmax weights `a` and factors `f >= 0` over the keys

    a'_j = f_j a_j / sum_i f_i a_i        is        softmax(scores + log f)

so that a re-weighting never needs the N x M weights: `log_factor_bias` is added to the scores and every kernel that takes a bias
computes it. `scale_weights` is the same thing said on weights that are at hand. Scaling the key states themselves is something
else: it multiplies the logit, not the weight.

Used by ZeroTuning (081: one key, the first) and by everything that steers attention to or from a span.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import bad_type, bad_value, require, require_tensor

__all__ = ["key_mask", "log_factor_bias", "scale_weights"]

Keys = int | slice | tuple[int, int | None] | Tensor


def key_mask(
    keys: Keys, kv_len: int, *, start: Tensor | None = None, device: torch.device | str | None = None
) -> Tensor:
    """The chosen keys as bool, (M,), or (B, M) where rows differ.

    Args:
        keys: an int (one key), a slice or a (begin, end or None) pair, both counted from the end where negative; an int64 tensor (K,) of
            positions >= 0; or a bool tensor (M,) or (B, M), which comes back as it is. Positions beyond the keys choose nothing.
        kv_len: M.
        start: int64 (B,): position of each row's first real key (its left padding); `keys` then counts from there.
    """
    if isinstance(keys, Tensor) and keys.dtype == torch.bool:
        require(
            keys.dim() in (1, 2) and keys.shape[-1] == kv_len,
            "keys",
            f"bool of shape {tuple(keys.shape)}",
            f"(M,) or (B, M), M = {kv_len}",
        )
        return keys
    if isinstance(keys, bool) or not isinstance(keys, (int, slice, tuple, Tensor)):
        raise bad_type("keys", keys, "an int, a slice, a (begin, end) pair, or an int64 or bool tensor")
    position = torch.arange(kv_len, device=device if start is None else start.device)
    length: int | Tensor = kv_len
    if start is not None:
        position = position - start[:, None]  # left padding stands at negative positions, which nothing below chooses
        length = kv_len - start[:, None]
    if isinstance(keys, Tensor):
        if keys.is_floating_point() or bool((keys < 0).any()):
            raise bad_value("keys", keys.tolist(), "positions >= 0 (int64), or a bool tensor")
        return torch.isin(position, keys.to(position.device))
    if isinstance(keys, int):
        return (position == _from_end(keys, length)) & (position >= 0)
    begin, end = _ends(keys)
    inside = (position >= 0) & (position >= _from_end(begin, length))
    return inside if end is None else inside & (position < _from_end(end, length))


def _from_end(index: int, length: int | Tensor) -> int | Tensor:
    return index if index >= 0 else length + index


def _ends(keys: slice | tuple[int, int | None]) -> tuple[int, int | None]:
    if isinstance(keys, slice):
        require(keys.step in (None, 1), "keys", keys, "a slice of step 1")
        return (0 if keys.start is None else keys.start), keys.stop
    if len(keys) != 2 or not isinstance(keys[0], int) or not isinstance(keys[1], int | None):
        raise bad_value("keys", keys, "a (begin, end) pair of ints (end None: to the last key)")
    return keys


def _checked_factor(
    factor: float | Tensor, heads: int, dtype: torch.dtype, device: torch.device | str | None
) -> Tensor:
    """`factor` as a tensor that broadcasts to (B, heads, 1, M); a tensor keeps its own floating type, a number takes `dtype`."""
    floating = isinstance(factor, Tensor) and factor.is_floating_point()
    factor = torch.as_tensor(factor, dtype=None if floating else dtype, device=device)
    if not bool((factor >= 0).all()) or bool(factor.isinf().any()):
        raise bad_value("factor", factor.tolist(), "finite factors >= 0")
    if factor.dim() == 1:
        require(len(factor) in (1, heads), "factor", f"{len(factor)} values", f"one, or one a head ({heads})")
        return factor.view(1, -1, 1, 1)
    require(factor.dim() in (0, 4), "factor", f"shape {tuple(factor.shape)}", "a number, (heads,) or (B, heads, 1, M)")
    return factor


def _heads(heads: Sequence[int] | None, num_heads: int) -> list[int]:
    if heads is None:
        return list(range(num_heads))
    numbers = [int(head) for head in heads]  # in the order given, which a factor by head follows
    if not all(0 <= head < num_heads for head in numbers) or len(set(numbers)) < len(numbers):
        raise bad_value("heads", list(heads), f"different numbers in [0, {num_heads})")
    return numbers


def log_factor_bias(
    keys: Keys,
    factor: float | Tensor,
    kv_len: int,
    *,
    num_heads: int = 1,
    heads: Sequence[int] | None = None,
    start: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """log `factor` on the chosen keys of the chosen heads, 0 elsewhere: add it to the scores to scale the weights.

    Args:
        keys, start: as in `key_mask`.
        factor: >= 0: a number, or a tensor (heads,) or (B, heads, 1, M). 1 changes nothing, 0 removes the keys (a bias of -inf).
        kv_len: M. num_heads: H. heads: numbers of the heads to treat; None = all.

    Returns:
        float32 (float64 with a float64 factor) bias, (1 or B, 1 or H, 1, M); one head row where all heads are treated alike.
    """
    chosen = _heads(heads, num_heads)
    where = key_mask(keys, kv_len, start=start, device=device)
    where = where.reshape(-1, 1, 1, kv_len)
    log_factor = _checked_factor(factor, len(chosen), torch.float32, where.device).log()
    alike = len(chosen) == num_heads and (log_factor.dim() == 0 or log_factor.shape[1] == 1)
    bias = torch.where(where, log_factor, torch.zeros((), dtype=log_factor.dtype, device=where.device))
    if alike:
        return bias
    full = bias.new_zeros(bias.shape[0], num_heads, 1, kv_len)
    full[:, chosen] = bias.expand(-1, len(chosen), -1, -1)
    return full


def scale_weights(
    weights: Tensor,
    keys: Keys,
    factor: float | Tensor,
    *,
    heads: Sequence[int] | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """Multiply softmax weights on `keys` by `factor` and renormalise every row of the chosen heads to sum 1.

    Args:
        weights: (B, H, N, M), rows that sum to 1 (or to 0: a row with nothing to attend to). Not modified.
        keys, factor, heads, start: as in `log_factor_bias`.

    Returns:
        (B, H, N, M) in the dtype of `weights`; a row left without any weight (factor 0 on all it saw) is zeros. Half types are
        computed in float32.
    """
    require_tensor("weights", weights, dims=4, floating=True)
    chosen = _heads(heads, weights.shape[1])
    where = key_mask(keys, weights.shape[-1], start=start, device=weights.device).reshape(-1, 1, 1, weights.shape[-1])
    dtype = torch.float32 if weights.dtype in (torch.float16, torch.bfloat16) else weights.dtype
    factor = _checked_factor(factor, len(chosen), dtype, weights.device).to(dtype)
    part = weights[:, chosen].to(dtype)
    part = torch.where(where.to(weights.device), part * factor, part)
    total = part.sum(-1, keepdim=True)
    part = part / torch.where(total > 0, total, 1)
    if len(chosen) == weights.shape[1]:
        return part.to(weights.dtype)
    return weights.index_copy(1, torch.tensor(chosen, device=weights.device, dtype=torch.long), part.to(weights.dtype))
