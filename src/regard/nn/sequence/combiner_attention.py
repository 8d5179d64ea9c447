"""Combiner, Ren et al. (2021, NeurIPS, arXiv 2107.05768), as a layer. Code read for numbers: google-research/google-research
`combiner/combiner/jax/model/layer.py` @ 4c42994 and `combiner/combiner/tf/approx_attention.py` @ 5b09c22 (Apache-2.0).

The patterns without parameters are in `ops/combiner.py`; "axial_rowmajor", which has some, is here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..._checks import require, require_fraction, require_int, require_name, require_tensor
from ...ops import masks
from ...ops.combiner import PATTERNS, combiner_attention, in_columns, merged, rows_of
from ...ops.groups import group_attention
from ..layers import rename_keys

ROW_SUMMARIES = ("proj", "wsum", "wsum_proj", "none")


class CombinerAttention(nn.Module):
    """Self-attention to every token, directly or through the summary of a span, at the cost of sparse attention.

    Pattern "axial_rowmajor": tokens as rows of `segment`; every token first attends to its whole row, which gives the row's summary at its
    column; a query then sees its own row up to itself, and the summaries at its column of all earlier rows, under one softmax. The
    other patterns are those of `regard.ops.combiner_attention`.

    Args:
        dim: channels in and out. num_heads: heads. qkv_dim: channels of all heads together, default `dim`.
        pattern: "fixed", "logsparse", "axial_mixture" or "axial_rowmajor". segment: tokens of a segment or row.
        causal: whether a token sees no later ones; if not, "axial_*" need lengths that `segment` divides.
        bias: biases of the projections (the authors' TensorFlow code has them, the JAX code has none). out_bias: of the last one, if not
            as `bias`.
        summary, running, variant: as in `regard.ops.combiner_attention`. For "axial_rowmajor" `variant` matters where not causal: as
            released a token also sees its own row's summary.
        row_summary: the key of a row's summary in "axial_rowmajor": "proj", a projection of what the token found (added to the input,
            normalised, projected again: the only one in JAX); "wsum", the keys of the row weighed as the values are; "wsum_proj", both;
            "none", the token's own key.
        attn_drop: dropout of the weights inside summaries. proj_drop: of the projection in `row_summary`.
        norm_eps: of the norm in `row_summary` (JAX 1e-6, TensorFlow 1e-5).

    Shapes: `forward(x (B, N, dim)) -> (B, N, dim)`. There is no mask for padding: in a causal layer tokens padded at the end change
    nothing before them.

    Raises:
        ValueError, TypeError: counts that do not fit, wrong shapes.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        pattern: str = "fixed",
        segment: int = 32,
        causal: bool = True,
        qkv_dim: int | None = None,
        bias: bool = False,
        out_bias: bool | None = None,
        summary: str = "max",
        running: str | None = None,
        row_summary: str = "proj",
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_eps: float = 1e-6,
        variant: str = "released",
    ) -> None:
        super().__init__()
        inner = dim if qkv_dim is None else qkv_dim
        for name, value in (("dim", dim), ("num_heads", num_heads), ("segment", segment), ("qkv_dim", inner)):
            require_int(name, value, 1)
        require(inner % num_heads == 0, "qkv_dim", inner, f"a multiple of num_heads, {num_heads}")
        require_name("pattern", pattern, (*PATTERNS, "axial_rowmajor"))
        require_name("row_summary", row_summary, ROW_SUMMARIES)
        require_name("variant", variant, ("released", "paper"))
        require(causal or pattern != "logsparse", "causal", causal, "True for pattern='logsparse'")
        self.dim, self.num_heads, self.pattern, self.segment = dim, num_heads, pattern, segment
        self.causal, self.row_summary, self.variant = bool(causal), row_summary, variant
        self.attn_drop = require_fraction("attn_drop", attn_drop)
        self.options: dict[str, Any] = {"summary": summary, "running": running}
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, inner, bias=bias) for _ in range(3))
        if pattern == "axial_rowmajor" and "proj" in row_summary:
            self.row_proj = nn.Linear(inner, dim, bias=bias)
            self.row_drop = nn.Dropout(proj_drop)
            self.row_norm = nn.LayerNorm(dim, eps=norm_eps)
            self.row_key = nn.Linear(dim, inner, bias=bias)
        self.proj = nn.Linear(inner, dim, bias=bias if out_bias is None else out_bias)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        require_tensor("x", x, dims=3, floating=True)
        require(x.shape[2] == self.dim, "x", f"shape {tuple(x.shape)}", f"(B, N, {self.dim})")
        if x.shape[1] == 0:
            return x
        q, k, v = (self._heads(to(x)) for to in (self.to_q, self.to_k, self.to_v))
        if self.pattern == "axial_rowmajor":
            out = self._rowmajor(x, q, k, v)
        else:
            out = combiner_attention(
                q,
                k,
                v,
                pattern=self.pattern,
                segment=self.segment,
                causal=self.causal,
                dropout=self._dropout,
                variant=self.variant,
                **self.options,
            )
        return self.proj(out.transpose(1, 2).flatten(2))

    @property
    def _dropout(self) -> float:
        return self.attn_drop if self.training else 0.0

    def _heads(self, x: Tensor) -> Tensor:
        """(..., N, H * d) -> (..., H, N, d)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(-2, -3)

    def _rowmajor(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length, segment = x.shape[1], self.segment
        if not self.causal:
            require(length % segment == 0, "segment", segment, f"a divisor of the length, {length}, where not causal")
        q = q * q.shape[-1] ** -0.5
        q, k, v = (rows_of(t, segment) for t in (q, k, v))
        # a ragged last row looks at its padding here, but nobody reads the summary of the last row
        found = group_attention(q, k, v, scale=1.0, dropout=self._dropout)
        keys = self._row_keys(x, q, k, found)
        row = torch.arange(q.shape[2], device=x.device)
        earlier: Tensor | None = row[:, None] > row
        if not self.causal:
            earlier = None if self.variant == "released" else row[:, None] != row
        own = group_attention(q, k, v, mask=masks.causal if self.causal else None, scale=1.0, return_lse=True)
        return merged([own, in_columns(q, keys, found, earlier, scale=1.0)], length)

    def _row_keys(self, x: Tensor, q: Tensor, k: Tensor, found: Tensor) -> Tensor:
        """Keys of the row summaries, (B, H, rows, segment, d)."""
        if self.row_summary == "none":
            return k
        if "wsum" in self.row_summary:
            found = group_attention(q, k, k, scale=1.0, dropout=self._dropout)
        if "proj" not in self.row_summary:
            return found
        seen = self.row_drop(self.row_proj(found.permute(0, 2, 3, 1, 4).flatten(3)))
        seen = self.row_norm(seen + rows_of(x[:, None], self.segment)[:, 0])
        return self._heads(self.row_key(seen)).transpose(1, 2)

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Flax parameters of `_SelfAtt*` / `_AxialMixtureAtt` or TensorFlow variables of `approx_attention`, under any scope, to ours."""
        return _official(state)


class CombinerBlock(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))` with a ReLU: the authors' JAX layer around `CombinerAttention`.

    Args:
        dim, num_heads: as there. mlp_dim: hidden channels, default 4 dim. drop: dropout of the attention's output and of the MLP.
        options: everything else of `CombinerAttention`.

    Shapes: `forward(x (B, N, dim)) -> (B, N, dim)`.
    """

    def __init__(
        self, dim: int, num_heads: int = 8, *, mlp_dim: int | None = None, drop: float = 0.0, **options: Any
    ) -> None:
        super().__init__()
        hidden = require_int("mlp_dim", 4 * dim if mlp_dim is None else mlp_dim, 1)
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = CombinerAttention(dim, num_heads, **options)
        self.drop = nn.Dropout(drop)
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden), nn.ReLU(), nn.Dropout(drop), nn.Linear(hidden, dim), nn.Dropout(drop)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attn(self.norm1(x)))
        return x + self.mlp(self.norm2(x))

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Flax parameters of `SelfAttSqrtnLayer` and its kind to ours."""
        inner = {name: value for name, value in state.items() if name.startswith("_")}
        outer = {name: value for name, value in state.items() if name not in inner}
        renamed = {f"attn.{name}": value for name, value in _official(inner).items()}
        outer = {name: value.T if name.endswith("/kernel") else value for name, value in outer.items()}
        return renamed | rename_keys(
            outer,
            (r"^LayerNorm_0/scale$", "norm1.weight"),
            (r"^LayerNorm_0/bias$", "norm1.bias"),
            (r"^LayerNorm_1/scale$", "norm2.weight"),
            (r"^LayerNorm_1/bias$", "norm2.bias"),
            (r"^MlpBlock_0/Dense_0/kernel$", "mlp.0.weight"),
            (r"^MlpBlock_0/Dense_0/bias$", "mlp.0.bias"),
            (r"^MlpBlock_0/Dense_1/kernel$", "mlp.3.weight"),
            (r"^MlpBlock_0/Dense_1/bias$", "mlp.3.bias"),
        )


def _official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    has_row = any("DenseGeneral_2/" in name for name in state)
    flax_names = ("row_proj", "row_key", "proj") if has_row else ("proj", "", "")
    renamed = rename_keys(
        {name: _as_linear(name, value) for name, value in state.items()},
        (r"^(?:.*/)?(?:query|q)/", "to_q/"),
        (r"^(?:.*/)?(?:key|k)/", "to_k/"),
        (r"^(?:.*/)?(?:value|v)/", "to_v/"),
        (r"^(?:.*/)?DenseGeneral_(\d)/", lambda m: f"{flax_names[int(m[1])]}/"),
        (r"^(?:.*/)?LayerNorm_0/scale$", "row_norm/weight"),
        (r"^(?:.*/)?LayerNorm_0/bias$", "row_norm/bias"),
        (r"^(?:.*/)?rowmajor_param_post/dense/", "row_proj/"),
        (r"^(?:.*/)?rowmajor_param_post/dense_1/", "row_key/"),
        (r"^(?:.*/)?rowmajor_param_post/pre_norm/gamma$", "row_norm/weight"),
        (r"^(?:.*/)?rowmajor_param_post/pre_norm/beta$", "row_norm/bias"),
        (r"^(?:.*/)?dense/", "proj/"),
        (r"/kernel$", "/weight"),
    )
    return {name.replace("/", "."): value for name, value in renamed.items()}


def _as_linear(name: str, value: Tensor) -> Tensor:
    """Kernels [C, heads, d] or [heads, d, C] as (out, in) matrices, biases flat; ours pass unchanged."""
    part = name.rpartition("/")[2]
    if "/" not in name or part not in ("kernel", "weight", "bias"):
        return value
    if part == "bias" or value.dim() != 3:
        return value.flatten()
    outwards = any(word in name for word in ("DenseGeneral", "dense")) and not _into_heads(name)
    return value.flatten(0, 1).T if outwards else value.flatten(1).T


def _into_heads(name: str) -> bool:
    """Whether a kernel called only by number maps channels to heads: the second of a row summary's two."""
    return "DenseGeneral_1/" in name or "rowmajor_param_post/dense_1/" in name
