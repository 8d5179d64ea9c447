"""Backends of `attention()`: only here is anything fast or ugly.

Each is a module with `refuses(request) -> str | None` (why it cannot serve the request, or None) and `run(request) -> (out, lse)`
(`lse` may be None when it was not asked for). `choose` picks one.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..attention import AttentionRequest

BACKENDS = ("eager", "sdpa", "gather", "cpu", "flex", "triton")
"""Names for `backend=`: `eager` the reference, `sdpa` torch's fused kernels, `gather` one block of queries over the
keys selected for it, `cpu` blocked with backward, `flex` compiled FlexAttention,
`triton` block-sparse GPU kernels."""

_LOADED: dict[str, ModuleType] = {}


def load(name: str) -> ModuleType:
    """The backend module called `name`."""
    if (
        name not in _LOADED
    ):  # importing again costs as much as a decoding step's attention, and breaks torch.compile's graph
        _LOADED[name] = importlib.import_module(f".{name}", __name__)
    return _LOADED[name]


def choose(request: AttentionRequest) -> str:
    """The fastest backend that serves the request on its device; `eager` when no other does."""
    order = ("sdpa", "triton", "flex") if request.q.is_cuda else ("cpu", "sdpa")
    if request.selection is not None:
        order = ("gather", *order)
    elif order[0] != "sdpa" and load("sdpa").is_native(request):
        order = ("sdpa", *order)
    return next((name for name in order if load(name).refuses(request) is None and load(name).suits(request)), "eager")
