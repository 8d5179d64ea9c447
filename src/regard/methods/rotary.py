"""What a model's rotary embedding did in a call, and how to undo it: for parts that were trained on queries and keys before it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .caches.decoder import find_rotary
from .call import AttentionCall, UnsupportedModelError

_NAME = "position_ids"


class RotaryOf:
    """The rotary embedding of one attached model.

    Args:
        model: a transformers model with one rotary embedding of constant frequencies. method: whose name an error is to tell.

    Raises:
        UnsupportedModelError: it has none.
    """

    def __init__(self, model: nn.Module, method: str) -> None:
        move = find_rotary(model)
        if move is None:
            raise UnsupportedModelError(
                f"model: {method} needs rotary embeddings of constant frequencies, and {type(model).__name__} has none that "
                "regard can undo"
            )
        self.move: Callable[[Tensor, Tensor], Tensor] = move
        self.embedding = next(
            m for n, m in model.named_modules() if n.split(".")[-1] == "rotary_emb" and hasattr(m, "inv_freq")
        )
        self._of_width: dict[int, nn.Module] = {}
        self._undoing = False

    def watch(self, session: Any) -> None:
        """Keep the positions that each forward gives to the embedding, in `session.last`."""

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            positions = kwargs.get(_NAME, args[1] if len(args) > 1 else None)
            if isinstance(positions, Tensor) and not self._undoing:
                session.last[_NAME] = positions

        session.on_detach(self.embedding.register_forward_pre_hook(keep, with_kwargs=True).remove)

    def undo(self, x: Tensor, positions: Tensor) -> Tensor:
        """x (B, H, n, D) as it was before it was turned at `positions` (B, n)."""
        self._undoing = True  # this asks the embedding too
        try:
            plain = self.move(x, -positions)
        finally:
            self._undoing = False
        scaling = float(getattr(self.embedding, "attention_scaling", 1.0))
        if scaling == 1.0:
            return plain
        width = 2 * self.embedding.inv_freq.shape[-1]  # type: ignore[union-attr, operator]
        return torch.cat((plain[..., :width] / scaling, plain[..., width:]), dim=-1)

    def turn(self, x: Tensor, positions: Tensor) -> Tensor:
        """x (B, H, n, D) as it comes out of `undo`, turned at `positions` (B, n) as the model does it: the way back."""
        turned = self.move(x, positions)
        scaling = float(getattr(self.embedding, "attention_scaling", 1.0))
        if scaling == 1.0:
            return turned
        width = 2 * self.embedding.inv_freq.shape[-1]  # type: ignore[union-attr, operator]
        return torch.cat((turned[..., :width] * scaling, turned[..., width:]), dim=-1)

    def angles(self, positions: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """(cos, sin), each (B, n, width), float32: the same kind of embedding for vectors of `width` channels."""
        if width not in self._of_width:
            config = copy.deepcopy(self.embedding.config)  # type: ignore[arg-type]
            config.head_dim, config.hidden_size = width, width * config.num_attention_heads  # type: ignore[union-attr]
            embedding = type(self.embedding)(config=config).to(positions.device)
            self._of_width[width] = embedding
        return self._of_width[width](torch.zeros((), device=positions.device), positions)


def query_positions(call: AttentionCall) -> Tensor:
    """The position that each query row was turned by, int64 (B, q_len); a model that was not watched: counted from the first token."""
    known = call.session.last.get(_NAME) if call.session is not None else None
    if known is None:
        known = torch.arange(call.q_len, device=call.q.device)[None] + call.position
    if known.dim() != 2:
        raise UnsupportedModelError(
            f"model: {type(call.module).__name__} turns its queries by positions of shape {tuple(known.shape)}, need one for each token"
        )
    return known.expand(call.batch, -1)


def key_positions(query: Tensor, length: int) -> Tensor:
    """Those of `length` keys that end with the last query row; query (B, n) -> (B, length)."""
    return query[:, -1:] - torch.arange(length - 1, -1, -1, device=query.device)
