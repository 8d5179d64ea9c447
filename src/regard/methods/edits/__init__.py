"""What a trained model should look at instead: methods that edit scores, weights or head outputs."""

from ..._lazy import lazy_exports

_TABLE = {
    "ZeroTuning": ".zero_tuning",
    "Emphasize": ".emphasize",
    "emphasis_exponent": ".emphasize",
    "MaskHeads": ".mask_heads",
    "SetAttention": ".set_attention",
    "PatchHeads": ".patch_heads",
    "ProjectHead": ".project_head",
    "HeadSubspace": ".project_head",
    "QueryNormHeads": ".query_norm_heads",
    "ACT": ".act",
    "MoTE": ".mote",
    "LoFiT": ".lofit",
    "HeadAffine": ".lofit",
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _TABLE)
