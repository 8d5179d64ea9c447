"""THE SPECIFICATION of linear attention: what every form and every backend must give. Slow on purpose."""

from __future__ import annotations

import torch
from torch import Tensor

from .feature_maps import FeatureMap, resolve
from .linear_state import LinearState


def linear_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    feature_map: str | FeatureMap | tuple[str | FeatureMap, str | FeatureMap] | None = None,
    normalize: bool = False,
    causal: bool = True,
    scale: float | None = None,
    state: LinearState | None = None,
    lengths: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, LinearState]:
    """Arguments as `linear_attention`; returns outputs (B, H, N, Dv) and the state after the last token.

    For each sequence of the batch by itself, with n its length:
        weight(t, j) = exp(g_(j+1) + ... + g_t)   for j <= t, elementwise over channels where g is
        o_t = scale * sum_(j <= t) (phi(q_t) * weight(t, j)) . phi(k_j)  v_j   +   scale * (phi(q_t) * weight(t, -1)) S_in
        z_t = the same sum with v_j = 1 and the incoming normaliser; o_t <- o_t / (z_t + eps) when normalised
        S_out = sum_j (phi(k_j) * weight(n - 1, j))^T v_j + weight(n - 1, -1) S_in
    Rows past the length are zero. Without `causal` every t sums over all j < n, and there is no decay.
    Half types are computed in float32.
    """
    acc = torch.float32 if q.dtype in (torch.float16, torch.bfloat16) else q.dtype
    map_q, map_k = resolve(feature_map)
    groups = q.shape[1] // k.shape[1]
    fq, fk = map_q(q.to(acc)), map_k(k.to(acc)).repeat_interleave(groups, dim=1)
    fq = fq * (1.0 if scale is None else scale)
    values = v.to(acc).repeat_interleave(groups, dim=1)
    if normalize:
        values = torch.cat([values, torch.ones_like(values[..., :1])], dim=-1)
    batch, heads, q_len, dim = fq.shape
    kv_len, width = values.shape[2:]
    decay = torch.zeros(batch, heads, kv_len, 1, dtype=acc, device=q.device)
    if log_decay is not None:
        wide = log_decay.to(acc)
        decay = decay + (wide[:, None, None] if wide.dim() == 1 else wide if wide.dim() == 4 else wide[..., None])
    before = torch.zeros(batch, heads, dim, width, dtype=acc, device=q.device)
    if state is not None:
        before = state.kv.to(acc)
        if normalize and state.normaliser is not None:
            before = torch.cat([before, state.normaliser.to(acc)[..., None]], dim=-1)

    outs, after = [], []
    for b in range(batch):
        n = kv_len if lengths is None else int(lengths[b])
        rows = [torch.zeros(heads, width, dtype=acc, device=q.device)] * q_len
        for t in range(min(n, q_len) if causal else q_len):
            last = t + 1 if causal else n
            weight = _weights(decay[b, :, :last])
            seen = (weight[:, 1:] * fk[b, :, :last] * fq[b, :, t, None]).sum(-1)
            rows[t] = torch.einsum("hj,hjv->hv", seen, values[b, :, :last])
            rows[t] = rows[t] + torch.einsum("hd,hdv->hv", weight[:, 0] * fq[b, :, t], before[b])
        outs.append(torch.stack(rows, dim=1) if rows else fq.new_zeros(heads, 0, width))
        weight = _weights(decay[b, :, :n])
        total = torch.einsum("hjd,hjv->hdv", weight[:, 1:] * fk[b, :, :n], values[b, :, :n])
        after.append(total + weight[:, 0, :, None] * before[b])
    out, end = torch.stack(outs), torch.stack(after)
    if not normalize:
        return out.to(v.dtype), LinearState(end)
    out = out[..., :-1] / (out[..., -1:] + eps)
    return out.to(v.dtype), LinearState(end[..., :-1], end[..., -1])


def _weights(log_decay: Tensor) -> Tensor:
    """(H, n, C) -> (H, n + 1, C): entry j + 1 is what is left of token j after the last one, entry 0 of what was before all."""
    sums = log_decay.flip(1).cumsum(1).flip(1)
    return torch.cat([sums, sums.new_zeros(sums.shape[0], 1, sums.shape[2])], dim=1).exp()
