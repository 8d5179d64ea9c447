"""Landmark attention in a Hugging Face model that was trained with landmarks: long texts through blocks that are fetched.

Mohtashami and Jaggi 2023 (NeurIPS), arXiv 2305.16300; epfml/landmark-attention (Apache-2.0), `llama/llama_mem.py`, read for what a
fine-tuned LLaMA does. Softmax and memory are those of `regard.ops.landmark` and `regard.nn.LandmarkCache`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..._checks import bad_value, require, require_int
from ...nn.sequence.landmark_attention import LandmarkCache, LayerMemory
from ..call import AttentionCall, Method, UnsupportedModelError
from ..rotary import RotaryOf, query_positions
from .decoder import decoder_config, ragged_layers
from .layer import AttendingLayer

_IDS = "landmark_ids"


@dataclass
class Landmark(Method):
    """Landmark attention, and fetching of blocks, for a model that knows landmark tokens (others read nonsense).

    Prompts are given with their landmarks; generated text gets its own, which are to be taken out in the end:

        ids = regard.ops.insert_landmarks(ids, landmark_id, every=50)
        with regard.attach(model, regard.Landmark(landmark_id, topk=4)):
            out = model.generate(ids, max_new_tokens=100)
        text = tokenizer.decode(out[0][out[0] != landmark_id])

    Attributes:
        landmark_id: the landmark's token id. block: ordinary tokens between landmarks.
        topk, offload, variant: of the memory, see `regard.nn.LandmarkCache`. choose_by: its `select`.
        piece: blocks of a prompt that are read together; within a piece everything is attended, before it what is fetched.

    Raises (from `attach`) `UnsupportedModelError` without rotary embeddings; (from the model) `ValueError` where landmarks are missing or
    at other places than after every `block` tokens of a row.
    """

    landmark_id: int
    block: int = 50
    topk: int = 1
    choose_by: str = "token_head"
    offload: str | None = None
    variant: str = "released"
    piece: int = 5
    _rotary: WeakKeyDictionary[Any, RotaryOf] = field(
        default_factory=WeakKeyDictionary, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        require_int("piece", self.piece, 1)
        self.memory()

    def memory(self) -> LandmarkCache:
        """An empty one."""
        return LandmarkCache(
            self.landmark_id, self.block, self.topk, self.choose_by, offload=self.offload, variant=self.variant
        )

    def check(self, model: nn.Module) -> None:
        size = decoder_config(model, type(self).__name__).vocab_size
        require(self.landmark_id < size, "landmark_id", self.landmark_id, f"less than the model's vocab_size, {size}")
        self.cache(model)  # says why, where it cannot

    def setup(self, session: Any) -> None:
        rotary = self._rotary[session] = RotaryOf(session.entry, type(self).__name__)
        rotary.watch(session)

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            session.last[_IDS] = kwargs.get("input_ids", args[0] if args else None)

        session.on_detach(session.entry.register_forward_pre_hook(keep, with_kwargs=True).remove)

    def cache(self, model: nn.Module) -> Any:
        rotary = RotaryOf(model, type(self).__name__)
        return ragged_layers(model, lambda _: LandmarkLayer(self, rotary), type(self).__name__)

    def attend(self, call: AttentionCall) -> Tensor | None:
        if isinstance(call.cache, LandmarkLayer):
            return call.cache.attend(call)
        if call.cache is not None or call.window is not None:
            return None
        layer = LandmarkLayer(self, self._rotary[call.session])
        layer.update(call.k, call.v)
        return layer.attend(call)

    def logits(self, model: nn.Module, session: Any) -> Any:
        """Landmarks where they belong and nowhere else."""
        config: Any = getattr(model, "generation_config", None) or model.config
        pad, landmark, block = getattr(config, "pad_token_id", None), self.landmark_id, self.block

        def put(ids: Tensor, scores: Tensor) -> Tensor:
            place = torch.arange(ids.shape[1], device=ids.device)
            begin = torch.zeros_like(ids[:, 0]) if pad is None else (ids != pad).to(torch.uint8).argmax(-1)
            last = torch.where(ids == landmark, place, -1).amax(-1)
            since = ids.shape[1] - torch.maximum(last + 1, begin)
            due = (since >= block)[:, None]
            is_landmark = torch.arange(scores.shape[1], device=scores.device) == landmark
            return scores.masked_fill(is_landmark != due, -torch.inf)

        return put


class LandmarkLayer(AttendingLayer):
    """The cache layer of `Landmark`: a memory for the rows that begin at the same place.

    Attributes:
        groups: first position of rows -> (their numbers, bookkeeping, memory).
    """

    def __init__(self, method: Landmark, rotary: RotaryOf) -> None:
        self.method, self.rotary = method, rotary
        super().__init__()

    def clear(self) -> None:
        self.groups: dict[int, tuple[list[int], LandmarkCache, LayerMemory]] = {}

    def map_rows(self, fn: Callable[[Tensor], Tensor]) -> None:
        assert self.start is not None
        probe = fn(torch.arange(len(self.start), device=self.start.device))
        rows, starts, device = probe.tolist(), self.start.tolist(), probe.device
        groups = {}
        for start, (members, book, memory) in self.groups.items():
            taken = [row for row in rows if starts[row] == start]
            if taken:
                index = torch.tensor([members.index(row) for row in taken])
                memory.map(lambda t, index=index: t[index.to(t.device)].to(device))  # type: ignore[misc]
                groups[start] = ([i for i, row in enumerate(rows) if starts[row] == start], book, memory)
        self.groups = groups

    def drop_last(self, count: int) -> None:
        for _, book, memory in self.groups.values():
            mine = min(count, book.seen)
            memory.drop_last(mine)
            book.take_back(mine)

    def attend(self, call: AttentionCall) -> Tensor:
        keys, values, before = self.take(call)
        assert self.start is not None
        if call.soft_cap is not None:
            raise UnsupportedModelError("Landmark: a model with a soft cap on its scores is not served")
        ids = call.session.last.get(_IDS) if call.session is not None else None
        if ids is None:
            raise bad_value("input_ids", None, "ids with landmarks, not embeddings: Landmark has to see where they are")
        position = query_positions(call)
        q, k = self.rotary.undo(call.q, position), self.rotary.undo(keys, position)
        marks = ids.to(q.device) == self.method.landmark_id
        out = call.q.new_zeros((*call.q.shape[:3], values.shape[3]))
        if not self.groups:
            self._group(call.scale)
        for start, (members, book, memory) in self.groups.items():
            skip = min(max(0, start - before), keys.shape[2])
            rows = torch.tensor(members, device=q.device)
            self._require_landmarks(marks[rows, skip:], book.seen)
            while skip < keys.shape[2]:
                length = self.method.block + 1
                until = min(keys.shape[2], skip + self.method.piece * length - book.seen % length)
                book.advance(until - skip)
                part = [x[rows, :, skip:until] for x in (q, k, values)]
                out[rows, :, skip:until] = memory.attend(part[0], part[1], part[2], marks[rows, skip:until])
                skip = until
        return out

    def _group(self, scale: float | None) -> None:
        assert self.start is not None
        starts = self.start.tolist()
        for start in sorted(set(starts)):
            book = self.method.memory()
            memory = LayerMemory(book, self.rotary.turn, scale)
            self.groups[start] = ([row for row, other in enumerate(starts) if other == start], book, memory)

    def _require_landmarks(self, marks: Tensor, seen: int) -> None:
        length = self.method.block + 1
        wanted = (torch.arange(seen, seen + marks.shape[1], device=marks.device) + 1) % length == 0
        if not bool((marks == wanted).all()):
            need = f"landmarks after every {self.method.block} tokens and nowhere else: insert_landmarks(ids, ...)"
            raise bad_value("input_ids", f"landmarks at {marks[0].nonzero()[:, 0].tolist()[:8]} of a row", need)
