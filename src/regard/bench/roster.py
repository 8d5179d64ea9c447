"""The methods that `regard compare` knows by name, and how a name with options becomes a method."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from .. import methods
from .._checks import bad_value, require_name, resolve_budget
from ..methods import Method
from ..ops.mask_bernoulli import gamma_for

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


def _hyper(budget: int | float, context: int) -> dict[str, Any]:
    """Half of the budget in blocks, half drawn; exact up to the budget (at least 64 tokens)."""
    tokens = max(2, resolve_budget("budget", budget, context))
    return {"block_size": tokens // 2, "samples": tokens - tokens // 2, "min_len": max(64, tokens)}


def _grouped(budget: int | float, context: int) -> dict[str, Any]:
    """A quarter of the budget recent, blocks of 16 where one fits."""
    tokens = resolve_budget("budget", budget, context)
    recent = min(64, max(1, tokens // 4))
    return {"budget": budget, "recent": recent, "block_size": 16 if tokens - SINK - recent >= 16 else 1}


def _blocks(budget: int | float, context: int) -> dict[str, Any]:
    """Blocks so small that the budget is eight of them or more (8 to 64 keys)."""
    tokens = resolve_budget("budget", budget, context)
    block = min(64, max(8, 1 << max(0, (tokens // 8).bit_length() - 1)))
    sink = min(SINK, tokens // 2)
    return {
        "budget": tokens,
        "block_size": block,
        "block_q": block,
        "sink": sink,
        "recent": max(1, min(block, tokens // 4)),
    }


def _retrieval(budget: int | float, context: int) -> dict[str, Any]:
    """Half of the budget sinks and recent tokens, half retrieved."""
    tokens = max(2, resolve_budget("budget", budget, context))
    sink = min(SINK, tokens // 4)
    return {"sink": sink, "recent": max(1, tokens // 2 - sink), "top_k": tokens - tokens // 2}


def _votes(budget: int | float, context: int) -> dict[str, Any]:
    tokens = resolve_budget("budget", budget, context)
    return {"budget": tokens, "window": max(1, min(32, tokens // 4))}


def _norms(budget: int | float, context: int) -> dict[str, Any]:
    tokens = resolve_budget("budget", budget, context)
    return {"budget": tokens, "sink": min(SINK, tokens // 4), "recent": tokens // 4}


def _all_prompts(budget: int | float, context: int) -> dict[str, Any]:
    return {"budget": budget, "text_prior": False}


def _moa(budget: int | float, context: int) -> dict[str, Any]:
    return {"budget": budget, "new_tokens": 0, "block": 16}


def _mas(budget: int | float, context: int) -> dict[str, Any]:
    """Half of the budget in layers that see everything, spread evenly, half in two blocks for the others."""
    tokens = resolve_budget("budget", budget, context)
    return {"full_layers": min(1.0, tokens / context / 2), "block": max(1, tokens // 4)}


def _cca(budget: int | float, context: int) -> dict[str, Any]:
    """Cache entries: a core token for every group (at most half of the budget), the rest recent tokens."""
    tokens = max(4, resolve_budget("budget", budget, context))
    group = max(16, -(-2 * context // tokens)) if tokens < context else 16
    return {"group": group, "window": max(1, tokens - context // group - group + 1)}


def _pr_flash(budget: int | float, context: int) -> dict[str, Any]:
    """Small blocks; the last one keeps the budget on average, its own and the first block included."""
    tokens = max(1, resolve_budget("budget", budget, context))
    block = min(64, max(4, 1 << max(0, (tokens // 8).bit_length() - 1)))
    blocks = max(2, -(-context // block))
    return {"block_size": block, "gamma": gamma_for(min(blocks, max(1.01, tokens / block - 1)), blocks)}


def _long_heads(budget: int | float, context: int) -> dict[str, Any]:
    """Eight chunks or more, none longer than 256."""
    tokens = max(3, resolve_budget("budget", budget, context))
    return {"budget": tokens, "chunk": max(1, min(256, tokens // 8))}


def _block_dhsa(budget: int | float, context: int) -> dict[str, Any]:
    """Query blocks of an eighth of the context at most, so that their own keys leave room in the budget."""
    block_k = 32 if context >= 4096 else 16 if context >= 1024 else 8
    return {"budget": budget, "block_q": 2 * block_k, "block_k": block_k}


_NO_BUDGET: Callable[[int | float, int], dict[str, Any]] = lambda budget, context: {}  # noqa: E731

ROSTER: dict[str, tuple[str, Callable[[int | float, int], dict[str, Any]], str]] = {
    "dense": ("Dense", _NO_BUDGET, "the model as it is"),
    "sliding-window": ("SlidingWindow", _window, "sinks and recent tokens as a mask; the cache keeps all"),
    "streaming-llm": ("StreamingLLM", _window, "sinks and recent tokens, the rest is evicted"),
    "h2o": ("H2O", _budget, "heavy hitters and recent tokens, the rest is evicted"),
    "snapkv": ("SnapKV", _votes, "what the last queries of the prompt read most; the rest is evicted"),
    "tova": ("TOVA", _budget, "what the newest query reads least is evicted"),
    "key-norm": ("KeyNorm", _norms, "keys of small norm stay, the rest is evicted"),
    "look-m": (
        "LookM",
        _all_prompts,
        "after the prompt, dropped tokens are merged into those that stay (without the text prior)",
    ),
    "recycled": (
        "RecycledAttention",
        _budget,
        "between full steps, only what the last full step read most; the cache keeps all",
    ),
    "staircase-quant": ("StaircaseQuantCache", _NO_BUDGET, "older tokens in fewer bits, down to 2"),
    "duo-attention": ("DuoAttention", _duo, "retrieval heads keep all, streaming heads sinks and recent tokens"),
    "moa": ("MoA", _moa, "each head its own span, by a plan; without one, equal spans"),
    "mas-former": ("MASFormer", _mas, "some layers see everything, the others their own block and the one before"),
    "s2-attention": ("S2Attention", _s2, "each head its own strided columns and a local band"),
    "grouped-topk": ("GroupedTopK", _grouped, "blocks of keys by their mean key, per kv head, in decoding"),
    "hip": ("HiP", _budget, "keys found by a tree search, per query block"),
    "cca-attention": ("CCAAttention", _cca, "one pooled token for each old group, recent tokens one by one"),
    "hyper-attention": ("HyperAttention", _hyper, "blocks of an LSH order and sampled keys, in prefill"),
    "pr-flash-attention": ("PrFlashAttention", _pr_flash, "blocks by chance, the nearer the likelier"),
    "block-dhsa": ("BlockDHSA", _block_dhsa, "first block, diagonal and the best blocks between, in prefill"),
    "dhsa": ("DHSA", _budget, "keys by chunk scores, per query block, in prefill"),
    "block-topk": ("BlockTopK", _blocks, "blocks of keys by bounds on their scores, per block of queries and kv head"),
    "retrieval-attention": (
        "RetrievalAttention",
        _retrieval,
        "sinks, recent tokens, and keys found in an index on the CPU",
    ),
    "long-heads": ("LongHeads", _long_heads, "chunks chosen by each head, at positions within the budget"),
    "zero-tuning": ("ZeroTuning", _NO_BUDGET, "rescales the attention to the first token"),
    "emphasize": ("Emphasize", _NO_BUDGET, "steers attention to the user's words, away from the chat template"),
}
"""Name -> (class in `regard.methods`, fields that a common budget sets, what it is)."""

ON_REQUEST: dict[str, tuple[str, Callable[[int | float, int], dict[str, Any]], str]] = {
    "act": ("ACT", _NO_BUDGET, "calibrates the attention sinks of the heads it is given"),
    "mask-heads": ("MaskHeads", _NO_BUDGET, "switches off the heads it is given"),
}
"""Like `ROSTER`, of methods that need to be told more than a budget: `act(heads=[(3, 1), (7, 0)])`."""

DEFAULT_METHODS = (
    "dense",
    "sliding-window",
    "streaming-llm",
    "duo-attention",
    "s2-attention",
    "hip",
    "dhsa",
    "block-topk",
    "zero-tuning",
)


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def canonical(name: str) -> str:
    """The roster's spelling of a method name; class names and other hyphenation are understood. Unknown: a `ValueError` with near names."""
    every = ROSTER | ON_REQUEST
    known = {_plain(key): key for key in every} | {_plain(kind): key for key, (kind, _, _) in every.items()}
    return known.get(_plain(name)) or require_name("methods", name.strip(), list(every))


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


def at_budgets(names: Sequence[str], budgets: Sequence[int | float], context: int) -> list[tuple[str, Method]]:
    """The methods at every budget, labelled "name @ budget" where there are several; those that have none, or a given one, once."""
    if len(budgets) == 1:
        return [parse_method(name, budget=budgets[0], context=context) for name in names]
    found: dict[str, Method] = {}
    for name in names:
        variants = [parse_method(name, budget=budget, context=context) for budget in budgets]
        if all(method == variants[0][1] for _, method in variants):
            found[variants[0][0]] = variants[0][1]
        else:
            found |= {f"{label} @ {budget}": method for (label, method), budget in zip(variants, budgets)}
    return list(found.items())


def parse_method(text: str, *, budget: int | float, context: int) -> tuple[str, Method]:
    """`"duo-attention(budget=0.25)"` -> its label and the method. Fields not given follow `budget`, else the paper's defaults."""
    name, _, rest = text.partition("(")
    key = canonical(name)
    kind_name, from_budget, _ = (ROSTER | ON_REQUEST)[key]
    kind = getattr(methods, kind_name)
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
    for part in dataclasses.fields(kind):
        needed = part.init and part.default is dataclasses.MISSING and part.default_factory is dataclasses.MISSING
        if needed and part.name not in options:
            raise bad_value("methods", text, f"{key}({part.name}=...)")
    label = key if not given else f"{key}({', '.join(f'{k}={v!r}' for k, v in given.items())})"
    return label, kind(**options)
