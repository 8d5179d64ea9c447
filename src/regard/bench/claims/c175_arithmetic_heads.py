"""175 arithmetic heads: a few heads calculate, and tuning them alone teaches sums at little cost to the rest."""

from __future__ import annotations

import copy
import random
from typing import Any

import torch

from ..._prose import haystack_text
from ...integrations.transformers import attach
from ...lens.arithmetic_heads import arithmetic_heads, mean_head_outputs
from ...lens.attention_mass import span_mass
from ...losses.head_slices import precise_sft
from ...methods.edits import MaskHeads
from ...testbeds.circuits import arithmetic
from .circuit_models import answered, circuit_model
from .claim import Outcome, Scale

PAPER, SLUG = "175", "arithmetic-heads"
SAYS = (
    "Arithmetic heads: fewer than 5 % of the heads do the calculating and look at operands and operator; without them (not without as "
    "many others) sums fail; tuning them alone gives most of what full tuning gives and leaves other abilities alone."
)
ACCURACY, TEXT = "accuracy on held-out differences", "loss on prose"
Sample = tuple[str, str]


def measure(scale: Scale) -> Outcome:
    model, tokenizer = circuit_model(scale)
    prompts, asked, steps = scale.pick((16, 40, 40), (2, 4, 1))
    batch = answered(scale, model, arithmetic(tokenizer, 2 * prompts, form=0), prompts)
    least = scale.pick(0.1, 0.0)
    effect = arithmetic_heads(model, batch.clean, batch.corrupted, batch.right, min_probability=least, progress=False)
    key = effect.top(0.05, largest=False)
    lost = (-effect.scores).clamp(min=0)
    share = float(sum(lost[head] for head in key) / lost.sum())
    out = Outcome(
        f"{effect.scores.numel()} heads, one-digit sums after two examples ({len(batch)} answered right); tuning on differences "
        f"of numbers up to 39, {steps} steps of 8",
        "draw",
    )
    out.add(f"the {len(key)} key heads", "share of all effect", "", share)

    mass = span_mass(model, batch.clean, batch.spans, queries=["last"], keys=["a", "b", "operation"])
    looks = torch.stack([mass.between("last", name).scores for name in ("a", "b", "operation")]).sum(0)
    at_key, at_all = float(torch.stack([looks[head] for head in key]).mean()), float(looks.mean())
    out.add("all heads", "attention of the last token on operands and operator", "", at_all)
    out.add("key heads", "attention of the last token on operands and operator", "", at_key, against="all heads")

    test = arithmetic(tokenizer, asked, seed=1, form=0)
    plain = test.accuracy(model)
    means = mean_head_outputs(model, batch.corrupted, position=-1)

    def without(heads: list[tuple[int, int]]) -> float:
        with attach(model, MaskHeads(heads, mode="mean", phase="all", means=means)):
            return test.accuracy(model)

    draws = [without(effect.random(len(key), exclude=key, seed=seed)) for seed in range(3)]
    gone = without(key)
    out.add("untouched", "accuracy on sums", "", plain)
    out.add("key heads knocked out", "accuracy on sums", "", gone)
    out.add("random heads knocked out", "accuracy on sums", "", draws)
    mean = sum(draws) / len(draws)

    learn, held = _differences()
    text = torch.tensor([tokenizer(haystack_text()[:20_000])["input_ids"][: scale.pick(1024, 128)]]).view(-1, 128)
    before = (_accuracy(model, tokenizer, held), _text_loss(model, text))
    every = [(layer, head) for layer in range(effect.num_layers) for head in range(effect.num_heads)]
    after: dict[str, tuple[float, float]] = {"untouched": before}
    for name, heads, mlps, lr in (
        ("key heads tuned", key, [], 1e-3),
        ("all tuned", every, range(effect.num_layers), 1e-4),
    ):
        own = copy.deepcopy(model)
        tuned = precise_sft(own, tokenizer, learn, heads, mlps=mlps, steps=steps, lr=lr, progress=False)
        after[name] = (_accuracy(own, tokenizer, held), _text_loss(own, text))
        out.add(name, "share of the parameters tuned", "", tuned.share)
        del own, tuned
    for name, (accuracy, loss) in after.items():
        out.add(name, ACCURACY, "", accuracy)
        out.add(name, TEXT, "nats", loss)
    gains = {name: value[0] - before[0] for name, value in after.items()}
    moved = {name: value[1] - before[1] for name, value in after.items()}

    out.check("share of the effect that the best 5 % of heads have", share, at_least=0.5)
    out.check("their attention on operands and operator, beside all heads'", at_key / at_all, at_least=1.5)
    out.check("accuracy lost with key heads knocked out", plain - gone, at_least=0.2)
    out.check("with as many random heads (mean of 3 draws)", plain - mean, at_most=max(0.0, (plain - gone) / 2))
    out.check("accuracy gained by tuning key heads", gains["key heads tuned"], at_least=0.1)
    more = gains["key heads tuned"] - gains["all tuned"] / 2
    out.check("the same, less half of what full tuning gains", more, at_least=0.0)
    out.check(
        "loss on prose moved by it, less what full tuning moves, nats",
        moved["key heads tuned"] - moved["all tuned"],
        at_most=0.0,
    )
    return out


def _differences() -> tuple[list[Sample], list[Sample]]:
    """Differences of numbers up to 39 whose answer is one digit; a sixth of the problems are held out."""
    problems = [(a, b) for a in range(1, 40) for b in range(max(0, a - 9), a + 1)]
    random.Random(0).shuffle(problems)
    samples = [(f"{a} - {b} = ", str(a - b)) for a, b in problems]
    held = len(samples) // 6
    return samples[held:], samples[:held]


@torch.no_grad()
def _accuracy(model: Any, tokenizer: Any, samples: list[Sample]) -> float:
    right = 0
    for prompt, answer in samples:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        right += int(model(ids).logits[0, -1].argmax()) == tokenizer(answer, add_special_tokens=False)["input_ids"][0]
    return right / len(samples)


@torch.no_grad()
def _text_loss(model: Any, rows: torch.Tensor) -> float:
    return float(model(rows, labels=rows).loss)
