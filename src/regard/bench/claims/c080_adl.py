"""080 ADL: the loss drives tokens to look at different places."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...losses.attention_diversification import attention_diversification
from .claim import Outcome, Scale

PAPER, SLUG = "080", "adl"
SAYS = (
    "ADL: trained with the diversification loss, rows of the attention maps become less alike, and a vision transformer stands noise "
    "better at equal clean accuracy."
)
CLASSES = 4


class TinyViT(nn.Module):
    """A ViT for 32 x 32 grey images that gives its attention maps back."""

    def __init__(self, dim: int = 48, heads: int = 4, depth: int = 3, patch: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.patches = nn.Conv2d(1, dim, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, (32 // patch) ** 2, dim))
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"norm1": nn.LayerNorm(dim), "qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim),
                           "norm2": nn.LayerNorm(dim), "mlp": nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))})
            for _ in range(depth)
        )  # fmt: skip
        self.head = nn.Linear(dim, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        maps = []
        for block in self.blocks:
            q, k, v = block["qkv"](block["norm1"](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # type: ignore[index, operator]
            weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
            maps.append(weights)
            x = x + block["proj"]((weights @ v).transpose(1, 2).flatten(2))  # type: ignore[index, operator]
            x = x + block["mlp"](block["norm2"](x))  # type: ignore[index, operator]
        return self.head(x.mean(1)), maps


def shapes(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Grey images (count, 1, 32, 32) of one disc, ring, square or cross somewhere, and which it is."""
    kind = torch.randint(CLASSES, (count, 1, 1), generator=generator)
    place, size = (torch.rand(count, n, 1, generator=generator) for n in (2, 1))
    centre, radius = 9 + 14 * place, 4 + 4 * size
    axis = torch.arange(32.0)
    dy, dx = (axis[None, :, None] - centre[:, :1]).abs(), (axis[None, None, :] - centre[:, 1:]).abs()
    distance = (dx**2 + dy**2).sqrt()
    inside = torch.stack(
        [
            distance < radius,
            (distance < radius) & (distance > 0.55 * radius),
            torch.maximum(dx, dy) < 0.85 * radius,
            (torch.minimum(dx, dy) < 0.3 * radius) & (torch.maximum(dx, dy) < radius),
        ]
    )
    image = inside[kind[:, 0, 0], torch.arange(count)].float()
    return (image + 0.2 * torch.randn(image.shape, generator=generator))[:, None], kind[:, 0, 0]


def row_cosine(maps: list[Tensor]) -> float:
    """Mean cosine of two different rows of the head-averaged maps, over layers and images."""
    values = []
    for weights in maps:
        rows = F.normalize(weights.mean(1), dim=-1)
        n = rows.shape[1]
        values.append(((rows @ rows.transpose(1, 2)).sum((1, 2)) - n) / (n * (n - 1)))
    return float(torch.stack(values).mean())


def measure(scale: Scale) -> Outcome:
    seeds, steps = scale.pick(3, 2), scale.pick(600, 3)
    noises = (0.0, 0.2, 0.4)
    out = Outcome(f"a 3-layer ViT on drawn shapes, {CLASSES} classes, {steps} steps of 64 images", "a seed")
    found: dict[str, list[list[float]]] = {"without ADL": [], "with ADL": []}
    for seed in range(seeds):
        for label, weight in (("without ADL", 0.0), ("with ADL", 1.0)):
            found[label].append(_train_and_test(seed, weight, steps, scale.pick(512, 64), noises))
    figures = ["cosine of attention rows", "the loss itself", *(f"accuracy with noise {noise:g}" for noise in noises)]
    for label, runs in found.items():
        for figure, values in zip(figures, zip(*runs)):
            out.add(label, figure, "", list(values), against=None if label == "without ADL" else "without ADL")
    before, after = (out.row(label, figures[0]).mean for label in found)
    out.check("cosine of attention rows with ADL, of that without", after / max(before, 1e-9), at_most=0.9)
    before, after = (out.row(label, figures[1]).mean for label in found)
    what = "the loss itself (rows cut off at twice the uniform weight), of that without"
    out.check(what, after / max(before, 1e-9), at_most=0.9)
    gains = [out.row("with ADL", figure).mean - out.row("without ADL", figure).mean for figure in figures[2:]]
    out.check("clean accuracy gained", gains[0], at_least=-0.01, digits=3)
    out.check("accuracy gained under the strongest noise", gains[-1], at_least=0.0, digits=3)
    spread = [b - a for a, b in zip(*(out.row(label, figures[-1]).values for label in found))]
    out.note = f"Under the strongest noise the gain ranges over seeds from {min(spread):.3f} to {max(spread):.3f}."
    return out


def _train_and_test(seed: int, weight: float, steps: int, tested: int, noises: tuple[float, ...]) -> list[float]:
    torch.manual_seed(seed)
    net, generator = TinyViT(), torch.Generator().manual_seed(1000 + seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=max(2, steps))
    for _ in range(steps):
        images, kinds = shapes(64, generator)
        logits, maps = net(images)
        loss = F.cross_entropy(logits, kinds)
        if weight:
            loss = loss + weight * attention_diversification(maps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    images, kinds = shapes(tested, torch.Generator().manual_seed(7))
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(8))
    with torch.no_grad():
        maps = net(images[:128])[1]
        values = [row_cosine(maps), float(attention_diversification(maps))]
        for strength in noises:
            values.append(float((net(images + strength * noise)[0].argmax(-1) == kinds).float().mean()))
    return values
