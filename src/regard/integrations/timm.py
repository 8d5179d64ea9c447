"""Joining timm's vision transformers: the forward of `timm.layers.Attention`, with its attention as an `AttentionCall`.

`attach` finds these modules beside those of transformers; nothing of a network is patched but that one method of each, until detach.
Blocks with another attention (EVA's rotary one, Swin's windows) are not joined.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..methods.call import AttentionCall
from .sites import Site

__all__ = ["timm_forward"]


def timm_forward(module: Any, site: Site) -> Callable[..., Tensor]:
    """A replacement for the forward of a timm attention module: same arguments, same result."""

    def forward(original: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, **_: Any) -> Tensor:
        session = site.session
        batch, length, _dim = x.shape
        heads = module.num_heads
        gate = getattr(module, "gate", None)
        q, k, v = module.qkv(x).reshape(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mask = attn_mask if attn_mask is not None and attn_mask.dtype == torch.bool else None
        bias = attn_mask if attn_mask is not None and attn_mask.dtype != torch.bool else None
        wide = (None,) * (0 if attn_mask is None else 4 - attn_mask.dim())
        call = AttentionCall(
            module=module,
            layer=site.layer,
            q=module.q_norm(q),
            k=module.k_norm(k),
            v=v,
            tower=site.tower,
            mask=None if mask is None else mask[wide],
            causal=bool(is_causal) and mask is None,
            scale=module.scale,
            dropout=module.attn_drop.p if module.training else 0.0,
            num_layers=site.num_layers,
            session=session,
            step=session.step,
            biases=[] if bias is None else [bias[wide]],
        )
        session.arrived = True
        out = call.run([method for method in session.methods if method.applies(call)])
        for observe in session.observers:
            observe(call)
        out = out.transpose(1, 2).flatten(2)
        norm = getattr(module, "norm", None)
        out = norm(out) if isinstance(norm, nn.Module) else out
        if gate is not None:
            out = out * gate(x).sigmoid()
        return module.proj_drop(module.proj(out))

    return forward
