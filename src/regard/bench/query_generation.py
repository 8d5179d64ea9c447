"""Does a model prefer queries that are true to their source? The protocol of LargePiG's TruthfulVQG and TruthfulDQG on data of your own.

Sun et al. 2024 (189, arXiv 2410.11366); authors' code, read for behaviour: Jeryi-Sun/LargePiG `query_mc_eval.py`. A JSON list holds, for
each text (a document, a video's caption), an instruction, queries that are true to it (the first is the best) and queries that are not;
a query's score is the log-probability of " " + query after the prompt; MC1, MC2, MC3 (`metrics_mc`) say how well scores tell them apart.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._checks import bad_type, bad_value, require, require_int
from ..integrations.spans import SpannedPrompt, chat_spans, text_spans
from ..methods.call import Method
from ..methods.decoders.largepig import LargePiG
from .answers import answer_scores
from .metrics_mc import MCScores, mc_scores, mean_mc_scores

__all__ = ["QueryItem", "QueryReport", "load_queries", "query_prompt", "score_queries"]

SYSTEM = "You are a helpful assistant."
MOST = 1024


@dataclass(frozen=True)
class QueryItem:
    """A text and queries about it: `good` are true to it, the first best; `bad` are not. `human` is what a person asked, if known."""

    instruction: str
    text: str
    good: tuple[str, ...]
    bad: tuple[str, ...]
    human: str = ""
    name: str = ""

    def __post_init__(self) -> None:
        for what in ("good", "bad"):
            queries = getattr(self, what)
            fits = bool(queries) and all(isinstance(query, str) and query.strip() for query in queries)
            require(fits, what, queries, "one or more queries")
        require(isinstance(self.text, str) and bool(self.text.strip()), "text", self.text, "some text")


@dataclass
class QueryReport:
    """MC metrics of each item, in order; `skipped` counts entries of the file that could not be used, by reason."""

    items: list[MCScores]
    skipped: Counter[str] = field(default_factory=Counter)

    @property
    def mean(self) -> MCScores:
        return mean_mc_scores(self.items)

    def __str__(self) -> str:
        mean = self.mean
        left = "".join(f"; {count} left out: {reason}" for reason, count in self.skipped.items())
        return f"{len(self.items)} texts: MC1 {mean.mc1:.3f}, MC2 {mean.mc2:.3f}, MC3 {mean.mc3:.3f}{left}"


def load_queries(path: str | Path, skipped: Counter[str] | None = None) -> list[QueryItem]:
    """The authors' JSON: a list of {"instruction", "input", "good_query": [...], "bad_query": [...], "human_query", "photo_id"}.

    Entries without text or queries are left out and counted in `skipped`. `ValueError`: no such list, or no entry that can be used.
    """
    counts: Counter[str] = Counter() if skipped is None else skipped
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise bad_value("path", str(path), f"a JSON list of queries ({error})") from None
    require(isinstance(entries, list), "path", str(path), "a JSON list of queries")
    items = []
    for entry in entries:
        if not isinstance(entry, Mapping):
            counts["no object"] += 1
            continue
        try:
            items.append(
                QueryItem(
                    str(entry.get("instruction") or ""),
                    entry.get("input", ""),
                    tuple(entry.get("good_query") or ()),
                    tuple(entry.get("bad_query") or ()),
                    str(entry.get("human_query") or ""),
                    str(entry.get("photo_id") or ""),
                )
            )
        except (ValueError, TypeError) as error:
            counts[str(error).split(":")[0] + " missing"] += 1
    require(bool(items), "path", str(path), f"at least one entry with text and queries ({dict(counts)})")
    return items


def query_prompt(
    tokenizer: Any, item: QueryItem, *, examples: Sequence[str] = (), system: str = SYSTEM, limit: int = MOST
) -> SpannedPrompt:
    """The prompt for an item: instruction, examples, the text cut to `limit` characters; its span "source" is the text.

    In the tokenizer's chat template, after `system`; without a template in plain lines.
    """
    text = item.text[: require_int("limit", limit, 1)]
    asked = "\n".join(part for part in (item.instruction, *examples, text) if part)
    begin = len(asked) - len(text)
    if getattr(tokenizer, "chat_template", None) is None:
        return text_spans(tokenizer, f"{asked}\nQuery:", {"source": (begin, begin + len(text))})
    messages = [{"role": "system", "content": system}] if system else []
    prompt = chat_spans(tokenizer, [*messages, {"role": "user", "content": asked}])
    begin, end = prompt.turns[0][-1].place
    shown = prompt.texts[0][begin:end]  # a template may strip what a message begins and ends in
    return prompt.mark("source", (begin + shown.rindex(text.strip()), end))


def score_queries(
    model: nn.Module,
    tokenizer: Any,
    items: Iterable[QueryItem] | str | Path,
    *methods: Method,
    examples: Sequence[str] = (),
    limit: int = MOST,
) -> QueryReport:
    """MC1, MC2 and MC3 of a model, with methods attached, over items or a JSON file of them.

        plain = score_queries(model, tokenizer, "video_query.json")
        pointed = score_queries(model, tokenizer, "video_query.json", regard.LargePiG())

    Args:
        model, tokenizer: a causal language model. items: see `QueryItem` and `load_queries`.
        methods: what to attach. A `LargePiG` without a `source` copies from the item's text alone.
        examples, limit: see `query_prompt`.
    """
    skipped: Counter[str] = Counter()
    given = load_queries(items, skipped) if isinstance(items, (str, Path)) else items
    found = [_item_scores(model, tokenizer, item, methods, examples, limit) for item in _checked(given)]
    require(bool(found), "items", "none", "at least one")
    return QueryReport(found, skipped)


def _checked(items: Iterable[Any]) -> Iterator[QueryItem]:
    for item in items:
        if not isinstance(item, QueryItem):
            raise bad_type("items", item, "QueryItems, or the path of a JSON file of them")
        yield item


def _item_scores(
    model: nn.Module, tokenizer: Any, item: QueryItem, methods: Sequence[Method], examples: Sequence[str], limit: int
) -> MCScores:
    prompt = query_prompt(tokenizer, item, examples=examples, limit=limit)
    used = [
        replace(method, source=prompt.where("source"))
        if isinstance(method, LargePiG) and method.source is None
        else method
        for method in methods
    ]
    queries = [*item.good, *item.bad]
    answers = [torch.tensor(tokenizer(f" {query}", add_special_tokens=False)["input_ids"]) for query in queries]
    scores = answer_scores(model, prompt.input_ids[0], answers, *used)
    scores = torch.where(scores.isnan(), -math.inf, scores)
    return mc_scores(scores[: len(item.good)], scores[len(item.good) :])
