"""What a method remembers of a sequence from one decoding step to the next: kept on the cache layer, and true to it.

When the rows of the cache are put in another order (beam search) what is remembered is put in the same order, and when they are
multiplied, picked, cut short or cleared, it is forgotten.
"""

from __future__ import annotations

from typing import Any

_NAME = "_regard_memory"
_WATCHED = ("reorder_cache", "batch_repeat_interleave", "batch_select_indices", "crop", "reset")


def memory_of(cache: Any) -> dict[str, dict[Any, dict[str, Any]]]:
    """The memory of a cache layer: method name -> stretch -> name -> value.

    A stretch is named None when it is the whole batch. Values with a method `reorder(rows)` survive a reordering of the batch.
    """
    kept = cache.__dict__.get(_NAME)
    if kept is None:
        kept = cache.__dict__[_NAME] = {}
        for name in _WATCHED:
            if hasattr(type(cache), name):
                cache.__dict__[name] = _Watched(cache, name)
    return kept


class _Watched:
    """A method of one cache layer that sees to the layer's memory as well."""

    def __init__(self, cache: Any, name: str) -> None:
        self.cache, self.name = cache, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = getattr(type(self.cache), self.name)(self.cache, *args, **kwargs)
        memory = self.cache.__dict__.get(_NAME, {})
        if self.name == "reorder_cache":
            rows = args[0] if args else kwargs["beam_idx"]
            for stretches in memory.values():
                whole = {name: value for name, value in stretches.get(None, {}).items() if hasattr(value, "reorder")}
                for value in whole.values():
                    value.reorder(rows)
                stretches.clear()
                stretches.update({None: whole} if whole else {})
        else:
            memory.clear()
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> _Watched:
        return _Watched(memo.get(id(self.cache), self.cache), self.name)
