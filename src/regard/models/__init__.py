"""Whole networks, one file each: mixers stacked by plain modules; the authors' checkpoints load."""

from .._lazy import lazy_exports

_TABLE = {
    "SHViT": ".shvit",
    "shvit_s1": ".shvit",
    "shvit_s2": ".shvit",
    "shvit_s3": ".shvit",
    "shvit_s4": ".shvit",
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _TABLE)
