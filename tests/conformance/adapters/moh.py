"""Paper 004: `return_aux=True` gives the balance loss, gradients need a backward pass, LLaMA's rule needs an attention around it."""

import torch

import regard
from regard.ops import query_norm_routing
from regard.ops.attention import attention


def _named(case, out, aux):
    named = {"0": out}
    if aux.balance_loss is not None and case.meta["mode"] == "train":
        named["l_aux"] = aux.balance_loss.reshape(1)
    return named


def layer(case):
    """A MixtureOfHead layer of `kwargs["layer"]` on in.x, with its balance loss where the authors recorded one."""
    kwargs = dict(case.kwargs)
    module = getattr(regard.nn, kwargs.pop("layer"))(**kwargs)
    regard.load_official(module, case.params)
    return _named(case, *module(case.inputs["x"], return_aux=True))


def gradients(case):
    """Gradients of (out * in.grad_output).sum() + balance loss for the input and the three routers."""
    module = regard.nn.MixtureOfHeadAttention(**case.kwargs)
    regard.load_official(module, case.params)
    x = case.inputs["x"].clone().requires_grad_()
    out, aux = module(x, return_aux=True)
    ((out * case.inputs["grad_output"]).sum() + aux.balance_loss).backward()
    router = module.router
    return _named(case, out.detach(), aux) | {
        "grad_x": x.grad,
        "grad_wg.weight": router.routed.weight.grad,
        "grad_wg_0.weight": router.groups.weight.grad,
        "grad_wg_1.weight": router.shared.weight.grad,
    }


def llama(case):
    """Causal rotary attention with the authors' q/k/v/o weights, its heads masked by the query-norm rule."""
    x, weights = case.inputs["x"], case.params
    batch, length, _ = x.shape
    num_heads, num_kv_heads = case.kwargs["num_heads"], case.kwargs["num_kv_heads"]

    def heads(name, count):
        return (x @ weights[f"{name}_proj.weight"].T).reshape(batch, length, count, -1).transpose(1, 2)

    q, k, v = heads("q", num_heads), heads("k", num_kv_heads), heads("v", num_kv_heads)
    half = q.shape[-1] // 2
    angles = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(half) / half)

    def rotary(t):
        a, b = t[..., :half], t[..., half:]
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)

    gates = query_norm_routing(q, shared=case.kwargs["shared"], active=case.kwargs["active"]).gates
    out = attention(rotary(q), rotary(k), v, mask=regard.masks.causal) * gates.unsqueeze(-1)
    gated = out.transpose(1, 2)
    layer = regard.nn.QueryNormHeadAttention(x.shape[2], **case.kwargs, rope_base=10000.0, skip_inactive=True).eval()
    regard.load_official(layer, weights)
    torch.testing.assert_close(layer(x), gated.flatten(2) @ weights["o_proj.weight"].T)
    return {"0": layer(x), "query": q.transpose(1, 2), "gated_heads": gated}
