"""A `Session`: what is attached to one model, from `attach` to `detach`, and everything that has to be put back."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import require, require_tensor
from ..methods.call import AttentionCall, Method


class Session:
    """Methods attached to a model: a context manager, or kept until `detach()`.

    Attributes:
        model: what was given to `attach`. entry: the transformers model at the top of it (the model itself, or what a wrapper holds).
        methods: what is attached to it, in order.
        spans: name -> bool (B, tokens): what the tokens of the prompt are ("image", "system", ...). May be replaced at any time.
            For models with an image token, "image" is filled in by itself.
        last: storage shared by all calls of one forward pass (`capture` writes here, and so may methods); emptied when the
            next forward begins.
        main_tower: the tower that methods treat unless they say otherwise. num_layers: its attention layers.
        step: denoising step, set by whoever runs a diffusion model; else None.
        observers: functions that get to see every `AttentionCall` after it has run.
    """

    def __init__(self, model: nn.Module, methods: Sequence[Method], spans: Mapping[str, Tensor] | None = None) -> None:
        self.model, self.entry, self.methods = model, model, list(methods)
        self.spans = dict(spans or {})
        for name, span in self.spans.items():
            require_tensor(f"spans[{name!r}]", span, dims=2)
            require(span.dtype == torch.bool, f"spans[{name!r}]", span.dtype, "a bool tensor (B, tokens)")
        self.last: dict[str, Any] = {}
        self.main_tower, self.num_layers = "text", 0
        self.step: int | None = None
        self.observers: list[Callable[[AttentionCall], None]] = []
        self.image_given = "image" in self.spans
        self.arrived = False  # whether an attention call of the current forward reached regard
        self._undo: list[Callable[[], None]] = []
        self._positions = self._known_positions()

    def _known_positions(self) -> int | None:
        """How many positions the model was made for; None where that is not said, or does not matter to what is attached."""
        config: Any = getattr(self.model, "config", None)
        if any(method.bounds_positions for method in self.methods) or not hasattr(config, "get_text_config"):
            return None
        return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)

    def watch_positions(self, call: AttentionCall) -> None:
        """Warn, once, when the context grows past the positions that the model was made for: the text falls apart there, in silence."""
        if self._positions is None or call.layer or call.kind != "self" or call.tower != self.main_tower:
            return
        if hasattr(call.cache, "max_cache_len"):  # a static cache: how much of it is filled costs a sync to find out
            return
        length = max(call.kv_len, getattr(call.cache, "seen", 0))
        if length > self._positions:
            limit, self._positions = self._positions, None
            warnings.warn(
                f"{describe(self.methods)}: the context has {length} tokens and {type(self.entry).__name__} was made for "
                f"max_position_embeddings = {limit}; methods that keep positions within it are StreamingLLM(positions='cache') "
                "and LongHeads",
                stacklevel=2,
            )

    def claimant(self, seam: str) -> Method | None:
        """The attached method that claims `seam`, or None."""
        return next((method for method in self.methods if seam in method.seams()), None)

    def capture(self, name: str, module: nn.Module) -> None:
        """Keep the output of `module` (its first part, if it has several) as `session.last[name]` in every forward, until detach."""

        def keep(_: nn.Module, args: Any, output: Any) -> None:
            self.last[name] = output[0] if isinstance(output, (tuple, list)) else output

        self.on_detach(module.register_forward_hook(keep).remove)

    def new_cache(self) -> Any:
        """A fresh, empty cache of the attached method that brings one, for `past_key_values` in a loop of one's own."""
        method = self.claimant("cache")
        if method is None:
            raise ValueError(f"session: {describe(self.methods)} brings no cache of its own, need a method that does")
        cache = method.cache(self.entry)
        if getattr(self.entry.config, "is_encoder_decoder", False):
            from transformers import DynamicCache, EncoderDecoderCache

            if not isinstance(cache, EncoderDecoderCache):  # some methods bring both halves
                cache = EncoderDecoderCache(cache, DynamicCache())
        cache._regard_session = id(self)
        return cache

    def owns(self, cache: Any) -> bool:
        """Whether `cache` was made by `new_cache` of this session (copies of it included)."""
        return getattr(cache, "_regard_session", None) == id(self)

    def on_detach(self, undo: Callable[[], Any]) -> None:
        """Have `undo()` called on detach; last in, first out."""
        self._undo.append(undo)

    def detach(self) -> None:
        """Put the model back as it was. Calling it again does nothing."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def __repr__(self) -> str:
        return f"<regard session: {describe(self.methods)} on {type(self.model).__name__}>"

    def override(self, module: nn.Module, name: str, function: Callable[..., Any]) -> None:
        """Replace the method `name` of this one `module` by `function(original, *args, **kwargs)`, until detach."""
        own, original = module.__dict__.get(name), getattr(module, name)
        module.__dict__[name] = _Override(module, name, lambda *args, **kwargs: function(original, *args, **kwargs))

        def undo() -> None:
            del module.__dict__[name]
            if own is not None:
                module.__dict__[name] = own

        self.on_detach(undo)


class _Override:
    """A replaced method of one module. In a deep copy of the module it is the class's own method again."""

    def __init__(self, module: nn.Module, name: str, function: Callable[..., Any]) -> None:
        self.module, self.name, self.function = module, name, function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copy = memo.get(id(self.module), self.module)
        return types.MethodType(getattr(type(copy), self.name), copy)


def describe(methods: Sequence[Method]) -> str:
    return ", ".join(type(method).__name__ for method in methods) or "no method"


def check_seams(methods: Sequence[Method]) -> None:
    """Refuse what is no method, and methods that would get in each other's way."""
    owner: dict[str, Method] = {}
    for method in methods:
        if isinstance(method, type) and issubclass(method, Method):
            raise TypeError(f"methods: got the class {method.__name__}, need an instance, {method.__name__}(...)")
        if not isinstance(method, Method):
            raise TypeError(f"methods: got {type(method).__name__}, need instances of regard.Method")
        for seam in method.seams():
            if seam in owner:
                both = f"{type(owner[seam]).__name__} and {type(method).__name__}"
                raise ValueError(f"methods: {both} both claim the seam {seam!r}; attach one of them")
            owner[seam] = method
    attend = owner.get("attend")
    for seam in ("mask", "score", "select"):
        if attend is not None and owner.get(seam, attend) is not attend:
            raise ValueError(
                f"methods: {type(attend).__name__} computes the attention itself, which leaves no place for the {seam} of "
                f"{type(owner[seam]).__name__}; attach one of them"
            )
