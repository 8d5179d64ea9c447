"""What the loss would lose if single attention weights were taken away: MoA's influence profile, in blocks.

Fu et al. 2024, "MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression" (arXiv 2406.14909). Numbers from
thu-nics/MoA @ e224fe3 (MIT), `modify_llama_profile.py`. To first order, the loss changes by E_ij when weight A_ij is set to zero and
the rest of its row renormalised; G is the gradient of the loss with respect to the weights:

    E_ij = -A_ij (G_ij - sum_k G_ik A_ik) / (1 + eps - A_ij)

In row 0, whose only weight cannot be made up for, E = -G A. Blocks are sums of E; absolute values are taken afterwards, by the search.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import bad_type, require, require_int, require_tensor
from ..integrations.transformers import attach
from ..methods.call import AttentionCall, Method

__all__ = ["answered_by_dense", "attention_influence", "influence_blocks"]


def influence_blocks(call: AttentionCall, grad_out: Tensor, block: int = 64) -> Tensor:
    """Influence of the weights of one attention call, summed over `block` x `block` blocks.

    Args:
        call: q (B, H, N, D), k, v (B, Hkv, N, D), with its mask and scale. grad_out: (B, H, N, Dv), the gradient of the loss with
            respect to the head outputs.

    Returns:
        (H, nb, nb) float32 (float64 stays), nb = ceil(N / block), mean over the batch; the last block may be of a part only.
        Memory: B * H * block * N numbers at a time.
    """
    require_int("block", block, 1)
    require_tensor("grad_out", grad_out, dims=4, floating=True)
    shape = (call.batch, call.num_heads, call.q_len, call.v.shape[3])
    require(tuple(grad_out.shape) == shape, "grad_out", f"shape {tuple(grad_out.shape)}", f"{shape}, like the output")
    blocks = -(-call.kv_len // block)
    values = call.v.repeat_interleave(call.num_heads // call.num_kv_heads, dim=1)
    rows = []
    for first in range(0, call.q_len, block):
        row = slice(first, min(first + block, call.q_len))
        weights = call.weights(rows=row)
        gradient = grad_out[:, :, row].to(weights.dtype) @ values.transpose(-1, -2).to(weights.dtype)
        product = gradient * weights
        eps = torch.finfo(weights.dtype).eps
        lost = -weights * (gradient - product.sum(-1, keepdim=True)) / (1.0 + eps - weights)
        if first == 0:
            lost[:, :, 0] = -product[:, :, 0]
        padded = nn.functional.pad(lost.sum(2), (0, blocks * block - call.kv_len))
        rows.append(padded.unflatten(-1, (blocks, block)).sum(-1).mean(0))
    return torch.stack(rows, dim=1)


def attention_influence(
    model: nn.Module,
    batches: Mapping[str, Any] | Tensor | Iterable[Mapping[str, Any] | Tensor],
    block: int = 64,
) -> dict[int, Tensor]:
    """Profile how much every block of attention weights matters for what a model is to say.

    Args:
        model: a causal transformers model that `attach` can join. Its weights and gradients are left alone; it runs in eval mode.
        batches: one or several inputs: ids (B, N), or a mapping with `input_ids` and, if only some tokens are to count,
            `labels` (B, N), -100 where not (see `answered_by_dense`). Without labels every token counts. No padding.
        block: tokens a block side.

    Returns:
        length -> (layers, H, nb, nb) float32, signed, mean over the samples of that length (rounded up to whole blocks).
        Memory: what a forward keeps for its backward, and block * N weights a head at a time; never N x N.

    Raises:
        ValueError: padded rows, no label that counts, or layers of other kinds than self-attention. TypeError: other inputs.
    """
    require_int("block", block, 1)
    if isinstance(batches, (Mapping, Tensor)):
        batches = [batches]
    sums: dict[int, Tensor] = {}
    counts: dict[int, int] = {}
    for given in batches:
        ids, labels = _inputs(given)
        probe = _Probe(block)
        with _still(model), attach(model, probe), torch.enable_grad():
            logits = model(input_ids=ids.to(_device(model)), use_cache=False).logits
            wanted = labels[:, 1:].to(logits.device)
            require(bool((wanted >= 0).any()), "labels", "none that counts", "at least one label >= 0 after the first")
            losses = nn.functional.cross_entropy(logits[:, :-1].mT.float(), wanted, ignore_index=-100, reduction="none")
            (losses.sum(1) / (wanted >= 0).sum(1).clamp(min=1)).sum().backward()  # each sample by itself
        found = torch.stack([probe.found[layer] for layer in sorted(probe.found)])
        length = -(-ids.shape[1] // block) * block
        sums[length] = sums.get(length, torch.zeros_like(found)) + found * ids.shape[0]
        counts[length] = counts.get(length, 0) + ids.shape[0]
    require(bool(sums), "batches", "none", "at least one batch")
    return {length: sums[length] / counts[length] for length in sorted(sums)}


@torch.no_grad()
def answered_by_dense(model: Any, prompt: Tensor, tokens: int = 32) -> dict[str, Tensor]:
    """A calibration sample as MoA has it: the prompt (1, N) and the dense model's own greedy answer, only the answer labelled."""
    require_tensor("prompt", prompt, dims=2)
    require_int("tokens", tokens, 1)
    prompt = prompt.to(_device(model))
    ids = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
    )
    labels = ids.clone()
    labels[:, : prompt.shape[1]] = -100
    return {"input_ids": ids, "labels": labels}


@dataclass
class _Probe(Method):
    """Takes the gradient of each layer's head outputs as it passes by, and keeps the blocks made of it."""

    block: int = 64
    found: dict[int, Tensor] = field(default_factory=dict)

    def edit(self, call: AttentionCall) -> None:
        if call.sinks is not None or (call.mask is not None and bool(call.start.any())):
            what = "padded rows" if call.sinks is None else "a model with sink logits"
            raise ValueError(f"batches: got {what}, need rows without padding and plain softmax attention")

        def watch(out: Tensor) -> Tensor:
            out = out if out.requires_grad else out.detach().requires_grad_()  # the first layer of a frozen model
            kept = replace(
                call,
                q=call.q.detach(),
                k=call.k.detach(),
                v=call.v.detach(),
                biases=[bias.detach() for bias in call.biases],
                num_seen=call.seen,
                session=None,
                weight_edits=[],
                output_edits=[],
            )

            def take(gradient: Tensor) -> None:
                with torch.no_grad():
                    self.found[call.layer] = influence_blocks(kept, gradient, self.block).cpu()

            out.register_hook(take)
            return out

        call.on_output(watch)


def _inputs(given: Any) -> tuple[Tensor, Tensor]:
    if isinstance(given, Tensor):
        given = {"input_ids": given}
    if not isinstance(given, Mapping) or "input_ids" not in given:
        raise bad_type("batches", given, "ids (B, N), or mappings with input_ids")
    ids = require_tensor("input_ids", given["input_ids"], dims=2)
    require(ids.shape[1] >= 2, "input_ids", f"shape {tuple(ids.shape)}", "at least two tokens")
    mask = given.get("attention_mask")
    require(mask is None or bool(mask.bool().all()), "attention_mask", "padding", "rows without padding")
    labels = given.get("labels", ids)
    require(tuple(labels.shape) == tuple(ids.shape), "labels", f"shape {tuple(labels.shape)}", f"{tuple(ids.shape)}")
    return ids, labels


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device


@contextmanager
def _still(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients for the weights, for a while."""
    training, wanted = model.training, [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        for parameter in wanted:
            parameter.requires_grad_(True)
