"""What every channel gate shares: the base class, strip pooling, and putting gates into an existing CNN.

A gate looks at a feature map (B, C, H, W) and multiplies it by factors of its own making; Efficient Local Attention,
Squeeze-and-Excitation, Coordinate Attention and their like differ only in the factors. Written here once, so that a
gate is just its factors, and so that any gate can be put into a pretrained CNN with `insert_gate`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

from torch import Tensor, nn

from ..._checks import bad_type, bad_value, require, require_name

Side = Literal["input", "output"]
Place = tuple[str, nn.Module, Side]


class FeatureGate(nn.Module):
    """Base of gates that keep the shape of their input: `y = x * factor_1(x) * factor_2(x) * ...`.

    A subclass defines `factors(x)`, a tuple of tensors that broadcast against x (B, C, H, W); `forward` multiplies
    them onto x in order, `gate` gives their product alone, to look at.
    """

    def factors(self, x: Tensor) -> tuple[Tensor, ...]:
        """The factors for x (B, C, H, W), each of a shape that broadcasts to x."""
        raise NotImplementedError(f"{type(self).__name__} must define factors(x)")

    def gate(self, x: Tensor) -> Tensor:
        """The whole gate (B, C, H, W) that `forward` multiplies onto x."""
        product = x.new_ones(())
        for factor in self.factors(x):
            product = product * factor
        return product.expand(x.shape)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> gated x of the same shape."""
        y = x
        for factor in self.factors(x):
            y = y * factor
        return y


def strip_means(x: Tensor) -> tuple[Tensor, Tensor]:
    """Strip pooling: x (B, C, H, W) -> (mean over the width (B, C, H), mean over the height (B, C, W))."""
    return x.mean(dim=3), x.mean(dim=2)


def require_feature_map(x: Tensor, channels: int) -> None:
    """Raise unless x is a (B, `channels`, H, W) tensor."""
    if not isinstance(x, Tensor):
        raise bad_type("x", x, "a torch.Tensor")
    require(x.dim() == 4 and x.shape[1] == channels, "x", f"shape {tuple(x.shape)}", f"shape (B, {channels}, H, W)")


# --- insertion -------------------------------------------------------------------------------------------------------


def _inverted_residual_places(model: nn.Module) -> Iterator[Place]:
    """The input of the projection conv of every inverted residual that expands (MobileNetV2 family).

    That is after depthwise conv, norm and activation, on the expanded width. Found by structure rather than by
    attribute names, so that torchvision's, timm's and plain re-implementations are all served.
    """
    for name, block in model.named_modules():
        if "InvertedResidual" not in type(block).__name__:
            continue
        convs = [(p, m) for p, m in block.named_modules() if isinstance(m, nn.Conv2d) and ".gate." not in f".{p}"]
        if len(convs) < 2:
            continue
        path, last = convs[-1]
        expands = convs[0][1].in_channels != last.in_channels
        if expands and last.kernel_size == (1, 1):
            yield f"{name}.{path}".lstrip("."), last, "input"


def _resnet_places(model: nn.Module, inner: bool) -> Iterator[Place]:
    """Residual blocks: the last norm's output before the skip is added; `inner`: the input of a bottleneck's conv3."""
    for name, block in model.named_modules():
        convs = [part for part in ("conv1", "conv2", "conv3") if isinstance(getattr(block, part, None), nn.Conv2d)]
        if not hasattr(block, "downsample") or len(convs) < 2:
            continue
        if inner and len(convs) == 3:
            yield f"{name}.conv3".lstrip("."), block.conv3, "input"
        else:
            norm = f"bn{len(convs)}"
            yield f"{name}.{norm}".lstrip("."), getattr(block, norm), "output"


_PRESETS: dict[str, Callable[[nn.Module], Iterator[Place]]] = {
    "mbv2": _inverted_residual_places,
    "resnet": partial(_resnet_places, inner=False),
    "resnet_inner": partial(_resnet_places, inner=True),
}


def _chosen_places(model: nn.Module, where: Callable[[str, nn.Module], Side | None]) -> Iterator[Place]:
    for name, module in model.named_modules():
        side = where(name, module)
        if side is not None:
            require(side in ("input", "output"), "where", side, f"'input', 'output' or None for module {name!r}")
            yield name, module, side


def _width(name: str, module: nn.Module, side: Side) -> int:
    for attribute in (("in_channels",) if side == "input" else ("out_channels",)) + ("num_features", "num_channels"):
        width = getattr(module, attribute, None)
        if isinstance(width, int):
            return width
    raise bad_value("where", name, "a conv or norm module, whose number of channels can be read")


def _gate_input(module: nn.Module, args: tuple, residual: bool) -> tuple:
    x = args[0]
    y = module.get_submodule("gate")(x)
    return (x + y if residual else y, *args[1:])


def _gate_output(module: nn.Module, args: tuple, output: Tensor, residual: bool) -> Tensor:
    y = module.get_submodule("gate")(output)
    return output + y if residual else y


def insert_gate(
    model: nn.Module,
    factory: Callable[[int], nn.Module],
    where: str | Callable[[str, nn.Module], Side | None] = "mbv2",
    *,
    residual: bool = False,
) -> list[str]:
    """Put a gate into every fitting place of a CNN, in place, without renaming any of its parameters.

    Each gate becomes the child module `gate` of the conv or norm layer it acts on, so all existing state-dict names
    stay (a pretrained checkpoint still loads, with `strict=False` for the gates themselves) and the gates train,
    move, save and copy with the model.

    Args:
        model: a CNN, e.g. of torchvision or timm; it is changed.
        factory: makes a gate from a number of channels, e.g. `EfficientLocalAttention` or
            `lambda channels: EfficientLocalAttention(channels, variant="T")`. The gate maps (B, C, H, W) to the same
            shape; it is moved to the device, dtype and train/eval mode of the layer it joins.
        where: "mbv2": in inverted residuals that expand, after the depthwise conv's activation and before the linear
            1x1 conv (where ELA's authors put it); "resnet": after the last norm of each residual block, before the
            skip is added (the usual place of SE and ECA); "resnet_inner": the same for basic blocks, but before the
            last 1x1 conv of bottlenecks (where ELA's authors put it). Or a function of (module name, module) that
            returns "input" or "output" to gate that side of the module, or None.
        residual: use `x + gate(x)` instead of `gate(x)` (what ELA's segmentation and YOLOF code does).

    Returns:
        The names of the gates, for `model.get_submodule`.

    Raises:
        ValueError: no place fits, an unknown `where`, a place that already carries a gate, or a module without a
            readable number of channels. TypeError: `model` or `factory` of the wrong kind.
    """
    if not isinstance(model, nn.Module):
        raise bad_type("model", model, "a torch.nn.Module")
    if not callable(factory):
        raise bad_type("factory", factory, "a callable: channels -> gate module")
    if callable(where):
        places = list(_chosen_places(model, where))
    else:
        places = list(_PRESETS[require_name("where", where, _PRESETS)](model))
    if not places:
        raise bad_value("where", where, f"a rule that fits some module of {type(model).__name__}; none fits")
    for name, module, _ in places:
        require(not hasattr(module, "gate"), "model", name, "a layer without a gate (this one already has one)")

    for name, module, side in places:
        gate = factory(_width(name, module, side))
        if not isinstance(gate, nn.Module):
            raise bad_type("factory", gate, "a callable that returns a torch.nn.Module")
        reference = next(iter(module.parameters()), None)
        if reference is not None:
            gate = gate.to(device=reference.device, dtype=reference.dtype)
        module.add_module("gate", gate.train(module.training))
        if side == "input":
            module.register_forward_pre_hook(partial(_gate_input, residual=residual))
        else:
            module.register_forward_hook(partial(_gate_output, residual=residual))
    return [f"{name}.gate".lstrip(".") for name, _, _ in places]
