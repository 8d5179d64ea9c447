"""Emphasis: attention steered to a span of the prompt, the user's words above all.

Paper: Wang et al. 2024, "On the Loss of Context-awareness in General Instruction Fine-tuning" (NeurIPS 2025, arXiv 2411.02688). Authors'
code, read for numbers: YihanWang617/context_awareness (`UserSteeredWrapper.py`, and its PASTA, `PASTA/pastalib/pasta.py`).

Weights on prompt keys outside the span are multiplied by alpha < 1 and each row is renormalised: log alpha added to the scores, in the
prompt and in every decode step. What the model itself has said since is left as it is.

What differs in the authors' code, and is offered as `variant="released"`: the factor is written into the one mask that all layers share, so
that the l-th steered layer gets alpha to the power l and later layers that were not to be steered get it too; and it is written once
for every piece of the span, so that with n pieces keys outside get alpha^n and the pieces themselves alpha^(n-1). Since the strength
of the edit then depends on where it happens and on how often the user spoke, the paper's form is the default.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..._checks import bad_type, require, require_name
from ..call import AttentionCall, Method
from ..layer_spec import in_layers
from .zero_tuning import check_layers, heads_by_layer

__all__ = ["Emphasize", "emphasis_exponent"]

FORMS = ("exclude", "include", "generation")
VARIANTS = ("paper", "released")


def emphasis_exponent(span: Tensor, form: str = "exclude", variant: str = "paper") -> Tensor:
    """Which power of alpha the weight of each prompt key is multiplied by: (B, T) float32 from a span, bool (B, T).

    "exclude": 1 outside the span, 0 in it. "include": 0 in the span, -1 outside (alpha above 1 emphasises). "generation": 1 on the
    whole prompt. In the released variant every run of neighbouring span tokens counts: with n runs, n outside and n - 1 inside.
    """
    require_name("form", form, FORMS)
    require_name("variant", variant, VARIANTS)
    inside = span.float()
    if variant == "paper":
        pieces = torch.ones_like(inside[:, :1])
    else:
        before = torch.nn.functional.pad(span, (1, 0))[:, :-1]
        pieces = (span & ~before).sum(1, keepdim=True).float()
    if form == "exclude":
        return pieces - inside
    return inside - 1.0 if form == "include" else pieces.expand_as(inside)


@dataclass
class Emphasize(Method):
    """Have a model attend more to a span of its prompt: every other prompt key counts alpha times as much.

        prompt = regard.chat_spans(tokenizer, messages)
        with regard.attach(model, regard.Emphasize("user", alpha=0.9), spans=prompt.spans):
            model.generate(**prompt.inputs)

    Args:
        span: name of a span given to `attach(spans=...)`, or several names (their union), or a bool tensor (B, tokens of the prompt).
        alpha: > 0; 1 changes nothing. The authors use 0.9 and 0.95 in the released variant, which over 32 layers is far stronger than
            the same number in the paper's form.
        heads: query heads: numbers, applied in every layer treated; or (layer, head) pairs, or {layer: head numbers}. None = all.
        layers: which layers, negative from the end; None = all.
        form: "exclude" (the paper's), "include" or "generation", see `emphasis_exponent`.
        variant: "paper" or "released", see the head of this file. Single heads are not carried over from layer to layer in either.

    A span without any token in some row leaves that row as it is.
    """

    span: Any = "user"
    alpha: float = 0.9
    heads: Any = None
    layers: Sequence[int] | str | None = None
    form: str = "exclude"
    variant: str = "paper"

    def __post_init__(self) -> None:
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, (int, float)):
            raise bad_type("alpha", self.alpha, "a number > 0")
        require(0 < self.alpha < float("inf"), "alpha", self.alpha, "a finite number > 0")
        require_name("form", self.form, FORMS)
        require_name("variant", self.variant, VARIANTS)
        need = "the name of a span, several names, or a bool tensor (B, tokens)"
        if isinstance(self.span, Tensor):
            fits = self.span.dtype == torch.bool and self.span.dim() == 2
            require(fits, "span", f"{self.span.dtype} of shape {tuple(self.span.shape)}", need)
        elif isinstance(self.span, str):
            self.span = (self.span,)
        elif isinstance(self.span, Sequence) and self.span and all(isinstance(name, str) for name in self.span):
            self.span = tuple(self.span)
        else:
            raise bad_type("span", self.span, need)
        self._table = heads_by_layer(self.heads)

    def setup(self, session: Any) -> None:
        check_layers(self._table, session.num_layers)
        if self.layers is not None and not isinstance(self.layers, str):
            check_layers({layer: [] for layer in self.layers}, session.num_layers)
        if not isinstance(self.span, Tensor):
            for name in self.span:
                given = f"the name of a span given to attach(spans=...): {', '.join(session.spans) or 'none given'}"
                require(name in session.spans, "span", name, given)

    def applies(self, call: AttentionCall) -> bool:
        towers = (getattr(call.session, "main_tower", call.tower),)
        if call.kind != "self" or call.tower not in towers:
            return False
        return self._accumulates or in_layers(self.layers, call.layer, call.num_layers)

    @property
    def _accumulates(self) -> bool:
        return self.variant == "released" and self.heads is None

    def edit(self, call: AttentionCall) -> None:
        heads = self.heads if self._table is None else self._heads_here(call)
        times = self._times(call)
        if self.alpha == 1 or times == 0 or (heads is not None and not len(heads)):
            return
        # layers of a forward that are treated alike share one bias
        kept = {} if call.session is None else call.session.last
        name = f"{self._name(call)} {call.kv_len} {call.key_offset} {times} {heads}"
        if name not in kept:
            kept[name] = self._bias(call, times, heads)
        call.add_bias(kept[name])

    def _bias(self, call: AttentionCall, times: int, heads: Sequence[int] | None) -> Tensor:
        exponent = self._exponent(call)
        if call.q.dtype == torch.float64:
            exponent = exponent.double()
        bias = (exponent * (times * math.log(self.alpha)))[:, None, None]
        if heads is None:
            return bias
        numbers = torch.tensor(call._head_numbers(heads), device=bias.device)
        every = bias.new_zeros(bias.shape[0], call.num_heads, 1, bias.shape[3])
        return every.index_copy(1, numbers, bias.expand(-1, len(numbers), -1, -1))

    def _times(self, call: AttentionCall) -> int:
        """How many layers have written into the mask by now."""
        if not self._accumulates:
            return 1
        return sum(in_layers(self.layers, layer, call.num_layers) for layer in range(call.layer + 1))

    def _exponent(self, call: AttentionCall) -> Tensor:
        """(B, M) over the keys of this call: 0 for what came after the prompt. Over the prompt it is made once a forward."""
        kept = {} if call.session is None else call.session.last
        name = self._name(call)
        if name not in kept:
            kept[name] = self._over_prompt(call)
        exponent: Tensor = kept[name][:, call.key_offset : call.key_offset + call.kv_len]
        return torch.nn.functional.pad(exponent, (0, call.kv_len - exponent.shape[1]))

    def _name(self, call: AttentionCall) -> str:
        """Under which a forward keeps what was made for it."""
        given = (
            [id(self.span)] if isinstance(self.span, Tensor) else [id(call.session.spans[name]) for name in self.span]
        )
        return f"emphasis {id(self)} {given} {call.batch}"

    def _over_prompt(self, call: AttentionCall) -> Tensor:
        if isinstance(self.span, Tensor):
            span = self.span
        else:
            spans = [call.session.spans[name] for name in self.span]
            span = spans[0]
            for other in spans[1:]:
                span = span | other
        rows = span.shape[0]
        require(call.batch % rows == 0, "span", f"{rows} rows", f"a divisor of the batch, {call.batch}")
        exponent = emphasis_exponent(span, self.form, self.variant) * span.any(1, keepdim=True)
        return exponent.to(call.q.device).repeat_interleave(call.batch // rows, dim=0)

    def _heads_here(self, call: AttentionCall) -> list[int]:
        assert self._table is not None
        return sorted({*self._table.get(call.layer, ()), *self._table.get(call.layer - call.num_layers, ())})
