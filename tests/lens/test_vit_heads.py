"""Heads of vision transformers: importance by pruning, strength by distance, patterns; through timm and transformers alike."""

import copy

import pytest
import torch

import regard
from regard.integrations.anatomy import blocks, output_projection
from regard.lens import (
    attention_patterns,
    fit_patterns,
    head_importance,
    hop_distances,
    hop_profile,
    hop_strength,
    prefix_mass,
    relative_attention_map,
)
from regard.lens.vit_heads import PruneHeads, jensen_shannon

GRID = (4, 4)


def timm_vit(**options):
    import timm

    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
    model = timm.models.vision_transformer.VisionTransformer(**{**sizes, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def hf_vit():
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(1)
    config = ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=32,
        image_size=16,
        patch_size=4,
        num_labels=5,
    )
    return ViTForImageClassification(config).eval()


@pytest.fixture(scope="module", params=["timm", "transformers"])
def vit(request):
    return timm_vit() if request.param == "timm" else hf_vit()


@pytest.fixture(scope="module")
def images():
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(2))


def logits(model, images):
    with torch.no_grad():
        made = model(images)
    return getattr(made, "logits", made)


@pytest.mark.parametrize(
    "options", [{}, {"qk_norm": True}, {"class_token": False, "global_pool": "avg"}, {"reg_tokens": 2}]
)
def test_timm_is_joined_and_left_alone(options, images):
    model = timm_vit(**options)
    plain = logits(model, images)
    made = regard.record(model, {"x": images})
    assert made.layers == [0, 1] and made.tower == "vision"
    weights = made.weights(1)
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    module = model.blocks[1].attn
    seen = {}
    hook = module.register_forward_pre_hook(lambda m, args: seen.update(x=args[0]))
    with regard.attach(model):
        joined = logits(model, images)
    hook.remove()
    torch.testing.assert_close(joined, plain, rtol=1e-4, atol=1e-5)
    q, k, _ = module.qkv(seen["x"]).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
    want = (module.q_norm(q) @ module.k_norm(k).transpose(-1, -2) / 8**0.5).softmax(-1)
    torch.testing.assert_close(weights, want.detach(), rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(model, images), plain) and "forward" not in module.__dict__


def test_methods_reach_timm(images):
    model = timm_vit()
    plain = logits(model, images)
    with regard.attach(model, regard.SlidingWindow(1)):
        assert not torch.allclose(logits(model, images), plain)
    with regard.attach(model, regard.MaskHeads([(0, 1)], mode="zero", phase="all")):
        zeroed = logits(model, images)
    cut = copy.deepcopy(model)
    with torch.no_grad():
        cut.blocks[0].attn.proj.weight[:, 8:16] = 0.0
    torch.testing.assert_close(zeroed, logits(cut, images), rtol=1e-4, atol=1e-5)


def test_timm_models_of_another_kind_are_refused(images):
    import timm

    model = timm.models.swin_transformer.SwinTransformer(
        img_size=16, patch_size=2, window_size=2, embed_dim=8, depths=(1, 1), num_heads=(1, 2), num_classes=3
    )
    with pytest.raises(regard.UnsupportedModelError, match="WindowAttention"):
        regard.attach(model)


def test_pruning_equals_cutting_the_projection(vit, images):
    labels = torch.tensor([0, 3, 4])
    found = head_importance(vit, [(images[:2], labels[:2]), (images[2:], labels[2:])])
    assert {name: tuple(table.scores.shape) for name, table in found.items()} == dict.fromkeys(found, (2, 3))
    cut = copy.deepcopy(vit)
    joined = hasattr(cut, "blocks")
    projection = cut.blocks[1].attn.proj if joined else output_projection(blocks(cut)[1].attention)
    with torch.no_grad():
        projection.weight[:, 16:] = 0.0
    before, after = (logits(model, images).double().softmax(-1) for model in (vit, cut))
    rows = torch.arange(3)
    torch.testing.assert_close(
        found["probability"].runs[:, 1, 2], before[rows, labels] - after[rows, labels], rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(
        found["cross-entropy"].runs[:, 1, 2],
        before[rows, labels].log() - after[rows, labels].log(),
        rtol=1e-4,
        atol=1e-6,
    )
    middle = (before + after) / 2
    js = ((before * (before / middle).log()).sum(-1) + (after * (after / middle).log()).sum(-1)) / 2
    torch.testing.assert_close(found["js"].runs[:, 1, 2], js, rtol=1e-3, atol=1e-8)
    ranks = [(p > p[rows, labels][:, None]).sum(-1) for p in (before, after)]
    assert torch.equal(found["rank"].runs[:, 1, 2], (ranks[1] - ranks[0]).double())


def test_parts_add_up_and_a_head_that_gives_nothing_does_not_matter(images):
    model = timm_vit()
    with torch.no_grad():
        model.blocks[0].attn.proj.weight[:, :8] = 0.0
    labels = torch.zeros(3, dtype=torch.long)
    for part in ("all", "prefix", "patches"):
        assert head_importance(model, [(images, labels)], metrics=["js"], part=part)["js"][0, 0] < 1e-12
    # what the last layer does at the patches never reaches the class token
    last = head_importance(model, [(images, labels)], metrics=["js"], part="patches", layers=[-1])["js"]
    assert float(last.scores[1].max()) < 1e-12 and bool(last.scores[0].isnan().all())
    alone = head_importance(model, [(images, labels)], metrics=["js"], part="prefix", layers=[1])["js"]
    whole = head_importance(model, [(images, labels)], metrics=["js"], part="all", layers=[1])["js"]
    torch.testing.assert_close(alone.scores[1], whole.scores[1])
    others = head_importance(model, [(images, labels)], metrics=["js"], prune="others", layers=[1])["js"]
    with regard.attach(model, PruneHeads([(1, 0), (1, 2)])):
        kept = logits(model, images).double().log_softmax(-1)
    want = jensen_shannon(logits(model, images).double().log_softmax(-1), kept).mean()
    assert others[1, 1] == pytest.approx(float(want), rel=1e-4)


def test_hops_of_known_attention():
    eye = torch.eye(12)
    assert hop_strength(eye, (3, 4)).tolist() == [1.0, 0.0, 0.0, 0.0]
    uniform = torch.full((2, 12, 12), 1 / 12)
    rings = torch.stack([(hop_distances((3, 4)) == hop).sum(-1).float().mean() / 12 for hop in range(4)])
    torch.testing.assert_close(hop_strength(uniform, (3, 4)), rings.expand(2, -1))
    torch.testing.assert_close(hop_strength(uniform, (3, 4), per_neighbour=True), torch.full((2, 4), 1 / 12))
    assert hop_distances((2, 3), "euclidean")[0].tolist() == [0, 1, 2, 1, 1, 2]


def test_hops_and_prefix_make_up_every_row():
    weights = torch.randn(2, 3, 14, 14, generator=torch.Generator().manual_seed(0)).softmax(-1)
    given, got = prefix_mass(weights, (3, 4))
    torch.testing.assert_close(hop_strength(weights, (3, 4)).sum(-1) + got, torch.ones(2, 3))
    torch.testing.assert_close(given, weights[..., :2, 2:].sum(-1).mean(-1))
    torch.testing.assert_close(hop_strength(weights, (3, 4), renormalise=True).sum(-1), torch.ones(2, 3))


def test_the_relative_map_of_a_kernel_is_the_kernel():
    kernel = torch.rand(5, 7, generator=torch.Generator().manual_seed(0))
    y, x = torch.arange(12) // 4, torch.arange(12) % 4
    weights = kernel[y - y[:, None] + 2, x - x[:, None] + 3]
    torch.testing.assert_close(relative_attention_map(weights, (3, 4)), kernel)


def test_profile_and_families(vit, images):
    key = "x" if hasattr(vit, "blocks") else "pixel_values"
    made = regard.record(vit, {key: images})
    found = hop_profile(made, GRID)
    assert list(found)[:4] == ["hop 0", "hop 1", "hop 2", "hop 3"] and found["mean distance"].scores.shape == (2, 3)
    total = sum(found[f"hop {hop}"].scores for hop in range(4)) + found["patches to prefix"].scores
    torch.testing.assert_close(total, torch.ones(2, 3))
    patterns = attention_patterns(made, GRID)
    assert patterns.shape == (3, 2, 3, 7, 7)


def test_families_part_what_differs():
    """Heads that read themselves, their row, or everything alike fall into three families, by whatever layer."""
    grid, noise = (4, 4), torch.Generator().manual_seed(0)
    same_row = (torch.arange(16)[:, None] // 4 == torch.arange(16) // 4).float() / 4
    kinds = [torch.eye(16), same_row, torch.full((16, 16), 1 / 16)]
    heads = torch.stack([torch.stack([kinds[(layer + head) % 3] for head in range(3)]) for layer in range(3)])
    weights = heads + 0.02 * torch.rand(5, *heads.shape, generator=noise)
    found = fit_patterns(relative_attention_map(weights, grid), families=3, steps=120)
    family = found.family.scores
    assert found.losses[-1] < 0.5 * found.losses[0] and found.prototypes.shape == (3, 7, 7)
    for kind in range(3):
        members = {int(family[layer, head]) for layer in range(3) for head in range(3) if (layer + head) % 3 == kind}
        assert len(members) == 1
    assert len(family.unique()) == 3 and found.plane.shape == (3, 3, 2)


def test_bad_input(images):
    model = timm_vit()
    labels = torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match="metrics"):
        head_importance(model, [(images, labels)], metrics=["jss"])
    with pytest.raises(ValueError, match=r"class numbers in \[0, 5\)"):
        head_importance(model, [(images, labels + 9)])
    with pytest.raises(ValueError, match="at least one batch"):
        head_importance(model, [])
    with pytest.raises(ValueError, match="layers"):
        head_importance(model, [(images, labels)], layers=[4])
    with pytest.raises(ValueError, match="patches of the grid"):
        hop_strength(torch.ones(5, 5), (3, 3))
    with pytest.raises(ValueError, match="prefix"):
        hop_strength(torch.ones(10, 10), (3, 3), prefix=2)
    with pytest.raises(ValueError, match="metric"):
        hop_distances((2, 2), "taxi")
    with pytest.raises(ValueError, match="families"):
        fit_patterns(torch.rand(1, 1, 2, 3, 3), families=3)
