"""FlashAttention: `attention_ref` with each of the recorded options, outputs and gradients; packed sequences."""

import torch

from regard.ops import attention_varlen, flash_attention, reference


def _gradients(case, backend, run):
    """out, dq, dk, dv under their recorded names."""
    leaves = [case.inputs[name].clone().requires_grad_() for name in "qkv"]
    with torch.enable_grad():
        out = run(*leaves, backend)
        grads = torch.autograd.grad(out, leaves, case.inputs["g"])
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *grads)))


def _options(case, kwargs):
    named = {key: case.inputs[value] if isinstance(value, str) else value for key, value in kwargs.items()}
    if kwargs.get("attn_bias") == "slopes":  # their helper makes a bias of the slopes; ours takes them
        named["alibi_slopes"] = named.pop("attn_bias")
    return named


def _run(case, backend):
    found = {}
    for name, kwargs in case.meta["official_kwargs"].items():
        options = _options(case, kwargs)
        if backend == "auto" or "dropout_mask" not in options:
            parts = _gradients(case, backend, lambda q, k, v, b, o=options: flash_attention(q, k, v, backend=b, **o))
            found |= {f"{name}.{part}": value for part, value in parts.items()}
        if "dropout_mask" in options:  # their weights are those before dropout
            q, k = (case.inputs[part].transpose(1, 2) for part in "qk")
            scores = reference.attention_scores(q, k, q_offset=0, scale=q.shape[-1] ** -0.5)
            found[f"{name}.attn"] = reference.softmax_with_lse(scores)[0]
    return found


def options(case):
    return _run(case, "auto")


def options_tiled(case):
    return _run(case, "tiles")


def varlen(case):
    found = {}
    starts = case.inputs["cu_q"], case.inputs["cu_k"]
    for name, kwargs in case.meta["official_kwargs"].items():
        run = lambda q, k, v, b, o=kwargs: attention_varlen(q, k, v, *starts, backend=b, **o)  # noqa: E731
        parts = _gradients(case, "auto", run)
        tiled = _gradients(case, "tiles", run)
        for part, value in parts.items():
            torch.testing.assert_close(tiled[part], value, rtol=1e-4, atol=1e-5)
            found[f"{name}.{part}"] = value
    return found
