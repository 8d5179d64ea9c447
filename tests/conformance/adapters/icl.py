"""Paper 182: the circuits beside the output, weights as an init leaves them, and the formulas of the theory."""

import torch

import regard
from regard.testbeds import in_context

NOISE = 0.1**0.5
INITS = {"small_id": "small_identity", "small_id_qk": "small_identity_qk", "oppo_small_id": "opposite"}


def circuits(case):
    layer = regard.nn.InContextAttention(7, 3, 2)
    regard.load_official(layer, case.params)
    found = regard.lens.icl_circuits(layer)
    named = {"0": layer(case.inputs["z_q"], case.inputs["z"])}
    for head in range(3):
        named |= {f"KQ{head}": found.kq[head], f"OV{head}": found.ov[head]}
    return named


def inits(case):
    found = {}
    for theirs, ours in INITS.items():
        for out, out_dim in (("full", None), ("one", 1)):
            torch.manual_seed(5)
            layer = regard.nn.InContextAttention(4, 4, out_dim, init=ours)
            found |= {f"{theirs}.{out}.{name}": getattr(layer, f"{name}_proj").weight for name in "qkvo"}
    return found


def theory(case):
    prompt, omega, mu = (case.inputs[name] for name in ("prompt", "omega", "mu"))
    setting = (5, 24, NOISE)
    best = in_context.best_mu(omega, *setting)
    loss = in_context.approximate_loss(omega, mu, *setting)
    of_omega, of_mu = in_context.approximate_gradients(omega, mu, *setting)
    flow = in_context.gradient_flow(0.02 * omega, 0.01 * mu, *setting, rate=0.02, steps=60)
    rate = 2 * 0.17 * 2.1
    return {
        "heads": in_context.softmax_heads(prompt, omega, mu),
        "heads_best_mu": in_context.softmax_heads(prompt, omega, best),
        "gd": in_context.gradient_descent(prompt, rate),
        "dgd": in_context.debiased_gradient_descent(prompt, rate),
        "ridge": in_context.ridge(prompt, NOISE),
        "best_mu": best,
        "tf_best_mu": best,
        "approx_loss": loss[None],
        "half_loss": loss[None] / 2,
        "half_grad_mu": of_mu / 2,
        "half_grad_omega": of_omega / 2,
        "flow_mu": flow.mu,
        "flow_omega": flow.omega,
        "flow_half_loss": flow.loss / 2,
        "ridge_loss": torch.tensor(
            [in_context.ridge_risk(NOISE, ratio) for ratio in (0.05, 0.125, 0.5, 1.0, 2.0)], dtype=torch.float64
        ),
    }
