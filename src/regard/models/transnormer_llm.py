"""TransNormerLLM: a language model of linear attention alone, each head forgetting at a fixed rate, with gated layers and bare norms.

Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention (Qin et al. 2024, arXiv 2405.17381), and the model's
report, TransNormerLLM (Qin et al. 2023, arXiv 2307.14995). OpenNLPLab/TransnormerLLM @ e774439 (Apache-2.0) holds finetuning scripts
alone; code read for numbers: the model file of the released checkpoints, as kept in weigao266/TNL-MoE @ 007576f (Apache-2.0),
`smoe/models/tnl/modeling_transnormer.py`. What differs: rotary positions belong to the state and not to the layer (theirs leak into the
next sequence), several tokens can be decoded at once, a state may be read on with padding, and one layer is a model too (theirs
divides by zero).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import bad_type, bad_value, require, require_int, require_name, require_tensor
from ..nn.layers import rename_keys
from ..nn.sequence.lightning_attention import ACTIVATIONS, NORMS, SimpleRMSNorm
from .small_lm import SmallLM, SmallLMState

__all__ = ["TransNormerLLM"]

_CONFIG = {
    "vocab_size": "vocab_size", "decoder_embed_dim": "dim", "decoder_layers": "num_layers", "decoder_attention_heads": "num_heads",
    "hidden_dim": "hidden_dim", "glu_dim": "glu_dim", "linear_act_fun": "activation", "norm_type": "norm", "bias": "bias",
    "pad_token_id": "padding_id",
}  # fmt: skip


class GatedLinearUnit(nn.Module):
    """l3(l1(x) * l2(x)), without an activation: (B, N, dim) -> (B, N, dim)."""

    def __init__(self, dim: int, hidden: int, bias: bool = False) -> None:
        super().__init__()
        self.l1, self.l2 = nn.Linear(dim, hidden, bias=bias), nn.Linear(dim, hidden, bias=bias)
        self.l3 = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.l3(self.l1(x) * self.l2(x))


class TransNormerLLM(SmallLM):
    """ids (B, N) -> logits (B, N, vocab_size): a `SmallLM` of the authors' layers, whose state dicts load (`regard.load_official`).

    Args:
        vocab_size, dim, num_layers, num_heads: the defaults are the 385M model.
        hidden_dim: width inside the attention, default dim. glu_dim: width of the gated unit; None: dim.
        lrpe: which layers have the linearized relative positions: one truth value a layer (the report: the first layer alone), or None.
        activation: of queries and keys, a name in the authors' configurations. norm: "simplermsnorm" or "layernorm", everywhere.
        bias: of all maps but the head. scale_embedding: embeddings times sqrt(dim). padding_id: token whose embedding is not trained.
        variant: "released" (default): decays of the code and of every checkpoint, ALiBi's slopes; "paper": those of equation 10.

    `TransNormerLLM.from_config(config)` reads the authors' `config.json`. Weights are random: normal, 0.02.
    Decoding keeps one matrix a head and layer, whatever the length: `model(ids, state, return_state=True)`, or `generate`.
    """

    def __init__(
        self,
        vocab_size: int = 64000,
        dim: int = 1024,
        num_layers: int = 24,
        num_heads: int = 8,
        *,
        hidden_dim: int | None = None,
        glu_dim: int | None = 2816,
        lrpe: Sequence[Any] | None = None,
        activation: str = "silu",
        norm: str = "simplermsnorm",
        bias: bool = False,
        scale_embedding: bool = True,
        padding_id: int | None = 0,
        variant: str = "released",
    ) -> None:
        require_name("variant", variant, ("released", "paper"))
        require_name("norm", norm, NORMS)
        require_name("activation", activation, ACTIVATIONS)
        require_int("vocab_size", vocab_size, 1)
        require_int("num_layers", num_layers, 1)
        places = [False] * num_layers if lrpe is None else [bool(one) for one in lrpe]
        require(len(places) == num_layers, "lrpe", lrpe, f"one value for each of the {num_layers} layers")
        if padding_id is not None:
            require(require_int("padding_id", padding_id) < vocab_size, "padding_id", padding_id, f"below {vocab_size}")
        own = {
            "variant": "transnormer" if variant == "released" else "paper", "hidden_dim": hidden_dim, "bias": bias,
            "activation": activation, "norm": norm,
        }  # fmt: skip
        super().__init__(
            vocab_size, dim, num_layers, num_heads, ["lightning"] * num_layers,
            mixer_options=[{**own, "lrpe": one} for one in places], mlp_ratio=0, positions="none", tie=False,
        )  # fmt: skip
        hidden = dim if glu_dim is None else require_int("glu_dim", glu_dim, 1)
        make: Any = SimpleRMSNorm if norm == "simplermsnorm" else nn.LayerNorm
        for block in self.blocks:
            block.norm, block.mlp_norm, block.mlp = make(dim), make(dim), GatedLinearUnit(dim, hidden, bias)
        self.norm = make(dim)
        self.embedding = nn.Embedding(vocab_size, dim, padding_idx=padding_id)
        self.scale = math.sqrt(dim) if scale_embedding else 1.0
        self._reset()

    @torch.no_grad()
    def _reset(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx].zero_()

    def _embed(self, ids: Tensor, offset: int) -> Tensor:
        return self.scale * super()._embed(ids, offset)

    def forward(  # type: ignore[override]
        self,
        ids: Tensor,
        state: SmallLMState | None = None,
        return_state: bool = False,
        return_aux: bool = False,
        padding_mask: Tensor | None = None,
    ) -> Any:
        """As `SmallLM.forward`. padding_mask: (B, N), nonzero for tokens: values of padding are zero in every layer, while memories go on
        fading over it, as the authors have it; for left padding, in the call that reads the prompt."""
        if padding_mask is None:
            return super().forward(ids, state, return_state, return_aux)
        require(not return_aux, "return_aux", True, "False with a padding mask")
        require_tensor("padding_mask", padding_mask, dims=2)
        offset = 0
        if state is not None:
            if not isinstance(state, SmallLMState):
                raise bad_type("state", state, "a SmallLMState")
            offset = state.position
        x = self._embed(ids, offset)
        held = [None] * len(self.blocks) if state is None else state.mixers
        require(
            len(held) == len(self.blocks), "state", f"{len(held)} layers", f"{len(self.blocks)}, those of this model"
        )
        after = SmallLMState([None] * len(held), [], offset + x.shape[1])
        for block, own in zip(self.blocks, held):
            given = {"state": own, "return_state": True, "padding_mask": padding_mask}
            mixed, own = block.mixer(block.norm(x), **given)  # type: ignore[operator, union-attr]
            x = block._rest(x + mixed)  # type: ignore[operator, union-attr]
            after.mixers.append(own)
        logits = self.head(self.norm(x))
        return (logits, after) if return_state else logits

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | str | Path, **changes: Any) -> TransNormerLLM:
        """The model that the authors' configuration (`config.json`, or what is in it) describes, with `changes` to our arguments.

        Raises ValueError where the file is not one of theirs.
        """
        if isinstance(config, (str, Path)):
            try:
                config = json.loads(Path(config).read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise bad_value("config", str(config), f"a JSON file that can be read ({error})") from error
        if not isinstance(config, Mapping):
            raise bad_type("config", config, "a mapping, or the path of a config.json")
        missing = [
            name for name in ("decoder_embed_dim", "decoder_layers", "decoder_attention_heads") if name not in config
        ]
        require(not missing, "config", f"no {', '.join(missing)}", "a configuration of TransNormerLLM")
        given = {ours: config[theirs] for theirs, ours in _CONFIG.items() if theirs in config}
        if given.get("glu_dim") == -1:
            given["glu_dim"] = None
        if given.get("activation") not in (None, *ACTIVATIONS):
            given["activation"] = "identity"  # as theirs falls back
        if given.get("norm") not in (None, "simplermsnorm"):
            given["norm"] = "layernorm"
        given["lrpe"] = list(config.get("linear_use_lrpe_list") or []) or None
        given["scale_embedding"] = not config.get("no_scale_embedding", False)
        return cls(**{**given, **changes})

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' `TransnormerForCausalLM` in our names."""
        return rename_keys(
            state,
            (r"^lm_head\.", "head."),
            (r"^model\.embed_tokens\.", "embedding."),
            (r"^model\.final_norm\.", "norm."),
            (r"^model\.layers\.(\d+)\.token_mixer\.out_proj\.", r"blocks.\1.mixer.o_proj."),
            (r"^model\.layers\.(\d+)\.token_mixer\.", r"blocks.\1.mixer."),
            (r"^model\.layers\.(\d+)\.token_norm\.", r"blocks.\1.norm."),
            (r"^model\.layers\.(\d+)\.channel_norm\.", r"blocks.\1.mlp_norm."),
            (r"^model\.layers\.(\d+)\.channel_mixer\.", r"blocks.\1.mlp."),
        )
