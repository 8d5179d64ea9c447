"""DHSA's boundary predictor, Xiong et al., "Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs"
(2025, arXiv 2510.24606). Code read for numbers (no licence): xiongsiheng/DHSA @ cc8e9c7,
`legacy/boundary_predictor/models.py` (BoundarySimilarityAttn), `legacy/utils/helper.py` (predict_boundaries).
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..._checks import require, require_int, require_tensor
from ..._files import write_whole
from ...ops.select.boundaries import pick_boundaries

_NEVER = -100.0  # the score of gaps too near to an end, as released
_GAPS_AT_A_TIME = 2048

_RENAMED = {
    "enc.mha.in_proj_weight": "qkv.weight",
    "enc.mha.in_proj_bias": "qkv.bias",
    "enc.mha.out_proj.weight": "out.weight",
    "enc.mha.out_proj.bias": "out.bias",
    "enc.norm.weight": "norm.weight",
    "enc.norm.bias": "norm.bias",
    "pool.gate.weight": "pool.weight",
    "mlp.0.weight": "score.0.weight",
    "mlp.0.bias": "score.0.bias",
    "mlp.2.weight": "score.2.weight",
    "mlp.2.bias": "score.2.bias",
}


class BoundaryPredictor(nn.Module):
    """Does a chunk of text end between two tokens? Asked of a layer's keys, for every gap.

    Around each gap, `window` tokens on the left and on the right attend to one another (one multi-head attention, LayerNorm, no
    residual). Each side is pooled to one vector, l and r, and a two-layer network scores [l, r, |l - r|, l * r, cos(l, r)].
    Trained with `regard.losses.focal_bce` on what `regard.lens.attention_boundaries` measures in the model's own attention.

    Args:
        channels: kv heads x head_dim of the model (1024 for Gemma-2-2B).
        window: tokens on each side of a gap.
        hidden: width of the scoring network.
        heads: attention heads among the 2 * window tokens; divides `channels`.
        window_pool: pool each side by learned weights instead of the mean.

    Input: keys (B, Hkv, N, head_dim) with Hkv * head_dim = channels, after rotary embedding, as they lie in a cache. Output: logits
    (B, N) in the module's dtype; entry i is the gap after token i. Tokens beyond the ends count as zeros.

    `load_official` takes the authors' state dict. Note that their published predictor for Gemma-2 was run with heads=8, while
    their training script and the class default have 4.

    Raises:
        ValueError: sizes that do not fit.
    """

    def __init__(
        self, channels: int, window: int = 4, hidden: int = 256, heads: int = 4, window_pool: bool = False
    ) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("window", window), ("hidden", hidden), ("heads", heads)):
            require_int(name, value, 1)
        require(channels % heads == 0, "heads", heads, f"a divisor of channels = {channels}")
        self.channels, self.window, self.heads = channels, window, heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        self.norm = nn.LayerNorm(channels)
        self.pool = nn.Linear(channels, 1, bias=False) if window_pool else None
        self.score = nn.Sequential(nn.Linear(4 * channels + 1, hidden), nn.ReLU(), nn.Linear(hidden, 1))
        nn.init.xavier_uniform_(self.qkv.weight)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.out.bias)

    @staticmethod
    def official_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' names to ours."""
        return {_RENAMED.get(name, name): value for name, value in state.items()}

    def forward(self, k: Tensor) -> Tensor:
        """(B, Hkv, N, head_dim) keys -> (B, N) logits."""
        require_tensor("k", k, dims=4, floating=True)
        width = k.shape[1] * k.shape[3]
        require(width == self.channels, "k", f"{k.shape[1]} heads x {k.shape[3]}", f"channels = {self.channels} in all")
        tokens = k.transpose(1, 2).flatten(2).to(self.norm.weight.dtype)
        if tokens.shape[1] == 0:
            return tokens.new_zeros(tokens.shape[:2])
        padded = F.pad(tokens, (0, 0, self.window - 1, self.window))
        # a token is projected once, not once for every window it is in
        windows = self.qkv(padded).unfold(1, 2 * self.window, 1)  # (B, N, 3 C, 2 w)
        parts = [self._logits(part) for part in windows.split(_GAPS_AT_A_TIME, dim=1)]
        return torch.cat(parts, dim=1)

    def _logits(self, windows: Tensor) -> Tensor:
        batch, gaps, _, size = windows.shape
        q, k, v = windows.reshape(batch * gaps, 3, self.heads, -1, size).transpose(-1, -2).unbind(1)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B * gaps, 2 w, C)
        mixed = self.norm(self.out(mixed))
        left, right = self._pooled(mixed[:, : self.window]), self._pooled(mixed[:, self.window :])
        alike = F.cosine_similarity(left, right, dim=-1, eps=1e-6)[:, None]
        features = torch.cat((left, right, (left - right).abs(), left * right, alike), dim=-1)
        return self.score(features).view(batch, gaps)

    def _pooled(self, side: Tensor) -> Tensor:
        if self.pool is None:
            return side.mean(1)
        return (self.pool(side).softmax(dim=1) * side).sum(1)

    def gap_scores(self, k: Tensor, *, wide_margins: bool = False) -> Tensor:
        """The logits, with -100 for the first `window - 1` and the last `window` gaps (about twice as many: `wide_margins`)."""
        logits = self(k)
        first, last = (2 * self.window - 1, 2 * self.window) if wide_margins else (self.window - 1, self.window)
        gap = torch.arange(logits.shape[1], device=logits.device)
        return logits.masked_fill((gap < first) | (gap >= logits.shape[1] - last), _NEVER)

    @torch.no_grad()
    def boundaries(
        self,
        k: Tensor,
        num_chunks: int,
        *,
        theta: float | None = None,
        nms: int = 8,
        instruction: int = 0,
        wide_margins: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Where to cut: `regard.ops.select.pick_boundaries` of the gap scores.

        Returns:
            cuts int64 (B, C + 1), 0 first and N last, and the gap scores (B, N).
        """
        scores = self.gap_scores(k, wide_margins=wide_margins)
        return pick_boundaries(scores, num_chunks, theta=theta, nms=nms, instruction=instruction), scores

    def save(self, path: str | Path) -> Path:
        """Write weights and sizes to a safetensors file, whole or not at all."""
        from safetensors.torch import save

        sizes = {"window": self.window, "heads": self.heads}
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        return write_whole(path, save(plain, {"regard": json.dumps({"boundary_predictor": sizes})}))

    @classmethod
    def load(cls, path: str | Path) -> BoundaryPredictor:
        """A predictor that `save` wrote. Another file gives a `ValueError`."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                sizes = json.loads((file.metadata() or {})["regard"])["boundary_predictor"]
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            hidden, channels = state["score.0.weight"].shape[0], state["norm.weight"].shape[0]
            made = cls(channels, sizes["window"], hidden, sizes["heads"], "pool.weight" in state)
            made.load_state_dict(state)
        except FileNotFoundError:
            raise
        except (SafetensorError, OSError, KeyError, TypeError, RuntimeError, json.JSONDecodeError) as error:
            raise ValueError(f"path: {str(path)!r} is no file that BoundaryPredictor.save wrote ({error})") from None
        return made.eval()

    def extra_repr(self) -> str:
        return f"channels={self.channels}, window={self.window}, heads={self.heads}"
