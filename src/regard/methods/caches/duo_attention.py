"""DuoAttention: some kv heads keep the whole past, the others only sinks and recent tokens.

Xiao et al. 2024 (ICLR 2025), arXiv 2410.10819. Numbers from mit-han-lab/duo-attention (MIT). Here the deployment: which heads stream,
and the ragged cache in which streaming heads hold `sink + recent` entries, in memory and in the attention computed.

Differences: with left padding the sinks are each row's own first tokens (the released code takes columns). Without published or
fitted gates the heads are ranked by what the prompt's last queries read (`rank="prompt"`), which the paper calls the attention-profile
baseline and finds weaker than fitted gates.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..._checks import bad_type, require, require_int, require_name, require_tensor
from ..call import AttentionCall, Method
from .decoder import decoder_config, kv_heads, ragged_layers
from .ragged import RaggedLayer

_PROFILE_ROWS = 32


def streaming_mask(q_len: int, sink: int, recent: int, *, device: torch.device | str | None = None) -> Tensor:
    """The training mask of streaming heads, bool (q_len, q_len): kv <= q and (kv < sink or q - kv < recent)."""
    from ...ops import masks

    sees = (masks.sink(sink) | masks.sliding_window(recent)) & masks.causal
    return sees.materialize(q_len, q_len, device=device)[0, 0]


def streaming_heads(gates: Tensor, sparsity: float) -> Tensor:
    """Which heads stream, bool like `gates`: those below the `sparsity` quantile of the gates.

    Args:
        gates: (layers, Hkv) float, how much each head needs the whole past. sparsity: share of heads that stream, in [0, 1];
            0 = none, 1 = all. Ties are kept together with the heads above them (the released code breaks ties by random noise of 1e-6).
    """
    require_tensor("gates", gates, floating=True)
    require(0.0 <= sparsity <= 1.0, "sparsity", sparsity, "a share in [0, 1]")
    if sparsity >= 1.0:
        return torch.ones_like(gates, dtype=torch.bool)
    if sparsity <= 0.0:
        return torch.zeros_like(gates, dtype=torch.bool)
    return gates < torch.quantile(gates.double().flatten(), sparsity).to(gates.dtype)


def load_gates(path: str | Path) -> Tensor:
    """Gates (layers, Hkv) from a tab-separated file, one layer a line, as the authors publish them; clamped to [0, 1]."""
    path = Path(path)
    file = path / "full_attention_heads.tsv" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"path: no file {str(file)!r}, need a full_attention_heads.tsv")
    try:
        rows = [[float(cell) for cell in line.split("\t")] for line in file.read_text().splitlines() if line.strip()]
    except ValueError as error:
        raise ValueError(f"path: {str(file)!r} is not a table of tab-separated numbers ({error})") from None
    require(bool(rows) and len({len(row) for row in rows}) == 1, "path", str(file), "rows of equal length, one a layer")
    return torch.tensor(rows).clamp(0, 1)


@dataclass
class DuoAttention(Method):
    """Retrieval heads keep everything; streaming heads keep `sink + recent` tokens.

    Attributes:
        budget: share of kv heads that keep everything, a float in (0, 1] (the share of the dense cache that is left as the context
            grows; sinks and recent tokens come on top), or tokens per head on average, an int, resolved at the length of the prompt.
        gates: (layers, Hkv) tensor, or the path of a published `full_attention_heads.tsv`; heads with the smallest gates stream.
            None: each layer ranks its heads by the attention mass that the prompt's last queries give to tokens a streaming head
            would lose; every layer gives up the same share.
        sink, recent: tokens that streaming heads keep (runs of the paper: 128 and 256; the released parser defaults to 64 and 256).
        variant: "released": the first chunk of a prompt is dense for all heads, and a decoded token sees `recent` earlier tokens;
            "paper": streaming heads follow `q - kv < recent or sink` in every phase, which makes prefill cheaper too.

    Raises `UnsupportedModelError` on attach for models without a decoder cache, and `ValueError` for gates of another shape.
    """

    budget: float | int = 0.5
    gates: Tensor | str | Path | None = None
    sink: int = 64
    recent: int = 256
    variant: str = "released"

    def __post_init__(self) -> None:
        require_int("sink", self.sink, 0)
        require_int("recent", self.recent, 1)
        require_name("variant", self.variant, ("released", "paper"))
        if isinstance(self.budget, bool) or not isinstance(self.budget, (int, float)):
            raise bad_type("budget", self.budget, "a float in (0, 1] or tokens (int)")
        if isinstance(self.budget, int):
            need = f"more tokens than sink + recent = {self.sink + self.recent}, which streaming heads keep anyway"
            require(self.budget > self.sink + self.recent, "budget", self.budget, need)
        else:
            require(0.0 < self.budget <= 1.0, "budget", self.budget, "a float in (0, 1] or tokens (int)")
        if isinstance(self.gates, (str, Path)):
            self.gates = load_gates(self.gates)

    @classmethod
    def from_tsv(cls, path: str | Path, **options: Any) -> DuoAttention:
        """With gates from a published pattern: the .tsv file or the folder that holds it."""
        return cls(gates=load_gates(path), **options)

    def check(self, model: nn.Module) -> None:
        config = decoder_config(model, type(self).__name__)
        self.cache(model)  # says why, where it cannot
        if isinstance(self.gates, Tensor):
            want = (config.num_hidden_layers, kv_heads(config))
            require(
                tuple(self.gates.shape) == want,
                "gates",
                f"shape {tuple(self.gates.shape)}",
                f"(layers, kv heads) = {want}",
            )

    def cache(self, model: nn.Module) -> Any:
        exact = self.variant == "paper"
        return ragged_layers(
            model, lambda _: RaggedLayer(None, self.sink, self.recent, exact_window=exact), type(self).__name__
        )

    def attend(self, call: AttentionCall) -> Tensor | None:
        layer = call.cache
        if not isinstance(layer, RaggedLayer):
            return None
        if layer.streaming is None:
            layer.streaming = self._streaming(call)
        return layer.attend(call)

    # Which heads stream

    def _full_share(self, seen: int) -> float:
        if isinstance(self.budget, float):
            return self.budget
        kept = self.sink + self.recent
        return 1.0 if seen <= self.budget else (self.budget - kept) / (seen - kept)

    def _streaming(self, call: AttentionCall) -> Tensor:
        share = self._full_share(call.seen)
        if isinstance(self.gates, Tensor):
            return streaming_heads(self.gates, 1.0 - share)[
                call.layer
            ].clone()  # not a view: the cache is to own what it holds
        heads = call.num_kv_heads
        # Spread the share over the layers so that the total is right although each layer has few heads.
        keep = round((call.layer + 1) * share * heads) - round(call.layer * share * heads)
        keep = min(heads, max(0, keep))
        streaming = torch.ones(heads, dtype=torch.bool, device=call.q.device)
        if keep:
            streaming[self._needs_the_past(call).topk(keep).indices] = False
        return streaming

    def _needs_the_past(self, call: AttentionCall) -> Tensor:
        """Mean attention mass, per kv head, that the last queries of the prompt give to what a streaming head would lose."""
        rows = torch.arange(max(0, call.q_len - _PROFILE_ROWS), call.q_len, device=call.q.device)
        weights = call.weights(rows=rows)
        query, key = rows[:, None], torch.arange(call.kv_len, device=call.q.device)[None, :]
        start = call.start[:, None, None]
        lost = (key >= start + self.sink) & (query - key >= self.recent)
        mass = (weights * lost[:, None]).sum(-1).mean((0, 2))
        return mass.view(call.num_kv_heads, -1).mean(1)
