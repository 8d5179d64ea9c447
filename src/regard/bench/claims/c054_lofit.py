"""054 LoFiT: shifting a few heads learns what LoRA learns, with a thousandth of its parameters; which heads matters."""

from __future__ import annotations

import random
from typing import Any

import torch

from ...lens.head_search import next_token_objective
from ...losses.fit_lofit import fit_lofit, lofit_heads
from ...losses.lora import fit_lora
from ...losses.masked_lm import masked_lm_loss
from ...methods.edits import LoFiT
from .claim import Outcome, Scale

PAPER, SLUG = "054", "lofit"
SAYS = (
    "LoFiT: tuning offsets of 3 % of the heads, chosen by learned scales, comes close to LoRA with 20 to 200 times fewer parameters, "
    "and random heads do worse than the chosen ones."
)

KINDS = {
    " red": "otter horse eagle tiger rabbit whale camel goat spider lizard monkey sheep donkey wolf parrot salmon beaver "
    "falcon leopard turtle pigeon squirrel dolphin panther",
    " blue": "bread cheese soup apple rice butter pasta honey carrot banana onion salad yogurt potato sausage pancake "
    "cookie tomato noodle lemon garlic muffin cabbage bacon",
    " green": "hammer shovel drill ladder wrench saw pliers axe screwdriver chisel bucket broom needle scissors brush "
    "rope nail knife crowbar tape rake mallet clamp file",
}
TRAIN = 16  # words of each kind; the other 8 are never seen in training


def measure(scale: Scale) -> Outcome:
    model, tokenizer = scale.language_model()
    select, tune = scale.pick((30, 60), (2, 3))
    seeds = scale.pick(2, 1)
    batches = [_batch(tokenizer, number, scale.pick(24, 4)) for number in range(select + tune)]
    judged = _judge(tokenizer, scale.pick(8, 2))
    out = Outcome(
        f"words of {len(KINDS)} kinds to be called by made-up colours, {TRAIN} words a kind to learn from and {scale.pick(8, 2)} held out; "
        f"{select + tune} batches for each",
        "a run",
    )
    quiet: dict[str, Any] = {"progress": False}
    plain = judged(model)
    out.add("as it is", "accuracy on new words", "", plain)
    scores = lofit_heads(model, batches[:select], steps=select, **quiet)
    chosen = scores.top(0.03)
    tuned = fit_lofit(model, batches[select:], chosen, steps=tune, **quiet)
    found = judged(model, LoFiT(tuned))
    out.add(f"LoFiT, {len(chosen)} heads", "accuracy on new words", "", found)
    numbers = sum(parameter.numel() for parameter in tuned.parameters())
    out.add(f"LoFiT, {len(chosen)} heads", "trained parameters", "", numbers)
    control = []
    for seed in range(seeds):
        heads = scores.random(len(chosen), exclude=chosen, seed=seed)
        control.append(judged(model, LoFiT(fit_lofit(model, batches[select:], heads, steps=tune, **quiet))))
    out.add(f"the same, {len(chosen)} random heads", "accuracy on new words (a draw)", "", control)
    adapted: Any = fit_lora(model, batches, loss=masked_lm_loss, steps=select + tune, lr=5e-4, **quiet)
    lora = judged(adapted)
    weights = sum(p.numel() for name, p in adapted.named_parameters() if "lora_" in name)
    adapted.unload()
    out.add("LoRA of rank 8, all attention projections", "accuracy on new words", "", lora)
    out.add("LoRA of rank 8, all attention projections", "trained parameters", "", weights)
    out.check("accuracy gained by LoFiT", found - plain, at_least=0.2)
    out.check("LoFiT's accuracy less LoRA's", found - lora, at_least=-0.05)
    out.check("parameters of LoRA over LoFiT's", weights / numbers, at_least=20.0, digits=0)
    mean = sum(control) / len(control)
    out.check(
        "accuracy of the chosen heads less that of random ones", found - mean, at_least=0.01,
        spread=(max(control) - min(control)) / 2,
    )  # fmt: skip
    out.note = "Both see the same batches: LoFiT the first third while it chooses heads, the rest while it tunes them; LoRA all."
    return out


def _batch(tokenizer: Any, number: int, size: int) -> dict[str, torch.Tensor]:
    rng = random.Random(number)
    pairs = [
        (rng.choice(words.split()[:TRAIN]), colour) for colour, words in KINDS.items() for _ in range(size // 3 + 1)
    ]
    rng.shuffle(pairs)
    return _padded(tokenizer, pairs[:size])


def _padded(tokenizer: Any, pairs: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    rows = [(encode(f"{word} ="), encode(colour)[:1]) for word, colour in pairs]
    width = max(len(prompt) + 1 for prompt, _ in rows)
    ids, labels, mask = (torch.full((len(rows), width), fill) for fill in (0, -100, 0))
    for row, (prompt, answer) in enumerate(rows):
        start = width - len(prompt) - 1
        ids[row, start:] = torch.tensor(prompt + answer)
        labels[row, -1] = answer[0]
        mask[row, start:] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def _judge(tokenizer: Any, held_out: int) -> Any:
    pairs = [(word, colour) for colour, words in KINDS.items() for word in words.split()[TRAIN : TRAIN + held_out]]
    batch = _padded(tokenizer, pairs)
    prompts = {"input_ids": batch["input_ids"][:, :-1], "attention_mask": batch["attention_mask"][:, :-1]}
    choices = torch.tensor([tokenizer(colour, add_special_tokens=False)["input_ids"][0] for colour in KINDS])

    def judged(model: Any, method: Any = None) -> float:
        return next_token_objective(model, [prompts], [batch["labels"][:, -1]], choices=choices)(method)

    return judged
