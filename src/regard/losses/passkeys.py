"""Synthetic passkeys in long text: what DuoAttention's gates are trained on.

Xiao et al. 2024 (arXiv 2410.10819); the arrangement is that of mit-han-lab/duo-attention @ fe93c31 (MIT), `duo_attn/data.py`. Several
passkeys, rows of random words, are hidden at different depths of a book; afterwards each is asked for and told. Wording and book are
ours; the authors' can be given.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import require, require_int
from .._prose import haystack_text

_SPOKEN = (
    "alpha bravo charlie delta echo foxtrot golf hotel india juliett kilo lima mike november oscar papa quebec romeo sierra tango "
    "uniform victor whiskey xray yankee zulu"
)
_COUNTED = (
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth fifteenth sixteenth "
    "seventeenth eighteenth nineteenth twentieth"
)
WORDS, ORDINALS = _SPOKEN.split(), _COUNTED.split()


class Passkeys:
    """Endless batches of one prompt each: `passkeys(number)` -> {"input_ids" (1, N), "labels" (1, N)}, always the same for a number.

    Labels are the ids of the questions and answers after the book, -100 before. N is a multiple of `multiple`.

    Args:
        tokenizer: of the model. text: the book; None: English prose that Python ships.
        min_length, max_length: tokens of a prompt, about; `num_lengths` of them, evenly spaced, come in random order. The book's part of
            a prompt is cut so that prompts of `max_length` fit with `reserve` tokens to spare.
        num_passkeys: hidden in each prompt, at most 20. passkey_words: words of each.
        depths: least and greatest depth, as shares of the book; `num_depths` evenly spaced ones are drawn from.
        needle, question: with "{ordinal}" in them. before, after: around the book. separator: around needles and after answers.
        seed: of everything random.
    """

    def __init__(
        self,
        tokenizer: Any,
        text: str | None = None,
        *,
        min_length: int = 1000,
        max_length: int = 32000,
        num_lengths: int = 20,
        num_passkeys: int = 10,
        passkey_words: int = 32,
        depths: tuple[float, float] = (0.05, 0.95),
        num_depths: int = 1000,
        reserve: int = 300,
        multiple: int = 16,
        needle: str = "Keep these words in mind, they are the {ordinal} passkey of the vault: ",
        question: str = "According to the book, which words are the {ordinal} passkey of the vault?\nPasskey: ",
        before: str = "Here is a very long book. <book> ",
        after: str = " </book>\n\n",
        separator: str = "\n\n",
        seed: int = 0,
    ) -> None:
        for name, value in (("num_lengths", num_lengths), ("passkey_words", passkey_words), ("multiple", multiple)):
            require_int(name, value, 1)
        require_int("reserve", reserve, 0)
        require_int("min_length", min_length, 1)
        require(max_length >= min_length, "max_length", max_length, f"at least min_length = {min_length}")
        require_int("num_passkeys", num_passkeys, 1)
        require(num_passkeys <= len(ORDINALS), "num_passkeys", num_passkeys, f"at most {len(ORDINALS)}")
        require(0.0 <= depths[0] <= depths[1] <= 1.0, "depths", depths, "shares in [0, 1], ascending")
        require(num_depths >= num_passkeys, "num_depths", num_depths, f"at least num_passkeys = {num_passkeys}")
        self.tokenizer, self.seed, self.multiple = tokenizer, seed, multiple
        self.num_passkeys, self.passkey_words = num_passkeys, passkey_words
        self.lengths = torch.linspace(min_length, max_length, num_lengths, dtype=torch.int).tolist()
        self.depths = torch.linspace(depths[0], depths[1], num_depths)
        ordinals = ORDINALS[:num_passkeys]
        self._needles = [self._encode(needle.format(ordinal=ordinal)) for ordinal in ordinals]
        self._questions = [self._encode(question.format(ordinal=ordinal)) for ordinal in ordinals]
        self._before = self._encode(before, special=True)
        self._after, self._separator = self._encode(after), self._encode(separator)
        self._book = self._encode(self._cut(haystack_text() if text is None else text, max_length))
        around = len(self._before) + len(self._after) + num_passkeys * self._asked(torch.Generator().manual_seed(seed))
        room = max_length - reserve - around
        if len(self._book) + around > max_length - reserve:
            require(
                room > 0, "max_length", max_length, f"more than {around + reserve} tokens for what is around the book"
            )
            self._book = self._book[:room]
        need = f"a book of at least {multiple} tokens, which prompts are filled up with"
        require(len(self._book) >= multiple, "text", f"{len(self._book)} tokens", need)

    def __len__(self) -> int:
        return len(self.lengths)

    def __call__(self, number: int) -> dict[str, Tensor]:
        """The batch of this number (from 0)."""
        epoch, place = divmod(number, len(self.lengths))
        order = torch.randperm(len(self.lengths), generator=torch.Generator().manual_seed(self.seed * 7919 + epoch))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        ids, labels = self.sample(self.lengths[int(order[place])], generator)
        return {"input_ids": ids[None], "labels": labels[None]}

    def sample(self, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Ids and labels (N,) of one prompt whose book has at most `length` tokens."""
        drawn = self.depths[torch.randperm(len(self.depths), generator=generator)[: self.num_passkeys]].sort().values
        keys = [self._encode(self._passkey(generator)) for _ in range(self.num_passkeys)]
        book = self._book[:length]
        context, last = list(self._before), 0
        for here, needle, key in zip((len(book) * drawn).long().tolist(), self._needles, keys):
            context += book[last:here] + self._separator + needle + key + self._separator
            last = here
        context += book[last:]
        asked = [i for question, key in zip(self._questions, keys) for i in question + key + self._separator]
        more = self.multiple - (len(context) + len(asked) + len(self._after)) % self.multiple  # never 0: released
        context += self._book[-more:] + self._after
        return torch.tensor(context + asked), torch.tensor([-100] * len(context) + asked)

    def _passkey(self, generator: torch.Generator) -> str:
        drawn = torch.randint(0, len(WORDS), (self.passkey_words,), generator=generator)
        return " ".join(WORDS[i] for i in drawn.tolist())

    def _asked(self, generator: torch.Generator) -> int:
        """Tokens that one passkey costs, hidden and asked for."""
        key = len(self._encode(self._passkey(generator)))
        return 2 * len(self._separator) + len(self._needles[0]) + len(self._questions[0]) + 2 * key

    def _encode(self, text: str, special: bool = False) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def _cut(self, text: str, tokens: int) -> str:
        """About as much of the text as has `tokens` tokens, so that a whole library is not tokenised for one page."""
        return text[: 12 * tokens]
