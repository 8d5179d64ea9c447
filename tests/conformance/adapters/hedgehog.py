"""Paper 085: feature maps, whole layers (prefill, decoding, padding), and the loss of attention transfer with its gradients."""

import torch

import regard
from regard.losses import attention_transfer_loss
from regard.nn import HedgehogAttention, LearnedFeatureMap
from regard.ops import linear_attention, linear_attention_weights


def _layer(case, mode, feature_dim, base, tie):
    dim, heads, kv_heads, head_dim, theta = base
    sizes = {"num_kv_heads": kv_heads, "key_dim": heads * head_dim, "head_dim": head_dim, "rope_base": theta}
    layer = HedgehogAttention(dim, heads, mode=mode, feature_dim=feature_dim, tie=tie, **sizes).eval()
    regard.load_official(layer, case.params)
    return layer


def decode(case):
    layer = _layer(case, "stable_exp", 5, case.meta["official_kwargs"]["base"], tie=True)
    x, mask = case.inputs["hidden_states"], case.inputs["attention_mask"]
    out = {}
    out["prefill"], state = layer(x[:, :9], padding_mask=mask[:, :9], return_state=True)
    out["kv_prefill"], out["k_prefill"] = state.memory.kv, state.memory.normaliser[:, :, None]
    steps = []
    for token in x[:, 9:].split(1, dim=1):
        y, state = layer(token, state=state, return_state=True)
        steps.append(y)
    out["steps"] = torch.cat(steps, dim=1)
    out["kv_final"], out["k_final"] = state.memory.kv, state.memory.normaliser[:, :, None]
    return out


def gqa(case):
    given = case.meta["official_kwargs"]
    layer = _layer(case, "softmax", given["feature_dim"], given["base"], tie=False)
    x = case.inputs["x"].clone().requires_grad_()
    y = layer(x)
    (y * case.inputs["w"]).sum().backward()
    maps = layer.maps
    return {
        "y": y,
        "dx": x.grad,
        "d_map_k": maps.k.weight.grad,
        "d_map_q": maps.q.weight.grad,
        "d_k_proj": layer.k_proj.weight.grad,
    }


# their names of an activation with both halves, or with the first alone
_ACTIVATIONS = {
    "softmax": {"activation": "symmetric_softmax"},
    "softmax_half": {"activation": "softmax"},
    "exp": {"activation": "stable_exp_pair", "bias": "head"},
    "exp_half": {"activation": lambda x: regard.ops.state.feature_maps.stable_exp_pair(x)[..., : x.shape[-1]]},
    "elu": {"activation": "elu+1", "skip": True, "feature_dim": 6},
    "relu": {"activation": "relu", "bias": "head", "eps": 1e-3},
    "adapter": {"activation": "symmetric_softmax", "hidden": 4, "feature_dim": 6},
}


def maps(case):
    out = {}
    for name, options in _ACTIVATIONS.items():
        one = LearnedFeatureMap(3, 6, **{"feature_dim": 7, **options})
        params = {k.removeprefix(f"{name}."): v for k, v in case.params.items() if k.startswith(f"{name}.")}
        regard.load_official(one, params)
        x = case.inputs["x"].clone().requires_grad_()
        y = one(x)
        (y * case.inputs[f"w_{name}"]).sum().backward()
        out[name], out[f"dx_{name}"] = y, x.grad
    return out


def transfer(case):
    out, pairs = {}, []
    for i, activation in enumerate(("symmetric_softmax", "stable_exp_pair")):
        both = []
        for one in "qk":
            made = LearnedFeatureMap(4, 6, 5, activation=activation)
            key = f"{i}.feature_map_{one}."
            regard.load_official(made, {k.removeprefix(key): v for k, v in case.params.items() if k.startswith(key)})
            both.append(made)
        q, k, v = (case.inputs[f"{name}{i}"] for name in "qkv")
        weights = linear_attention_weights(q, k, feature_map=tuple(both), eps=1e-12)
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~torch.ones(9, 9, dtype=torch.bool).tril(), -torch.inf)
        true = scores.softmax(-1)
        y = linear_attention(q, k, v, feature_map=tuple(both), normalize=True, eps=1e-12)
        pairs.append((weights, true, y, true @ v, both))
        out |= {f"pred{i}": weights, f"true{i}": true, f"y_pred{i}": y, f"y_true{i}": true @ v}
    learned = [both[which].weight for which in (0, 1) for *_, both in pairs]
    for name, xent, mse in (("xent", 1.0, 0.0), ("mse", 0.0, 1000.0), ("both", 1.0, 1000.0)):
        losses = [attention_transfer_loss(a, b, y, t, xent=xent, mse=mse) for a, b, y, t, _ in pairs]
        out[name] = torch.stack(losses).mean()
        found = torch.autograd.grad(out[name], learned, retain_graph=True)
        out |= {f"{name}_{n}": g for n, g in zip(("dq0", "dq1", "dk0", "dk1"), found)}
    return out


def fla(case):
    """Their layer is one `nn.Linear` for all heads."""
    one = LearnedFeatureMap(1, 6, activation="joint_softmax", bias="feature")
    with torch.no_grad():
        one.weight.copy_(case.params["layer.weight"].T[None])
        one.bias.copy_(case.params["layer.bias"].view(1, 1, 1, -1))
    x = case.inputs["x"].clone().requires_grad_()
    y = one(x)
    (y * case.inputs["w"]).sum().backward()
    return {"y": y, "dx": x.grad}
