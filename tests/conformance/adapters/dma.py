"""DMA: a whole small Doge built around our layer, and the op with its masks."""

import torch
from torch.nn import functional as F

import regard
from regard.ops import dynamic_mask_attention
from regard.ops.select import relu_bias_mask, topk_bias_mask


def doge(case):
    options, params = case.meta["official_kwargs"], case.params
    eps, padding = options["rms_norm_eps"], case.inputs["attention_mask"]
    x = F.embedding(case.inputs["input_ids"], params["embed_tokens.weight"])
    out = {}
    for number in range(options["num_hidden_layers"]):
        own = {
            name.removeprefix(f"layers.{number}."): value
            for name, value in params.items()
            if name.startswith(f"layers.{number}.")
        }
        layer = regard.nn.DynamicMaskAttention(
            options["hidden_size"], options["num_attention_heads"], options["num_key_value_heads"],
            head_dim=options["head_dim"], keep=options["keep_window_size"], bias=options["attention_bias"], eps=eps,
        )  # fmt: skip
        mine = {n.removeprefix("self_attn."): t for n, t in own.items() if n.startswith("self_attn.")}
        regard.load_official(layer, mine)
        y = layer(_norm(x, own["input_layernorm.weight"], eps), padding_mask=padding)
        x = own["input_residual"] * x + y
        y = _norm(x, own["post_attention_layernorm.weight"], eps)
        gate, up = (F.linear(y, own[f"mlp.{n}_proj.weight"], own[f"mlp.{n}_proj.bias"]) for n in ("gate", "up"))
        y = F.linear(F.silu(gate) * up, own["mlp.down_proj.weight"], own["mlp.down_proj.bias"])
        x = own["post_attention_residual"] * x + y
        if number == 0:
            out["hidden1"] = x
    return out | {"last_hidden_state": _norm(x, params["norm.weight"], eps)}


def _norm(x, weight, eps):
    return F.rms_norm(x, weight.shape, weight, eps)


def op(case):
    x, out = case.inputs, {}
    given = (x["q"], x["k"], x["v"])
    for keep in (1, 4, 15):
        for name, bias, causal in (("causal", x["bias"], True), ("free", x["bias"], False), ("full", x["full"], True)):
            found = dynamic_mask_attention(*given, bias, keep, causal=causal)
            out[f"{name}_{keep}"] = found.transpose(1, 2)
    rows, length = x["full"].shape[2:]
    causal = torch.ones(rows, length, dtype=torch.bool).tril(length - rows)
    bias = x["bias"][:, :, None].expand(-1, -1, rows, -1)
    for block in (1, 3, 4):
        out[f"mask_topk_{block}"] = topk_bias_mask(bias, 7, causal, block)
        out[f"mask_relu_{block}"] = relu_bias_mask(bias, causal, block)
    return out | {"mask_pad": topk_bias_mask(x["full"], 6, x["pad"][:, None, None])}
