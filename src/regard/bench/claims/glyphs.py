"""A small vision task that needs attention, for claims about vision mixers: find the glyph that the image asks for, and say its colour.

Images are noisy grids of 5 x 5 glyphs. The first cell shows a white pattern; the same pattern stands once elsewhere, in one of four
colours, among others of other patterns. The answer is its colour: a token must find one of many, which weights spread evenly cannot do.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..small_training import train

__all__ = ["COLOURS", "accuracy", "glyphs"]

PATTERNS, COLOURS, SIDE = 12, 4, 5
NOISE = 0.3
_TINTS = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
_SHAPES = (torch.rand(PATTERNS, 4, 4, generator=torch.Generator().manual_seed(0)) > 0.5).float()


def glyphs(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (batch, 3, 4 * SIDE, 4 * SIDE), one glyph a cell of a SIDE x SIDE grid, and the colours asked for (batch,)."""
    cells = torch.zeros(batch, SIDE * SIDE, 3, 4, 4)
    pattern = torch.rand(batch, PATTERNS, generator=generator).argsort(-1)  # which stand in the image, each once
    places = 1 + torch.rand(batch, SIDE * SIDE - 1, generator=generator).argsort(-1)[:, :PATTERNS]
    colour = torch.randint(COLOURS, (batch, PATTERNS), generator=generator)
    rows = torch.arange(batch)[:, None]
    cells[rows, places] = _SHAPES[pattern][:, :, None] * _TINTS[colour][..., None, None]
    asked = torch.randint(PATTERNS, (batch,), generator=generator)
    each = torch.arange(batch)
    cells[:, 0] = _SHAPES[pattern[each, asked]][:, None]
    images = cells.unflatten(1, (SIDE, SIDE)).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
    return images + NOISE * torch.randn(images.shape, generator=generator), colour[each, asked]


class _Net(nn.Module):
    """Patches, two blocks of mixer and MLP on maps, and a classifier that reads the first cell."""

    def __init__(self, make: Callable[[int], nn.Module], dim: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, dim, 4, 4)
        self.position = nn.Parameter(0.1 * torch.randn(1, dim, SIDE, SIDE))
        self.mixers = nn.ModuleList(make(dim) for _ in range(2))
        self.norms = nn.ModuleList(nn.GroupNorm(1, dim) for _ in range(4))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Conv2d(dim, 2 * dim, 1), nn.GELU(), nn.Conv2d(2 * dim, dim, 1)) for _ in range(2)
        )
        self.head = nn.Linear(dim, COLOURS)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(images) + self.position
        for i, (mixer, mlp) in enumerate(zip(self.mixers, self.mlps)):
            x = x + mixer(self.norms[2 * i](x))
            x = x + mlp(self.norms[2 * i + 1](x))
        return self.head(x[:, :, 0, 0])


def accuracy(
    make: Callable[[int], nn.Module] | nn.Module,
    steps: int,
    seed: int,
    dim: int = 48,
    batch: int = 64,
    held_out: int = 1024,
    lr: float = 3e-3,
) -> tuple[float, nn.Module]:
    """Share of right answers on fresh images after `steps` steps with mixers `make(dim)`, (B, dim, H, W) kept; and the network.

    Given a network that an earlier call returned, that one is trained on (0 steps: only asked).
    """
    torch.manual_seed(seed)
    net, generator = make if isinstance(make, _Net) else _Net(make, dim), torch.Generator().manual_seed(seed)
    net.train()

    def loss(step: int) -> Tensor:
        images, colours = glyphs(batch, generator)
        return F.cross_entropy(net(images), colours)

    if steps:
        train(net.parameters(), loss, steps, lr=lr)
    net.eval()
    with torch.no_grad():
        images, colours = glyphs(held_out, torch.Generator().manual_seed(10_000 + seed))
        return float((net(images).argmax(-1) == colours).float().mean()), net
