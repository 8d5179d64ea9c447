"""Drives a cache layer by hand: random queries, keys and values in any chunks, without a model."""

from __future__ import annotations

import torch
from torch import nn

from regard import masks
from regard.methods import AttentionCall


def sequence(batch=2, heads=4, kv_heads=2, length=40, dim=8, dtype=torch.float64, seed=0):
    """q (B, H, N, D), k and v (B, Hkv, N, D)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, length, dim), (batch, kv_heads, length, dim), (batch, kv_heads, length, dim)]
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def feed(layer, qkv, begin, end, starts=None, spans=None):
    """The outputs (B, H, end - begin, D) of tokens [begin, end); `starts`: left padding of each row."""
    q, k, v = (t[:, :, begin:end] for t in qkv)
    mask = None
    if starts is not None and any(starts):
        start = torch.tensor(starts)
        structure = masks.causal & masks.padding(torch.full_like(start, end), start=start.clamp(max=end))
        mask = structure.materialize(end - begin, end, batch=len(starts), q_offset=begin)
        mask.start, mask.structure = start, structure
    k, v = layer.update(k, v)
    session = None
    if spans is not None:
        session = type("Spans", (), {"spans": spans})()
    call = AttentionCall(
        module=nn.Identity(), layer=0, q=q, k=k, v=v, mask=mask, causal=True, cache=layer, num_layers=1, session=session
    )
    with torch.no_grad():
        return layer.attend(call)


def run(layer, qkv, cuts, starts=None, spans=None):
    """Outputs of the whole sequence, fed in the chunks between `cuts`."""
    pairs = zip([0, *cuts[:-1]], cuts)
    return torch.cat([feed(layer, qkv, a, b, starts, spans) for a, b in pairs], 2)


def held(layer):
    """Positions held, (row, kv head) -> sorted list."""
    store = layer.store
    found = {}
    for part in store.parts:
        for member, length, position in zip(part.members.tolist(), part.length.tolist(), part["position"]):
            found[divmod(member, store.heads)] = sorted(position[:length].tolist())
    return found
