"""194 context awareness: chat templates draw attention from the user's words, steering gives it back."""

from __future__ import annotations

import statistics
from itertools import pairwise
from typing import Any

from ...integrations.spans import SpannedPrompt, chat_spans, text_spans
from ...integrations.transformers import attach
from ...lens.attention_mass import span_mass
from ...lens.context_dependency import context_dependency
from ...lens.needle import NEEDLES, haystack_text
from ...methods.edits import Emphasize
from .claim import Outcome, Scale
from .language import answer_log_prob

PAPER, SLUG = "194", "context-awareness"
SAYS = (
    "Context awareness: with its chat template a chat model attends less to the user's words than without; steering attention to them "
    "raises that mass and finds needles better; answers copied from the context score as more context-dependent than those known by heart."
)

COPIED = (
    ("The ferry to Lundaby leaves at dawn from the copper pier. Where does the ferry leave from?", "It leaves from the copper pier."),
    ("Ilka Morane keeps nine hives of bees above Caldermoor. How many hives does Ilka Morane keep?", "She keeps nine hives of bees."),
    ("The museum of Velmont shows a silver pendulum made by Teodor Brandt. Who made the pendulum?", "Teodor Brandt made it, of silver."),
    ("Quillon cheese is washed with pear cider and stored in a salt mine. What is it washed with?", "With pear cider."),
)  # fmt: skip
KNOWN = (
    ("I would like to learn something about the world today, so please tell me. What is the capital of France?", "It is Paris."),
    ("My little brother asked me this at breakfast, and I was not sure about it. How many legs do spiders have?", "They have eight legs."),
    ("We were talking about the sky at night, and somebody wondered about this. Which planet is known for its rings?", "It is Saturn."),
    ("Our teacher will ask us about animals next week, so help me get ready. Which animal says meow?", "Cats say meow."),
)  # fmt: skip


def measure(scale: Scale) -> Outcome:
    model, tokenizer = scale.language_model()
    if getattr(tokenizer, "chat_template", None) is None:
        tokenizer = _Templated(tokenizer)
    alphas = scale.pick((1.0, 0.9, 0.8, 0.6), (1.0, 0.6))
    needles = [(needle, depth) for needle in NEEDLES for depth in (0.3, 0.7)][: scale.pick(6, 2)]
    words = scale.pick(300, 40)
    out = Outcome(f"{len(needles)} needles in about {words} words of text, under the chat template", "a prompt")
    mass: dict[str, list[float]] = {}
    found: dict[str, list[float]] = {}
    for needle, depth in needles:
        text, answer = _haystack(needle, depth, words), f" {needle.answer}"
        lead = needle.text[: needle.text.index(needle.answer)].strip()  # the answer begins with the needle's own words
        chat = chat_spans(tokenizer, [{"role": "user", "content": text}])
        answered = _with_lead(tokenizer, chat, lead)
        begin = getattr(tokenizer, "bos_token", None) or "\n"  # takes the sink, as the template's first token does
        plain = text_spans(tokenizer, f"{begin}{text}\n{lead}", {"user": text}, add_special_tokens=False)
        mass.setdefault("without the template", []).append(_mass(model, plain))
        target = tokenizer(answer, add_special_tokens=False)["input_ids"]
        for alpha in alphas:
            with attach(model, Emphasize("user", alpha=alpha), spans=answered.spans):
                mass.setdefault(f"template, alpha {alpha:g}", []).append(_mass(model, answered))
                score = answer_log_prob(model, answered.input_ids[0].tolist(), target)
                found.setdefault(f"template, alpha {alpha:g}", []).append(score)
    for label, values in mass.items():
        out.add(label, "mass on the user's words before the answer (head of most)", "", values)
    for label, values in found.items():
        out.add(label, "needle log-probability", "nats", values)
    count = scale.pick(4, 1)
    copied, known = ([_talk(*pair) for pair in pairs[:count]] for pairs in (COPIED, KNOWN))
    copied_scores = [score.score for score in context_dependency(model, tokenizer, copied)]
    known_scores = [score.score for score in context_dependency(model, tokenizer, known)]
    out.add("answers copied from the context", "context-dependency score", "", copied_scores)
    out.add("answers known by heart", "context-dependency score", "", known_scores)

    means = [statistics.fmean(mass[f"template, alpha {alpha:g}"]) for alpha in alphas]
    without = statistics.fmean(mass["without the template"])
    out.check("user mass without the template over with it", without / means[0], at_least=1.0)
    growth = min(after / before for before, after in pairwise(means))
    out.check("smallest growth of user mass from one alpha to the next smaller", growth, at_least=1.0)
    scores = [statistics.fmean(found[f"template, alpha {alpha:g}"]) for alpha in alphas]
    out.check("needle log-prob gained by the best alpha below 1, nats", max(scores[1:]) - scores[0], at_least=0.0)
    lead_of = statistics.fmean(copied_scores) / statistics.fmean(known_scores)
    out.check("context-dependency, copied over known", lead_of, at_least=1.0)
    out.note = "Mass: mean over layers of the head with most of it, at the last token before the needle's answer."
    return out


class _Templated:
    """A tokenizer without a chat template, with a plain one."""

    chat_template = "plain"

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._tokenizer(*args, **kwargs)

    def apply_chat_template(
        self, messages: list[dict[str, str]], tokenize: bool = False, add_generation_prompt: bool = False
    ) -> str:
        said = "".join(f"[{message['role']}] {message['content']}\n" for message in messages)
        return f"{said}[assistant] " if add_generation_prompt else said


def _haystack(needle: Any, depth: float, words: int) -> str:
    sentences = [sentence for sentence in haystack_text().split(". ") if sentence.isascii()]
    kept: list[str] = []
    size = 0
    while size < words:
        kept.append(sentences[len(kept)])
        size += len(kept[-1].split())
    at = round(depth * len(kept))
    return ". ".join([*kept[:at], needle.text.rstrip("."), *kept[at:]]) + f".\n{needle.question}"


def _with_lead(tokenizer: Any, chat: SpannedPrompt, lead: str) -> SpannedPrompt:
    """The prompt with the answer's first words after it; its spans stay those of the prompt."""
    made = text_spans(tokenizer, chat.texts[0] + lead, add_special_tokens=False)
    turn = next(turn for turn in chat.turns[0] if turn.role == "user")
    return made.mark("user", turn.place)


def _mass(model: Any, prompt: SpannedPrompt) -> float:
    mass = span_mass(model, prompt, queries=["last"], keys=["user"]).mass
    return float(mass[0, :, :, 0, 0].amax(1).mean())


def _talk(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
