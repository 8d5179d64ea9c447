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
    "HeadRouting": ".head_routing",
    "head_balance_loss": ".head_routing",
    "query_norm_routing": ".head_routing",
    "route_by_query_norm": ".head_routing",
    "route_heads": ".head_routing",
    "selected_rows_attention": ".head_routing",
    "lightning_attention": ".state.lightning",
    "linear_attention": ".state.linear",
    "linear_attention_backend": ".state.linear",
    "linear_attention_decode": ".state.linear",
    "LinearState": ".state.linear",
    "log_factor_bias": ".reweight",
    "scale_weights": ".reweight",
    "select": ".select:",
    "state": ".state:",
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _TABLE)
