"""Titans as language models: one kind of Titans layer, MLPs, and residuals around both.

Titans: Learning to Memorize at Test Time (Behrouz et al. 2025, arXiv 2501.00663). No code by the authors.
"""

from __future__ import annotations

from typing import Any

from .._checks import require_name
from .small_lm import SmallLM

__all__ = ["TitansLM"]

ARCHITECTURES = ("mac", "mag", "mal", "lmm")
_SHELL = ("mlp_ratio", "positions", "rope_base", "dropout", "max_len", "tie", "short_conv", "mlp_bias", "norm_eps")


class TitansLM(SmallLM):
    """ids (B, N) -> logits (B, N, vocab_size). It generates at constant memory, however long the text.

    Args:
        vocab_size, dim, num_layers, num_heads.
        architecture: "mac" memory as context, "mag" as gate, "mal" as layer, "lmm" the memory alone.
        options: of the layer (`segment` of mac, `window` of mag and mal, `persistent`, `depth`, `chunk_size`, ...: `regard.nn.TitansMAC`
            and its siblings, `regard.nn.NeuralMemory`) and of the shell (`mlp_ratio`, `dropout`, `tie`, ...: `SmallLM`).
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int = 256,
        num_layers: int = 4,
        num_heads: int = 4,
        *,
        architecture: str = "mac",
        **options: Any,
    ) -> None:
        self.architecture = require_name("architecture", architecture, ARCHITECTURES)
        shell = {name: options.pop(name) for name in _SHELL if name in options}
        super().__init__(
            vocab_size, dim, num_layers, num_heads, f"titans_{architecture}", mixer_options=options or None, **shell
        )
