"""SHViT beyond its recorded numbers: timm's network is the same one; options; what is refused."""

import copy

import pytest
import timm
import torch
from torch import nn

import regard
from regard.models import SHViT, shvit_s1


def randomise(model):
    """Branches start at zero; give every norm numbers that show."""
    torch.manual_seed(1)
    for part in model.modules():
        if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm)):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, std=0.3)
        if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)):
            part.running_mean.normal_(std=0.3)
            part.running_var.uniform_(0.5, 2.0)
    return model


def small(**options):
    sizes = {"dims": (16, 20), "partial_dims": (4, 5), "depths": (1, 2), "kinds": "is", "num_classes": 3}
    return randomise(SHViT(**(sizes | options))).eval()


def close(ours, theirs, rtol=1e-5):
    assert (ours - theirs).abs().max() <= rtol * theirs.abs().max()


@pytest.fixture(scope="module")
def pair():
    theirs = randomise(timm.create_model("shvit_s1", num_classes=10))
    ours = shvit_s1(num_classes=10)
    regard.load_official(ours, theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("train", [False, True])
def test_s1_is_timms(pair, train):
    # float64: in training, norms over few values at the last stage would magnify rounding
    theirs, ours = (copy.deepcopy(model).double().train(train) for model in pair)
    torch.manual_seed(0)
    x = torch.randn(4, 3, 64, 48, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for _ in pair]
    outputs = [model(image) for model, image in zip((theirs, ours), inputs)]
    close(outputs[1], outputs[0], rtol=1e-9)
    for output in outputs:
        output.square().sum().backward()
    close(inputs[1].grad, inputs[0].grad, rtol=1e-9)


def test_s1_maps_and_fused_are_timms(pair):
    theirs, ours = (model.eval() for model in pair)
    x = torch.randn(1, 3, 75, 101)
    with torch.no_grad():
        maps = ours.feature_maps(x)
        assert [tuple(m.shape) for m in maps] == [(1, 128, 5, 7), (1, 224, 3, 4), (1, 320, 2, 2)]
        for mine, other in zip(maps, theirs.forward_intermediates(x, intermediates_only=True)):
            close(mine, other)
        want = ours(x)
        twin = shvit_s1(num_classes=10)
        twin.load_state_dict(ours.state_dict())
        fused = twin.train().fuse()
        assert fused is twin and not fused.training
        assert not any(isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)) for m in fused.modules())
        close(fused(x), want)


@pytest.mark.parametrize("size", ["s2", "s3", "s4"])
def test_other_sizes_take_timms_weights(size):
    with torch.device("meta"):
        theirs, ours = timm.create_model(f"shvit_{size}"), getattr(regard.models, f"shvit_{size}")()
    renamed = SHViT.official_keys(theirs.state_dict())
    assert {k: v.shape for k, v in renamed.items()} == {k: v.shape for k, v in ours.state_dict().items()}


def test_official_names_are_numbered_through_and_idempotent():
    names = {
        "patch_embed.2.c.weight": "stem.2.conv.weight",
        "blocks1.1.ffn.m.pw1.bn.bias": "stages.0.blocks.1.ffn.branch.pw1.bn.bias",
        "blocks2.0.0.m.c.weight": "stages.1.downsample.0.branch.conv.weight",
        "blocks2.0.1.m.pw2.c.weight": "stages.1.downsample.1.branch.pw2.conv.weight",
        "blocks3.1.se.fc1.bias": "stages.2.downsample.2.se.fc1.bias",
        "blocks3.2.0.m.bn.weight": "stages.2.downsample.3.branch.bn.weight",
        "blocks3.2.1.m.pw1.c.weight": "stages.2.downsample.4.branch.pw1.conv.weight",
        "blocks3.3.mixer.m.pre_norm.bias": "stages.2.blocks.0.mixer.branch.norm.bias",
        "blocks3.12.mixer.m.proj.1.c.weight": "stages.2.blocks.9.mixer.branch.proj.conv.weight",
        "blocks2.10.conv.weight": "stages.1.blocks.7.conv.weight",
        "head.l.bias": "head.linear.bias",
        "head_dist.bn.weight": "head_dist.bn.weight",
    }
    state = dict.fromkeys(names, 0)
    assert list(SHViT.official_keys(state)) == list(names.values())
    assert list(SHViT.official_keys(SHViT.official_keys(state))) == list(names.values())


def test_no_classes_gives_pooled_features():
    model = small(num_classes=0, distillation=True)
    x = torch.randn(2, 3, 48, 33)
    torch.testing.assert_close(model(x), model.feature_maps(x)[-1].mean((2, 3)))


def test_distillation_is_a_pair_in_training_and_its_mean_after():
    model = small(distillation=True)
    x = torch.randn(4, 3, 32, 32)
    features = model.feature_maps(x)[-1].mean((2, 3))
    torch.testing.assert_close(model(x), (model.head(features) + model.head_dist(features)) / 2)
    pair = model.train()(x)
    assert len(pair) == 2 and pair[0].shape == (4, 3)


def test_samples_do_not_see_each_other():
    model = small(in_channels=1).double()
    x = torch.randn(3, 1, 50, 64, dtype=torch.float64)
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]))


def test_fresh_blocks_change_nothing():
    torch.manual_seed(0)
    model = SHViT((16,), (4,), (3,), "s", num_classes=2).eval()
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(model.feature_maps(x)[0], model.stem(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dims": ()}, r"dims: got \(\), need the width of at least one stage"),
        ({"dims": (12, 20)}, r"dims: got \(12, 20\), need a first width divisible by 8"),
        ({"depths": (1,)}, r"depths: got \(1,\), need 2 entries"),
        ({"qk_dim": (16, 16, 16)}, r"qk_dim: got \(16, 16, 16\), need 2 entries"),
        ({"kinds": ("i", "x")}, "kind: unknown name 'x'; one of: i, s"),
        ({"partial_dims": (4, 21)}, r"pdim: got 21, need an int in 1\.\.dim=20"),
        ({"num_classes": -1}, "num_classes: got -1, need an int >= 0"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_bad_image():
    with pytest.raises(ValueError, match=r"x: got 'shape \(1, 1, 32, 32\)', need shape \(B, 3, H, W\)"):
        small()(torch.zeros(1, 1, 32, 32))
