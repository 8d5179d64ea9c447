"""The authors' attention layer over their memory cache, and their grouped softmax, from recorded hidden states and scores."""

import torch

import regard
from regard.nn import LandmarkAttention, LandmarkCache

SELECT = {"per_token_and_head": "token_head", "max_over_heads": "heads", "max_over_tokens": "tokens"}


def layer_with_cache(case):
    kwargs = case.meta["official_kwargs"]
    layer = LandmarkAttention(kwargs["n_embd"], kwargs["n_head"], kwargs["bias"]).eval()
    wanted = set(layer.state_dict())
    regard.load_official(layer, {key: value for key, value in case.params.items() if key in wanted})
    cache = LandmarkCache(
        kwargs["landmark_id"],
        kwargs["mem_cache_freq"],
        kwargs["cache_topk"],
        SELECT[kwargs["cache_selection_method"]],
        max_blocks=kwargs["mem_cache_size"],
    )
    outputs, begin = {}, 0
    for number in range(sum(name.startswith("x") for name in case.inputs)):
        x = case.inputs[f"x{number}"]
        length = case.args["lengths"][number] if case.args else [11, 3, 14][number]
        ids = cache.begin(case.inputs["ids"][:, begin : begin + length])
        begin += length
        is_landmark = ids == kwargs["landmark_id"]
        outputs |= {f"start{number}": torch.tensor(cache.start), f"is_mem{number}": is_landmark}
        with torch.no_grad():
            outputs[f"y{number}"] = layer(x, is_landmark, memory=cache.layer(0))
    return outputs


def grouped_softmax(case):
    scores = case.inputs["scores"].clone().requires_grad_()
    weights = regard.ops.landmark_weights(scores, case.inputs["is_landmark"])
    (weights * case.inputs["weight"]).sum().backward()
    return {"0": weights.detach(), "grad": scores.grad}
