"""Agent attention: a few agent tokens read the keys for all queries, and the queries read the agents.

Agent Attention: On the Integration of Softmax and Linear Attention (Han et al., 2023, arXiv 2312.08874). Numbers read from
LeapLabTHU/Agent-Attention (no licence: numbers only). Two softmax attentions in a row, so `attention()` does the work.
"""

from __future__ import annotations

from torch import Tensor

from .._checks import bad_value, require, require_tensor
from .attention import attention

__all__ = ["agent_attention"]


def agent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    bias1: Tensor | None = None,
    bias2: Tensor | None = None,
    scale: float | None = None,
    scale2: float | None = None,
    shortcut: float = 0.0,
    *,
    dropout: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """`softmax(scale2 q A^T + bias2) softmax(scale A k^T + bias1) v + shortcut v`, with A the agents.

    With m agents the cost is m (N + M) scores per head instead of N M. Rows of both softmaxes sum to 1, so the result is an average
    of values like plain attention's (the shortcut apart). It sees the whole sequence: there is no causal form.

    Args:
        q: (B, H, N, D). k: (B, Hkv, M, D). v: (B, Hkv, M, Dv). agents: (B, H, m, D), usually queries pooled over the image.
        bias1: added to the scores of agents against keys, broadcastable to (B, H, m, M). -inf forbids a pair.
        bias2: added to the scores of queries against agents, broadcastable to (B, H, N, m).
        scale: factor on A k^T. Default D ** -0.5.
        scale2: factor on q A^T. Default: `scale`. AgentSD uses D ** (-0.5 * 0.3).
        shortcut: factor on v added to the output, for self-attention (N = M). AgentSD uses 0.075.
        dropout: probability of dropping a weight, in both softmaxes. Always active when > 0.
        backend: of `regard.ops.attention`, for both.

    Returns:
        (B, H, N, Dv). Zero (plus the shortcut) when there are no agents.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v), ("agents", agents)):
        require_tensor(name, tensor, dims=4, floating=True)
    batch, num_heads, q_len, head_dim = q.shape
    fits = agents.shape[:2] == q.shape[:2] and agents.shape[3] == head_dim
    require(
        fits,
        "agents",
        f"shape {tuple(agents.shape)}",
        f"({batch}, {num_heads}, m, {head_dim}), batch, heads and D of q",
    )
    require(agents.dtype == q.dtype, "agents", agents.dtype, f"q's dtype {q.dtype}")
    num_agents, kv_len = agents.shape[2], k.shape[2]
    _require_bias("bias1", bias1, (batch, num_heads, num_agents, kv_len))
    _require_bias("bias2", bias2, (batch, num_heads, q_len, num_agents))
    if shortcut and (kv_len != q_len):
        raise bad_value(
            "shortcut", shortcut, f"0 unless there is a value for each query (q has {q_len} rows, v has {kv_len})"
        )
    if scale2 is None:
        scale2 = scale
    agent_values = attention(agents, k, v, bias=bias1, scale=scale, dropout=dropout, backend=backend)
    out = attention(q, agents, agent_values, bias=bias2, scale=scale2, dropout=dropout, backend=backend)
    if shortcut:
        group = num_heads // v.shape[1]
        out = out + shortcut * (v if group == 1 else v.repeat_interleave(group, dim=1))
    return out


def _require_bias(name: str, bias: Tensor | None, full: tuple[int, ...]) -> None:
    if bias is None:
        return
    require_tensor(name, bias, floating=True)
    shape = (1,) * (4 - bias.dim()) + tuple(bias.shape)
    fits = len(shape) == 4 and all(have in (1, want) for have, want in zip(shape, full))
    require(fits, name, f"shape {tuple(bias.shape)}", f"a shape broadcastable to {full}")
