"""`look`: one self-contained HTML page of what every head of a model looks at in a prompt. No server, no network.

Weights are stored sparsely: a row keeps its largest entries, 8 bits each, deflated and inflated again by the browser. A map of
270 heads over 512 tokens stays well below 15 MB that way.
"""

from __future__ import annotations

import base64
import html
import json
import zlib
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np
from torch import Tensor, nn

from .._checks import require, require_int
from .head_scores import HeadScores
from .probes import profile
from .record import Record, record

SMALLEST = 1 / 1024
"""Weights below this are not drawn."""
ENTRIES = 48
"""Entries kept of a row, the largest ones."""


def look(
    model: nn.Module,
    tokenizer: Any,
    prompt: str,
    *,
    title: str = "",
    scores: Mapping[str, HeadScores] | None = None,
    max_tokens: int = 1024,
    entries: int = ENTRIES,
) -> str:
    """The page for one prompt, as HTML text.

    Args:
        model, tokenizer: a causal language model of transformers.
        prompt: at least two tokens, at most `max_tokens`.
        title: heading of the page.
        scores: further tables [layers, heads] to colour the overview by (retrieval scores, say), beside those of `probes.profile`.
        entries: weights kept per row and head, the largest ones.
    """
    require_int("entries", entries, 1)
    inputs = tokenizer(prompt, return_tensors="pt", verbose=False)
    ids = inputs["input_ids"]
    require(ids.shape[1] >= 2, "prompt", f"{ids.shape[1]} tokens", "at least 2")
    require(ids.shape[1] <= max_tokens, "prompt", f"{ids.shape[1]} tokens", f"at most {max_tokens} (max_tokens)")
    made = record(model, {"input_ids": ids.to(model.device)})
    tables = profile(made) | dict(scores or {})
    return page(made, _texts(tokenizer, ids[0]), tables, title=title or type(model).__name__, entries=entries)


def page(
    made: Record, tokens: Sequence[str], tables: Mapping[str, HeadScores], *, title: str, entries: int = ENTRIES
) -> str:
    """The page for a record: `tokens` are the texts to show, `tables` what the overview can be coloured by."""
    layers = made.layers
    for name, table in tables.items():
        want = (len(layers), made.num_heads)
        require(
            tuple(table.scores.shape) == want,
            f"scores[{name!r}]",
            f"shape {tuple(table.scores.shape)}",
            f"(layers, heads) = {want}",
        )
    data = {
        "title": title,
        "tokens": list(tokens),
        "layers": layers,
        "heads": made.num_heads,
        "smallest": SMALLEST,
        "tables": {
            name: [[_number(x) for x in row] for row in table.scores.tolist()] for name, table in tables.items()
        },
    }
    maps = [base64.b64encode(pack(made.weights(layer)[0], entries)).decode() for layer in layers]
    text = resources.files(__package__).joinpath("page")
    parts = {
        "TITLE": html.escape(title),
        "STYLE": text.joinpath("look.css").read_text(),
        "SCRIPT": text.joinpath("look.js").read_text(),
        "DATA": _script_json(data),
        "MAPS": _script_json(maps),
    }
    out = text.joinpath("look.html").read_text()
    for name, part in parts.items():
        out = out.replace(f"<!--{name}-->", part)
    return out


def pack(weights: Tensor, entries: int = ENTRIES) -> bytes:
    """Weights (H, N, M) as deflated planes: per row the number of entries (uint16), then all columns (low bytes, high bytes) and all
    weights (uint8, 255 * sqrt(weight)), rows in order, each row's columns ascending."""
    values = weights.float().cpu().numpy()
    entries = min(entries, values.shape[-1])
    order = np.sort(np.argpartition(values, -entries, axis=-1)[..., -entries:], axis=-1)
    kept = np.take_along_axis(values, order, axis=-1)
    drawn = kept >= SMALLEST
    counts = drawn.sum(-1).astype("<u2")
    columns = order[drawn].astype(np.uint16)
    levels = np.round(np.sqrt(np.clip(kept[drawn], 0, 1)) * 255).astype(np.uint8)
    planes = [
        counts.tobytes(),
        (columns & 255).astype(np.uint8).tobytes(),
        (columns >> 8).astype(np.uint8).tobytes(),
        levels.tobytes(),
    ]
    return zlib.compress(b"".join(planes), 9)


def _texts(tokenizer: Any, ids: Tensor) -> list[str]:
    return [tokenizer.decode([int(i)]) for i in ids]


def _number(value: float) -> float | None:
    return None if value != value else round(value, 5)


def _script_json(value: Any) -> str:
    """JSON that may stand inside a script element."""
    return (
        json.dumps(value, ensure_ascii=False)
        .replace("<", "\\u003c")
        .replace("\u2028", "\\u2028")
        .replace("\u2029", "\\u2029")
    )
