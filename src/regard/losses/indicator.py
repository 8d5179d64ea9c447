"""Tuning with an indicator of context-dependence: the data, and the token that says "answer from what I gave you".

Paper: Wang et al. 2024, "On the Loss of Context-awareness in General Instruction Fine-tuning" (NeurIPS 2025, arXiv 2411.02688). Authors'
code, read for behaviour: YihanWang617/context_awareness (`analyse_dataset/process_dataset.py`, `TinyLlama/scripts/run_sft.py`).

User turns whose answers depend on the context end in a tag; a model tuned on such data (ordinary chat tuning: `chat_parts`,
`MaskedCollator`, `masked_lm_loss`) answers from the context when it meets the tag.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from .._checks import bad_type, bad_value, require, require_name

__all__ = ["TAG", "add_indicator", "add_tag_token"]

TAG = "[IND]"
VARIANTS = ("released", "paper")
Conversation = Sequence[Mapping[str, Any]]


def add_indicator(
    conversations: Iterable[Conversation],
    scores: Iterable[Any],
    *,
    threshold: float = 0.5,
    tag: str = TAG,
    variant: str = "released",
) -> list[list[dict[str, Any]]]:
    """Conversations whose user turns end in `tag` where the answer to them scored above `threshold`.

    Args:
        conversations: lists of {"role": ..., "content": text}; they are not changed.
        scores: for each conversation what `regard.lens.context_dependency` gave, or one number for every assistant message. NaN: the
            turn is left as it is.
        threshold: 0.5 in the authors' script; their published models use 0.6.
        variant: of a scored turn that ends in a letter or digit, a full stop is added before the tag. "released": also where the tag
            is not added. "paper": only there.

    Returns:
        New lists. `ValueError` where the numbers of scores and answers differ.
    """
    require_name("variant", variant, VARIANTS)
    require(isinstance(tag, str) and bool(tag.strip()), "tag", tag, "a text")
    given, found = list(conversations), list(scores)
    require(len(given) == len(found), "scores", f"{len(found)}", f"one entry for each of {len(given)} conversations")
    return [_marked(messages, score, threshold, tag, variant) for messages, score in zip(given, found)]


def _marked(messages: Conversation, scores: Any, threshold: float, tag: str, variant: str) -> list[dict[str, Any]]:
    values = list(getattr(scores, "responses", scores))
    made = [dict(message) for message in messages]
    answers = [place for place, message in enumerate(made) if message.get("role") == "assistant"]
    require(len(values) == len(answers), "scores", f"{len(values)} of a conversation", f"{len(answers)}, its answers")
    for place, value in zip(answers, values):
        before = made[place - 1] if place else {}
        if before.get("role") != "user" or value != value:
            continue
        text = before["content"]
        if not isinstance(text, str):
            raise bad_type("content", text, "text in every user message")
        dependent = value > threshold
        if text[-1:].isalnum() and (dependent or variant == "released"):
            text += "."
        before["content"] = f"{text} {tag}" if dependent else text
    return made


@torch.no_grad()
def add_tag_token(model: Any, tokenizer: Any, tag: str = TAG) -> int:
    """Make `tag` one token of the tokenizer, with the mean of the model's embeddings as its own; its id.

    Both are changed: this is for a model that is tuned next. Where the tag is one token already, nothing happens.
    """
    known = tokenizer(tag, add_special_tokens=False)["input_ids"]
    if len(known) == 1 and known[0] != getattr(tokenizer, "unk_token_id", None):
        return int(known[0])
    before = model.get_input_embeddings().weight.shape[0]
    mean = model.get_input_embeddings().weight[: len(tokenizer)].mean(0)
    out = model.get_output_embeddings()
    out_mean = None if out is None else out.weight[: len(tokenizer)].mean(0)
    if not hasattr(tokenizer, "add_tokens") or tokenizer.add_tokens([tag]) != 1:
        raise bad_value("tokenizer", type(tokenizer).__name__, "one that takes a new token (add_tokens)")
    number = int(tokenizer.convert_tokens_to_ids(tag))
    if number >= before:
        model.resize_token_embeddings(number + 1, mean_resizing=False)
    model.get_input_embeddings().weight[number] = mean
    if out_mean is not None:
        model.get_output_embeddings().weight[number] = out_mean
    return number
