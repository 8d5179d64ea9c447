"""Neural memory: a small MLP whose weights are the state, trained inside the forward pass by gradient steps with momentum and decay.

Titans: Learning to Memorize at Test Time (Behrouz et al. 2025, arXiv 2501.00663), sections 3.1 and 3.2; no code by the authors. Token t
is stored by S_t = eta_t S_(t-1) - theta_t grad |M(k_t) - v_t|^2, W_t = (1 - alpha_t) W_(t-1) + S_t, and read by M with the weights W_t.
The gradients of a chunk are all taken at the weights of its start, so its steps are two linear recurrences in time. A token's
gradient for one matrix has rank one; hence no weights are made but those at the ends of chunks: within a chunk each layer of each
read is an attention to the chunk's own gradients, whose weights are products of decays.

The re-implementation that most people use (lucidrains/titans-pytorch @ cc016eb, MIT; read for numbers) lets several tokens share one
step of momentum and decay: `update_size`; its loss is the mean over channels: `step` divided by D.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._checks import bad_type, bad_value, require, require_int, require_name, require_tensor
from .linear_scan import linear_scan
from .tensors import accumulate_dtype, no_autocast

__all__ = ["NeuralMemoryState", "memory_gradient", "memory_read", "neural_memory"]

Weights = tuple[Tensor, ...]
FORMS = ("chunk", "recurrent")
_BLOCK = 64  # updates computed together where the gradients' weights never change: a matter of speed alone


def _gelu_slope(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x * 0.5**0.5)) + x * torch.exp(-0.5 * x * x) * (0.5 / torch.pi) ** 0.5


def _silu_slope(x: Tensor) -> Tensor:
    gate = torch.sigmoid(x)
    return gate * (1 + x * (1 - gate))


ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "gelu": (F.gelu, _gelu_slope),
    "silu": (F.silu, _silu_slope),
    "relu": (F.relu, lambda x: (x > 0).to(x.dtype)),
    "tanh": (torch.tanh, lambda x: 1 - torch.tanh(x).square()),
}
"""Between the layers of a memory: the function and its derivative."""


@dataclass
class NeuralMemoryState:
    """A memory between two calls.

    Attributes:
        weights: of the memory, each with (B, H) in front: matrices (d_in, d_out), the first from D and the last to D channels; after
            them perhaps a vector (D), which makes the memory x + LayerNorm(mlp(x)) * (1 + vector).
        momentum: S, of the same shapes. anchor: the weights at which the gradients of the open chunk are taken.
        position: tokens stored so far.
    """

    weights: Weights
    momentum: Weights
    anchor: Weights
    position: int = 0

    @classmethod
    def start(cls, weights: Sequence[Tensor], batch: int) -> NeuralMemoryState:
        """The state before the first token: the weights (H, ...) for each of `batch` rows, no momentum. Half types become float32."""
        require_int("batch", batch, 0)
        if not len(weights):
            raise bad_value("weights", weights, "at least one matrix (H, D, D)")
        width = None
        for place, weight in enumerate(weights):
            require_tensor(f"weights[{place}]", weight, floating=True)
            matrix = weight.dim() == 3 and (width is None or weight.shape[1] == width)
            vector = place > 0 and place == len(weights) - 1 and weight.dim() == 2 and weight.shape[1] == width
            need = f"(H, {'D' if width is None else width}, d), or after the matrices (H, D)"
            require(matrix or vector, f"weights[{place}]", f"shape {tuple(weight.shape)}", need)
            width = weight.shape[-1]
        require(weights[0].shape[1] == width, "weights", f"a memory to {width} channels", f"{weights[0].shape[1]}")
        wide = tuple(w.to(accumulate_dtype(w.dtype)).expand(batch, *w.shape) for w in weights)
        return cls(wide, tuple(torch.zeros_like(w) for w in wide), wide)

    def detach(self) -> NeuralMemoryState:
        """The same numbers, without the way back to earlier tokens."""
        return self._each(Tensor.detach)

    def select(self, rows: Tensor) -> NeuralMemoryState:
        """Batch row i becomes what row `rows[i]` was."""
        return self._each(lambda w: w[rows])

    def _each(self, change: Callable[[Tensor], Tensor]) -> NeuralMemoryState:
        weights, momentum, anchor = (tuple(map(change, part)) for part in (self.weights, self.momentum, self.anchor))
        return NeuralMemoryState(weights, momentum, anchor, self.position)


def memory_read(weights: Weights, x: Tensor, activation: str = "gelu") -> Tensor:
    """M(x): x (B, H, N, D) through the memory with these weights (those of a `NeuralMemoryState`). Nothing is stored."""
    act = ACTIVATIONS[require_name("activation", activation, ACTIVATIONS)][0]
    matrices, vector = _parts(weights)
    out = x = x.to(weights[0].dtype)
    for place, matrix in enumerate(matrices):
        out = (act(out) if place else out) @ matrix
    return out if vector is None else x + _normed(out) * (1 + vector[:, :, None])


def _parts(weights: Weights) -> tuple[Weights, Tensor | None]:
    """(matrices, vector or None)."""
    return (weights[:-1], weights[-1]) if weights[-1].dim() == 3 else (weights, None)


def _normed(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


@dataclass
class _Slopes:
    """Per-token gradients: of matrix l the outer product of inputs[l] and errors[l] (B, H, N, d); of the vector, `vector`."""

    inputs: list[Tensor]
    errors: list[Tensor]
    vector: Tensor | None


def _slopes(weights: Weights, k: Tensor, v: Tensor, activation: str) -> _Slopes:
    """Gradients of |M(k_t) - v_t|^2 token by token, written out: so they have gradients themselves, and are kept as factors."""
    act, slope = ACTIVATIONS[activation]
    matrices, vector = _parts(weights)
    inputs: list[Tensor] = [k]
    before: list[Tensor] = []
    for place, matrix in enumerate(matrices):
        if place:
            inputs.append(act(before[-1]))
        before.append(inputs[-1] @ matrix)
    out, of_vector = before[-1], None
    if vector is None:
        error = 2 * (out - v)
    else:
        normed = _normed(out)
        wrong = 2 * (k + normed * (1 + vector[:, :, None]) - v)
        of_vector, inner = wrong * normed, wrong * (1 + vector[:, :, None])
        scale = (out.var(-1, correction=0, keepdim=True) + 1e-5).rsqrt()
        error = scale * (inner - inner.mean(-1, keepdim=True) - normed * (inner * normed).mean(-1, keepdim=True))
    errors = [error]
    for place in range(len(matrices) - 1, 0, -1):
        errors.append(errors[-1] @ matrices[place].mT * slope(before[place - 1]))
    return _Slopes(inputs, errors[::-1], of_vector)


def memory_gradient(weights: Weights, k: Tensor, v: Tensor, step: Tensor, activation: str = "gelu") -> Weights:
    """Gradient of sum_t step_t |M(k_t) - v_t|^2 with respect to each of the weights. k, v (B, H, N, D), step (B, H, N)."""
    require_name("activation", activation, ACTIVATIONS)
    return _summed(_slopes(weights, k, v, activation), step)


def _summed(slopes: _Slopes, factor: Tensor) -> Weights:
    made = [(a * factor[..., None]).mT @ e for a, e in zip(slopes.inputs, slopes.errors)]
    return (*made, *([] if slopes.vector is None else [(slopes.vector * factor[..., None]).sum(2)]))


def neural_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: NeuralMemoryState,
    step: Tensor,
    momentum: Tensor | None = None,
    forget: Tensor | None = None,
    *,
    chunk_size: int | None = 16,
    update_size: int = 1,
    seen: Sequence[int] | None = None,
    activation: str = "gelu",
    form: str = "chunk",
) -> tuple[Tensor, NeuralMemoryState]:
    """Store k, v token by token and read q; ((B, H, N, D) in q's dtype, the state after the last token).

    Args:
        q, k, v: (B, H, N, D). state: where it begins: `NeuralMemoryState.start(weights, batch)`, or what an earlier call returned.
        step: theta >= 0, (B, H, N): length of a token's gradient step; 0 where a token is not to be stored.
        momentum: eta in [0, 1], (B, H, N / update_size); None: 0. forget: alpha in [0, 1], likewise; None: 0.
        chunk_size: tokens whose gradients are taken at the same weights, counted from the first token ever stored; 1: each at the newest;
            None: all at the weights of `state.anchor`, for ever.
        update_size: tokens that make one step of momentum and decay together, their gradients summed; k must come in whole steps.
        seen: for each query how many of this call's steps it sees, rising; q may then have another length than k. Default (with
            update_size 1): query t sees steps 0 to t, its own included.
        activation: between the memory's layers, one of gelu, silu, relu, tanh.
        form: "chunk", in parallel within chunks; "recurrent", the definition: one step after the other, with every gradient made.

    Half types are computed in float32. Gradients reach q, k, v, step, momentum, forget and the first weights.
    """
    _check(q, k, v, state, step, momentum, forget, require_int("update_size", update_size, 1))
    require_name("activation", activation, ACTIVATIONS)
    require_name("form", form, FORMS)
    steps = k.shape[2] // update_size
    if chunk_size is not None:
        whole = require_int("chunk_size", chunk_size, 1) % update_size == 0
        require(whole, "chunk_size", chunk_size, f"a multiple of update_size ({update_size})")
    if seen is None:
        fits = update_size == 1 and q.shape[2] == k.shape[2]
        require(fits, "seen", None, "a count for each query, where update_size is not 1 or q and k differ in length")
        seen = range(1, steps + 1)
    rising = all(a <= b for a, b in pairwise(seen)) and (not len(seen) or 0 <= seen[0] <= seen[-1] <= steps)
    require(len(seen) == q.shape[2] and rising, "seen", list(seen)[:8], f"{q.shape[2]} rising counts from 0 to {steps}")
    dtype = state.weights[0].dtype
    given = [q, k, v, step, momentum, forget]
    q, k, v, step, momentum, forget = (t if t is None else t.to(dtype) for t in given)  # type: ignore[assignment]
    with no_autocast(q.device):
        if form == "recurrent":
            out, state = _recurrent(q, k, v, state, step, momentum, forget, chunk_size, update_size, seen, activation)
        else:
            out, state = _chunked(q, k, v, state, step, momentum, forget, chunk_size, update_size, seen, activation)
    return out.to(given[0].dtype), state  # type: ignore[union-attr]


def _recurrent(
    q: Tensor, k: Tensor, v: Tensor, state: NeuralMemoryState, step: Tensor, momentum: Tensor | None, forget: Tensor | None,
    chunk_size: int | None, size: int, seen: Sequence[int], activation: str,
) -> tuple[Tensor, NeuralMemoryState]:  # fmt: skip
    def reads(done: int) -> Tensor:
        rows = slice(bisect_right(seen, done - 1), bisect_right(seen, done))
        return memory_read(state.weights, q[:, :, rows], activation)

    out = [reads(0)]
    for number in range(k.shape[2] // size):
        now = slice(number * size, (number + 1) * size)
        slope = memory_gradient(state.anchor, k[:, :, now], v[:, :, now], step[:, :, now], activation)
        moved, kept = [], []
        for w, s, g in zip(state.weights, state.momentum, slope):
            eta = 0.0 if momentum is None else _shaped(momentum[:, :, number], g)
            alpha = 0.0 if forget is None else _shaped(forget[:, :, number], g)
            moved.append(eta * s - g)
            kept.append((1 - alpha) * w + moved[-1])
        state = _after(state, tuple(kept), tuple(moved), size, chunk_size)
        out.append(reads(number + 1))
    return torch.cat(out, dim=2), state


def _shaped(factor: Tensor, like: Tensor) -> Tensor:
    return factor.reshape(*factor.shape, *[1] * (like.dim() - factor.dim()))


def _after(
    state: NeuralMemoryState, weights: Weights, momentum: Weights, tokens: int, chunk_size: int | None
) -> NeuralMemoryState:
    position = state.position + tokens
    ends = chunk_size is not None and position % chunk_size == 0
    return NeuralMemoryState(weights, momentum, weights if ends else state.anchor, position)


def _chunked(
    q: Tensor, k: Tensor, v: Tensor, state: NeuralMemoryState, step: Tensor, momentum: Tensor | None, forget: Tensor | None,
    chunk_size: int | None, size: int, seen: Sequence[int], activation: str,
) -> tuple[Tensor, NeuralMemoryState]:  # fmt: skip
    steps = k.shape[2] // size
    whole = _BLOCK if chunk_size is None else chunk_size // size
    begun = 0 if chunk_size is None else state.position % chunk_size // size
    # pieces that no change of the gradients' weights falls into
    ends = [min(steps, end) for end in range(whole - begun, steps + whole, whole)] if steps else []
    starts = [0, *ends[:-1]]
    first = bisect_right(seen, 0)
    out = [memory_read(state.weights, q[:, :, :first], activation)]
    if steps:
        place = torch.arange(min(whole, steps), device=q.device)
        rows = (torch.tensor(starts, device=q.device)[:, None] + place).clamp(max=steps - 1)
        factors = _factors(momentum, forget, rows, q.shape[:2], q)
    for number, (start, end) in enumerate(zip(starts, ends)):
        tokens, count = slice(start * size, end * size), end - start
        slopes = _slopes(state.anchor, k[:, :, tokens], v[:, :, tokens], activation)
        keep, push, pull = (t[:, :, number] for t in factors)
        spread = pull[..., : count + 1, 1 : count + 1].repeat_interleave(size, dim=-1)
        spread = spread * step[:, :, None, None, tokens]  # (B, H, 2 kinds, rows, tokens)
        asked = slice(bisect_right(seen, start), bisect_right(seen, end))
        if asked.stop > asked.start:
            chosen = torch.tensor([seen[i] - start for i in range(asked.start, asked.stop)], device=q.device)
            out.append(
                _read_within(
                    state, slopes, q[:, :, asked], keep[:, :, chosen], push[:, :, 0, chosen], spread[:, :, 0, chosen], activation
                )
            )  # fmt: skip
        added, moved = (_summed(slopes, spread[:, :, kind, count]) for kind in (0, 1))
        weights, speeds = [], []
        for w, s, g, m in zip(state.weights, state.momentum, added, moved):
            by = [_shaped(t, g) for t in (keep[:, :, count], push[:, :, 0, count], push[:, :, 1, count])]
            weights.append(by[0] * w + by[1] * s - g)
            speeds.append(by[2] * s - m)
        state = _after(state, tuple(weights), tuple(speeds), count * size, chunk_size)
    return torch.cat(out, dim=2), state


def _factors(
    momentum: Tensor | None, forget: Tensor | None, rows: Tensor, lead: Any, like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What of the past is in the weights after j steps of a piece; rows (pieces, n): numbers of its steps.

    Returns keep (B, H, pieces, n + 1): share of the first weights in W_j; push (B, H, pieces, 2, n + 1): of the first momentum in W_j and
    in S_j; pull (B, H, pieces, 2, n + 1, n + 1): of -gradient i (at i + 1) in W_j and in S_j.
    """
    pieces, count = rows.shape
    unit = torch.eye(count + 1, dtype=like.dtype, device=like.device)
    born = unit[1:].expand(*lead, pieces, count, count + 1)  # step j brings gradient j
    begin = unit[0].expand(*lead, pieces, 1, count + 1)
    if momentum is None:
        speed = born
    else:
        speed = linear_scan(momentum[:, :, rows][..., None], born, begin[..., 0, :], dim=3)
    if forget is None:
        held, keep = speed.cumsum(dim=3), like.new_ones(*lead, pieces, count + 1)
    else:
        stay = 1 - forget[:, :, rows]
        held = linear_scan(stay[..., None], speed, dim=3)
        keep = torch.cat((stay.new_ones(*lead, pieces, 1), stay.cumprod(dim=3)), dim=3)
    both = torch.stack(
        (torch.cat((torch.zeros_like(begin), held), dim=3), torch.cat((begin, speed), dim=3)), dim=3
    )  # (B, H, pieces, 2, n + 1 rows, n + 1 columns), column 0 the first momentum
    return keep, both[..., 0], both


def _read_within(
    state: NeuralMemoryState, slopes: _Slopes, q: Tensor, keep: Tensor, push: Tensor, spread: Tensor, activation: str
) -> Tensor:
    """M(q_t) at the weights keep_t W + push_t S - sum_i spread_ti gradient_i, which are not made."""
    act = ACTIVATIONS[activation][0]
    matrices, vector = _parts(state.weights)
    speeds, speed = _parts(state.momentum)
    keep, push = keep[..., None], push[..., None]
    x = q
    for place, (matrix, moving) in enumerate(zip(matrices, speeds)):
        x = act(x) if place else x
        near = (x @ slopes.inputs[place].mT * spread) @ slopes.errors[place]
        x = keep * (x @ matrix) + push * (x @ moving) - near
    if vector is None:
        return x
    assert speed is not None and slopes.vector is not None
    turned = keep * vector[:, :, None] + push * speed[:, :, None] - spread @ slopes.vector
    return q + _normed(x) * (1 + turned)


def _check(
    q: Tensor, k: Tensor, v: Tensor, state: Any, step: Tensor, momentum: Tensor | None, forget: Tensor | None, size: int
) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        require_tensor(name, tensor, dims=4, floating=True)
    if not isinstance(state, NeuralMemoryState):
        raise bad_type("state", state, "a NeuralMemoryState (NeuralMemoryState.start(weights, batch))")
    batch, heads, dim = *state.weights[0].shape[:2], state.weights[0].shape[2]
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        shape = tuple(tensor.shape)
        fits = (shape[0], shape[1], shape[3]) == (batch, heads, dim)
        require(fits, name, f"shape {shape}", f"({batch}, {heads}, N, {dim}), as the state's weights")
    require(v.shape == k.shape, "v", f"shape {tuple(v.shape)}", f"k's shape {tuple(k.shape)}")
    require(k.shape[2] % size == 0, "k", f"{k.shape[2]} tokens", f"whole steps of update_size ({size})")
    steps = k.shape[2] // size
    for name, factor, count in (("step", step, k.shape[2]), ("momentum", momentum, steps), ("forget", forget, steps)):
        if factor is not None:
            require_tensor(name, factor, dims=3, floating=True)
            need = f"shape {(batch, heads, count)}"
            require(tuple(factor.shape) == (batch, heads, count), name, f"shape {tuple(factor.shape)}", need)
