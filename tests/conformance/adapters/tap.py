"""Paper 080: several losses and their gradients from one set of maps; pooling with its weights, in eval and train mode."""

import torch

import regard
from regard.losses import attention_diversification


def _below(tensors, prefix):
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def losses(case):
    """th = 2, 1, 0.5 over three layers; the gradients are those of the last."""
    maps = [case.inputs[f"attn.{i}"].clone().requires_grad_() for i in range(3)]
    found = {f"loss.th{th:g}": attention_diversification(maps, th) for th in (2, 1, 0.5)}
    found["loss.th0.5"].backward()
    return found | {f"grad.attn.{i}": weights.grad for i, weights in enumerate(maps)}


def edge_losses(case):
    """Thresholds from nothing to everything; sets of layers of different sizes; a batch of one as released."""
    found = {}
    for name, thresholds in case.args["thresholds"].items():
        maps = [value.clone().requires_grad_() for _, value in sorted(_below(case.inputs, name + ".").items())]
        for th in thresholds:
            loss = attention_diversification(maps, th, variant="released")
            found[f"{name}.th{th:g}"] = loss
            if name != "uniform" and th == case.args["grad_threshold"]:
                grads = torch.autograd.grad(loss, maps)
                found |= {f"{name}.grad.{i}": grad for i, grad in enumerate(grads)}
    return found


def pooling(case):
    found = {}
    for name, arguments in case.args.items():
        module = regard.nn.TokenAwarePooling(*arguments)
        regard.load_official(module, _below(case.params, name + "."))
        x = case.inputs[f"{name}.x"].clone().requires_grad_()
        pooled, weights = module.eval()(x, return_weights=True)
        found |= {f"{name}.tap": pooled, f"{name}.weights": _as_theirs(weights)}
        pooled = module.train()(x)
        kernel = module.predictor[0].weight
        grads = torch.autograd.grad((pooled * case.inputs[f"{name}.cotangent"]).sum(), [x, kernel])
        found |= dict(zip((f"{name}.train.tap", f"{name}.train.grad_x", f"{name}.train.grad_proj0"), (pooled, *grads)))
    return found


def blocks(case):
    """What the authors' blocks hand to their first norm, from tokens on a square grid."""
    found = {}
    for name, family in (("fan1", "fan"), ("fan3", "fan"), ("rvt", "rvt")):
        kwargs = case.meta["official_kwargs"][family]
        module = regard.nn.TokenAwarePooling(kwargs["dim"], kwargs["num_scales"])
        regard.load_official(module, _below(case.params, family + "."))
        pooled, weights = module.eval()(case.inputs[name], return_weights=True)
        found |= {f"{name}.tap": pooled, f"{name}.weights": _as_theirs(weights)}
    return found


def _as_theirs(weights):
    """(B, K, H, W) -> (B, 1, H, W, K)."""
    return weights.permute(0, 2, 3, 1).unsqueeze(1)
