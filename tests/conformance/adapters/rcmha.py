"""Paper 162: query, key and value of their own, sequence first; the weights are rebuilt from the layer's parts."""

import regard


def attend(case):
    layer = regard.nn.RelativeConvAttention(24, 3, max_len=16).eval()
    regard.load_official(layer, case.params)
    query, key, value = (case.inputs[name].transpose(0, 1) for name in ("query", "key", "value"))
    mask = case.inputs["mask"].permute(2, 0, 1)[:, None].bool()
    out = layer.attend(query, key, value, mask)
    (q, _), (k, _) = layer._heads("q", query, None), layer._heads("k", key, None)
    scores = (q + layer.query_bias[:, None]) @ k.mT + layer.position_scores(q, 12, 5)
    weights = (scores * 8**-0.5).masked_fill(~mask, -float("inf")).softmax(-1)
    return {"0": out.transpose(0, 1), "attn": weights.permute(2, 3, 0, 1)}
