"""Paper 074: a decoder layer with gated attention, seven tokens at once and then three one by one."""

import torch
import torch.nn.functional as F

import regard
from regard.nn import rotary_table


def plain(case):
    """No gate. (None has no word in TOML.)"""
    layer = regard.nn.GatedAttention(**case.kwargs, gate=None).eval()
    regard.load_official(layer, case.params)
    return {"0": layer(case.inputs["x"])}


def decoder_layer(case):
    x, p = case.inputs["hidden_states"], case.params
    cos, sin = rotary_table(torch.arange(x.shape[1]), 8, 500.0)
    torch.testing.assert_close(cos.expand_as(case.inputs["cos"]), case.inputs["cos"])
    torch.testing.assert_close(sin.expand_as(case.inputs["sin"]), case.inputs["sin"])
    layer = regard.nn.GatedAttention(20, 4, num_kv_heads=2, head_dim=8, bias=True, rope_base=500.0).eval()
    own = "self_attn."
    regard.load_official(layer, {name.removeprefix(own): t for name, t in p.items() if name.startswith(own)})
    exists = torch.isclose(case.inputs["attention_mask"][:, 0, -1], torch.tensor(0.0))  # what the last token sees
    state, outs = None, []
    for piece, there in zip(x.split([7, 1, 1, 1], dim=1), exists.split([7, 1, 1, 1], dim=1)):
        normed = F.rms_norm(piece, (20,), p["input_layernorm.weight"], 1e-5)
        mixed, state = layer(normed, padding_mask=there, state=state, return_state=True)
        y = piece + mixed
        normed = F.rms_norm(y, (20,), p["post_attention_layernorm.weight"], 1e-5)
        hidden = F.silu(normed @ p["mlp.gate_proj.weight"].T) * (normed @ p["mlp.up_proj.weight"].T)
        outs.append(y + hidden @ p["mlp.down_proj.weight"].T)
    return {"0": torch.cat(outs, dim=1), "k_cache": state.k, "v_cache": state.v}
