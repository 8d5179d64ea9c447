"""Heads chosen by the length of their queries: Mixture-of-Head attention as MoH-LLaMA3 has it, without router weights.

MoH: Multi-Head Attention as Mixture-of-Head Attention (Jin et al., 2024, arXiv 2410.11842); code read for numbers: SkyworkAI/MoH @ 2cefd57,
`MoH-LLaMA3/Inference_code/modeling_llama.py`. What differs: any number of shared heads (their mask of the shared heads fits half of the
heads only); gradients straight through the choice, which the paper's training has and the released inference code has not; heads that
are off can really be left out.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..._checks import bad_value
from ...ops import masks
from ...ops.attention import attention
from ...ops.head_routing import HeadRouting, query_norm_routing, selected_rows_attention
from .head_routing import head_counts
from .softmax_attention import SoftmaxAttention

__all__ = ["QueryNormHeadAttention"]


class QueryNormHeadAttention(SoftmaxAttention):
    """Softmax attention of which each token uses `active` heads, the first `shared` always: (B, N, dim) -> (B, N, dim).

    Args:
        dim, num_heads, causal, options (num_kv_heads, head_dim, window, rope_base, bias, dropout): as of `SoftmaxAttention`.
        shared: heads always on; default half of them. active: heads on per token, shared included; default three quarters.
        skip_inactive: attend with the (head, token) pairs in use alone; the same numbers up to rounding.
        straight_through: in training, gates carry the gradient of the choice's softmax.

    With all heads active it is `SoftmaxAttention`. `qk_norm` is refused: it makes all queries alike long. It decodes like that layer:
    which heads a token uses depends on that token alone. `routing(x)` tells it, with the balance loss.

    Errors: ValueError or TypeError naming the argument.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        causal: bool = True,
        *,
        shared: int | None = None,
        active: int | None = None,
        skip_inactive: bool = False,
        straight_through: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, causal, **options)
        if not isinstance(self.q_norm, nn.Identity):
            raise bad_value("qk_norm", True, "False: norms of queries choose the heads")
        shared = num_heads // 2 if shared is None else shared
        active = max(shared, -(-3 * num_heads // 4)) if active is None else active
        _, self.num_shared, self.num_active = head_counts(num_heads, None, shared, active)
        self.skip_inactive, self.straight_through = bool(skip_inactive), bool(straight_through)

    def routing(self, x: Tensor) -> HeadRouting:
        """Which heads the tokens of x (B, N, dim) use: gates of 0 and 1 (B, H, N), and the balance loss."""
        return self._routing(self._project(x)[0])

    def _routing(self, q: Tensor) -> HeadRouting:
        through = self.straight_through and self.training
        return query_norm_routing(q, shared=self.num_shared, active=self.num_active, straight_through=through)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: masks.Mask | None, dropout: float) -> Tensor:
        routing = self._routing(q)  # the rotation keeps lengths
        if self.skip_inactive and self.num_active < self.num_heads:
            out = selected_rows_attention(q, k, v, routing.selected, shared=self.num_shared, mask=mask, dropout=dropout)
        else:
            out = attention(q, k, v, mask=mask, dropout=dropout)
        return out * routing.gates.unsqueeze(-1).to(out.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, shared={self.num_shared}, active={self.num_active}"
