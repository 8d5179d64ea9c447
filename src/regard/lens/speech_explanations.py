"""How much of a speech-to-text model's behaviour its cross-attention tells: beside saliency of the input and of the encoder's states.

Papi et al. 2025, "Cross-Attention is Half Explanation in Speech-to-Text Models" (arXiv 2509.18010). No folder of code of its own was found;
the saliency is SPES, see `masked_saliency_maps.py`. Open in the paper and chosen here: saliency rows are brought to mean 0 and deviation 1
before they are correlated, attention is taken as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import bad_value, require, require_int, require_name, require_tensor
from .agreement import correlation
from .head_scores import HeadScores
from .masked_saliency_maps import deviation_normalized, grids_for, masked_saliency
from .record import record

__all__ = ["SpeechExplanation", "explain_speech", "pooled_saliency"]


@dataclass
class SpeechExplanation:
    """Of one utterance with I predicted tokens and T' encoder positions.

    Attributes:
        cross (L, H, I, T'): cross-attention. states (I, T'): saliency of encoder positions. features (I, T, F): saliency of the input
        (None: not asked for). tokens (I,): the predictions.
    """

    cross: Tensor
    states: Tensor
    features: Tensor | None
    tokens: Tensor

    def attention(self, layers: Sequence[int] | None = None, heads: Sequence[int] | None = None) -> Tensor:
        """(I, T'): mean over layers and heads (None: all)."""
        found = self.cross if layers is None else self.cross[list(layers)]
        return (found if heads is None else found[:, list(heads)]).mean((0, 1))

    def agreement(
        self,
        beside: str = "states",
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
        kind: str = "pearson",
    ) -> float:
        """Correlation of the mean attention with the saliency of "states" or "features", over all tokens and positions."""
        return float(correlation(self.attention(layers, heads).reshape(1, -1), self._saliency(beside), kind)[0])

    def heads(self, beside: str = "states", kind: str = "pearson") -> HeadScores:
        """The same for each head."""
        rows = self.cross.flatten(0, 1).flatten(1)
        found = correlation(rows, self._saliency(beside).expand(len(rows), -1), kind)
        return HeadScores(found.view(self.cross.shape[:2]), name=f"cross-attention beside saliency of {beside}")

    def _saliency(self, beside: str) -> Tensor:
        require_name("beside", beside, ("states", "features"))
        heat = self.states[..., None]
        if beside == "features":
            if self.features is None:
                raise bad_value("beside", beside, "'states', or an explanation made with features=True")
            heat = pooled_saliency(self.features, self.cross.shape[-1])[..., None]
        return deviation_normalized(heat).reshape(1, -1)


def pooled_saliency(heat: Tensor, positions: int) -> Tensor:
    """(I, T, F) -> (I, positions): the largest value in each stretch of time and over all bands (the paper's best pooling)."""
    require_tensor("heat", heat, dims=3, floating=True)
    require_int("positions", positions, 1)
    return F.adaptive_max_pool2d(heat[None], (positions, 1))[0, ..., 0]


@torch.no_grad()
def explain_speech(
    model: Any,
    inputs: Mapping[str, Any],
    tokens: Tensor | None = None,
    *,
    masks: int = 2000,
    features: bool = True,
    granularity: Sequence[int] = (2000, 2500, 3000),
    p: float = 0.5,
    at_once: int = 8,
    seed: int = 0,
    on_batch: Callable[[int, int], None] | None = None,
) -> SpeechExplanation:
    """Cross-attention and saliencies of one utterance, the decoder held to what the model itself says.

    Args:
        model: an encoder-decoder speech model of transformers (Whisper and its like: an `input_features` encoder, a decoder with
            cross-attention). inputs: {"input_features": (1, F, T)}.
        tokens: (1, I + 1), begin tokens and output; None: `model.generate`. The last token is not read, the first not predicted.
        masks, granularity, p, at_once, seed, on_batch: as `masked_saliency`; granularity is segments for 500 frames; encoder positions are
            masked one by one. features: whether the input's saliency is made too (it runs the encoder for every mask).

    Raises:
        ValueError: a model without an encoder and cross-attention, or more than one utterance.
    """
    x = require_tensor("input_features", inputs.get("input_features"), dims=3, floating=True)
    require(len(x) == 1, "input_features", f"shape {tuple(x.shape)}", "one utterance, (1, F, T)")
    encoder = model.get_encoder() if hasattr(model, "get_encoder") else None
    if encoder is None or not getattr(model.config, "is_encoder_decoder", False):
        raise bad_value("model", type(model).__name__, "an encoder-decoder with cross-attention")
    training = model.training
    model.eval()
    try:
        tokens = model.generate(**inputs) if tokens is None else tokens
        tokens = require_tensor("tokens", tokens, dims=2)
        require(
            tokens.shape[0] == 1 and tokens.shape[1] >= 2, "tokens", f"shape {tuple(tokens.shape)}", "(1, 2 or more)"
        )
        given, wanted = tokens[:, :-1], tokens[0, 1:]
        kept = record(model, {**inputs, "decoder_input_ids": given})
        towers = sorted({tower for tower, kind, _ in kept.calls if kind == "cross"})
        require(bool(towers), "model", type(model).__name__, "a decoder with cross-attention that `regard.record` sees")
        layers = kept.layers_of("cross", towers[0])
        cross = torch.stack([kept.weights(layer, kind="cross", tower=towers[0])[0] for layer in layers]).float()
        hidden = encoder(x).last_hidden_state[0]

        def of_states(rows: Tensor) -> Tensor:
            from transformers.modeling_outputs import BaseModelOutput

            output = BaseModelOutput(last_hidden_state=hidden * rows)
            return _log_probs(model(encoder_outputs=output, decoder_input_ids=given.expand(len(rows), -1)))

        def of_features(rows: Tensor) -> Tensor:
            ids = given.expand(len(rows), -1)
            return _log_probs(model(input_features=rows.mT, decoder_input_ids=ids))

        ones = torch.ones(len(hidden), 1, dtype=hidden.dtype, device=hidden.device)
        own = [torch.arange(len(hidden))[:, None]]
        states = masked_saliency(of_states, ones, own, masks, p=p, at_once=at_once, seed=seed, on_batch=on_batch)
        heat = None
        if features:
            grid = x[0].mT.contiguous()
            maps = grids_for(grid, granularity)
            heat = masked_saliency(of_features, grid, maps, masks, p=p, at_once=at_once, seed=seed, on_batch=on_batch)
    finally:
        model.train(training)
    return SpeechExplanation(
        cross.cpu(), states[..., 0].float().cpu(), None if heat is None else heat.float().cpu(), wanted.cpu()
    )


def _log_probs(output: Any) -> Tensor:
    return output.logits.float().log_softmax(-1)
