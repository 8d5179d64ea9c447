"""Paper 115: AgentSD's token merging (sets compared sorted, and after unmerging), and a self-attention on merged tokens with agents."""

import torch
from torch import nn

from regard.integrations.agent_diffusion import merged_attention
from regard.ops import token_merge


def merge(case):
    metric, x, out = case.inputs["metric"], case.inputs["x"], {}
    settings = {"topleft": (0.4, 0.85, (2, 2), False), "random": (0.5, 0.8, (2, 3), True)}
    for name, (ratio, agent_ratio, stride, random) in settings.items():
        generator = torch.Generator().manual_seed(5)
        made = token_merge(metric, (9, 10), ratio, agent_ratio, stride=stride, random=random, generator=generator)
        merged, agents = made.merge(x), made.agents(x)
        out[f"{name}.round"] = made.unmerge(2 * merged.tanh())
        out[f"{name}.merged_sorted"] = merged.sum(-1).sort(-1).values
        out[f"{name}.agents_sorted"] = torch.zeros(1) if agents is None else agents.sum(-1).sort(-1).values
    layer = nn.Module()
    layer.heads, layer.to_out = 2, nn.Sequential(nn.Linear(12, 12), nn.Dropout(0.0))
    for name in ("to_q", "to_k", "to_v"):
        setattr(layer, name, nn.Linear(12, 12, bias=False))
    layer.load_state_dict(case.params)
    block = token_merge(case.inputs["h"], (9, 10), 0.4, 0.85)
    return out | {"block": merged_attention(case.inputs["y"], block, layer)}
