"""Paper 180: the layer between the authors' norm and residual (with gradients), its decoding, the gated recurrence, whole models."""

import torch
import torch.nn.functional as F

import regard


def _around(case, layer):
    """The authors' layer: x + layer(norm(x)). Returns it, with the norm's weight as a leaf."""
    regard.load_official(layer, case.params)
    weight = case.params["input_norm.weight"].clone().requires_grad_()

    def call(x, **state):
        made = layer(F.rms_norm(x, x.shape[-1:], weight, 1e-6), **state)
        return (x + made[0], made[1]) if state.get("return_state") else x + made

    return call, weight


def _layer(case):
    given = case.meta["official_kwargs"]
    return regard.nn.RATAttention(
        given["d_model"], given["num_head"], chunk_size=given["chunk_size"], num_groups=given["ngroups"]
    )


def layer(case):
    module = _layer(case)
    call, weight = _around(case, module)
    x = case.inputs["x"].clone().requires_grad_()
    with torch.enable_grad():
        y = call(x)
        named = dict(module.named_parameters())
        grads = torch.autograd.grad(
            (y * case.inputs["grad_out"]).sum(), [x, weight, *named.values()], allow_unused=True
        )
    # with one chunk for all, queries and keys are read by nothing: their part of in_proj has zero gradients
    return {"0": y, "dx": grads[0], "d_input_norm.weight": grads[1]} | {
        f"d_{name}": grad for name, grad in zip(named, grads[2:])
    }


def _steps(call, x, prefill):
    before, state = call(x[:, :prefill], state=None, return_state=True)
    made = []
    for token in x[:, prefill:].split(1, dim=1):
        y, state = call(token, state=state, return_state=True)
        made.append(y)
    return before, torch.cat(made, dim=1), state


def decode(case):
    call, _ = _around(case, _layer(case))
    before, steps, state = _steps(call, case.inputs["x"], 6)
    last_k, last_v = state.last_k.flatten(1)[:, None], state.last_v.flatten(1)[:, None]
    # theirs keeps the running state, turned, behind the whole chunks; ours turns it when its chunk is full
    dim = state.k.shape[3]
    table = regard.nn.rotary_table(torch.tensor([state.k.shape[2]]), dim)
    running = regard.nn.rotate(state.last_k[:, :, None], table)
    k_cache, v_cache = torch.cat((state.k, running), dim=2), torch.cat((state.v, state.last_v[:, :, None]), dim=2)
    out = {"prefill": before, "steps": steps, "last_k": last_k, "last_v": last_v}
    return out | {"k_cache": k_cache, "v_cache": v_cache}


def recurrence(case):
    call, _ = _around(case, regard.nn.GatedRecurrence(case.meta["official_kwargs"]["d_model"]))
    x = case.inputs["x"]
    before, steps, state = _steps(call, x, 6)
    return {"0": call(x), "prefill": before, "steps": steps, "h": state.h[:, None]}


def model(case):
    given = case.meta["official_kwargs"]
    names = {"chunk_size": "chunk_size", "ngroups": "num_groups", "window_size": "window"}
    options = {ours: given[theirs] for theirs, ours in names.items()}
    lm = regard.models.RATLM(
        given["vocab_size"],
        given["d_model"],
        given["num_layers"],
        given["num_head"],
        pattern=given["cells"],
        mlp_ratio=4,
        **options,
    ).eval()
    regard.load_official(lm, case.params)
    ids = case.inputs["ids"]
    whole, state, made = lm(ids), None, []
    for piece in ids.split([5, 1, 1, 1, 9, 7], dim=1):  # read on from a state: the same logits
        logits, state = lm(piece, state, return_state=True)
        made.append(logits)
    torch.testing.assert_close(torch.cat(made, dim=1), whole, rtol=1e-4, atol=1e-5)
    return {"0": whole}
