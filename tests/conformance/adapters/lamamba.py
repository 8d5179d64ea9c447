"""Paper 106: gradients of a scan, the whole network with and without guidance, its constants."""

import torch

import regard
from regard.models.dit_parts import sincos_2d, time_waves


def gradients(case):
    layer = regard.nn.SelectiveScan2D(20, 3, 1.0)
    regard.load_official(layer, case.params)
    x = case.inputs["x"].requires_grad_()
    y = layer.channels_last(x)
    y.backward(case.inputs["grad_out"])
    found = {"dA": layer.A_logs.grad, "dt": layer.dt_projs_bias.grad, "dxproj": layer.x_proj_weight.grad}
    return found | {"0": y, "dx": x.grad}


def network(case):
    kw = case.meta["official_kwargs"]
    model = regard.models.LaMambaDiff(
        kw["in_resolution"], kw["in_chans"], kw["dims"], kw["depths"], kw["bottleneck_depth"], kw["num_heads"],
        window=kw["window_size"], num_classes=kw["num_classes"], mlp_ratio=kw["mlp_ratio"], extra=int(kw["sd_unet_decoder_design"]),
    ).eval()  # fmt: skip
    regard.load_official(model, case.params)
    x, t, y = (case.inputs[name] for name in "xty")
    guided = model.guided(x[:1], t[:1], y[:1], 2.5)
    # theirs: two equal halves, each with its own variance: of the class, of no class
    none = model(x[:1], t[:1], torch.full_like(y[:1], model.num_classes))
    return {"0": model(x, t, y), "cfg": torch.cat((guided, torch.cat((guided[:, :3], none[:, 3:]), dim=1)))}


def tables(case):
    side = int(case.inputs["n"])
    return {
        "positions": sincos_2d(8, (side, side)).unflatten(0, (side, side))[None],
        "paths": regard.nn.scan_paths(side),
        "times": time_waves(torch.tensor([0.0, 3.0, 999.0])),
    }
