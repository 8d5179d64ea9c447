"""Families of attention patterns: each head's pattern as a small code, and heads grouped by it.

Paper: Li et al. 2023, "How Does Attention Work in Vision Transformers? A Visual Analytics Attempt" (IEEE TVCG, arXiv 2303.13731). No code
was published; the paper names an autoencoder over attention patterns and leaves its form open. Here: a small convolutional autoencoder over
relative patterns (`relative_attention_map`), codes of 32 numbers, k-means, and a plane for pictures by principal components.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import require, require_int, require_tensor
from .head_scores import HeadScores
from .record import Record
from .spatial_attention import Grid, relative_attention_map

__all__ = ["AttentionPatternAE", "PatternFamilies", "attention_patterns", "fit_patterns"]


class AttentionPatternAE(nn.Module):
    """An autoencoder of patterns: (B, 2 height - 1, 2 width - 1), rows that sum to about 1 -> the same, through `latent` numbers.

    Args:
        grid: (height, width) in patches. latent: size of the code. width: channels of the convolutions.
    """

    def __init__(self, grid: Grid, latent: int = 32, width: int = 16) -> None:
        super().__init__()
        for name, value in (("latent", latent), ("width", width), ("grid", grid[0]), ("grid", grid[1])):
            require_int(name, value, 1)
        self.shape = (2 * grid[0] - 1, 2 * grid[1] - 1)
        small = tuple(-(-side // 4) for side in self.shape)
        self.encoder = nn.Sequential(
            nn.Conv2d(1, width, 3, stride=2, padding=1), nn.GELU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1), nn.GELU(),
            nn.Flatten(), nn.Linear(width * small[0] * small[1], latent),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Linear(latent, width * small[0] * small[1]), nn.Unflatten(1, (width, *small)), nn.GELU(),
            nn.ConvTranspose2d(width, width, 4, stride=2, padding=1), nn.GELU(),
            nn.ConvTranspose2d(width, 1, 4, stride=2, padding=1),
        )  # fmt: skip

    def encode(self, patterns: Tensor) -> Tensor:
        """(B, latent)."""
        require_tensor("patterns", patterns, dims=3, floating=True)
        require(
            tuple(patterns.shape[1:]) == self.shape, "patterns", f"shape {tuple(patterns.shape)}", f"(B, *{self.shape})"
        )
        return self.encoder(self._scaled(patterns)[:, None])

    def forward(self, patterns: Tensor) -> Tensor:
        """Patterns as they come out again, in the scale of `_scaled`."""
        made = self.decoder(self.encode(patterns))[:, 0]
        return made[:, : self.shape[0], : self.shape[1]]

    def loss(self, patterns: Tensor) -> Tensor:
        """Mean square of what is lost."""
        return F.mse_loss(self(patterns), self._scaled(patterns))

    @staticmethod
    def _scaled(patterns: Tensor) -> Tensor:
        """Square roots, as a share of the largest: sharp and flat patterns then weigh alike, and faint parts are seen."""
        top = patterns.flatten(1).amax(1).clamp(min=torch.finfo(patterns.dtype).tiny)
        return (patterns / top[:, None, None]).clamp(min=0.0).sqrt()


@dataclass(eq=False)
class PatternFamilies:
    """What `fit_patterns` found.

    Attributes:
        family: `HeadScores` (L, H), the number of each head's family, the largest family 0. codes: (L, H, latent), the mean over images.
        plane: (L, H, 2), codes on their two principal components. prototypes: (families, 2 height - 1, 2 width - 1), mean patterns.
        model: the autoencoder. losses: of its training.
    """

    family: HeadScores
    codes: Tensor
    plane: Tensor
    prototypes: Tensor
    model: AttentionPatternAE
    losses: list[float]


def attention_patterns(record: Record, grid: Grid, prefix: int | None = None) -> Tensor:
    """The relative pattern of every head on every image, (images, L, H, 2 height - 1, 2 width - 1)."""
    return torch.stack(
        [relative_attention_map(record.weights(layer), grid, prefix).cpu() for layer in record.layers], 1
    )


def fit_patterns(
    patterns: Tensor,
    *,
    families: int = 5,
    latent: int = 32,
    steps: int = 200,
    batch: int = 64,
    lr: float = 3e-3,
    seed: int = 0,
) -> PatternFamilies:
    """Train an autoencoder on patterns and group the heads by their codes.

        made = regard.record(vit, {"x": images})
        found = regard.lens.fit_patterns(regard.lens.attention_patterns(made, (14, 14)))

    Args:
        patterns: (images, L, H, 2 height - 1, 2 width - 1), of `attention_patterns`. families: how many, at most the number of heads.
        latent, steps, batch, lr: of the autoencoder (AdamW). seed: the same seed gives the same families.
    """
    require_tensor("patterns", patterns, dims=5, floating=True)
    images, layers, heads, tall, broad = patterns.shape
    require(
        tall % 2 == 1 and broad % 2 == 1,
        "patterns",
        f"shape {tuple(patterns.shape)}",
        "(images, L, H, 2 h - 1, 2 w - 1)",
    )
    require(
        1 <= require_int("families", families, 1) <= layers * heads, "families", families, f"at most {layers * heads}"
    )
    require_int("steps", steps, 1)
    flat = patterns.flatten(0, 2).float().nan_to_num()
    losses = []
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        model = AttentionPatternAE(((tall + 1) // 2, (broad + 1) // 2), latent)
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
        for _ in range(steps):
            loss = model.loss(flat[torch.randint(len(flat), (min(batch, len(flat)),))])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    with torch.no_grad():
        codes = torch.cat([model.encode(part) for part in flat.split(256)]).view(images, layers, heads, latent).mean(0)
        points = codes.flatten(0, 1)
        family = _kmeans(points, families, seed)
        order = torch.bincount(family, minlength=families).argsort(descending=True, stable=True)
        family = order.argsort()[family]
        centred = points - points.mean(0)
        axes = torch.linalg.svd(centred, full_matrices=False).Vh[:2]
        plane = F.pad(centred @ axes.T, (0, 2 - len(axes)))
        means = patterns.float().mean(0).flatten(0, 1)
        empty = torch.zeros(tall, broad)
        prototypes = torch.stack(
            [means[family == n].mean(0) if bool((family == n).any()) else empty for n in range(families)]
        )
    table = HeadScores(family.view(layers, heads).float(), name="family", info={"families": families, "seed": seed})
    return PatternFamilies(table, codes, plane.view(layers, heads, 2), prototypes, model.eval(), losses)


def _kmeans(points: Tensor, count: int, seed: int, rounds: int = 50) -> Tensor:
    """The nearest of `count` centres for each point (N, C), int64 (N,): Lloyd's algorithm from k-means++ starts, the best of five."""
    best, least = torch.zeros(len(points), dtype=torch.long), float("inf")
    generator = torch.Generator().manual_seed(seed)
    for _ in range(5):
        centres = points[torch.randint(len(points), (1,), generator=generator)]
        while len(centres) < count:
            far = torch.cdist(points, centres).amin(1).square()
            chance = far if bool(far.sum() > 0) else torch.ones_like(far)
            centres = torch.cat([centres, points[torch.multinomial(chance, 1, generator=generator)]])
        for _ in range(rounds):
            nearest = torch.cdist(points, centres).argmin(1)
            moved = torch.stack(
                [points[nearest == n].mean(0) if bool((nearest == n).any()) else centres[n] for n in range(count)]
            )
            if torch.equal(moved, centres):
                break
            centres = moved
        cost = float(torch.cdist(points, centres).amin(1).square().sum())
        if cost < least:
            best, least = torch.cdist(points, centres).argmin(1), cost
    return best
