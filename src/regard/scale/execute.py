"""Doing a plan's tasks: in one process, over `torch.distributed`, or by a pool of attention servers, with the same result."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import require, require_tensor
from ..ops import attention, masks
from .plan import Plan
from .tasks import AttentionTask


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """One task: q (B, H, n, D), the last rows of k, v (B, Hkv, m, D): causal, bottom-right aligned. (B, H, n, Dv)."""
    return attention(q, k, v, mask=masks.causal, scale=scale)


def check_tensors(plan: Plan, q: Tensor, k: Tensor, v: Tensor, tokens: int) -> None:
    """q, k, v have four dimensions and `tokens` tokens each."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        require_tensor(name, tensor, dims=4, floating=True)
        require(tensor.shape[2] == tokens, name, f"{tensor.shape[2]} tokens", f"the plan's {tokens}")


def run_plan(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, *, group: Any = None, servers: Any = None, scale: float | None = None
) -> Tensor:
    """Causal attention within each document, task by task. Differentiable.

    Args:
        q: (B, H, T, D), k, v: (B, Hkv, T, D): without `group` all documents packed one after the other, T = the tokens of all; with
            `group` the tokens `plan.tokens[rank]` of this rank, in that order.
        group: a `torch.distributed` process group of `plan.ranks` ranks (or True for the default one): queries, keys and values travel to
            the servers and outputs back, in the backward pass their gradients. Every rank has to call it, and to run backward.
        servers: a `regard.scale.AttentionServers` pool that does the tasks instead (task on server s: worker s modulo their number).
        scale: factor on q k^T, default D ** -0.5.
    Returns:
        (B, H, T, Dv), the same tokens in the same order. No row is merged from parts: it is what dense attention gives.
    """
    require(group is None or servers is None, "group, servers", "both", "at most one of them")
    if group is not None:
        from .distributed import run_plans

        return run_plans([(plan, q, k, v)], group=group, scale=scale)[0]
    check_tensors(plan, q, k, v, plan.starts[-1])
    if servers is not None:
        return servers.run(plan, q, k, v, scale=scale)
    parts = [attend(*task_tensors(plan, task, q, k, v), scale=scale) for task in plan.tasks]
    return torch.cat(parts, dim=2)  # tasks are in the order of the packed row


def task_tensors(plan: Plan, task: AttentionTask, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of a packed q and the keys and values of a packed k, v that a task needs."""
    start = plan.starts[task.doc]
    rows, keys = slice(start + task.q_start, start + task.kv_len), slice(start, start + task.kv_len)
    return q[:, :, rows], k[:, :, keys], v[:, :, keys]
