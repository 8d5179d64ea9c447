"""Language models that differ in one ingredient of attention, in all layers or in some; and the same model with layers left out.

Deconstructing Attention: Investigating Design Principles for Effective Language Modeling (Xue, Moosavi and Aletras 2025, arXiv
2510.11602), no code found. The layers are in `regard.nn.sequence.deconstructed`. The paper's blocks are Qwen2's (SwiGLU); here those of
`SmallLM` (GELU). Layers are counted from 0, "odd" ones are 1, 3, ...
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .._checks import bad_value, require, require_int, require_name, require_tensor
from ..nn.mixers import run_mixer
from ..nn.sequence.deconstructed import FixedMapAttention
from .small_lm import Block, SmallLM

__all__ = ["DeconstructedLM", "layer_places"]

KINDS = {
    "standard": "softmax", "mlp": "gated_mlp", "approximate": "taylor", "non_approximate": "cumulative_score",
    "random": "fixed_map", "sequence": "fixed_map", "static": "fixed_map",
}  # fmt: skip
PLACES = ("all", "none", "odd", "even", "top_half", "middle_half", "bottom_half", "quarter", "first", "last", "ends")


def layer_places(where: str | Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Numbers of the layers meant by a word or listed: "all", "none", "odd", "even", "top_half" (the last ones), "middle_half",
    "bottom_half", "quarter" (every fourth, from the first), "first", "last", "ends" (first and last)."""
    count = require_int("num_layers", num_layers, 1)
    if not isinstance(where, str):
        for one in where:
            require(-count <= one < count, "where", one, f"layers of {count}")
        return tuple(sorted({one % count for one in where}))
    require_name("where", where, PLACES)
    half = count // 2
    slices = {
        "all": slice(None), "none": slice(0), "odd": slice(1, None, 2), "even": slice(0, None, 2), "top_half": slice(count - half, None),
        "middle_half": slice((count - half) // 2, (count - half) // 2 + half), "bottom_half": slice(half), "quarter": slice(0, None, 4),
        "first": slice(1), "last": slice(count - 1, None),
    }  # fmt: skip
    every = range(count)
    return tuple(sorted({0, count - 1})) if where == "ends" else tuple(every[slices[where]])


class DeconstructedLM(SmallLM):
    """ids (B, N) -> logits (B, N, vocab_size): standard attention in some layers, one variant of it in the others.

    Args:
        vocab_size, dim, num_layers, num_heads.
        variant: "standard"; "mlp" no mixing; "approximate" Taylor weights; "non_approximate" one score a token; maps that do not look at
            this layer's text: "random" (from what the layers make of noise), "sequence" (of one fixed text), "static" (from embeddings).
        standard: which layers keep standard attention, see `layer_places`; "none" is the paper's uniform, "even" its hybrid.
        fixed_ids: for "sequence": (n,) int64, the fixed text, n at least the longest input. noise_std: of "random".
        qk_norm: of standard and "non_approximate" layers. options: of `SmallLM` (`mlp_ratio`, `max_len`, `rope_base`, `tie`, ...).

    "random", "sequence" and "static" read a text whole (`decodes` is False): queries and keys run beside it.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int = 256,
        num_layers: int = 4,
        num_heads: int = 4,
        *,
        variant: str = "standard",
        standard: str | Sequence[int] = "none",
        fixed_ids: Tensor | None = None,
        noise_std: float = 0.02,
        qk_norm: bool = False,
        **options: Any,
    ) -> None:
        self.variant = require_name("variant", variant, KINDS)
        kept = layer_places(standard, num_layers)
        self.kinds = tuple("standard" if i in kept else variant for i in range(num_layers))
        self.standard_layers, self._left_out = kept, frozenset[int]()
        max_len = options.get("max_len", 2048)
        own: dict[str, dict[str, Any]] = {"softmax": {"qk_norm": qk_norm}, "cumulative_score": {"qk_norm": qk_norm}}
        names = [KINDS[kind] for kind in self.kinds]
        for name in ("mixer", "mixer_options", "causal", "in_dim", "out_dim"):
            require(
                name not in options, "options", name, "what it may be: the layers are given by variant and standard"
            )
        super().__init__(
            vocab_size,
            dim,
            num_layers,
            num_heads,
            names,
            mixer_options=[own.get(name, {}) for name in names],
            **options,
        )
        self._maps = any(name == "fixed_map" for name in names)
        for block in self.blocks:
            if isinstance(block.mixer, FixedMapAttention):
                block.mixer.noise = block.mixer.noise[:0].clone()  # it is handed its source
        if self._maps and variant == "random":
            self.register_buffer("source_noise", torch.randn(max_len, dim) * noise_std)
        got = None if fixed_ids is None else "given"
        need = "given for the variant 'sequence' and for no other"
        require((fixed_ids is not None) == (variant == "sequence"), "fixed_ids", got, need)
        if fixed_ids is not None:
            require_tensor("fixed_ids", fixed_ids, dims=1)
            require(not fixed_ids.is_floating_point(), "fixed_ids", fixed_ids.dtype, "integers")
            self.register_buffer("fixed_ids", fixed_ids.clone())

    @property
    def decodes(self) -> bool:
        """Whether the model goes on from a state."""
        return not self._maps and not self._left_out and super().decodes

    @contextmanager
    def skip_layers(self, where: str | Sequence[int] = "odd") -> Iterator[DeconstructedLM]:
        """Within it the named layers are left out, mixer and MLP (the paper's test of what a hybrid's variant layers still do)."""
        before, self._left_out = self._left_out, frozenset(layer_places(where, len(self.blocks)))
        try:
            yield self
        finally:
            self._left_out = before

    def forward(self, ids: Tensor, state: Any = None, return_state: bool = False, return_aux: bool = False) -> Any:
        """As `SmallLM`; a state only where `decodes`."""
        if not self._maps and not self._left_out:
            return super().forward(ids, state, return_state, return_aux)
        if state is not None or return_state:
            raise bad_value("state", "wanted", "a model that decodes: no fixed maps, no layers left out")
        logits = self.head(self.norm(self._run(ids)))
        return (logits, logits.new_zeros((), dtype=torch.float32)) if return_aux else logits

    @torch.no_grad()
    def attentions(self, ids: Tensor) -> dict[int, Tensor]:
        """Layer -> weights (B, H, N, N), (1, H, N, N) where they do not depend on the text; layers without maps ("mlp", and
        "approximate", which makes none) are not in it."""
        found: dict[int, Tensor] = {}
        self._run(ids, found)
        return found

    def _run(self, ids: Tensor, found: dict[int, Tensor] | None = None) -> Tensor:
        x = self._embed(ids, 0)
        count, length = x.shape[:2]
        start, beside = x, False
        if self._maps and self.variant != "static":  # one more row, which runs through the same layers
            own = self.source_noise if self.variant == "random" else self.fixed_ids
            assert isinstance(own, Tensor)
            require(
                length <= len(own), "ids", f"{length} tokens", f"at most {len(own)}, those of the fixed {self.variant}"
            )
            row = own[None, :length] if self.variant == "random" else self._embed(own[None, :length], 0)
            x, beside = torch.cat((x, row.to(x.dtype))), True
        for index, block in enumerate(self.blocks):
            if index in self._left_out:
                continue
            assert isinstance(block, Block)
            if block.conv is not None and block.conv_norm is not None:
                x = x + block.conv(block.conv_norm(x))[0]
            normed = block.norm(x)
            if isinstance(block.mixer, FixedMapAttention):
                source = normed[count:] if beside else block.norm(start)
                mixed = block.mixer(normed, source=source)
                if found is not None:
                    found[index] = block.mixer.attention_weights(normed, source=source)
            else:
                mixed, _ = run_mixer(block.mixer, normed)
                weigh = getattr(block.mixer, "attention_weights", None)
                if found is not None and weigh is not None:
                    found[index] = weigh(normed[:count])
            x = block._rest(x + block.drop(mixed))
        return x[:count]
