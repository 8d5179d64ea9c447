"""The methods that `regard compare` knows by name, and how a name with options becomes a method."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable
from typing import Any

from .. import methods
from .._checks import bad_value, require_name, resolve_budget
from ..methods import Method

SINK = 4


def _window(budget: int | float, context: int) -> dict[str, Any]:
    return {"window": max(1, resolve_budget("budget", budget, context) - SINK), "sink": SINK}


def _budget(budget: int | float, context: int) -> dict[str, Any]:
    return {"budget": budget}


def _duo(budget: int | float, context: int) -> dict[str, Any]:
    tokens = resolve_budget("budget", budget, context)
    kept = max(1, tokens // 4)
    return {"budget": budget if isinstance(budget, float) else tokens, "sink": min(SINK, kept), "recent": kept}


def _s2(budget: int | float, context: int) -> dict[str, Any]:
    """Half of the budget local, half strided."""
    tokens = resolve_budget("budget", budget, context)
    block = 32
    local = max(1, tokens // 2 // block)
    return {
        "block_size": block,
        "local_blocks": local,
        "stride": max(2, round(context / max(block, tokens // 2))),
        "sink": SINK,
    }


_NO_BUDGET: Callable[[int | float, int], dict[str, Any]] = lambda budget, context: {}  # noqa: E731

ROSTER: dict[str, tuple[str, Callable[[int | float, int], dict[str, Any]], str]] = {
    "dense": ("Dense", _NO_BUDGET, "the model as it is"),
    "sliding-window": ("SlidingWindow", _window, "sinks and recent tokens as a mask; the cache keeps all"),
    "streaming-llm": ("StreamingLLM", _window, "sinks and recent tokens, the rest is evicted"),
    "duo-attention": ("DuoAttention", _duo, "retrieval heads keep all, streaming heads sinks and recent tokens"),
    "s2-attention": ("S2Attention", _s2, "each head its own strided columns and a local band"),
    "hip": ("HiP", _budget, "keys found by a tree search, per query block"),
    "dhsa": ("DHSA", _budget, "keys by chunk scores, per query block, in prefill"),
    "zero-tuning": ("ZeroTuning", _NO_BUDGET, "rescales the attention to the first token"),
}
"""Name -> (class in `regard.methods`, fields that a common budget sets, what it is)."""

DEFAULT_METHODS = (
    "dense",
    "sliding-window",
    "streaming-llm",
    "duo-attention",
    "s2-attention",
    "hip",
    "dhsa",
    "zero-tuning",
)


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def canonical(name: str) -> str:
    """The roster's spelling of a method name; class names and other hyphenation are understood. Unknown: a `ValueError` with near names."""
    known = {_plain(key): key for key in ROSTER} | {_plain(kind): key for key, (kind, _, _) in ROSTER.items()}
    return known.get(_plain(name)) or require_name("methods", name.strip(), list(ROSTER))


def split_methods(text: str) -> list[str]:
    """`"a,b(c=1,d=2)"` -> `["a", "b(c=1,d=2)"]`."""
    parts, depth, current = [], 0, ""
    for character in text:
        depth += (character in "([") - (character in ")]")
        if character == "," and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += character
    parts.append(current)
    if depth:
        raise bad_value("methods", text, "as many closing as opening brackets")
    return [part.strip() for part in parts if part.strip()]


def parse_method(text: str, *, budget: int | float, context: int) -> tuple[str, Method]:
    """`"duo-attention(budget=0.25)"` -> its label and the method. Fields not given follow `budget`, else the paper's defaults."""
    name, _, rest = text.partition("(")
    key = canonical(name)
    kind = getattr(methods, ROSTER[key][0])
    from_budget = ROSTER[key][1]
    given: dict[str, Any] = {}
    if rest:
        try:
            call = ast.parse(f"f({rest}", mode="eval").body
            assert isinstance(call, ast.Call) and not call.args
            given = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
        except (SyntaxError, ValueError, AssertionError):
            raise bad_value("methods", text, f"{key}(field=value, ...) with plain values") from None
        fields = [field.name for field in dataclasses.fields(kind) if field.init]
        for field in given:
            require_name(f"methods: {key}", field, fields)
    options = from_budget(budget, context) | given
    label = key if not given else f"{key}({', '.join(f'{k}={v!r}' for k, v in given.items())})"
    return label, kind(**options)
