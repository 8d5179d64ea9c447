"""Hallucination or attention misdirection? Where a model looked while it gave a wrong answer.

The distinction is Ioste's (2024, "Hallucinations or Attention Misdirection? The Path to Strategic Value Extraction in Business Using Large
Language Models", arXiv 2402.14002): a hallucination is wrong although prompt and context settle the answer; a misdirected answer follows
from the wrong part of the prompt. The paper leaves the decision to people. The test on attention here is ours:

    m(S) = sum over keys of S of the mean weight, over the tokens of the answer and the chosen heads
    wrong, and m(distractors) > m(intended), with at least `threshold` on both together: misdirection; wrong otherwise: hallucination
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .._checks import require, require_fraction
from ..integrations.spans import SpannedPrompt, chat_spans, text_spans
from .record import record

__all__ = ["Misdirection", "blame", "misdirection"]

THRESHOLD = 0.1


@dataclass(frozen=True)
class Misdirection:
    """Attention of an answer: mass on the intended evidence, on each distractor, and `answer`, what was said.

    `share` is the evidence's part of the mass on all of them (NaN without any).
    """

    intended: float
    distractors: dict[str, float]
    answer: str

    @property
    def distracted(self) -> float:
        return sum(self.distractors.values())

    @property
    def share(self) -> float:
        total = self.intended + self.distracted
        return self.intended / total if total > 0 else float("nan")

    def verdict(self, right: bool, threshold: float = THRESHOLD) -> str:
        """ "ok", "misdirection" or "hallucination", see `blame`."""
        return blame(right, self.intended, self.distracted, threshold)


def blame(right: bool, intended: float, distracted: float, threshold: float = THRESHOLD) -> str:
    """ "ok" for a right answer; for a wrong one "misdirection" or "hallucination", by the rule at the head of this file."""
    require_fraction("threshold", threshold)
    require(intended >= 0 and distracted >= 0, "intended, distracted", (intended, distracted), "masses >= 0")
    if right:
        return "ok"
    return "misdirection" if distracted > intended and intended + distracted >= threshold else "hallucination"


@torch.no_grad()
def misdirection(
    model: Any,
    tokenizer: Any,
    prompt: str | Sequence[Mapping[str, Any]] | SpannedPrompt,
    intended: Any,
    distractors: Sequence[str] | Mapping[str, Any],
    heads: Iterable[tuple[int, int]],
    *,
    answer: str | None = None,
    max_new_tokens: int = 32,
) -> Misdirection:
    """Where the given heads looked, in the prompt, while the model said its answer.

        heads = regard.lens.retrieval_heads(model, tokenizer).top(10)
        found = regard.lens.misdirection(model, tokenizer, prompt, "Ann pays on Friday.", ["Bob pays on Monday."], heads)
        print(found.share, found.verdict(right="Friday" in found.answer))

    Args:
        model, tokenizer: a causal language model of transformers.
        prompt: text, a conversation, or what `chat_spans` or `text_spans` made (one row).
        intended, distractors: pieces of the prompt, as in `text_spans`: what the answer should rest on, and what not; `distractors` by
            name, or a list, each named by its text. Tokens that several of them share count for each.
        heads: (layer, head) pairs, the best retrieval heads above all.
        answer: what was said, fed instead of generated. max_new_tokens: longest greedy answer.

    The query of an answer's token is the one that says it: the token before it.
    """
    chosen = [(int(layer), int(head)) for layer, head in heads]
    require(bool(chosen), "heads", "none", "at least one (layer, head) pair")
    if isinstance(prompt, str):
        prompt = text_spans(tokenizer, prompt)
    elif not isinstance(prompt, SpannedPrompt):
        prompt = chat_spans(tokenizer, prompt)
    require(len(prompt.texts) == 1, "prompt", f"{len(prompt.texts)} rows", "one prompt")
    others = dict(distractors) if isinstance(distractors, Mapping) else {text: text for text in distractors}
    marked = SpannedPrompt(prompt.inputs, {}, prompt.texts, prompt.offsets, prompt.turns).mark("intended", intended)
    for name, what in others.items():
        marked.mark(f"not {name}", what)
    ids = prompt.input_ids.to(next(model.parameters()).device)
    if answer is None:
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False)
        said = out[0, ids.shape[1] :]
        answer = str(tokenizer.decode(said, skip_special_tokens=True)).strip()
    else:
        said = torch.tensor(tokenizer(answer, add_special_tokens=False)["input_ids"], device=ids.device)
    require(len(said) > 0, "answer", answer, "at least one token")
    whole = torch.cat([ids, said[None].to(ids)], 1)
    mean = _mean_row(model, whole, ids.shape[1], chosen)
    mass = {name: float(mean[span[0]].sum()) for name, span in marked.spans.items()}
    return Misdirection(mass["intended"], {name: mass[f"not {name}"] for name in others}, answer)


def _mean_row(model: nn.Module, ids: torch.Tensor, prompt_len: int, heads: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Weights on the prompt's keys (T,), mean over the rows that say the answer and over the heads."""
    made = record(model, {"input_ids": ids}, layers=sorted({layer for layer, _ in heads}))
    rows = range(prompt_len - 1, ids.shape[1] - 1)
    total = torch.zeros(prompt_len)
    for layer, head in heads:
        total += made.weights(layer, head, list(rows))[0, 0, :, :prompt_len].mean(0).float().cpu()
    return total / len(heads)
