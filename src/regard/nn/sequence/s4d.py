"""S4D: a diagonal state space model as a mixer, as a convolution over the whole sequence or one step at a time.

On the Parameterization and Initialization of Diagonal State Space Models (Gu et al. 2022, arXiv 2206.11893). Code read for numbers: CAB's
package efficient_attention (Shark-NLP/CAB @ 0e49696, MIT), `modules/s4d.py`. What differs: the steps of a bidirectional layer are refused.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..._checks import require, require_int, require_shape
from .pattern_attention import PatternAttention

__all__ = ["S4D"]


class S4D(PatternAttention):
    """y = linear(gelu(C-channel state space of x + D x)), each channel of x on its own: causal self, or non-causal with two directions.

    Each of dim channels has `num_heads` outputs (twice in a bidirectional layer, which is what causal=False makes; pass
    `bidirectional=False` for CAB's default, one direction), made by a state of d_state / 2 complex numbers with shared decays.

    Args:
        d_state: real size of the state, even. dt_min, dt_max: range of the initial steps. dropout: after the activation.
        activation: gelu, or none. keys: padding is set to zero before the recurrence (it then adds nothing).
    """

    patterns = frozenset({"NS", "CS"})

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        causal: bool = False,
        cross: bool = False,
        d_state: int = 16,
        bidirectional: bool | None = None,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        activation: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, num_heads, causal, cross)
        require(require_int("d_state", d_state, 2) % 2 == 0, "d_state", d_state, "an even number")
        self.bidirectional = not causal if bidirectional is None else bidirectional
        require(not (causal and self.bidirectional), "bidirectional", bidirectional, "False in a causal layer")
        self.activation = activation
        channels, half = num_heads * (2 if self.bidirectional else 1), d_state // 2
        step = torch.rand(dim) * (math.log(dt_max) - math.log(dt_min)) + math.log(dt_min)
        # frequencies of the HiPPO matrix in the limit of large states ("inverse"); B is folded into C
        place = torch.arange(half)
        imaginary = d_state / math.pi * (d_state / (1 + 2 * place) - 1)
        rate = torch.complex(torch.full((half,), -0.5), imaginary)
        drive = torch.randn(half, dtype=torch.cfloat)
        drive = drive / (2 * (drive / rate).abs().square().sum()).sqrt()
        readout = torch.randn(channels, dim, half, dtype=torch.cfloat) * drive
        self.D = nn.Parameter(torch.randn(num_heads, dim))
        self.C = nn.Parameter(torch.view_as_real(readout.conj().resolve_conj()).contiguous())
        self.log_dt = nn.Parameter(step)
        self.log_w_real = nn.Parameter(torch.log(-rate.real + 1e-4)[None])
        self.w_imag = nn.Parameter(rate.imag.clone()[None])
        self.dropout = nn.Dropout(dropout)
        self.output_linear = nn.Linear(num_heads * dim, dim)

    def _discrete(self) -> tuple[Tensor, Tensor]:
        """log A-bar (dim, half) and C-bar (channels, dim, half), zero-order hold."""
        wide = torch.promote_types(self.C.dtype, torch.float32)  # there are no complex numbers of half types
        rate = torch.complex(-self.log_w_real.to(wide).exp(), self.w_imag.to(wide))
        log_step = rate * self.log_dt.to(wide).exp()[:, None]
        return log_step, torch.view_as_complex(self.C.to(wide)) * (log_step.exp() - 1) / rate

    def kernel(self, length: int) -> Tensor:
        """The convolution kernel (channels, dim, length)."""
        log_step, readout = self._discrete()
        powers = (log_step[..., None] * torch.arange(length, device=log_step.device)).exp()
        return 2 * torch.einsum("chn,hnl->chl", readout, powers).real

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        keys: Tensor | None = None,
        *,
        state: Tensor | None = None,
        return_state: bool = False,
    ) -> Any:
        """state: what an earlier call returned; with it, or with `return_state` (a pair comes back), tokens are taken one by one."""
        self.check(x, context, keys)
        length = x.shape[1]
        if state is not None or return_state:
            state = self.initial_state(x.shape[0]) if state is None else state
            require_shape("state", state, (x.shape[0], self.dim, self.w_imag.shape[1]))
            outs = []
            for token in (x if keys is None else x * keys[..., None].to(x.dtype)).unbind(1):
                out, state = self.step(token, state)
                outs.append(out)
            y = torch.stack(outs, dim=1) if outs else x
            return (y, state) if return_state else y
        if not length:
            return x
        u = (x if keys is None else x * keys[..., None].to(x.dtype)).transpose(1, 2)  # (B, dim, N)
        kernel = self.kernel(length)
        if self.bidirectional:
            forth, back = kernel.chunk(2)
            kernel = F.pad(forth, (0, length)) + F.pad(back.flip(-1), (length, 0))
        spectrum = torch.fft.rfft(u.to(kernel.dtype), n=2 * length)[:, None] * torch.fft.rfft(kernel, n=2 * length)
        y = torch.fft.irfft(spectrum, n=2 * length)[..., :length].to(x.dtype) + u[:, None] * self.D[..., None]
        return self._out(y.flatten(1, 2).transpose(1, 2))

    def _out(self, y: Tensor) -> Tensor:
        return self.output_linear(self.dropout(F.gelu(y) if self.activation else y))

    def initial_state(self, batch: int) -> Tensor:
        """Zeros (batch, dim, d_state / 2), complex."""
        dtype = torch.complex128 if self.C.dtype == torch.float64 else torch.complex64
        return self.log_dt.new_zeros(batch, self.dim, self.w_imag.shape[1], dtype=dtype)

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One token x (B, dim) -> (its output (B, dim), the next state): the recurrent form of a causal layer."""
        require(not self.bidirectional, "step", "a bidirectional layer", "one with a single direction")
        log_step, readout = self._discrete()
        state = log_step.exp() * state + x[..., None]
        y = 2 * torch.einsum("chn,bhn->bch", readout, state).real.to(x.dtype) + x[:, None] * self.D
        return self._out(y.flatten(1)), state

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors keep the kernel's parameters in `kernel.kernel`, the output map in a Sequential where it has an activation."""
        short = {name.removeprefix("kernel.kernel."): tensor for name, tensor in state.items()}
        return {name.replace("output_linear.0.", "output_linear."): tensor for name, tensor in short.items()}
