"""In-Context Linear Regression Demystified: attention heads of full width that answer a question from examples.

He, Pan, Chen, Yang (2025), arXiv 2503.12734. Code read for numbers: XintianPan/ICL_linear @ 87ed34f (no licence), `src/models.py`.

One layer: the question is not among the keys, no residual, no norm, no positions. What training makes of its weights is read by
`regard.lens.icl_circuits`; the data, reference predictors and the theory's dynamics are in `regard.testbeds.in_context`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..._checks import require, require_int, require_name, require_tensor
from ...ops import masks
from ...ops.attention import attention

__all__ = ["InContextAttention", "InContextStack"]

INITS = ("random", "small_identity", "small_identity_qk", "opposite")


class InContextAttention(nn.Module):
    """Questions attend to examples with `num_heads` softmax heads, each as wide as a token: (B, Nq, dim), (B, L, dim) -> (B, Nq, out_dim).

    out = sum over heads of O_h V_h Z softmax(Z^T K_h^T Q_h z / sqrt(dim)).

    Args:
        dim: of a token, d features and the responses. out_dim: default dim.
        init: "random" (torch's); "small_identity": 1e-6 I in queries, keys and values, and in the output where out_dim is None;
            "small_identity_qk": 1e-4 I in queries and keys; "opposite": 1e-6 I in keys, +1e-6 I in the queries of the first half
            of the heads and -1e-6 I in those of the second (num_heads even). What is not named is torch's.
        bias: of all four projections.
    """

    def __init__(
        self, dim: int, num_heads: int, out_dim: int | None = 1, *, init: str = "random", bias: bool = False
    ) -> None:
        super().__init__()
        self.dim, self.num_heads = require_int("dim", dim, 1), require_int("num_heads", num_heads, 1)
        self.out_dim = dim if out_dim is None else require_int("out_dim", out_dim, 1)
        require_name("init", init, INITS)
        require(init != "opposite" or num_heads % 2 == 0, "num_heads", num_heads, "an even number for init='opposite'")
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim * num_heads, bias=bias) for _ in range(3))
        self.o_proj = nn.Linear(dim * num_heads, self.out_dim, bias=bias)
        with torch.no_grad():
            identity = torch.eye(dim).repeat(num_heads, 1)
            if init == "small_identity":
                for to in (self.q_proj, self.k_proj, self.v_proj):
                    to.weight.copy_(1e-6 * identity)
                if out_dim is None:
                    self.o_proj.weight.copy_(1e-6 * identity.T)
            elif init != "random":
                size = 1e-4 if init == "small_identity_qk" else 1e-6
                self.q_proj.weight.copy_(size * identity)
                self.k_proj.weight.copy_(size * identity)
                if init == "opposite":
                    self.q_proj.weight[dim * num_heads // 2 :].neg_()

    def forward(self, query: Tensor, examples: Tensor | None = None) -> Tensor:
        """query (B, Nq, dim), examples (B, L, dim) -> (B, Nq, out_dim).

        Without `examples`, `query` is a whole prompt (B, L + 1, dim) whose last token asks those before it: (B, 1, out_dim).
        """
        require_tensor("query", query, dims=3, floating=True)
        if examples is None:
            require(query.shape[1] >= 1, "query", f"shape {tuple(query.shape)}", "a prompt of at least the question")
            query, examples = query[:, -1:], query[:, :-1]
        require_tensor("examples", examples, dims=3, floating=True)
        for name, given in (("query", query), ("examples", examples)):
            need = f"({query.shape[0]}, n, {self.dim})"
            fits = given.shape[0] == query.shape[0] and given.shape[2] == self.dim
            require(fits, name, f"shape {tuple(given.shape)}", need)
        out = attention(
            self._heads(self.q_proj(query)), self._heads(self.k_proj(examples)), self._heads(self.v_proj(examples))
        )
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.num_heads, self.dim)).transpose(1, 2)

    def circuits(self) -> tuple[Tensor, Tensor]:
        """KQ (H, dim, dim), whose entry [i, j] is the weight of token entry i times question entry j in the scores (before the
        division by sqrt(dim)), and OV (H, dim, out_dim), from token entry to output. Differentiable; biases are not in them."""
        q, k, v = (to.weight.unflatten(0, (self.num_heads, self.dim)) for to in (self.q_proj, self.k_proj, self.v_proj))
        o = self.o_proj.weight.T.unflatten(0, (self.num_heads, self.dim))
        return k.transpose(1, 2) @ q, v.transpose(1, 2) @ o

    @torch.no_grad()
    def set_pattern(self, omega: Tensor, mu: Tensor) -> None:
        """Write the pattern that the paper finds: KQ_h = diag(w_h, ..., w_h, 0) with w_h = sqrt(dim) omega_h, OV_h = (0, ..., 0, mu_h).

        omega, mu (num_heads,): then the layer is `testbeds.in_context.softmax_heads`. For out_dim = 1 without biases.
        """
        require(self.out_dim == 1 and self.o_proj.bias is None, "out_dim", self.out_dim, "1, and bias=False")
        for name, given in (("omega", omega), ("mu", mu)):
            require_tensor(name, given, floating=True)
            need = f"shape ({self.num_heads},)"
            require(given.shape == (self.num_heads,), name, f"shape {tuple(given.shape)}", need)
        features = torch.eye(self.dim, dtype=self.q_proj.weight.dtype, device=self.q_proj.weight.device)
        features[-1, -1] = 0
        self.q_proj.weight.copy_(torch.cat([features * float(w) * self.dim**0.5 for w in omega]))
        self.k_proj.weight.copy_(features.repeat(self.num_heads, 1))
        last = torch.zeros_like(features)
        last[-1, -1] = 1
        self.v_proj.weight.copy_(last.repeat(self.num_heads, 1))
        self.o_proj.weight.copy_(torch.cat([last[-1:] * float(m) for m in mu], dim=1))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, out_dim={self.out_dim}"


class _CausalLayer(InContextAttention):
    """A layer of the stack: every token attends to itself and to those before it."""

    def __init__(self, dim: int, num_heads: int, variant: str) -> None:
        super().__init__(dim, num_heads, None)
        self.variant = variant

    def forward(self, query: Tensor, examples: Tensor | None = None) -> Tensor:
        q, k, v = (self._heads(to(query)) for to in (self.q_proj, self.k_proj, self.v_proj))
        if self.variant == "paper":
            out = attention(q, k, v, mask=masks.causal)
        else:
            weights = (q @ k.transpose(-2, -1) * self.dim**-0.5).softmax(-1)
            later = torch.ones(weights.shape[-2:], dtype=torch.bool, device=weights.device).triu(1)
            out = weights.masked_fill(later, -torch.inf).softmax(-1) @ v
        return self.o_proj(out.transpose(1, 2).flatten(2))


class InContextStack(nn.Module):
    """`depth` such layers: (query (B, 1, dim), examples (B, L, dim)) -> (B, 1, out_dim).

    One layer is `InContextAttention`. More are causal self-attention over examples and question together, each token seeing itself
    too, without residuals or norms, and a linear map of the last token.

    Args:
        depth, dim, num_heads, out_dim. tied: one set of weights for all layers.
        variant: "paper" (default): one causal softmax. "released": the authors' stacked layer takes a softmax over all tokens, later
            ones included, and then the causal softmax of those weights, which leaves them nearly even and shows the future.
    """

    def __init__(
        self,
        depth: int,
        dim: int,
        num_heads: int,
        out_dim: int = 1,
        *,
        tied: bool = False,
        variant: str = "paper",
    ) -> None:
        super().__init__()
        self.depth, self.variant = (
            require_int("depth", depth, 1),
            require_name("variant", variant, ("paper", "released")),
        )
        if depth == 1:
            self.layers = nn.ModuleList([InContextAttention(dim, num_heads, out_dim)])
            self.out: nn.Module = nn.Identity()
        else:
            shared = _CausalLayer(dim, num_heads, variant)
            made = [shared] + [shared if tied else _CausalLayer(dim, num_heads, variant) for _ in range(depth - 1)]
            self.layers = nn.ModuleList(made)
            self.out = nn.Linear(dim, require_int("out_dim", out_dim, 1), bias=False)
        self.dim, self.tied = dim, bool(tied)

    def forward(self, query: Tensor, examples: Tensor | None = None) -> Tensor:
        """As `InContextAttention`; without `examples`, `query` is the whole prompt. Stacks of two and more take one question."""
        if self.depth == 1:
            return self.layers[0](query, examples)
        require_tensor("query", query, dims=3, floating=True)
        if examples is not None:
            require_tensor("examples", examples, dims=3, floating=True)
            require(query.shape[1] == 1, "query", f"shape {tuple(query.shape)}", "one question")
            fits = examples.shape[0] == query.shape[0] and examples.shape[2] == query.shape[2]
            require(fits, "examples", f"shape {tuple(examples.shape)}", f"({query.shape[0]}, L, {self.dim})")
        x = query if examples is None else torch.cat((examples, query), dim=1)
        fits = x.shape[1] >= 1 and x.shape[2] == self.dim
        require(fits, "query", f"shape {tuple(query.shape)}", f"(B, n, {self.dim}), the question last")
        for layer in self.layers:
            x = layer(x)
        return self.out(x[:, -1:])

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """`attention_layer` and `attention_layers.N` are `layers.N`, `final_linear` is `out`; the mask's constant is left out."""
        ours: dict[str, Tensor] = {}
        for name, tensor in state.items():
            first, *rest = name.split(".")
            if first == "attention_layers" and rest[1:] == ["bias"]:
                continue
            if first == "attention_layer":
                rest = ["0", *rest]
            renamed = {"attention_layer": "layers", "attention_layers": "layers", "final_linear": "out"}.get(
                first, first
            )
            ours[".".join([renamed, *rest])] = tensor
        return ours
