"""The base of channel gates, and putting gates into existing CNNs."""

import copy
import io

import pytest
import timm
import torch
from torch import nn
from torchvision.models import mobilenet_v2, resnet18, resnet50

from regard.nn import EfficientLocalAttention, FeatureGate, SqueezeExcite, insert_gate


class Halve(FeatureGate):
    def factors(self, x):
        return x.new_full((1, 1, 1, 1), 0.5), x.new_ones(1, 1, x.shape[2], 1)


def pass_through(channels):
    """A gate that changes nothing; it fails on maps of another width."""

    class Open(FeatureGate):
        def factors(self, x):
            return (x.new_ones(1, channels, 1, 1),)

    return Open()


def test_gate_is_the_product_of_its_factors():
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(Halve()(x), x / 2)
    assert torch.equal(Halve().gate(x), torch.full((2, 3, 4, 5), 0.5))


def test_gate_without_factors_says_what_is_missing():
    with pytest.raises(NotImplementedError, match="FeatureGate must define factors"):
        FeatureGate()(torch.zeros(1, 1, 1, 1))


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_mobilenet_v2_is_gated_in_its_sixteen_expanding_blocks(library):
    torch.manual_seed(0)
    model = mobilenet_v2(width_mult=0.25) if library == "torchvision" else timm.create_model("mobilenetv2_035")
    before = list(model.state_dict())
    widths = []
    names = insert_gate(model, lambda channels: widths.append(channels) or EfficientLocalAttention(channels))
    assert len(names) == 16
    assert all(isinstance(model.get_submodule(name), EfficientLocalAttention) for name in names)
    # every gate stands on the width of the depthwise conv before it
    depthwise = [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert widths == depthwise[1:]  # the first block does not expand
    kept = [name for name in model.state_dict() if ".gate." not in name]
    assert kept == before
    assert model.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 1000)


@pytest.mark.parametrize("where", ["mbv2", "resnet", "resnet_inner"])
def test_open_gate_changes_nothing_and_residual_doubles_it(where):
    torch.manual_seed(0)
    plain = mobilenet_v2(width_mult=0.25) if where == "mbv2" else resnet50(num_classes=7)
    plain.eval()
    gated = copy.deepcopy(plain)
    names = insert_gate(gated, pass_through, where)
    assert len(names) == 16  # both networks have sixteen such blocks
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(gated(x), plain(x))
        doubled = copy.deepcopy(plain)
        insert_gate(doubled, pass_through, where, residual=True)
        assert not torch.allclose(doubled(x), plain(x))


def test_resnet_places():
    names = insert_gate(resnet18(), SqueezeExcite, "resnet")
    assert names[:2] == ["layer1.0.bn2.gate", "layer1.1.bn2.gate"] and len(names) == 8
    assert insert_gate(resnet50(), SqueezeExcite, "resnet")[0] == "layer1.0.bn3.gate"
    assert insert_gate(resnet50(), SqueezeExcite, "resnet_inner")[0] == "layer1.0.conv3.gate"
    assert insert_gate(timm.create_model("resnet26"), SqueezeExcite, "resnet")[0] == "layer1.0.bn3.gate"


def test_own_rule_gates_input_or_output():
    conv = nn.Conv2d(4, 6, 1)
    model = nn.Sequential(conv, nn.ReLU(), nn.BatchNorm2d(6))
    x = torch.randn(2, 4, 3, 3)
    plain = model.eval()(x)
    widths = []

    def factory(channels):
        widths.append(channels)
        return Halve()

    names = insert_gate(copy.deepcopy(model), factory, lambda name, m: "output" if name == "0" else None)
    assert names == ["0.gate"] and widths == [6]
    gated = copy.deepcopy(model)
    insert_gate(gated, factory, lambda name, m: {"0": "input", "2": "output"}.get(name))
    assert widths == [6, 4, 6]
    want = model[2](torch.relu(conv(x / 2))) / 2
    torch.testing.assert_close(gated(x), want)
    assert not torch.allclose(gated(x), plain)


def test_gates_copy_save_train_and_follow_the_model():
    torch.manual_seed(0)
    model = mobilenet_v2(width_mult=0.1, num_classes=3).double().eval()
    names = insert_gate(model, EfficientLocalAttention)
    gate = model.get_submodule(names[0])
    assert gate.conv.weight.dtype == torch.float64 and not gate.training
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(twin(x), model(x)) and torch.equal(loaded(x), model(x))
    with torch.no_grad():
        twin.get_submodule(names[0]).gn.bias.fill_(50.0)
    y = model(x)
    assert (twin(x) - y).abs().max() > 0.1 * y.abs().max()  # the copy runs its own gates ...
    model(x).sum().backward()
    assert all(model.get_submodule(name).conv.weight.grad is not None for name in names)
    # ... and a checkpoint of the plain network still loads
    missing = model.load_state_dict(mobilenet_v2(width_mult=0.1, num_classes=3).state_dict(), strict=False)
    assert not missing.unexpected_keys and all(".gate." in key for key in missing.missing_keys)


def test_bad_input():
    conv = nn.Sequential(nn.Conv2d(3, 4, 1))
    with pytest.raises(TypeError, match="model: got str"):
        insert_gate("resnet", SqueezeExcite)
    with pytest.raises(TypeError, match="factory: got int, need a callable"):
        insert_gate(conv, 3)
    with pytest.raises(ValueError, match="where: unknown name 'mbv3'; did you mean mbv2"):
        insert_gate(conv, SqueezeExcite, "mbv3")
    with pytest.raises(ValueError, match=r"where: got 'mbv2', need a rule that fits some module of Sequential"):
        insert_gate(conv, SqueezeExcite)
    with pytest.raises(ValueError, match="where: got 'after', need 'input', 'output' or None for module '0'"):
        insert_gate(conv, SqueezeExcite, lambda name, m: "after" if name == "0" else None)
    with pytest.raises(ValueError, match="a conv or norm module"):
        insert_gate(nn.Sequential(nn.ReLU()), SqueezeExcite, lambda name, m: "input" if name == "0" else None)
    with pytest.raises(TypeError, match=r"factory: got int, need a callable that returns a torch\.nn\.Module"):
        insert_gate(conv, lambda channels: 3, lambda name, m: "input" if name == "0" else None)
    model = resnet18()
    insert_gate(model, SqueezeExcite, "resnet")
    with pytest.raises(ValueError, match=r"model: got 'layer1\.0\.bn2', need a layer without a gate"):
        insert_gate(model, SqueezeExcite, "resnet")
    model = mobilenet_v2(width_mult=0.1)
    insert_gate(model, SqueezeExcite)
    with pytest.raises(ValueError, match=r"model: got 'features\.2\.conv\.2', need a layer without a gate"):
        insert_gate(model, SqueezeExcite)
