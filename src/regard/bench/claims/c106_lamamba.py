"""LaMamba-Diff: cost that grows as the pixels do; Mamba and window attention together against each alone."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ...models.dit_parts import time_waves
from ...models.lamamba_diff import LaMambaDiff
from ...nn.spatial.lamamba_block import LaMambaBlock
from ...nn.spatial.selective_scan_2d import SelectiveScan2D
from ...testbeds.images import digits
from ...testbeds.training import train
from .claim import Outcome, Scale

PAPER = "106"
SLUG = "lamamba"
SAYS = (
    "A LaMamba block, Mamba over the map and attention in windows, denoises better than either alone, snakes serve the scan better than "
    "raster order, and the cost grows as the number of tokens does, where full attention grows faster."
)
FLOPS, LOSS, SIZE = "multiplications and additions, times 4 in tokens", "denoising loss", "parameters"
WIDTH = 16


class _Denoiser(nn.Module):
    """8 x 8 images and times -> noise: blocks at one resolution."""

    def __init__(self, depth: int, parts: tuple[str, ...], scans: str) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(1, WIDTH), nn.Linear(WIDTH, 1)
        self.place = nn.Parameter(torch.randn(8, 8, WIDTH) * 0.02)
        self.time = nn.Sequential(nn.Linear(64, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.blocks = nn.ModuleList(
            LaMambaBlock(
                WIDTH,
                8,
                2,
                condition_dim=WIDTH,
                window=4,
                shift=2 * (i % 2),
                d_state=1,
                mlp_ratio=2.0,
                parts=parts,
                scans=scans,
            )
            for i in range(depth)
        )

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        h, c = self.first(x[..., None]) + self.place, self.time(time_waves(times * 1000, 64))
        for block in self.blocks:
            h = block(h, c)
        return self.last(self.norm(h))[..., 0]


def measure(scale: Scale) -> Outcome:
    steps, seeds, sides = scale.pick((200, 2, (16, 32, 64)), (3, 1, (8, 16)))
    out = Outcome(
        f"networks of 16 channels on maps of side {', '.join(map(str, sides))}, counted; noise prediction on 8 x 8 digits, "
        f"{WIDTH} channels, 4 blocks of both or 6 of one (with an MLP), {steps} steps of 32",
        repeats="seed; for the count, from one side to the next",
    )
    for label, options in (
        ("LaMamba", {"window": 8}),
        ("full attention", {"window": 10**6, "parts": ("attention", "mlp")}),
    ):
        counts = [_flops(side, **options) for side in sides]
        out.add(label, FLOPS, "times", [after / before for before, after in pairwise(counts)])
    images, kept = _images()
    kinds = {
        "both": (4, ("scan", "attention", "mlp"), "continuous"),
        "both, raster scan": (4, ("scan", "attention", "mlp"), "raster"),
        "Mamba alone": (6, ("scan", "mlp"), "continuous"),
        "windows alone": (6, ("attention", "mlp"), "continuous"),
    }
    for label, (depth, parts, scans) in kinds.items():
        found, size = [], 0
        for seed in range(seeds):
            torch.manual_seed(seed)
            model = _Denoiser(depth, parts, scans)
            size = sum(p.numel() for p in model.parameters())

            def batch(number: int, seed: int = seed) -> Tensor:
                return images[
                    torch.randint(len(images), (32,), generator=torch.Generator().manual_seed(1000 * seed + number))
                ]

            train(model, batch, steps=steps, loss=lambda m, x: _loss(m, x), lr=2e-3, seed=seed, progress=False)
            with torch.no_grad(), torch.random.fork_rng():
                torch.manual_seed(10**6)
                found.append(float(torch.stack([_loss(model.eval(), kept) for _ in range(8)]).mean()))
        out.add(label, LOSS, "", found, against=None if label == "both" else "both")
        out.add(label, SIZE, "", size)

    def ratio(one: str, other: str) -> float:
        return out.row(one, LOSS).mean / out.row(other, LOSS).mean

    out.check("cost of LaMamba at 4 times the tokens", max(out.row("LaMamba", FLOPS).values), at_most=4.05)
    out.check("cost of full attention at 4 times the tokens", out.row("full attention", FLOPS).values[-1], at_least=5.0)
    out.check("loss, both over Mamba alone", ratio("both", "Mamba alone"), at_most=1.0)
    out.check("loss, both over windows alone", ratio("both", "windows alone"), at_most=1.0)
    out.check("loss, snakes over raster", ratio("both", "both, raster scan"), at_most=1.0)
    return out


def _flops(side: int, **options: object) -> float:
    """Of a forward pass: matrix products and convolutions as counted, 9 a step, channel and state of each scan by formula."""
    torch.manual_seed(0)
    model = LaMambaDiff(side, 2, 16, (1, 1, 1, 1), 1, 2, num_classes=0, mlp_ratio=2.0, **options).eval()  # type: ignore[arg-type]
    scanned = 0.0

    def seen(layer: SelectiveScan2D, given: tuple[Tensor, ...], made: Tensor) -> None:
        nonlocal scanned
        scanned += 9.0 * 4 * made[..., 0].numel() * layer.inner * layer.d_state

    for layer in model.modules():
        if isinstance(layer, SelectiveScan2D):
            layer.out_norm.register_forward_hook(lambda norm, given, made, layer=layer: seen(layer, given, made))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(1, 2, side, side), torch.zeros(1))
    return counter.get_total_flops() + scanned


def _images() -> tuple[Tensor, Tensor]:
    """Digits in -1..1, to learn from and held out, (N, 8, 8) each."""
    found = digits()
    return 2 * found.learn[:, 0] - 1, 2 * found.kept[:, 0] - 1


def _loss(model: nn.Module, x: Tensor) -> Tensor:
    """Mean square of the noise that the model does not see in noisy images, over times drawn evenly (cosine schedule)."""
    times = torch.rand(len(x))
    share = (times * torch.pi / 2)[:, None, None]
    noise = torch.randn_like(x)
    return F.mse_loss(model(share.cos() * x + share.sin() * noise, times), noise)
