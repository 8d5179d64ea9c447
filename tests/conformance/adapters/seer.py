"""SeerAttention: gates, the masks made of their scores, and the decoding gate step by step."""

import torch

import regard
from regard.methods.sparse.seer_attention_r import GateKeys
from regard.ops.select.gate import decode_block_map, gate_block_map


def _swap(x):
    return x.transpose(1, 2)


def _build(name, options, params):
    gate = regard.nn.AttentionGate.of_type(
        name, options["num_q_head"], options["num_k_head"], options["in_channel_size"], gate_dim=options["hidden_size"],
        block_size=options["block_size"], force_double=options.get("force_double", False),
    )  # fmt: skip
    regard.load_official(gate, params)
    return gate.eval()


def gate(case):
    x, options = case.inputs, case.meta["official_kwargs"]
    module = _build(options.get("class", "Qavg_Kmaxminavg"), options, case.params)
    given = (_swap(x["q"]), _swap(x["k"]), (x["cos"], x["sin"]), x["attention_mask"])
    out = {"logits": module(*given), "probs": module(*given, softmax=True)}
    rules, last = (_FIRST, "lastdense") if "class" in options else (_SECOND, "last")
    for name, rule in rules.items():
        out[f"mask_{name}"] = gate_block_map(out["probs"], **rule)
        out[f"mask_{name}_{last}"] = gate_block_map(out["probs"], dense_last=2, **rule)
    return out


_FIRST = {"threshold": {"threshold": 0.17}, "ratio": {"ratio": 0.6}}
_SECOND = {
    "ratio_30": {"ratio": 0.3},
    "ratio_75": {"ratio": 0.75},
    "threshold_5": {"threshold": 0.05},
    "threshold_20": {"threshold": 0.2},
}


def types(case):
    x, out = case.inputs, {}
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    for name in ("Qmaxminavg_Kmax", "Qmin_Kminavg", "Qmax_Kavg", "Qmaxmin_Kmaxminavg"):
        own = {key.removeprefix(name + "."): value for key, value in case.params.items() if key.startswith(name + ".")}
        module = _build(name, case.meta["official_kwargs"], own)
        out[name] = module(_swap(x["q"]), _swap(x["k"]), (x["cos"], x["sin"]), mask)
    return out


def decode(case):
    options, x = case.meta["official_kwargs"], case.inputs
    pool, norm = options["q_head_pooling_type"], options["use_qk_norm"]
    gate = regard.nn.DecodeAttentionGate(
        options["num_q_head"], options["num_k_head"], options["model_hidden_size"], options["gate_hidden_size"],
        options["block_size"], q_head_pool=pool, qk_norm=norm,
    )  # fmt: skip
    regard.load_official(gate, case.params)
    rope = _rope(options["gate_hidden_size"]) if case.args["rope"] else None
    q, k = _swap(x["q"]), _swap(x["k"])
    prompt, out = case.args["prompt"], {}
    running = GateKeys(gate, rope, variant="released")
    running.append(k[:, :, :prompt])
    for n in range(prompt + 1, k.shape[2] + 1):
        running.append(k[:, :, n - 1 : n])
        probs = running.scores(q[:, :, n - 1 : n], n - 1).softmax(-1)[:, :, 0]
        out[f"threshold_{n}"] = decode_block_map(probs, threshold=0.2)
        out[f"budget_{n}"] = decode_block_map(probs, topk=2)
    return out | {"k_compressed": running.values.transpose(1, 2)}


def _rope(dim):
    frequency = 1 / 10000 ** (torch.arange(0, dim, 2) / dim)

    def rope(positions):
        angle = (positions[..., None].float() * frequency).repeat(*[1] * positions.dim(), 2)
        return angle.cos(), angle.sin()

    return rope
