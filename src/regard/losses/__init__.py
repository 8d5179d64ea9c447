"""Losses and tuners: how attention is taught."""

from .._lazy import lazy_exports

_TABLE = {
    "attention_diversification": ".attention_diversification",
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _TABLE)
