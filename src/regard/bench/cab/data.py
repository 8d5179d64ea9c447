"""Data of the reduced tasks: all made here from a seed, but the text, which CPython ships."""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..small_training import ByteText

__all__ = ["clouds", "documents", "images", "series", "speech", "text"]

SYMBOLS, MEL = 12, 16
WORDS, START, PICKED = 16, 0, 4
SPEECH_SYMBOLS, SPEECH_FRAMES = 12, 64
DOCUMENT = 48


@cache
def text() -> ByteText:
    return ByteText()


def images(count: int, generator: torch.Generator, size: int = 16) -> tuple[Tensor, Tensor]:
    """Smooth blobs and a straight edge, (count, size, size) in [0, 1], and the same seen at a quarter of the size and enlarged again."""
    axis = torch.linspace(-1, 1, size)
    y, x = axis[:, None], axis[None]
    centre = torch.rand(count, 4, 2, 1, 1, generator=generator) * 2 - 1
    width = 0.1 + 0.3 * torch.rand(count, 4, 1, 1, generator=generator)
    weight = torch.randn(count, 4, 1, 1, generator=generator)
    blobs = (weight * torch.exp(-((y - centre[:, :, 0]) ** 2 + (x - centre[:, :, 1]) ** 2) / width**2)).sum(1)
    turn = torch.rand(count, 1, 1, generator=generator) * math.pi
    edge = (x * turn.cos() + y * turn.sin() > torch.randn(count, 1, 1, generator=generator) * 0.4).float()
    sharp = torch.sigmoid(2 * (blobs + edge - 0.5))
    small = F.avg_pool2d(sharp[:, None], 4)
    return sharp, F.interpolate(small, size=(size, size), mode="bicubic", align_corners=False)[:, 0]


@cache
def _voices() -> tuple[Tensor, Tensor]:
    """A spectrum (MEL,) and a duration in frames for each symbol, the same for all runs."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(SYMBOLS, MEL, generator=generator), torch.randint(3, 8, (SYMBOLS,), generator=generator)


def speech(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Symbols (count, 12), log-spectra (count, 64, MEL) and the symbol of each frame (count, 64).

    Each symbol has its spectrum and duration; neighbours blend, and a melody over the sentence starts from what the first symbol says.
    """
    spectra, durations = _voices()
    symbols = torch.randint(SYMBOLS, (count, SPEECH_SYMBOLS), generator=generator)
    ends = durations[symbols].cumsum(1)
    frame = torch.arange(SPEECH_FRAMES).expand(count, -1).contiguous()
    owner = torch.searchsorted(ends, frame, right=True).clamp(max=SPEECH_SYMBOLS - 1)
    spoken = symbols.gather(1, owner)
    sound = spectra[spoken]
    sound = F.avg_pool1d(F.pad(sound.transpose(1, 2), (2, 2), mode="replicate"), 5, 1).transpose(1, 2)
    pitch = (symbols[:, :1].float() / SYMBOLS * 2 * math.pi + frame.float() / 10).sin()
    return symbols, sound + 0.5 * pitch[..., None], spoken


def documents(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Word ids (count, 48) and their summary (count, 4): of each quarter the word that half of it repeats, or, where a quarter repeats
    none, the first word of the summary again."""
    span = DOCUMENT // PICKED
    words = torch.randint(1, WORDS, (count, PICKED, span), generator=generator)
    topic = torch.randint(1, WORDS, (count, PICKED), generator=generator)
    about = torch.rand(count, PICKED, generator=generator) < 0.6
    about[:, 0] = True
    rank = torch.rand(count, PICKED, span, generator=generator).argsort(-1)
    words = torch.where((rank < span // 2) & about[..., None], topic[..., None], words)
    return words.flatten(1), torch.where(about, topic, topic[:, :1])


def series(
    count: int, generator: torch.Generator, past: int = 96, future: int = 48, channels: int = 4
) -> tuple[Tensor, Tensor]:
    """Past (count, 96, 4) and future (count, 48, 4) of slow and fast seasons, a trend and noise, standardised by the past's spread."""
    time = torch.arange(past + future) / 24.0
    fast, slow = (torch.rand(2, count, 1, channels, generator=generator) * 2 * math.pi).unbind(0)
    size = 0.5 + torch.rand(2, count, 1, channels, generator=generator)
    wave = (
        size[0] * (2 * math.pi * time[:, None] + fast).sin() + size[1] * (2 * math.pi * time[:, None] / 4 + slow).sin()
    )
    shared = wave.mean(-1, keepdim=True)  # channels move together, so one tells of another
    trend = 0.1 * torch.randn(count, 1, channels, generator=generator) * time[:, None]
    whole = wave + shared + trend + 0.2 * torch.randn(count, past + future, channels, generator=generator)
    return whole[:, :past], whole[:, past:]


def clouds(count: int, generator: torch.Generator, points: int = 64) -> tuple[Tensor, Tensor]:
    """Points on an ellipsoid, a box or a cylinder: the half in front of a plane (count, 64, 3), and the whole (count, 64, 3)."""
    kind = torch.randint(3, (count, 1, 1), generator=generator)
    sides = 0.4 + 0.6 * torch.rand(count, 1, 3, generator=generator)

    def surface(many: int) -> Tensor:
        drawn = torch.randn(count, many, 3, generator=generator)
        ball = F.normalize(drawn, dim=-1)
        box = drawn / drawn.abs().amax(-1, keepdim=True)
        ring = F.normalize(drawn[..., :2], dim=-1)
        tube = torch.cat([ring, drawn[..., 2:].tanh()], dim=-1)
        return torch.where(kind == 0, ball, torch.where(kind == 1, box, tube)) * sides

    whole, many = surface(points), surface(points * 4)
    view = F.normalize(torch.randn(count, 1, 3, generator=generator), dim=-1)
    nearest = (many * view).sum(-1).topk(points, dim=1).indices
    return many.gather(1, nearest[..., None].expand(-1, -1, 3)), whole
