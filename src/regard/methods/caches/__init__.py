"""What the past keeps: caches that evict, merge, quantise or retrieve, and really free what they drop."""

from ..._lazy import lazy_exports

_TABLE = {
    "DuoAttention": ".duo_attention",
    "StreamingLLM": ".streaming_llm",
    "RaggedLayer": ".ragged",
    "kv_bytes": ".ragged",
    "load_gates": ".duo_attention",
    "streaming_heads": ".duo_attention",
    "streaming_mask": ".duo_attention",
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _TABLE)
