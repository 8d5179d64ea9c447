"""Token spans: which tokens of a prompt are its system text, its user's words, a context, a question, an image.

What comes out is what `attach(spans=...)` and the probes take: name -> bool (B, tokens). Places are found in the text, as characters, and
carried over to tokens by the tokenizer's offsets; for conversations the chat template says where each message stands.

    prompt = regard.chat_spans(tokenizer, [{"role": "user", "content": text}], parts={"context": passage, "question": question})
    with regard.attach(model, regard.Emphasize("context"), spans=prompt.spans):
        model.generate(**prompt.inputs)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any

import torch
from torch import Tensor

from .._checks import bad_type, bad_value, require, require_name

__all__ = ["SpannedPrompt", "Turn", "chat_spans", "find_text", "text_spans", "token_offsets"]

Place = tuple[int, int]
Message = Mapping[str, Any]
_LONGEST = 200_000  # characters of a prompt that the nearest match is looked for in


@dataclass(frozen=True)
class Turn:
    """One message in the prompt: its role, its text, and where that stands: [begin, end) in characters and in tokens of the row."""

    role: str
    text: str
    place: Place
    tokens: Place


@dataclass(eq=False)
class SpannedPrompt:
    """Prompts as token ids, with what the tokens are.

    Attributes:
        inputs: `input_ids` and `attention_mask` (B, T), what a model's forward and `generate` take.
        spans: name -> bool (B, T), what `attach(spans=...)` takes. Spans may overlap; padding belongs to none.
        texts: the prompts as text, one a row.
        offsets: of each row, where each token stands in its text, [begin, end) in characters; padding is (0, 0).
        turns: of each row, the messages in order; empty for plain text.
    """

    inputs: dict[str, Tensor]
    spans: dict[str, Tensor]
    texts: list[str]
    offsets: list[list[Place]]
    turns: list[list[Turn]] = field(default_factory=list)

    @property
    def input_ids(self) -> Tensor:
        return self.inputs["input_ids"]

    def where(self, name: str, row: int = 0) -> Place:
        """[begin, end) from the first to the last token of a span in a row. `ValueError`: no such span, or it is empty there."""
        numbers = self.spans[require_name("name", name, self.spans)][row].nonzero()[:, 0].tolist()
        require(bool(numbers), "name", name, f"a span with tokens in row {row}")
        return numbers[0], numbers[-1] + 1

    def text_of(self, name: str, row: int = 0) -> str:
        """The text that a span's tokens cover in a row, gaps left out."""
        out, end = [], -1
        for token in self.spans[require_name("name", name, self.spans)][row].nonzero()[:, 0].tolist():
            first, last = self.offsets[row][token]
            out.append(self.texts[row][max(first, end) : last])
            end = max(end, last)
        return "".join(out)

    def mark(self, name: str, what: Any, row: int | None = None) -> SpannedPrompt:
        """Add a span. `what`: as in `text_spans`; in `row` alone, or in every row. Returns the prompt itself."""
        shape = self.input_ids.shape
        span = self.spans.get(name, torch.zeros(shape, dtype=torch.bool)).clone()
        for number in range(shape[0]) if row is None else (row,):
            for place in _places(name, what, self.texts[number], self._contents(number)):
                span[number] |= _covered(self.offsets[number], place)
        self.spans[name] = span
        return self

    def _contents(self, row: int) -> list[Place]:
        return [turn.place for turn in self.turns[row]] if self.turns else []

    def to(self, device: torch.device | str) -> SpannedPrompt:
        """The prompt with its inputs on a device; spans stay where they are (`attach` moves them as needed)."""
        inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        return SpannedPrompt(inputs, self.spans, self.texts, self.offsets, self.turns)


def text_spans(
    tokenizer: Any,
    texts: str | Sequence[str],
    parts: Mapping[str, Any] | None = None,
    *,
    add_special_tokens: bool = True,
    padding_side: str = "left",
) -> SpannedPrompt:
    """Tokens of plain text, and which of them hold given parts of it.

    Args:
        tokenizer: a transformers tokenizer; a slow one will do where its tokens, decoded one by one, make the text.
        texts: one prompt, or several of equal parts; shorter ones are padded on `padding_side`.
        parts: name -> where: a piece of text (its first occurrence); a (piece, number) pair for its number-th occurrence (0 = first);
            a (begin, end) pair of characters; or a list of such, all of which belong to the span. With several prompts a mapping
            may give one of these for all. A token belongs to a part if it holds any of its characters.
        add_special_tokens: whether the tokenizer adds its begin token and the like.

    Raises:
        ValueError: a piece does not stand in the text (the message shows the nearest match), characters outside the text, an empty text,
            or a tokenizer that cannot say where its tokens stand. TypeError: parts of another kind.
    """
    rows = [texts] if isinstance(texts, str) else list(texts)
    require(bool(rows) and all(isinstance(row, str) and row for row in rows), "texts", texts, "one or more texts")
    require_name("padding_side", padding_side, ("left", "right"))
    prompt = _tokenized(tokenizer, rows, add_special_tokens, padding_side)
    for name, what in (parts or {}).items():
        prompt.mark(name, what)
    return prompt


def chat_spans(
    tokenizer: Any,
    messages: Sequence[Message] | Sequence[Sequence[Message]],
    parts: Mapping[str, Any] | None = None,
    *,
    add_generation_prompt: bool = True,
    chat_template: str | None = None,
    image_token: str | int | None = None,
    padding_side: str = "left",
    **options: Any,
) -> SpannedPrompt:
    """Tokens of conversations under the tokenizer's chat template, and who says which.

    Args:
        tokenizer: with a chat template (or give `chat_template`, in Jinja).
        messages: one conversation, [{"role": ..., "content": text or a list of {"type": "text" | "image", ...}}], or several.
        parts: further spans inside the messages, as in `text_spans`; a piece is looked for in the messages, not in the template.
        add_generation_prompt: end with the template's opening of an answer.
        image_token: the token that stands for an image, as text or id; None = the tokenizer's own (`image_token_id`), if it has one.
        padding_side: of shorter conversations. options: handed to `apply_chat_template`.

    Returns:
        a `SpannedPrompt` with a span for every role that speaks ("system", "user", "assistant", ...), "template" (every token that
        holds no word of a message: markers, begin token, a default system text), "image" where there are image tokens, and the parts;
        and its `turns`, message by message.

    Raises:
        ValueError: no chat template; a message that the template leaves out or changes; and as `text_spans`.
    """
    if chat_template is None and getattr(tokenizer, "chat_template", None) is None:
        raise bad_value(
            "tokenizer",
            type(tokenizer).__name__,
            "one with a chat template: set tokenizer.chat_template, give chat_template=, or use text_spans for plain text",
        )
    if chat_template is not None:
        options["chat_template"] = chat_template
    conversations: list[list[Message]] = _conversations(messages)

    def render(conversation: Sequence[Message]) -> str:
        done = tokenizer.apply_chat_template(
            list(conversation), tokenize=False, add_generation_prompt=add_generation_prompt, **options
        )
        return str(done)

    texts, found = [], []
    for conversation in conversations:
        text = render(conversation)
        texts.append(text)
        found.append(_messages_in(text, conversation, render))
    prompt = _tokenized(tokenizer, texts, False, padding_side)
    shape = prompt.input_ids.shape
    real = prompt.inputs["attention_mask"].bool()
    said = torch.zeros(shape, dtype=torch.bool)
    for row, places in enumerate(found):
        turns = []
        for role, place in places:
            covered = _covered(prompt.offsets[row], place)
            prompt.spans.setdefault(role, torch.zeros(shape, dtype=torch.bool))[row] |= covered
            numbers = covered.nonzero()[:, 0].tolist()
            tokens = (numbers[0], numbers[-1] + 1) if numbers else (0, 0)
            turns.append(Turn(role, texts[row][place[0] : place[1]], place, tokens))
            said[row] |= covered
        prompt.turns.append(turns)
    image = _image_id(tokenizer, image_token)
    if image is not None and bool((prompt.input_ids == image).any()):
        prompt.spans["image"] = prompt.input_ids == image
        said |= prompt.spans["image"]
    prompt.spans["template"] = real & ~said
    for name, what in (parts or {}).items():
        prompt.mark(name, what)
    return prompt


def find_text(text: str, piece: str, occurrence: int = 0, *, name: str = "span", within: Sequence[Place] = ()) -> Place:
    """Where a piece stands in a text, [begin, end) in characters: its `occurrence`-th time (0 = first), inside `within` if given.

    Raises a `ValueError` that shows the text around the nearest match if it is not there (so often).
    """
    if not isinstance(piece, str):
        raise bad_type(name, piece, "a piece of the text")
    require(bool(piece), name, piece, "at least one character")
    seen = 0
    for begin, end in within or ((0, len(text)),):
        at = text.find(piece, begin, end)
        while at >= 0:
            if seen == occurrence:
                return at, at + len(piece)
            seen, at = seen + 1, text.find(piece, at + 1, end)
    if seen:
        raise bad_value(name, f"{_short(piece)} number {occurrence}", f"a number below {seen}: so often it is there")
    raise bad_value(name, _short(piece), f"text that stands in the prompt, word for word; {_nearest(text, piece)}")


def _nearest(text: str, piece: str) -> str:
    match = SequenceMatcher(None, text[:_LONGEST], piece, autojunk=False).find_longest_match()
    if match.size == 0:
        return "no character of it is there"
    begin, end = max(0, match.a - match.b - 20), min(len(text), match.a - match.b + len(piece) + 20)
    shown = text[begin : min(end, begin + 240)]
    around = f"{'...' if begin else ''}{shown}{'...' if end < len(text) else ''}"
    return f"nearest is {around!r} (which shares {_short(text[match.a : match.a + match.size])!r})"


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:60]}...{text[-17:]}"


def token_offsets(tokenizer: Any, text: str, add_special_tokens: bool = True) -> tuple[list[int], list[Place]]:
    """Ids of a text, and where each token stands in it, [begin, end) in characters ((0, 0) for what the tokenizer adds)."""
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(
            text, add_special_tokens=add_special_tokens, return_offsets_mapping=True, verbose=False, truncation=False
        )
        return list(encoded["input_ids"]), [(int(a), int(b)) for a, b in encoded["offset_mapping"]]
    ids = list(tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])
    special = set(getattr(tokenizer, "all_special_ids", ()) or ())
    offsets: list[Place] = []
    at = 0
    for number in ids:
        piece = tokenizer.decode([number])
        if not text.startswith(piece, at):
            if number in special and not offsets:
                offsets.append((0, 0))
                continue
            raise bad_value(
                "tokenizer",
                type(tokenizer).__name__,
                "a fast tokenizer (one that gives offsets): this one changes the text",
            )
        offsets.append((at, at + len(piece)))
        at += len(piece)
    return ids, offsets


def _tokenized(tokenizer: Any, texts: list[str], special: bool, side: str) -> SpannedPrompt:
    encoded = [token_offsets(tokenizer, text, special) for text in texts]
    longest = max(len(ids) for ids, _ in encoded)
    candidates = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
    pad = next((number for number in candidates if number is not None), 0)
    ids = torch.full((len(texts), longest), int(pad))
    mask = torch.zeros_like(ids)
    offsets: list[list[Place]] = []
    for row, (numbers, places) in enumerate(encoded):
        more = [(0, 0)] * (longest - len(numbers))
        at = slice(longest - len(numbers), None) if side == "left" else slice(len(numbers))
        ids[row, at], mask[row, at] = torch.tensor(numbers), 1
        offsets.append(more + places if side == "left" else places + more)
    return SpannedPrompt({"input_ids": ids, "attention_mask": mask}, {}, texts, offsets)


def _covered(offsets: Sequence[Place], place: Place) -> Tensor:
    """Tokens that hold a character of the place, bool (T,)."""
    return torch.tensor([begin < place[1] and end > place[0] for begin, end in offsets])


def _places(name: str, what: Any, text: str, within: Sequence[Place]) -> list[Place]:
    need = "a piece of text, a (piece, number) pair, a (begin, end) pair of characters, or a list of such"
    if isinstance(what, str):
        return [find_text(text, what, name=name, within=within)]
    if isinstance(what, tuple) and len(what) == 2 and all(_whole(x) for x in what):
        require(0 <= what[0] < what[1] <= len(text), name, what, f"0 <= begin < end <= {len(text)}, the text's length")
        return [(what[0], what[1])]
    if isinstance(what, tuple) and len(what) == 2 and isinstance(what[0], str) and _whole(what[1]):
        return [find_text(text, what[0], what[1], name=name, within=within)]
    if isinstance(what, Sequence) and not isinstance(what, (str, bytes)) and len(what):
        return [place for part in what for place in _places(name, part, text, within)]
    raise bad_type(name, what, need)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _conversations(messages: Any) -> list[list[Message]]:
    need = "messages {'role': ..., 'content': ...}, or several lists of such"
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise bad_type("messages", messages, need)
    require(bool(messages), "messages", messages, "at least one message")
    several = [messages] if isinstance(messages[0], Mapping) else messages
    for conversation in several:
        require(bool(conversation), "messages", conversation, "at least one message")
        for message in conversation:
            if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
                raise bad_value("messages", message, need)
    return [list(conversation) for conversation in several]


def _said(message: Message) -> list[str]:
    """The texts of a message."""
    content = message["content"]
    if isinstance(content, str):
        return [content] if content else []
    parts = [part.get("text", "") for part in content or () if isinstance(part, Mapping) and part.get("type") == "text"]
    return [part for part in parts if part]


def _messages_in(text: str, conversation: Sequence[Message], render: Any) -> list[tuple[str, Place]]:
    """Role and place of every text of every message in the rendered conversation.

    Rendered again with marks in place of the texts, the template shows its own words between them; a text is then looked for behind those,
    so that words of the template that a message repeats are not taken for it.
    """
    marked: list[Message] = []
    expected: list[tuple[str, str, str]] = []  # role, text, mark

    def mark(role: str, said: str) -> str:
        expected.append((role, said, f"\u2402{len(expected)}\u2403"))
        return expected[-1][2]

    for message in conversation:
        role, content = str(message["role"]), message["content"]
        if isinstance(content, str):
            marked.append({**message, "content": mark(role, content) if content else content})
        else:
            items = [
                {**part, "text": mark(role, part["text"])} if part.get("type") == "text" and part.get("text") else part
                for part in content or ()
            ]
            marked.append({**message, "content": items})
    pattern = render(marked)
    places, at, seen = [], 0, 0
    for role, said, sign in expected:
        place = pattern.find(sign, seen)
        require(
            place >= 0,
            "messages",
            _short(said),
            f"messages that the chat template shows; it leaves this one ({role}) out",
        )
        before, seen = pattern[seen:place], place + len(sign)
        at = at + len(before) if text.startswith(before, at) else at
        found = next((form for form in (said, said.strip()) if form and text.find(form, at) >= 0), None)
        if found is None and not said.strip():
            continue
        require(found is not None, "messages", _short(said), "messages that the chat template shows as they are")
        assert found is not None
        begin = text.find(found, at)
        at = begin + len(found)
        places.append((role, (begin, at)))
    return places


def _image_id(tokenizer: Any, image_token: str | int | None) -> int | None:
    token = getattr(tokenizer, "image_token_id", None) if image_token is None else image_token
    if isinstance(token, str):
        number = tokenizer.convert_tokens_to_ids(token)
        unknown = getattr(tokenizer, "unk_token_id", None)
        require(number is not None and number != unknown, "image_token", token, "a token of the tokenizer")
        return int(number)
    return None if token is None else int(token)
