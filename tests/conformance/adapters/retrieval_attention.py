"""RetrievalAttention's released decoding: prompt into the cache, then tokens one by one, each pushing one into the index."""

import torch
from torch import nn

from regard.methods import AttentionCall, RetrievalAttention
from regard.methods.caches import RetrievalLayer


def decode(case):
    kwargs = case.meta["official_kwargs"]
    method = RetrievalAttention(
        sink=kwargs["start_size"],
        recent=kwargs["recent_size"],
        top_k=kwargs["top_k"],
        index="exact",
        insert_every=1 if kwargs["insert_db"] else None,
    )
    cache, k, v, q = RetrievalLayer(method), case.inputs["k"], case.inputs["v"], case.inputs["q"]
    prompt = kwargs["prompt"]
    outputs = []
    # queries of the prompt were not recorded and have no influence
    blank = q.new_zeros(*q.shape[:2], prompt, q.shape[3])
    for begin, end in [(0, prompt), *((t, t + 1) for t in range(prompt, k.shape[2]))]:
        keys, values = k[:, :, begin:end], v[:, :, begin:end]
        cache.update(keys, values)
        query = blank if begin == 0 else q[:, :, begin - prompt : end - prompt]
        call = AttentionCall(nn.Identity(), 0, query, keys, values, causal=begin == 0, cache=cache)
        outputs.append(call.run([method]))
    near = cache.near.views()[0]
    return {
        "0": torch.cat(outputs[1:], 2),
        "index_keys": cache.index.keys[0, :, method.sink :],
        "static_keys": torch.cat([cache._sinks(near)[0], near], 2),
    }
