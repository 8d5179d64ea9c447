"""Methods: what can be attached to a pretrained model with `regard.attach`, one small dataclass a paper.

`sparse/` restrict who looks at whom, `caches/` what the past keeps, `edits/` what the model looks at instead, `decoders/` what it
says. `regard.methods.call` holds what they share: `AttentionCall` and `Method`.
"""

from .._lazy import lazy_exports

_TABLE = {
    "AttentionCall": ".call",
    "Method": ".call",
    "UnsupportedModelError": ".call",
    "Dense": ".sparse.baselines",
    "SlidingWindow": ".sparse.baselines",
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _TABLE)
