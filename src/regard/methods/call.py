"""`AttentionCall`, the one object that flows through everything that touches a pretrained model.

A model's attention layer hands its q, k, v and mask to an `AttentionCall`; the attached methods contribute to it through
the seams they claim; `run()` ends in `regard.ops.attention`. A contribution says which stage it needs and pays for that alone:

    call.on_output(fn)          head outputs            dense kernels stay
    call.add_bias(tensor)       scores                  a bias, fast kernels stay
    call.scale_keys(keys, f)    weights * f, renormalised: the same as log f added to the scores, so a bias again
    call.on_weights(fn, heads)  the weights themselves  the N x M matrix is made, for this layer and these heads alone
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import ops
from .._checks import bad_value, require
from .._shapes import broadcast_shape
from ..ops import masks, reference
from ..ops.reweight import log_factor_bias
from .method import Method, ScoreMod, UnsupportedModelError
from .weights import dense_weights, narrowed, share_of_keys

if TYPE_CHECKING:
    from ..ops.masks import Mask
    from ..ops.selection import Selection

__all__ = ["AttentionCall", "Method", "UnsupportedModelError"]


@dataclass(eq=False)
class AttentionCall:
    """One attention layer at work, once.

    Attributes:
        module: the model's attention module.
        layer: its number within its tower (the model's own `layer_idx` where it has one).
        q, k, v: (B, H, N, D), (B, Hkv, M, D), (B, Hkv, M, Dv), after rotary embedding; k and v include the cached past.
        kind: "self" or "cross".
        tower: which part of the model: "text", "vision", "audio", "encoder" or "decoder".
        mask: the model's own mask, bool, broadcastable to (B, H, N, M), True = may attend; None = all keys, or `causal`.
        causal: with `mask=None`, whether the attention is causal (bottom-right aligned).
        scale: factor on q k^T. dropout: on the weights. soft_cap: scores become cap * tanh(scores / cap) (Gemma 2).
        sinks: (H,) learned logits that take part in the softmax and read nothing (gpt-oss).
        window: the sliding window that the layer says it has, for information (the mask already holds it).
        cache: this layer's cache layer (a transformers `CacheLayerMixin`), already updated with k and v; None without a cache.
        step: denoising step of a diffusion model, else None.
        num_layers: layers in this tower.
        session: the attachment that this call belongs to (`session.last` is storage shared by all calls), or None.
        backend: backend for `regard.ops.attention`.
    """

    module: nn.Module
    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    kind: str = "self"
    tower: str = "text"
    mask: Tensor | None = None
    causal: bool = False
    scale: float | None = None
    dropout: float = 0.0
    soft_cap: float | None = None
    sinks: Tensor | None = None
    window: int | None = None
    cache: Any = None
    step: int | None = None
    num_layers: int = 0
    session: Any = None
    backend: str = "auto"
    num_seen: int | None = field(default=None, repr=False)
    biases: list[Tensor] = field(default_factory=list, repr=False)
    extra_mask: Mask | None = field(default=None, repr=False)
    score_mod: ScoreMod | None = field(default=None, repr=False)
    selection: Selection | None = field(default=None, repr=False)
    weight_edits: list[tuple[Callable[[Tensor], Tensor], list[int] | None]] = field(default_factory=list, repr=False)
    output_edits: list[Callable[[Tensor], Tensor]] = field(default_factory=list, repr=False)

    # What and where

    @property
    def batch(self) -> int:
        return self.q.shape[0]

    @property
    def num_heads(self) -> int:
        return self.q.shape[1]

    @property
    def num_kv_heads(self) -> int:
        return self.k.shape[1]

    @property
    def q_len(self) -> int:
        return self.q.shape[2]

    @property
    def kv_len(self) -> int:
        return self.k.shape[2]

    @property
    def phase(self) -> str:
        """ "decode" when one query reads a cached past, else "prefill" (chunks of a prompt included)."""
        return "decode" if self.cache is not None and self.q_len == 1 and self.kv_len > 1 else "prefill"

    @property
    def seen(self) -> int:
        """Tokens of the sequence up to and including this call's queries (for cross-attention: keys)."""
        if self.num_seen is None:
            own = self.cache is None or self.kind == "cross"
            self.num_seen = self.kv_len if own else int(self.cache.get_seq_length())
        return self.num_seen

    @property
    def position(self) -> int:
        """Absolute position of the first query row in its sequence (left padding counts)."""
        return self.seen - self.q_len if self.kind == "self" else 0

    @property
    def key_offset(self) -> int:
        """Absolute position of the first key; above 0 where a sliding-window cache has dropped the start."""
        return max(0, self.seen - self.kv_len)

    @property
    def q_offset(self) -> int:
        """Position of the first query counted in keys of this call. (Without a mask queries are always the last positions.)"""
        if self.mask is None or self.kind == "cross":
            return self.kv_len - self.q_len
        return self.position - self.key_offset

    @property
    def start(self) -> Tensor:
        """Absolute position of the first real token of each row, int64 (B,): how much left padding there is (0 without)."""
        if self.mask is None:
            return torch.zeros(self.batch, dtype=torch.long, device=self.q.device)
        start = getattr(self.mask, "start", None)  # one mask tensor serves all layers of a forward
        if start is None:
            real = getattr(self.mask, "padding", None)
            offset = 0
            if real is None:  # a mask of the user's own: the first key that anybody sees
                real, offset = self.mask.any(dim=1).any(dim=1), self.key_offset
            start = torch.where(real.any(-1), real.to(torch.uint8).argmax(-1), real.shape[-1]) + offset
            self.mask.start = start  # type: ignore[attr-defined]
        return start.expand(self.batch)

    @property
    def spans(self) -> dict[str, Tensor]:
        """What the keys are: name -> bool (B, M). Given to `attach(spans=...)`; tokens that came later belong to none."""
        if self.session is None or self.kind == "cross":
            return {}
        offset = self.key_offset
        return {name: self._fit_span(name, span, offset) for name, span in self.session.spans.items()}

    def _fit_span(self, name: str, span: Tensor, offset: int) -> Tensor:
        rows = span.shape[0]
        require(self.batch % rows == 0, f"spans[{name!r}]", f"{rows} rows", f"a divisor of the batch, {self.batch}")
        span = span.to(self.q.device).repeat_interleave(self.batch // rows, dim=0)[:, offset : offset + self.kv_len]
        return nn.functional.pad(span, (0, self.kv_len - span.shape[1]))

    # Contributions

    def add_bias(self, bias: Tensor) -> None:
        """Add `bias`, broadcastable to (B, H, N, M), to the scaled scores."""
        try:
            fits = broadcast_shape(bias.shape, self._score_shape) == self._score_shape
        except ValueError:
            fits = False
        require(
            fits, "bias", f"shape {tuple(bias.shape)}", f"broadcastable to (B, H, N, M) = {tuple(self._score_shape)}"
        )
        self.biases.append(bias[(None,) * (4 - bias.dim())])

    def scale_keys(
        self, keys: int | slice | Tensor, factor: float | Tensor, heads: Sequence[int] | None = None
    ) -> None:
        """Multiply the attention weights on `keys` by `factor`, then renormalise every row to sum 1.

        Args:
            keys: absolute key position(s): an int, a slice, an int64 tensor (K,), or a bool tensor (M,) or (B, M) (a span).
            factor: >= 0; 0 removes the keys, 1 changes nothing. A number, or a tensor: (heads,) or (B, heads, 1, K).
            heads: query heads to treat; None = all.
        """
        if not isinstance(factor, Tensor):
            dtype = torch.float64 if self.q.dtype == torch.float64 else torch.float32
            factor = torch.tensor(factor, dtype=dtype, device=self.q.device)
        if isinstance(keys, Tensor) and keys.dtype == torch.bool:
            where = keys
        else:
            column, kept = self._columns(keys)
            where = torch.zeros(self.kv_len, dtype=torch.bool, device=self.q.device)
            where[column] = True
            if isinstance(factor, Tensor) and factor.dim() == 4 and factor.shape[-1] == len(kept):
                by_key = factor.new_ones(*factor.shape[:-1], self.kv_len)
                by_key[..., column] = factor[..., kept]
                factor = by_key
        bias = log_factor_bias(where, factor, self.kv_len, num_heads=self.num_heads, heads=heads, device=self.q.device)
        self.add_bias(bias)

    def on_weights(self, fn: Callable[[Tensor], Tensor], heads: Sequence[int] | None = None) -> None:
        """Pass the softmax weights of `heads` (None = all), float32 (B, len(heads), N, M), through `fn` before they meet v."""
        self.weight_edits.append((fn, None if heads is None else self._head_numbers(heads)))

    def on_output(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Pass the head outputs (B, H, N, Dv) through `fn`."""
        self.output_edits.append(fn)

    def _head_numbers(self, heads: Sequence[int]) -> list[int]:
        numbers = sorted({int(head) for head in heads})
        if numbers and (numbers[0] < 0 or numbers[-1] >= self.num_heads):
            raise bad_value("heads", list(heads), f"numbers in [0, {self.num_heads})")
        return numbers

    def _row_numbers(self, rows: Sequence[int] | slice | Tensor | None) -> Tensor:
        row = torch.arange(self.q_len, device=self.q.device)
        if rows is None or isinstance(rows, slice):
            return row[rows or slice(None)]
        number = torch.as_tensor(rows, dtype=torch.long, device=self.q.device).reshape(-1)
        if not bool(((number >= -self.q_len) & (number < self.q_len)).all()):
            raise bad_value("rows", number.tolist(), f"query rows in [{-self.q_len}, {self.q_len})")
        return row[number]

    def _columns(self, keys: int | slice | Tensor) -> tuple[Tensor, Tensor]:
        """Absolute key positions as columns of this call, and which of them there are: some may be dropped, some yet to come."""
        if isinstance(keys, slice):
            keys = torch.arange(self.seen)[keys]
        index = torch.as_tensor(keys, device=self.q.device).reshape(-1)
        index = torch.where(index < 0, index + self.seen, index) - self.key_offset
        kept = (index >= 0) & (index < self.kv_len)
        return index[kept], kept

    @property
    def _score_shape(self) -> torch.Size:
        return torch.Size((self.batch, self.num_heads, self.q_len, self.kv_len))

    # The computation

    def run(self, methods: Iterable[Method] = ()) -> Tensor:
        """Let the methods contribute, in order, and compute the head outputs (B, H, N, Dv)."""
        attended: Tensor | None = None
        methods = list(methods)
        for method in methods:
            if "edit" in method.seams():
                method.edit(self)
        for method in methods:
            seams = method.seams()
            if "mask" in seams:
                self._set_mask(method.mask(self))
            if "score" in seams:
                self._set_score(method.score(self))
            if "select" in seams:
                self.selection = method.select(self)
            if "attend" in seams:
                attended = method.attend(self)
                if attended is not None and not method.honours_edits:
                    self._require_unedited(method, methods)
        out = self.attention() if attended is None else attended
        for edit in self.output_edits:
            out = edit(out)
        return out

    def _require_unedited(self, method: Method, methods: Sequence[Method]) -> None:
        """A method that computes the attention itself sees q, k, v and the mask; refuse to lose anything else in silence."""
        others = ", ".join(type(other).__name__ for other in methods if "edit" in other.seams() and other is not method)
        for what, given in (
            ("biases of the scores", self.biases),
            ("edits of the weights", self.weight_edits),
            ("sink logits", self.sinks),
        ):
            if given is not None and len(given):
                raise ValueError(
                    f"{type(method).__name__} computes the attention itself and cannot honour the {what} "
                    f"({others or type(self.module).__name__}) in layer {self.layer}; attach it alone, or to another model"
                )

    def attention(self) -> Tensor:
        """The head outputs by `regard.ops.attention`, with the model's own mask and everything contributed so far."""
        edited = self._edited_heads()
        if edited and len(edited) == self.num_heads:
            return self._from_weights(edited)
        out = self._fast()
        if edited:
            out = out.index_copy(1, torch.tensor(edited, device=out.device), self._from_weights(edited))
        return out

    def _fast(self) -> Tensor:
        out = ops.attention(
            self.q,
            self.k,
            self.v,
            mask=self.full_mask(),
            score_mod=self.full_score_mod(),
            bias=self.bias(),
            selection=self.selection,
            q_offset=self.q_offset if self._speaks_of_positions else None,
            scale=self.scale,
            dropout=self.dropout,
            return_lse=self.sinks is not None,
            backend=self.backend,
        )
        if self.sinks is None:
            return out
        out, lse = out
        return out * share_of_keys(lse, self.sinks).to(out.dtype)

    def full_mask(self) -> Mask | Tensor | None:
        """The model's own mask and the attached one together, as `regard.ops.attention` takes it."""
        own: Mask | Tensor | None = self.mask
        if own is None and self.causal and self.q_len > 1:
            own = masks.causal
        if isinstance(own, Tensor) and self._speaks_of_positions:
            structure = getattr(own, "structure", None)
            own = masks.dense(own, q_offset=self.q_offset) if structure is None else structure
        if self.extra_mask is None:
            return own
        return self.extra_mask if own is None else own & self.extra_mask

    @property
    def _speaks_of_positions(self) -> bool:
        """Whether a mask or score mod needs to know positions; where a static cache is in use, finding out costs a sync."""
        return (
            self.extra_mask is not None
            or self.score_mod is not None
            or getattr(self.mask, "structure", None) is not None
        )

    def bias(self) -> Tensor | None:
        """The sum of the additive contributions, broadcastable to (B, H, N, M), or None."""
        if not self.biases:
            return None
        total = self.biases[0]
        for bias in self.biases[1:]:
            total = total + bias
        return total

    def full_score_mod(self) -> ScoreMod | None:
        """The model's own soft cap and then the attached score mod, or None."""
        if self.soft_cap is None:
            return self.score_mod
        capped = ops.scores.soft_cap(self.soft_cap)
        return capped if self.score_mod is None else capped >> self.score_mod

    def _set_mask(self, mask: Any) -> None:
        """Take a method's mask. It speaks of absolute positions: shift it where the cache no longer holds the first keys."""
        offset = self._dropped
        if mask is None or offset == 0:
            self.extra_mask = None if mask is None else masks.as_mask(mask)
        else:
            self.extra_mask = masks.from_function(
                lambda b, h, q_idx, kv_idx: mask(b, h, q_idx + offset, kv_idx + offset)
            )

    def _set_score(self, mod: ScoreMod | None) -> None:
        offset = self._dropped
        if mod is None or offset == 0:
            self.score_mod = mod
        else:
            self.score_mod = lambda score, b, h, q_idx, kv_idx: mod(score, b, h, q_idx + offset, kv_idx + offset)

    @property
    def _dropped(self) -> int:
        return self.key_offset if getattr(self.cache, "is_sliding", False) else 0

    def weights(self, heads: Sequence[int] | None = None, rows: Sequence[int] | slice | Tensor | None = None) -> Tensor:
        """The softmax weights, dense, float32 (float64 stays): (B, len(heads), len(rows), M), heads in ascending order.

        Everything contributed to the scores is in them (masks, biases, score mods, selection, soft cap, sinks); edits of the
        weights and dropout are not.
        """
        call = self if heads is None else narrowed(self, self._head_numbers(heads))
        return dense_weights(call, self._row_numbers(rows))

    def narrowed(self, heads: Sequence[int]) -> AttentionCall:
        """This call for some query heads alone, ascending, each with keys and values of its own; edits are left out."""
        return narrowed(self, self._head_numbers(heads))

    def _edited_heads(self) -> list[int]:
        numbers: set[int] = set()
        for _, heads in self.weight_edits:
            numbers.update(range(self.num_heads) if heads is None else heads)
        return sorted(numbers)

    def _from_weights(self, edited: list[int]) -> Tensor:
        call = narrowed(self, edited)
        weights = call.weights()
        for fn, heads in self.weight_edits:
            if heads is None or heads == edited:
                weights = fn(weights)
            else:
                where = torch.tensor([edited.index(head) for head in heads], device=weights.device)
                weights = weights.index_copy(1, where, fn(weights[:, where]).to(weights.dtype))
        if self.dropout > 0.0:
            weights = nn.functional.dropout(weights, self.dropout)
        return reference.weighted_values(weights, call.v).to(self.q.dtype)
