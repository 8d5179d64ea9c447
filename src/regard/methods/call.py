"""`AttentionCall`, the one object that flows through everything that touches a pretrained model, and `Method`, what is attached.

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
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from .. import ops
from .._checks import bad_value, require
from ..ops import masks, reference

if TYPE_CHECKING:
    from ..ops.masks import Mask
    from ..ops.selection import Selection

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

SEAMS = ("mask", "score", "select", "attend", "edit", "cache", "logits")


class UnsupportedModelError(ValueError):
    """The method, or regard itself, cannot serve this model; the message says why."""


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
        if self.cache is None or self.kind == "cross":
            return self.kv_len
        return int(self.cache.get_seq_length())

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
        """Position of the first query counted in keys of this call, which is what masks, score mods and selections speak of."""
        if self.kind == "cross" or self.cache is None or not getattr(self.cache, "is_compileable", False):
            return self.kv_len - self.q_len
        return self.position - self.key_offset if self.mask is not None else self.kv_len - self.q_len

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
            fits = torch.broadcast_shapes(bias.shape, self._score_shape) == self._score_shape
        except RuntimeError:
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
            factor: >= 0; 0 removes the keys, 1 changes nothing. A number, or a tensor: (heads,), or broadcastable to (B, heads, 1, K).
            heads: query heads to treat; None = all.
        """
        numbers = range(self.num_heads) if heads is None else self._head_numbers(heads)
        factor = torch.as_tensor(factor, dtype=torch.float32, device=self.q.device)
        if factor.dim() == 1 and len(factor) > 1:
            require(len(factor) == len(numbers), "factor", f"{len(factor)} values", f"one a head, {len(numbers)}")
            factor = factor.view(1, -1, 1, 1)
        if not bool((factor >= 0).all()):
            raise bad_value("factor", float(factor.min()), "factors >= 0")
        log_factor = factor.log()
        bias = torch.zeros(self.batch, self.num_heads, 1, self.kv_len, device=self.q.device)
        chosen = list(numbers)
        if isinstance(keys, Tensor) and keys.dtype == torch.bool:
            where = keys.to(self.q.device).view(-1, 1, 1, self.kv_len)
            bias[:, chosen] = torch.where(where, log_factor, bias[:, chosen])
        else:
            index = self._key_numbers(keys)
            rows = bias[:, chosen]
            rows[..., index] = log_factor
            bias[:, chosen] = rows
        self.add_bias(bias)

    def on_weights(self, fn: Callable[[Tensor], Tensor], heads: Sequence[int] | None = None) -> None:
        """Pass the softmax weights of `heads` (None = all), float32 (B, len(heads), N, M), through `fn` before they meet v."""
        self.weight_edits.append((fn, None if heads is None else self._head_numbers(heads)))

    def on_output(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Pass the head outputs (B, H, N, Dv) through `fn`."""
        self.output_edits.append(fn)

    def _head_numbers(self, heads: Sequence[int]) -> list[int]:
        numbers = sorted({int(head) for head in heads})
        if numbers and not (0 <= numbers[0] and numbers[-1] < self.num_heads):
            raise bad_value("heads", list(heads), f"numbers in [0, {self.num_heads})")
        return numbers

    def _key_numbers(self, keys: int | slice | Tensor) -> Tensor:
        """Absolute key positions as columns of this call; those that the cache has dropped, or that come later, are left out."""
        if isinstance(keys, slice):
            keys = torch.arange(self.seen)[keys]
        index = torch.as_tensor(keys, device=self.q.device).reshape(-1)
        index = torch.where(index < 0, index + self.seen, index) - self.key_offset
        return index[(index >= 0) & (index < self.kv_len)]

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
                if attended is not None and (self.biases or self.weight_edits) and not method.honours_edits:
                    raise ValueError(
                        f"{type(method).__name__} computes the attention itself and cannot honour the edits of scores or weights "
                        f"in layer {self.layer}; attach it without {_others(methods, method)}"
                    )
        out = self.attention() if attended is None else attended
        for edit in self.output_edits:
            out = edit(out)
        return out

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
            score_mod=self._full_score_mod(),
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
        return out * self._share_of_keys(lse, self.sinks).to(out.dtype)

    @staticmethod
    def _share_of_keys(lse: Tensor, sinks: Tensor) -> Tensor:
        """Mass left to the keys when a sink logit takes part in the softmax: e^lse / (e^lse + e^sink), (B, H, N, 1)."""
        return torch.sigmoid(lse - sinks.to(lse.dtype).view(1, -1, 1))[..., None]

    def full_mask(self) -> Mask | Tensor | None:
        """The model's own mask and the attached one together, as `regard.ops.attention` takes it."""
        own: Mask | Tensor | None = self.mask
        if own is None and self.causal and self.q_len > 1:
            own = masks.causal
        if isinstance(own, Tensor) and self._speaks_of_positions:
            own = masks.dense(own, q_offset=self.q_offset)
        if self.extra_mask is None:
            return own
        return self.extra_mask if own is None else own & self.extra_mask

    @property
    def _speaks_of_positions(self) -> bool:
        """Whether something contributed needs to know positions; where a static cache is in use, finding out costs a sync."""
        return self.extra_mask is not None or self.score_mod is not None

    def bias(self) -> Tensor | None:
        """The sum of the additive contributions, broadcastable to (B, H, N, M), or None."""
        if not self.biases:
            return None
        total = self.biases[0]
        for bias in self.biases[1:]:
            total = total + bias
        return total

    def _full_score_mod(self) -> ScoreMod | None:
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
        """The softmax weights, dense, float32 (float64 stays): (B, len(heads), len(rows), M).

        Everything contributed to the scores is in them (masks, biases, score mods, selection, soft cap, sinks); edits of the
        weights and dropout are not.
        """
        device = self.q.device
        every = torch.arange(self.num_heads, device=device)
        head = every if heads is None else every[torch.as_tensor(self._head_numbers(heads), dtype=torch.long)]
        row = torch.arange(self.q_len, device=device)
        if rows is not None:
            row = row[rows] if isinstance(rows, slice) else row[torch.as_tensor(rows, device=device)]
        group = self.num_heads // self.num_kv_heads
        q, k = self.q[:, head][:, :, row], self.k[:, head // group]

        mask, bias, score_mod = self.full_mask(), self.bias(), self._full_score_mod()
        if isinstance(mask, Tensor):
            mask = masks.dense(mask, q_offset=self.q_offset)
        if self.selection is not None:
            chosen = self.selection.to(device).materialize()
            if chosen.shape[1] not in (1, self.num_heads):
                chosen = chosen.repeat_interleave(group, dim=1)
            chosen = masks.dense(chosen, q_offset=self.q_offset)
            mask = chosen if mask is None else mask & chosen
        if bias is not None:
            bias = bias[:, head] if bias.shape[1] > 1 else bias
            bias = bias[:, :, row] if bias.shape[2] > 1 else bias
        position = row + self.q_offset  # masks and score mods are asked about the heads and rows of the whole call
        scores = reference.attention_scores(
            q,
            k,
            mask=None if mask is None else masks.from_function(lambda b, h, i, j: mask(b, head[h], position[i], j)),
            score_mod=None if score_mod is None else lambda s, b, h, i, j: score_mod(s, b, head[h], position[i], j),
            bias=bias,
            q_offset=0,
            scale=self.q.shape[-1] ** -0.5 if self.scale is None else self.scale,
        )
        weights, lse = reference.softmax_with_lse(scores)
        return weights if self.sinks is None else weights * self._share_of_keys(lse, self.sinks[head])

    def _edited_heads(self) -> list[int]:
        numbers: set[int] = set()
        for _, heads in self.weight_edits:
            numbers.update(range(self.num_heads) if heads is None else heads)
        return sorted(numbers)

    def _from_weights(self, edited: list[int]) -> Tensor:
        weights = self.weights(edited)
        for fn, heads in self.weight_edits:
            if heads is None or heads == edited:
                weights = fn(weights)
            else:
                where = torch.tensor([edited.index(head) for head in heads], device=weights.device)
                weights = weights.index_copy(1, where, fn(weights[:, where]).to(weights.dtype))
        if self.dropout > 0.0:
            weights = nn.functional.dropout(weights, self.dropout)
        group = self.num_heads // self.num_kv_heads
        values = self.v[:, torch.tensor(edited, device=self.v.device) // group]
        return (weights @ values.to(weights.dtype)).to(self.q.dtype)


def _others(methods: Sequence[Method], method: Method) -> str:
    return ", ".join(type(other).__name__ for other in methods if other is not method) or "them"


@dataclass
class Method:
    """Base of everything that `regard.attach` joins to a model: a small dataclass whose fields are the paper's knobs.

    A subclass overrides the hooks of the seams it claims, and only those; `seams()` reads which from the class. Two attached
    methods may not claim the same seam. Hooks are called for every `AttentionCall` that `applies` accepts.

    Class attributes:
        kinds: kinds of attention that the method treats. towers: towers that it treats; None = the one that generates text
            (or the only one). honours_edits: whether `attend` itself honours `call.bias()` and `call.weight_edits`.

    A field named `layers` (a sequence of layer numbers, negative from the end; None = all), if the subclass has one, restricts it.
    """

    kinds: ClassVar[tuple[str, ...]] = ("self",)
    towers: ClassVar[tuple[str, ...] | None] = None
    honours_edits: ClassVar[bool] = False

    # Seams

    def mask(self, call: AttentionCall) -> Mask | None:
        """Who may look at whom, by absolute positions; joined to the model's own mask with `&`. None: no restriction here."""
        return None

    def score(self, call: AttentionCall) -> ScoreMod | None:
        """A score mod, applied to the scaled scores after the model's own soft cap."""
        return None

    def select(self, call: AttentionCall) -> Selection | None:
        """Which key blocks each query block looks at; the model's own mask holds inside."""
        return None

    def attend(self, call: AttentionCall) -> Tensor | None:
        """The head outputs (B, H, N, Dv), computed by the method itself (over a ragged cache, say). None: not this call."""
        return None

    def edit(self, call: AttentionCall) -> None:
        """Contribute through `call.add_bias`, `scale_keys`, `on_weights`, `on_output`; or only look."""

    def cache(self, model: nn.Module) -> Any:
        """A fresh, empty transformers `Cache` for the decoder of `model`; called once a generation."""
        return None

    def logits(self, model: nn.Module, session: Any) -> Any:
        """A transformers `LogitsProcessor`, or a list of them, for one generation. They see the raw logits, before the
        processors of `generate` itself (in beam search: log-probabilities)."""
        return None

    # Not seams

    def check(self, model: nn.Module) -> None:
        """Raise `UnsupportedModelError` when the method cannot serve `model`. Called by `attach` before anything is changed."""

    def setup(self, session: Any) -> None:
        """Called once, when everything is in place; may register `session.capture(name, module)` for what `logits` wants to read."""

    def applies(self, call: AttentionCall) -> bool:
        """Whether the hooks are to be called for this call."""
        towers = self.towers if self.towers is not None else (getattr(call.session, "main_tower", call.tower),)
        if call.kind not in self.kinds or call.tower not in towers:
            return False
        layers = getattr(self, "layers", None)
        return layers is None or call.layer in layers or call.layer - call.num_layers in layers

    @classmethod
    def seams(cls) -> tuple[str, ...]:
        """The seams that this class claims: the hooks it overrides."""
        return tuple(name for name in SEAMS if getattr(cls, name) is not getattr(Method, name))
