"""188 PGI: a prompt in labelled groups, the one that is asked about last, keeps attention on the right facts."""

from __future__ import annotations

import statistics

from ...lens.misdirection import misdirection
from ...lens.needle import NeedleHaystack
from ...lens.retrieval_heads import retrieval_heads
from ..pgi import PGIPrompt, error_report
from .claim import Outcome, Scale
from .language import answer_log_prob

PAPER, SLUG = "188", "pgi"
SAYS = (
    "PGI: many wrong answers are misdirected attention, and prompts framed by persona, groups and rules direct it: more of it on the facts "
    "that are asked about, and more right answers."
)

CLIENTS = (
    ("Ann Keller", "Friday", "Berlin"), ("Omar Haddad", "Monday", "Lisbon"), ("Ruth Sand", "Tuesday", "Oslo"),
    ("Pavel Novak", "Sunday", "Prague"), ("Mei Tan", "Thursday", "Seoul"), ("Jon Berg", "Wednesday", "Dublin"),
)  # fmt: skip


def measure(scale: Scale) -> Outcome:
    model, tokenizer = scale.language_model()
    hay = NeedleHaystack(lengths=scale.pick((256,), (220,)), depths=scale.pick((20, 60), (50,)))
    heads = retrieval_heads(model, tokenizer, hay, decode="forced").top(scale.pick(10, 3))
    cases = _cases()[: scale.pick(16, 2)]
    out = Outcome(
        f"{len(cases)} questions, each on facts about three clients; {len(heads)} retrieval heads", "a question"
    )
    labels: dict[str, list[str]] = {}
    for label, framed in (("plain prompt", False), ("PGI", True)):
        share, right, margin = [], [], []
        for case in cases:
            text, asked, others, answer, wrong = _prompt(case, framed)
            found = misdirection(model, tokenizer, text, asked, others, heads, answer=f" {answer}")
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            scores = [
                answer_log_prob(model, ids, tokenizer(f" {word}", add_special_tokens=False)["input_ids"])
                for word in (answer, *wrong)
            ]
            share.append(found.share)
            margin.append(scores[0] - max(scores[1:]))
            right.append(float(margin[-1] > 0))
            labels.setdefault(label, []).append(found.verdict(right=right[-1] > 0))
        against = None if not framed else "plain prompt"
        out.add(label, "attention on the facts asked about, of that on all facts", "", share, against=against)
        out.add(label, "right answers", "", right)
        out.add(label, "margin of the answer", "nats", margin)
    plain, framed_rows = ([out.row(name, figure).mean for figure in _FIGURES] for name in ("plain prompt", "PGI"))
    out.check("share of attention gained by the frame", framed_rows[0] - plain[0], at_least=0.0, digits=3)
    out.check("accuracy gained by the frame", framed_rows[1] - plain[1], at_least=0.0)
    wrong = [verdict for verdicts in labels.values() for verdict in verdicts if verdict != "ok"]
    out.note = "; ".join(f"{label}: {error_report(verdicts)}" for label, verdicts in labels.items()) + "."
    if wrong:
        blamed = statistics.fmean(float(verdict == "misdirection") for verdict in wrong)
        out.note += f" Of the wrong answers {blamed:.2f} are misdirection by attention, which is a rule of ours."
    return out


_FIGURES = ("attention on the facts asked about, of that on all facts", "right answers")


def _cases() -> list[tuple[tuple[tuple[str, str, str], ...], int, int]]:
    """Three clients, which of them is asked about, and which fact (1: the day, 2: the city)."""
    trios = [tuple(CLIENTS[(start + step) % 6] for step in (0, 1, 3)) for start in range(6)]
    return [(trio, asked, fact) for fact in (1, 2) for trio in trios for asked in (0, 1)]


def _prompt(
    case: tuple[tuple[tuple[str, str, str], ...], int, int], framed: bool
) -> tuple[str, str, list[str], str, list[str]]:
    """The prompt, the facts asked about, the others', the answer and what the others' answers would be."""
    trio, asked, fact = case
    facts = {name: f"{name} pays every {day} and lives in {city}." for name, day, city in trio}
    name = trio[asked][0]
    question = f"On which day does {name} pay?" if fact == 1 else f"In which city does {name} live?"
    lead = f"{name} pays every" if fact == 1 else f"{name} lives in"
    if framed:
        frame = PGIPrompt(
            "You assist the clerks of a small bank. You are brief and never guess.",
            facts,
            "Answer from the facts about the client who is asked about, and from no other.",
        )
        text = f"{frame.render(question, about=name)}\nAnswer: {lead}"
    else:
        text = f"{' '.join(facts.values())}\n\n{question}\n{lead}"
    others = [client for client in trio if client[0] != name]
    return (
        text,
        facts[name],
        [facts[client[0]] for client in others],
        trio[asked][fact],
        [client[fact] for client in others],
    )
