"""Paper 058: a small GPT-2 around two layers with position temperatures."""

import torch.nn.functional as F

import regard


def gpt(case):
    p, ids = case.params, case.inputs["idx"]
    x = p["transformer.wte.weight" if "transformer.wte.weight" in p else "lm_head.weight"][ids]
    x = x + p["transformer.wpe.weight"][: ids.shape[1]]
    for index in range(2):
        start = f"transformer.h.{index}."
        own = {name.removeprefix(start): tensor for name, tensor in p.items() if name.startswith(start)}
        layer = regard.nn.SelectiveAttention(24, 3, bias=True).eval()
        attn = {name.removeprefix("attn."): tensor for name, tensor in own.items() if name.startswith("attn.")}
        regard.load_official(layer, attn)
        x = x + layer(F.layer_norm(x, (24,), own["ln_1.weight"], own["ln_1.bias"]))
        normed = F.layer_norm(x, (24,), own["ln_2.weight"], own["ln_2.bias"])
        hidden = F.gelu(F.linear(normed, own["mlp.c_fc.weight"], own["mlp.c_fc.bias"]))
        x = x + F.linear(hidden, own["mlp.c_proj.weight"], own["mlp.c_proj.bias"])
    x = F.layer_norm(x, (24,), p["transformer.ln_f.weight"], p["transformer.ln_f.bias"])
    return {"0": x @ p["lm_head.weight"].T}
