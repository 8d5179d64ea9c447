"""The consciousness prior: attention that lets few elements of a large state through, and sends them back to all.

The Consciousness Prior (Bengio 2017, arXiv 1709.08568), a position paper without experiments or code of its own; a later open project
(AI-ON/TheConsciousnessPrior @ 5f30aae, no licence) is an unfinished skeleton, whose gate is `regard.ops.noisy_topk_gate`. So this is OUR
READING, and nothing is pinned to anybody's numbers: the unconscious state h is a set of n elements; the conscious state c is k of them,
chosen by content with a query made from the conscious state before (and noise); c is broadcast by letting every element attend to it.
Its training signals are in `regard.losses`: `named_prediction`, `key_usage_entropy`, `thought_contrast`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..._checks import bad_type, require, require_int, require_tensor
from ...ops.noisy_topk import noisy_topk_gate

__all__ = ["ConsciousBottleneck", "ConsciousState", "SparseFactorEnergy"]


@dataclass
class ConsciousState:
    """What is thought of now, from the strongest down.

    Attributes:
        indices: (B, k) int64, which elements. weights: (B, k), how much of each, summing to 1. values: (B, k, dim), what they are.
        count: n, of how many elements.
    """

    indices: Tensor
    weights: Tensor
    values: Tensor
    count: int

    @property
    def summary(self) -> Tensor:
        """(B, dim): the values, weighted."""
        return (self.weights[..., None] * self.values).sum(1)

    def gates(self) -> Tensor:
        """(B, n): the weights at their elements, 0 elsewhere."""
        return self.weights.new_zeros(len(self.weights), self.count).scatter(1, self.indices, self.weights)

    def scatter(self) -> Tensor:
        """(B, n, dim): the weighted values at their elements, 0 elsewhere."""
        place = self.indices[..., None].expand_as(self.values)
        made = self.values.new_zeros(len(self.values), self.count, self.values.shape[2])
        return made.scatter(1, place, self.weights[..., None] * self.values)

    def detach(self) -> ConsciousState:
        """The same, without the way back: a thought of the past."""
        return ConsciousState(self.indices, self.weights.detach(), self.values.detach(), self.count)


class ConsciousBottleneck(nn.Module):
    """h (B, n, dim), n >= k elements in any order -> `ConsciousState` of k of them.

    Scores are q . k_i / sqrt(dim), keys linear in h; q is linear in the summary of `previous` (a learned vector where there is none) and,
    with `noise`, in z ~ N(0, 1). The k largest go through a softmax. With k = n this is plain softmax attention with one query.

    Args:
        dim. k: elements that get through. noise: channels of z, drawn in training only; 0: none. gate_noise: whether in training noise of
            learned size is added to the scores, so that other choices are tried.
    """

    def __init__(self, dim: int, k: int, *, noise: int = 16, gate_noise: bool = True) -> None:
        super().__init__()
        self.dim, self.k = require_int("dim", dim, 1), require_int("k", k, 1)
        self.noise = require_int("noise", noise, 0)
        self.q_proj = nn.Linear(dim + noise, dim, bias=False)
        self.k_proj, self.v_proj = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.first = nn.Parameter(torch.randn(dim) * dim**-0.5)
        self.noise_proj = nn.Linear(dim, 1) if gate_noise else None
        self.read_q, self.read_k, self.read_v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, h: Tensor, previous: ConsciousState | None = None) -> ConsciousState:
        """h (B, n, dim); previous: the thought before."""
        self._check(h)
        batch, count, _ = h.shape
        require(count >= self.k, "h", f"{count} elements", f"at least k ({self.k})")
        if previous is None:
            before = self.first.expand(batch, -1)
        elif not isinstance(previous, ConsciousState):
            raise bad_type("previous", previous, "a ConsciousState")
        else:
            before = previous.summary
            shape = tuple(before.shape)
            require(shape == (batch, self.dim), "previous", f"a summary of shape {shape}", f"{(batch, self.dim)}")
        if self.noise:
            z = torch.randn(batch, self.noise, dtype=h.dtype, device=h.device) if self.training else None
            before = torch.cat((before, before.new_zeros(batch, self.noise) if z is None else z), dim=1)
        scores = (self.k_proj(h) @ self.q_proj(before)[..., None])[..., 0] * self.dim**-0.5
        spread = None if self.noise_proj is None else self.noise_proj(h)[..., 0]
        indices, weights = noisy_topk_gate(scores, self.k, spread, training=self.training)
        chosen = h.gather(1, indices[..., None].expand(-1, -1, self.dim))
        return ConsciousState(indices, weights, self.v_proj(chosen), count)

    def broadcast(self, h: Tensor, state: ConsciousState) -> Tensor:
        """Every element of h (B, n, dim) takes what it wants of the conscious ones: h + attention to them, (B, n, dim)."""
        self._check(h)
        if not isinstance(state, ConsciousState):
            raise bad_type("state", state, "a ConsciousState")
        q, k, v = self.read_q(h), self.read_k(state.values), self.read_v(state.values)
        # a gate's weight is a factor on its element's share: what was hardly let through is hardly heard
        scores = q @ k.mT * self.dim**-0.5 + state.weights.clamp_min(1e-30).log()[:, None]
        return h + self.out_proj(scores.softmax(-1) @ v)

    def _check(self, h: Tensor) -> None:
        require_tensor("h", h, dims=3, floating=True)
        require(h.shape[2] == self.dim, "h", f"shape {tuple(h.shape)}", f"(B, n, {self.dim})")

    def extra_repr(self) -> str:
        return f"dim={self.dim}, k={self.k}, noise={self.noise}"


class SparseFactorEnergy(nn.Module):
    """Energy of a sparse factor graph: values (..., n) -> sum_j f_j(S_j) (...), each factor reading `size` variables.

    A factor has `size` slots; each slot attends over the n variables (softmax of learned scores) and hands its value to the factor's MLP.
    Low energy is likely. Train with `regard.losses.factor_contrast`;
    `weight * slot_entropy()` beside it makes slots settle on one variable each.

    Args:
        num_variables: n. num_factors: how many f. size: variables a factor may touch, at most n. hidden: width of its MLP.
        hard: each slot reads its likeliest variable alone; gradients as if it were soft.
    """

    def __init__(
        self, num_variables: int, num_factors: int, size: int = 2, hidden: int = 16, *, hard: bool = False
    ) -> None:
        super().__init__()
        self.num_variables = require_int("num_variables", num_variables, 1)
        require_int("num_factors", num_factors, 1)
        require(require_int("size", size, 1) <= num_variables, "size", size, f"at most num_variables ({num_variables})")
        require_int("hidden", hidden, 1)
        self.hard = bool(hard)
        self.scores = nn.Parameter(torch.randn(num_factors, size, num_variables) * 0.1)
        self.w1 = nn.Parameter(torch.randn(num_factors, size, hidden) * size**-0.5)
        self.b1 = nn.Parameter(torch.zeros(num_factors, hidden))
        self.w2 = nn.Parameter(torch.randn(num_factors, hidden) * hidden**-0.5)
        self.bias = nn.Parameter(torch.zeros(()))

    def reads(self) -> Tensor:
        """(factors, size, n): how much each slot reads of each variable, summing to 1."""
        soft = self.scores.softmax(-1)
        if not self.hard:
            return soft
        one = torch.zeros_like(soft).scatter(-1, soft.argmax(-1, keepdim=True), 1.0)
        return one + (soft - soft.detach())

    def forward(self, values: Tensor) -> Tensor:
        """values (..., n) -> energies (...)."""
        require_tensor("values", values, floating=True)
        fits = values.dim() > 0 and values.shape[-1] == self.num_variables
        require(fits, "values", f"shape {tuple(values.shape)}", f"(..., {self.num_variables})")
        taken = torch.einsum("...n,jsn->...js", values, self.reads())
        inner = torch.tanh(torch.einsum("...js,jsh->...jh", taken, self.w1) + self.b1)
        return (inner * self.w2).sum((-1, -2)) + self.bias

    def slot_entropy(self) -> Tensor:
        """Mean entropy of the slots' reads, in nats: 0 where each slot reads one variable."""
        reads = self.scores.softmax(-1)
        return -(reads * reads.clamp_min(1e-30).log()).sum(-1).mean()

    @torch.no_grad()
    def scopes(self) -> list[frozenset[int]]:
        """The variables that each factor reads, by its slots' likeliest."""
        return [frozenset(row.tolist()) for row in self.scores.argmax(-1)]
