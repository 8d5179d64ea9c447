"""The reference as a backend: serves everything, on any device, with the N x M matrix in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .. import reference

if TYPE_CHECKING:
    from ..attention import AttentionRequest


def refuses(request: AttentionRequest) -> str | None:
    return None


def suits(request: AttentionRequest) -> bool:
    return True


def run(request: AttentionRequest) -> tuple[Tensor, Tensor | None]:
    out, lse = reference.attention(**{**vars(request), "return_lse": True})
    return out, lse
