"""Mixers: layers to build and train with.

`sequence/` takes (B, N, C), `spatial/` maps or windows, `channel/` gates feature maps.
"""

from .._lazy import lazy_exports

_TABLE = {
    # sequence
    "AttentionGate": ".sequence.attention_gate",
    "DecodeAttentionGate": ".sequence.attention_gate",
    "DynamicMaskAttention": ".sequence.dynamic_mask_attention",
    "EstimatedSparseAttention": ".sequence.sparse_linear_attention",
    "SparseLinearAttention": ".sequence.sparse_linear_attention",
    "BoundaryPredictor": ".sequence.boundary_predictor",
    "HeadRouter": ".sequence.head_routing",
    "MixtureOfHeadAttention": ".sequence.mixture_of_heads",
    "CombinerAttention": ".sequence.combiner_attention",
    "CombinerBlock": ".sequence.combiner_attention",
    "KmeansAttention": ".sequence.kmeans_attention",
    "KmeansSelfAttention": ".sequence.kmeans_attention",
    "OnlineKMeans": ".sequence.online_kmeans",
    "RoutingAttention": ".sequence.routing_attention",
    "LightningAttention": ".sequence.lightning_attention",
    "GroupReadWrite": ".sequence.group_read_write",
    "group_image": ".sequence.group_read_write",
    "ungroup_image": ".sequence.group_read_write",
    "CrossAttend": ".sequence.pre_norm",
    "FeedForward": ".sequence.pre_norm",
    "MultiHeadAttention": ".sequence.pre_norm",
    "PreNormLayer": ".sequence.pre_norm",
    "NeoXStack": ".sequence.neox",
    "T5Decoder": ".sequence.t5_decoder",
    "rotary_table": ".sequence.rotary",
    "rotate": ".sequence.rotary",
    "BoundedMemoryAttention": ".sequence.landmark_mixers",
    "CausalLongShortAttention": ".sequence.long_short_attention",
    "CosformerAttention": ".sequence.kernel_mixers",
    "LinearRandomizedAttention": ".sequence.landmark_mixers",
    "LocalAttention": ".sequence.pattern_attention",
    "LongShortAttention": ".sequence.long_short_attention",
    "NystromAttention": ".sequence.landmark_mixers",
    "OpAttention": ".sequence.pattern_attention",
    "PatternAttention": ".sequence.pattern_attention",
    "PerformerAttention": ".sequence.kernel_mixers",
    "ProbSparseAttention": ".sequence.probsparse_attention",
    "S4D": ".sequence.s4d",
    "VanillaAttention": ".sequence.pattern_attention",
    # spatial
    "AgentAttention": ".spatial.agent_attention",
    "AgentBlock": ".spatial.agent_blocks",
    "AgentCSWinBlock": ".spatial.agent_blocks",
    "AgentStripeAttention": ".spatial.agent_blocks",
    "MixtureOfHeadAggregatedAttention": ".spatial.mixture_of_heads_2d",
    "MixtureOfHeadCosineAttention": ".spatial.mixture_of_heads_2d",
    "NeighborhoodAttention": ".spatial.neighborhood_attention",
    "NeighborhoodAttention1D": ".spatial.neighborhood_attention",
    "NeighborhoodAttention2D": ".spatial.neighborhood_attention",
    "NeighborhoodAttention3D": ".spatial.neighborhood_attention",
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
