"""Where an attention sink comes from, on models small enough to train in a minute: a task that wants one, and a training that watches it.

`BackcopyText` is the Bigram-Backcopy task of Active-Dormant Attention Heads (Guo et al. 2024, arXiv 2410.13835), its bigrams taken from
real text; code of theirs was not read. The metric and the question, which models grow a sink, are those of When Attention Sink Emerges in
Language Models (Gu et al. 2024, arXiv 2410.10781), whose models of 60M parameters on 5 B tokens are out of reach here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import require, require_int, require_tensor
from ..lens.sink import EPSILON, column_importance, model_weights, sink_rate
from .texts import ByteText
from .training import train

__all__ = ["BackcopyText", "SinkPoint", "train_watching_sinks", "with_fixed_token"]

START = 256


class BackcopyText:
    """Sequences in which a head must mostly do nothing: byte follows byte as in real text, but after a trigger the byte before it returns.

    A byte x that is no trigger is followed by y with the frequency that y follows x in the
    text; a trigger is followed by the byte that came before it (behind the first two places). The MLP can learn the bigrams, and one
    head copies at triggers; everywhere else attention has nothing to add, and weights that must sum to 1 have to go somewhere.

    Args:
        source: the text (a `ByteText`); None: Python's own prose. triggers: how many bytes are triggers, the most frequent ones after the
            first.
        start: every sequence begins with the token 256, which then is itself a key that is learned and always there; else with a byte
            as frequent as it is in the text.

    Attributes: vocab_size, of a model: 257 with the start token, else 256. triggers: the bytes.
    """

    def __init__(self, source: ByteText | None = None, triggers: int = 3, start: bool = False) -> None:
        self.start, self.vocab_size = bool(start), START + bool(start)
        require_int("triggers", triggers, 1)
        text = (ByteText() if source is None else source).learn
        counts = torch.zeros(256 * 256)
        counts.index_add_(0, text[:-1] * 256 + text[1:], torch.ones(len(text) - 1))
        counts = counts.view(256, 256)
        often = counts.sum(1)
        require(triggers < int((often > 0).sum()), "triggers", triggers, "fewer than the text's different bytes")
        self.triggers = often.topk(triggers + 1).indices[1:]
        # a byte seen only as the last one of the text is followed by any
        follow = torch.where(often[:, None] > 0, counts, often)
        self._follow = (follow / follow.sum(1, keepdim=True)).cumsum(1)
        self._first = (often / often.sum()).cumsum(0)

    def batch(self, batch: int, length: int, generator: torch.Generator | None = None) -> Tensor:
        """(batch, length) int64."""
        require_int("batch", batch, 0)
        require_int("length", length, 1 + self.start)
        drawn = torch.rand(batch, length, generator=generator)
        ids = torch.full((batch, length), START)
        begin = int(self.start)
        ids[:, begin] = torch.searchsorted(self._first, drawn[:, begin].contiguous()).clamp(max=255)
        for place in range(begin + 1, length):
            before = ids[:, place - 1]
            new = torch.searchsorted(self._follow[before], drawn[:, place : place + 1].contiguous())[:, 0].clamp(
                max=255
            )
            copied = (
                torch.isin(before, self.triggers) if place > begin + 1 else torch.zeros_like(before, dtype=torch.bool)
            )
            ids[:, place] = torch.where(copied, ids[:, place - 2], new)
        return ids

    def batches(self, batch: int, length: int, seed: int = 0) -> Callable[[int], tuple[Tensor, Tensor]]:
        """number -> (tokens, the tokens after them), each (batch, length), from their own seed: what `train` takes."""

        def make(number: int) -> tuple[Tensor, Tensor]:
            ids = self.batch(batch, length + 1, torch.Generator().manual_seed(seed * 1_000_003 + number))
            return ids[:, :-1], ids[:, 1:]

        return make


def with_fixed_token(
    batches: Callable[[int], tuple[Tensor, Tensor]], token: int, place: int = 0
) -> Callable[[int], tuple[Tensor, Tensor]]:
    """The same batches with one token at one place of every input: the study's way to put a sink where one wants it."""
    require_int("token", token)
    require_int("place", place)

    def make(number: int) -> tuple[Tensor, Tensor]:
        ids, labels = batches(number)
        require(place < ids.shape[1], "place", place, f"less than the length ({ids.shape[1]})")
        ids = ids.clone()
        ids[:, place] = token
        return ids, labels

    return make


@dataclass(frozen=True)
class SinkPoint:
    """A moment of a training: steps done; mean training loss since the last point (at step 0: NaN); percent of heads and samples with a
    sink at each of the first keys (slots first), and those keys' mean importance."""

    step: int
    loss: float
    rates: tuple[float, ...]
    importance: tuple[float, ...]


def train_watching_sinks(
    model: nn.Module,
    batches: Callable[[int], Any],
    held_out: Tensor,
    *,
    steps: int,
    every: int,
    slots: int = 0,
    keys: int = 2,
    epsilon: float = EPSILON,
    **options: Any,
) -> list[SinkPoint]:
    """Train a model whose layers have `attention_weights`, and measure its sinks before, every `every` steps, and at the end.

    Args:
        batches, steps, options (lr, loss, weight_decay, out, ...): as `regard.testbeds.training.train`, less `evaluate` and `eval_every`.
        held_out: (B, N) ids to measure on. slots: of the layers (`SimilarityAttention(slot=...)`), whose keys then come first.
        keys: how many of the first keys to report. epsilon: as of `regard.lens.sink_rate`.
    """
    require_int("every", every, 1)
    require_tensor("held_out", held_out, dims=2)
    require(1 <= keys <= held_out.shape[1] + slots, "keys", keys, f"1 to {held_out.shape[1] + slots}")
    looks: list[tuple[tuple[float, ...], tuple[float, ...]]] = []

    def look(one: nn.Module) -> dict[str, float]:
        layers = model_weights(one, held_out, **({"slots": True} if slots else {}))
        rates = sink_rate(layers, epsilon, None, slots=slots)[:keys]
        drawn = torch.stack([column_importance(layer, slots).mean((0, 1))[:keys] for layer in layers]).mean(0)
        looks.append((tuple(rates.tolist()), tuple(drawn.tolist())))
        return {"sink_rate": looks[-1][0][0], "sink_importance": looks[-1][1][0]}

    mode = model.training
    look(model.eval())
    model.train(mode)
    fitted = train(model, batches, steps=steps, evaluate=look, eval_every=every, **options)
    done = [0, *(step for step in range(1, steps + 1) if step % every == 0 or step == steps)]
    points = []
    for before, step, (rates, drawn) in zip([0, *done], done, looks):
        losses = fitted.losses[before:step]
        points.append(SinkPoint(step, sum(losses) / len(losses) if losses else float("nan"), rates, drawn))
    return points
