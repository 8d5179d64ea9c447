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
    "DuoAttention": ".caches.duo_attention",
    "StreamingLLM": ".caches.streaming_llm",
    "S2Attention": ".sparse.s2_attention",
    "DHSA": ".sparse.dhsa",
    "HiP": ".sparse.hip",
    "ZeroTuning": ".edits.zero_tuning",
    "MaskHeads": ".edits.mask_heads",
    "LargePiG": ".decoders.largepig",
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _TABLE)
