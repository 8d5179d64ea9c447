"""One form for attention, state space models and recurrent networks: a linear system that varies in time.

h_i = Lambda_i h_(i-1) + B_i u_i, y_i = C_i h_i + D_i u_i, Lambda_i diagonal, h before the first step 0. Understanding the differences in
Foundation Models (Sieber et al. 2024, NeurIPS, arXiv 2405.15731), equation 2; what differs: complex diagonals are allowed (S4D).
`regard.nn.as_ltv` gives the system that a layer is on an input.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..._checks import require, require_name, require_tensor
from .linear_scan import linear_scan

__all__ = ["LTV", "selective_ssm_ltv"]

MODES = ("parallel", "recurrent", "matrix")


@dataclass
class LTV:
    """A linear time-varying system, written out: for looking and for checking, not for speed.

    Attributes:
        decay: Lambda, (B, N, S), real or complex. drive: B, (B, N, S, U). readout: C, (B, N, Y, S). skip: D, (B, N, Y, U), or None.
        u: (B, N, U), the input that the system was read off with, or None.
        Sizes of 1 for batch and time stand for "the same everywhere"; decay must have its time axis whole.
    """

    decay: Tensor
    drive: Tensor
    readout: Tensor
    skip: Tensor | None = None
    u: Tensor | None = None

    def __post_init__(self) -> None:
        require_tensor("decay", self.decay, dims=3)
        state = self.decay.shape[2]
        for name, tensor, axis in (("drive", self.drive, 2), ("readout", self.readout, 3)):
            require_tensor(name, tensor, dims=4)
            require(
                tensor.shape[axis] == state,
                name,
                f"shape {tuple(tensor.shape)}",
                f"{state} along axis {axis}, as `decay`",
            )
        if self.skip is not None:
            require_tensor("skip", self.skip, dims=4)
            need = (self.readout.shape[2], self.drive.shape[3])
            require(
                self.skip.shape[2:] == need, "skip", f"shape {tuple(self.skip.shape)}", f"(B, N, {need[0]}, {need[1]})"
            )

    @property
    def state_size(self) -> int:
        """Numbers in the state (a complex one counts twice)."""
        return self.decay.shape[2] * (2 if self.decay.is_complex() else 1)

    def run(self, u: Tensor | None = None, mode: str = "parallel") -> Tensor:
        """u (B, N, U), default the input that it was read off with -> y (B, N, Y).

        mode: "recurrent": step by step, the definition. "parallel": a scan over time. "matrix": as attention, sum_j Phi_ij u_j with
        Phi_ij = C_i Lambda_i ... Lambda_(j+1) B_j (`matrix`); N x N blocks in memory. Equal up to rounding.
        """
        require_name("mode", mode, MODES)
        u = self.u if u is None else u
        require_tensor("u", u, dims=3)
        assert u is not None
        length = self.decay.shape[1]
        fits = u.shape[1] == length and u.shape[2] == self.drive.shape[3]
        require(fits, "u", f"shape {tuple(u.shape)}", f"(B, {length}, {self.drive.shape[3]})")
        if mode == "matrix":
            return torch.einsum("bijyu,bju->biy", self.matrix(), u)
        pushed = (self.drive @ u[..., None].to(self.drive.dtype)).squeeze(-1)
        h = linear_scan(self.decay, pushed, form="recurrent" if mode == "recurrent" else "parallel")
        y = (self.readout @ h[..., None].to(self.readout.dtype)).squeeze(-1)
        y = y.real if y.is_complex() else y
        return y if self.skip is None else y + (self.skip @ u[..., None]).squeeze(-1)

    def matrix(self) -> Tensor:
        """Phi (B, N, N, Y, U), lower triangular in time: how much of input j is in output i. For softmax and linear attention this is
        weight times value map; it exists for every system."""
        length = self.decay.shape[1]
        later = torch.arange(length, device=self.decay.device)
        kept = self.decay[:, :, None].expand(-1, -1, length, -1)
        kept = torch.where((later[:, None] > later)[..., None], kept, torch.ones_like(kept)).cumprod(1)
        kept = torch.where((later[:, None] >= later)[..., None], kept, torch.zeros_like(kept))
        drive = self.drive.expand(-1, length, -1, -1)
        readout = self.readout.expand(-1, length, -1, -1)
        phi = torch.einsum("biys,bijs,bjsu->bijyu", readout, kept.to(readout.dtype), drive.to(readout.dtype))
        phi = phi.real if phi.is_complex() else phi
        if self.skip is not None:
            eye = torch.eye(length, device=phi.device, dtype=phi.dtype)
            phi = phi + eye[:, :, None, None] * self.skip.expand(-1, length, -1, -1)[:, :, None]
        return phi

    def transition_spectrum(self) -> Tensor:
        """|eigenvalues| of Lambda_i, (B, N, S), each step's in falling order: 1 keeps, 0 forgets, above 1 grows."""
        return self.decay.abs().sort(dim=-1, descending=True).values

    def memory_length(self) -> Tensor:
        """Steps over which each entry of the state falls to one half at its mean rate, (B, S); inf where nothing is forgotten."""
        rate = self.decay.abs().clamp(min=1e-30).log().mean(1)
        return torch.where(rate < 0, -0.6931471805599453 / rate.clamp(max=-1e-30), torch.inf)


def selective_ssm_ltv(x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None = None) -> LTV:
    """Mamba's selective scan (S6) as a system: state entry (channel, n), input x.

    Shapes: x, delta (B, N, C), a (C, n), b, c (B, N, n), d (C,). Lambda_i = exp(delta_i a), B_i = delta_i b_i, C_i = c_i, D = d, each
    channel on its own. With delta = softplus(z) and a = -1 a decay is sigmoid(-z): the reversed gate of the paper's qLSTM.
    """
    require_tensor("x", x, dims=3, floating=True)
    batch, length, channels = x.shape
    require(delta.shape == x.shape, "delta", f"shape {tuple(delta.shape)}", f"shape {tuple(x.shape)}")
    require(a.dim() == 2 and a.shape[0] == channels, "a", f"shape {tuple(a.shape)}", f"({channels}, n)")
    count = a.shape[1]
    for name, tensor in (("b", b), ("c", c)):
        need = (batch, length, count)
        require(tensor.shape == need, name, f"shape {tuple(tensor.shape)}", f"shape {need}")
    decay = (delta[..., None] * a).exp().flatten(2)
    eye = torch.eye(channels, dtype=x.dtype, device=x.device)
    drive = torch.einsum("blc,bln,cu->blcnu", delta, b, eye).flatten(2, 3)
    readout = torch.einsum("bln,yc->blycn", c, eye).flatten(3)
    skip = None if d is None else torch.diag(d)[None, None].expand(batch, length, -1, -1)
    return LTV(decay, drive, readout, skip, x)
