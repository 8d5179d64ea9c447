"""Synthetic tasks for small models: each makes (inputs, labels) from a seed, with -100 where nothing is asked.

`mqar`: multi-query associative recall of Zoology (Arora et al. 2023, arXiv 2312.04927) as Based (015) and the dynamical-systems view (037)
train on it; generator read for numbers: IntelligentControlSystems/dsf-mqar @ 7c5aff8 (Apache-2.0), `zoology/data/associative_recall.py`.
The distribution is theirs, the random numbers are torch's. `selective_copy` after Mamba (Gu and Dao 2023, arXiv 2312.00752); the others
are the field's folklore, as each docstring defines them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._checks import require, require_int

__all__ = [
    "IGNORE",
    "TASKS",
    "accuracy",
    "batches",
    "copy",
    "in_context_regression",
    "induction",
    "mqar",
    "parity",
    "selective_copy",
]

IGNORE = -100
Made = tuple[Tensor, Tensor]


def mqar(
    batch: int,
    length: int,
    pairs: int,
    vocab_size: int = 8192,
    *,
    power: float = 0.01,
    random_fill: bool = False,
    generator: torch.Generator | None = None,
) -> Made:
    """`pairs` keys each followed by its value, then every key once more somewhere: what was its value? ids, labels (batch, length).

    Keys are from [1, V/2), values from [V/2, V), none twice. A key is asked for at an even place behind the pairs; gaps g = 1, 2, ...
    are drawn without replacement with weight power * g ** (power - 1): most soon, some late; power 1 is uniform. The label of a
    question is at the key's own place.

    Args:
        length: even, at least 4 * pairs. random_fill: noise tokens between the questions in place of zeros.
    """
    for name, value, least in (("batch", batch, 0), ("pairs", pairs, 1), ("vocab_size", vocab_size, 4)):
        require_int(name, value, least)
    require(require_int("length", length, 2) % 2 == 0, "length", length, "an even number")
    require(4 * pairs <= length, "length", length, f"at least 4 * pairs ({4 * pairs})")
    half = vocab_size // 2
    require(pairs <= half - 1, "pairs", pairs, f"at most the number of keys ({half - 1})")
    require(power > 0, "power", power, "a number > 0")
    keys = torch.rand(batch, half - 1, generator=generator).topk(pairs).indices + 1
    values = torch.rand(batch, vocab_size - half, generator=generator).topk(pairs).indices + half
    room = (length - 2 * pairs) // 2
    weight = torch.arange(1, room + 1, dtype=torch.float64) ** (power - 1)
    gaps = (
        torch.multinomial(weight.expand(batch, -1), pairs, generator=generator)
        if batch
        else torch.zeros(0, pairs).long()
    )
    ids, labels = torch.zeros(batch, length, dtype=torch.long), torch.full((batch, length), IGNORE)
    ids[:, 0 : 2 * pairs : 2], ids[:, 1 : 2 * pairs : 2] = keys, values
    place = 2 * pairs + 2 * gaps
    ids.scatter_(1, place, keys)
    labels.scatter_(1, place, values)
    if random_fill:
        ids = torch.where(ids == 0, torch.randint(vocab_size, ids.shape, generator=generator), ids)
    return ids, labels


def induction(batch: int, length: int, vocab_size: int = 16, *, generator: torch.Generator | None = None) -> Made:
    """Noise from [1, V) with token 0 once in its first part and once at the end: what came after it? One label, at the last place."""
    require_int("batch", batch, 0)
    require_int("length", length, 3)
    require_int("vocab_size", vocab_size, 3)
    ids = torch.randint(1, vocab_size, (batch, length), generator=generator)
    place = torch.randint(length - 2, (batch, 1), generator=generator)
    ids.scatter_(1, place, 0)
    ids[:, -1] = 0
    labels = torch.full_like(ids, IGNORE)
    labels[:, -1:] = ids.gather(1, place + 1)
    return ids, labels


def copy(batch: int, length: int, vocab_size: int = 16, *, generator: torch.Generator | None = None) -> Made:
    """A word of length // 2 tokens from [1, V), then 0 and the word again: each of its tokens from the one before it.

    length: even. ids (batch, length): word, 0, word without its last token.
    """
    require(require_int("length", length, 2) % 2 == 0, "length", length, "an even number")
    require_int("batch", batch, 0)
    require_int("vocab_size", vocab_size, 2)
    word = torch.randint(1, vocab_size, (batch, length // 2), generator=generator)
    ids = torch.cat((word, torch.zeros(batch, 1, dtype=torch.long), word[:, :-1]), dim=1)
    return ids, torch.cat((torch.full_like(word, IGNORE), word), dim=1)


def selective_copy(
    batch: int, length: int, tokens: int = 8, vocab_size: int = 16, *, generator: torch.Generator | None = None
) -> Made:
    """`tokens` tokens from [2, V) strewn among blanks (0), then that many 1s: the tokens in their order, one at each 1.

    length: whole, at least 2 * tokens.
    """
    require_int("tokens", tokens, 1)
    require_int("vocab_size", vocab_size, 3)
    require_int("batch", batch, 0)
    require(require_int("length", length, 2) >= 2 * tokens, "length", length, f"at least 2 * tokens ({2 * tokens})")
    room = length - tokens
    place = torch.rand(batch, room, generator=generator).topk(tokens).indices.sort(1).values
    word = torch.randint(2, vocab_size, (batch, tokens), generator=generator)
    ids = torch.zeros(batch, length, dtype=torch.long).scatter_(1, place, word)
    ids[:, room:] = 1
    labels = torch.full_like(ids, IGNORE)
    labels[:, room:] = word
    return ids, labels


def parity(batch: int, length: int, *, generator: torch.Generator | None = None) -> Made:
    """Bits, and at each place whether an odd number of ones has been seen so far."""
    require_int("batch", batch, 0)
    ids = torch.randint(2, (batch, require_int("length", length, 1)), generator=generator)
    return ids, ids.cumsum(1) % 2


def in_context_regression(
    batch: int,
    length: int,
    dim: int = 5,
    *,
    noise: float = 0.0,
    noisy_target: bool = False,
    generator: torch.Generator | None = None,
) -> Made:
    """`length` examples (x, w x + noise) of one linear map a row and then a question x: its w x, with `noisy_target` w x + noise.

    Inputs (batch, length + 1, dim + 1), targets (batch, 1). x ~ N(0, 1), w ~ N(0, 1 / dim), noise ~ N(0, noise^2). The last entry of a
    token is y, 0 for the question.
    """
    for name, value, least in (("batch", batch, 0), ("length", length, 1), ("dim", dim, 1)):
        require_int(name, value, least)
    require(noise >= 0, "noise", noise, "a number >= 0")
    x = torch.randn(batch, length + 1, dim, generator=generator)
    w = torch.randn(batch, dim, 1, generator=generator) * dim**-0.5
    y = x @ w
    seen = y + noise * torch.randn(y.shape, generator=generator)
    target = (seen if noisy_target else y)[:, -1].clone()
    seen[:, -1] = 0
    return torch.cat((x, seen), dim=2), target


TASKS: dict[str, Callable[..., Made]] = {
    "mqar": mqar,
    "induction": induction,
    "copy": copy,
    "selective_copy": selective_copy,
    "parity": parity,
    "in_context_regression": in_context_regression,
}
"""Name -> `task(batch, length, ..., generator=)`."""


def batches(
    task: Callable[..., Made], batch: int, *args: object, seed: int = 0, **options: object
) -> Callable[[int], Made]:
    """number -> batch of `task(batch, *args, **options)`, each from its own seed: what `train` takes and can go on with after a kill."""
    require_int("seed", seed, 0)

    def make(number: int) -> Made:
        return task(batch, *args, generator=torch.Generator().manual_seed(seed * 1_000_003 + number), **options)

    return make


@torch.no_grad()
def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of the labels that are not -100 which the logits (..., V) get right; NaN where there are none."""
    asked = labels != IGNORE
    return float((logits.argmax(-1)[asked] == labels[asked]).float().mean())
