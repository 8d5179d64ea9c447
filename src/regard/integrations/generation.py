"""What a session does around a forward pass and inside `generate`: a method's cache takes the place of the model's, its logits
processors join those of `generate`, and a forward that never reached regard is an error."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..methods.call import Method, UnsupportedModelError
from .session import Session, describe
from .sites import site_of


def watch(session: Session, entry: nn.Module) -> None:
    """Give `entry`, a top-level transformers model, its forward hooks, and its `generate` the session's caches and processors."""
    keeper, speaker = session.claimant("cache"), session.claimant("logits")
    if keeper is not None:
        _require_causal(session, keeper)
        if hasattr(entry, "_prepare_cache_for_generation"):
            session.override(entry, "_prepare_cache_for_generation", _preparer(session, keeper))
    if speaker is not None:
        if not hasattr(entry, "_get_logits_processor"):
            raise UnsupportedModelError(
                f"model: {type(entry).__name__} has no `generate`, need a model that has for {_name(speaker)}"
            )
        session.override(entry, "_get_logits_processor", _processors(session, entry, speaker))

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if module is not entry:  # a deep copy of the model carries the original's hooks, which are none of its business
            return None
        session.arrived = False
        session.last = {}
        past = _past(args, kwargs)
        _find_images(session, entry, past, kwargs.get("input_ids", args[0] if args else None))
        if keeper is None:
            return None
        if past is not None:
            _require_owned(session, keeper, past)
        elif _wants_cache(entry, kwargs):
            kwargs = {**kwargs, "past_key_values": session.new_cache()}
        return args, kwargs

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if module is entry and not session.arrived:
            raise UnsupportedModelError(
                f"model: a forward of {type(entry).__name__} made no attention call that reached regard, so {describe(session.methods)} "
                "had no effect; was the attention implementation changed while attached?"
            )

    session.on_detach(entry.register_forward_pre_hook(before, with_kwargs=True).remove)
    session.on_detach(entry.register_forward_hook(after).remove)


def _name(method: Method) -> str:
    return type(method).__name__


def _preparer(session: Session, keeper: Method) -> Any:
    """Stands for `_prepare_cache_for_generation`."""

    def prepare(original: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        if generation_config.use_cache is False:
            raise ValueError(f"use_cache: got False, need True for {_name(keeper)}, which works through its cache")
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ValueError(f"cache_implementation: got {kind!r}, need None: {_name(keeper)} brings its own cache")
        if model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = session.new_cache()
        _require_owned(session, keeper, model_kwargs["past_key_values"])

    return prepare


def _processors(session: Session, entry: nn.Module, speaker: Method) -> Any:
    """Stands for `_get_logits_processor`: the method's own come first, so that they see the raw logits; those marked `last`
    come after everything else, temperature and top-p included."""

    def processors(original: Any, *args: Any, **kwargs: Any) -> Any:
        chain = original(*args, **kwargs)
        ours = speaker.logits(entry, session)
        ours = list(ours) if isinstance(ours, (list, tuple)) else [] if ours is None else [ours]
        chain[:0] = [processor for processor in ours if not getattr(processor, "last", False)]
        chain.extend(processor for processor in ours if getattr(processor, "last", False))
        return chain

    return processors


def _past(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    from transformers import Cache

    past = kwargs.get("past_key_values")
    return next((arg for arg in args if isinstance(arg, Cache)), None) if past is None else past


def _wants_cache(entry: nn.Module, kwargs: dict[str, Any]) -> bool:
    use_cache = kwargs.get("use_cache")
    if use_cache is None:
        config: Any = entry.config
        use_cache = getattr(config.get_text_config(decoder=True), "use_cache", False)
    return bool(use_cache) and not (entry.training and getattr(entry, "is_gradient_checkpointing", False))


def _require_owned(session: Session, keeper: Method, past: Any) -> None:
    if not session.owns(past):
        raise ValueError(
            f"past_key_values: got a {type(past).__name__} made elsewhere, need None or `session.new_cache()`: {_name(keeper)} brings "
            "its own cache"
        )


def _require_causal(session: Session, keeper: Method) -> None:
    for module in session.model.modules():
        site = site_of(module)
        if (
            site is not None
            and not site.cross
            and site.tower == session.main_tower
            and getattr(module, "is_causal", True)
        ):
            return
    raise UnsupportedModelError(
        f"model: {type(session.model).__name__} attends in both directions and keeps no past, need a causal model for {_name(keeper)}"
    )


def _find_images(session: Session, entry: nn.Module, past: Any, ids: Any) -> None:
    """Fill in the span "image" from the model's image token, unless the user gave that span."""
    config = getattr(entry, "config", None)
    token = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
    if token is None or session.image_given or not isinstance(ids, Tensor) or ids.dim() != 2:
        return
    seen = 0 if past is None else int(past.get_seq_length())
    if seen and ids.shape[1] == 1:  # a token just generated: beyond the spans, which is to say in none
        return
    span = torch.zeros(ids.shape[0], seen + ids.shape[1], dtype=torch.bool, device=ids.device)
    if seen and "image" in session.spans:
        before = session.spans["image"][:, :seen]
        span[:, : before.shape[1]] = before
    span[:, seen:] = ids == token
    session.spans["image"] = span
