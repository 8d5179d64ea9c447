"""057 SCA / [PAUSE]: the middle of a long prompt is read least, and the paraphrase that attributions choose is answered better."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..._prose import haystack_text
from ...lens.paraphrases import best_paraphrase, share_of_thirds
from ...lens.saliency import saliency
from .claim import Outcome, Scale

PAPER, SLUG = "057", "sca-pause"
SAYS = (
    "SCA: language models read the middle of long prompts least, and the paraphrase whose attributions agree most with those of all "
    "paraphrases (topics kept) is understood better than the others."
)
QUESTIONS = (
    ("What is the capital of France?", "Name the capital city of France.", "Which city is France's capital?", "France: capital?", " Paris"),
    ("Who wrote Hamlet?", "Name the author of Hamlet.", "Hamlet was written by which person?", "Hamlet: author?", " Shakespeare"),
    ("What do bees make?", "Name the food that bees make.", "Bees produce which sweet food?", "Bees make?", " honey"),
    ("How many days are in a week?", "Give the number of days in a week.", "A week has how many days?", "Week: days?", " seven"),
    ("What is frozen water called?", "Name the frozen form of water.", "Water that is frozen is called what?", "Frozen water?", " ice"),
    ("Which star is nearest to us?", "Name the star closest to Earth.", "Our nearest star is which?", "Nearest star?", " the Sun"),
)  # fmt: skip


def _answered(model: torch.nn.Module, tokenizer: object, prompt: str, answer: str) -> float:
    """Mean log-probability of the answer's tokens."""
    ids, more = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer))  # type: ignore[operator]
    whole = torch.tensor([[*ids, *more]])
    with torch.no_grad():
        logits = model(whole, use_cache=False).logits[0, len(ids) - 1 : -1].float()
    return float(-F.cross_entropy(logits, torch.tensor(more)))


def measure(scale: Scale) -> Outcome:
    model, tokenizer = scale.language_model()
    length, count, steps = scale.pick((192, 6, 6), (24, 2, 2))
    questions = QUESTIONS[: scale.pick(6, 2)]
    out = Outcome(
        f"{scale.model_name}; {count} passages of {length} tokens; {len(questions)} questions in four wordings, IG of {steps} steps",
        "a passage, or a question",
    )
    text = haystack_text()
    middles, rest = [], []
    for number in range(count):
        ids = tokenizer(text[(2 * number + 1) * 2000 :][: 12 * length], add_special_tokens=False)["input_ids"][:length]
        found = saliency(model, {"input_ids": torch.tensor([ids])}, magnitude=True, of="log_prob")
        thirds = share_of_thirds(found[:, 1:])[0].tolist()  # the first token is a sink, whatever it says
        middles.append(thirds[1])
        rest.append((thirds[0] + thirds[2]) / 2)
    out.add("mean of first and last third", "share of gradient x input", "share", rest)
    middle = out.add(
        "middle third", "share of gradient x input", "share", middles, against="mean of first and last third"
    )
    out.check(
        "share of the middle third over that of the others",
        middle.ratio or float("nan"),
        at_most=0.9,
        spread=middle.spread,
    )

    chosen, mean, alone = [], [], []
    for *prompts, answer in questions:
        framed = [f"Question: {prompt}\nAnswer:" for prompt in prompts]
        values = [_answered(model, tokenizer, prompt, answer) for prompt in framed]
        made = best_paraphrase(model, tokenizer, framed, steps=steps)
        chosen.append(values[made.best])
        alone.append(values[max(range(len(values)), key=lambda i: made.gradient[i])])
        mean.append(sum(values) / len(values))
    out.add("mean of the wordings", "log-probability of the answer", "nats a token", mean)
    for label, values in (("chosen wording", chosen), ("chosen by attributions alone", alone)):
        row = out.add(label, "log-probability of the answer", "nats a token", values)
        gain = row.mean - out.row("mean of the wordings", "log-probability of the answer").mean
        out.check(f"{label}: log-probability gained over the mean wording", gain, at_least=0.0)
    out.note = "Pauses (insertion, a learned token) are tested for what they do, not measured here."
    return out
