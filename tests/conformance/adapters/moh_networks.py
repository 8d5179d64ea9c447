"""Paper 004: whole networks, their balance losses where recorded, and guidance as the released sampler does it."""

import regard


def transnext(case):
    model = regard.models.MoHTransNeXt(**case.kwargs).eval()
    regard.load_official(model, case.params)
    logits, routings = model(case.inputs["x"], return_aux=True)
    losses = [routing.balance_loss for routing in routings if routing.balance_loss is not None]
    return {"0": logits} | {f"loss{i}": loss.reshape(1) for i, loss in enumerate(losses)}


def dit(case):
    model = regard.models.MoHDiT(**case.kwargs).eval()
    regard.load_official(model, case.params)
    x, t, y = (case.inputs[name] for name in ("x", "t", "y"))
    half = len(x) // 2
    return {"0": model(x, t, y), "cfg": model.guided(x[:half], t[:half], y[:half], case.args["cfg_scale"])}
