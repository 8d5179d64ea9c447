"""LoFiT: a tuned vector or two for each of a few heads.

Paper: Yin, Ye, Durrett 2024, "LoFiT: Localized Fine-tuning on LLM Representations" (NeurIPS 2024, arXiv 2406.01563). Authors' code, read
for numbers: fc2869/lo-fit (`models/modeling_llama.py`, `models/modeling_gemma.py`, `lofit_trainer.py`).

With z the output of a query head before the output projection, `z <- (1 + scale) * z + shift` at every position, of the prompt and of
what is generated. Here stands what is attached; `regard.losses.lofit_heads` and `fit_lofit` find the heads and train the vectors.

What differs from the authors' code: only the chosen heads have vectors (theirs hold them for all, most at 0), and the model's own class
stays what it is. The numbers are the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..._checks import bad_type, bad_value, require, require_int
from ..._files import write_whole
from ..call import AttentionCall, Method
from .zero_tuning import check_layers, heads_by_layer

__all__ = ["HeadAffine", "LoFiT"]

_OFFICIAL = re.compile(r"(?:^|\.)layers\.(\d+)\.self_attn\.attn_(A|v)\.(\d+)$")


class HeadAffine(nn.Module):
    """Vectors of K heads: `scale` and `shift` (K, D), either of which may be left out; `heads` (K, 2): layer and head of each row.

    Args:
        heads: different (layer, head) pairs, as `HeadScores.top` gives them. head_dim: D, of the head outputs.
        scale, shift: which of the two there are.
    """

    heads: Tensor

    def __init__(
        self, heads: Iterable[tuple[int, int]], head_dim: int, *, scale: bool = True, shift: bool = True
    ) -> None:
        super().__init__()
        require_int("head_dim", head_dim, 1)
        listed = [(int(layer), int(head)) for layer, head in heads]
        require(bool(listed), "heads", "none", "at least one (layer, head) pair")
        require(len(set(listed)) == len(listed), "heads", listed, "different (layer, head) pairs")
        require(min(map(min, listed)) >= 0, "heads", listed, "layer and head numbers >= 0")
        require(scale or shift, "scale, shift", (scale, shift), "at least one of them")
        self.register_buffer("heads", torch.tensor(listed, dtype=torch.long))
        zeros = torch.zeros(len(listed), head_dim)
        self.scale = nn.Parameter(zeros.clone()) if scale else None
        self.shift = nn.Parameter(zeros.clone()) if shift else None

    @property
    def head_dim(self) -> int:
        vectors = self.scale if self.scale is not None else self.shift
        assert vectors is not None
        return vectors.shape[1]

    def extra_repr(self) -> str:
        return f"{len(self.heads)} heads, scale={self.scale is not None}, shift={self.shift is not None}"

    def forward(self, outputs: Tensor, layer: int) -> Tensor:
        """Head outputs (B, H, N, D) of a layer, with its heads changed; other heads come back bit by bit."""
        rows = (self.heads[:, 0] == layer).nonzero()[:, 0]
        if not len(rows):
            return outputs
        index = self.heads[rows, 1].to(outputs.device)
        part = outputs[:, index]
        if self.scale is not None:
            part = part * (1.0 + self.scale[rows].to(part))[:, None]
        if self.shift is not None:
            part = part + self.shift[rows].to(part)[:, None]
        return outputs.index_copy(1, index, part)

    def save(self, path: str | Path, info: Mapping[str, Any] | None = None) -> Path:
        """Write `.safetensors`, whole or not at all; `info` (JSON values) is kept in it."""
        from safetensors.torch import save

        if Path(path).suffix != ".safetensors":
            raise bad_value("path", str(path), "a name that ends in .safetensors")
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        return write_whole(path, save(tensors, {"lofit": json.dumps(dict(info or {}))}))

    @classmethod
    def load(cls, path: str | Path) -> HeadAffine:
        """Read what `save`, or `fit_lofit(out=...)`, wrote."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            state = load_file(path)
        except SafetensorError as error:
            raise bad_value("path", str(path), f"a whole safetensors file ({error})") from None
        vectors = state.get("scale", state.get("shift"))
        if vectors is None or "heads" not in state:
            raise bad_value("path", str(path), f"a file with heads and scale or shift (it holds {sorted(state)})")
        made = cls(state["heads"].tolist(), vectors.shape[1], scale="scale" in state, shift="shift" in state)
        made.load_state_dict(state)
        return made

    @classmethod
    def from_official(cls, state: Mapping[str, Tensor], layers: Iterable[int] | None = None) -> HeadAffine:
        """The vectors in a state dict of the authors' models, `...layers.L.self_attn.attn_A.H` and `attn_v.H`.

        Args:
            layers: those to which the authors' model was told to apply them; None = all.
        """
        wanted = None if layers is None else set(layers)
        found: dict[tuple[int, int], dict[str, Tensor]] = {}
        for name, tensor in state.items():
            match = _OFFICIAL.search(name)
            if match and (wanted is None or int(match[1]) in wanted):
                found.setdefault((int(match[1]), int(match[3])), {})[match[2]] = tensor
        require(bool(found), "state", sorted(state)[:4], "names that end in layers.L.self_attn.attn_A.H or attn_v.H")
        heads = sorted(found)
        size = len(next(iter(found[heads[0]].values())))
        made = cls(heads, size)
        with torch.no_grad():
            for name, vectors in (("A", made.scale), ("v", made.shift)):
                assert vectors is not None
                for row, head in enumerate(heads):
                    vectors[row] = found[head].get(name, torch.zeros(size))
        return made


@dataclass
class LoFiT(Method):
    """Attach tuned vectors: the heads' outputs are scaled and shifted, nothing else.

        tuned = regard.losses.fit_lofit(model, data, heads)      # or regard.methods.HeadAffine.load(path)
        with regard.attach(model, regard.LoFiT(tuned)):
            model.generate(**inputs)

    Args:
        tuned: a `HeadAffine`, or the path of one. strength: factor on its vectors; 0 changes nothing, 1 is what was trained.

    Gradients reach `tuned`'s parameters. Dense kernels stay.
    """

    tuned: HeadAffine | str | Path
    strength: float = 1.0
    enabled: bool = field(default=True, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.tuned, (str, Path)):
            self.tuned = HeadAffine.load(self.tuned)
        if not isinstance(self.tuned, HeadAffine):
            raise bad_type("tuned", self.tuned, "a HeadAffine, or the path of one")
        self._table = heads_by_layer(self.tuned.heads.tolist()) or {}

    def setup(self, session: Any) -> None:
        check_layers(self._table, session.num_layers)

    def edit(self, call: AttentionCall) -> None:
        heads = self._table.get(call.layer)
        if not heads or not self.enabled or self.strength == 0:
            return
        tuned, size = self.tuned, call.v.shape[-1]
        assert isinstance(tuned, HeadAffine)
        require(heads[-1] < call.num_heads, "heads", heads, f"head numbers in [0, {call.num_heads})")
        require(tuned.head_dim == size, "tuned", f"vectors of {tuned.head_dim}", f"{size}, the size of a head's output")

        def change(out: Tensor) -> Tensor:
            made = tuned(out, call.layer)
            return made if self.strength == 1 else out + self.strength * (made - out)

        call.on_output(change)
