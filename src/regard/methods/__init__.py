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
    "H2O": ".caches.h2o",
    "StaircaseQuantCache": ".caches.staircase",
    "RecycledAttention": ".caches.recycled",
    "RetrievalAttention": ".caches.retrieval_attention",
    "LongHeads": ".caches.long_heads",
    "Landmark": ".caches.landmark",
    "LookM": ".caches.look_m",
    "SnapKV": ".caches.snapkv",
    "TOVA": ".caches.snapkv",
    "KeyNorm": ".caches.snapkv",
    "BlockTopK": ".sparse.block_topk",
    "SeerAttention": ".sparse.seer_attention",
    "SeerAttentionR": ".sparse.seer_attention_r",
    "seer_gates": ".sparse.seer_gates",
    "save_seer_gates": ".sparse.seer_gates",
    "load_seer_gates": ".sparse.seer_gates",
    "S2Attention": ".sparse.s2_attention",
    "plans": ".plans:",
    "HeadPlan": ".plans",
    "PlannedAttention": ".sparse.planned",
    "SinkLoRA": ".sparse.sink_lora",
    "MoA": ".sparse.moa",
    "MASFormer": ".sparse.mas_former",
    "DHSA": ".sparse.dhsa",
    "BlockDHSA": ".sparse.block_dhsa",
    "HiP": ".sparse.hip",
    "GroupedTopK": ".sparse.grouped_topk",
    "HyperAttention": ".sparse.hyper_attention",
    "PrFlashAttention": ".sparse.pr_flash_attention",
    "HarmonicALiBi": ".sparse.pr_flash_attention",
    "CCAAttention": ".sparse.cca_attention",
    "ZeroTuning": ".edits.zero_tuning",
    "MaskHeads": ".edits.mask_heads",
    "LargePiG": ".decoders.largepig",
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _TABLE)
