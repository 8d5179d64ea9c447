"""The authors' GPT with landmark attention: trained on short texts, it reads long ones by retrieving blocks.

Mohtashami and Jaggi 2023 (NeurIPS), arXiv 2305.16300. Numbers from epfml/landmark-attention (Apache-2.0),
`lm_benchmark/models/landmark.py`. Their state dicts load; parameter names are GPT-2's, as theirs. Not here: `enable_rem_score`, the
`nomem` and `ignore_mem` softmaxes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._checks import require, require_int, require_tensor
from ..nn.sequence.landmark_attention import LandmarkAttention, LandmarkCache, LayerMemory

__all__ = ["LandmarkGPT"]


class _MLP(nn.Module):
    def __init__(self, dim: int, bias: bool, dropout: float) -> None:
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(dim, 4 * dim, bias=bias), nn.Linear(4 * dim, dim, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(nn.functional.gelu(self.c_fc(x))))


class _Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, bias: bool, dropout: float, group_dropout: float) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(dim, bias=bias), nn.LayerNorm(dim, bias=bias)
        self.attn = LandmarkAttention(dim, num_heads, bias, dropout, group_dropout)
        self.mlp = _MLP(dim, bias, dropout)

    def forward(self, x: Tensor, is_landmark: Tensor, positions: Tensor | None, memory: LayerMemory | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), is_landmark, positions, memory)
        return x + self.mlp(self.ln_2(x))


class LandmarkGPT(nn.Module):
    """Pre-norm GPT with landmark attention and tied embeddings: token ids (B, N) -> logits (B, N, vocab_size).

    For training give it ids with landmarks (`regard.ops.insert_landmarks`), at most as long as memory allows. For long texts give it
    plain ids piece by piece, with a `LandmarkCache`:

        cache = model.new_cache(topk=2)
        for piece in ids.split(250, dim=1):
            logits = model(piece, cache=cache)  # landmarks go in and come out by themselves

    Args:
        vocab_size: the landmark's id included. landmark_id: which it is (default: the last). dim, depth, num_heads: the network's.
        bias: of linear maps and norms. dropout, group_dropout: see `LandmarkAttention`.
        position_jump: in training, positions jump forward by a random number below this at every landmark, so that distances between
            blocks are learnt (the authors' option for memories whose positions are not stingy).
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int = 1024,
        depth: int = 12,
        num_heads: int = 8,
        landmark_id: int | None = None,
        bias: bool = False,
        dropout: float = 0.0,
        group_dropout: float = 0.0,
        position_jump: int = 0,
    ) -> None:
        super().__init__()
        require_int("vocab_size", vocab_size, 2)
        require_int("depth", depth, 1)
        self.landmark_id = vocab_size - 1 if landmark_id is None else require_int("landmark_id", landmark_id, 0)
        require(self.landmark_id < vocab_size, "landmark_id", landmark_id, f"less than vocab_size, {vocab_size}")
        self.position_jump = require_int("position_jump", position_jump, 0)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab_size, dim),
                "drop": nn.Dropout(dropout),
                "h": nn.ModuleList(_Block(dim, num_heads, bias, dropout, group_dropout) for _ in range(depth)),
                "ln_f": nn.LayerNorm(dim, bias=bias),
            }
        )
        self.lm_head = nn.Linear(dim, vocab_size, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight
        for name, parameter in self.named_parameters():
            if name.endswith("weight") and parameter.dim() == 2:
                std = 0.02 / (2 * depth) ** 0.5 if name.endswith("c_proj.weight") else 0.02
                nn.init.normal_(parameter, std=std)
            elif name.endswith(("c_attn.bias", "c_proj.bias", "c_fc.bias")):
                nn.init.zeros_(parameter)

    def new_cache(self, block: int = 50, topk: int = 1, **options: object) -> LandmarkCache:
        """An empty memory; options as in `LandmarkCache`."""
        return LandmarkCache(self.landmark_id, block, topk, **options)  # type: ignore[arg-type]

    def forward(self, ids: Tensor, cache: LandmarkCache | None = None, positions: Tensor | None = None) -> Tensor:
        """
        Args:
            ids: int64 (B, N); with landmarks, or with a cache without them.
            cache: what came before, extended by this piece. Rows of logits of landmarks are left out then.
            positions: int64 (N,) or (B, N), without a cache; default 0, 1, 2 ..., with the jumps of training.
        """
        require_tensor("ids", ids, dims=2)
        if cache is not None:
            require(not self.training, "cache", "a cache in training", "eval mode")
            require(positions is None, "positions", "positions beside a cache", "None")
            ids = cache.begin(ids)
        is_landmark = ids == self.landmark_id
        if positions is None and cache is None and self.training and self.position_jump:
            positions = self._jumping(is_landmark)
        x = self.transformer["drop"](self.transformer["wte"](ids))
        blocks: Any = self.transformer["h"]
        for number, block in enumerate(blocks):
            x = block(x, is_landmark, positions, None if cache is None else cache.layer(number))
        x = self.transformer["ln_f"](x)
        if cache is not None:
            x = x[:, ~is_landmark[0]]
        return self.lm_head(x)

    def _jumping(self, is_landmark: Tensor) -> Tensor:
        jump = torch.randint(self.position_jump, is_landmark.shape, device=is_landmark.device) * is_landmark
        plain = torch.arange(is_landmark.shape[1], device=is_landmark.device)
        return plain + jump.cumsum(1) - jump

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' state dict without its buffers (causal masks, rotary frequencies) and with the tied embedding once more."""
        kept = {key: value for key, value in state.items() if not key.endswith((".attn.bias", "wpe.freqs"))}
        if "lm_head.weight" in kept:
            kept.setdefault("transformer.wte.weight", kept["lm_head.weight"])
        return kept
