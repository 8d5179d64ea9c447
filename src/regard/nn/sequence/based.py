"""Based: linear attention with a Taylor feature map, sliding window attention, and gated short convolutions between them.

Simple linear attention language models balance the recall-throughput tradeoff (Arora et al. 2024, arXiv 2402.18668); code read for
numbers: HazyResearch/based @ 32c1bd4 (Apache-2.0), `based/models/mixers/`. What differs: any length (their kernels and their decoding
step want multiples of 64 or one token), gradients in float32 and float64 on any device, and the compact features that their paper speaks
of and their code does not use. Their ThunderKittens form, without a denominator and with a norm, is not here: it is for timing only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..._checks import bad_type, require, require_int, require_name, require_tensor
from ...ops.state.feature_maps import TaylorExp
from .linear_attention import LinearAttention
from .softmax_attention import SoftmaxAttention

__all__ = ["BasedLinearAttention", "BasedSlidingAttention", "GatedShortConv", "ShortConvState"]


class BasedLinearAttention(LinearAttention):
    """Causal linear attention with weights 1 + s + s^2 / 2, s = q . k / sqrt(feature_dim): (B, N, dim) -> (B, N, dim). No positions.

    Args:
        dim, num_heads. causal: False: every token sees all.
        feature_dim: channels of a head's queries and keys: the dial between recall and memory. The state has 1 + f + f^2 rows a head.
        head_dim: of the values, default dim / num_heads.
        eps: added to the sum of the weights; 1e-12 as in the authors' plain forms, 1e-6 in their Triton ones.
        compact: products of two channels once and not twice: the same outputs with 1 + f + f (f + 1) / 2 rows, and less work.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        causal: bool = True,
        *,
        feature_dim: int = 16,
        head_dim: int | None = None,
        eps: float = 1e-12,
        compact: bool = True,
    ) -> None:
        require_int("feature_dim", feature_dim, 1)
        super().__init__(
            dim,
            num_heads,
            causal,
            key_dim=require_int("num_heads", num_heads, 1) * feature_dim,
            head_dim=head_dim,
            feature_map=TaylorExp(compact=bool(compact)),
            eps=eps,
        )
        self.feature_dim = feature_dim

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' proj_q, proj_k and proj_v are q_proj, k_proj and v_proj; out_proj is itself."""
        for one in "qkv":
            state = {name.replace(f"proj_{one}.", f"{one}_proj."): tensor for name, tensor in state.items()}
        return state


class BasedSlidingAttention(SoftmaxAttention):
    """Softmax attention over the last few tokens, with rotary positions: (B, N, dim) -> (B, N, dim), causal.

    Args:
        dim, num_heads, num_kv_heads (default num_heads). window_size: W.
        variant: "released": a token sees itself and the W // 2 tokens before it, as the authors' code halves the window that it hands to
            flash-attention, which takes it for one side; "paper": W tokens, itself included.
        rope_base: of rotary positions; None: none. rope_dims: channels of a head that turn, the first ones; default all.
        bias: of all projections (none in the authors' configurations); out_bias: of the last one, if not as `bias`.
        dropout: of weights, in training.

    Memory while decoding is that of the window.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window_size: int = 128,
        variant: str = "released",
        num_kv_heads: int | None = None,
        rope_base: float | None = 10000.0,
        rope_dims: int | None = None,
        bias: bool = False,
        out_bias: bool | None = None,
        dropout: float = 0.0,
    ) -> None:
        require_name("variant", variant, ("released", "paper"))
        require_int("window_size", window_size, 1)
        super().__init__(
            dim,
            num_heads,
            True,
            num_kv_heads=num_kv_heads,
            window=window_size // 2 + 1 if variant == "released" else window_size,
            rope_base=rope_base,
            rope_dims=rope_dims,
            bias=bias,
            dropout=dropout,
        )
        if out_bias is not None:
            self.o_proj = nn.Linear(self.o_proj.in_features, dim, bias=out_bias)

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' `Wqkv` holds queries, keys and values below each other; `out_proj` is `o_proj`."""
        ours: dict[str, Tensor] = {}
        queries = state["out_proj.weight"].shape[1]
        for name, tensor in state.items():
            head, _, kind = name.rpartition(".")
            if head == "Wqkv":
                keys = (tensor.shape[0] - queries) // 2
                parts = tensor.split([queries, keys, keys])
                ours.update({f"{one}_proj.{kind}": part for one, part in zip("qkv", parts)})
            else:
                ours[f"{'o_proj' if head == 'out_proj' else head}.{kind}"] = tensor
        return ours


@dataclass
class ShortConvState:
    """What `GatedShortConv` carries while decoding: the convolution's last `kernel_size - 1` inputs, (B, kernel_size - 1, hidden)."""

    before: Tensor

    def select(self, rows: Tensor) -> ShortConvState:
        """Batch row i becomes what row `rows[i]` was."""
        return ShortConvState(self.before[rows])


class GatedShortConv(nn.Module):
    """W_out (silu(conv(u)) * g), (u, g) = W_in x, with a causal convolution of each channel: (B, N, dim) -> (B, N, dim).

    The authors' `BaseConv`, most layers of their models.

    Args:
        dim. num_heads: taken so that it can stand where attention stands; not used.
        kernel_size: tokens that the convolution sees, the present one included. (Their configurations name it `kernel_sizes`, which their
            layer does not read: their models have 3.)
        expand: width of W_in over dim; u and g have half of it each. 2 as the authors' default, 4 in their models.
        bias: of both projections. conv_bias: of the convolution, as their CUDA path has it.
    """

    causal = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        kernel_size: int = 3,
        expand: int = 2,
        bias: bool = True,
        conv_bias: bool = False,
    ) -> None:
        super().__init__()
        self.dim, self.kernel_size = require_int("dim", dim, 1), require_int("kernel_size", kernel_size, 1)
        require(require_int("expand", expand, 1) * dim % 2 == 0, "expand", expand, f"expand * dim ({dim}) even")
        self.hidden = expand * dim // 2
        self.in_proj = nn.Linear(dim, 2 * self.hidden, bias=bias)
        self.conv = nn.Conv1d(self.hidden, self.hidden, kernel_size, groups=self.hidden, bias=conv_bias)
        self.out_proj = nn.Linear(self.hidden, dim, bias=bias)

    def forward(self, x: Tensor, *, state: ShortConvState | None = None, return_state: bool = False) -> Any:
        """x (B, N, dim) -> (B, N, dim), or (that, ShortConvState) with `return_state`; `state`: what an earlier call returned."""
        require_tensor("x", x, dims=3, floating=True)
        require(x.shape[2] == self.dim, "x", f"shape {tuple(x.shape)}", f"(B, N, {self.dim})")
        if state is not None and not isinstance(state, ShortConvState):
            raise bad_type("state", state, "a ShortConvState")
        u, gate = self.in_proj(x).chunk(2, dim=-1)
        shape = (x.shape[0], self.kernel_size - 1, self.hidden)
        before = u.new_zeros(shape) if state is None else state.before
        require(before.shape == shape, "state", f"shape {tuple(before.shape)}", f"shape {shape}")
        whole = torch.cat((before.to(u.dtype), u), dim=1)
        mixed = self.conv(whole.transpose(1, 2)).transpose(1, 2) if x.shape[1] else u
        y = self.out_proj(F.silu(mixed) * gate)
        return (y, ShortConvState(whole[:, x.shape[1] :].contiguous())) if return_state else y

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' `conv.conv` is `conv`."""
        return {name.replace("conv.conv.", "conv."): tensor for name, tensor in state.items()}

    def extra_repr(self) -> str:
        return f"dim={self.dim}, hidden={self.hidden}, kernel_size={self.kernel_size}"
