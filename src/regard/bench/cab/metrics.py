"""The metrics of CAB's tasks, on plain tensors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["chamfer", "psnr", "rouge", "spectral_distances", "ssim"]


def psnr(made: Tensor, true: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images (B, H, W) in [0, 1], mean over images."""
    error = (made - true).square().mean((1, 2)).clamp(min=1e-12)
    return float((-10 * error.log10()).mean())


def ssim(made: Tensor, true: Tensor, window: int = 7) -> float:
    """Structural similarity of images (B, H, W) in [0, 1] with a flat window, mean over places and images."""

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x[:, None], window, 1)[:, 0]

    first, second = mean(made), mean(true)
    own, other = mean(made * made) - first**2, mean(true * true) - second**2
    both = mean(made * true) - first * second
    small, large = 0.01**2, 0.03**2
    ratio = (2 * first * second + small) * (2 * both + large)
    return float((ratio / ((first**2 + second**2 + small) * (own + other + large))).mean())


def spectral_distances(made: Tensor, true: Tensor, coefficients: int = 13) -> dict[str, float]:
    """MSD: root mean square difference of log-spectra (B, N, MEL), a frame at a time. MCD: the mel cepstral distortion in dB of the
    same frames, 10 / ln 10 * sqrt(2 sum of squared differences of cepstral coefficients 1 ... 12). Frames are paired as they stand."""
    mel = true.shape[-1]
    k, n = torch.arange(1, coefficients)[:, None], torch.arange(mel)[None]
    basis = math.sqrt(2 / mel) * torch.cos(math.pi / mel * (n + 0.5) * k)
    difference = (made - true) @ basis.T.to(true)
    distortion = 10 / math.log(10) * (2 * difference.square().sum(-1)).sqrt().mean()
    return {"MCD": float(distortion), "MSD": float((made - true).square().mean(-1).sqrt().mean())}


def rouge(made: Sequence[Sequence[int]], true: Sequence[Sequence[int]]) -> dict[str, float]:
    """ROUGE-1, -2 and -L as F1 in percent, mean over pairs of token lists."""
    totals = {"R-1": 0.0, "R-2": 0.0, "R-L": 0.0}
    for mine, theirs in zip(made, true):
        for name, size in (("R-1", 1), ("R-2", 2)):
            grams = [Counter(tuple(x[i : i + size]) for i in range(len(x) - size + 1)) for x in (mine, theirs)]
            totals[name] += _f1((grams[0] & grams[1]).total(), grams[0].total(), grams[1].total())
        totals["R-L"] += _f1(_common(mine, theirs), len(mine), len(theirs))
    return {name: 100 * value / len(true) for name, value in totals.items()}


def _f1(hits: int, mine: int, theirs: int) -> float:
    return 2 * hits / (mine + theirs) if mine + theirs else 0.0


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        last = 0
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], last + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def chamfer(made: Tensor, true: Tensor, near: float = 0.2) -> dict[str, float]:
    """Chamfer distances of point clouds (B, N, 3): CD-l1 (mean distance, half the sum of both ways), CD-l2 (squared, sum of both ways),
    and the F-score at distance `near`."""
    apart = torch.cdist(made, true)
    there, back = apart.amin(2), apart.amin(1)
    precision, recall = (there < near).float().mean(1), (back < near).float().mean(1)
    score = 2 * precision * recall / (precision + recall).clamp(min=1e-9)
    return {
        "CD-l1": float((there.mean(1) + back.mean(1)).mean() / 2),
        "CD-l2": float((there.square().mean(1) + back.square().mean(1)).mean()),
        "F-Score": float(score.mean()),
    }
