"""Which modules of a model are attention layers that can be joined, and where in the model they stand."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Collection, Iterator
from functools import cache
from typing import Any

from torch import nn

from ..methods.call import UnsupportedModelError

ATTRIBUTE = "_regard_site"

_TOWERS = {
    "vision": r"vision|visual|image_encoder",
    "audio": r"audio|speech",
    "text": r"text_model|language_model|text_encoder",
}
_INPUTS = {
    "pixel_values": "vision",
    "pixel_values_videos": "vision",
    "input_features": "audio",
    "input_values": "audio",
}
_CROSS = re.compile(r"cross|encoder_attn|encoder_attention|encdec", re.IGNORECASE)


class Site:
    """One attention module of an attached model: whose it is, and where in the model it stands."""

    def __init__(self, session: Any, tower: str, layer: int, cross: bool) -> None:
        self.session, self.tower, self.layer, self.cross = session, tower, layer, cross
        self.num_layers = layer + 1
        self.past: Any = None  # the cache that the module's forward was just given

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of an attached model is a plain model: nothing is attached to it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (_nothing, ())


def _nothing() -> None:
    """What a site becomes when its model is pickled."""


def site_of(module: nn.Module) -> Site | None:
    return module.__dict__.get(ATTRIBUTE)


def sites_of(model: nn.Module) -> Iterator[Site]:
    return (site for module in model.modules() if (site := site_of(module)) is not None)


@cache
def _calls_interface(kind: Any) -> bool | None:
    """Whether this class itself calls transformers' attention interface; None where its source cannot be read."""
    try:
        source = inspect.getsource(kind.forward)
    except (OSError, TypeError):
        return None
    return "attention_interface(" in source or "ALL_ATTENTION_FUNCTIONS" in source


def is_timm_attention(module: nn.Module) -> bool:
    """Whether this is the attention of timm's plain vision transformers, which `timm.py` joins."""
    kind = type(module)
    parts = ("qkv", "q_norm", "k_norm", "proj", "proj_drop", "attn_drop", "num_heads", "scale")
    return (
        kind.__name__ == "Attention" and kind.__module__.startswith("timm.") and all(hasattr(module, p) for p in parts)
    )


def _named_attention(module: nn.Module) -> bool:
    return "Attention" in type(module).__name__ and not isinstance(module, nn.MultiheadAttention)


def find_sites(session: Any) -> dict[nn.Module, Site]:
    """The attention modules of `session.model`, numbered. Sets the session's main tower.

    Raises `UnsupportedModelError` if the part of the model that matters most does not go through the attention interface;
    warns if another part does not.
    """
    model = session.model
    sites: dict[nn.Module, Site] = {}
    others: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        kind: Any = type(module)
        calls = is_timm_attention(module) or _calls_interface(kind)
        if calls or (calls is None and _named_attention(module)):
            sites[module] = make_site(session, path, module, sites.values())
        elif _named_attention(module):
            others[path] = module
    reached = {id(part) for module in sites for part in module.modules()}
    others = {
        p: m for p, m in others.items() if id(m) not in reached and not any(id(part) in reached for part in m.modules())
    }

    towers = {site.tower for site in sites.values()}
    missed = {
        tower: type(module).__name__ for path, module in others.items() if (tower := _tower(model, path)) not in towers
    }
    session.main_tower = _main_tower([*towers, *missed])
    why = "does not go through transformers' AttentionInterface"
    if session.main_tower in missed:
        raise UnsupportedModelError(
            f"model: the attention of {type(model).__name__} ({missed[session.main_tower]}) {why}, so nothing can be attached to it"
        )
    if not sites:
        raise UnsupportedModelError(
            f"model: {type(model).__name__} has no attention layer that regard could find, or it {why}"
        )
    for tower, name in missed.items():
        warnings.warn(
            f"the {tower} part of {type(model).__name__} ({name}) {why}; methods do not reach it", stacklevel=3
        )
    for site in sites.values():
        site.num_layers = max(other.num_layers for other in sites.values() if other.tower == site.tower)
    session.num_layers = max(site.num_layers for site in sites.values() if site.tower == session.main_tower)
    return sites


def make_site(session: Any, path: str, module: nn.Module, known: Collection[Site]) -> Site:
    """A site for `module`: its own `layer_idx`, or its place among the `known` ones of the same tower and kind."""
    tower, cross = _tower(session.model, path), _is_cross(path, module)
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int):
        layer = sum(site.tower == tower and site.cross == cross for site in known)
    return Site(session, tower, layer, cross)


def _main_tower(towers: list[str]) -> str:
    return next((tower for tower in ("text", "decoder", "vision", "audio", "encoder") if tower in towers), "text")


def _tower(model: nn.Module, path: str) -> str:
    for tower, pattern in _TOWERS.items():
        if re.search(pattern, path):
            return tower
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "encoder" if re.search(r"(^|\.)encoder(\.|$)", path) else "decoder"
    usual = "vision" if type(model).__module__.startswith("timm.") else "text"
    return _INPUTS.get(getattr(model, "main_input_name", ""), usual)


def _is_cross(path: str, module: nn.Module) -> bool:
    if getattr(module, "is_cross_attention", False):
        return True
    return _CROSS.search(f"{path.rsplit('.', 1)[-1]} {type(module).__name__}") is not None
