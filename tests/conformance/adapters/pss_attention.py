"""Paper 166: mining and targets round by round; the aspect head with the supervised loss and its gradients; SmoothGrad scores."""

import torch

import regard
from regard.losses import attention_supervision_loss, signed_rounds, smoothgrad_scores
from regard.models import AspectClassifier, aspect_position_weight


def mining(case):
    alphas, wids, dist = (case.inputs[name] for name in ("alphas", "wids", "dist"))
    mined = signed_rounds(alphas, case.args["max_entropy_bits"])
    found = {"position_weight": aspect_position_weight(dist)}
    for rounds in range(1, case.args["rounds"] + 1):
        erased = mined.erased(rounds)
        amask, avalue = mined.targets(rounds)
        found |= {f"amask_{rounds}": amask, f"avalue_{rounds}": avalue}
        found[f"erase_mask_{rounds}"] = ((dist >= 0) & ~erased).float()
        found[f"erase_wids_{rounds}"] = wids.masked_fill(erased, 0)
    return found


def _model(case):
    kwargs = case.meta["official_kwargs"]
    model = AspectClassifier(None, kwargs["dim_y"], kwargs["dim_h"], encoder="none", dropout=0.0)
    regard.load_official(model, case.params)
    return model


def head(case):
    inputs = case.inputs
    model, states = _model(case), inputs["states"].clone().requires_grad_()
    made = model(None, inputs["mask"], inputs["tmask"], states)
    aloss = attention_supervision_loss(made.attention, inputs["amask"], inputs["avalue"])
    lam = case.meta["official_kwargs"]["lamda"]
    total = torch.nn.functional.cross_entropy(made.logits, inputs["label"]) + lam * aloss
    total.backward()
    return {
        "alpha": made.attention,
        "logits": made.logits,
        "total_loss": total,
        "aloss": aloss,
        "grad_states": states.grad,
        "grad.affine.weight": model.attention.aspect_proj.weight.grad,
        "grad.classifier.weight": model.classifier.weight.grad,
    }


def smoothgrad(case):
    inputs, model = case.inputs, _model(case).eval()
    words = inputs["mask"] - inputs["tmask"]
    scores = smoothgrad_scores(
        lambda states: model.classify(states, inputs["mask"], inputs["tmask"]).logits,
        inputs["states"],
        inputs["label"],
        words,
        noises=inputs["noise"],
    )
    return {"scores": scores}
