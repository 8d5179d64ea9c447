"""025 ViT attention analytics: early heads look near, later ones anywhere; a few heads carry most of the prediction."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ...lens.attention_patterns import attention_patterns, fit_patterns
from ...lens.record import record
from ...lens.spatial_attention import hop_profile
from ...lens.vit_heads import head_importance
from ...testbeds.images import digits
from ...testbeds.training import train
from .claim import Outcome, Scale

PAPER, SLUG = "025", "vit-heads"
SAYS = (
    "ViT attention analytics: heads of early layers attend to near patches and those of late layers more evenly; a few heads matter, "
    "as pruning shows, and most hardly do."
)


def measure(scale: Scale) -> Outcome:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    images = digits()
    model = VisionTransformer(
        img_size=8, patch_size=1, in_chans=1, num_classes=10, embed_dim=48, depth=4, num_heads=4, mlp_ratio=2.0
    )
    steps = scale.pick(500, 10)
    train(model, images.batches(64), steps=steps, loss=_loss, lr=2e-3, progress=False)
    model.eval()
    count = scale.pick(128, 16)
    kept, labels = images.kept[:count], images.kept_labels[:count]
    out = Outcome(
        f"a timm ViT of 4 layers x 4 heads, 8 x 8 patches, {steps} steps on handwritten digits; {count} held-out images",
        "a layer",
    )
    with torch.no_grad():
        right = float((model(kept).argmax(-1) == labels).float().mean())
    out.add("the network", "accuracy", "", right)
    made = record(model, {"x": kept})
    profile = hop_profile(made, (8, 8))
    distance = profile["mean distance"].scores.mean(1)
    near = (profile["hop 0"].scores + profile["hop 1"].scores).mean(1)
    out.add("mean over the heads of a layer", "distance looked at, hops", "patches", distance.tolist())
    out.add("mean over the heads of a layer", "attention within one hop", "share", near.tolist())
    importance = head_importance(model, [(kept, labels)], metrics=("js",))["js"].scores.flatten()
    order = importance.sort(descending=True).values
    share = float(order[:4].sum() / order.sum())
    out.add("the 4 most important of 16 heads", "share of all importance (JS)", "", share)
    families = fit_patterns(attention_patterns(made, (8, 8))[: scale.pick(32, 4)], families=4, steps=scale.pick(150, 5))
    out.add(
        "heads in the largest of 4 families of patterns",
        "share",
        "",
        float((families.family.scores == 0).float().mean()),
    )
    out.check("attention within one hop, first layer over last", float(near[0] / near[-1]), at_least=1.2)
    out.check("distance looked at, last layer over first", float(distance[-1] / distance[0]), at_least=1.0)
    out.check("share of importance in a quarter of the heads", share, at_least=0.5)
    return out


def _loss(model: Any, batch: Any) -> torch.Tensor:
    images, labels = batch
    return F.cross_entropy(model(images), labels)
