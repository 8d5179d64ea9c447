"""Paper 129: torchvision's blocks with ELA put in by `insert_gate`, holding the weights of the authors' blocks."""

import re

from torch import nn
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.resnet import BasicBlock, Bottleneck

import regard
from regard.nn import EfficientLocalAttention, insert_gate


def inverted_residuals(case):
    """MobileNetV2 blocks; the authors number one Sequential through, torchvision nests conv, norm and activation."""
    model = nn.Sequential(*(InvertedResidual(*arguments) for arguments in case.meta["official_kwargs"]))
    assert insert_gate(model, EfficientLocalAttention, "mbv2") == ["1.conv.2.gate", "2.conv.2.gate"]
    plain = {"0": "0.0", "1": "0.1", "3": "1", "4": "2"}
    expanding = {"0": "0.0", "1": "0.1", "3": "1.0", "4": "1.1", "6": "2.gate", "7": "2", "8": "3"}

    def rename(match):
        block, part = match.groups()
        return f"{block}.conv.{(plain if block == '0' else expanding)[part]}."

    state = {re.sub(r"^(\d)\.conv\.(\d)\.", rename, name): value for name, value in case.params.items()}
    regard.load_official(model, state)
    return {"y": model.eval()(case.inputs["x"])}


def residual_blocks(case):
    """ResNet blocks of the segmentation folder: the gate inside bottlenecks, with a residual around it."""
    found = {}
    blocks = {
        "basic": (BasicBlock(16, 16), ("feat0.", "bn2.gate.")),
        "bottleneck": (Bottleneck(64, 16), ("feat1.", "conv3.gate.")),
    }
    for name, (block, (theirs, ours)) in blocks.items():
        model = nn.Sequential(block)
        insert_gate(model, lambda width: EfficientLocalAttention(width, "S"), "resnet_inner", residual=True)
        params = {key.removeprefix(name + "."): value for key, value in case.params.items() if key.startswith(name)}
        regard.load_official(block, {key.replace(theirs, ours): value for key, value in params.items()})
        found[name] = model.eval()(case.inputs[name])
    return found
