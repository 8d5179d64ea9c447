"""StreamingLLM: attention sinks and a sliding window of recent tokens, for endless generation at constant memory.

Xiao et al. 2023 (ICLR 2024), arXiv 2309.17453; a plain baseline here. The released code gives cached keys the positions they have IN
THE CACHE; since scores depend on relative positions only, that is the sinks moved forward by as many positions as have been evicted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..._checks import require_int, require_name
from ..call import AttentionCall, Method, UnsupportedModelError
from .decoder import find_rotary, ragged_layers
from .ragged import RaggedLayer


@dataclass
class StreamingLLM(Method):
    """Every head keeps `sink` first tokens and the last `window` tokens.

    Attributes:
        sink: tokens kept from the start. window: recent tokens kept, the query's own included.
        positions: "cache" (as released): distances are counted inside the cache, so the model never sees a distance beyond
            `sink + window`; needs rotary embeddings. "kept": sinks keep the distance they really have.

    The prompt itself is attended with the same rule (each query: sinks and its last `window` tokens), so that prefill equals decoding
    token by token with "kept" positions; with "cache" positions the prompt's sinks keep their true distance.
    """

    sink: int = 4
    window: int = 1024
    positions: str = "cache"

    def __post_init__(self) -> None:
        require_int("sink", self.sink, 0)
        require_int("window", self.window, 1)
        require_name("positions", self.positions, ("cache", "kept"))

    @property
    def bounds_positions(self) -> bool:  # type: ignore[override]
        return self.positions == "cache"

    def check(self, model: nn.Module) -> None:
        self.cache(model)  # says why, where it cannot
        if self.positions == "cache" and find_rotary(model) is None:
            raise UnsupportedModelError(
                f"StreamingLLM(positions='cache') needs rotary embeddings of constant frequencies, and {type(model).__name__} has none "
                "that could be found; use positions='kept'"
            )

    def cache(self, model: nn.Module) -> Any:
        rotary = find_rotary(model) if self.positions == "cache" else None

        def make(number: int) -> RaggedLayer:
            return _StreamingLayer(self.sink, self.window, rotary)

        return ragged_layers(model, make, type(self).__name__)

    def attend(self, call: AttentionCall) -> Tensor | None:
        return call.cache.attend(call) if isinstance(call.cache, _StreamingLayer) else None

    def mask(self, call: AttentionCall) -> Any:
        """Without a cache (scoring, training) the same rule as a mask."""
        from ...ops import masks

        if isinstance(call.cache, _StreamingLayer):
            return None
        first = masks.sink(self.sink) if not bool(call.start.any()) else masks.padding(call.start + self.sink)
        return masks.sliding_window(self.window) | first


class _StreamingLayer(RaggedLayer):
    def __init__(self, sink: int, window: int, rotary: Any) -> None:
        super().__init__(None, sink, window, exact_window=True)
        self.rotary = rotary

    def attend(self, call: AttentionCall) -> Tensor:
        if self.streaming is None:
            self.streaming = torch.ones(call.num_kv_heads, dtype=torch.bool)
        return super().attend(call)

    def _sink_keys(self, keys: Tensor, seen: int) -> Tensor:
        if self.rotary is None or self.start is None:
            return keys
        evicted = (seen - self.start - self.sink - self.recent).clamp(min=0)
        return self.rotary(keys, evicted) if bool(evicted.any()) else keys
