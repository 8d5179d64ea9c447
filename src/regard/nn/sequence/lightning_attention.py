"""The token mixers of TransNormerLLM, built on Lightning Attention.

Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention (Qin et al. 2024, arXiv
2405.17381). Code read for numbers: OpenNLPLab/lightning-attention `examples/module/tnl_attn.py` (`TnlAttention`) and the
model file of the released TransNormerLLM checkpoints (`NormLinearAttention`, as kept in weigao266/TNL-MoE).

The two releases are different layers, and the paper's decay is a third thing; `variant` names them. What differs from
their code: the decode position of the rotary part belongs to the state and not to the module (theirs survives into the
next sequence), several tokens can be decoded at once, decay rates stay float32 in a half model, and the fallback of their
training branch without a mask, which reads the future, does not exist.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..._checks import bad_type, require, require_int, require_name, require_tensor
from ...ops.state.decay import layer_log_decay
from ...ops.state.linear import linear_attention
from ...ops.state.linear_state import LinearState
from ...ops.state.varlen import check_cu_seqlens
from ..layers import rename_keys

__all__ = ["LightningAttention", "LightningState", "LinearizedRelativePosition", "SimpleRMSNorm"]


def _shifted_exp(x: Tensor) -> Tensor:
    return (x - x.detach().amax(dim=-1, keepdim=True)).exp()


# Activations under the names of the authors' configuration files.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "elu": F.elu,
    "1+elu": lambda x: 1 + F.elu(x),
    "2+elu": lambda x: 2 + F.elu(x),
    "sigmoid": torch.sigmoid,
    "exp": _shifted_exp,
    "leak": F.leaky_relu,
    "sine": torch.sin,
    "identity": lambda x: x,
}
NORMS = ("layernorm", "simplermsnorm")


class SimpleRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) over the last dimension, in float32 (float64 for float64), without a weight."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.dim, self.eps = require_int("dim", dim, 1), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}"


class LinearizedRelativePosition(nn.Module):
    """LRPE: x (B, H, N, D) -> [x cos(theta p), x sin(theta p)], (B, H, N, 2 D), p the position.

    The product of two such vectors is sum_i q_i k_i cos(theta_i (p_q - p_k)), so a linear attention becomes relative.
    theta (H, 1, D) is learned; it starts at 10000^(-2 j / (H D)), j counting over heads and channels together.
    """

    def __init__(self, num_heads: int, head_dim: int):
        super().__init__()
        count = require_int("num_heads", num_heads, 1) * require_int("head_dim", head_dim, 1)
        self.theta = nn.Parameter(10000 ** (-2 / count * torch.arange(count)).reshape(num_heads, 1, head_dim))

    def forward(self, x: Tensor, offset: int | Tensor = 0) -> Tensor:
        """offset: position of the first token, one for the batch or (B,) integers; or (B, N), added to each token's place in the row."""
        wide = torch.promote_types(x.dtype, torch.float32)  # a half type cannot even count to 2049
        position = torch.arange(x.shape[2], device=x.device)
        if isinstance(offset, Tensor):
            offset = offset.to(x.device).reshape(offset.shape[0], 1, -1)
        position = position + offset
        angle = self.theta.to(wide) * position.to(wide)[..., None]
        return torch.cat([x * angle.cos().to(x.dtype), x * angle.sin().to(x.dtype)], dim=-1)


@dataclass
class LightningState:
    """What a layer carries while decoding: `memory` (kv of shape (B, H, D, Dv), float32) and the tokens seen so far.

    position: one number for the batch, or (B,) after a call with `lengths`.
    """

    memory: LinearState
    position: int | Tensor = 0

    @property
    def nbytes(self) -> int:
        """Bytes held; they do not grow with the tokens."""
        return self.memory.nbytes


class LightningAttention(nn.Module):
    """Causal gated linear attention with a fixed decay per head and layer: (B, N, dim) -> (B, N, dim).

    dim, num_heads: channels and heads; `hidden_dim` (default dim), a multiple of num_heads, is the width inside.
    layer_idx, num_layers: which layer of how many; early layers forget fast, the last one hardly (`layer_log_decay`).
    variant:
        "released" (default): `TnlAttention`. q, k and v through silu; LayerNorm over all heads together; times
            sigmoid(W2 W1 x) with a rank of head_dim; separate projections. State dict: the authors' names.
        "transnormer": the mixer of the released TransNormerLLM checkpoints. One projection to q, k, v, u; silu on q and
            k only; SimpleRMSNorm; times u. State dict: theirs, `out_proj` being our `o_proj` (`official_keys`).
        "paper": the equations of arXiv 2405.17381: as "transnormer", with the decay of equation 10, linear in the head.
    bias: of all projections. lrpe: LRPE on q and k (TransNormerLLM: on layer 0 only), which doubles their width.
    activation: a name in `ACTIVATIONS` or a callable on (B, H, N, D); applied to q and k, and in "released" to v.
    norm: "layernorm" or "simplermsnorm"; None is what the variant has.

    Raises ValueError or TypeError naming the argument.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        layer_idx: int = 0,
        num_layers: int = 12,
        *,
        variant: str = "released",
        hidden_dim: int | None = None,
        bias: bool = False,
        lrpe: bool = False,
        activation: str | Callable[[Tensor], Tensor] = "silu",
        norm: str | None = None,
    ):
        super().__init__()
        self.dim = require_int("dim", dim, 1)
        self.num_heads = require_int("num_heads", num_heads, 1)
        self.variant = require_name("variant", variant, ("released", "transnormer", "paper"))
        hidden = dim if hidden_dim is None else require_int("hidden_dim", hidden_dim, 1)
        name, width = ("dim", dim) if hidden_dim is None else ("hidden_dim", hidden)
        require(hidden % num_heads == 0, name, width, f"a multiple of num_heads ({num_heads})")
        self.hidden_dim, self.head_dim = hidden, hidden // num_heads
        if isinstance(activation, str):
            activation = ACTIVATIONS[require_name("activation", activation, ACTIVATIONS)]
        elif not callable(activation):
            raise bad_type("activation", activation, f"a callable or one of {', '.join(ACTIVATIONS)}")
        self.activation = activation
        norm = norm or ("layernorm" if variant == "released" else "simplermsnorm")
        self.norm = {"layernorm": nn.LayerNorm, "simplermsnorm": SimpleRMSNorm}[require_name("norm", norm, NORMS)](
            hidden
        )
        if variant == "released":
            self.q_proj = nn.Linear(dim, hidden, bias=bias)
            self.k_proj = nn.Linear(dim, hidden, bias=bias)
            self.v_proj = nn.Linear(dim, hidden, bias=bias)
            self.output_gate = nn.Sequential(
                nn.Linear(dim, self.head_dim, bias=bias), nn.Linear(self.head_dim, hidden, bias=bias)
            )
        else:
            self.qkvu_proj = nn.Linear(dim, 4 * hidden, bias=bias)
        self.o_proj = nn.Linear(hidden, dim, bias=bias)
        self.lrpe = LinearizedRelativePosition(num_heads, self.head_dim) if lrpe else None
        decay = layer_log_decay(num_heads, layer_idx, num_layers, "paper" if variant == "paper" else "released")
        self.log_decay: Tensor
        self.register_buffer("log_decay", decay, persistent=False)

    def forward(
        self,
        x: Tensor,
        *,
        state: LightningState | None = None,
        return_state: bool = False,
        lengths: Tensor | None = None,
        padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        form: str = "auto",
        chunk_size: int | None = None,
        backend: str = "auto",
    ) -> Any:
        """x (B, N, dim) -> (B, N, dim), or (that, LightningState) with `return_state`.

        state: what an earlier call returned; x continues that sequence (one token a call decodes in constant memory).
        lengths: (B,) valid tokens counted from the left; the rest is padding, its outputs are those of an empty row
            and it leaves no trace in the state (nor does the state's memory fade over it).
        padding_mask: (B, N), nonzero for tokens, as the authors have it and as left-padded batches need: values of padded
            tokens are zero, the memory goes on fading. Not together with `lengths`.
        cu_seqlens: (S + 1,) bounds of S sequences packed into x (1, N, dim), each on its own; the state then has one row a sequence, from
            which S rows of one token decode. Not together with `lengths` or `padding_mask`.
        form, chunk_size, backend: as `linear_attention`.
        """
        self._check(x, state, lengths, padding_mask)
        if self.variant == "released":
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
            gate = torch.sigmoid(self.output_gate(x))
        else:
            q, k, v, gate = self.qkvu_proj(x).chunk(4, dim=-1)
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=self.num_heads) for t in (q, k, v))
        q, k = self.activation(q), self.activation(k)
        if self.variant == "released":
            v = self.activation(v)
        position = 0 if state is None else state.position
        seen: int | Tensor = x.shape[1] if lengths is None else lengths
        places = position
        if cu_seqlens is not None:
            require(
                lengths is None and padding_mask is None,
                "cu_seqlens",
                "given with padding",
                "packed or padded input, not both",
            )
            bounds = torch.tensor(check_cu_seqlens(cu_seqlens, x.shape[1]), device=x.device)
            seen = bounds.diff()
            past = position.to(x.device) if isinstance(position, Tensor) else torch.full_like(seen, position)
            require(len(past) == len(seen), "state", f"{len(past)} sequences", f"{len(seen)}, those of cu_seqlens")
            places = (past - bounds[:-1]).repeat_interleave(seen)[None]
        if self.lrpe is not None:
            q, k = self.lrpe(q, places), self.lrpe(k, places)
        if padding_mask is not None:
            v = v.masked_fill(~padding_mask.bool()[:, None, :, None], 0)
        out = linear_attention(
            q, k, v, log_decay=self.log_decay, state=None if state is None else state.memory, return_state=return_state,
            lengths=lengths, cu_seqlens=cu_seqlens, form=form, chunk_size=chunk_size, backend=backend,
        )  # fmt: skip
        mixed, memory = out if isinstance(out, tuple) else (out, None)
        y = self.o_proj(self.norm(rearrange(mixed, "b h n d -> b n (h d)")) * gate)
        if memory is None:
            return y
        return y, LightningState(memory, (position.to(x.device) if isinstance(position, Tensor) else position) + seen)

    def _check(
        self, x: Tensor, state: LightningState | None, lengths: Tensor | None, padding_mask: Tensor | None
    ) -> None:
        require_tensor("x", x, dims=3, floating=True)
        require(x.shape[-1] == self.dim, "x", f"shape {tuple(x.shape)}", f"(B, N, {self.dim})")
        if state is not None and not isinstance(state, LightningState):
            raise bad_type("state", state, "a LightningState")
        if padding_mask is not None:
            require(lengths is None, "padding_mask", "given together with lengths", "one of the two")
            require_tensor("padding_mask", padding_mask)
            need = f"shape {tuple(x.shape[:2])}"
            require(padding_mask.shape == x.shape[:2], "padding_mask", f"shape {tuple(padding_mask.shape)}", need)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LightningAttention:
        """Move with the module, but stay float32: rounded decays would compound over thousands of tokens."""
        exact = self.log_decay
        super()._apply(fn, recurse)
        if self.log_decay.dtype != exact.dtype:
            self.log_decay = exact.to(self.log_decay.device)
        return self

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' names to ours: TransNormerLLM's `out_proj` is `o_proj`; all others are the same."""
        return rename_keys(state, (r"^out_proj\.", "o_proj."))

    def extra_repr(self) -> str:
        return f"variant={self.variant!r}, num_heads={self.num_heads}, head_dim={self.head_dim}"
