"""regard: one library for attention.

Build with a mechanism (`regard.nn`, `regard.ops`), put it into a pretrained model (`regard.attach`), look at what the
model attends to (`regard.record`, `regard.lens`), measure what it buys and costs (`regard compare`, `regard bench`).
"""

from ._lazy import lazy_exports

__version__ = "0.1.0"

_TABLE = {
    # rooms
    "ops": ".ops:",
    "masks": ".ops.masks:",
    "scores": ".ops.scores:",
    "nn": ".nn:",
    "models": ".models:",
    "methods": ".methods:",
    "lens": ".lens:",
    "losses": ".losses:",
    "bench": ".bench:",
    "papers": ".papers:",
    # the front door
    "load": ".integrations.hub",
    "attach": ".integrations.transformers",
    "detach": ".integrations.transformers",
    "record": ".lens.record",
    "load_official": ".integrations.official",
    "AttentionCall": ".methods.call",
    "Method": ".methods.call",
    "UnsupportedModelError": ".methods.call",
    # methods, one a paper
    "Dense": ".methods.sparse.baselines",
    "SlidingWindow": ".methods.sparse.baselines",
    "StreamingLLM": ".methods.caches.streaming_llm",
    "DuoAttention": ".methods.caches.duo_attention",
    "S2Attention": ".methods.sparse.s2_attention",
    "DHSA": ".methods.sparse.dhsa",
    "HiP": ".methods.sparse.hip",
    "ZeroTuning": ".methods.edits.zero_tuning",
    "MaskHeads": ".methods.edits.mask_heads",
    "LargePiG": ".methods.decoders.largepig",
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _TABLE)
