"""Small tasks whose answer is one token and whose ground truth is known, as pairs of a clean and a corrupted prompt of the same length.

| task | asks | corrupted prompt | after |
|---|---|---|---|
| `indirect_object` | who is given something | three other names (ABC) | Wang et al. 2022 (2211.00593) |
| `colored_objects` | the colour of one of three things | asks for another thing | Merullo et al. 2023 (2310.08744) |
| `multiple_choice` | the label of the option that says a word | asks for another word | Lieberum et al. 2023 (2307.09458) |
| `arithmetic` | a sum, difference, ... | the same numbers, no relation | Zhang et al. 2024 (2409.01659) |

Words are taken only where the tokenizer has them as one token, so that pairs line up token by token. Texts and word lists are
ours, but for the sentence form, objects and colours of the coloured objects, which are the task.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .._checks import require, require_int, require_name
from .pairs import Pair, PairBatch, Piece, draw_pairs, single_tokens

__all__ = [
    "LABELS",
    "arithmetic",
    "colored_objects",
    "indirect_object",
    "multiple_choice",
    "word_tokenizer",
]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    "Mary John Tom James Dan Martin Amy Paul Mark Anna Peter Kate Simon Laura David Sarah Alice Jack Emma Henry Lucy George "
    "Sam Robert Jane William Michael Kevin Rachel Andrew Steven Helen Lisa Karen Scott Frank"
)
PLACES = _words("store park school garden station library market office beach hospital")
GIFTS = _words("drink book ring ball letter key flower pen bag computer")
SCENES = (
    "When {0} and {1} went to the {place}, {2} gave a {gift} to",
    "Then, {0} and {1} had a long walk to the {place}, and {2} handed a {gift} to",
    "After {0} and {1} met at the {place}, {2} decided to give a {gift} to",
    "While {0} and {1} were working at the {place}, {2} passed a {gift} to",
)
OBJECTS = _words(
    "pencil notebook pen cup plate jug mug puzzle textbook leash necklace bracelet bottle ball envelope lighter bowl"
)
COLORS = _words("red orange yellow green blue purple brown black")
SURFACES, STARTS = ("table", "desk", "floor"), ("there is", "you see", "I see")
WORDS = _words(
    "river stone candle mirror forest engine basket window hammer violin pepper ladder castle bridge lamp boat garden clock "
    "tower fox horse apple bread chair table paper snow rain cloud music dance paint summer winter doctor teacher"
)
LABELS = {"letters": "ABCD", "digits": "1234", "random": "ABCDEFGHIJKLMNOPQRSTUVWXYZ"}
RELATIONS = {
    "+": (("{a} + {b} =", "{a} , {b} ."), ("{a} plus {b} is", "{a} and {b} is")),
    "-": (("{a} - {b} =", "{a} , {b} ."), ("{a} minus {b} is", "{a} and {b} is")),
    "*": (("{a} * {b} =", "{a} , {b} ."), ("{a} times {b} is", "{a} and {b} is")),
    "/": (("{a} / {b} =", "{a} , {b} ."), ("{a} over {b} is", "{a} and {b} is")),
}


def word_tokenizer() -> Any:
    """A transformers tokenizer that has every word of these tasks (with its space) as one token, for models trained on them."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    numbers = [str(number) for number in range(100)]
    known = {
        *NAMES,
        *OBJECTS,
        *WORDS,
        *PLACES,
        *GIFTS,
        *COLORS,
        *(color.title() for color in COLORS),
        *numbers,
        *LABELS["random"],
    }
    known |= {"plus", "minus", "times", "over", "and", "is"}
    words = sorted({f" {word}" for word in known} | set(numbers) | set("+-*/=,.:?\n "))
    inner = Tokenizer(WordLevel({"<unk>": 0} | {word: i + 1 for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = Split(Regex(r" ?\w+|[^\w\s]|\s"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", pad_token="<unk>")


def indirect_object(tokenizer: Any, count: int = 32, seed: int = 0) -> PairBatch:
    """ "When Mary and John went to the store, John gave a drink to" -> " Mary". Corrupted: three other names, so that nobody is
    the answer.

    Either order of the two names; spans "io", "s1", "s2". wrong: the subject.
    """
    rng, names = random.Random(f"ioi {seed}"), single_tokens(tokenizer, NAMES)
    _enough("names", names, 6)

    def make() -> Pair:
        io, subject, *others = rng.sample(sorted(names), 5)
        first, second = (io, subject) if rng.random() < 0.5 else (subject, io)
        scene = rng.choice(SCENES).format("{0}", "{1}", "{2}", place=rng.choice(PLACES), gift=rng.choice(GIFTS))
        roles = {io: "io", subject: "s1"}
        clean = _fill(scene, [(first, roles[first]), (second, roles[second]), (subject, "s2")])
        return Pair(clean, _fill(scene, [(name, "") for name in others]), names[io], names[subject])

    return draw_pairs(tokenizer, make, count)


def colored_objects(tokenizer: Any, count: int = 32, seed: int = 0, shots: int = 1) -> PairBatch:
    """Three coloured things; `shots` examples with their answers (the paper's: one), then the question. Corrupted: the same, asking for
    another of the three.

    Answers are capitalised, as in the paper. choices: the three colours of the question. Spans "right", "distractors" (colour
    words in the second list), "asked" (the thing asked for) and "example" (the first block). wrong: the answer to the corrupted
    prompt.
    """
    require_int("shots", shots)
    rng = random.Random(f"colours {seed}")
    things = single_tokens(tokenizer, OBJECTS)
    answers = {
        c: i
        for c, i in single_tokens(tokenizer, [c.title() for c in COLORS]).items()
        if single_tokens(tokenizer, [c.lower()])
    }
    _enough("objects", things, 4)
    _enough("colours", answers, 4)

    def block(asked: int | None = None) -> tuple[list[str], list[str], Callable[[int, bool], list[Piece]]]:
        objects, colors = rng.sample(sorted(things), 3), rng.sample(sorted(answers), 3)
        place, start = rng.choice(SURFACES), rng.choice(STARTS)

        def text(wanted: int, marked: bool) -> list[Piece]:
            pieces: list[Piece] = [f"Q: On the {place}, {start}"]
            for i, (thing, color) in enumerate(zip(objects, colors)):
                article = "an" if color[0] in "AO" else "a"
                name = ("right" if i == wanted else "distractors") if marked else ""
                pieces += [
                    f"{', and' if i == 2 else ',' if i else ''} {article}",
                    (f" {color.lower()}", name),
                    f" {thing}",
                ]
            return [*pieces, ". What color is the", (f" {objects[wanted]}", "asked" if marked else ""), "?\nA:"]

        return objects, colors, text

    def make() -> Pair:
        shown = ""
        for _ in range(shots):
            _, colors, example = block()
            told = rng.randrange(3)
            shown += _plain(example(told, False)) + f" {colors[told]}\n"
        _, colors, text = block()
        asked, other = rng.sample(range(3), 2)
        head: list[Piece] = [(shown, "example")] if shots else []
        choices = [answers[color] for color in colors]
        return Pair(head + text(asked, True), head + text(other, True), choices[asked], choices[other], choices)

    return draw_pairs(tokenizer, make, count)


def multiple_choice(
    tokenizer: Any,
    count: int = 32,
    seed: int = 0,
    labels: str = "letters",
    shuffle: bool = False,
    order: str = "label",
    shots: int = 0,
) -> PairBatch:
    """Four options, one of which says the word asked for; the answer is its label. Corrupted: the same prompt, asking for another option.

    Args:
        labels: "letters" (A B C D), "digits" (1 2 3 4), or "random" (four letters, drawn anew for each prompt).
        shuffle: labels in random order. shots: solved examples before the question.
        order: "label": "A: fox, B: lamp. The label of lamp is"; "word": "fox A, lamp B. The label of lamp", which small models can do,
            as it asks for what came after the word (SmolLM2-135M answers most of these, and of the others about a third).

    choices: the four labels in the order in which they stand. `labels` of the batch says where they stand; span "content": the right
    option's word.
    """
    require_name("labels", labels, LABELS)
    require_name("order", order, ("label", "word"))
    require_int("shots", shots)
    rng = random.Random(f"choice {seed} {labels} {shuffle}")
    signs, end = _signs(tokenizer, LABELS[labels])
    words = single_tokens(tokenizer, WORDS)
    _enough("labels", signs, 4)
    _enough("words", words, 8)
    asks = " is" if order == "label" else ""

    def question(marks: Sequence[str], options: Sequence[str], asked: int, marked: bool) -> list[Piece]:
        pieces: list[Piece] = ["Options:"]
        for i, (mark, word) in enumerate(zip(marks, options)):
            label: Piece = (f" {mark}", f"label {i}" if marked else "")
            content: Piece = (f" {word}", "content" if marked and i == asked else "")
            pieces += [label, ":", content, ","] if order == "label" else [content, label, ","]
        return [*pieces[:-1], f". The label of {options[asked]}{asks}"]

    def draw() -> tuple[list[str], list[str]]:
        marks = rng.sample(sorted(signs), 4)
        return marks if shuffle else sorted(marks), rng.sample(sorted(words), 4)

    def make() -> Pair:
        shown = ""
        for _ in range(shots):
            marks, options = draw()
            asked = rng.randrange(4)
            shown += _plain(question(marks, options, asked, False)) + f" {marks[asked]}\n"
        marks, options = draw()
        asked, other = rng.sample(range(4), 2)
        ids = [signs[mark] for mark in marks]
        head: list[Piece] = [(shown, "example")] if shots else []
        clean, corrupted = (head + question(marks, options, i, True) + end for i in (asked, other))
        return Pair(clean, corrupted, ids[asked], ids[other], ids)

    return draw_pairs(tokenizer, make, count, labels=4)


def arithmetic(
    tokenizer: Any,
    count: int = 32,
    seed: int = 0,
    operations: str = "+",
    largest: int = 9,
    shots: int = 2,
    form: int | None = None,
) -> PairBatch:
    """ "3 + 4 =" -> " 7". Corrupted: the same numbers with the relation taken out, as long in tokens.

    Args:
        operations: any of + - * /. largest: largest operand. shots: solved examples of the same operation before the question (in
            both prompts).
        form: 0: signs; 1: words; None: either.

    Only problems whose answer is one token count (of a tokenizer that splits digits: answers up to 9). Spans "a", "b" (operands),
    "operation". wrong: a number next to the right one.
    """
    require(
        bool(operations) and set(operations) <= set(RELATIONS),
        "operations",
        operations,
        f"some of {''.join(RELATIONS)}",
    )
    require_int("shots", shots)
    rng = random.Random(f"arithmetic {seed}")
    numbers, end = _signs(tokenizer, [str(number) for number in range(largest**2 + 1)])
    problems = {op: _problems(op, largest, numbers) for op in operations}
    for op, found in problems.items():
        _enough(f"problems with {op}", found, shots + 1)

    def pieces(template: str, op: str, a: int, b: int, marked: bool) -> list[Piece]:
        before, _, rest = template.partition("{a}")
        middle, _, after = rest.partition("{b}")
        names = ("a", "operation", "b") if marked else ("", "", "")
        return [before, (str(a), names[0]), (middle.rstrip(), names[1]), " ", (str(b), names[2]), after]

    def make() -> Pair:
        op = rng.choice(operations)
        related, bare = RELATIONS[op][rng.randrange(2) if form is None else form]
        drawn = rng.sample(problems[op], shots + 1)
        shown = "".join(related.format(a=a, b=b) + f" {c}\n" for a, b, c in drawn[:-1])
        a, b, c = drawn[-1]
        head: list[Piece] = [(shown, "example")] if shots else []
        other = c + 1 if str(c + 1) in numbers else c - 1
        clean = head + pieces(related, op, a, b, True) + end
        return Pair(clean, head + pieces(bare, op, a, b, False) + end, numbers[str(c)], numbers[str(other)])

    return draw_pairs(tokenizer, make, count)


def _problems(op: str, largest: int, numbers: dict[str, int]) -> list[tuple[int, int, int]]:
    found = []
    for a in range(1, largest + 1):
        for b in range(1, largest + 1):
            if op == "/" and a % b:
                continue
            c = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[op]
            if c >= 0 and str(c) in numbers and (str(c + 1) in numbers or str(c - 1) in numbers):
                found.append((a, b, c))
    return found


# Parts of prompts


def _signs(tokenizer: Any, words: Iterable[str]) -> tuple[dict[str, int], list[Piece]]:
    """Which words are single tokens, and how a prompt must end: some tokenizers keep the space apart from digits."""
    words = list(words)
    joined, apart = single_tokens(tokenizer, words), single_tokens(tokenizer, words, "")
    return (joined, []) if len(joined) >= min(4, len(words)) else (apart, [" "])


def _fill(scene: str, words: Sequence[tuple[str, str]]) -> list[Piece]:
    pieces: list[Piece] = []
    for number, (word, name) in enumerate(words):
        before, _, scene = scene.partition(f"{{{number}}}")
        pieces += [before, (word, name)]
    return [*pieces, scene]


def _plain(pieces: Sequence[Piece]) -> str:
    return "".join(piece if isinstance(piece, str) else piece[0] for piece in pieces)


def _enough(what: str, found: Any, need: int) -> None:
    require(len(found) >= need, "tokenizer", f"{len(found)} {what} that are single tokens", f"at least {need}")
