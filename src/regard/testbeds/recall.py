"""Multi-key recall and long copying over a vocabulary of made-up words, on which retrieval is sharp.

`SmolLM2` at 135M parameters does not find a needle beyond about a thousand tokens even with dense attention, so its figures say
little about whether a sparse method reads the right tokens. Here the answer stands word for word in the context, each key
once, and the shipped model (`regard.load("tiny-recall")`, made by `regard.testbeds.train_recall`) reads it off with certainty.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._checks import require, require_int

NUM_WORDS = 1024
SPECIAL = ("<pad>", "<bos>", "<ask>", "<copy>")
PAD, BOS, ASK, COPY = range(len(SPECIAL))
VOCAB_SIZE = NUM_WORDS + len(SPECIAL)


@dataclass(frozen=True)
class Sample:
    """One sequence.

    Attributes:
        ids: int64 (T,). answers: bool (T,), True where the token can be known from what stands before it.
    """

    ids: Tensor
    answers: Tensor


def recall_sample(seq_len: int, pairs: int, queries: int, generator: torch.Generator | None = None) -> Sample:
    """`<bos>`, noise words with `pairs` key-value pairs strewn in, `<ask>`, then `queries` keys, each with its value after it.

    Keys, values and noise are words; a key stands once before `<ask>`. Raises `ValueError` where the pairs do not fit.
    """
    require_int("pairs", pairs, 1)
    require_int("queries", queries, 1)
    room = seq_len - 2 - 2 * queries
    require(pairs <= NUM_WORDS // 4, "pairs", pairs, f"at most {NUM_WORDS // 4}")
    require(
        2 * pairs <= room, "seq_len", seq_len, f"at least {2 + 2 * queries + 2 * pairs} for these pairs and queries"
    )
    word = torch.randperm(NUM_WORDS, generator=generator) + len(SPECIAL)
    keys, others = word[:pairs], word[pairs:]
    values = others[torch.randint(len(others), (pairs,), generator=generator)]
    slots = room - pairs  # a pair takes one slot and then one token more
    place = torch.randperm(slots, generator=generator)[:pairs].sort().values + torch.arange(pairs)
    body = others[torch.randint(len(others), (room,), generator=generator)]
    body[place], body[place + 1] = keys, values
    asked = torch.randint(pairs, (queries,), generator=generator)
    tail = torch.stack([keys[asked], values[asked]], 1).flatten()
    ids = torch.cat([torch.tensor([BOS]), body, torch.tensor([ASK]), tail])
    answers = torch.zeros(seq_len, dtype=torch.bool)
    answers[2 + room + 1 :: 2] = True
    return Sample(ids, answers)


def copy_sample(seq_len: int, length: int | None = None, generator: torch.Generator | None = None) -> Sample:
    """`<bos>`, noise, `length` different words, `<copy>`, and the same words again. Default: half of the sequence, if words suffice."""
    require_int("seq_len", seq_len, 6)
    most = min((seq_len - 2) // 2, NUM_WORDS // 2)
    length = most if length is None else length
    require(2 <= length <= most, "length", length, f"words in [2, {most}]")
    word = torch.randperm(NUM_WORDS, generator=generator) + len(SPECIAL)
    noise = word[length:][torch.randint(NUM_WORDS - length, (seq_len - 2 - 2 * length,), generator=generator)]
    ids = torch.cat([torch.tensor([BOS]), noise, word[:length], torch.tensor([COPY]), word[:length]])
    answers = torch.zeros(seq_len, dtype=torch.bool)
    answers[-length + 1 :] = True
    return Sample(ids, answers)


def tokenizer() -> Any:
    """The testbed's words as a transformers tokenizer: `"w7 w12 <ask> w7"`, one token a word."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, *(f"w{number}" for number in range(NUM_WORDS))]
    inner = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", unk_token="<pad>", padding_side="left"
    )


@torch.no_grad()
def accuracy(model: Any, samples: list[Sample]) -> float:
    """Share of the knowable tokens that the model predicts, read in one pass each."""
    right = total = 0
    for sample in samples:
        logits = model(sample.ids[None].to(model.device)).logits[0, :-1]
        known = sample.answers[1:]
        right += int((logits.argmax(-1).cpu()[known] == sample.ids[1:][known]).sum())
        total += int(known.sum())
    return right / max(1, total)
