"""DuoAttention's released deployment and training forwards, from the authors' attention-layer parameters to our caches and ops."""

import torch
from torch.nn import functional as F

from regard.losses.duo_gates import duo_mixed_attention
from regard.methods import AttentionCall, DuoAttention
from regard.methods.caches import RaggedLayer
from regard.ops import attention, masks


def rotate(x, position, theta=10000.0):
    """Rotary embedding in the half-split layout; x (B, H, N, D), position (N,)."""
    half = x.shape[-1] // 2
    angle = position[:, None] * theta ** (-torch.arange(half) / half)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([x[..., :half] * cos - x[..., half:] * sin, x[..., half:] * cos + x[..., :half] * sin], -1)


def project(case, x, position):
    dim = case.meta["official_kwargs"]["head_dim"]
    q, k, v = (
        F.linear(x, case.params[f"{name}_proj.weight"]).unflatten(-1, (-1, dim)).transpose(1, 2) for name in "qkv"
    )
    return rotate(q, position), rotate(k, position), v


def deploy(case):
    kwargs = case.meta["official_kwargs"]
    gates = case.inputs["full_attention_heads"][None]
    method = DuoAttention(budget=0.5, gates=gates, sink=kwargs["sink_size"], recent=kwargs["recent_size"])
    cache = RaggedLayer(None, method.sink, method.recent)
    outputs, seen = {}, 0
    for number, x in enumerate(case.inputs["x"].split([11, 6, 1, 1, 1, 3], dim=1)):
        position = torch.arange(seen, seen + x.shape[1])
        q, k, v = project(case, x, position)
        cache.update(k, v)
        call = AttentionCall(module=None, layer=0, q=q, k=k, v=v, causal=True, cache=cache)
        out = call.run([method]).transpose(1, 2).flatten(2)
        outputs[f"y{number}"] = F.linear(out, case.params["o_proj.weight"])
        seen += x.shape[1]
    outputs["full_kv"] = torch.cat(cache.full.views())
    stored = [torch.cat([cache.stream.sinks[i], cache.stream.tail[i]], 2) for i in range(2)]
    outputs["streaming_kv"] = torch.cat(stored)
    return outputs


def two_way(case):
    kwargs = case.meta["official_kwargs"]
    teacher, student = case.inputs["x"].chunk(2)
    position = torch.arange(teacher.shape[1])
    q, k, v = project(case, teacher, position)
    full = attention(q, k, v, mask=masks.causal).detach()
    gates = case.inputs["gates"].clone().requires_grad_()
    mixed = duo_mixed_attention(
        *project(case, student, position), gates, sink=kwargs["sink_size"], recent=kwargs["recent_size"], full=full
    )
    out = torch.cat([full, mixed]).transpose(1, 2).flatten(2)
    out = F.linear(out, case.params["o_proj.weight"])
    (out * case.inputs["weight"]).sum().backward()
    return {"0": out.detach(), "grad_gates": gates.grad}
