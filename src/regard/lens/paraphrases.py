"""Which wording of a prompt a language model reads best: attributions compared over paraphrases, and topics kept. The choice of SCA (057).

"Sorry, Come Again?" 2024 (arXiv 2403.18976). No code is known; what the paper leaves open is decided here and said at each place.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import require, require_fraction, require_int
from .saliency import saliency

__all__ = ["ParaphraseChoice", "best_paraphrase", "share_of_thirds", "topic_vectors"]

Topics = Callable[[Sequence[str]], Tensor]


@dataclass(frozen=True)
class ParaphraseChoice:
    """Of n prompts.

    Attributes:
        best: which has the highest score. scores, gradient, topic: (n,), the score and its two parts.
        attributions: for each prompt, (word, attribution) in order; attributions of a prompt have absolute sum 1.
        entropy: (n,), of the absolute attributions in bits. unread: (n,), share of words with less than 1 % of the largest.
    """

    best: int
    scores: list[float]
    gradient: list[float]
    topic: list[float]
    attributions: list[list[tuple[str, float]]]
    entropy: list[float]
    unread: list[float]


def best_paraphrase(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    weight: float = 0.5,
    method: str = "integrated_gradients",
    steps: int = 50,
    baseline: int | float | Tensor | None = None,
    at_once: int = 1,
    topics: Topics | None = None,
    original: int = 0,
) -> ParaphraseChoice:
    """Score paraphrases of a prompt for a causal language model; the first is the original unless `original` says otherwise.

    score = weight * gradient + (1 - weight) * topic. gradient: cosine of the prompt's attributions, summed by (lower-case) word, with
    their mean over all prompts; attribution of what the model would say next (the log-probability of its most likely token). topic: cosine
    of its topics with the original's.

    Args:
        method, steps, at_once: as in `saliency` ("integrated_gradients", "sequential", "discretized", ...). baseline: as there; None: the
            pad token's embedding, or the end token's, or zeros.
        topics: texts -> (n, any); None: `topic_vectors` with 10 topics over the prompts.
    """
    require(not isinstance(prompts, str) and len(prompts) > 0, "prompts", prompts, "a list of at least one text")
    require_fraction("weight", weight)
    require(0 <= original < len(prompts), "original", original, f"a place below {len(prompts)}")
    if baseline is None:
        ids = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
        baseline = next((token for token in ids if token is not None), 0.0)
    words = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        inputs = {name: inputs[name].to(next(model.parameters()).device) for name in ("input_ids", "attention_mask")}
        found = saliency(model, inputs, method, of="log_prob", steps=steps, baseline=baseline, at_once=at_once)[0]
        words.append(_by_word(tokenizer, inputs["input_ids"][0].tolist(), found.tolist()))
    known = sorted({word for row in words for word, _ in row})
    table = torch.zeros(len(prompts), len(known), dtype=torch.float64)
    for place, row in enumerate(words):
        for word, value in row:
            table[place, known.index(word)] += value
    gradient = F.cosine_similarity(table, table.mean(0, keepdim=True), dim=1)
    about = topic_vectors(prompts) if topics is None else topics(prompts)
    topic = F.cosine_similarity(about.double(), about[original : original + 1].double(), dim=1)
    scores = weight * gradient + (1 - weight) * topic
    entropy, unread = [], []
    for row in words:
        sizes = torch.tensor([abs(value) for _, value in row], dtype=torch.float64)
        entropy.append(float(torch.special.entr(sizes / sizes.sum().clamp(min=1e-12)).sum() / math.log(2)))
        unread.append(float((sizes < 0.01 * sizes.max()).double().mean()))
    return ParaphraseChoice(
        int(scores.argmax()), scores.tolist(), gradient.tolist(), topic.tolist(), words, entropy, unread
    )


def _by_word(tokenizer: Any, ids: list[int], values: list[float]) -> list[tuple[str, float]]:
    """Tokens joined to words (one begins where a token's text begins with a space or is no letter), absolute values summing to 1."""
    made: list[list[Any]] = []
    for token, value in zip(ids, values):
        text = tokenizer.decode([token])
        bare = text.strip().lower()
        joins = made and text == text.lstrip() and bare.isalnum() and made[-1][0].isalnum()
        if joins:
            made[-1] = [made[-1][0] + bare, made[-1][1] + value]
        else:
            made.append([bare, value])
    total = sum(abs(value) for _, value in made) or 1.0
    return [(word, value / total) for word, value in made]


def share_of_thirds(attribution: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B, 3): share of the absolute attribution (B, T) on the first, middle and last third of each row's real tokens."""
    keep = torch.ones_like(attribution, dtype=torch.bool) if mask is None else mask.bool()
    rows = []
    for values, real in zip(attribution.abs(), keep):
        kept = values[real]
        cuts = [round(len(kept) * i / 3) for i in range(4)]
        sums = torch.stack([kept[a:b].sum() for a, b in pairwise(cuts)])
        rows.append(sums / sums.sum().clamp(min=torch.finfo(sums.dtype).tiny))
    return torch.stack(rows)


def topic_vectors(
    texts: Sequence[str],
    num_topics: int = 10,
    *,
    sweeps: int = 100,
    alpha: float = 0.1,
    eta: float = 0.1,
    seed: int = 0,
) -> Tensor:
    """Topics of texts by latent Dirichlet allocation (Blei, Ng, Jordan 2003), collapsed Gibbs sampling: (n, num_topics), rows sum to 1.

    Averaged over the second half of `sweeps`. Small and slow, for tens of texts; give `best_paraphrase` vectors of your own for more.
    """
    require_int("num_topics", num_topics, 1)
    require_int("sweeps", sweeps, 2)
    documents = [["".join(c for c in word if c.isalnum()) for word in text.lower().split()] for text in texts]
    documents = [[word for word in document if word] for document in documents]
    numbers = {word: i for i, word in enumerate(sorted({word for document in documents for word in document}))}
    draw, size = random.Random(seed), max(1, len(numbers))
    given = [[draw.randrange(num_topics) for _ in document] for document in documents]
    of_text = [[row.count(k) for k in range(num_topics)] for row in given]
    of_word, of_topic = [[0] * num_topics for _ in range(size)], [0] * num_topics
    for document, row in zip(documents, given):
        for word, k in zip(document, row):
            of_word[numbers[word]][k] += 1
            of_topic[k] += 1
    mean = torch.zeros(len(documents), num_topics, dtype=torch.float64)
    for sweep in range(sweeps):
        for document, row, counts in zip(documents, given, of_text):
            for place, word in enumerate(document):
                k, by_word = row[place], of_word[numbers[word]]
                counts[k], by_word[k], of_topic[k] = counts[k] - 1, by_word[k] - 1, of_topic[k] - 1
                chances = [
                    (counts[j] + alpha) * (by_word[j] + eta) / (of_topic[j] + eta * size) for j in range(num_topics)
                ]
                k = draw.choices(range(num_topics), chances)[0]
                row[place] = k
                counts[k], by_word[k], of_topic[k] = counts[k] + 1, by_word[k] + 1, of_topic[k] + 1
        if sweep >= sweeps // 2:
            table = torch.tensor(of_text, dtype=torch.float64) + alpha
            mean += table / table.sum(1, keepdim=True)
    return mean / (sweeps - sweeps // 2)
