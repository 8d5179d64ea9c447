"""Text that every machine has, for prompts and calibration."""

from __future__ import annotations

import re
from functools import cache


@cache
def haystack_text() -> str:
    """English prose that every Python has: the paragraphs of `pydoc_data.topics` that are whole sentences, one a line."""
    from pydoc_data.topics import topics

    paragraphs = []
    for name in sorted(topics):
        for block in re.split(r"\n\s*\n", topics[name]):
            text = re.sub(r"\s+", " ", block).strip()
            words = re.findall(r"[A-Za-z]+", text)
            if (
                len(words) >= 20
                and text[0].isupper()
                and text.endswith(".")
                and "::=" not in text
                and ">>>" not in text
            ):
                paragraphs.append(text)
    return "\n".join(dict.fromkeys(paragraphs))
