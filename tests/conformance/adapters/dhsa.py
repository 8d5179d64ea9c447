"""DHSA: boundaries (predicted and labelled), the loss, the lists of keys and the attention over them."""

import torch

from regard.integrations.official import load_official
from regard.lens import attention_boundaries
from regard.losses import boundary_labels, boundary_loss, boundary_metrics, focal_bce, soft_label_transform
from regard.nn import BoundaryPredictor
from regard.ops.select import a_shape_blocks, chunk_topk_attention, chunk_topk_keys

POOLING = {"avgpool": "mean", "avgpool_norm": "sqrt", "maxpool": "max"}


def boundary(case):
    x = case.inputs
    sizes = case.meta["official_kwargs"]
    predictor = BoundaryPredictor(
        sizes["channel_in"], sizes["window_size"], sizes["d_h"], sizes["heads"], sizes["window_pool"]
    )
    load_official(predictor, case.params)
    with torch.no_grad():
        logits = predictor(x["k"])
    cuts, scores = predictor.boundaries(x["k"], 5, nms=4, instruction=6)
    weights = (x["q"] @ x["k_label"].transpose(-1, -2)) * x["q"].shape[-1] ** -0.5
    weights = weights.masked_fill(x["mask"] < -1e9, -torch.inf).softmax(-1)
    label_cuts, ratio = attention_boundaries(weights, 4, window=3, theta=1.01, nms=4, instruction=5)
    soft = soft_label_transform(x["r"])
    return {
        "logits": logits,
        "boundaries": cuts,
        "ratios": scores,
        "label_boundaries": label_cuts,
        "label_ratios": ratio.float(),
        "soft_labels": soft,
        "focal": focal_bce(x["logits_in"], soft, x["valid"], pos_weight=1.7, gamma=2.0),
    }


def predictors(case):
    """Predictors without a pool, with other sizes; cuts with a threshold, without suppression, with wide margins."""
    out = {}
    for name, options in case.meta["official_kwargs"].items():
        predictor = BoundaryPredictor(**options["ours"])
        prefix = f"{name}."
        load_official(predictor, {key[len(prefix) :]: v for key, v in case.params.items() if key.startswith(prefix)})
        with torch.no_grad():
            out[f"logits.{name}"] = predictor(case.inputs[f"k.{name}"])
        cuts, scores = predictor.boundaries(case.inputs[f"k.{name}"], **options["cut"])
        out[f"boundaries.{name}"], out[f"scores.{name}"] = cuts, scores
    return out


def attention(case):
    """`dhsa_sdpa`: the lists of gathered keys, repeats included, and the output."""
    out = {}
    for name, options in case.meta["official_kwargs"].items():
        q, k, v = (case.inputs[f"{x}.{name}"] for x in "qkv")
        cuts = case.inputs[f"boundaries.{name}"]
        instruction = options["instruction_tokens"] or 0
        shared = {"pooling": POOLING[options["pooling"]], "window": options["sliding_window_size"], "q_offset": 0}
        sizes = tuple(options[key] for key in ("topk_tokens", "block_size", "local_tokens", "global_tokens"))
        out[f"indices.{name}"] = chunk_topk_keys(q[:, :, : q.shape[2] - instruction], k, cuts, *sizes, **shared)
        out[f"out.{name}"] = chunk_topk_attention(
            q, k, v, cuts, *sizes, instruction=instruction, scale=options["scaling"], **shared
        )
    return out


def blocks(case):
    """The four block rules of the repository's root."""
    out = {}
    for name, given in case.meta["official_kwargs"].items():
        q, k = case.inputs[f"q.{name}"], case.inputs[f"k.{name}"]
        for pattern in ("topk", "a-shape", "vertical-slash", "vertical-slash-blocks"):
            out[f"{pattern}.{name}"] = a_shape_blocks(q, k, pattern=pattern, **given).block_map().to(torch.uint8)
    return out


def training(case):
    """Three steps of their loop: labels, loss, metrics, gradients."""
    sizes = case.meta["official_kwargs"]
    predictor = BoundaryPredictor(sizes["channel_in"], sizes["window_size"], sizes["d_h"], sizes["heads"])
    load_official(predictor, case.params)
    optimizer = torch.optim.SGD(predictor.parameters(), lr=0.5)
    out, losses, metrics = {}, [], []
    for step, (keys, ratio) in enumerate(zip(case.inputs["keys"], case.inputs["ratios"][:, None])):
        optimizer.zero_grad()
        logits = predictor(keys)
        inner, targets = boundary_labels(ratio)
        out |= {f"mask.{step}": inner.to(torch.uint8), f"targets.{step}": targets.to(torch.uint8)}
        out[f"logits.{step}"] = logits.detach()
        ten, all_of_them = (boundary_metrics(logits.detach(), ratio, k) for k in (10, 500))
        metrics.append([*(ten[name] for name in ("precision", "recall", "f1", "overlap")), all_of_them["overlap"]])
        loss = boundary_loss(logits, ratio)
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
    renamed = predictor.official_keys({name: name for name in case.params})
    state = predictor.state_dict()
    out |= {f"after.{theirs}": state[ours] for ours, theirs in renamed.items()}
    return out | {"losses": torch.tensor(losses), "metrics": torch.tensor(metrics)}
