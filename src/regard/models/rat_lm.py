"""RAT's language models: recurrence within chunks and attention across them, alone or in turns with attention to a window.

RAT: Bridging RNN Efficiency and Attention Accuracy in Language Modeling (Wei et al. 2025, arXiv 2507.04416); code read for numbers:
CLAIRE-Labo/RAT @ d4a8f54 (MIT), `src/model/backbone/sequence.py`, `sequence_interleave.py`, `src/task/task.py` (`LMTask`), `configs/`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .._checks import bad_value, require, require_int, require_name
from .small_lm import SmallLM

__all__ = ["RATLM"]

_MIXER = {"rat": "rat", "local": "sliding_window", "attention": "softmax", "recurrence": "gated_recurrence"}


class RATLM(SmallLM):
    """ids (B, N) -> logits (B, N, vocab_size): a `SmallLM` of the authors' layers, whose state dicts load (`regard.load_official`).

    Args:
        vocab_size, dim, num_layers, num_heads: the authors' 1.3B has 24 layers of 2048 with heads of 128.
        pattern: kinds of layers, in turns: "rat", "local" (attention to a window), "attention" (to all), "recurrence" (no attention).
            ("rat",) and ("rat", "local") are theirs.
        chunk_size: of "rat". num_groups: its query and key groups. window: how far "local" looks BACK, as theirs: window + 1 keys.
        tie: output weights are the embedding's. options: `mlp_ratio`, `rope_base`, `dropout`, `max_len` of `SmallLM`.

    Decoding keeps one item a chunk in "rat" layers and `window` tokens in "local" ones; read on with `model(ids, state,
    return_state=True)`, or `generate`.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        *,
        pattern: Sequence[str] = ("rat",),
        chunk_size: int = 16,
        num_groups: int | None = None,
        window: int = 1024,
        tie: bool = False,
        **options: Any,
    ) -> None:
        if isinstance(pattern, str) or not pattern:
            raise bad_value("pattern", pattern, f"a sequence of {', '.join(_MIXER)}")
        allowed = ("mlp_ratio", "rope_base", "dropout", "max_len")
        for name in options:
            require_name("option", name, allowed)
        own: dict[str, dict[str, Any]] = {
            "rat": {"chunk_size": chunk_size, "num_groups": num_groups},
            "local": {"window": require_int("window", window, 0) + 1},
        }
        kinds = [require_name("pattern", kind, _MIXER) for kind in pattern]
        super().__init__(
            vocab_size, dim, num_layers, num_heads, [_MIXER[kind] for kind in kinds],
            mixer_options=[own.get(kind, {}) for kind in kinds], tie=tie, mlp_bias=False, norm_eps=1e-6, **options,
        )  # fmt: skip
        self.pattern = tuple(kinds)

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' `LMTask` in our names; their attention has v, q, k in one matrix."""
        ours: dict[str, Tensor] = {}
        top = {"embedding.wte": "embedding", "backbone.ln": "norm", "head.lm_head": "head"}
        parts = {"input_norm": "norm", "ln": "mlp_norm", "fc1": "mlp.0", "fc2": "mlp.2"}
        for name, tensor in state.items():
            path, _, kind = name.rpartition(".")
            if path in top:
                ours[f"{top[path]}.{kind}"] = tensor
                continue
            if not name.startswith("backbone.layers."):
                ours[name] = tensor
                continue
            _, _, index, _, *rest = name.split(".")
            inner, block = ".".join(rest), f"blocks.{index}"
            if rest[0] in parts:
                ours[f"{block}.{parts[rest[0]]}.{kind}"] = tensor
            elif f"backbone.layers.{index}.seq_layer.gate_bias" in state:
                ours[f"{block}.mixer.{inner}"] = tensor
            elif rest[0] == "in_proj":
                require(len(tensor) % 3 == 0, name, f"shape {tuple(tensor.shape)}", "three matrices in one")
                for which, one in zip("vqk", tensor.chunk(3)):
                    ours[f"{block}.mixer.{which}_proj.{kind}"] = one
            else:
                ours[f"{block}.mixer.o_proj.{kind}"] = tensor
        return ours
