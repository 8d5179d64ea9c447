"""177 AttentionInfluence: without its retrieval heads a model loses most on text that reasons."""

from __future__ import annotations

import random
import statistics
from typing import Any

from ...lens.corpus_influence import document_losses, influence_heads
from ...lens.key_values import KeyValueProbes
from ..text import token_windows
from .claim import Outcome, Scale

PAPER, SLUG = "177", "attention-influence"
SAYS = (
    "AttentionInfluence: the relative loss that a small model suffers with its top 5 % of retrieval heads masked ranks text that reasons "
    "above text that does not."
)

_NAMES = ("Ann", "Tom", "Ilka", "Omar", "Ruth", "Pavel", "Mei", "Jon")
_THINGS = ("marbles", "stamps", "apples", "tickets", "shells", "candles")


def reasoning(number: int) -> str:
    """A made-up derivation: sums in words, an order of people, or values of variables, each step said with its reasons."""
    rng = random.Random(f"reasoning {number}")
    kind = number % 3
    if kind == 0:
        name, thing = rng.choice(_NAMES), rng.choice(_THINGS)
        have, bags, each, gone = rng.randrange(10, 40), rng.randrange(3, 9), rng.randrange(4, 12), rng.randrange(2, 9)
        bought, total = bags * each, have + bags * each
        return (
            f"{name} has {have} {thing} and buys {bags} bags with {each} {thing} in every bag. Then {name} gives {gone} {thing} to a "
            f"friend. How many {thing} has {name} now? First, {bags} bags with {each} {thing} in every bag are {bags} * {each} = {bought} "
            f"{thing}. Together with the {have} {thing} from before, {name} has {have} + {bought} = {total} {thing}. After {gone} {thing} "
            f"are given to the friend, {total} - {gone} = {total - gone} {thing} are left. So {name} has {total - gone} {thing} now."
        )
    if kind == 1:
        a, b, c, d = rng.sample(_NAMES, 4)
        return (
            f"{a} is taller than {b}. {b} is taller than {c}. {c} is taller than {d}. Who is the shortest, and is {a} taller than {d}? "
            f"Since {a} is taller than {b} and {b} is taller than {c}, {a} is taller than {c}. Since {a} is taller than {c} and {c} is "
            f"taller than {d}, {a} is taller than {d}. Nobody is shorter than {d}, because {d} is shorter than {c}, {b} and {a}. So {d} is "
            f"the shortest, and {a} is taller than {d}."
        )
    x, y, z, w = rng.sample(["a", "b", "k", "m", "n", "p", "x", "y"], 4)
    first, step, factor = rng.randrange(2, 9), rng.randrange(3, 12), rng.randrange(2, 6)
    second = first + step
    third = second * factor
    return (
        f"Let {x} = {first}, let {y} = {x} + {step}, let {z} = {factor} * {y} and let {w} = {z} - {x}. What is {w}? Since {x} = {first}, "
        f"we have {y} = {x} + {step} = {first} + {step} = {second}. Since {y} = {second}, we have {z} = {factor} * {y} = {factor} * "
        f"{second} = {third}. Finally {w} = {z} - {x} = {third} - {first} = {third - first}. So {w} = {third - first}."
    )


def shuffled(text: str, number: int) -> str:
    words = text.split()
    random.Random(f"shuffled {number}").shuffle(words)
    return " ".join(words)


def measure(scale: Scale) -> Outcome:
    model, tokenizer = scale.language_model()
    count = scale.pick(12, 3)
    probes = KeyValueProbes(
        count=scale.pick(6, 1),
        max_tokens=scale.pick(512, 900),
        shots=scale.pick(3, 1),
        key_len=scale.pick(16, 6),
        value_tokens=scale.pick(30, 80),
    )
    heads, table = influence_heads(model, tokenizer, probes)
    texts = {"reasoning": [reasoning(i) for i in range(count)]}
    texts["the same, words shuffled"] = [shuffled(text, i) for i, text in enumerate(texts["reasoning"])]
    windows = token_windows(tokenizer, 120, count)
    texts["prose"] = [tokenizer.decode(ids) for ids in windows]
    out = Outcome(f"{count} documents of each kind, {len(heads)} of {table.scores.numel()} heads masked", "a document")
    draws = scale.pick(2, 1)
    ways = {"retrieval heads": heads}
    ways |= {
        f"random heads {seed}": table.random(len(heads), exclude=4 * len(heads), seed=seed) for seed in range(draws)
    }
    found: dict[tuple[str, str], list[float]] = {}
    for kind, documents in texts.items():
        ids = [tokenizer(text)["input_ids"] for text in documents]
        base = _losses(model, ids, None)
        for way, masked in ways.items():
            if kind == "prose" and way != "retrieval heads":
                continue
            scores = [ref / plain - 1 for ref, plain in zip(_losses(model, ids, masked), base)]
            found[kind, way] = scores
            out.add(f"{kind}, {way} masked", "relative loss S", "", scores)
    ahead = _ahead(found["reasoning", "retrieval heads"], found["the same, words shuffled", "retrieval heads"])
    out.check("share of pairs with reasoning ranked above shuffled text", ahead, at_least=0.8)
    retrieval = statistics.fmean(found["reasoning", "retrieval heads"])
    random_heads = [statistics.fmean(found["reasoning", way]) for way in ways if way != "retrieval heads"]
    spread = (max(random_heads) - min(random_heads)) / 2
    lead = retrieval - statistics.fmean(random_heads)
    out.check("S of reasoning, retrieval heads less random heads", lead, at_least=0.0, spread=spread, digits=3)
    prose = _ahead(found["reasoning", "retrieval heads"], found["prose", "retrieval heads"])
    chance = statistics.fmean(
        _ahead(found["reasoning", way], found["the same, words shuffled", way])
        for way in ways
        if way != "retrieval heads"
    )
    out.note = f"Reasoning is above prose in {prose:.2f} of pairs; with random heads masked, above shuffled text in {chance:.2f}."
    return out


def _losses(model: Any, documents: list[list[int]], heads: list[tuple[int, int]] | None) -> list[float]:
    parts = [document_losses(model, documents[i : i + 6], heads).tolist() for i in range(0, len(documents), 6)]
    return [loss for part in parts for loss in part]


def _ahead(ours: list[float], others: list[float]) -> float:
    """Share of all pairs in which ours is larger."""
    return statistics.fmean(float(a > b) for a in ours for b in others)
