"""qLSTM: an LSTM whose gates depend on the input alone, so that it is a linear recurrence; with the decay of a state space model if wanted.

Understanding the differences in Foundation Models (Sieber et al. 2024, NeurIPS, arXiv 2405.15731); code read for numbers:
IntelligentControlSystems/dsf-mqar @ 7c5aff8 (Apache-2.0), `zoology/mixers/lstm.py` (`qLSTM`), whose scan is a CUDA kernel. What differs: a
state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..._checks import bad_type, require, require_int, require_shape, require_tensor
from ...ops.state.linear_scan import linear_scan

__all__ = ["QLSTM", "QLSTMState"]


@dataclass
class QLSTMState:
    """What the layer carries while decoding: h (B, hidden), and the convolution's last `kernel_size - 1` inputs, (B, k - 1, hidden)."""

    h: Tensor
    before: Tensor


class QLSTM(nn.Module):
    """h_t = a_t h_(t-1) + sigmoid(i_t) x_t, y_t = W (gelu(g_t) sigmoid(o_t) h_t): (B, N, dim) -> (B, N, dim), causal.

    x comes out of a causal convolution, g beside it; i, o and the forget gate f are linear in x.

    Args:
        dim. num_heads: taken so that it can stand where attention stands; not used. expansion: hidden channels over dim.
        kernel_size: of the convolution.
        reverse: a_t = sigmoid(-f_t) ** relu(alpha), alpha a learned number, 1 at first: the decay of Mamba, exp(-softplus(f)).
            False: sigmoid(f_t).

    The input has no factor 1 - a_t. Parameter names are the authors'.
    """

    causal = True

    def __init__(
        self, dim: int, num_heads: int = 1, *, expansion: float = 2.0, kernel_size: int = 4, reverse: bool = True
    ) -> None:
        super().__init__()
        self.dim, self.hidden = require_int("dim", dim, 1), int(dim * expansion)
        require(self.hidden >= 1, "expansion", expansion, "at least one hidden channel")
        self.kernel_size, self.reverse = require_int("kernel_size", kernel_size, 1), bool(reverse)
        hidden = self.hidden
        self.input = nn.Linear(dim, 2 * hidden, bias=False)
        self.conv = nn.Conv1d(hidden, hidden, kernel_size, groups=hidden)
        self.gates = nn.Linear(hidden, 3 * hidden)
        self.output = nn.Linear(hidden, dim, bias=False)
        self.alpha = nn.Parameter(torch.tensor(1.0))
        nn.init.normal_(self.input.weight, std=dim**-0.5)
        for layer in (self.gates, self.output):
            nn.init.normal_(layer.weight, std=hidden**-0.5)

    def parts(self, x: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(decay a, input gate, convolved input, factor on h, the convolution's last inputs), (B, N, hidden) but the last."""
        gate, x = self.input(x).chunk(2, dim=-1)
        before = x.new_zeros(x.shape[0], self.kernel_size - 1, self.hidden) if before is None else before
        whole = torch.cat((before, x), dim=1)
        x = self.conv(whole.transpose(1, 2)).transpose(1, 2)
        forget, enter, leave = self.gates(x).chunk(3, dim=-1)
        decay = forget.sigmoid()
        if self.reverse:
            decay = (F.relu(self.alpha) * F.logsigmoid(-forget)).exp()
        return (
            decay,
            enter.sigmoid(),
            x,
            F.gelu(gate) * leave.sigmoid(),
            whole[:, whole.shape[1] - self.kernel_size + 1 :],
        )

    def forward(self, x: Tensor, *, state: QLSTMState | None = None, return_state: bool = False) -> Any:
        """x (B, N, dim) -> (B, N, dim), or (that, QLSTMState) with `return_state`; `state`: what an earlier call returned."""
        require_tensor("x", x, dims=3, floating=True)
        require(x.shape[2] == self.dim, "x", f"shape {tuple(x.shape)}", f"(B, N, {self.dim})")
        if state is not None and not isinstance(state, QLSTMState):
            raise bad_type("state", state, "a QLSTMState")
        if state is not None:
            require_shape("state.h", state.h, (x.shape[0], self.hidden))
            require_shape("state.before", state.before, (x.shape[0], self.kernel_size - 1, self.hidden))
        if not x.shape[1]:
            zero = x.new_zeros(x.shape[0], self.hidden)
            empty = (
                QLSTMState(zero, x.new_zeros(x.shape[0], self.kernel_size - 1, self.hidden)) if state is None else state
            )
            return (x, empty) if return_state else x
        decay, enter, inner, factor, before = self.parts(x, None if state is None else state.before)
        h = linear_scan(decay, enter * inner, None if state is None else state.h)
        y = self.output(factor * h)
        return (y, QLSTMState(h[:, -1], before)) if return_state else y

    def extra_repr(self) -> str:
        return f"dim={self.dim}, hidden={self.hidden}, reverse={self.reverse}"
