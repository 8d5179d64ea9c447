"""How SeerAttention's gates are taught: the model's own attention map, pooled into blocks, is what they are to predict.

Gao et al. 2024 (arXiv 2410.13276) and, for decoding gates, 2025 (arXiv 2506.08889). Code read for numbers (MIT):
microsoft/SeerAttention @ aba03e3, `seer_attn/prefill_sparse/llama/modeling_llama_seerattn.py`, `seer_attn/decode_sparse/*/*_training.py`,
`distillation_*.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._checks import require, require_fraction, require_tensor
from ..methods.rotary import RotaryOf, query_positions
from ..methods.sparse.seer_gates import gate_metadata, seer_gates
from ..nn.sequence.attention_gate import AttentionGate
from ..ops.block_maps import pooled_attention_map
from .runner import Fitted, fit, layer_loss


def block_map_distillation(logits: Tensor, target: Tensor, skip: float = 0.25, scale: float = 10.0) -> Tensor:
    """KL divergence of a gate's prediction from the true block map.

    Divided by ALL entries of the map and not by its rows, as the authors' code has it (so `scale`).

    Args:
        logits: (B, H, nQ, nK) of the gate, before the softmax. target: the same shape, rows sum to 1 (or are zero).
        skip: part of the rows, at the start, that does not count. scale: factor.
    Returns:
        scalar, 0 for a perfect gate.
    """
    require_tensor("logits", logits, dims=4, floating=True)
    require_tensor("target", target, dims=4, floating=True)
    require(target.shape == logits.shape, "target", f"shape {tuple(target.shape)}", f"logits' {tuple(logits.shape)}")
    first = int(logits.shape[2] * require_fraction("skip", skip))
    predicted = logits[:, :, first:].float().log_softmax(-1)
    return scale * F.kl_div(predicted, target[:, :, first:].float(), reduction="none").mean()


def fit_seer_gates(
    model: nn.Module,
    data: Any,
    gates: nn.ModuleDict | None = None,
    *,
    decode: bool = False,
    gate: Mapping[str, Any] | None = None,
    skip: float | None = None,
    scale: float = 10.0,
    lr: float = 1e-3,
    warmup: int = 20,
    schedule: str = "cosine",
    use_rope: bool = True,
    **options: Any,
) -> nn.ModuleDict:
    """Train gates for a model by self-distillation; the model stays as it is, bit by bit.

    Each batch runs through the model densely; at every layer the map of its attention, pooled into blocks, is what the layer's gate is to
    predict. Afterwards: `regard.attach(model, regard.SeerAttention(gates, threshold=2e-3))`.

    Args:
        model: a transformers causal language model with rotary embeddings.
        data: batches as `fit` takes them: token ids (B, N), or keyword arguments of the model. No padding; N of several blocks (the
            authors: 64k tokens).
        gates: what to train; None: fresh ones, `seer_gates(model, decode=decode, **gate)`.
        decode: gates for decoding (SeerAttention-R): every query has a row of its own, the heads of a kv head share the largest.
        gate: options of fresh gates. skip: part of the rows, at the start, that does not count; default 1/4, decoding gates 0.
        scale: factor on the loss. lr, warmup, schedule: as the authors have it. use_rope: whether gates turn what they compare.
        options: of `fit` (`steps`, `out`, `save_every`, ...).
    Returns:
        the gates, in eval mode. What `fit` returned hangs at them as `.fitted`.
    """
    gates = seer_gates(model, decode=decode, **(gate or {})) if gates is None else gates
    rotary = RotaryOf(model, "fit_seer_gates")
    skip = (0.0 if decode else 0.25) if skip is None else skip

    def loss_of_call(call: Any) -> Tensor | None:
        if str(call.layer) not in gates or call.kind != "self":
            return None
        module: Any = gates[str(call.layer)]
        positions = query_positions(call)
        rows = module.block_size
        target = pooled_attention_map(
            call.q,
            call.k,
            rows,
            "max",
            block_q=1 if decode else rows,
            scale=call.scale,
            per_kv_head=decode,
            normalize=True,
        )
        dtype = module.linear_k.weight.dtype
        with torch.no_grad():
            q, k = (rotary.undo(x, positions).to(dtype) for x in (call.q, call.k))
            by_block = rotary.angles(positions[:, ::rows], module.gate_dim) if use_rope else None
        if isinstance(module, AttentionGate):
            return block_map_distillation(module(q, k, by_block), target, skip, scale)
        by_row = rotary.angles(positions, module.gate_dim) if use_rope else None
        angles = None if by_row is None or by_block is None else (by_row, by_block)
        return block_map_distillation(module(q, k, angles), target, skip, scale)

    fitted: Fitted = fit(
        gates,
        layer_loss(model, loss_of_call, setup=rotary.watch),
        data,
        lr=lr,
        warmup=warmup,
        schedule=schedule,
        frozen=model,
        metadata=gate_metadata(gates),
        **options,
    )
    gates.fitted = fitted  # type: ignore[assignment]
    return gates.eval()
