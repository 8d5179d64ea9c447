"""Fine-tuning on a part of each text: a collator that says which tokens are learned, and how much, and the loss by those weights.

Several papers are, in training, no more than a choice of the tokens that count: answers only (LoFiT, arXiv 2406.01563), answers and no
thoughts (PTR, arXiv 2410.13413), the tokens behind an anchor (KANT, arXiv 2508.03340), all but pauses (SCA, arXiv 2403.18976).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import bad_type, bad_value, require, require_int, require_name, require_tensor

__all__ = ["IGNORE", "MaskedCollator", "chat_parts", "masked_lm_loss", "weighted_lm_loss"]

IGNORE = -100
Part = tuple[Any, float]


def weighted_lm_loss(logits: Tensor, labels: Tensor, weights: Tensor | None = None, mean: str = "tokens") -> Tensor:
    """Cross entropy of the next token, weighted.

    Args:
        logits: (B, N, V); row n is compared with label n + 1, so that labels stand where their tokens stand, as in transformers.
        labels: (B, N) int64; -100 is not learned.
        weights: (B, N), of each label, >= 0; None: all alike.
        mean: "tokens": sum of weighted losses over the sum of weights in the whole batch. "samples": that in each row, then the mean
            over rows that have a label.

    Returns:
        A scalar, float32 or float64; 0 (with zero gradients) where nothing is learned.
    """
    require_tensor("logits", logits, dims=3, floating=True)
    require_tensor("labels", labels, dims=2)
    fits = labels.shape == logits.shape[:2]
    require(fits, "labels", f"shape {tuple(labels.shape)}", f"shape {tuple(logits.shape[:2])}")
    require_name("mean", mean, ("tokens", "samples"))
    wanted = labels[:, 1:]
    counts = wanted != IGNORE
    if weights is not None:
        require(weights.shape == labels.shape, "weights", f"shape {tuple(weights.shape)}", f"{tuple(labels.shape)}")
        require(bool((weights >= 0).all()), "weights", "a negative one", "weights >= 0")
    given = counts.to(logits.dtype) if weights is None else weights[:, 1:].to(logits.dtype) * counts
    exact = logits if logits.dtype == torch.float64 else logits.float()
    losses = F.cross_entropy(exact[:, :-1].mT, wanted, ignore_index=IGNORE, reduction="none") * given.to(exact.dtype)
    sums = given.to(exact.dtype).sum(1)
    if mean == "tokens":
        return losses.sum() / sums.sum().clamp(min=torch.finfo(exact.dtype).tiny)
    rows = sums > 0
    each = losses.sum(1) / torch.where(rows, sums, 1.0)
    return (each * rows).sum() / rows.sum().clamp(min=1)


def masked_lm_loss(model: Any, batch: Mapping[str, Tensor], mean: str = "tokens") -> Tensor:
    """`weighted_lm_loss` of a Hugging Face causal language model on a batch of `MaskedCollator`."""
    given = {key: value for key, value in batch.items() if key not in ("labels", "weights")}
    logits = model(**given, use_cache=False).logits
    return weighted_lm_loss(logits, batch["labels"], batch.get("weights"), mean)


@dataclass
class MaskedCollator:
    """Samples -> a padded batch: `input_ids`, `attention_mask`, `position_ids`, `labels` (-100: not learned), `weights`.

    A sample is a sequence of (text, weight) pairs, in order; in place of text, a list of token ids. Weight 0: read and not learned. Each
    part is tokenised by itself, so that the parts end where a prompt of theirs would end.

        collate = MaskedCollator(tokenizer)
        batch = collate([[("What is 2 + 2? ", 0), ("4", 1)], ...])

    Args:
        tokenizer: a Hugging Face tokenizer; may be None where all parts are ids.
        pad: id that fills up rows; None: the tokenizer's pad token, else its end token, else 0.
        bos: True: a sample begins with the tokenizer's begin token, which is never learned; "parts": every part does, and the one of a
            learned part is learned (what tokenising the parts one by one with special tokens gives). eos: a sample ends with its end
            token, learned as the last part is.
        max_length: longest row, in tokens. too_long: what becomes of longer samples: "drop" (counted in `dropped`), "left" or "right"
            (cut there), "error".
        pack: None, or the tokens that a row may hold: samples are packed into as few rows as the least filled row first gives
            (PTR's own way), each `pack` long; needs no `max_length`.
        isolate: packed samples do not see each other (a mask (B, 1, N, N)) and count positions from 0; False: they do, as in PTR's code.
            A sample's first token is never learned from the sample before.
    """

    tokenizer: Any = None
    pad: int | None = None
    bos: bool | str = True
    eos: bool = False
    max_length: int | None = None
    too_long: str = "drop"
    pack: int | None = None
    isolate: bool = True
    dropped: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        require(self.bos in (True, False, "parts"), "bos", self.bos, "True, False or 'parts'")
        require_name("too_long", self.too_long, ("drop", "left", "right", "error"))
        for name in ("max_length", "pack"):
            if getattr(self, name) is not None:
                require_int(name, getattr(self, name), 2)
        require(
            self.pack is None or self.max_length is None,
            "max_length",
            self.max_length,
            "None beside `pack`, which bounds rows",
        )
        if self.eos and self._special("eos_token_id") is None:
            raise bad_value("eos", True, "a tokenizer with an end token")
        if self.pad is None:
            found = (self._special("pad_token_id"), self._special("eos_token_id"), 0)
            self.pad = next(token for token in found if token is not None)

    def _special(self, name: str) -> int | None:
        return getattr(self.tokenizer, name, None)

    def encode(self, sample: Sequence[Part]) -> tuple[list[int], list[float]]:
        """One sample's ids and their weights; the first is never learned, as nothing stands before it."""
        if isinstance(sample, (str, bytes)) or not isinstance(sample, Sequence) or not sample:
            raise bad_type("sample", sample, "a sequence of (text or ids, weight) pairs")
        begin = self._special("bos_token_id") if self.bos else None
        ids: list[int] = [] if begin is None or self.bos == "parts" else [begin]
        weights: list[float] = [0.0] * len(ids)
        for part in sample:
            if not isinstance(part, Sequence) or len(part) != 2 or isinstance(part, str):
                raise bad_type("sample", part, "(text or ids, weight) pairs")
            text, weight = part
            require(not isinstance(weight, str) and float(weight) >= 0, "weight", weight, "a number >= 0")
            more = [begin, *self._ids(text)] if self.bos == "parts" and begin is not None else self._ids(text)
            ids += more
            weights += [float(weight)] * len(more)
        if self.eos:
            ids.append(self.tokenizer.eos_token_id)
            weights.append(float(sample[-1][1]))
        require(bool(ids), "sample", sample, "at least one token")
        return ids, [0.0, *weights[1:]]

    def _ids(self, text: Any) -> list[int]:
        if isinstance(text, str):
            if self.tokenizer is None:
                raise bad_value("tokenizer", None, "one, where samples hold text")
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []
        return [int(token) for token in text]

    def __call__(self, samples: Iterable[Sequence[Part]]) -> dict[str, Tensor]:
        most = self.pack or self.max_length
        kept = []
        for number, sample in enumerate(samples):
            ids, weights = self.encode(sample)
            if most is not None and len(ids) > most:
                if self.too_long == "error":
                    raise bad_value("samples", f"{len(ids)} tokens in sample {number}", f"at most {most}")
                if self.too_long == "drop":
                    self.dropped += 1
                    continue
                cut = slice(-most, None) if self.too_long == "left" else slice(most)
                ids, weights = ids[cut], [0.0, *weights[cut][1:]]
            kept.append((ids, weights))
        require(bool(kept), "samples", "none that fits", f"at least one of at most {most} tokens")
        rows = [[sample] for sample in kept] if self.pack is None else self._packed(kept)
        return self._batch(rows)

    def _packed(self, samples: list[tuple[list[int], list[float]]]) -> list[list[tuple[list[int], list[float]]]]:
        """Each sample, in order, into the row that is least full, if it fits there, else into a new one."""
        assert self.pack is not None
        rows: list[list[tuple[list[int], list[float]]]] = []
        filled: list[tuple[int, list[int], int]] = []  # of equally full rows, the one whose tokens sort first
        for ids, weights in samples:
            least = heapq.heappop(filled) if filled else None
            if least is not None and least[0] + len(ids) <= self.pack:
                size, held, row = least
            else:
                if least is not None:
                    heapq.heappush(filled, least)
                size, held, row = 0, [], len(rows)
                rows.append([])
            rows[row].append((ids, weights))
            heapq.heappush(filled, (size + len(ids), held + ids, row))
        return [rows[row] for _, _, row in filled]

    def _batch(self, rows: list[list[tuple[list[int], list[float]]]]) -> dict[str, Tensor]:
        longest = self.pack or max(sum(len(ids) for ids, _ in row) for row in rows)
        shape = (len(rows), longest)
        assert self.pad is not None
        made = torch.full(shape, self.pad, dtype=torch.int64)
        owner = torch.full(shape, -1, dtype=torch.int64)  # which sample of its row a token belongs to; -1: padding
        positions, weights = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape)
        for r, row in enumerate(rows):
            begin = 0
            for number, (ids, weight) in enumerate(row):
                place = slice(begin, begin + len(ids))
                made[r, place], weights[r, place] = torch.tensor(ids), torch.tensor(weight)
                owner[r, place] = number
                first = 0 if self.isolate else begin
                positions[r, place] = torch.arange(first, first + len(ids))
                begin += len(ids)
        real = owner >= 0
        if self.pack is not None and self.isolate:
            causal = torch.ones(longest, longest, dtype=torch.bool).tril()
            # a padding row sees itself, so that no row is empty
            mask = (
                (owner[:, :, None] == owner[:, None, :])
                & causal
                & (real[:, None, :] | torch.eye(longest, dtype=torch.bool))
            )
            mask = mask[:, None]
        else:
            mask = real.long()
        labels = torch.where(real & (weights > 0), made, IGNORE)
        return {
            "input_ids": made,
            "attention_mask": mask,
            "position_ids": positions,
            "labels": labels,
            "weights": weights,
        }


def chat_parts(
    tokenizer: Any, messages: Sequence[Mapping[str, str]], learn: Sequence[str] = ("assistant",)
) -> list[Part]:
    """A conversation as parts of a `MaskedCollator`(bos=False): what the messages of the roles in `learn` say has weight 1.

    The text is what the tokenizer's chat template makes of the whole conversation; the markers around a learned message that the
    template adds before generation are read, its closing marker is learned.

    Raises:
        ValueError: the tokenizer has no chat template, or one that writes earlier messages anew when later ones come.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise bad_value("tokenizer", type(tokenizer).__name__, "one with a chat template (`tokenizer.chat_template`)")
    require(len(messages) > 0, "messages", messages, "at least one message")

    def render(count: int, opened: bool = False) -> str:
        return tokenizer.apply_chat_template(list(messages[:count]), tokenize=False, add_generation_prompt=opened)

    parts: list[Part] = []
    done = ""
    for number, message in enumerate(messages):
        whole = render(number + 1)
        learned = message.get("role") in learn
        before = done
        if learned and number:
            opened = render(number, opened=True)
            before = opened if whole.startswith(opened) else done
        require(
            whole.startswith(before), "tokenizer", "a chat template that rewrites earlier messages", "one that appends"
        )
        if before != done:
            parts.append((before[len(done) :], 0.0))
        parts.append((whole[len(before) :], 1.0 if learned else 0.0))
        done = whole
    return parts
