"""Linear attention: a state in place of the softmax, in parallel, chunk and recurrent form.

o_t = scale * sum_(j <= t) exp(g_(j+1) + ... + g_t) (phi(q_t) . phi(k_j)) v_j, optionally divided by the same sum with
v = 1. The chunk form with a fixed decay per head is Lightning Attention-2 (Qin et al. 2024, arXiv 2401.04658; numbers
checked against OpenNLPLab/lightning-attention). What differs from that code: state in and out, GQA, decays per token and
per channel, a normaliser, any width; its width check (`16 % dim`) rejects widths that work here.
"""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

import torch
from torch import Tensor

from ..._checks import bad_type, bad_value, require, require_int, require_name, require_tensor
from .chunk import CHANNEL_CHUNK_SIZE, CHUNK_SIZE, chunk_fixed, chunk_learned
from .feature_maps import FeatureMap, identity, resolve
from .linear_state import LinearState
from .parallel import everything, parallel_causal
from .recurrent import recurrent
from .reference import linear_attention_reference
from .tensors import accumulate_dtype, expand_heads, no_autocast
from .varlen import packed_linear_attention

FORMS = ("auto", "parallel", "chunk", "recurrent")
BACKENDS = ("auto", "eager", "torch", "triton")
FeatureMapArgument = str | FeatureMap | tuple[str | FeatureMap, str | FeatureMap] | None


class Choice(NamedTuple):
    """What `linear_attention` will run: see `linear_attention_backend`."""

    form: str
    backend: str
    chunk_size: int


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    feature_map: FeatureMapArgument = None,
    normalize: bool = False,
    causal: bool = True,
    scale: float | None = None,
    state: LinearState | None = None,
    return_state: bool = False,
    form: str = "auto",
    chunk_size: int | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, LinearState]:
    """Linear attention with an explicit state.

    Shapes: q (B, H, N, D), k (B, Hkv, M, D), v (B, Hkv, M, Dv), one dtype, H a multiple of Hkv (query head h reads kv head
    h // (H // Hkv)). M = N when causal. Returns (B, H, N, Dv) in that dtype, or (that, LinearState) with `return_state`.

    log_decay: natural log of what the state keeps per step, <= 0 (-inf forgets everything), applied before the token is
        added: None, (H,) per head, (B or 1, H, N) per token, (B or 1, H, N, D) per token and channel (of the feature
        map). Causal only. Differentiable. That it is <= 0 is checked on the CPU only, where looking costs nothing.
    feature_map: a name (`regard.ops.state.feature_maps.FEATURE_MAPS`), a callable (B, H, N, D) -> (B, H, N, F), a pair
        (for queries, for keys), or None for the identity.
    normalize: divide by z_t + eps, z_t the sum of the weights. Wants feature maps that are not negative.
    causal: False lets every query read all keys through one state; `state` is then added to that state.
    scale: factor of phi(q) . phi(k); None is 1.0.
    state: what an earlier call returned; a call over two pieces equals one call over the whole. Gradients flow through
        it both ways; never modified.
    form: "parallel" (quadratic), "chunk" (linear time, memory of a few chunks beside inputs and outputs when log_decay is
        fixed per head or None), "recurrent" (token by token), "auto" (recurrent for one token, else chunk). Equal numbers.
    chunk_size: tokens per chunk; None picks what is fast on this device.
    lengths: (B,) integers, valid keys per sequence, counted from the left; the rest is padding, reaches no output and
        no state, and (when causal) its own output rows are zero. The state is the one after the last valid token.
    cu_seqlens: (S + 1,) integers: S sequences are packed into one row, B = 1, sequence s in the tokens cu_seqlens[s] to
        cu_seqlens[s + 1] - 1. Each is on its own: `state` has one for each, (S, H, D, Dv), and so has the returned one.
        Not together with `lengths`. Decoding goes on from that state with S rows of one token.
    backend: "auto", "torch", "triton" (CUDA; chunk form with no or a fixed decay), "eager" (the specification, slow).
        `linear_attention_backend` tells what "auto" takes.

    Half types accumulate, and carry their state, in float32; float64 stays float64. A row that sees nothing gives zeros.
    Memory under autograd: with a decay that needs a gradient, or one per token, the chunk form is differentiated by
    autograd and keeps its chunks. There is no second derivative through the fixed-decay chunk form.

    Raises ValueError or TypeError naming the argument.
    """
    _check(q, k, v, log_decay, causal, lengths)
    for name, value in (("normalize", normalize), ("causal", causal), ("return_state", return_state)):
        if not isinstance(value, bool):
            raise bad_type(name, value, "True or False")
    for name, number in (("scale", scale), ("eps", eps)):
        if isinstance(number, bool) or not isinstance(number, (int, float, type(None))):
            raise bad_type(name, number, "a number")
    if cu_seqlens is not None:
        require(lengths is None, "lengths", "numbers", "None beside cu_seqlens: packed sequences have no padding")
        out, after = packed_linear_attention(
            q, k, v, cu_seqlens, log_decay, state, feature_map=feature_map, normalize=normalize, causal=causal, scale=scale, form=form,
            chunk_size=chunk_size, backend=backend, eps=eps,
        )  # fmt: skip
        return (out, after) if return_state else out
    choice = linear_attention_backend(
        q, k, v, log_decay=log_decay, causal=causal, form=form, chunk_size=chunk_size, backend=backend
    )
    if choice.backend == "eager":
        _check_state(state, q.shape[0], q.shape[1], None, v.shape[-1], normalize)
        defined = linear_attention_reference(
            q, k, v, log_decay=log_decay, feature_map=feature_map, normalize=normalize, causal=causal, scale=scale,
            state=state, lengths=lengths, eps=eps,
        )  # fmt: skip
        return defined if return_state else defined[0]

    dtype, acc = v.dtype, accumulate_dtype(v.dtype)
    padding = None
    if lengths is not None:
        padding = torch.arange(k.shape[2], device=k.device) >= lengths.to(k.device)[:, None]  # (B, M)
        # wiped in the inputs, so that not even a NaN in it can reach a result or, through the feature map, a gradient
        gone = padding[:, None, :, None]
        k, v = k.masked_fill(gone, 0), v.masked_fill(gone, 0)
        q = q.masked_fill(gone, 0) if causal else q
    fq, fk = _features(q, k, feature_map)
    if padding is not None and causal:
        fq = fq.masked_fill(gone, 0)  # a feature map need not keep zero
    if log_decay is not None and log_decay.dim() == 4:
        need = f"one decay per channel of the feature map ({fq.shape[-1]}), or 1"
        require(log_decay.shape[-1] in (1, fq.shape[-1]), "log_decay", f"shape {tuple(log_decay.shape)}", need)
    _check_state(state, q.shape[0], q.shape[1], fq.shape[-1], v.shape[-1], normalize)
    if normalize:  # the denominator is one more value column, 1 for every token
        ones = v.new_ones(*v.shape[:-1], 1) if padding is None else (~padding).to(v.dtype)[:, None, :, None]
        v = torch.cat([v, ones.expand(*v.shape[:-1], 1)], dim=-1)
    before = None if state is None else state.kv
    if state is not None and state.normaliser is not None:
        before = torch.cat([state.kv, state.normaliser[..., None]], dim=-1)
    before = None if before is None else before.to(acc)

    with no_autocast(q.device):
        out_dtype = acc if normalize or scale is not None else dtype
        out, end = _run(choice, fq, fk, v, log_decay, before, padding, lengths, causal, return_state, out_dtype)
        if scale is not None:
            out = out * scale
        if normalize:
            out = out[..., :-1] / (out[..., -1:] + eps)
        out = out.to(dtype)
    if not return_state:
        return out
    return out, LinearState(end[..., :-1].contiguous(), end[..., -1].contiguous()) if normalize else LinearState(end)


def linear_attention_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: LinearState,
    *,
    log_decay: Tensor | None = None,
    feature_map: FeatureMapArgument = None,
    normalize: bool = False,
    scale: float | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, LinearState]:
    """One token: q (B, H, 1, D), k (B, Hkv, 1, D), v (B, Hkv, 1, Dv) and the state so far -> its output and the next state.

    The memory is that of the state, however many tokens came before. Arguments as `linear_attention`; start from
    `LinearState.zeros` or from the state of a prefill.
    """
    if not isinstance(state, LinearState):
        raise bad_type("state", state, "a LinearState (LinearState.zeros(...) before the first token)")
    require(q.dim() == 4 and q.shape[2] == 1, "q", f"shape {tuple(q.shape)}", "one token, (B, H, 1, D)")
    return linear_attention(  # type: ignore[return-value]
        q, k, v, log_decay=log_decay, feature_map=feature_map, normalize=normalize, scale=scale, eps=eps,
        state=state, return_state=True, form="recurrent",
    )  # fmt: skip


def linear_attention_backend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    causal: bool = True,
    form: str = "auto",
    chunk_size: int | None = None,
    backend: str = "auto",
) -> Choice:
    """Which form, backend and chunk size `linear_attention` picks for these arguments."""
    require_name("form", form, FORMS)
    require_name("backend", backend, BACKENDS)
    if chunk_size is not None:
        require_int("chunk_size", chunk_size, 1)
    length, asked = q.shape[2], form
    if form == "auto":
        form = "recurrent" if causal and length == 1 else "chunk"
    learned = log_decay is not None and (log_decay.dim() > 1 or log_decay.requires_grad)
    fits = form == "chunk" and causal and not learned and q.dtype != torch.float64
    if backend == "triton" and not fits:
        got = f"form={asked!r}, causal={causal}, log_decay {'learned or per token' if learned else 'fixed'}, {q.dtype}"
        raise bad_value("backend", f"'triton' with {got}", "the causal chunk form, no or a fixed decay, not float64")
    if backend == "triton":
        refused = _triton_refuses(q, k, v)
        require(refused is None, "backend", "triton", f"another one: {refused}")
    if backend == "auto":
        backend = "triton" if fits and q.is_cuda and _triton_refuses(q, k, v) is None else "torch"
    if chunk_size is None:
        chunk_size = CHANNEL_CHUNK_SIZE if log_decay is not None and log_decay.dim() == 4 else CHUNK_SIZE
    return Choice(form, backend, chunk_size)


def _run(
    choice: Choice,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    padding: Tensor | None,
    lengths: Tensor | None,
    causal: bool,
    return_state: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """One form on prepared inputs: features applied, padding wiped, the normaliser a column of v and of the state."""
    batch, heads, length, dim = q.shape
    if not causal or q.numel() == 0 or v.numel() == 0:  # where nothing is added, order and decay do not matter
        return everything(q, k, v, state, dtype)
    fixed = log_decay is None or (log_decay.dim() == 1 and not log_decay.requires_grad)
    if choice.form == "chunk" and fixed:
        if log_decay is not None:
            log_decay = log_decay.detach().clamp(min=-1e5)  # exp(-1e5) is 0 too, and -inf * 0 would be NaN
        if choice.backend == "triton":
            from ..backends.triton_linear import chunk_triton

            out, end = chunk_triton(q, k, v, log_decay, state, choice.chunk_size, dtype)
        else:
            out, end = chunk_fixed(q, k, v, log_decay, state, choice.chunk_size, dtype)
        if log_decay is not None and lengths is not None and return_state:
            end = _state_at(k, v, log_decay, state, lengths)  # the fast form went on decaying through the padding
        return out, end
    if log_decay is not None:
        log_decay = log_decay[None, :, None].expand(batch, heads, length) if log_decay.dim() == 1 else log_decay
        log_decay = log_decay.expand(batch, *log_decay.shape[1:])
        if padding is not None:
            gone = padding[:, None, :]
            log_decay = log_decay.masked_fill(gone if log_decay.dim() == 3 else gone[..., None], 0)
        if log_decay.dim() == 4:
            log_decay = log_decay.expand(*log_decay.shape[:3], dim)
    if choice.form == "chunk":
        assert log_decay is not None
        return chunk_learned(q, k, v, log_decay, state, choice.chunk_size, dtype)
    form = parallel_causal if choice.form == "parallel" else recurrent
    return form(q, k, v, log_decay, state, dtype)


def _state_at(k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None, lengths: Tensor) -> Tensor:
    """The state after `lengths` tokens under a fixed decay per head; values of padding are already zero."""
    acc = accumulate_dtype(k.dtype)
    groups = log_decay.shape[0] // k.shape[1]
    lengths = lengths.to(k.device)
    age = (lengths[:, None] - 1 - torch.arange(k.shape[2], device=k.device)).clamp(min=0)
    rate = log_decay.to(acc)[None, :, None]
    left = expand_heads(k.to(acc), groups) * (rate * age[:, None]).exp()[..., None]
    total = left.transpose(-1, -2) @ expand_heads(v.to(acc), groups)
    return total if state is None else total + (rate * lengths[:, None, None]).exp()[..., None] * state


def _features(q: Tensor, k: Tensor, feature_map: FeatureMapArgument) -> tuple[Tensor, Tensor]:
    map_q, map_k = resolve(feature_map)
    wide = accumulate_dtype(q.dtype)  # elu(x) + 1 in a half type would lose most digits of a small feature
    fq, fk = (x if fn is identity else fn(x.to(wide)) for fn, x in ((map_q, q), (map_k, k)))
    for name, x, made in (("q", q, fq), ("k", k, fk)):
        require_tensor(f"feature_map({name})", made, dims=4, floating=True)
        need = f"shape {(*x.shape[:3], 'F')}"
        require(made.shape[:3] == x.shape[:3], f"feature_map({name})", f"shape {tuple(made.shape)}", need)
    require(
        fq.shape[-1] == fk.shape[-1],
        "feature_map",
        f"widths {fq.shape[-1]} and {fk.shape[-1]}",
        "one width for q and k",
    )
    return fq.to(q.dtype), fk.to(k.dtype)


def _check(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, causal: bool, lengths: Tensor | None) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        require_tensor(name, x, dims=4, floating=True)
        require(x.dtype == q.dtype, name, x.dtype, f"the dtype of q ({q.dtype})")
        require(x.device == q.device, name, f"device {x.device}", f"the device of q ({q.device})")
        require(x.shape[0] == q.shape[0], name, f"shape {tuple(x.shape)}", f"the batch of q ({q.shape[0]})")
    (batch, heads, length, dim), kv_heads = q.shape, k.shape[1]
    require(k.shape[3] == dim, "k", f"shape {tuple(k.shape)}", f"the width of q ({dim})")
    require(
        v.shape[1:3] == k.shape[1:3], "v", f"shape {tuple(v.shape)}", f"heads and length of k {tuple(k.shape[1:3])}"
    )
    divides = kv_heads > 0 and heads % kv_heads == 0
    require(divides, "k", f"{kv_heads} heads", f"a number of heads that divides those of q ({heads})")
    if causal:
        require(
            k.shape[2] == length,
            "k",
            f"{k.shape[2]} tokens",
            f"as many as q ({length}) when causal; the past is in `state`",
        )
    if lengths is not None:
        require_tensor("lengths", lengths, dims=1)
        if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
            raise bad_type("lengths", lengths.dtype, f"an integer tensor (dtype is {lengths.dtype})")
        require(
            lengths.shape[0] == batch, "lengths", f"shape {tuple(lengths.shape)}", f"one number per sequence ({batch})"
        )
        if lengths.device.type == "cpu" and batch and not torch.compiler.is_compiling():
            inside = bool((lengths >= 0).all()) and bool((lengths <= k.shape[2]).all())
            require(inside, "lengths", lengths.tolist(), f"numbers from 0 to {k.shape[2]}")
    if log_decay is None:
        return
    require(causal, "log_decay", "a tensor with causal=False", "None, or causal=True: without an order nothing decays")
    require_tensor("log_decay", log_decay, floating=True)
    shape = tuple(log_decay.shape)
    fits = shape == (heads,) or (len(shape) in (3, 4) and shape[0] in (1, batch) and shape[1:3] == (heads, length))
    need = f"(H,) = ({heads},), (B or 1, H, N) = ({batch}, {heads}, {length}) or (B or 1, H, N, D)"
    require(fits, "log_decay", f"shape {shape}", need)
    require(log_decay.device == q.device, "log_decay", f"device {log_decay.device}", f"the device of q ({q.device})")
    if log_decay.device.type == "cpu" and not torch.compiler.is_compiling():
        require(bool((log_decay <= 0).all()), "log_decay", "a number that is positive or NaN", "numbers <= 0")


def _check_state(
    state: LinearState | None, batch: int, heads: int, dim: int | None, value_dim: int, normalize: bool
) -> None:
    if state is None:
        return
    if not isinstance(state, LinearState):
        raise bad_type("state", state, "a LinearState")
    shape, need = tuple(state.kv.shape), (batch, heads, dim if dim is not None else state.kv.shape[2], value_dim)
    require(shape == need, "state.kv", f"shape {shape}", f"shape {need}")
    got = "None" if state.normaliser is None else "a tensor"
    require((state.normaliser is not None) == normalize, "state.normaliser", got, f"to go with normalize={normalize}")


def _triton_refuses(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    from ..backends.triton_linear import refuses

    return refuses(q, k, v)
