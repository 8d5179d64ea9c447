"""127 SHViT: fast on a CPU, by its macro design; folding batch norms makes it faster at the same outputs."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from ...models.shvit import shvit_s1, shvit_s4
from .claim import Outcome, Scale
from .timing import times

PAPER, SLUG = "127", "shvit"
SAYS = "SHViT-S4 is 8.1 times as fast as MobileViTv2-1.0 on a CPU (at higher ImageNet accuracy, not measured here)."
PEER, FUSED, PLAIN, SMALL = "MobileViTv2-1.0 (timm)", "SHViT-S4, folded", "SHViT-S4", "SHViT-S1, folded"


def measure(scale: Scale) -> Outcome:
    size, batch = scale.pick(256, 64), scale.pick(4, 1)
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    plain = _shaken(shvit_s4()).eval()
    fused = shvit_s4().eval()
    fused.load_state_dict(plain.state_dict())
    fused = fused.fuse()
    networks = {PEER: _peer(), PLAIN: plain, FUSED: fused, SMALL: shvit_s1().eval().fuse()}
    out = Outcome(
        f"batches of {batch} images of {size} x {size}, float32, random weights, forward", "a round of timing"
    )
    found = times({name: partial(net, x) for name, net in networks.items()}, scale.pick(5, 1), scale.pick(3, 1))
    for name, net in networks.items():
        rates = [batch / seconds for seconds in found[name]]
        out.add(name, "images a second", "1/s", rates, against=None if name == PEER else PEER)
        out.add(name, "parameters", "", sum(p.numel() for p in net.parameters()))
    with torch.no_grad():
        want = plain(x)
        error = float((fused(x) - want).abs().max() / want.abs().max())
    lead = out.row(FUSED, "images a second")
    out.check("speed of SHViT-S4 over MobileViTv2-1.0", lead.ratio or 0.0, at_least=8.1, spread=lead.spread, digits=1)
    gain = [a / b for a, b in zip(lead.values, out.row(PLAIN, "images a second").values)]
    spread = (max(gain) - min(gain)) / 2
    out.check("speed-up by folding", sum(gain) / len(gain), at_least=1.0, spread=spread)
    out.check("largest relative change of the logits by folding", error, at_most=1e-4, digits=1)
    out.note = "The paper measures another CPU through ONNX Runtime; here both networks run in PyTorch eager mode."
    return out


def _peer() -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise ImportError("the claim of 127 compares with a network of timm: pip install 'regard[vision]'") from error
    return timm.create_model("mobilevitv2_100", pretrained=False).eval()


def _shaken(net: nn.Module) -> nn.Module:
    """Norm weights and statistics away from 0 and 1, which would hide what folding does."""
    generator = torch.Generator().manual_seed(1)
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            for tensor, low, high in (
                (module.weight, 0.5, 1.0), (module.bias, -0.1, 0.1), (module.running_mean, -0.1, 0.1),
                (module.running_var, 0.7, 1.3),
            ):  # fmt: skip
                tensor.data.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)  # type: ignore[union-attr]
    return net
