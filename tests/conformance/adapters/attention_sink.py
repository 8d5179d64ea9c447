"""Paper 088: the sink metric for every key, and attention layers whose map the authors hand to it."""

import torch

import regard
from regard.nn import rotary_table


def metric(case):
    scores = case.inputs["attention_scores"]
    return {f"eps_{eps}": regard.lens.sink_rate(scores, eps, key=None) for eps in (0.1, 0.2, 0.3)}


def layer(case):
    made = regard.nn.SimilarityAttention(**case.kwargs, rope_base=10000.0).eval()
    regard.load_official(made, case.params)
    if "cos" in case.inputs:  # halves, one angle a pair
        rows = torch.arange(len(case.inputs["cos"]))
        cos, sin = rotary_table(rows, 2 * case.inputs["cos"].shape[1], 10000.0)
        torch.testing.assert_close(cos.chunk(2, -1)[0], case.inputs["cos"])
        torch.testing.assert_close(sin.chunk(2, -1)[0], case.inputs["sin"])
    x = case.inputs["x"].requires_grad_()
    y = made(x)
    weights = made.attention_weights(x, slots=True)
    if made.slot:  # theirs has a dummy query first, which sees the slot alone
        dummy = torch.zeros_like(weights[:, :, :1])
        dummy[..., 0] = 1.0
        weights = torch.cat((dummy, weights), 2)
    out = {"0": y, "attn": weights}
    if "grad_out" in case.inputs:
        out["dx"] = torch.autograd.grad(y, x, case.inputs["grad_out"])[0]
    return out
