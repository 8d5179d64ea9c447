"""LOOK-M's cache classes: the same keys, values and column sums through `look_m_compress`."""

import torch

from regard.methods import AttentionCall, SnapKV
from regard.methods.caches import look_m_compress
from regard.ops import masks, window_scores


def compressed(k, v, attn, ratios, image=None, merge="pivot"):
    """One batch-1 prompt as the authors' classes take it: (1, H, N, D) twice and weights (1, H, queries, N)."""
    length = k.shape[2]
    heavy, recent = (int(length * ratios[name]) for name in ("hh_ratio", "recent_ratio"))
    options = {"heavy": heavy, "recent": recent, "image": image, "merge": merge, "variant": "released"}
    keys, values, _ = look_m_compress(k[0], v[0], attn[0].sum(1), **options)
    return keys[None], values[None]


def images(case, length, tokens):
    span = torch.zeros(length, dtype=torch.bool)
    for number, placeholder in enumerate(case.args["image_position"]):
        start = placeholder + (tokens - 1) * number
        span[start : start + tokens] = True
    return span


def plain(case):
    kwargs, outputs = case.meta["official_kwargs"], {}
    for merge in ("pivot", "weighted"):
        k, v = compressed(case.inputs["k"], case.inputs["v"], case.inputs["attn"], kwargs, merge=merge)
        outputs |= {f"{merge}_k": k, f"{merge}_v": v}
    return outputs


def text_pivot(case):
    k = case.inputs["k8"].float() / 32
    span = images(case, k.shape[2], 576)
    k, v = compressed(k, k.flip(-1), case.inputs["attn"], case.meta["official_kwargs"], span)
    return {"k": k[:, 0], "v": v[:, 1]}


def every(case):
    outputs = {}
    k, v, attn = (case.inputs[name] for name in ("k", "v", "attn"))
    span = images(case, k.shape[2], case.args["image_tokens"])
    for tag, ratios in case.meta["official_kwargs"].items():
        for merge in ("pivot", "average", "weighted", "none"):
            for prefix, image in (("", None), ("text_", span)):
                if merge == "none" and image is not None:
                    continue
                sums = compressed(k, v, attn, ratios, image, merge)
                if merge == "none":  # H2O itself, which has no tokens that always stay
                    heavy, recent = (int(k.shape[2] * ratios[name]) for name in ("hh_ratio", "recent_ratio"))
                    a, b, _ = look_m_compress(
                        k[0], v[0], attn[0].sum(1), heavy=heavy, recent=recent, merge="none", sink=0
                    )
                    sums = a[None], b[None]
                outputs[f"{tag}_{prefix}{merge}_k"], outputs[f"{tag}_{prefix}{merge}_v"] = sums
    return outputs


def pooling(case):
    """The release's SnapKV: mean pooling through `window_scores`, max pooling through the method as well."""
    q, k, v = (case.inputs[name] for name in "qkv")
    kwargs, length = case.meta["official_kwargs"], k.shape[2]
    heavy, recent = (int(length * kwargs[name]) for name in ("hh_ratio", "recent_ratio"))
    scores = window_scores(q, k, recent, pool="avg", kernel=kwargs["kernel_size"], mask=masks.causal)[0]
    chosen = scores[:, : length - recent].topk(heavy).indices
    window = torch.arange(length - recent, length).expand(chosen.shape[0], -1)
    method = SnapKV(heavy + recent, window=recent, kernel=kwargs["kernel_size"])
    layer = method.make_layer(None)
    layer.update(k, v)
    AttentionCall(module=None, layer=0, q=q, k=k, v=v, causal=True, cache=layer).run([method])
    held = layer.store.parts[0]["position"].long().sort(-1).values
    return {"avgpool": torch.cat([chosen, window], 1).sort(-1).values, "maxpool": held}
