"""AttentionInfluence: rank documents by what a language model loses on them without its retrieval heads.

Paper: Hua et al. 2025, "AttentionInfluence: Adopting Attention Head Influence for Weak-to-Strong Pretraining Data Selection" (arXiv
2505.07293). There is no code of the authors'; written from the paper.

    S(x) = (L_ref(x) - L_base(x)) / L_base(x),      L = mean cross entropy of the tokens of x

where the reference model is the base model with its best 5 % of retrieval heads attending uniformly. Documents that need retrieval lose
most: they are kept, the best fifth of each domain. Scores of different domains are not comparable.

The paper sets masked weights to 1/L, L the sequence length; in a causal row that would not sum to 1. Here they are 1/(visible keys),
and with `literal=True` 1/L on each visible key. (This is not MoA's influence of single weights, `attention_influence`.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import bad_type, require, require_fraction, require_int
from ..integrations.transformers import attach
from ..methods.call import AttentionCall
from ..methods.edits.mask_heads import MaskHeads
from .head_scores import HeadScores
from .key_values import KeyValueProbes
from .retrieval_heads import retrieval_heads

__all__ = ["CorpusScore", "corpus_influence", "document_losses", "influence_heads", "select_top"]

TOP = 0.05
Heads = Iterable[tuple[int, int]]


@dataclass(frozen=True)
class CorpusScore:
    """Of one document: `base` and `ref`, mean cross entropy in nats without and with the heads masked; `tokens` it was read from.

    `score` is (ref - base) / base; NaN for a document of less than two tokens, or one that the model knows by heart (base 0).
    """

    base: float
    ref: float
    tokens: int

    @property
    def score(self) -> float:
        return (self.ref - self.base) / self.base if self.base > 0 else math.nan


def influence_heads(
    model: nn.Module,
    tokenizer: Any,
    probes: KeyValueProbes | Iterable[Any] | None = None,
    *,
    top: int | float = TOP,
    decode: str = "forced",
) -> tuple[list[tuple[int, int]], HeadScores]:
    """The heads to mask, best first, and the scores of all: those that copy most of the answers of key-value prompts.

    Args:
        model, tokenizer: a causal language model. probes: what to ask; None = 20 prompts of at most 1024 tokens (the paper: 800 of 4096).
        top: how many heads (int), or which share of all (float).
        decode: "forced": answers are fed, every prompt counts (the paper's token-level recall). "greedy": the model's own answers.
    """
    probes = KeyValueProbes() if probes is None else probes
    samples = probes.samples(tokenizer) if isinstance(probes, KeyValueProbes) else probes
    scores = retrieval_heads(model, tokenizer, samples, count="set", decode=decode)
    return scores.top(top), scores


@torch.no_grad()
def document_losses(
    model: Any, batch: Sequence[Sequence[int]], heads: Heads | None = None, *, literal: bool = False
) -> Tensor:
    """Mean cross entropy of each document's tokens after the first, float64 (documents,), in nats; NaN below two tokens.

    Args:
        model: a causal language model. batch: token ids, of any lengths; they are padded on the right, which a causal model does not see.
        heads: (layer, head) pairs that attend uniformly meanwhile; None = the model as it is. literal: see the head of this file.
    """
    lengths = torch.tensor([len(ids) for ids in batch])
    require(len(batch) > 0, "batch", "none", "at least one document")
    out = torch.full((len(batch),), math.nan, dtype=torch.float64)
    chosen = [i for i in range(len(batch)) if lengths[i] >= 2]
    if not chosen:
        return out
    device = next(model.parameters()).device
    rows = torch.zeros(len(chosen), int(lengths[chosen].max()), dtype=torch.long)
    for row, i in enumerate(chosen):
        rows[row, : len(batch[i])] = torch.as_tensor(batch[i])
    size = lengths[chosen].to(device)
    masked = [] if heads is None else [_Uniform(list(heads), phase="all", literal=literal, lengths=size)]
    with attach(model, *masked):
        logits = model(rows.to(device), use_cache=False).logits
    wanted = rows[:, 1:].to(device)
    counts = torch.arange(1, rows.shape[1], device=device) < size[:, None]
    for row, i in enumerate(
        chosen
    ):  # row by row: all logits of a batch in float32 at once would take the most memory of all
        losses = F.cross_entropy(logits[row, :-1][counts[row]].float(), wanted[row][counts[row]], reduction="none")
        out[i] = losses.double().mean().cpu()
    return out


@dataclass
class _Uniform(MaskHeads):
    """Uniform heads; with `literal` their weights are 1/L on every visible key, so that rows before the last sum to less than 1."""

    literal: bool = False
    lengths: Tensor | None = None

    def edit(self, call: AttentionCall) -> None:
        super().edit(call)
        heads = sorted({*self._table.get(call.layer, ()), *self._table.get(call.layer - call.num_layers, ())})
        if not self.literal or not heads:
            return
        assert self.lengths is not None
        visible = torch.arange(1, call.q_len + 1, device=call.q.device)
        share = (visible / self.lengths.to(call.q.device)[:, None]).clamp(
            max=1.0
        )  # beyond a document's end nobody looks
        factor = torch.ones(call.batch, call.num_heads, call.q_len, device=call.q.device)
        factor[:, heads] = share[:, None]
        call.on_output(lambda out: out * factor[..., None].to(out.dtype))


def corpus_influence(
    model: Any,
    tokenizer: Any,
    texts: Iterable[str],
    heads: Heads,
    *,
    batch_size: int = 8,
    max_tokens: int = 4096,
    literal: bool = False,
) -> Iterator[CorpusScore]:
    """Score documents, one after the other, as they come; nothing but a few batches is ever held.

        heads, scores = regard.lens.influence_heads(model, tokenizer)
        for text, found in zip(texts, regard.lens.corpus_influence(model, tokenizer, texts, heads)):
            print(found.score, text[:60])

    Args:
        model, tokenizer: a causal language model (the paper: 1.3B parameters), in eval mode.
        texts: documents. Each is read by itself, up to `max_tokens`.
        heads: (layer, head) pairs to mask, from `influence_heads`. None at all gives score 0.
        batch_size: documents in one forward; batches are formed from documents of about equal length. literal: see above.

    Cost: two forwards a document.
    """
    require_int("batch_size", batch_size, 1)
    require_int("max_tokens", max_tokens, 2)
    if isinstance(texts, (str, bytes)):
        raise bad_type("texts", texts, "an iterable of documents")
    chosen = list(heads)
    waiting: list[list[int]] = []
    for text in texts:
        if not isinstance(text, str):
            raise bad_type("texts", text, "documents as text")
        waiting.append(_ids(tokenizer, text)[:max_tokens])
        if len(waiting) == 4 * batch_size:
            yield from _scored(model, waiting, chosen, batch_size, literal)
            waiting = []
    if waiting:
        yield from _scored(model, waiting, chosen, batch_size, literal)


def _scored(
    model: Any, batch: list[list[int]], heads: list[tuple[int, int]], size: int, literal: bool
) -> Iterator[CorpusScore]:
    order = sorted(range(len(batch)), key=lambda i: len(batch[i]))
    found: dict[int, CorpusScore] = {}
    for begin in range(0, len(order), size):
        numbers = order[begin : begin + size]
        ids = [batch[i] for i in numbers]
        base = document_losses(model, ids).tolist()
        ref = document_losses(model, ids, heads, literal=literal).tolist() if heads else base
        found |= {i: CorpusScore(b, r, len(batch[i])) for i, b, r in zip(numbers, base, ref)}
    return iter([found[i] for i in range(len(batch))])


def select_top(
    scores: Sequence[float] | Mapping[Any, float],
    domains: Sequence[Any] | Mapping[Any, Any] | None = None,
    share: float = 0.2,
) -> list[Any]:
    """Which documents to keep: the best `share` of each domain, best first within it; at least one of a domain that has a score.

    Args:
        scores: one a document, in order, or document -> score. NaN: never kept.
        domains: of each document, in the same form; None = all of one domain.

    Returns:
        Numbers of documents (or their keys), domain by domain in the order in which domains first come.
    """
    require_fraction("share", share)
    table = dict(scores) if isinstance(scores, Mapping) else dict(enumerate(scores))
    if domains is not None:
        require(len(domains) == len(table), "domains", f"{len(domains)}", f"one for each of {len(table)} documents")
    where: dict[Any, Any] = dict.fromkeys(table)
    if domains is not None:
        where = dict(domains) if isinstance(domains, Mapping) else dict(enumerate(domains))
    groups: dict[Any, list[Any]] = {}
    for key, score in table.items():
        members = groups.setdefault(where[key], [])
        if score == score:
            members.append(key)
    kept: list[Any] = []
    for members in groups.values():
        members.sort(key=lambda key: -table[key])
        kept += members[: max(1, round(share * len(members)))] if share > 0 else []
    return kept


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, verbose=False)["input_ids"])
