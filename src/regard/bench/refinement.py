"""Answers in several rounds: the model sees its earlier ones and is asked for a better one (PTR, arXiv 2410.13413; see `regard.losses`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from .._checks import bad_value, require, require_int

__all__ = ["refine", "scores_by_round"]

REQUEST = "Think about it once more and give a more precise answer."


@torch.no_grad()
def refine(
    model: Any,
    tokenizer: Any,
    query: str,
    rounds: int = 3,
    instruction: str = REQUEST,
    chat: bool | None = None,
    **generation: Any,
) -> list[str]:
    """The model's answers of `rounds` rounds, the first to the query alone (plain generation).

    Args:
        model, tokenizer: a Hugging Face causal language model and its tokenizer.
        instruction: what asks for the next answer; it stands as a user's turn after each answer.
        chat: turns by the tokenizer's chat template; False: query, answer and instruction are written one below the other. None: the
            template, if there is one.
        generation: for `model.generate`; by default 128 new tokens, no sampling.

    Raises:
        ValueError: `chat=True` and a tokenizer without a chat template.
    """
    require_int("rounds", rounds, 1)
    templated = getattr(tokenizer, "chat_template", None) is not None
    chat = templated if chat is None else chat
    if chat and not templated:
        raise bad_value("chat", True, "a tokenizer with a chat template, or chat=False")
    options = {"max_new_tokens": 128, "do_sample": False, "pad_token_id": tokenizer.pad_token_id or 0} | generation
    turns = [{"role": "user", "content": query}]
    answers: list[str] = []
    for _ in range(rounds):
        if chat:
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        else:
            text = "\n".join(turn["content"] for turn in turns) + "\n"
        given = tokenizer(text, return_tensors="pt", add_special_tokens=not chat)
        ids = given["input_ids"].to(next(model.parameters()).device)
        made = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :]
        answers.append(tokenizer.decode(made, skip_special_tokens=True).strip())
        turns += [{"role": "assistant", "content": answers[-1]}, {"role": "user", "content": instruction}]
    return answers


def scores_by_round(answers: Iterable[Sequence[str]], score: Callable[[int, str], float]) -> list[float]:
    """Mean score of each round over the questions.

    answers: of each question, one a round, as many everywhere. score: (number of the question, answer) -> its score.
    """
    table = [[score(number, answer) for answer in rounds] for number, rounds in enumerate(answers)]
    require(bool(table), "answers", "none", "at least one question")
    lengths = sorted({len(row) for row in table})
    require(len(lengths) == 1, "answers", f"{lengths} rounds", "the same number for every question")
    return [sum(column) / len(column) for column in zip(*table)]
