"""071 KANT: facts of a repository learned with and without the path before them, and what a prompt of paths costs beside one of code."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...losses.anchors import AnchorIndex, anchor_prompt, anchored_answers
from ...losses.masked_lm import MaskedCollator
from ...models.small_lm import SmallLM
from ...testbeds.training import masked_token_loss, train
from ..text import token_windows
from .claim import Outcome, Scale
from .timing import times

PAPER, SLUG = "071", "kant"
SAYS = (
    "KANT: a model fine-tuned on questions and answers behind knowledge anchors (file paths), and asked with retrieved anchors in place of "
    "code, answers better than retrieval-augmented generation, at 85 % less latency."
)
RIGHT, LENGTH, TIME = "right answers", "prompt", "time of the prompt"
K = 5


class _Words:
    """A token a word."""

    bos_token_id = eos_token_id = None
    pad_token_id = 0

    def __init__(self) -> None:
        self.known: dict[str, int] = {"": 0}

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [self.known.setdefault(word, len(self.known)) for word in text.split()]}


def measure(scale: Scale) -> Outcome:
    files, asks, values, steps = scale.pick((40, 4, 16, 500), (4, 2, 4, 3))
    out = Outcome(
        f"a made-up repository: {files} files that answer the same {asks} questions differently, two layers of width 64 trained from "
        f"nothing for {steps} steps; cost: prompts of {K} paths and of {K} pieces of 256 tokens on {scale.model_name}",
        "question of each file, round of timing",
    )
    drawn = random.Random(0)
    facts = [
        (f"part{i}/settings.py", f"ask{j} ?", f"value{drawn.randrange(values)}")
        for i in range(files)
        for j in range(asks)
    ]
    for label, anchored in (("no anchors", False), ("anchors", True)):
        shares = _learned(facts, anchored, steps, asks)
        out.add(label, RIGHT, "share", shares, against=None if not anchored else "no anchors")
    _cost(out, scale)
    out.check("right answers with anchors", out.row("anchors", RIGHT).mean, at_least=0.9)
    out.check(
        "right answers, anchors above none",
        out.row("anchors", RIGHT).mean - out.row("no anchors", RIGHT).mean,
        at_least=0.3,
    )
    out.check("tokens of a prompt, paths of code", out.row("paths", LENGTH).ratio or 1.0, at_most=0.15)
    out.check("time of a prompt, paths of code", out.row("paths", TIME).ratio or 1.0, at_most=0.15)
    return out


def _learned(facts: list[tuple[str, str, str]], anchored: bool, steps: int, asks: int) -> list[float]:
    """Share of right answers, question by question; anchors are found by an index that hears the file's number in the query."""
    words = _Words()
    collate = MaskedCollator(words)
    samples = anchored_answers(facts, anchored=anchored)
    collate(samples)  # every word gets its number
    torch.manual_seed(0)
    model = SmallLM(len(words.known), 64, 2, 4, "softmax", mlp_ratio=4)

    def batch(number: int) -> dict[str, Tensor]:
        chosen = random.Random(number).choices(samples, k=64)
        return collate(chosen)

    train(model, batch, steps=steps, loss=masked_token_loss, lr=3e-3, progress=False)
    model.eval()
    paths = list(dict.fromkeys(path for path, _, _ in facts))
    index = AnchorIndex(_numbers(len(paths)), {path: path for path in paths})
    right: list[list[float]] = [[] for _ in range(asks)]
    with torch.no_grad():
        for place, (path, question, answer) in enumerate(facts):
            found = index.search(f"{path} {question}", k=1) if anchored else []
            ids = torch.tensor([words(anchor_prompt(found, question))["input_ids"]])
            made = int(model(ids)[0, -1].argmax())
            right[place % asks].append(float(made == words.known[answer]))
    return [sum(row) / len(row) for row in right]


def _numbers(count: int) -> Callable[[list[str]], Tensor]:
    """An embedding that knows a path by its number."""

    def embed(texts: list[str]) -> Tensor:
        made = torch.zeros(len(texts), count)
        for row, text in zip(made, texts):
            row[int(text.split("/")[0].removeprefix("part"))] = 1.0
        return made

    return embed


@torch.no_grad()
def _cost(out: Outcome, scale: Scale) -> None:
    model, tokenizer = scale.language_model()
    pieces = [tokenizer.decode(ids) for ids in token_windows(tokenizer, scale.pick(256, 32), K)]
    question = "Where is the number of retries of the client configured?"
    keys = anchor_prompt([f"src/service{i}/client/settings.py" for i in range(K)], question)
    prompts = {"code": "\n".join([*pieces, question]), "paths": keys}
    given = {label: tokenizer(text, return_tensors="pt")["input_ids"] for label, text in prompts.items()}
    found = times({label: partial(model, one) for label, one in given.items()}, rounds=scale.pick(5, 2), inner=1)
    for label in prompts:
        against = None if label == "code" else "code"
        out.add(label, LENGTH, "tokens", float(given[label].shape[1]), against)
        out.add(label, TIME, "s", found[label], against)
