"""Small convolutional blocks that several networks share: conv + norm pairs, residuals, and folding them for inference.

The LeViT family of networks (EfficientViT, SHViT, RepViT ...) is built of these. A block that can be simplified once
its running statistics are final has `fuse()`, which returns the module that may stand in its place; `fuse_conv_bn`
walks a model and puts them there.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .._checks import bad_type, bad_value, require, require_fraction, require_int
from .channel.gate import FeatureGate, require_feature_map


class ConvBN(nn.Module):
    """Conv2d without bias, then BatchNorm2d: (B, C_in, H, W) -> (B, C_out, H', W').

    Arguments are those of `nn.Conv2d`; `bn_weight_init` is the initial weight of the norm (0 makes a residual branch
    start as nothing).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        bn_weight_init: float = 1.0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        nn.init.constant_(self.bn.weight, bn_weight_init)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))

    @torch.no_grad()
    def fuse(self) -> nn.Conv2d:
        """One Conv2d with bias that equals this module in eval mode."""
        scale, shift = _affine(self.bn)
        fused = copy.deepcopy(self.conv)
        dtype = fused.weight.dtype
        fused.weight = nn.Parameter((fused.weight * scale[:, None, None, None]).to(dtype))
        fused.bias = nn.Parameter(shift.to(dtype))
        return fused


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` that takes single-value groups at batch size 1 too (giving the bias, as at other batch sizes)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class BNLinear(nn.Module):
    """BatchNorm1d, then Linear: (B, C_in) -> (B, C_out), the classifier of the LeViT family.

    Args:
        bias: whether the linear layer has one.
        std: standard deviation of its initial weights (truncated normal).
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, std: float = 0.02) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(in_features)
        self.linear = nn.Linear(in_features, out_features, bias=bias)
        nn.init.trunc_normal_(self.linear.weight, std=std)
        if bias:
            nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.bn(x))

    @torch.no_grad()
    def fuse(self) -> nn.Linear:
        """One Linear that equals this module in eval mode."""
        scale, shift = _affine(self.bn)
        fused = copy.deepcopy(self.linear)
        weight, bias = fused.weight, fused.bias
        folded = weight.to(shift.dtype) @ shift
        fused.weight = nn.Parameter((weight * scale).to(weight.dtype))
        fused.bias = nn.Parameter((folded if bias is None else folded + bias).to(weight.dtype))
        return fused


def drop_samples(y: Tensor, drop: float, training: bool) -> Tensor:
    """Stochastic depth: y (B, ...) of a residual branch, zeroed for a share `drop` of the samples, the others scaled up."""
    if not training or drop == 0.0:
        return y
    kept = torch.rand(y.shape[0], *[1] * (y.dim() - 1), device=y.device) >= drop
    return y * (kept.to(y.dtype) / (1.0 - drop))


class Residual(nn.Module):
    """`x + branch(x)`; in training, `drop` is the chance that a sample's branch is left out (the others scaled up)."""

    def __init__(self, branch: nn.Module, drop: float = 0.0) -> None:
        super().__init__()
        require(require_fraction("drop", drop) < 1.0, "drop", drop, "a probability in [0, 1)")
        self.branch = branch
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        return x + drop_samples(self.branch(x), self.drop, self.training)

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """A single Conv2d where the branch is a shape-keeping `ConvBN` (the skip becomes a 1 in the centre tap)."""
        conv = self.branch.fuse() if isinstance(self.branch, ConvBN) else self.branch
        if not isinstance(conv, nn.Conv2d) or not _keeps_shape(conv):
            return self
        per_group = conv.in_channels // conv.groups
        output = torch.arange(conv.out_channels, device=conv.weight.device)
        conv.weight[output, output % per_group, conv.kernel_size[0] // 2, conv.kernel_size[1] // 2] += 1.0
        return conv


class ConvFeedForward(nn.Module):
    """1x1 `ConvBN` to `hidden` channels, ReLU, 1x1 `ConvBN` back (its norm weight starts at 0). (B, C, H, W) kept."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.pw1 = ConvBN(dim, hidden)
        self.pw2 = ConvBN(hidden, dim, bn_weight_init=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.pw2(self.pw1(x).relu())


class SqueezeExcite(FeatureGate):
    """Squeeze-and-Excitation (Hu et al. 2018, arXiv 1709.01507): gate channels by their mean over the map.

    `y = x * sigmoid(fc2(relu(fc1(mean(x)))))` with 1x1 convs that have biases. Parameter names are timm's.

    Args:
        channels: number of channels.
        ratio: hidden channels as a fraction of `channels`, rounded to the nearest multiple of `divisor` (halves up)
            and never below it, as timm does.
        divisor: see `ratio`.
        hidden: the number of hidden channels itself, instead of `ratio`.
    """

    def __init__(self, channels: int, ratio: float = 0.25, divisor: int = 8, hidden: int | None = None) -> None:
        super().__init__()
        require_int("channels", channels, 1)
        if hidden is None:
            require(ratio > 0, "ratio", ratio, "a number > 0")
            require_int("divisor", divisor, 1)
            hidden = max(divisor, int(channels * ratio + divisor / 2) // divisor * divisor)
        require_int("hidden", hidden, 1)
        self.channels = channels
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, channels, 1)

    def factors(self, x: Tensor) -> tuple[Tensor]:
        """x (B, C, H, W) -> the channel gate (B, C, 1, 1) in (0, 1)."""
        require_feature_map(x, self.channels)
        return (self.fc2(self.fc1(x.mean(dim=(2, 3), keepdim=True)).relu()).sigmoid(),)


def fuse_conv_bn(model: nn.Module) -> nn.Module:
    """Fold every batch norm of `ConvBN`, `BNLinear` and `Residual` blocks into its neighbour, in place, for inference.

    Returns the model itself (or its replacement where the model is such a block), put into eval mode, since running
    statistics are what is folded. Outputs equal those of the unfused model in eval mode up to rounding. Any module
    with a method `fuse()` that returns its replacement takes part.
    """
    if not isinstance(model, nn.Module):
        raise bad_type("model", model, "a torch.nn.Module")
    model.eval()
    if isinstance(model, (ConvBN, BNLinear, Residual)):
        model = model.fuse()
    _fuse_children(model)
    return model


def _fuse_children(module: nn.Module) -> None:
    for name, child in list(module.named_children()):
        fuse = getattr(child, "fuse", None)
        if callable(fuse):
            child = fuse()
            if not isinstance(child, nn.Module):
                raise bad_type(f"{name}.fuse()", child, "a method that returns the module to stand in its place")
            setattr(module, name, child)
        _fuse_children(child)


def _affine(bn: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """The scale and shift (at least float32) that an eval-mode batch norm is."""
    mean, variance = bn.running_mean, bn.running_var
    if mean is None or variance is None:
        raise bad_value("bn", bn, "a batch norm that keeps running statistics")
    dtype = torch.promote_types(variance.dtype, torch.float32)
    scale = bn.weight.to(dtype) * (variance.to(dtype) + bn.eps).rsqrt()
    return scale, bn.bias.to(dtype) - mean.to(dtype) * scale


def _keeps_shape(conv: nn.Conv2d) -> bool:
    same = all(k % 2 == 1 and p == d * (k // 2) for k, p, d in zip(conv.kernel_size, conv.padding, conv.dilation))
    return same and set(conv.stride) == {1} and conv.in_channels == conv.out_channels


# The LeViT family's state dicts call a ConvBN's parts `c` and `bn`, a residual's branch `m` and a classifier's `l`.
_SHORT_NAMES = {"c": "conv", "m": "branch", "l": "linear"}


def split_joint_qk(state: dict[str, Tensor], joint: str, names: dict[str, str]) -> dict[str, Tensor]:
    """Halve the rows of the layer `joint` into `q_proj` and `k_proj`; rename other layers by `names` (those not in it stay)."""
    ours: dict[str, Tensor] = {}
    for name, tensor in state.items():
        head, _, kind = name.rpartition(".")
        if head == joint:
            ours[f"q_proj.{kind}"], ours[f"k_proj.{kind}"] = tensor.chunk(2)
        else:
            ours[names.get(head, head) + f".{kind}"] = tensor
    return ours


def split_grouped_qkv(tensor: Tensor, num_heads: int, num_kv_heads: int, head_dim: int) -> tuple[Tensor, ...]:
    """lit-gpt's joint projection (weight or bias), rows group by group (its queries, its key, its value) -> those of q, k, v."""
    group = num_heads // num_kv_heads
    rows = tensor.unflatten(0, (num_kv_heads, group + 2, head_dim))
    return tuple(part.flatten(0, 2) for part in rows.split((group, 1, 1), dim=1))


def levit_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the LeViT family's short module names in a state dict to those of this file; ours pass unchanged."""
    return {".".join(_SHORT_NAMES.get(part, part) for part in key.split(".")): value for key, value in state.items()}


def rename_keys(
    state: dict[str, Tensor], *rules: tuple[str, str | Callable[[re.Match[str]], str]]
) -> dict[str, Tensor]:
    """Apply regular-expression (pattern, replacement or function of the match) rules, in order, to the keys."""
    renamed = {}
    for key, value in state.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed
