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
    "testbeds": ".testbeds:",
    "bench": ".bench:",
    "papers": ".papers:",
    "scale": ".scale:",
    # the front door
    "load": ".integrations.hub",
    "attach": ".integrations.transformers",
    "detach": ".integrations.transformers",
    "record": ".lens.record",
    "chat_spans": ".integrations.spans",
    "text_spans": ".integrations.spans",
    "load_official": ".integrations.official",
    "AttentionCall": ".methods.call",
    "Method": ".methods.call",
    "UnsupportedModelError": ".methods.call",
    # methods, one a paper
    "Dense": ".methods.sparse.baselines",
    "SlidingWindow": ".methods.sparse.baselines",
    "StreamingLLM": ".methods.caches.streaming_llm",
    "H2O": ".methods.caches.h2o",
    "StaircaseQuantCache": ".methods.caches.staircase",
    "RecycledAttention": ".methods.caches.recycled",
    "RetrievalAttention": ".methods.caches.retrieval_attention",
    "LongHeads": ".methods.caches.long_heads",
    "Landmark": ".methods.caches.landmark",
    "LookM": ".methods.caches.look_m",
    "SnapKV": ".methods.caches.snapkv",
    "TOVA": ".methods.caches.snapkv",
    "KeyNorm": ".methods.caches.snapkv",
    "DuoAttention": ".methods.caches.duo_attention",
    "BlockTopK": ".methods.sparse.block_topk",
    "SeerAttention": ".methods.sparse.seer_attention",
    "SeerAttentionR": ".methods.sparse.seer_attention_r",
    "S2Attention": ".methods.sparse.s2_attention",
    "HeadPlan": ".methods.plans",
    "PlannedAttention": ".methods.sparse.planned",
    "SinkLoRA": ".methods.sparse.sink_lora",
    "MoA": ".methods.sparse.moa",
    "MASFormer": ".methods.sparse.mas_former",
    "DHSA": ".methods.sparse.dhsa",
    "BlockDHSA": ".methods.sparse.block_dhsa",
    "HiP": ".methods.sparse.hip",
    "GroupedTopK": ".methods.sparse.grouped_topk",
    "HyperAttention": ".methods.sparse.hyper_attention",
    "CCAAttention": ".methods.sparse.cca_attention",
    "PrFlashAttention": ".methods.sparse.pr_flash_attention",
    "HarmonicALiBi": ".methods.sparse.pr_flash_attention",
    "ZeroTuning": ".methods.edits.zero_tuning",
    "MaskHeads": ".methods.edits.mask_heads",
    "SetAttention": ".methods.edits.set_attention",
    "PatchHeads": ".methods.edits.patch_heads",
    "ProjectHead": ".methods.edits.project_head",
    "QueryNormHeads": ".methods.edits.query_norm_heads",
    "ACT": ".methods.edits.act",
    "MoTE": ".methods.edits.mote",
    "LoFiT": ".methods.edits.lofit",
    "Linearized": ".methods.caches.linearized",
    "LinearizedEncoder": ".methods.caches.linearized",
    "Emphasize": ".methods.edits.emphasize",
    "LargePiG": ".methods.decoders.largepig",
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _TABLE)
