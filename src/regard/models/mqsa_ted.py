"""MQSA-TED: which item comes next, from queries of several lengths over what a user met. With one window of 1 it is SASRec.

Zhu et al., WSDM 2024, arXiv 2311.01056. Code read for numbers: zhuty16/MQSA-TED @ 91c9001 (no licence), `MQSA_TED.py`, a TensorFlow 1 graph
whose variables load by their names. What differs: any number of windows; inputs shorter than `max_len` take the last positions.
The distillation of transitions is a loss: `regard.losses.TransitionDistilledLoss`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import bad_type, require, require_int
from ..nn.sequence.multi_query_self_attention import MultiQuerySelfAttention

__all__ = ["MQSATED"]


class MQSATED(nn.Module):
    """ids (B, N <= max_len) -> logits (B, N, num_items + 1) of the item after each.

    Items are numbers from 0; `num_items` is padding, at the left of a sequence, and the last logit (always 0) is its own.

    Args:
        num_items. dim: channels. num_heads; depth: blocks of each branch. max_len: positions.
        windows, weights: of the queries, as `MultiQuerySelfAttention`; (1,), (1.0,) is SASRec. dropout.
    """

    def __init__(
        self,
        num_items: int,
        dim: int = 64,
        num_heads: int = 1,
        depth: int = 1,
        max_len: int = 50,
        windows: Sequence[int] = (1, 3),
        weights: Sequence[float] = (0.5, 0.5),
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.num_items, self.max_len = require_int("num_items", num_items, 1), require_int("max_len", max_len, 1)
        self.mixer = MultiQuerySelfAttention(dim, num_heads, windows, weights, depth=depth, dropout=dropout)
        self.dim, self.dropout = dim, dropout
        self.items, self.positions = (
            nn.Parameter(torch.randn(num_items, dim) * 0.01),
            nn.Parameter(torch.randn(max_len, dim) * 0.01),
        )
        for module in self.mixer.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def encode(self, ids: Tensor) -> Tensor:
        """ids (B, N) -> (B, N, dim), the mixed branches."""
        x, exists = self._embedded(ids)
        return self.mixer(x, exists)

    def forward(self, ids: Tensor) -> Tensor:
        return self.encode(ids) @ F.pad(self.items, (0, 0, 0, 1)).T

    def scores(self, ids: Tensor) -> Tensor:
        """(B, num_items): how likely each item is to follow the last place."""
        return self.encode(ids)[:, -1] @ self.items.T

    def embed_items(self, items: Tensor) -> Tensor:
        """Scaled vectors of items (M,), dropout on them in training: what transitions are distilled into. (M, dim)."""
        return F.dropout(self.items[items] * self.dim**0.5, self.dropout, self.training)

    @torch.no_grad()
    def attention_weights(self, ids: Tensor) -> list[Tensor]:
        """Who looks at whom in the first block of each branch: (B, num_heads, N, N) a window."""
        x, exists = self._embedded(ids)
        return [blocks[0].attention_weights(x, exists) for blocks in self.mixer.branches]  # type: ignore[index]

    def _embedded(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        if not isinstance(ids, Tensor) or ids.is_floating_point():
            raise bad_type("ids", ids, "an integer tensor")
        fits = ids.dim() == 2 and 0 < ids.shape[1] <= self.max_len
        require(fits, "ids", f"shape {tuple(ids.shape)}", f"(B, 1 to max_len {self.max_len})")
        in_range = not ids.numel() or (int(ids.min()) >= 0 and int(ids.max()) <= self.num_items)
        require(
            in_range,
            "ids",
            "numbers out of range",
            f"items from 0 to {self.num_items - 1}, or {self.num_items} for padding",
        )
        exists = ids != self.num_items
        x = F.pad(self.items, (0, 0, 0, 1))[ids] * self.dim**0.5 + self.positions[-ids.shape[1] :]
        return F.dropout(x, self.dropout, self.training) * exists[..., None], exists

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The variables of the authors' graph in our names (kernels turned); ours pass unchanged."""
        if "item_embedding/item_embedding" not in state:
            return state
        made = {
            "items": state["item_embedding/item_embedding"],
            "positions": state["positional_embedding/position_embedding"],
        }
        depth = sum(re.fullmatch(r"dense(_\d+)?/kernel", name) is not None for name in state) // 10
        for branch, scope in enumerate(("block_short_query", "block_long_query")):
            norms = [f"branches.{branch}.{i}.{name}" for i in range(depth) for name in ("query_norm", "norm")]
            for i, norm in enumerate([*norms, f"norms.{branch}"]):
                made[f"mixer.{norm}.bias"] = state[_numbered(f"{scope}/Variable", 2 * i)]
                made[f"mixer.{norm}.weight"] = state[_numbered(f"{scope}/Variable", 2 * i + 1)]
            for i in range(depth):
                for j, name in enumerate(("q_proj", "k_proj", "v_proj", "fc1", "fc2")):
                    theirs, ours = (
                        _numbered("dense", 5 * (branch * depth + i) + j),
                        f"mixer.branches.{branch}.{i}.{name}",
                    )
                    made[f"{ours}.weight"], made[f"{ours}.bias"] = state[f"{theirs}/kernel"].T, state[f"{theirs}/bias"]
        return made


def _numbered(name: str, number: int) -> str:
    """As TensorFlow names the variables of one scope, in the order in which they were made."""
    return f"{name}_{number}" if number else name
