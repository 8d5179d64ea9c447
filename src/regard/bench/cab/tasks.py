"""The seven tasks of CAB, reduced to seconds: what is trained, on what, and how it is measured.

CAB (Zhang et al. 2023, arXiv 2210.07661). Text is real (`pydoc_data.topics`, as bytes); speech, documents, images, point clouds and time
series are made here (`data`), with the structure each task is about. Values are NOT those of CAB's data sets: only methods measured in one
run may be compared (`index_over`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import data, metrics
from .networks import Coder, EncoderDecoder, LayerFactory

__all__ = ["TASKS", "PatternTask", "Sizes"]


@dataclass(frozen=True)
class Sizes:
    """How large: width, heads, layers, sequences in a batch, held-out sequences, bytes of the text tasks."""

    dim: int = 48
    num_heads: int = 4
    layers: int = 2
    batch: int = 8
    kept: int = 48
    text: int = 128


@dataclass(frozen=True)
class PatternTask:
    """One task on one attention pattern.

    task, pattern: names as in CAB. signs: metric -> 1 or -1 (less is better).
    build: (sizes, layer under test, vanilla layer) -> network; both factories take (causal, cross, length).
    loss: (network, sizes, generator) -> loss of a fresh batch. measure: (network, sizes) -> metric -> value on held-out data.
    """

    task: str
    pattern: str
    signs: dict[str, int]
    build: Callable[[Sizes, LayerFactory, LayerFactory], nn.Module]
    loss: Callable[[nn.Module, Sizes, torch.Generator], Tensor]
    measure: Callable[[nn.Module, Sizes], dict[str, float]]

    @property
    def name(self) -> str:
        return f"{self.pattern} {self.task}"


def _kept() -> torch.Generator:
    return torch.Generator().manual_seed(10_000)


class _Tokens(nn.Module):
    """Embedded ids through a coder to logits."""

    def __init__(self, vocab: int, out: int, coder: Coder, dim: int) -> None:
        super().__init__()
        self.embed, self.coder, self.head = nn.Embedding(vocab, dim), coder, nn.Linear(dim, out)
        nn.init.normal_(self.embed.weight, std=0.3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.coder(self.embed(ids)))


def _perplexity(nats: Tensor) -> float:
    return math.exp(min(float(nats), 50.0))


# ---- text: masked and causal language modelling ----


def _build_text(causal: bool) -> Callable[[Sizes, LayerFactory, LayerFactory], nn.Module]:
    def build(sizes: Sizes, test: LayerFactory, vanilla: LayerFactory) -> nn.Module:
        return _Tokens(257, 256, Coder(sizes.dim, sizes.layers, sizes.text, test, causal=causal), sizes.dim)

    return build


def _mask_loss(net: nn.Module, ids: Tensor, generator: torch.Generator) -> Tensor:
    hidden = torch.rand(ids.shape, generator=generator) < 0.15
    hidden[:, 0] = True  # never none at all
    return F.cross_entropy(net(ids.masked_fill(hidden, 256))[hidden], ids[hidden])


def _next_loss(net: nn.Module, ids: Tensor) -> Tensor:
    return F.cross_entropy(net(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def _mlm_loss(net: nn.Module, sizes: Sizes, generator: torch.Generator) -> Tensor:
    return _mask_loss(net, data.text().batch(sizes.batch, sizes.text, generator), generator)


def _mlm_measure(net: nn.Module, sizes: Sizes) -> dict[str, float]:
    return {"PPL": _perplexity(_mask_loss(net, data.text().held_out(sizes.kept, sizes.text), _kept()))}


def _lm_loss(net: nn.Module, sizes: Sizes, generator: torch.Generator) -> Tensor:
    return _next_loss(net, data.text().batch(sizes.batch, sizes.text, generator))


def _lm_measure(net: nn.Module, sizes: Sizes) -> dict[str, float]:
    return {"PPL": _perplexity(_next_loss(net, data.text().held_out(sizes.kept, sizes.text)))}


# ---- images: super-resolution, a pixel a token ----

_SIDE = 16


class _Pixels(nn.Module):
    """Enlarged images (B, side, side) -> sharp ones: the encoder adds to them."""

    def __init__(self, sizes: Sizes, test: LayerFactory) -> None:
        super().__init__()
        self.embed = nn.Linear(1, sizes.dim)
        self.coder = Coder(sizes.dim, sizes.layers, _SIDE * _SIDE, test)
        self.head = nn.Linear(sizes.dim, 1)

    def forward(self, blurred: Tensor) -> Tensor:
        added = self.head(self.coder(self.embed(blurred.flatten(1)[..., None])))[..., 0]
        return blurred + added.view_as(blurred)


def _sr_loss(net: nn.Module, sizes: Sizes, generator: torch.Generator) -> Tensor:
    sharp, blurred = data.images(sizes.batch, generator, _SIDE)
    return F.mse_loss(net(blurred), sharp) * 100


def _sr_measure(net: nn.Module, sizes: Sizes) -> dict[str, float]:
    sharp, blurred = data.images(sizes.kept, _kept(), _SIDE)
    made = net(blurred).clamp(0, 1)
    return {"PSNR": metrics.psnr(made, sharp), "SSIM": metrics.ssim(made, sharp)}


# ---- speech: frames from symbols, all at once (FastSpeech 2), or one after the other (Transformer-TTS) ----


def _build_fast_speech(sizes: Sizes, test: LayerFactory, vanilla: LayerFactory) -> nn.Module:
    coder = Coder(sizes.dim, sizes.layers, data.SPEECH_FRAMES, test)
    return _Tokens(data.SYMBOLS, data.MEL, coder, sizes.dim)


def _fast_loss(net: nn.Module, sizes: Sizes, generator: torch.Generator) -> Tensor:
    _, sound, spoken = data.speech(sizes.batch, generator)
    return F.l1_loss(net(spoken), sound)


def _fast_measure(net: nn.Module, sizes: Sizes) -> dict[str, float]:
    _, sound, spoken = data.speech(sizes.kept, _kept())
    return metrics.spectral_distances(net(spoken), sound)


def _build_speech(slot: str) -> Callable[[Sizes, LayerFactory, LayerFactory], nn.Module]:
    def build(sizes: Sizes, test: LayerFactory, vanilla: LayerFactory) -> nn.Module:
        dim = sizes.dim
        encoder = Coder(dim, 1, data.SPEECH_SYMBOLS, vanilla)
        own, cross = (test, vanilla) if slot == "self" else (vanilla, test)
        decoder = Coder(dim, sizes.layers, data.SPEECH_FRAMES, own, cross, causal=True)
        return EncoderDecoder(
            nn.Embedding(data.SYMBOLS, dim), nn.Linear(data.MEL, dim), encoder, decoder, dim, data.MEL
        )

    return build


def _speech_step(net: nn.Module, drawn: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Each frame from the symbols and the true frames before it."""
    symbols, sound, _ = drawn
    return net(symbols, F.pad(sound[:, :-1], (0, 0, 1, 0))), sound


def _speech_loss(net: nn.Module, sizes: Sizes, generator: torch.Generator) -> Tensor:
    return F.l1_loss(*_speech_step(net, data.speech(sizes.batch, generator)))


def _speech_measure(net: nn.Module, sizes: Sizes) -> dict[str, float]:
    return metrics.spectral_distances(*_speech_step(net, data.speech(sizes.kept, _kept())))


# ---- summaries: what each part of a document is about ----


def _build_summary(slot: str) -> Callable[[Sizes, LayerFactory, LayerFactory], nn.Module]:
    def build(sizes: Sizes, test: LayerFactory, vanilla: LayerFactory) -> nn.Module:
        dim, layers = sizes.dim, sizes.layers
        encoder = Coder(dim, layers, data.DOCUMENT, test if slot == "encoder" else vanilla)
        own, cross = test if slot == "self" else vanilla, test if slot == "cross" else vanilla
        decoder = Coder(dim, layers, data.PICKED, own, cross, causal=True)
        words, out = nn.Embedding(data.WORDS, dim), nn.Embedding(data.WORDS, dim)
        return EncoderDecoder(words, out, encoder, decoder, dim, data.WORDS)

    return build


def _summary_loss(net: nn.Module, sizes: Sizes, generator: torch.Generator) -> Tensor:
    words, picked = data.documents(sizes.batch, generator)
    logits = net(words, F.pad(picked[:, :-1], (1, 0), value=data.START))
    return F.cross_entropy(logits.flatten(0, 1), picked.flatten())


def _summary_measure(net: nn.Module, sizes: Sizes) -> dict[str, float]:
    """Of what is written greedily."""
    assert isinstance(net, EncoderDecoder)
    words, picked = data.documents(sizes.kept, _kept())
    context = net.encode(words)
    made = torch.full((len(words), 1), data.START)
    for _ in range(data.PICKED):
        made = torch.cat([made, net.decode(context, made)[:, -1:].argmax(-1)], dim=1)
    return metrics.rouge(made[:, 1:].tolist(), picked.tolist())


# ---- point clouds and time series: queries that ask all at once ----


class _Queries(nn.Module):
    """A source (B, M, channels) and places to fill (learned) -> (B, count, out), the decoder's cross-attention under test."""

    def __init__(
        self, sizes: Sizes, test: LayerFactory, vanilla: LayerFactory, length: int, channels: int, count: int
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(channels, sizes.dim)
        self.encoder = Coder(sizes.dim, 1, length, vanilla)
        self.asked = nn.Parameter(torch.randn(count, sizes.dim) * 0.1)
        self.decoder = Coder(sizes.dim, sizes.layers, count, vanilla, test)
        self.head = nn.Linear(sizes.dim, channels)

    def forward(self, source: Tensor) -> Tensor:
        context = self.encoder(self.embed(source))
        return self.head(self.decoder(self.asked.expand(len(source), -1, -1), context))


def _build_clouds(sizes: Sizes, test: LayerFactory, vanilla: LayerFactory) -> nn.Module:
    return _Queries(sizes, test, vanilla, 64, 3, 64)


def _cloud_loss(net: nn.Module, sizes: Sizes, generator: torch.Generator) -> Tensor:
    seen, whole = data.clouds(sizes.batch, generator)
    apart = torch.cdist(net(seen), whole)
    return apart.amin(1).mean() + apart.amin(2).mean()


def _cloud_measure(net: nn.Module, sizes: Sizes) -> dict[str, float]:
    seen, whole = data.clouds(sizes.kept, _kept())
    return metrics.chamfer(net(seen), whole)


def _build_series(sizes: Sizes, test: LayerFactory, vanilla: LayerFactory) -> nn.Module:
    return _Queries(sizes, test, vanilla, 96, 4, 48)


def _series_loss(net: nn.Module, sizes: Sizes, generator: torch.Generator) -> Tensor:
    past, future = data.series(sizes.batch, generator)
    return F.mse_loss(net(past), future)


def _series_measure(net: nn.Module, sizes: Sizes) -> dict[str, float]:
    past, future = data.series(sizes.kept, _kept())
    made = net(past)
    return {"MSE": float(F.mse_loss(made, future)), "MAE": float(F.l1_loss(made, future))}


_SPEECH, _ROUGE = {"MCD": -1, "MSD": -1}, {"R-1": 1, "R-2": 1, "R-L": 1}
_CLOUDS, _SERIES = {"CD-l1": -1, "CD-l2": -1, "F-Score": 1}, {"MSE": -1, "MAE": -1}

TASKS: dict[str, PatternTask] = {
    task.name: task
    for task in (
        PatternTask("TTS", "NS", _SPEECH, _build_fast_speech, _fast_loss, _fast_measure),
        PatternTask("Sum", "NS", _ROUGE, _build_summary("encoder"), _summary_loss, _summary_measure),
        PatternTask(
            "SR", "NS", {"PSNR": 1, "SSIM": 1}, lambda sizes, test, _: _Pixels(sizes, test), _sr_loss, _sr_measure
        ),
        PatternTask("MLM", "NS", {"PPL": -1}, _build_text(False), _mlm_loss, _mlm_measure),
        PatternTask("TTS", "CS", _SPEECH, _build_speech("self"), _speech_loss, _speech_measure),
        PatternTask("Sum", "CS", _ROUGE, _build_summary("self"), _summary_loss, _summary_measure),
        PatternTask("LM", "CS", {"PPL": -1}, _build_text(True), _lm_loss, _lm_measure),
        PatternTask("PCC", "NC", _CLOUDS, _build_clouds, _cloud_loss, _cloud_measure),
        PatternTask("LSTF", "NC", _SERIES, _build_series, _series_loss, _series_measure),
        PatternTask("TTS", "CC", _SPEECH, _build_speech("cross"), _speech_loss, _speech_measure),
        PatternTask("Sum", "CC", _ROUGE, _build_summary("cross"), _summary_loss, _summary_measure),
    )
}
"""Pattern and task -> task, in CAB's order: "NS TTS", "NS Sum", ..., "CC Sum"."""
