"""Saliency by random masks over segments: how far the prediction moves, on average, when a place is among those left out.

SPES as "Cross-Attention is Half Explanation in Speech-to-Text Models" (Papi et al. 2025, arXiv 2509.18010) uses it; authors' code run for
numbers: hlt-mt/FBK-fairseq @ 4cd7c6d (Apache-2.0), `examples/speech_to_text/occlusion_explanation`, `xai_metrics`. It serves any input that
can be masked: spectrograms, encoder states, embeddings, patches.

What differs: superpixels are those of scikit-image (SLIC) only where it is installed, else a grid; ours are deterministic by a seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .._checks import require, require_fraction, require_int, require_name, require_tensor

__all__ = [
    "deviation_normalized",
    "grid_segments",
    "heat_of",
    "masked_saliency",
    "random_masks",
    "range_normalized",
    "slic_segments",
]

SCORES = ("kl", "difference")


def grid_segments(shape: Sequence[int], count: int) -> Tensor:
    """(T, F) int64: about `count` rectangles, as square as the shape allows, numbered from 0. F may be 1."""
    require(len(shape) == 2 and min(shape) >= 1, "shape", tuple(shape), "(T, F)")
    require_int("count", count, 1)
    times, bands = shape
    side = max(1.0, (times * bands / count) ** 0.5)
    columns = max(1, min(bands, round(bands / side)))
    rows = max(1, min(times, round(count / columns)))
    row = torch.arange(times) * rows // times
    column = torch.arange(bands) * columns // bands
    return row[:, None] * columns + column


def grids_for(x: Tensor, granularity: Sequence[int] = (2000, 2500, 3000)) -> list[Tensor]:
    """A grid (T, F) for each granularity, which is segments for 500 frames: fewer or more for other lengths, at most as for 750."""
    share = min(len(x), 750) / 500
    return [grid_segments(x.shape, max(2, round(count * share))) for count in granularity]


def slic_segments(x: Tensor, count: int, compactness: float = 0.1, sigma: float = 1.0) -> Tensor:
    """(T, F) superpixels of x, scaled to [0, 1], by scikit-image's SLIC with the authors' settings.

    Raises ImportError where scikit-image is not installed.
    """
    require_tensor("x", x, dims=2, floating=True)
    try:
        from skimage.segmentation import slic
    except ImportError as error:
        raise ImportError(
            "slic_segments: needs scikit-image (pip install scikit-image); or use grid_segments"
        ) from error
    low, high = x.min(), x.max()
    scaled = ((x - low) / (high - low).clamp(min=1e-12)).cpu().double().numpy()
    found = slic(scaled, n_segments=count, compactness=compactness, sigma=sigma, channel_axis=None)
    return torch.from_numpy(found).long() - int(found.min())


def random_masks(segments: Tensor, count: int, p: float = 0.5, generator: torch.Generator | None = None) -> Tensor:
    """(count, T, F) bool, True where a place stays; each segment of `segments` (T, F) is left out with chance p."""
    require_tensor("segments", segments, dims=2)
    require_int("count", count, 0)
    require_fraction("p", p)
    numbers = int(segments.max()) + 1 if segments.numel() else 0
    stays = torch.rand(count, numbers, generator=generator) >= p
    return stays[:, segments]


def heat_of(moved: Tensor, kept: Tensor) -> Tensor:
    """Mean movement over the masks that leave a place out.

    Args: moved (M, I): how far each of I predictions moved under each mask. kept (M, T, F): true or 1 where a place stays.
    Returns: (I, T, F); 0 where a place was never left out.
    """
    require(len(moved) == len(kept), "kept", f"{len(kept)} masks", f"{len(moved)}, as `moved`")
    gone = 1 - kept.to(moved.dtype)
    total = torch.einsum("mi,mtf->itf", moved, gone)
    times = gone.sum(0)
    return torch.where(times > 0, total / times.clamp(min=1e-12), 0.0)


def moved_by(original: Tensor, perturbed: Tensor, score: str = "kl", target: Tensor | None = None) -> Tensor:
    """How far predictions moved, (M, I): original (I, V) and perturbed (M, I, V) log-probabilities.

    score: "kl": KL(original || perturbed). "difference": probability of the target (I,) lost.
    """
    require_name("score", score, SCORES)
    if score == "kl":
        return (original.exp() * (original - perturbed)).nan_to_num(0.0).sum(-1)
    target = require_tensor("target", target, dims=1)
    before = original.exp().gather(-1, target[:, None])[:, 0]
    place = target[None, :, None].expand(len(perturbed), -1, 1)
    return before - perturbed.exp().gather(-1, place)[..., 0]


@torch.no_grad()
def masked_saliency(
    log_probs: Callable[[Tensor], Tensor],
    x: Tensor,
    segments: Sequence[Tensor] | None = None,
    masks: int = 2000,
    *,
    p: float = 0.5,
    score: str = "kl",
    target: Tensor | None = None,
    baseline: float = 0.0,
    at_once: int = 8,
    seed: int = 0,
    on_batch: Callable[[int, int], None] | None = None,
) -> Tensor:
    """(I, T, F): how much each place of x matters for each of I predictions.

    Args:
        log_probs: (M, T, F) variants of x -> (M, I, V) log-probabilities, the same predictions for each (forced decoding).
        x: (T, F). segments: maps (T, F) of segment numbers, at several granularities; the masks are shared out evenly among them
            (left over ones are not drawn). None: grids of 2000, 2500 and 3000 segments for 500 frames, fewer or more for other lengths as
            the authors scale theirs, at most as for 750.
        masks: how many in all; the authors' README takes 20000. p: chance of a segment to be left out (set to `baseline`).
        score, target: "kl" or "difference" of the probability of `target` (I,). at_once: variants in one call. seed: of the masks.
        on_batch: told (variants done, of how many).
    """
    require_tensor("x", x, dims=2, floating=True)
    require_int("masks", masks, 1)
    require_int("at_once", at_once, 1)
    require_name("score", score, SCORES)
    if segments is None:
        segments = grids_for(x)
    require(len(segments) > 0, "segments", segments, "at least one map")
    for one in segments:
        require(one.shape == x.shape, "segments", f"shape {tuple(one.shape)}", f"{tuple(x.shape)}, as x")
    original = log_probs(x[None])[0]
    each = max(1, masks // len(segments))
    generator = torch.Generator().manual_seed(require_int("seed", seed, 0))
    total, times, done = None, torch.zeros_like(x), 0
    for kept in _batches(segments, each, p, at_once, generator):
        kept = kept.to(x.device)
        moved = moved_by(original, log_probs(torch.where(kept, x, baseline)), score, target)
        gone = (~kept).to(moved.dtype)
        heat = torch.einsum("mi,mtf->itf", moved, gone)
        total = heat if total is None else total + heat
        times += gone.sum(0)
        done += len(kept)
        if on_batch is not None:
            on_batch(done, each * len(segments))
    assert total is not None
    return torch.where(times > 0, total / times.clamp(min=1), 0.0)


def _batches(
    segments: Sequence[Tensor], each: int, p: float, at_once: int, generator: torch.Generator
) -> Iterator[Tensor]:
    for one in segments:
        for begin in range(0, each, at_once):
            yield random_masks(one, min(at_once, each - begin), p, generator)


def deviation_normalized(heat: Tensor, causal: bool = False) -> Tensor:
    """Each prediction's map (I, T, F) less its mean, by its sample standard deviation; 0 where that is 0.

    causal: a map over previous tokens (I, I, 1): places after a prediction's own do not count and stay 0.
    """
    require_tensor("heat", heat, dims=3, floating=True)
    real = _real(heat, causal)
    count = real.flatten(1).sum(1)[:, None, None]
    kept = torch.where(real, heat, 0.0)
    mean = kept.sum((1, 2), keepdim=True) / count
    variance = (kept.square().sum((1, 2), keepdim=True) / count - mean.square()) * count / (count - 1)
    return torch.where(real, ((heat - mean) / variance.sqrt()).nan_to_num(0.0, 0.0, 0.0), 0.0)


def range_normalized(heat: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
    """Maps of the input (I, T, F) and of previous tokens (I, I, 1) on one scale: 0 the least of both, 1 the largest, for each
    prediction."""
    real = _real(previous, True)
    both = torch.cat([heat.flatten(1), torch.where(real, previous, float("inf")).flatten(1)], 1)
    low = both.amin(1)[:, None, None]
    both = torch.cat([heat.flatten(1), torch.where(real, previous, float("-inf")).flatten(1)], 1)
    width = both.amax(1)[:, None, None] - low
    return (heat - low) / width, torch.where(real, (previous - low) / width, 0.0)


def _real(heat: Tensor, causal: bool) -> Tensor:
    if not causal:
        return torch.ones_like(heat, dtype=torch.bool)
    require(heat.shape[0] == heat.shape[1], "heat", f"shape {tuple(heat.shape)}", "(I, I, 1), where causal")
    return torch.ones(heat.shape[:2], dtype=torch.bool, device=heat.device).tril()[..., None].expand_as(heat)
