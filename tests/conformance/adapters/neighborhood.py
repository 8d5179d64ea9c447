"""Neighborhood attention: the layers of NAT and DiNAT with relative position biases, and the gradients of these."""

import torch

from regard import load_official
from regard.nn import NeighborhoodAttention2D


def nat(case):
    found = {}
    for name, kwargs in case.meta["official_kwargs"].items():
        layer = NeighborhoodAttention2D(**kwargs, rel_pos_bias=True, pad_small=True)
        params = {
            key.removeprefix(f"{name}."): value for key, value in case.params.items() if key.startswith(f"{name}.")
        }
        load_official(layer, params)
        x = case.inputs[f"{name}_x"].clone().requires_grad_()
        with torch.enable_grad():
            out = layer(x)
            grads = torch.autograd.grad(out, (x, layer.rel_pos_bias), case.inputs[f"{name}_g"])
        found |= {name: out.detach(), f"{name}_dx": grads[0], f"{name}_drpb": grads[1]}
    return found
