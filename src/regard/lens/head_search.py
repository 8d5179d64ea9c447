"""Try an edit on one head after another, and say what each brings.

ACT (077) and ZeroTuning (081) find the heads they treat so: edit one head, measure, go on to the next. `next_token_objective` is
what both measure: the share of prompts answered rightly, or, where there are no labels, how sure the model is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import bad_type, require, require_name
from ..integrations.transformers import attach
from ..methods.call import Method
from .head_scores import Head, HeadScores

__all__ = ["next_token_objective", "search_heads"]

Inputs = Mapping[str, Tensor]
Measure = Callable[[Method | None], float]
OBJECTIVES = ("accuracy", "log-probability", "entropy")


def search_heads(
    model: nn.Module,
    make: Callable[[list[Head]], Method],
    measure: Measure,
    *,
    heads: Iterable[int] | None = None,
    layers: Iterable[int] | None = None,
    each: str = "both",
    baseline: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> HeadScores:
    """The gain of treating each head alone, over the model as it is.

        measure = regard.lens.next_token_objective(model, batches, labels)
        gains = regard.lens.search_heads(model, lambda heads: regard.ACT(heads), measure, layers=range(2, 28))
        method = regard.ACT(gains.above(0.0))

    Args:
        model: a model that `attach` can join. make: (layer, head) pairs -> the method that treats them.
        measure: method (None = none attached) -> a figure of which more is better; it attaches the method itself.
        heads, layers: head and layer numbers to try; None = all. Others get NaN, and are never chosen.
        each: "both": one head of one layer at a time; "head": a head number in all `layers` at once, a table (1, H); "layer": all
            `heads` of a layer, a table (L, 1).
        baseline: the figure without a method, if it is known. progress: told (trials done, trials in all) after each.

    Returns:
        `HeadScores` of the gains; `info["baseline"]`. Cost: one `measure` a trial, and one for the baseline.
    """
    require_name("each", each, ("both", "head", "layer"))
    num_layers, num_heads = model_shape(model)
    wanted_heads = chosen_numbers("heads", heads, num_heads)
    wanted_layers = chosen_numbers("layers", layers, num_layers)
    shape = {"both": (num_layers, num_heads), "head": (1, num_heads), "layer": (num_layers, 1)}[each]
    if each == "both":
        trials = [((la, h), [(la, h)]) for la in wanted_layers for h in wanted_heads]
    elif each == "head":
        trials = [((0, h), [(la, h) for la in wanted_layers]) for h in wanted_heads]
    else:
        trials = [((la, 0), [(la, h) for h in wanted_heads]) for la in wanted_layers]
    start = measure(None) if baseline is None else baseline
    table = torch.full(shape, torch.nan, dtype=torch.float64)
    for number, (place, pairs) in enumerate(trials):
        table[place] = measure(make(pairs)) - start
        if progress is not None:
            progress(number + 1, len(trials))
    return HeadScores(table, name="gain", info={"baseline": start, "each": each})


def next_token_objective(
    model: nn.Module,
    inputs: Iterable[Inputs],
    labels: Iterable[Tensor] | None = None,
    *,
    objective: str | None = None,
    choices: Tensor | None = None,
) -> Measure:
    """A function of a method (None = none): the mean over prompts of how good the next token is. More is better.

    Args:
        inputs: batches of prompts, as the tokenizer gives them (padded on either side).
        labels: the right next token of each prompt, one int64 (B,) a batch.
        objective: "accuracy" (share of prompts whose likeliest next token is the label), "log-probability" (of the label, in nats) or
            "entropy" (of the next-token distribution, with its sign turned; needs no labels). None: accuracy where labels are given.
        choices: token ids that an answer may be; None = the whole vocabulary.
    """
    batches = list(inputs)
    given = None if labels is None else list(labels)
    name = objective or ("entropy" if given is None else "accuracy")
    require_name("objective", name, OBJECTIVES)
    require(bool(batches), "inputs", "none", "at least one batch")
    if name != "entropy":
        found = None if given is None else len(given)
        require(found == len(batches), "labels", found, f"{len(batches)} batches")

    @torch.no_grad()
    def measure(method: Method | None) -> float:
        if method is not None and not isinstance(method, Method):
            raise bad_type("method", method, "a regard.Method or None")
        total, count = 0.0, 0
        with attach(model, *([] if method is None else [method])):
            for number, batch in enumerate(batches):
                logits = next_token_logits(model, batch)
                ids = torch.arange(logits.shape[-1]) if choices is None else choices.cpu()
                logits = logits.cpu()[:, ids]
                if name == "entropy":
                    total -= float(torch.distributions.Categorical(logits=logits).entropy().sum())
                else:
                    assert given is not None
                    right = given[number].cpu()[:, None] == ids
                    if name == "accuracy":
                        total += float(right.gather(1, logits.argmax(-1, keepdim=True)).sum())
                    else:
                        known = bool(right.any(-1).all())
                        require(known, "labels", given[number].tolist(), "token ids among the choices")
                        total += float(logits.log_softmax(-1)[right].sum())
                count += len(logits)
        return total / count

    return measure


def model_shape(model: Any) -> tuple[int, int]:
    """(layers, query heads) of the part of a model that generates text."""
    with attach(model) as session:
        return session.num_layers, model.config.get_text_config(decoder=True).num_attention_heads


def next_token_logits(model: nn.Module, batch: Inputs) -> Tensor:
    """Float32 logits (B, V) after the last real token of each prompt."""
    mask = batch.get("attention_mask")
    if mask is None or bool(mask[:, -1].all()):
        thrifty = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        return model(**batch, use_cache=False, **thrifty).logits[:, -1].float()
    logits = model(**batch, use_cache=False).logits
    last = mask.shape[1] - 1 - mask.flip(1).to(torch.uint8).argmax(1)
    return logits[torch.arange(len(logits), device=logits.device), last.to(logits.device)].float()


def chosen_numbers(name: str, wanted: Iterable[int] | None, count: int) -> list[int]:
    """Numbers in [0, count), negative ones counted from the end; None = all."""
    if wanted is None:
        return list(range(count))
    listed = [int(number) for number in wanted]
    out = [number for number in listed if not -count <= number < count]
    require(bool(listed) and not out, name, out or "none", f"numbers in [0, {count})")
    return [number % count for number in listed]
