"""Paper 015: prefill and then token by token, with the state in the authors' layout; fla's function of queries and keys."""

import torch

import regard
from regard.ops import linear_attention
from regard.ops.state import TaylorExp


def _decode(module, x):
    """y of all at once; of all but three, and of these three one by one; the states after either."""
    prefill, state = module(x[:, :-3], return_state=True)
    first, steps = state, []
    for token in x[:, -3:].split(1, dim=1):
        y, state = module(token, state=state, return_state=True)
        steps.append(y)
    return {"y": module(x), "prefill": prefill, "steps": torch.cat(steps, dim=1)}, first, state


def linear(case):
    given = {"dim": case.meta["official_kwargs"]["d_model"], "num_heads": case.meta["official_kwargs"]["num_heads"]}
    given |= {
        key: case.meta["official_kwargs"][key]
        for key in ("feature_dim", "head_dim")
        if key in case.meta["official_kwargs"]
    }
    x = case.inputs["x"]
    module = regard.nn.BasedLinearAttention(**given, compact=False).eval()
    regard.load_official(module, case.params)
    out, first, last = _decode(module, x)
    for name, state in (("prefill", first), ("final", last)):
        out[f"kv_{name}"] = state.memory.kv.mT[:, :, None]
        out[f"k_{name}"] = state.memory.normaliser[:, :, None, None]
    # the compact features are the default: they must give the same outputs from a smaller state
    compact = regard.nn.BasedLinearAttention(**given).eval()
    regard.load_official(compact, case.params)
    again, _, state = _decode(compact, x)
    assert state.memory.kv.shape[2] <= last.memory.kv.shape[2]
    for name, tensor in again.items():
        torch.testing.assert_close(tensor, out[name], rtol=1e-4, atol=1e-5)
    return out


def conv(case):
    names = {"d_model": "dim", "expand_proj": "expand", "use_bias": "bias", "kernel_size": "kernel_size"}
    module = regard.nn.GatedShortConv(
        **{
            ours: case.meta["official_kwargs"][key]
            for key, ours in names.items()
            if key in case.meta["official_kwargs"]
        }
    )
    regard.load_official(module.eval(), case.params)
    if "u" in case.inputs:
        return {"0": module(case.inputs["u"])}
    return _decode(module, case.inputs["x"])[0]


def sliding(case):
    given = case.meta["official_kwargs"]
    rope = given.get("rotary_emb_dim", 0)
    module = regard.nn.BasedSlidingAttention(
        given["embed_dim"], given["num_heads"], window_size=given["window_size"], num_kv_heads=given.get("num_heads_kv"),
        rope_base=10000.0 if rope else None, rope_dims=rope or None,
        bias=given.get("qkv_proj_bias", True), out_bias=given.get("out_proj_bias", True),
    ).eval()  # fmt: skip
    regard.load_official(module, case.params)
    x = case.inputs["x"]
    whole, pieces, state = module(x), [], None
    for piece in x.split([4, 1, 1, x.shape[1] - 6], dim=1):
        y, state = module(piece, state=state, return_state=True)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-5)
    return {"0": whole}


def fla(case):
    q, k, v = (case.inputs[name] for name in "qkv")
    return {
        "norm": linear_attention(q, k, v, feature_map=TaylorExp(), normalize=True, eps=1e-6),
        "plain_scale": linear_attention(q, k, v, feature_map=TaylorExp(scale=0.7)),
    }


def network(case):
    given = case.meta["official_kwargs"]
    model = regard.models.BasedLM(
        given["vocab_size"], given["n_embd"], given["n_layer"], given["n_head"], feature_dim=given["feature_dim"],
        linear_layers=given["alt_mixer_layers"], window_layers=given["alt_mixer_2_layers"],
        window_size=given["window_size"], hidden=given["n_inner"],
    ).eval()  # fmt: skip
    regard.load_official(model, case.params)
    ids, state, pieces = case.inputs["ids"], None, []
    for piece in ids.split([9, 1, 7], dim=1):
        logits, state = model(piece, state, return_state=True)
        pieces.append(logits)
    whole, hidden = model(ids), []
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-4)
    hook = model.norm.register_forward_hook(lambda module, args, out: hidden.append(out))
    model(ids)
    hook.remove()
    return {"logits": whole, "hidden": hidden[0]}
