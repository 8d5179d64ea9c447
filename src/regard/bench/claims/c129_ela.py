"""129 ELA: a gate that costs hardly any parameters or time."""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import nn

from ...nn import EfficientLocalAttention, SqueezeExcite, insert_gate
from .claim import Outcome, Scale
from .timing import times

PAPER, SLUG = "129", "ela"
SAYS = "ELA: a gate without channel reduction that adds hardly any parameters to a CNN, fewer than SE, and little time."
PLAIN, SE = "MobileNetV2", "with SE (reduction 24)"


def measure(scale: Scale) -> Outcome:
    try:
        from torchvision.models import mobilenet_v2
    except ImportError as error:
        raise ImportError("the claim of 129 needs torchvision: pip install 'regard[vision]'") from error
    size, batch = scale.pick(224, 64), scale.pick(4, 1)
    torch.manual_seed(0)
    plain = mobilenet_v2(weights=None).eval()
    networks: dict[str, nn.Module] = {PLAIN: plain, SE: copy.deepcopy(plain)}
    insert_gate(networks[SE], lambda channels: SqueezeExcite(channels, ratio=1 / 24))
    for variant in "TBSL":
        networks[f"with ELA-{variant}"] = copy.deepcopy(plain)
        insert_gate(networks[f"with ELA-{variant}"], lambda channels, v=variant: EfficientLocalAttention(channels, v))
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    found = times({name: partial(net, x) for name, net in networks.items()}, scale.pick(5, 1), scale.pick(3, 1))
    out = Outcome(
        f"MobileNetV2, batches of {batch} images of {size} x {size}, forward, the gate in every inverted residual",
        "a round",
    )
    for name, net in networks.items():
        base = None if name == PLAIN else PLAIN
        out.add(name, "parameters", "", sum(p.numel() for p in net.parameters()), against=base)
        out.add(name, "time", "s", found[name], against=base)
    added = {name: out.row(name, "parameters").mean - out.row(PLAIN, "parameters").mean for name in networks}
    for variant in "TB":
        name = f"with ELA-{variant}"
        out.check(f"parameters added by ELA-{variant}, of those added by SE", added[name] / added[SE], at_most=1.0)
    for variant in "TL":
        row = out.row(f"with ELA-{variant}", "time")
        out.check(
            f"time with ELA-{variant}, of that without", row.ratio or float("nan"), at_most=1.25, spread=row.spread
        )
    shares = ", ".join(f"{v} {added[f'with ELA-{v}'] / 1e3:.0f}k" for v in "TBSL")
    out.note = f"Parameters added: SE {added[SE] / 1e3:.0f}k, ELA {shares}. Accuracy was not measured."
    return out
