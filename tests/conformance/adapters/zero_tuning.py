"""ZeroTuning's weights function, from the authors' `input_len` tuple to our method, both on weights and as a bias inside a call."""

import torch

from regard.methods import AttentionCall
from regard.methods.edits import ZeroTuning
from regard.ops import scale_weights


def method_of(input_len):
    start, end, rate, layers, heads = input_len
    return ZeroTuning(gamma=rate, heads=heads, layers=layers, span=(start, end) if start or end else None)


def on_weights(case):
    out = {}
    for name, entry in case.args.items():
        method = method_of(entry["input_len"])
        weights = case.inputs[entry["input"]]
        treated = method.layers is None or entry["layer_idx"] in method.layers
        keys = method.span or method.key
        out[name] = scale_weights(weights, keys, method.gamma, heads=method.heads) if treated else weights
    return out


def in_a_call(case):
    """The weights recorded as input are reached with zero queries and their logarithm as the model's own bias."""
    out = {}
    for name, entry in case.args.items():
        weights = case.inputs[entry["input"]]
        batch, heads, q_len, kv_len = weights.shape
        q, k = torch.zeros(batch, heads, q_len, 4), torch.zeros(batch, heads, kv_len, 4)
        call = AttentionCall(
            module=None,
            layer=entry["layer_idx"],
            q=q,
            k=k,
            v=torch.eye(kv_len).expand(batch, heads, -1, -1),
            num_layers=32,
        )
        call.biases.append(weights.log())
        method = method_of(entry["input_len"])
        attended = call.run([method] if method.applies(call) else [])
        torch.testing.assert_close(attended, call.weights(), rtol=1e-5, atol=1e-6)
        out[name] = attended
    return out
