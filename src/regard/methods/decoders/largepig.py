"""LargePiG: a language model read as a pointer-generator.

Paper: Sun et al. 2024, "LargePiG: Your Large Language Model is Secretly a Pointer Generator" (WWW 2025, arXiv 2410.11366).
Authors' code, read for numbers: Jeryi-Sun/LargePiG (`largepig.py:lm_score`, `largepig_greedy_decode` and `largepig_sample` of its
transformers fork).

At each step the next token is drawn from (1 - g) P_model + g P_copy. P_copy is where the last layer looks in the source text, its
attention weights gathered by token; the gate g says how much the prediction still changed between higher layers and the last.

What differs from the authors' code: the contrast picks its layer for each row of a batch, where theirs averages over the batch;
everything is computed in float32; padding on the left is not part of the source; `eos_token_id` may be a list.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..._checks import bad_type, bad_value, require, require_name
from ...ops.reweight import key_mask
from ..call import AttentionCall, Method, UnsupportedModelError
from . import early_exit
from .pointer import copy_gate, mix_in_pointer, pointer_distribution

__all__ = ["LargePiG"]

VARIANTS = ("released", "paper")


@dataclass
class LargePiG(Method):
    """Turn a decoder-only language model into a pointer-generator, in `generate` (greedy, sampling, beams) and for scoring.

        with regard.attach(model, regard.LargePiG(source=(10, 100))):
            model.generate(**inputs)

    The mixture is made after all other logits processors: temperature, top-k and top-p shape the model's own part, and a token
    that they removed can come back through the pointer. `scale=0` is ordinary decoding, bit for bit.

    Args:
        source: which prompt tokens may be copied: (begin, end), counted from the first real token and from the end where negative
            (`(-8, None)` = the last eight); a bool tensor (B, prompt tokens); the name of a span given to `attach(spans=...)`;
            None = the whole prompt. Where a model has no begin token, its first token is an attention sink: leave that one out.
        candidates: layers compared with the mature one, counted as hidden states (0 ... num_layers). None: every second one of
            the upper half, as in the authors' scripts (16, 18, ..., 30 of 32).
        mature: the mature layer, counted likewise; -1 = the last.
        scale: factor on the gate's divergence. None: 100 (the authors' default; their scripts use 500), or 1 in the paper variant.
        normalize: make the pointer distribution sum to 1, see `pointer_distribution`. The authors' scripts do.
        contrast: contrast the mature layer with the candidate that differs most first, as DoLa does (the authors'
            `only_pointer=False`; their published setting is without). relative_top: filter of the contrast, 0 = none.
        pointer: False leaves the contrast alone.
        attention_layers: layers whose attention is averaged for the pointer; None = the last.
        max_gate: upper bound of the gate.
        variant: "released": the gate's divergence is the authors' (a vocabulary mean, far below 1, see `early_exit.js_divergence`).
            "paper": the Jensen-Shannon divergence. None: released, except for `contrast` with `pointer`, where the authors' scoring
            adds up probabilities instead of their logarithms; "released" gives those numbers too.
    """

    source: tuple[int, int | None] | str | Tensor | None = None
    candidates: Sequence[int] | None = None
    mature: int = -1
    scale: float | None = None
    normalize: bool | str = True
    contrast: bool = False
    relative_top: float = 0.1
    pointer: bool = True
    attention_layers: Sequence[int] | None = None
    max_gate: float = 0.5
    variant: str | None = None

    def __post_init__(self) -> None:
        if self.variant is None:
            self.variant = "paper" if self.contrast and self.pointer else "released"
        require_name("variant", self.variant, VARIANTS)
        if self.scale is None:
            self.scale = 100.0 if self.variant == "released" else 1.0
        require(self.scale >= 0, "scale", self.scale, "a number >= 0")
        require(0.0 <= self.max_gate <= 1.0, "max_gate", self.max_gate, "a number in [0, 1]")
        require(0.0 <= self.relative_top <= 1.0, "relative_top", self.relative_top, "a fraction in [0, 1]")
        require(self.contrast or self.pointer, "pointer", self.pointer, "True, or contrast=True: nothing is left to do")
        if self.normalize not in (True, False, "first"):
            raise bad_value("normalize", self.normalize, "True, False or 'first'")
        need = "a (begin, end) pair, the name of a span, a bool tensor (B, tokens) or None"
        if isinstance(self.source, list):
            self.source = tuple(self.source)
        if isinstance(self.source, Tensor):
            fits = self.source.dtype == torch.bool and self.source.dim() == 2
            require(fits, "source", f"{self.source.dtype} of shape {tuple(self.source.shape)}", need)
        elif isinstance(self.source, tuple):
            fits = len(self.source) == 2 and isinstance(self.source[0], int) and isinstance(self.source[1], int | None)
            require(fits, "source", self.source, need)
        elif self.source is not None and not isinstance(self.source, str):
            raise bad_type("source", self.source, need)

    def check(self, model: nn.Module) -> None:
        num_layers = len(early_exit.decoder_layers(model))
        early_exit.candidate_layers(num_layers, self.candidates)
        early_exit.candidate_layers(num_layers, [self.mature], "mature")
        self.wanted_layers(num_layers)

    # Over many positions at once (scoring)

    def token_log_probs(
        self, model: nn.Module, hidden_states: Sequence[Tensor], attention: Tensor, input_ids: Tensor, prompt_len: int
    ) -> Tensor:
        """log P of each token after the prompt, given those before it.

        Args:
            model: the language model. hidden_states: all N + 1 of one forward over `input_ids`, each (B, T, C).
            attention: head mean of the wanted layers' weights, rows prompt_len - 1 ... T - 2: (B, T - prompt_len, T).
            input_ids: (B, T), prompt and answer. prompt_len: tokens of the prompt.

        Returns:
            float32 (B, T - prompt_len). With `contrast`, tokens below `relative_top` get -1000 as in the authors' scoring; with
            `contrast` and `pointer` in the released variant these are probabilities, not logarithms, and only their sum is the
            authors' score.
        """
        at = slice(prompt_len - 1, input_ids.shape[1] - 1)
        num_layers = len(hidden_states) - 1
        layers = early_exit.candidate_layers(num_layers, self.candidates)
        rows = [state[:, at] for state in hidden_states]
        early = early_exit.early_exit_logits(model, rows, layers)
        final = early_exit.early_exit_logits(model, rows[-1])
        mature = early_exit.early_exit_logits(model, rows, early_exit.candidate_layers(num_layers, [self.mature]))[0]
        divergence = early_exit.js_divergence(mature, early, str(self.variant))
        scores = early_exit.contrast(final, early, divergence, relative_top=0.0) if self.contrast else final
        if self.pointer:
            prompt = input_ids[:, :prompt_len]
            keep = self._source_mask(prompt, None, None)
            pointer = pointer_distribution(
                attention[..., :prompt_len], prompt, scores.shape[-1], keep, _special(model, prompt), self.normalize
            )
            gate = (float(self.scale or 0.0) * divergence.amax(0)).clamp(0.0, self.max_gate)
            scores = mix_in_pointer(scores.log_softmax(-1), pointer, gate)
            if self.contrast and self.variant == "released":
                scores = scores.exp()
        else:
            scores = scores.log_softmax(-1)
        if self.contrast and self.relative_top > 0.0:
            scores = scores.masked_fill(early_exit.relative_top_mask(final, self.relative_top), -1000.0)
        return scores.gather(-1, input_ids[:, prompt_len:, None])[..., 0]

    def wanted_layers(self, num_layers: int) -> list[int]:
        """Attention layers that the pointer reads."""
        layers = [-1] if self.attention_layers is None else list(self.attention_layers)
        numbers = [layer if layer >= 0 else num_layers + layer for layer in layers]
        if not numbers or not all(0 <= number < num_layers for number in numbers):
            raise bad_value("attention_layers", layers, f"one or more layer numbers in [0, {num_layers})")
        return numbers

    def _source_mask(self, prompt: Tensor, start: Tensor | None, session: Any) -> Tensor:
        """Which prompt tokens may be copied, bool (B, P)."""
        batch, length = prompt.shape
        source = self.source
        if isinstance(source, str):
            spans = {} if session is None else session.spans
            need = f"the name of a span given to attach(spans=...): {', '.join(spans) or 'none given'}"
            require(source in spans, "source", source, need)
            source = spans[source]
        if isinstance(source, Tensor):
            fits = batch % source.shape[0] == 0 and source.shape[1] <= length
            need = f"rows that divide the batch, {batch}, and at most {length} tokens"
            require(fits, "source", f"shape {tuple(source.shape)}", need)
            mask = nn.functional.pad(source.to(prompt.device), (0, length - source.shape[1]))
            return mask.repeat_interleave(batch // source.shape[0], dim=0)
        mask = key_mask((0, None) if source is None else source, length, start=start, device=prompt.device)
        return mask.expand(batch, length)

    # In generate

    def logits(self, model: nn.Module, session: Any) -> Any:
        if session.claimant("cache") is not None:
            raise ValueError(
                f"LargePiG: got {type(session.claimant('cache')).__name__} beside it, need a cache that keeps every key of the prompt, "
                "which is what the pointer points to"
            )
        run = getattr(session, "_largepig", None) or self._install(model, session)
        run.prompt = None
        return [_BeforeAll(self, run), _AfterAll(self, run)] if self.pointer else [_BeforeAll(self, run)]

    def _install(self, model: nn.Module, session: Any) -> _Run:
        blocks = early_exit.decoder_layers(model)
        num_layers = len(blocks)
        candidates = early_exit.candidate_layers(num_layers, self.candidates)
        run = _Run(model, num_layers, candidates, self.wanted_layers(session.num_layers), session)
        for layer in {*candidates, *early_exit.candidate_layers(num_layers, [self.mature])} - {num_layers}:
            session.on_detach(blocks[layer].register_forward_pre_hook(run.keep_hidden(layer), with_kwargs=True).remove)
        session.observers.append(run.keep_row)
        session.on_detach(lambda: session.observers.remove(run.keep_row))
        session._largepig = run
        return run


class _Run:
    """What one session's generation has to remember between the forward pass and the processors."""

    def __init__(
        self, model: nn.Module, num_layers: int, candidates: list[int], attention_layers: list[int], session: Any
    ) -> None:
        self.model, self.num_layers = model, num_layers
        self.candidates, self.attention_layers = candidates, attention_layers
        self.session = weakref.ref(session)
        self.hidden: dict[int, Tensor] = {}
        self.rows: dict[int, Tensor] = {}
        self.seen = 0
        self.start: Tensor | None = None  # left padding of each row
        self.raw: Tensor | None = None
        self.prompt: Tensor | None = None
        self.source: Tensor | None = None
        self.special: Tensor | None = None
        self.gate: Tensor | None = None  # (B,), of the last step, for whoever wants to look

    def keep_hidden(self, layer: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states = args[0] if args else kwargs["hidden_states"]
            self.hidden[layer] = states[:, -1].detach()

        return hook

    def keep_row(self, call: AttentionCall) -> None:
        session = self.session()
        if (
            session is None
            or call.kind != "self"
            or call.tower != session.main_tower
            or call.layer not in self.attention_layers
        ):
            return
        row = call.weights(rows=[-1]).mean(1)[:, 0]
        self.rows[call.layer] = nn.functional.pad(row, (call.key_offset, 0))
        self.seen = call.seen
        if call.position == 0:
            self.start = call.start

    def early_logits(self, layers: Sequence[int]) -> Tensor:
        raw = self.raw
        assert raw is not None
        exits = [
            raw.float()
            if i == self.num_layers
            else early_exit.early_exit_logits(self.model, self.hidden[i]).to(raw.device)
            for i in layers
        ]
        return torch.stack(exits)

    def attention(self, length: int) -> Tensor:
        """Head mean of the current query's weights over the prompt, (B, length)."""
        rows = torch.stack([self.rows[layer] for layer in self.attention_layers]).mean(0)
        return rows[:, :length]


class _BeforeAll:
    """First of all processors: sees the model's own logits; contrasts them where asked to."""

    def __init__(self, method: LargePiG, run: _Run) -> None:
        self.method, self.run = method, run

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        method, run = self.method, self.run
        if run.seen != input_ids.shape[1]:
            raise UnsupportedModelError(
                f"LargePiG: the model saw {run.seen} tokens where {input_ids.shape[1]} are decoded; it needs `input_ids` for the whole "
                "prompt and one token a step (no assisted decoding)"
            )
        run.raw = scores
        [mature] = early_exit.candidate_layers(run.num_layers, [method.mature])
        if method.contrast:
            logits, early = run.early_logits([mature])[0], run.early_logits(run.candidates)
            divergence = early_exit.js_divergence(logits, early, str(method.variant))
            return early_exit.contrast(logits, early, divergence, method.relative_top).to(scores.dtype)
        return scores if mature == run.num_layers else run.early_logits([mature])[0].to(scores.dtype)


class _AfterAll:
    """Last of all processors: mixes the pointer in."""

    last = True

    def __init__(self, method: LargePiG, run: _Run) -> None:
        self.method, self.run = method, run

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        method, run = self.method, self.run
        if method.scale == 0 or method.max_gate == 0:
            return scores
        if run.prompt is None:
            run.prompt = input_ids
            run.source = method._source_mask(input_ids, run.start, run.session())
            run.special = _special(run.model, input_ids)
        mature = run.early_logits(early_exit.candidate_layers(run.num_layers, [method.mature]))[0]
        gate = copy_gate(
            mature, run.early_logits(run.candidates), float(method.scale or 0.0), method.max_gate, str(method.variant)
        )
        attention = run.attention(run.prompt.shape[1])
        pointer = pointer_distribution(
            attention, run.prompt, scores.shape[-1], run.source, run.special, method.normalize
        )
        run.gate = gate
        return mix_in_pointer(scores, pointer, gate)


def _special(model: nn.Module, ids: Tensor) -> Tensor:
    """Padding, begin and end tokens, bool like `ids`: nothing is copied from them."""
    config = early_exit.text_config(model)
    numbers: list[int] = []
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value = getattr(config, name, None)
        numbers += (
            [] if value is None else [int(v) for v in value] if isinstance(value, (list, tuple)) else [int(value)]
        )
    return torch.isin(ids, torch.tensor(numbers, dtype=ids.dtype, device=ids.device))
