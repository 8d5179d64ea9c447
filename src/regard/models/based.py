"""Based's language models: gated convolutions, with Taylor linear attention and attention to a window at a few places.

Simple linear attention language models balance the recall-throughput tradeoff (Arora et al. 2024, arXiv 2402.18668); code read for
numbers: HazyResearch/based @ 32c1bd4 (Apache-2.0), `based/models/gpt.py`, `block.py`, `mlp.py`, `train/configs/experiment/reference/`.
What differs: the sum along the layers has the dtype of the model (theirs float32 also where the model is bfloat16). A decay that
their 1.3B configuration sets is handed to layers that do not read it, there and so here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import require, require_int, require_name
from ..nn.sequence.based import BasedLinearAttention, BasedSlidingAttention, GatedShortConv
from .small_lm import SmallLM

__all__ = ["BasedLM"]

_ROUND = 256  # the authors' MLP rounds its hidden width up to a multiple of this

PRESETS: dict[str, dict[str, Any]] = {
    "360m": {"dim": 1024, "num_layers": 27, "linear_layers": (1, 6, 11, 16, 21), "window_layers": (2, 7, 12, 17, 22)},
    "1.3b": {
        "dim": 1792,
        "num_layers": 36,
        "linear_layers": (1, 6, 11, 16, 21, 27, 33),
        "window_layers": (2, 7, 12, 17, 22, 28, 34),
    },
}
"""`based-360m.yaml` and `based-1b.yaml`, beside the defaults of `BasedLM`."""


class _SwiGLU(nn.Module):
    """W_2 (u silu(g)), (u, g) = W_1 x, without biases."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 2 * hidden, bias=False), nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(up * F.silu(gate))


class BasedLM(SmallLM):
    """ids (B, N) -> logits (B, N, vocab_size): a `SmallLM` of the authors' layers, whose state dicts load (`regard.load_official`).

    Args:
        vocab_size: rounded up to a multiple of 8, as theirs. dim, num_layers, num_heads.
        linear_layers, window_layers: numbers of the layers with Taylor linear attention and with attention to a window; the others are
            gated convolutions.
        feature_dim: of the linear attention's queries and keys. window_size: W; a token sees itself and W // 2 before it, as released.
        expand, kernel_size: of the convolutions. hidden: width of the MLPs, rounded up to a multiple of 256; default 2 * dim.
        eps: of the linear attention's division. compact: its features (see `regard.nn.BasedLinearAttention`).
        options: `rope_base`, `dropout`, `tie` of `SmallLM`.

    `BasedLM.from_preset("360m")` and `"1.3b"` are the authors' sizes, with random weights. Decoding keeps states of fixed size.
    """

    def __init__(
        self,
        vocab_size: int = 50257,
        dim: int = 1024,
        num_layers: int = 27,
        num_heads: int = 16,
        *,
        linear_layers: Sequence[int] = (1, 6, 11, 16, 21),
        window_layers: Sequence[int] = (2, 7, 12, 17, 22),
        feature_dim: int = 16,
        window_size: int = 256,
        expand: int = 4,
        kernel_size: int = 3,
        hidden: int | None = None,
        eps: float = 1e-12,
        compact: bool = True,
        **options: Any,
    ) -> None:
        for name in options:
            require_name("option", name, ("rope_base", "dropout", "tie"))
        require_int("vocab_size", vocab_size, 1)
        require_int("num_layers", num_layers, 1)
        for name, layers in (("linear_layers", linear_layers), ("window_layers", window_layers)):
            for layer in layers:
                require(require_int(name, layer) < num_layers, name, layer, f"numbers below num_layers ({num_layers})")
        both = sorted(set(linear_layers) & set(window_layers))
        require(not both, "window_layers", both, "none of linear_layers")
        hidden = 2 * dim if hidden is None else require_int("hidden", hidden, 1)
        own: dict[str, dict[str, Any]] = {
            "gated_conv": {"expand": expand, "kernel_size": kernel_size},
            "based": {"feature_dim": feature_dim, "eps": eps, "compact": compact},
            "sliding_window": {"window": require_int("window_size", window_size, 1) // 2 + 1},
        }
        names = ["gated_conv"] * num_layers
        for kind, layers in (("based", linear_layers), ("sliding_window", window_layers)):
            for layer in layers:
                names[layer] = kind
        super().__init__(
            -(-vocab_size // 8) * 8, dim, num_layers, num_heads, names,
            mixer_options=[own[name] for name in names], mlp_ratio=0, norm_eps=1e-5, **options,
        )  # fmt: skip
        for block in self.blocks:
            block.mlp_norm, block.mlp = nn.RMSNorm(dim, 1e-5), _SwiGLU(dim, -(-hidden // _ROUND) * _ROUND)
        self._reset(num_layers)

    def _reset(self, num_layers: int) -> None:
        """Normal of 0.02, less by the root of the number of branches where a branch ends, as the authors (and GPT-2) begin."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                ends = name.endswith((".out_proj", ".o_proj", ".fc2"))
                nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * num_layers) if ends else 0.02)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> BasedLM:
        """The authors' "360m" or "1.3b", with `changes` to the arguments; their Hub checkpoints say their own window_size."""
        return cls(**{**PRESETS[require_name("name", name, PRESETS)], **changes})

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' `GPTLMHeadModel` (with or without the `model.` of their checkpoints) in our names; counters and a decay
        that no layer reads are left out."""
        ours: dict[str, Tensor] = {}
        mixers: dict[str, dict[str, Tensor]] = {}
        top = {"embeddings.word_embeddings.weight": "embedding.weight", "ln_f.weight": "norm.weight"}
        parts = {"norm1": "norm", "norm2": "mlp_norm"}
        for name, tensor in state.items():
            short = name.removeprefix("model.").removeprefix("transformer.")
            if "metrics" in short or short == "decay.decay":
                continue
            if not short.startswith("layers."):
                ours[top.get(short, short.replace("lm_head.", "head."))] = tensor
                continue
            _, index, part, rest = short.split(".", 3)
            if part == "mixer":
                mixers.setdefault(index, {})[rest] = tensor
            else:
                ours[f"blocks.{index}.{parts.get(part, part)}.{rest}"] = tensor
        for index, given in mixers.items():
            if "Wqkv.weight" in given:
                renamed = BasedSlidingAttention.official_keys(given)
            elif "conv.conv.weight" in given:
                renamed = GatedShortConv.official_keys(given)
            else:
                renamed = BasedLinearAttention.official_keys(given)
            ours.update({f"blocks.{index}.mixer.{key}": tensor for key, tensor in renamed.items()})
        if "embedding.weight" in ours:
            ours.setdefault("head.weight", ours["embedding.weight"])  # tied weights are often saved once
        return ours
