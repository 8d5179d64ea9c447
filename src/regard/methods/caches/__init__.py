"""What the past keeps: caches that evict, merge, quantise or retrieve, and really free what they drop."""

from ..._lazy import lazy_exports

_TABLE = {
    "DuoAttention": ".duo_attention",
    "StreamingLLM": ".streaming_llm",
    "AttendingLayer": ".layer",
    "EvictingLayer": ".evicting",
    "EvictingMethod": ".policy",
    "H2O": ".h2o",
    "KeyNorm": ".snapkv",
    "Limits": ".policy",
    "LookM": ".look_m",
    "LongHeads": ".long_heads",
    "Landmark": ".landmark",
    "LandmarkLayer": ".landmark",
    "LongHeadsLayer": ".long_heads",
    "look_m_compress": ".look_m",
    "scatter_merge": ".merge",
    "Look": ".policy",
    "PagedStore": ".paged",
    "RecycledAttention": ".recycled",
    "RecycledLayer": ".recycled",
    "RetrievalAttention": ".retrieval_attention",
    "RetrievalLayer": ".retrieval_attention",
    "SnapKV": ".snapkv",
    "StaircaseQuantCache": ".staircase",
    "TOVA": ".snapkv",
    "RaggedLayer": ".ragged",
    "CoreContextLayer": ".core_context",
    "kv_bytes": ".ragged",
    "load_gates": ".duo_attention",
    "streaming_heads": ".duo_attention",
    "streaming_mask": ".duo_attention",
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _TABLE)
