"""Paper 084: the layer and the rotary table that the authors pass into it; a network with a stage without layer scale."""

import regard
from regard.nn.spatial.block_parts import interleaved_rotary_2d


def attention(case):
    module = regard.nn.MagnitudeAwareAttention(**case.kwargs).eval()
    regard.load_official(module, {key[5:]: value for key, value in case.params.items() if key.startswith("attn.")})
    x = case.inputs["x"]
    cos, sin = interleaved_rotary_2d(tuple(x.shape[2:]), module.dim // module.num_heads)
    return {"0": module(x), "cos": cos, "sin": sin}


def network(case):
    module = regard.models.MAViT(**case.kwargs, layer_scales=(1.0, None, 1.0, 1.0)).eval()
    regard.load_official(module, case.params)
    return {"0": module(case.inputs["x"])}
