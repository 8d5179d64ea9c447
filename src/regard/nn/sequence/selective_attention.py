"""Selective self-attention: an inverse temperature of each token's own on its query and its value.

Paper: "Selective Attention: Enhancing Transformer through Principled Context Control" (Zhang et al. 2024, arXiv 2411.12892). Code read
for numbers: umich-sota/selective_attention @ 4ea6520 (Apache-2.0), `gpt_2_PTS.py`, `model_finetune_att.py` and
`model_finetune_att_no_func.py`. That code has the position part alone and for queries alone (variant "released"); the token part and
the values' temperature ("paper") are built from the paper's text and were compared with no code of its authors. Their code counts the rows
of each call from 1; here positions go on in decoding. Their ablation that keeps the largest scores only is not built.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..._checks import require, require_name, require_tensor
from ..layers import split_grouped_qkv
from .softmax_attention import SoftmaxAttention

__all__ = ["SelectiveAttention", "position_temperature", "spikiness"]

GROWTHS = ("exp", "linear", "sigmoid")
BETAS = {"exp": 1.5, "linear": 1e-5, "sigmoid": 0.0}


def position_temperature(positions: Tensor, beta: Tensor, growth: str = "exp") -> Tensor:
    """1 + r(beta) log(position + 1): how much sharper a token at a position (from 0) looks, so that attention does not thin out.

    growth: r is "exp", exp(-exp(beta)), as released; "linear", beta itself, their other variant; "sigmoid", of beta, as in the paper.
    At position 0 it is 1. At least float32.
    """
    require_tensor("positions", positions)
    require_name("growth", growth, GROWTHS)
    rate = {"exp": lambda: torch.exp(-torch.exp(beta)), "linear": lambda: beta, "sigmoid": lambda: torch.sigmoid(beta)}
    return 1 + rate[growth]() * (positions + 1).to(torch.promote_types(beta.dtype, torch.float32)).log()


def spikiness(weights: Tensor, seen: Tensor | int | None = None) -> Tensor:
    """|s|_1 / (L |s|_2^2) of each row s (..., L) of attention weights: 1 / L for a single spike, 1 for a uniform row.

    seen: how many entries of a row count as L, broadcast against (...); default all. Rows of zeros give 0.
    """
    require_tensor("weights", weights, floating=True)
    weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
    length = weights.shape[-1] if seen is None else seen
    squares = length * weights.square().sum(-1)
    return torch.where(squares > 0, weights.abs().sum(-1) / squares, 0.0)


class SelectiveAttention(SoftmaxAttention):
    """Causal softmax attention with temperatures: (B, N, dim) -> (B, N, dim).

    Args:
        dim, num_heads, options (num_kv_heads, head_dim, window, rope_base, qk_norm, bias, dropout): as of `SoftmaxAttention`.
        variant: "released": queries times 1 + r log n for the n-th token, one learned number a layer. "paper": queries and values times
            t(x) + 1 + sigmoid(beta) log n, t(x) = tanh(w gelu(W x)) with the layer's own query or value projection as W.
        growth, beta: r and what beta begins at (`position_temperature`); default "exp" and 1.5 as released for training from scratch (2.0
            for finetuning), "sigmoid" and 0 for "paper".
        token, position, value: whether t(x), the positions, and temperatures of values take part; all of "paper" alone.
        shared: False: t(x) from a small network of its own, dim -> dim / 8 -> 1, in place of the projections ("paper").

    w starts at zero. Temperatures are one number a token, the same for all heads. Tokens that `padding_mask` hides count as positions.
    Errors: ValueError or TypeError naming the argument.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        causal: bool = True,
        *,
        variant: str = "released",
        growth: str | None = None,
        beta: float | None = None,
        token: bool = True,
        position: bool = True,
        value: bool = True,
        shared: bool = True,
        **options: Any,
    ) -> None:
        require(bool(causal), "causal", causal, "True: temperatures follow how many tokens are seen")
        super().__init__(dim, num_heads, True, **options)
        self.variant = require_name("variant", variant, ("released", "paper"))
        paper = variant == "paper"
        given = (token, position, value, shared)
        require(paper or all(given), "token, position, value, shared", given, "all True where not variant='paper'")
        self.growth = ("sigmoid" if paper else "exp") if growth is None else require_name("growth", growth, GROWTHS)
        start = BETAS[self.growth] if beta is None else float(beta)
        self.token, self.shared = paper and token, shared
        sides = ("q", "v") if paper and value else ("q",)
        self.beta = nn.Parameter(torch.tensor(start)) if position else None
        self.value_beta = nn.Parameter(torch.tensor(start)) if position and "v" in sides else None
        heads = {"q": num_heads, "v": self.num_kv_heads}
        self.scores = nn.ParameterDict()
        self.scorers = nn.ModuleDict()
        if self.token and shared:
            self.scores.update({side: nn.Parameter(torch.zeros(heads[side], self.head_dim)) for side in sides})
        elif self.token:
            hidden = max(1, dim // 8)
            for side in sides:
                last = nn.Linear(hidden, 1, bias=False)
                nn.init.zeros_(last.weight)
                self.scorers[side] = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), last)
        self.tempers_values = "v" in sides

    def temperatures(self, x: Tensor, past: int = 0) -> tuple[Tensor, Tensor | None]:
        """Inverse temperatures of queries and of values (None: untouched), (B, N) each; x's first token is at position `past`."""
        require_tensor("x", x, dims=3, floating=True)
        queries, _, values = self._project(x)
        of_values = self._temperature("v", values, x, past) if self.tempers_values else None
        return self._temperature("q", queries, x, past), of_values

    def _temperature(self, side: str, projected: Tensor, x: Tensor, past: int) -> Tensor:
        beta = self.beta if side == "q" else self.value_beta
        places = torch.arange(past, past + x.shape[1], device=x.device)
        made = x.new_ones(1, x.shape[1]) if beta is None else position_temperature(places, beta, self.growth)[None]
        if side in self.scores:
            score = torch.einsum("bhnd,hd->bn", F.gelu(projected), self.scores[side])
        elif side in self.scorers:
            score = self.scorers[side](x)[..., 0]
        else:
            return made.to(x.dtype).expand(len(x), -1)
        return (made + score.tanh()).to(x.dtype)

    def _temper(self, q: Tensor, v: Tensor, x: Tensor, past: int) -> tuple[Tensor, Tensor]:
        # the paper's W x is the projection before any norm
        normed = "q" in self.scores and not isinstance(self.q_norm, nn.Identity)
        before = self._project(x)[0] if normed else q
        q = q * self._temperature("q", before, x, past)[:, None, :, None]
        if self.tempers_values:
            v = v * self._temperature("v", v, x, past)[:, None, :, None]
        return q, v

    def official_keys(self, state: dict[str, Tensor]) -> dict[str, Tensor]:  # type: ignore[override]
        """The authors' GPT-2 (`c_attn`, `c_proj`) and lit-gpt (`attn`, `proj`, each group's queries, key and value in a row) layers."""
        ours = {}
        for name, tensor in state.items():
            head, _, kind = name.rpartition(".")
            if head == "c_attn":
                parts = tensor.chunk(3)
            elif head == "attn":
                parts = split_grouped_qkv(tensor, self.num_heads, self.num_kv_heads, self.head_dim)
            else:
                ours[f"o_proj.{kind}" if head in ("c_proj", "proj") else name] = tensor
                continue
            ours |= {f"{side}_proj.{kind}": part for side, part in zip("qkv", parts)}
        return ours

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, variant={self.variant!r}, growth={self.growth!r}"
