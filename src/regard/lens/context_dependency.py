"""Context-dependency scores: how much the answers of a conversation draw on what the user wrote.

Paper: Wang et al. 2024, "On the Loss of Context-awareness in General Instruction Fine-tuning" (NeurIPS 2025, arXiv 2411.02688). Authors'
code, read for numbers: YihanWang617/context_awareness (`analyse_dataset/utils.py:get_batch_user_attention`).

For a response r, with weights A of one layer of a probe model and U the user's tokens:

    s_r = mean over tokens t of r of  max over heads h of  sum over k in U of A[h, t, k]          in [0, 1]

What differs from the authors' code: turns come from the tokenizer's own chat template, theirs are found by TinyLlama's literal token
ids; a response that is followed by an unanswered question is scored, where theirs drops it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import bad_type, require, require_int, require_name, require_tensor
from ..integrations.spans import SpannedPrompt, chat_spans
from .attention_mass import row_mass
from .record import record

__all__ = ["ContextDependency", "context_dependency", "span_dependency"]

VARIANTS = ("released", "paper")


@dataclass(frozen=True)
class ContextDependency:
    """Scores of one conversation: `responses`, one each in order (NaN where none of its tokens was read), and their mean, `score`."""

    responses: tuple[float, ...]

    @property
    def score(self) -> float:
        known = [value for value in self.responses if value == value]
        return sum(known) / len(known) if known else float("nan")


def span_dependency(weights: Tensor, users: Tensor, responses: Tensor) -> Tensor:
    """The score of every response, by its definition.

    Args:
        weights: (B, H, N, N), post-softmax, causal. users: bool (B, N). responses: bool (B, R, N), the tokens of each response.

    Returns:
        (B, R); NaN for a response without tokens.
    """
    require_tensor("weights", weights, dims=4, floating=True)
    batch, _, _, length = weights.shape
    require(
        tuple(users.shape) == (batch, length), "users", f"shape {tuple(users.shape)}", f"(B, N) = {(batch, length)}"
    )
    fits = responses.dim() == 3 and responses.shape[0] == batch and responses.shape[2] == length
    require(fits, "responses", f"shape {tuple(responses.shape)}", f"(B, R, N) with (B, N) = {(batch, length)}")
    most = (weights * users[:, None, None]).sum(-1).amax(1)
    counted = responses.to(most.dtype)
    return torch.einsum("brn,bn->br", counted, most) / torch.where(counted.sum(-1) > 0, counted.sum(-1), torch.nan)


def context_dependency(
    model: nn.Module,
    tokenizer: Any,
    conversations: Iterable[Sequence[Mapping[str, Any]]],
    *,
    layer: int | None = None,
    heads: Sequence[int] | None = None,
    max_tokens: int = 2047,
    variant: str = "released",
    **options: Any,
) -> list[ContextDependency]:
    """Score conversations with a chat model as the probe.

        scores = regard.lens.context_dependency(model, tokenizer, conversations)
        data = regard.losses.add_indicator(conversations, scores, threshold=0.6)

    Args:
        model, tokenizer: the probe, a language model of transformers, and its tokenizer, which needs a chat template.
        conversations: lists of {"role": ..., "content": ...}. One forward each.
        layer: whose attention is read, negative from the end; None: 15 of 22, as in the authors' TinyLlama, in proportion.
        heads: among which the largest is taken; None = all.
        max_tokens: a longer conversation is cut there; responses that do not begin before are not scored (NaN).
        variant: "released": what the system says counts as the user's, lone line breaks of either count as nobody's, and the end
            token and line break after a response belong to it. "paper": the user's words, and the response's.
        options: handed to `regard.chat_spans` (`chat_template`, ...).

    Raises:
        ValueError: no chat template, a layer that the model does not have. TypeError: conversations of another kind.
    """
    require_name("variant", variant, VARIANTS)
    require_int("max_tokens", max_tokens, 2)
    if isinstance(conversations, (str, bytes, Mapping)):
        raise bad_type("conversations", conversations, "lists of messages {'role': ..., 'content': ...}")
    device = next(model.parameters()).device
    found = []
    for messages in conversations:
        prompt = chat_spans(tokenizer, messages, add_generation_prompt=False, **options)
        users, responses = _parts(tokenizer, prompt, variant)
        ids = prompt.input_ids[:, :max_tokens]
        scores = []
        number = _layer(model, layer)
        made = record(model, {"input_ids": ids.to(device)}, layers=[number])
        for begin, end in responses:
            rows = range(min(begin, ids.shape[1]), min(end, ids.shape[1]))
            if not len(rows):
                scores.append(float("nan"))
                continue
            mass = row_mass(made, made.layers[0], users[:, : ids.shape[1]], heads=heads, rows=list(rows))
            scores.append(float(mass.amax(1).double().mean()))
        found.append(ContextDependency(tuple(scores)))
    return found


def _layer(model: Any, layer: int | None) -> int:
    count = int(model.config.get_text_config(decoder=True).num_hidden_layers)
    number = round(15 / 22 * count) if layer is None else layer
    require(-count <= number < count, "layer", layer, f"a layer number in [0, {count})")
    return min(number, count - 1)


def _parts(tokenizer: Any, prompt: SpannedPrompt, variant: str) -> tuple[Tensor, list[tuple[int, int]]]:
    """The user's tokens, bool (1, T), and the token range of every response."""
    nobody = torch.zeros_like(prompt.spans["template"])
    users = prompt.spans.get("user", nobody).clone()
    texts = [prompt.texts[0][begin:end] for begin, end in prompt.offsets[0]]
    if variant == "released":
        users |= prompt.spans.get("system", nobody)
        users &= ~torch.tensor([text == "\n" for text in texts])
    responses = []
    end_token = getattr(tokenizer, "eos_token", None)
    template = prompt.spans["template"][0].tolist()
    for turn in prompt.turns[0]:
        if turn.role == "assistant":
            begin, end = turn.tokens
            while variant == "released" and end < len(texts) and template[end] and texts[end] in ("\n", end_token):
                end += 1
            responses.append((begin, end))
    return users, responses
