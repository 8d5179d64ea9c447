"""S2-Attn as the SinkLoRA repository released it: from the authors' attention-layer parameters to our method in training."""

import torch
from torch import nn
from torch.nn import functional as F

from regard import SinkLoRA
from regard.methods import AttentionCall


def rotate(x, theta=10000.0):
    """Rotary embedding in the half-split layout; x (B, H, N, D), positions from 0."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[2])[:, None] * theta ** (-torch.arange(half) / half)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([x[..., :half] * cos - x[..., half:] * sin, x[..., half:] * cos + x[..., :half] * sin], -1)


def layer(x, params, prefix, options):
    q, k, v = (
        F.linear(x, params[f"{prefix}{name}_proj.weight"]).unflatten(-1, (-1, options["head_dim"])).transpose(1, 2)
        for name in "qkv"
    )
    call = AttentionCall(nn.Identity().train(), 0, rotate(q), rotate(k), v, causal=True, num_layers=1)
    out = call.run([SinkLoRA(group_ratio=options["group_size_ratio"], variant="released")])
    return F.linear(out.transpose(1, 2).flatten(2), params[f"{prefix}o_proj.weight"])


def thirds(case):
    return {"0": layer(case.inputs["x"], case.params, "", case.meta["official_kwargs"])}


def cases(case):
    out = {}
    for name, options in case.meta["official_kwargs"].items():
        x = case.inputs[f"{name}.x"].clone().requires_grad_()
        y = layer(x, case.params, f"{name}.", options)
        (y * case.inputs[f"{name}.g"]).sum().backward()
        out[name], out[f"{name}.dx"] = y.detach(), x.grad
    return out
