"""Paper 146: allocations and caches beside the outputs, calls in the order of the recording, converted vision transformers."""

import timm
import torch

import regard


def layer(case):
    kwargs = dict(case.kwargs)
    module = regard.nn.GroupedQueryAttention(**kwargs).eval()
    regard.load_official(module, case.params)
    return {"0": module(case.inputs["x"]), "allocation": torch.tensor(module.allocation)}


def noisy(case):
    module = regard.nn.GroupedQueryAttention(**case.kwargs).eval()
    regard.load_official(module, case.params)
    torch.manual_seed(7)
    return {"0": module(case.inputs["x"])}


def two_calls(case):
    module = regard.nn.GroupedQueryAttention(**case.kwargs).eval()
    regard.load_official(module, case.params)
    out = {}
    for i in (1, 2):
        out[f"y{i}"] = module(case.inputs[f"x{i}"])
        out[f"allocation{i}"] = torch.tensor(module.allocation)
    return out | {"cache_after": module.cache}


def steps(case):
    """Three steps of training, then two calls in evaluation."""
    module = regard.nn.GroupedQueryAttention(**case.kwargs)
    regard.load_official(module, case.params)
    torch.manual_seed(11)
    out = {}
    for i in range(5):
        module.train(i < 3)
        out[f"y{i}"] = module(case.inputs[f"x{i}"])
        out[f"allocation{i}"], out[f"cache{i}"] = torch.tensor(module.allocation), module.cache
    return out


def _vit():
    sizes = dict(img_size=16, patch_size=4, num_classes=5, embed_dim=24, depth=2, num_heads=6, mlp_ratio=2.0)
    return timm.models.vision_transformer.VisionTransformer(**sizes).eval()


def vit(case):
    """The authors' network is timm's with another attention."""
    model = _vit()
    regard.nn.convert_to_grouped(model, 3, "key_norm")
    model.load_state_dict(case.params)
    return {"0": model(case.inputs["x"])}


def conversion(case):
    model = _vit()
    model.load_state_dict(case.params)
    dense = model(case.inputs["x"])
    names = regard.nn.convert_to_grouped(model, 3)
    assert names == ["blocks.0.attn", "blocks.1.attn"]
    return {"0": model(case.inputs["x"]), "mha": dense}
