"""The H2O cache over a prompt and decoded tokens: what is held after each call, and the attention outputs."""

import torch

from regard.methods import H2O, AttentionCall


def run(case):
    heavy, recent = (case.meta["official_kwargs"][name] for name in ("hh_size", "recent_size"))
    method = H2O(heavy=heavy, recent=recent)
    layer = method.make_layer(None)
    outputs, ends = [], case.args["ends"]
    for begin, end in zip([0, *ends[:-1]], ends):
        q, k, v = (case.inputs[name][:, :, begin:end] for name in "qkv")
        layer.update(k, v)
        call = AttentionCall(module=None, layer=0, q=q, k=k, v=v, causal=True, cache=layer)
        outputs.append(call.run([method]))
    layer.make_room(layer.seen)  # the released code evicts at the end of a call, ours at the beginning of the next
    part = layer.store.parts[0]
    order = part["position"].argsort(1)
    held = {name: part[name].gather(1, order[..., None].expand(-1, -1, 16))[None] for name in "kv"}
    return {"y": torch.cat(outputs, 2)} | held
