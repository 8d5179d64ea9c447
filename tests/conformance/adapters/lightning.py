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


def language_model(case):
    """The whole model: prefill (with padding), decoding token by token with all states, and the gradients of its training branch."""
    model = regard.models.TransNormerLLM.from_config(case.meta["official_kwargs"]).eval()
    regard.load_official(model, case.params)
    ids, prefill = case.inputs["ids"], case.args["prefill"]
    with torch.no_grad():
        out, state = model(ids[:, :prefill], return_state=True, padding_mask=case.inputs.get("padding"))
        named = {"prefill": out} | {f"kv{i}": one.memory.kv for i, one in enumerate(state.mixers)}
        decoded = []
        for token in ids[:, prefill:].split(1, dim=1):
            out, state = model(token, state, return_state=True)
            decoded.append(out)
    named |= {"decoded": torch.cat(decoded, dim=1)}
    named |= {f"kv{i}_after": one.memory.kv for i, one in enumerate(state.mixers)}
    if "padding" in case.inputs:
        return named
    named["train"] = model.train()(ids)
    named["loss"] = torch.nn.functional.cross_entropy(named["train"][:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    named["loss"].backward()
    blocks = model.blocks
    found = {"d_embed": model.embedding.weight, "d_qkvu": blocks[1].mixer.qkvu_proj.weight}
    found |= {"d_theta": blocks[0].mixer.lrpe.theta, "d_l1": blocks[2].mlp.l1.weight}
    return named | {name: parameter.grad for name, parameter in found.items()}
