"""Tensors in, tensors out: `(B, H, N, D)`, no parameters, no model knowledge.

`reference` is the specification; `backends` hold the fast ways to the same numbers.
"""

from typing import TYPE_CHECKING

from .._lazy import lazy_exports

if TYPE_CHECKING:  # names that a file of this package has too: what they mean to a type checker
    from .attention import attention as attention

_TABLE = {
    "attention": ".attention",
    "attention_backend": ".attention",
    "BACKENDS": ".backends",
    "merge_lse": ".reference",
    "reference": ".reference:",
    "masks": ".masks:",
    "scores": ".scores:",
    "Mask": ".masks",
    "Selection": ".selection",
    "BlockPlan": ".plan",
    "make_plan": ".plan",
    "agent_attention": ".agent",
    "stretch": ".stretch:",
    "stretch_mask": ".stretch",
    "dynamic_mask_attention": ".dynamic_mask",
    "combiner_attention": ".combiner",
    "span_summary": ".combiner",
    "core_context_attention": ".core_context",
    "KeySet": ".joint",
    "joint_attention": ".joint",
    "pooled_attention_map": ".block_maps",
    "HeadRouting": ".head_routing",
    "hyper_attention": ".hyper",
    "gather_groups": ".groups",
    "group_attention": ".groups",
    "scatter_groups": ".groups",
    "head_balance_loss": ".head_routing",
    "query_norm_routing": ".head_routing",
    "route_by_query_norm": ".head_routing",
    "route_heads": ".head_routing",
    "selected_rows_attention": ".head_routing",
    "lightning_attention": ".state.lightning",
    "attention_cascade": ".cascades",
    "CASCADES": ".cascades",
    "count_passes": ".einsum_cascade",
    "parse_cascade": ".einsum_cascade",
    "run_cascade": ".cascade_run",
    "attention_varlen": ".flash",
    "flash_attention": ".flash",
    "TileTraffic": ".flash_tiles",
    "flash_tiles": ".flash_tiles",
    "tiled_attention": ".flash_tiles",
    "neighborhood_attention": ".neighborhood",
    "neighborhood_attention_backend": ".neighborhood",
    "linear_attention": ".state.linear",
    "linear_attention_backend": ".state.linear",
    "linear_attention_decode": ".state.linear",
    "LinearState": ".state.linear",
    "shifted_group_attention": ".shifted_groups",
    "log_factor_bias": ".reweight",
    "scale_weights": ".reweight",
    "attention_column_sums": ".statistics",
    "Packed": ".packed",
    "recycled_attention": ".recycled",
    "quantise": ".packed",
    "window_scores": ".statistics",
    "insert_landmarks": ".landmark",
    "landmark_attention": ".landmark",
    "landmark_weights": ".landmark",
    "index": ".index:",
    "select": ".select:",
    "state": ".state:",
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _TABLE)
