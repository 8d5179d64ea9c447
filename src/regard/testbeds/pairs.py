"""Pairs of a clean and a corrupted prompt that line up token by token, encoded, with the answer's token and what the tokens are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .._checks import bad_value, require, require_int
from ..lens.logit_metrics import AnswerCorrect, LabelLoss, LabelMargin, LogitDifference

__all__ = ["Pair", "PairBatch", "Piece", "draw_pairs", "encode_pairs", "single_tokens"]

Piece = str | tuple[str, str]
"""Text, or text and the name of the span that it is."""


@dataclass(frozen=True, eq=False)
class PairBatch:
    """Prompts, encoded, padded on the left.

    Attributes:
        clean, corrupted: `input_ids` and `attention_mask`, each (P, T), of pairs that line up. right, wrong: (P,) ids: the answer
            to the clean prompt, and that to the corrupted one (or the most tempting other). choices: (P, n) ids that an answer
            may be, the right one among them; or None.
        spans: name -> bool (P, T), what the tokens of the clean prompts are. texts: clean and corrupted text of each.
        labels: (P, n) places in the prompt of the labels (multiple choice), else None.
    """

    clean: dict[str, Tensor]
    corrupted: dict[str, Tensor]
    right: Tensor
    wrong: Tensor
    choices: Tensor | None
    spans: dict[str, Tensor]
    texts: list[tuple[str, str]]
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.right)

    def rows(self, rows: Sequence[int] | Tensor) -> PairBatch:
        """Some of the pairs, by number or bool mask."""
        index = torch.as_tensor(rows)
        index = index.nonzero()[:, 0] if index.dtype == torch.bool else index.long()
        require(len(index) > 0, "rows", "none", "at least one")

        def cut(tensor: Tensor | None) -> Any:
            return None if tensor is None else tensor[index]

        return replace(
            self,
            clean={name: value[index] for name, value in self.clean.items()},
            corrupted={name: value[index] for name, value in self.corrupted.items()},
            right=self.right[index],
            wrong=self.wrong[index],
            choices=cut(self.choices),
            spans={name: span[index] for name, span in self.spans.items()},
            texts=[self.texts[int(i)] for i in index],
            labels=cut(self.labels),
        )

    # Metrics of the right length, for `regard.lens.total_effects` and its like

    def logit_difference(self) -> LogitDifference:
        return LogitDifference(self.right, self.wrong)

    def correct(self, among_choices: bool = False) -> AnswerCorrect:
        return AnswerCorrect(self.right, self._choices() if among_choices else None)

    def label_margin(self) -> LabelMargin:
        return LabelMargin(self.right, self._choices())

    def label_loss(self) -> LabelLoss:
        return LabelLoss(self.right, self._choices())

    def _choices(self) -> Tensor:
        if self.choices is None:
            raise bad_value("choices", None, "a task with a list of possible answers")
        return self.choices

    @torch.no_grad()
    def logits(self, model: Any, batch_size: int = 16) -> Tensor:
        """The model's logits (P, V) after the clean prompts."""
        found = []
        for begin in range(0, len(self), batch_size):
            ids, mask = (
                self.clean[name][begin : begin + batch_size].to(model.device)
                for name in ("input_ids", "attention_mask")
            )
            position = (mask.cumsum(1) - 1).clamp(min=0)
            out = model(input_ids=ids, attention_mask=mask, position_ids=position, use_cache=False, logits_to_keep=1)
            found.append(out.logits[:, -1].float().cpu())
        return torch.cat(found)

    def accuracy(self, model: Any, among_choices: bool = False) -> float:
        """Share of the clean prompts after which the right answer is the likeliest token (or the likeliest choice)."""
        return float(self.correct(among_choices)(self.logits(model), torch.arange(len(self))).mean())

    def solved(self, model: Any, among_choices: bool = False) -> PairBatch:
        """The pairs whose clean prompt the model answers right. Raises a `ValueError` where there is none."""
        right = self.correct(among_choices)(self.logits(model), torch.arange(len(self))) > 0
        require(bool(right.any()), "model", "none of the prompts answered right", "at least one")
        return self.rows(right)


def single_tokens(tokenizer: Any, words: Iterable[str], prefix: str = " ") -> dict[str, int]:
    """word -> its id, of those words that are one token with `prefix` before them."""
    found = {}
    for word in words:
        ids = tokenizer(prefix + word, add_special_tokens=False)["input_ids"]
        if len(ids) == 1 and ids[0] != getattr(tokenizer, "unk_token_id", None):
            found[word] = int(ids[0])
    return found


@dataclass(frozen=True)
class Pair:
    """One pair in pieces, before it is encoded: ids of the right and the wrong answer, and of all that an answer may be."""

    clean: list[Piece]
    corrupted: list[Piece]
    right: int
    wrong: int
    choices: list[int] | None = None


def _encoded(tokenizer: Any, pieces: Sequence[Piece]) -> tuple[str, list[int], dict[str, list[int]]]:
    """Text, ids, and which tokens hold characters of which span (a token that joins a space to a word counts)."""
    text, spans = "", []
    for piece in pieces:
        word, name = (piece, "") if isinstance(piece, str) else piece
        if name:
            lead = len(word) - len(word.lstrip())
            spans.append((name, len(text) + lead, len(text) + len(word)))
        text += word
    out = tokenizer(text, return_offsets_mapping=True)
    places: dict[str, list[int]] = {}
    for name, begin, end in spans:
        inside = [i for i, (first, last) in enumerate(out["offset_mapping"]) if first < end and last > begin]
        places[name] = places.get(name, []) + inside
    return text, out["input_ids"], places


def encode_pairs(tokenizer: Any, pairs: Iterable[tuple[str, str, int, int]]) -> PairBatch:
    """Own pairs: (clean prompt, corrupted prompt, id of the right answer, id of the wrong one). Those that do not line up are left out."""
    kept = []
    for clean, corrupted, right, wrong in pairs:
        pair = Pair([clean], [corrupted], int(right), int(wrong))
        first, second = _encoded(tokenizer, pair.clean), _encoded(tokenizer, pair.corrupted)
        if len(first[1]) == len(second[1]):
            kept.append((pair, first, second))
    require(bool(kept), "pairs", "none that lines up token by token", "at least one")
    return _collate(tokenizer, kept, 0)


def draw_pairs(tokenizer: Any, make: Callable[[], Pair], count: int, labels: int = 0) -> PairBatch:
    """`count` of the pairs that `make` draws, those that line up. labels: how many spans "label 0", ... there are in each."""
    require_int("count", count, 1)
    fast = getattr(tokenizer, "is_fast", False)
    require(fast, "tokenizer", type(tokenizer).__name__, "a fast tokenizer (one that gives character offsets)")
    kept: list[tuple[Pair, Any, Any]] = []
    for _ in range(20 * count):
        pair = make()
        clean, corrupted = _encoded(tokenizer, pair.clean), _encoded(tokenizer, pair.corrupted)
        if len(clean[1]) == len(corrupted[1]):
            kept.append((pair, clean, corrupted))
        if len(kept) == count:
            break
    require(len(kept) == count, "tokenizer", f"{len(kept)} pairs that line up token by token", f"{count}")
    return _collate(tokenizer, kept, labels)


def _collate(tokenizer: Any, kept: list[tuple[Pair, Any, Any]], labels: int) -> PairBatch:
    count = len(kept)
    longest = max(len(clean[1]) for _, clean, _ in kept)
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    ids = torch.full((2, count, longest), pad, dtype=torch.int64)
    mask = torch.zeros(count, longest, dtype=torch.int64)
    names = sorted({name for _, clean, _ in kept for name in clean[2]})
    spans = {name: torch.zeros(count, longest, dtype=torch.bool) for name in names}
    for row, (_, clean, corrupted) in enumerate(kept):
        shift = longest - len(clean[1])
        ids[0, row, shift:], ids[1, row, shift:] = torch.tensor(clean[1]), torch.tensor(corrupted[1])
        mask[row, shift:] = 1
        for name, places in clean[2].items():
            spans[name][row, [shift + place for place in places]] = True
    pairs = [pair for pair, _, _ in kept]
    where = torch.stack([spans[f"label {i}"].int().argmax(1) for i in range(labels)], 1) if labels else None
    return PairBatch(
        {"input_ids": ids[0], "attention_mask": mask},
        {"input_ids": ids[1], "attention_mask": mask.clone()},
        torch.tensor([pair.right for pair in pairs]),
        torch.tensor([pair.wrong for pair in pairs]),
        torch.tensor([pair.choices for pair in pairs]) if pairs[0].choices else None,
        spans,
        [(clean[0], corrupted[0]) for _, clean, corrupted in kept],
        where,
    )
