"""Passkey prompts: length, place and determinism."""

import pytest

from regard.bench.passkey import passkey
from tiny import CharTokenizer


def test_passkey():
    tokenizer = CharTokenizer()
    made = passkey(tokenizer, 700, depth=0.25, number=3)
    assert len(made.prompt) == 700
    said = tokenizer.decode(made.prompt[slice(*made.span)])
    assert f"The pass key is {made.key}." in said and tokenizer.decode(made.answer) == f" {made.key}"
    assert tokenizer.decode(made.prompt).endswith("The pass key is")
    assert 0.2 < made.span[0] / 700 < 0.5
    assert made == passkey(tokenizer, 700, depth=0.25, number=3)
    assert made.key != passkey(tokenizer, 700, number=4).key
    with pytest.raises(ValueError, match="length: got 100, need at least"):
        passkey(tokenizer, 100)
    with pytest.raises(ValueError, match="depth"):
        passkey(tokenizer, 700, depth=1.5)
