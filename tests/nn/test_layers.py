"""Shared conv blocks: folding them changes nothing, residual drop is unbiased, squeeze-excite is timm's."""

import pytest
import torch
from timm.layers import SqueezeExcite as TimmSqueezeExcite
from torch import nn

from regard.nn import BNLinear, ConvBN, ConvFeedForward, Residual, SqueezeExcite, fuse_conv_bn
from regard.nn.layers import GroupNorm, levit_keys, rename_keys


def randomised(module):
    torch.manual_seed(0)
    for part in module.modules():
        if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(part.weight, -1.5, 1.5)
            nn.init.normal_(part.bias)
            part.running_mean.normal_()
            part.running_var.uniform_(0.2, 3.0)
    return module.eval()


@pytest.mark.parametrize(
    "module",
    [
        ConvBN(6, 8, 3, 2, 1, groups=2),
        ConvBN(6, 6, 3, 1, 2, dilation=2),
        Residual(ConvBN(6, 6, 3, 1, 1, groups=6)),
        Residual(ConvBN(6, 6, 5, 1, 2, groups=3)),
        Residual(ConvBN(6, 6)),
        Residual(ConvBN(6, 6, 3, 1, 2, dilation=2)),
    ],
)
def test_folds_into_one_convolution(module):
    module = randomised(module).double()
    x = torch.randn(2, 6, 7, 5, dtype=torch.float64)
    want = module(x)
    fused = module.fuse()
    assert type(fused) is nn.Conv2d
    torch.testing.assert_close(fused(x), want)
    torch.testing.assert_close(module(x), want)  # fuse() leaves the module as it was


@pytest.mark.parametrize("bias", [True, False])
def test_classifier_folds_into_one_linear(bias):
    module = randomised(BNLinear(6, 4, bias=bias)).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    fused = module.fuse()
    assert type(fused) is nn.Linear
    torch.testing.assert_close(fused(x), module(x))


@pytest.mark.parametrize("branch", [nn.Conv2d(6, 6, 4, padding=1), nn.Sequential(nn.ReLU()), ConvFeedForward(6, 9)])
def test_residual_that_cannot_fold_stays(branch):
    residual = Residual(branch)
    assert residual.fuse() is residual


def test_fuse_conv_bn_reaches_everything_and_keeps_the_output():
    model = randomised(
        nn.Sequential(ConvBN(3, 6, 3, 1, 1), Residual(ConvFeedForward(6, 12)), nn.ModuleDict({"a": ConvBN(6, 6)})["a"])
    ).double()
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    want = model(x)
    fused = fuse_conv_bn(model.train())
    assert fused is model and not model.training
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    torch.testing.assert_close(model(x), want)
    assert type(fuse_conv_bn(ConvBN(3, 4))) is nn.Conv2d


def test_fusing_keeps_half_precision():
    module = randomised(ConvBN(4, 4, 3, 1, 1))
    x = torch.randn(1, 4, 6, 6)
    want = module(x)
    fused = module.bfloat16().fuse()
    assert fused.weight.dtype == fused.bias.dtype == torch.bfloat16
    torch.testing.assert_close(fused(x.bfloat16()).float(), want, rtol=0.05, atol=0.1)


def test_fuse_errors():
    class Broken(nn.Module):
        def fuse(self):
            return None

    with pytest.raises(TypeError, match=r"0\.fuse\(\): got NoneType"):
        fuse_conv_bn(nn.Sequential(Broken()))
    with pytest.raises(TypeError, match="model: got int"):
        fuse_conv_bn(3)
    module = ConvBN(3, 3)
    module.bn = nn.BatchNorm2d(3, track_running_stats=False)
    with pytest.raises(ValueError, match="bn: .* need a batch norm that keeps running statistics"):
        module.fuse()


def test_residual_drop():
    torch.manual_seed(0)
    residual = Residual(nn.Identity(), drop=0.25)
    x = torch.ones(4000, 1, 1, 1)
    y = residual.train()(x).flatten()
    torch.testing.assert_close(y.unique(), torch.tensor([1.0, 1 + 1 / 0.75]))  # dropped whole, or scaled up
    assert y.mean().item() == pytest.approx(2.0, abs=0.05)
    assert torch.equal(residual.eval()(x), 2 * x)
    with pytest.raises(ValueError, match=r"drop: got 1\.0, need a probability in \[0, 1\)"):
        Residual(nn.Identity(), drop=1.0)


def test_group_norm_of_single_values():
    norm = GroupNorm(4, 4).double()
    nn.init.normal_(norm.bias)
    torch.testing.assert_close(norm(torch.randn(1, 4, 1, 1).double()), norm.bias.view(1, 4, 1, 1))
    x = torch.randn(2, 4, 3).double()
    assert torch.equal(norm(x), nn.GroupNorm.forward(norm, x))


@pytest.mark.parametrize("channels", [4, 27, 36, 108, 512])
def test_squeeze_excite_is_timms(channels):
    torch.manual_seed(0)
    theirs, ours = TimmSqueezeExcite(channels, 0.25), SqueezeExcite(channels, 0.25)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, channels, 3, 4)
    torch.testing.assert_close(ours(x), theirs(x))


def test_squeeze_excite_arguments():
    assert SqueezeExcite(20, hidden=3).fc1.out_channels == 3
    with pytest.raises(ValueError, match="ratio: got 0, need a number > 0"):
        SqueezeExcite(20, ratio=0)
    with pytest.raises(ValueError, match=r"need shape \(B, 20, H, W\)"):
        SqueezeExcite(20)(torch.zeros(1, 19, 2, 2))


def test_key_renames():
    state = {"a.m.c.weight": 1, "head.l.bias": 2, "stem.conv.weight": 3}
    assert levit_keys(state) == {"a.branch.conv.weight": 1, "head.linear.bias": 2, "stem.conv.weight": 3}
    assert levit_keys(levit_keys(state)) == levit_keys(state)
    assert rename_keys({"b1.x": 0}, (r"^b(\d)\.", lambda m: f"s.{int(m[1]) + 1}."), ("x$", "y")) == {"s.2.y": 0}
