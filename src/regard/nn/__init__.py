"""Mixers: layers to build and train with.

`sequence/` takes (B, N, C), `spatial/` maps or windows, `channel/` gates feature maps.
"""

from .._lazy import lazy_exports

_TABLE = {
    # sequence
    "BoundaryPredictor": ".sequence.boundary_predictor",
    "HeadRouter": ".sequence.head_routing",
    "MixtureOfHeadAttention": ".sequence.mixture_of_heads",
    "LightningAttention": ".sequence.lightning_attention",
    # spatial
    "AgentAttention": ".spatial.agent_attention",
    "AgentBlock": ".spatial.agent_blocks",
    "AgentCSWinBlock": ".spatial.agent_blocks",
    "AgentStripeAttention": ".spatial.agent_blocks",
    "MixtureOfHeadAggregatedAttention": ".spatial.mixture_of_heads_2d",
    "MixtureOfHeadCosineAttention": ".spatial.mixture_of_heads_2d",
    "SingleHeadSelfAttention": ".spatial.single_head_self_attention",
    "TokenAwarePooling": ".spatial.token_aware_pooling",
    # channel
    "FeatureGate": ".channel.gate",
    "insert_gate": ".channel.gate",
    "EfficientLocalAttention": ".channel.efficient_local_attention",
    # blocks that networks share
    "BNLinear": ".layers",
    "ConvBN": ".layers",
    "ConvFeedForward": ".layers",
    "Residual": ".layers",
    "SqueezeExcite": ".layers",
    "fuse_conv_bn": ".layers",
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _TABLE)
