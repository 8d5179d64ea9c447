"""The learned router of Mixture-of-Head attention (Jin et al., 2024, arXiv 2410.11842), shared by all its layers."""

from __future__ import annotations

from torch import Tensor, nn

from ..._checks import bad_value, require, require_int, require_name, require_tensor
from ...ops.head_routing import VARIANTS, HeadRouting, route_heads

OFFICIAL_ROUTER_KEYS = {
    "wg.weight": "router.routed.weight",
    "wg_0.weight": "router.groups.weight",
    "wg_1.weight": "router.shared.weight",
}


def head_counts(num_heads: int | None, heads: int | None, shared: int, active: int | None) -> tuple[int, int, int]:
    """Checked (num_heads, shared, active); `heads` is another spelling of `num_heads`."""
    if num_heads is None:
        num_heads = heads
    elif heads is not None and heads != num_heads:
        raise bad_value("heads", heads, f"nothing, or num_heads ({num_heads}): they are two spellings of one number")
    num_heads = require_int("num_heads", num_heads, 1)
    require_int("shared", shared)
    require(shared <= num_heads, "shared", shared, f"at most num_heads ({num_heads})")
    active = require_int("active", active, 1)
    require(shared <= active <= num_heads, "active", active, f"shared ({shared}) <= active <= num_heads ({num_heads})")
    require(
        active > shared or shared == num_heads,
        "active",
        active,
        f"more than shared ({shared}): the other {num_heads - shared} heads would never be used",
    )
    return num_heads, shared, active


class HeadRouter(nn.Module):
    """Linear routers from tokens to head gates.

    Args:
        dim: channels of the tokens.
        num_heads: all heads, H.
        shared: heads in use for every token, the first ones.
        active: heads in use per token, shared included.
        variant: "released" or "paper", see `regard.ops.route_heads`.

    Three bias-free Linears, each there only if it decides something: `routed` (H - shared), `shared` (the shared heads, when there
    is more than one), `groups` (2, when both groups exist). `forward(x (B, N, dim)) -> HeadRouting`.
    """

    def __init__(self, dim: int, num_heads: int, shared: int, active: int, variant: str = "released") -> None:
        super().__init__()
        self.num_heads, self.num_shared, self.num_active = head_counts(num_heads, None, shared, active)
        self.dim = require_int("dim", dim, 1)
        self.variant = require_name("variant", variant, VARIANTS)
        routes = active > shared
        self.routed = nn.Linear(dim, num_heads - shared, bias=False) if routes else None
        self.groups = nn.Linear(dim, 2, bias=False) if routes and shared else None
        self.shared = nn.Linear(dim, shared, bias=False) if shared > 1 else None

    def forward(self, x: Tensor) -> HeadRouting:
        require_tensor("x", x, dims=3, floating=True)
        shared_logits = None if self.shared is None else self.shared(x)
        if shared_logits is None and self.num_shared:
            shared_logits = x.new_zeros(*x.shape[:2], 1)  # a single shared head has nobody to share with
        return route_heads(
            None if self.routed is None else self.routed(x),
            shared_logits,
            None if self.groups is None else self.groups(x),
            shared=self.num_shared,
            active=self.num_active,
            variant=self.variant,
        )

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, shared={self.num_shared}, active={self.num_active}, variant={self.variant!r}"
        )
