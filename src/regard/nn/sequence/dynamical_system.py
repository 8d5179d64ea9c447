"""Layers as linear systems that vary in time: `as_ltv(layer, x)` gives Lambda, B, C, D of attention, state space and recurrent layers.

Understanding the differences in Foundation Models (Sieber et al. 2024, NeurIPS, arXiv 2405.15731): with all of them in one form, what
tells them apart is how the state forgets, what enters it and how large it is. There: attention with features phi, psi and a normaliser
eta has
Lambda_i = eta_(i-1) / eta_i, B_i = psi(k_i) (x) W_V / eta_i, C_i = phi(q_i)^T (x) I; S6 has Lambda_i = exp(-Delta_i A); qLSTM sigmoid(f_i).
What differs: softmax attention has no such system of fixed size, here it is offered in two: with one slot of the state a token (which is
what a KV cache is), or with exp as its Taylor series of some order.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..._checks import bad_type, bad_value, require, require_int, require_tensor
from ...ops.state.feature_maps import resolve
from ...ops.state.ltv import LTV
from .linear_attention import LinearAttention, NormalizedLinearAttention
from .qlstm import QLSTM
from .rotary import rotary_table, rotate
from .s4d import S4D
from .softmax_attention import SoftmaxAttention

__all__ = ["as_ltv"]


def as_ltv(layer: nn.Module, x: Tensor, *, order: int | None = None) -> LTV:
    """The system that `layer` is on x (B, N, dim): `as_ltv(layer, x).run()` gives what the layer gives.

    `SoftmaxAttention`, `LinearAttention`, `NormalizedLinearAttention`: input u = [x, 1], output the layer's (for `LinearAttention` with
    `out_norm`, which is not linear, a ValueError). `QLSTM`: u is what comes out of its convolution. `S4D`: u = x, output before the
    activation.

    order: of softmax attention, the degree to which exp is taken as its Taylor series: a state of sum_p D^p entries a head and
        value channel, an approximation. None: exact, one entry a token.

    Raises:
        ValueError, TypeError: another kind of layer, one that is not causal, a window.
    """
    require_tensor("x", x, dims=3, floating=True)
    require(order is None or isinstance(layer, SoftmaxAttention), "order", order, "None but for SoftmaxAttention")
    require(getattr(layer, "causal", True) is True, "layer", "one that sees later tokens", "a causal layer")
    with torch.no_grad():
        if type(layer) is SoftmaxAttention:  # layers built on it compute something else
            return _softmax(layer, x, order)
        if isinstance(layer, LinearAttention):
            return _linear(layer, x)
        if isinstance(layer, QLSTM):
            return _qlstm(layer, x)
        if isinstance(layer, S4D):
            return _s4d(layer, x)
    known = "SoftmaxAttention, LinearAttention, NormalizedLinearAttention, QLSTM or S4D"
    raise bad_type("layer", layer, f"{known} (of tensors: regard.ops.state.selective_ssm_ltv)")


def _attention(
    x: Tensor, phi: Tensor, psi: Tensor, ratio: Tensor, eta: Tensor, value: nn.Linear, out: nn.Linear, groups: int = 1
) -> LTV:
    """Features (B, H, N, F), ratio eta_(i-1) / eta_i and eta (B, H, N). The state is (head, feature, value channel)."""
    batch, heads, length, features = phi.shape
    split = rearrange(value.weight, "(h d) c -> h d c", h=heads // groups)
    shift = (
        split.new_zeros(*split.shape[:2], 1) if value.bias is None else value.bias.view(heads // groups, -1)[..., None]
    )
    values = torch.cat((split, shift), dim=2).repeat_interleave(groups, 0)  # (H, D, dim + 1): u has a 1 behind x
    width = values.shape[1]
    drive = torch.einsum("bhnf,hdc->bnhfdc", psi / eta[..., None], values).flatten(2, 4)
    back = rearrange(out.weight, "y (h d) -> y h d", h=heads)
    readout = torch.einsum("bhnf,yhd->bnyhfd", phi, back).flatten(3)
    decay = rearrange(ratio, "b h n -> b n h 1").expand(batch, length, heads, features * width).flatten(2)
    skip = None
    if out.bias is not None:
        skip = x.new_zeros(1, 1, len(out.bias), values.shape[2])
        skip[..., -1] = out.bias
        skip = skip.expand(batch, length, -1, -1)
    return LTV(decay, drive, readout, skip, torch.cat((x, torch.ones_like(x[..., :1])), dim=2))


def _heads(layer: nn.Module, x: Tensor, *names: str) -> list[Tensor]:
    width = layer.head_dim if isinstance(layer, SoftmaxAttention) else layer.q_proj.out_features // layer.num_heads  # type: ignore
    made = [rearrange(getattr(layer, name)(x), "b n (h d) -> b h n d", d=width) for name in names]
    if isinstance(layer, SoftmaxAttention):
        made = [layer.q_norm(made[0]), layer.k_norm(made[1])]
    if layer.rope_base is not None:
        dims: Any = getattr(layer, "rope_dims", width)
        table = rotary_table(torch.arange(x.shape[1], device=x.device), dims, layer.rope_base)  # type: ignore[arg-type]
        made = [rotate(one, table) for one in made]
    return made


def _shifted(eta: Tensor) -> Tensor:
    """eta_(i-1) / eta_i; before the first step the state is 0, whatever it is multiplied by."""
    before = torch.cat((torch.zeros_like(eta[..., :1]), eta[..., :-1]), dim=-1)
    return before / eta


def _linear(layer: LinearAttention, x: Tensor) -> LTV:
    if layer.norm is not None:
        raise bad_value("layer", "out_norm=True", "a layer whose output is linear in its state")
    q, k = _heads(layer, x, "q_proj", "k_proj")
    map_q, map_k = resolve(layer.feature_map)
    phi, psi = map_q(q), map_k(k)
    phi = phi if layer.scale is None else phi * layer.scale
    keep = torch.ones_like(phi[..., 0])
    if layer.decay_proj is not None:
        keep = (-F.softplus(layer.decay_proj(x))).exp().transpose(1, 2)
    if isinstance(layer, NormalizedLinearAttention):
        eta = layer.eta(x)
    elif layer.normalize:
        sums, held = [], torch.zeros_like(psi[:, :, 0])
        for step in range(x.shape[1]):
            held = keep[:, :, step, None] * held + psi[:, :, step]
            sums.append((phi[:, :, step] * held).sum(-1))
        eta = torch.stack(sums, dim=-1) + layer.eps
    else:
        eta = torch.ones_like(keep)
    return _attention(x, phi, psi, keep * _shifted(eta), eta, layer.v_proj, layer.out_proj)


def _softmax(layer: SoftmaxAttention, x: Tensor, order: int | None) -> LTV:
    require(layer.window is None, "layer", f"window={layer.window}", "no window: what leaves it does not decay")
    q, k = _heads(layer, x, "q_proj", "k_proj")
    groups = layer.num_heads // layer.num_kv_heads
    k = k.repeat_interleave(groups, 1)
    q = q * layer.head_dim**-0.5
    causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
    if order is None:
        scores = q @ k.transpose(-1, -2)
        top = scores.masked_fill(~causal, -torch.inf).amax((-1, -2), keepdim=True)  # one factor for all: it cancels
        weights = (scores - top).exp()
        phi = weights * causal
        psi = torch.eye(x.shape[1], dtype=x.dtype, device=x.device).expand(*k.shape[:2], -1, -1)
    else:
        phi, psi = (_taylor(one, require_int("order", order, 0)) for one in (q, k))
    eta = (phi @ psi.transpose(-1, -2)).masked_fill(~causal, 0).sum(-1)
    return _attention(x, phi, psi, _shifted(eta), eta, layer.v_proj, layer.o_proj, groups)


def _taylor(x: Tensor, order: int) -> Tensor:
    """(..., D) -> (..., 1 + D + ... + D^order): products of two such vectors are sum_p (x y)^p / p!."""
    power = torch.ones_like(x[..., :1])
    made = [power]
    for degree in range(1, order + 1):
        power = (power[..., None] * x[..., None, :]).flatten(-2)
        made.append(power / math.sqrt(math.factorial(degree)))
    return torch.cat(made, dim=-1)


def _qlstm(layer: QLSTM, x: Tensor) -> LTV:
    decay, enter, inner, factor, _ = layer.parts(x)
    return LTV(decay, torch.diag_embed(enter), layer.output.weight * factor[:, :, None], None, inner)


def _s4d(layer: S4D, x: Tensor) -> LTV:
    log_step, readout = layer._discrete()  # (dim, half), (channels, dim, half)
    channels, dim, half = readout.shape
    length = x.shape[1]
    eye = torch.eye(dim, dtype=readout.dtype, device=x.device)
    decay = log_step.exp().flatten().expand(x.shape[0], length, -1)
    drive = eye.repeat_interleave(half, 0)[None, None].expand(x.shape[0], 1, -1, -1)
    # output (channel, dim) reads the states of its own dim
    out = 2 * torch.einsum("ceh,de->cdeh", readout, eye).reshape(1, 1, channels * dim, dim * half)
    skip = torch.diag_embed(layer.D).reshape(1, 1, channels * dim, dim)
    return LTV(decay, drive, out, skip, x)
