"""ACT's calibration of attention maps; the authors edit one head (HEAD_NUM), or listed ones, of the first sample alone."""

import torch

from regard.methods import AttentionCall
from regard.methods.edits import ACT
from regard.ops import calibrate_sinks


def on_weights(case):
    """The recorded maps, one head of them calibrated."""
    out = {}
    head = case.args["HEAD_NUM"]
    for name, weights in case.inputs.items():
        made = calibrate_sinks(weights[:, head], case.args["BETA"], case.args["THRES"], variant="released")
        out[name] = weights.index_copy(1, torch.tensor([head]), made[:, None])
    return out


def whole_maps(case):
    """Listed heads of a layer, through a call: zero queries, and the weights' logarithm as the model's own bias."""
    out = {}
    for name, entry in case.args["maps"].items():
        weights = case.inputs[name]
        batch, heads, q_len, kv_len = weights.shape
        call = AttentionCall(
            module=None,
            layer=entry["layer"],
            q=torch.zeros(batch, heads, q_len, 4),
            k=torch.zeros(batch, heads, kv_len, 4),
            v=torch.eye(kv_len).expand(batch, heads, -1, -1),
            causal=True,
            num_layers=32,
        )
        call.biases.append(weights.log())
        method = ACT([(entry["layer"], head) for head in entry["heads"]], case.args["BETA"], case.args["THRES"])
        out[name] = call.run([method])
    return out
