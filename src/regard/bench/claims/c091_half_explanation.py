"""091 half explanation: cross-attention of a small speech model beside the saliency of its encoder's states and of its input."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...lens.deletion import deletion_curve
from ...lens.speech_explanations import explain_speech
from ...losses.runner import fit
from .claim import Outcome, Scale

PAPER, SLUG = "091", "half-explanation"
SAYS = (
    "Cross-attention of speech-to-text models agrees moderately with saliency of the input, about half of it, better with that of the "
    "encoder's states (52 to 75 %), best when averaged over heads and layers."
)
BANDS, FRAMES, TONES = 16, 80, 10
BEGIN, END = TONES, TONES + 1
AGREES = "correlation with saliency"


def measure(scale: Scale) -> Outcome:
    steps, count, masks, width = scale.pick((700, 10, 600, 64), (3, 2, 12, 16))
    out = Outcome(
        f"a Whisper of width {width}, 2 + 2 layers, trained for {steps} steps to write down 4 tones of {TONES} in noise; {masks} masks",
        "utterance",
    )
    model = _trained(steps, width)
    drawn = torch.Generator().manual_seed(2**40)
    x, ids = _utterances(count, drawn)
    right, found = [], []
    with torch.no_grad():
        for row in range(count):
            made = model(input_features=x[row : row + 1], decoder_input_ids=ids[row : row + 1, :-1]).logits.argmax(-1)
            right.append(float((made == ids[row : row + 1, 1:]).float().mean()))
    for row in range(count):
        inputs = {"input_features": x[row : row + 1]}
        found.append(explain_speech(model, inputs, ids[row : row + 1], masks=masks, granularity=(300, 600), at_once=32))
    out.add("tones written down", "accuracy", "share", right)
    out.add("all heads, input", AGREES, "", [one.agreement("features") for one in found])
    out.add(
        "all heads, encoder's states",
        AGREES,
        "",
        [one.agreement("states") for one in found],
        against="all heads, input",
    )
    single = [statistics.fmean(one.heads("states").scores.flatten().nan_to_num().tolist()) for one in found]
    out.add("typical single head, encoder's states", AGREES, "", single)
    areas: dict[str, list[float]] = {"saliency": [], "random order": []}
    for row in range(min(count, 5)):
        heat = found[row].features
        assert heat is not None
        noise = torch.rand(heat.shape[1:], generator=drawn)
        for label, order in (("saliency", heat.mean(0)), ("random order", noise)):
            score = partial(_accuracy, model, ids[row])
            areas[label].append(deletion_curve(score, x[row].mT.contiguous(), order)[1])
    out.add("random order", "accuracy under deletion", "area", areas["random order"])
    out.add("saliency", "accuracy under deletion", "area", areas["saliency"], against="random order")
    mean = lambda label: out.row(label, AGREES).mean  # noqa: E731
    out.check("tones written down", statistics.fmean(right), at_least=0.9)
    out.check("correlation with saliency of the states", mean("all heads, encoder's states"), at_least=0.5)
    gap = mean("all heads, encoder's states") - mean("all heads, input")
    out.check("states above input", gap, at_least=0.0)
    out.check(
        "all heads above the typical single one",
        mean("all heads, encoder's states") - statistics.fmean(single),
        at_least=0.0,
    )
    out.check(
        "accuracy under deletion, saliency over random",
        out.row("saliency", "accuracy under deletion").ratio or 1.0,
        at_most=1.0,
    )
    return out


def _utterances(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Four tones one behind another, each a band for 10 to 20 frames; the ids that say which."""
    x = 0.3 * torch.randn(count, BANDS, FRAMES, generator=generator)
    tones = torch.randint(TONES, (count, 4), generator=generator)
    lengths = torch.randint(10, 21, (count, 4), generator=generator)
    for row in range(count):
        begin = 0
        for tone, length in zip(tones[row].tolist(), lengths[row].tolist()):
            x[row, tone + 3, begin : begin + length] += 2.0
            begin += length
    edge = torch.ones(count, 1, dtype=torch.int64)
    return x, torch.cat([edge * BEGIN, tones, edge * END], 1)


def _trained(steps: int, width: int) -> Any:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=TONES + 2, num_mel_bins=BANDS, d_model=width, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=2 * width, decoder_ffn_dim=2 * width, max_source_positions=FRAMES // 2,
        max_target_positions=8, pad_token_id=END, bos_token_id=BEGIN, eos_token_id=END, decoder_start_token_id=BEGIN,
        suppress_tokens=None, begin_suppress_tokens=None, dropout=0.0,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)

    def loss(number: int) -> Tensor:
        x, ids = _utterances(16, torch.Generator().manual_seed(number))
        logits = model(input_features=x, decoder_input_ids=ids[:, :-1]).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    fit(
        model,
        loss,
        lambda number: number,
        steps=steps,
        lr=2e-3,
        schedule="cosine",
        warmup=max(1, steps // 10),
        clip=1.0,
        progress=False,
    )
    return model.eval()


@torch.no_grad()
def _accuracy(model: Any, ids: Tensor, cells: Tensor) -> float:
    made = model(input_features=cells.mT[None], decoder_input_ids=ids[None, :-1]).logits.argmax(-1)[0]
    return float((made == ids[1:]).float().mean())
