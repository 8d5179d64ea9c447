"""Paper 051: the TransNormerLLM mixer with its cache, prefill first, then one token at a time."""

import torch

import regard


def mixer(case):
    layer = regard.nn.LightningAttention(**case.kwargs, variant="transnormer")
    regard.load_official(layer, case.params)
    x, prefill = case.inputs["x"], case.args["prefill"]
    out, state = layer(x[:, :prefill], padding_mask=case.inputs.get("padding"), return_state=True)
    named = {"0": out, "kv": state.memory.kv}
    if case.args["decode"]:
        decoded = []
        for t in range(prefill, x.shape[1]):
            y, state = layer(x[:, t : t + 1], state=state, return_state=True)
            decoded.append(y)
        named |= {"decoded": torch.cat(decoded, dim=1), "kv_after": state.memory.kv}
    return named
