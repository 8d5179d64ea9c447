"""033 GAAM: Gaussian weights on frozen features against a linear probe and one layer of multi-head attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...nn.sequence.gaussian_adaptive_attention import GaussianBlock, importance_factor
from ...nn.sequence.softmax_attention import SoftmaxAttention
from .claim import Outcome, Scale

PAPER, SLUG = "033", "gaam"
SAYS = (
    "GAAM: on frozen features, Gaussian weights of a few numbers a head better the classifier more than multi-head attention of many "
    "more parameters, and their importance factors tell which features it stands on."
)
RIGHT, PARAMETERS, HIDDEN = "right", "parameters beside the probe", "right, an eighth of the features hidden"
LAYERS = 3


class _Classifier(nn.Module):
    """Features (B, LAYERS, C), perhaps through a mixer with a residual, to 10 classes."""

    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        self.kind = kind
        self.mixer: nn.Module = nn.Identity()
        if kind == "Gaussian":
            self.mixer = GaussianBlock(axis=-1, num_heads=4, num_gaussians=4, num_layers=2)
        elif kind == "multi-head":
            self.mixer = SoftmaxAttention(width, 4, causal=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(LAYERS * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(x) if self.kind == "multi-head" else self.mixer(x)
        return self.head(self.norm(x).flatten(1))


def measure(scale: Scale) -> Outcome:
    width, epochs, seeds = scale.pick((128, 150, 3), (16, 3, 1))
    learn, learn_y, test, test_y = _features(width)
    out = Outcome(
        f"noisy patterns of ten classes behind a frozen random network ({LAYERS} layers of width {width}), {epochs} epochs of training",
        "seed",
    )
    right: dict[str, list[float]] = {"linear": [], "Gaussian": [], "multi-head": []}
    size: dict[str, int] = {}
    hidden: dict[str, list[float]] = {"most important": [], "at random": []}
    for seed in range(seeds):
        for kind in right:
            torch.manual_seed(seed)
            model = _Classifier(kind, width)
            size[kind] = sum(p.numel() for p in model.mixer.parameters())
            _train(model, learn, learn_y, epochs)
            right[kind].append(_right(model, test, test_y))
            if kind == "Gaussian":
                with torch.no_grad():
                    weights = model.mixer(learn, return_weights=True)[1][0]
                factors = importance_factor(weights).flatten()
                count = len(factors) // 8
                drawn = torch.randperm(len(factors), generator=torch.Generator().manual_seed(seed))
                for label, chosen in (("most important", factors.topk(count).indices), ("at random", drawn[:count])):
                    shut = test.flatten(1).clone()
                    shut[:, chosen] = 0
                    hidden[label].append(_right(model, shut.view_as(test), test_y))
    for kind, values in right.items():
        out.add(kind, RIGHT, "share", values, against=None if kind == "linear" else "linear")
        out.add(kind, PARAMETERS, "numbers", float(size[kind]))
    out.add("at random", HIDDEN, "share", hidden["at random"])
    out.add("most important", HIDDEN, "share", hidden["most important"], against="at random")
    mean = {kind: out.row(kind, RIGHT).mean for kind in right}
    out.check(
        "right with Gaussian weights above the linear probe", mean["Gaussian"] - mean["linear"], at_least=0.0, digits=3
    )
    out.check(
        "right with Gaussian weights above multi-head attention",
        mean["Gaussian"] - mean["multi-head"],
        at_least=0.0,
        digits=3,
    )
    out.check(
        "parameters of Gaussian weights over multi-head attention", size["Gaussian"] / size["multi-head"], at_most=0.01
    )
    lost = out.row("at random", HIDDEN).mean - out.row("most important", HIDDEN).mean
    out.check("lost by hiding the most important instead of random features", lost, at_least=0.0, digits=3)
    out.note = "The paper's features are those of large speech, text and image models."
    return out


def _features(width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Patterns as features of every layer of a frozen network: 1200 to learn from, 600 to test on.

    A pattern is its class' mean (10 classes, 64 values, drawn once) under noise, gain and offset of the sample's own.
    """
    generator = torch.Generator().manual_seed(0)
    count = 1800
    y = torch.randint(10, (count,), generator=generator)
    clean = torch.randn(10, 64, generator=generator)[y]
    gain = 0.5 + torch.rand(count, 1, generator=generator)
    noise, offset = torch.randn(count, 64, generator=generator), torch.randn(count, 1, generator=generator)
    x = gain * (clean + 1.5 * noise) + offset
    layers = []
    for _ in range(LAYERS):
        x = (x @ torch.randn(x.shape[1], width, generator=generator) * 2 / x.shape[1] ** 0.5).tanh()
        layers.append(x)
    features = torch.stack(layers, 1)
    return features[:1200], y[:1200], features[1200:], y[1200:]


def _train(model: nn.Module, x: Tensor, y: Tensor, epochs: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, weight_decay=1e-4)
    for _ in range(epochs):
        for rows in torch.randperm(len(y)).split(200):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()


@torch.no_grad()
def _right(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((model(x).argmax(-1) == y).float().mean())
