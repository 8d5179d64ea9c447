"""Paper 115: stacked q/k/v, a grid other than the trained one, and AgentSD's layer around the op."""

import regard
from regard.ops.agent import agent_attention
from regard.ops.attention import attention


def stripe(case):
    module = regard.nn.AgentStripeAttention(**case.kwargs)
    regard.load_official(module, case.params)
    return {"0": module(*case.inputs["x"])}


def other_grid(case):
    kwargs = dict(case.kwargs)
    run_grid = tuple(kwargs.pop("run_grid"))
    module = regard.nn.AgentAttention(**kwargs).eval()
    regard.load_official(module, case.params)
    return {"0": module(case.inputs["x"], grid=run_grid)}


def stable_diffusion(case):
    """to_q/to_k/to_v, agents through to_q, the op where agents are fewer than half of the tokens, to_out."""
    x, agent, weights = case.inputs["x"], case.inputs["agent"], case.params
    num_heads, power, shortcut = (case.kwargs[key] for key in ("num_heads", "k_scale2", "shortcut"))

    def heads(t, name):
        return (t @ weights[f"to_{name}.weight"].T).unflatten(-1, (num_heads, -1)).transpose(1, 2)

    q, k, v = heads(x, "q"), heads(x, "k"), heads(x, "v")
    if 2 * agent.shape[1] < x.shape[1]:
        scale2 = q.shape[-1] ** (-0.5 * power)
        out = agent_attention(q, k, v, heads(agent, "q"), scale2=scale2, shortcut=shortcut)
    else:
        out = attention(q, k, v)
    return {"0": out.transpose(1, 2).flatten(2) @ weights["to_out.weight"].T + weights["to_out.bias"]}
