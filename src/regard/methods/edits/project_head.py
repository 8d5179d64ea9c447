"""A head that sees its queries, keys and values through a few dimensions only.

The low-rank study of Lieberum et al. 2023, "Does Circuit Analysis Interpretability Scale? Evidence from Multiple Choice Capabilities in
Chinchilla" (arXiv 2307.09458; no code published): q and k of a head are projected onto the leading directions of their own variation,
and only the scores of the last token on the label tokens are computed from what is left. `regard.lens.head_subspace` finds the
directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..._checks import bad_type, require, require_tensor
from ..call import AttentionCall, Method
from .zero_tuning import check_layers

__all__ = ["HeadSubspace", "ProjectHead"]

PARTS = ("q", "k", "v")


@dataclass(frozen=True, eq=False)
class HeadSubspace:
    """Leading directions of what one head computes, around the means.

    Attributes:
        layer, head: which. means: part -> (n, D), one row a label place ("q": one row, of the last token). bases: part -> (D, r),
            orthonormal columns. explained: part -> share of the variance around the means that lies in them.
    """

    layer: int
    head: int
    means: dict[str, Tensor]
    bases: dict[str, Tensor]
    explained: dict[str, float]

    def project(self, part: str, values: Tensor) -> Tensor:
        """values (B, n, D) with everything but the mean and the kept directions taken out."""
        mean, basis = self.means[part].to(values), self.bases[part].to(values)
        return mean + (values - mean) @ basis @ basis.T

    def coordinates(self, part: str, values: Tensor) -> Tensor:
        """values (B, n, D) in the kept directions, (B, n, r)."""
        return (values - self.means[part].to(values)) @ self.bases[part].to(values)


@dataclass
class ProjectHead(Method):
    """Compute the scores of the last token on the label tokens from projected queries and keys, in chosen heads.

        subspace = regard.lens.head_subspace(model, batch.clean, batch.labels, layer, head, rank=3)
        with regard.attach(model, ProjectHead(subspace, batch.labels)):
            model(**batch.clean)

    Args:
        subspaces: one `HeadSubspace` or several. labels: places of the label tokens in the prompt, int64 (B, n) (left padding
            counts), as many as the subspace was made with. parts: what is projected, some of "q", "k", "v" ("v": the values that
            the last token reads at the labels). A full-rank subspace changes nothing.
    """

    subspaces: HeadSubspace | Sequence[HeadSubspace]
    labels: Tensor
    parts: Sequence[str] = ("q", "k")

    def __post_init__(self) -> None:
        listed = [self.subspaces] if isinstance(self.subspaces, HeadSubspace) else list(self.subspaces)
        for one in listed:
            if not isinstance(one, HeadSubspace):
                raise bad_type("subspaces", one, "HeadSubspace objects")
        require_tensor("labels", self.labels, dims=2)
        require(set(self.parts) <= set(PARTS), "parts", tuple(self.parts), "some of q, k, v")
        self._table: dict[int, list[HeadSubspace]] = {}
        for one in listed:
            places = one.means["k"].shape[0]
            require(
                places == self.labels.shape[1],
                "labels",
                f"{self.labels.shape[1]} places",
                f"{places}, like the subspace",
            )
            self._table.setdefault(one.layer, []).append(one)

    def setup(self, session: Any) -> None:
        check_layers({layer: [] for layer in self._table}, session.num_layers)

    def edit(self, call: AttentionCall) -> None:
        if call.layer not in self._table or call.phase == "decode":
            return
        rows = len(self.labels)
        require(rows == call.batch, "labels", f"{rows} rows", f"{call.batch}, the batch")
        places = self.labels.to(call.q.device) - call.key_offset
        scale = call.q.shape[-1] ** -0.5 if call.scale is None else call.scale
        group = call.num_heads // call.num_kv_heads
        batch = torch.arange(call.batch, device=call.q.device)[:, None]
        bias: Tensor | None = None
        for one in self._table[call.layer]:
            require(0 <= one.head < call.num_heads, "subspaces", f"head {one.head}", f"heads in [0, {call.num_heads})")
            q, k = call.q[:, one.head, -1:], call.k[:, one.head // group][batch, places]  # (B, 1, D), (B, n, D)
            new_q = one.project("q", q) if "q" in self.parts else q
            new_k = one.project("k", k) if "k" in self.parts else k
            change = ((new_q * new_k).sum(-1) - (q * k).sum(-1)) * scale
            if bias is None:
                bias = call.q.new_zeros(call.batch, call.num_heads, call.q_len, call.kv_len)
            bias[batch, one.head, -1, places] = change
            if "v" in self.parts:
                self._values(call, one, batch, places, group)
        if bias is not None:
            call.add_bias(bias)

    @staticmethod
    def _values(call: AttentionCall, one: HeadSubspace, batch: Tensor, places: Tensor, group: int) -> None:
        v = call.v[:, one.head // group][batch, places]
        change = one.project("v", v) - v

        def edit(out: Tensor) -> Tensor:
            weights = call.weights(heads=[one.head], rows=[-1])[:, 0, 0].gather(1, places).to(out.dtype)
            out = out.clone()
            out[:, one.head, -1] += (weights[..., None] * change).sum(1)
            return out

        call.on_output(edit)
