"""LongHeads' attention layer: a prompt, then tokens one by one, from the authors' parameters to our cache layer."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaModel

from regard.methods import AttentionCall, LongHeads
from regard.methods.caches import LongHeadsLayer
from regard.methods.rotary import RotaryOf


def attention_layer(case):
    kwargs, args = case.meta["official_kwargs"], case.args
    heads, width = kwargs["num_attention_heads"], kwargs["hidden_size"]
    config = LlamaConfig(
        hidden_size=width, num_attention_heads=heads, num_hidden_layers=1, vocab_size=2, intermediate_size=2
    )
    method = LongHeads(
        chunk=kwargs["window_size"], budget=kwargs["atten_length"], start=kwargs["begin_selective_length"]
    )
    rotary = RotaryOf(LlamaModel(config), "LongHeads")
    cache = LongHeadsLayer(method, rotary)
    x, prompt = case.inputs["x"], args.get("prompt", 300)
    outputs = []
    for begin, end in [(0, prompt), *((t, t + 1) for t in range(prompt, x.shape[1]))]:
        q, k, v = (
            F.linear(x[:, begin:end], case.params[f"{name}_proj.weight"]).unflatten(-1, (heads, -1)).transpose(1, 2)
            for name in "qkv"
        )
        position = torch.arange(begin, end)[None]
        q, k = rotary.turn(q, position), rotary.turn(k, position)
        cache.update(k, v)
        call = AttentionCall(nn.Identity(), 0, q, k, v, causal=begin == 0, cache=cache)
        outputs.append(F.linear(call.run([method]).transpose(1, 2).flatten(2), case.params["o_proj.weight"]))
    found = {"prefill": outputs[0], "prefill_tail": outputs[0][:, -8:], "decode": torch.cat(outputs[1:], 1)}
    found["chunk_key"] = cache.features[:, :, : x.shape[1] // method.chunk]
    return {name: tensor for name, tensor in found.items() if name in args.get("outputs", list(found)[1:])}
