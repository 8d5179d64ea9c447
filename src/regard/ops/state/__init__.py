"""State ops: linear and recurrent attention, each as parallel = chunk = recurrent form with an explicit state."""

from ..._lazy import lazy_exports

_TABLE = {
    "global_linear": ".global_linear:",
    "global_linear_attention": ".global_linear",
    "global_linear_weights": ".global_linear",
    "lightning_attention": ".lightning",
    "LTV": ".ltv",
    "linear_scan": ".linear_scan",
    "selective_ssm_ltv": ".ltv",
    "selective_scan": ".selective_scan",
    "linear_attention": ".linear",
    "linear_attention_backend": ".linear",
    "linear_attention_decode": ".linear",
    "linear_attention_reference": ".reference",
    "LinearState": ".linear_state",
    "alibi_slopes": ".decay",
    "layer_log_decay": ".decay",
    "feature_maps": ".feature_maps:",
    "NeuralMemoryState": ".neural_memory",
    "memory_gradient": ".neural_memory",
    "memory_read": ".neural_memory",
    "neural_memory": ".neural_memory",
    "orthogonal_projection": ".favor",
    "TaylorExp": ".feature_maps",
    "CosineReweighting": ".feature_maps",
    "Focused": ".feature_maps",
    "linear_attention_weights": ".linear_weights",
    "relu_features": ".favor",
    "softmax_features": ".favor",
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _TABLE)
