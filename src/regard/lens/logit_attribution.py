"""Direct logit attribution: what each head, each MLP and the embedding add to the logits by themselves.

The residual stream that leaves the last block is the sum of the embedding and of everything that heads and MLPs wrote. With the
scale of the final norm held, the logits are linear in that sum, so each part has its own share of them; all shares add up to the
logits exactly (nostalgebraist 2020; Elhage et al. 2021; as used by Lieberum et al. 2023, arXiv 2307.09458).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import require
from ..integrations.anatomy import final_norm, output_projection
from ..methods.call import UnsupportedModelError
from .head_scores import Head, HeadScores
from .patching import Patcher

__all__ = ["LogitAttribution", "Unembedding", "logit_attribution", "require_plain_stream", "writes"]


class Unembedding:
    """The way from the residual stream to the logits, with the final norm's scale free or frozen.

    Args:
        model: a causal language model whose final norm is a `LayerNorm` or a root mean square norm, followed by a linear head.
    """

    def __init__(self, model: Any) -> None:
        self.norm, self.head = final_norm(model), model.get_output_embeddings()
        if not isinstance(self.head, nn.Module):
            raise UnsupportedModelError(f"model: {type(model).__name__} has no output head, need a language model")
        self.name = type(model).__name__
        self.gain: Tensor | None = None
        config = model.config.get_text_config(decoder=True)
        self.cap = getattr(config, "final_logit_softcapping", None)

    @torch.no_grad()
    def prepare(self, final: Tensor, logits: Tensor) -> None:
        """Find out the norm's gain and the factor on the logits, and check them on the model's own: final (B, C), logits (B, V)."""
        sign = torch.where(torch.arange(final.shape[-1], device=final.device) % 2 == 0, 1.0, -1.0).to(final.dtype)[None]
        up, down = self.norm(sign), self.norm(-sign)
        self.gain, self.shift = (up - down) / 2 * sign, (up + down) / 2  # a norm of +-1 leaves its weight and its bias
        moved = self.norm(final + final.std())
        self.centred = bool((moved - self.norm(final)).abs().max() < 1e-3 * (moved - self.shift).abs().max())
        whole = self.head(self.norm(final)).float()
        self.factor = float((whole * logits).sum() / (whole * whole).sum())
        off = (whole * self.factor - logits).abs().max() > 1e-3 * logits.abs().max()
        split = self.frozen(final, final) + self.rest(final.dtype)
        off |= (split - logits).abs().max() > 1e-3 * logits.abs().max()
        if self.cap or bool(off):
            raise UnsupportedModelError(
                f"model: the logits of {self.name} are not linear in its normed residual stream"
            )

    def _scale(self, final: Tensor) -> Tensor:
        x = final.float()
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        eps = next(
            (float(getattr(self.norm, n)) for n in ("eps", "variance_epsilon", "epsilon") if hasattr(self.norm, n)), 0.0
        )
        return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)

    def directions(self, final: Tensor, write: Tensor) -> Tensor:
        """What `write` (..., C) is after the final norm whose scale is that of `final` (broadcastable)."""
        assert self.gain is not None
        write = write.float()
        if self.centred:
            write = write - write.mean(-1, keepdim=True)
        return write * self._scale(final) * self.gain.float()

    @torch.no_grad()
    def frozen(self, final: Tensor, write: Tensor) -> Tensor:
        """Logits (..., V) that `write` adds, the norm's scale held to that of `final`."""
        made = self.directions(final, write).to(final.dtype)
        bias = getattr(self.head, "bias", None)
        logits = self.head(made).float()
        return (logits if bias is None else logits - bias) * self.factor

    @torch.no_grad()
    def rest(self, dtype: torch.dtype) -> Tensor:
        """Logits that belong to no part: the biases of the final norm and of the head, (1, V)."""
        return self.head(self.shift.to(dtype)).float() * self.factor

    @torch.no_grad()
    def changed(self, final: Tensor, change: Tensor, logits: Tensor, frozen: bool) -> Tensor:
        """Logits (n, B, V) after `change` (n, B, C) was added to `final` (B, C), whose logits are (B, V)."""
        if self.gain is None:
            self.prepare(final, logits)
        if frozen:
            return logits + self.frozen(final, change)
        return self.head(self.norm(final + change.to(final.dtype))).float() * self.factor


@torch.no_grad()
def writes(patcher: Patcher, run: Mapping[tuple[str, int], Tensor], of: str) -> dict[Head, Tensor]:
    """What each part wrote to the residual stream at the patcher's one position: (layer, head) -> (B, C)."""
    found: dict[Head, Tensor] = {}
    for block in patcher.blocks:
        if of != "head":
            found[block.layer, 0] = run[of, block.layer][:, 0]
            continue
        z = run["head", block.layer][:, :, 0].to(patcher.device)  # (B, H, D)
        batch, heads, dim = z.shape
        apart = torch.zeros(heads + 1, batch, heads, dim, dtype=z.dtype, device=z.device)
        apart[torch.arange(heads), :, torch.arange(heads)] = z.transpose(0, 1)
        wrote = output_projection(block.attention)(apart.flatten(2))
        for head in range(heads):
            found[block.layer, head] = wrote[head] - wrote[heads]
    return found


def require_plain_stream(patcher: Patcher) -> None:
    """Raise `UnsupportedModelError` unless embedding, attention and MLPs add up to the residual stream at the patcher's one position.

    Needs a patcher with the parts "attn", "mlp" and "resid".
    """
    run, layers = patcher.base, range(patcher.num_layers)
    final = run["resid", patcher.num_layers]
    whole = run["resid", 0] + torch.stack([run[part, layer] for part in ("attn", "mlp") for layer in layers]).sum(0)
    if bool((whole - final).abs().max() > 1e-3 * final.abs().max()):
        raise UnsupportedModelError(
            f"model: what the parts of {type(patcher.model).__name__} write does not add up to its residual stream: "
            "it cannot be shared out"
        )


@dataclass(frozen=True, eq=False)
class LogitAttribution:
    """Shares of a logit (or of a combination of logits), the mean over prompts.

    Attributes:
        heads: (L, H). mlps: (L, 1). embedding: of the embeddings. rest: of all biases. total: the model's own figure, the sum of all.
    """

    heads: HeadScores
    mlps: HeadScores
    embedding: float
    rest: float
    total: float

    def parts(self) -> dict[str, float]:
        """Every part by name, largest absolute share first."""
        table = {f"head {layer}-{head}": self.heads[layer, head] for layer, head in self.heads.ranking()}
        table |= {f"mlp {layer}": self.mlps[layer, 0] for layer, _ in self.mlps.ranking()}
        table |= {"embedding": self.embedding, "biases": self.rest}
        return dict(sorted(table.items(), key=lambda item: -abs(item[1])))


@torch.no_grad()
def logit_attribution(
    model: Any, inputs: Tensor | Mapping[str, Tensor], right: Tensor, wrong: Tensor | None = None, keep: Any = None
) -> LogitAttribution:
    """Split the logit of a token after the prompt, or the difference of two, into what each part adds.

    Args:
        model: a decoder-only transformers model with a plain residual stream. inputs: ids (P, T), or a mapping with a left-padded mask.
        right: (P,) token ids. wrong: (P,) ids whose logits are taken off, (P, n) for the mean of several; None: the logit itself.

    Raises `UnsupportedModelError` where the parts do not add up to the stream (norms behind the modules, multipliers on the residual).
    """
    patcher = Patcher(model, inputs, inputs, positions=-1, parts=("head", "attn", "mlp", "resid"), keep=keep)
    fits = right.dim() == 1 and len(right) == patcher.batch
    require(fits, "right", f"shape {tuple(right.shape)}", f"({patcher.batch},), one token a prompt")
    unembed = Unembedding(model)
    final = patcher.base["resid", patcher.num_layers][:, 0].to(patcher.device)
    logits = patcher.base_logits
    unembed.prepare(final, logits)
    require_plain_stream(patcher)
    heads, attn, mlps = (writes(patcher, patcher.base, of) for of in ("head", "attn", "mlp"))
    embedding = patcher.base["resid", 0][:, 0].to(patcher.device)

    def figure(values: Tensor) -> Tensor:
        """(..., B, V) -> (..., B)."""
        said = values.gather(-1, right.to(values.device)[:, None].expand(*values.shape[:-1], 1))[..., 0]
        if wrong is None:
            return said
        other = wrong if wrong.dim() == 2 else wrong[:, None]
        index = other.to(values.device).expand(*values.shape[:-1], -1)
        return said - values.gather(-1, index).mean(-1)

    def table(found: Mapping[Head, Tensor], width: int) -> Tensor:
        rows = [figure(unembed.frozen(final, found[key].to(patcher.device))) for key in sorted(found)]
        return torch.stack(rows).double().cpu().view(patcher.num_layers, width, -1)

    shares, mlp_shares = table(heads, patcher.num_heads), table(mlps, 1)
    biases = torch.stack(
        [attn[layer, 0] - sum(heads[layer, h] for h in range(patcher.num_heads)) for layer in range(patcher.num_layers)]
    )
    rest = figure((unembed.frozen(final, biases.sum(0)) + unembed.rest(final.dtype))[None])[0]
    return LogitAttribution(
        _scores(shares, "logit attribution of heads"),
        _scores(mlp_shares, "logit attribution of MLPs"),
        float(figure(unembed.frozen(final, embedding)).mean()),
        float(rest.mean()),
        float(figure(logits).mean()),
    )


def _scores(values: Tensor, name: str) -> HeadScores:
    runs = values.permute(2, 0, 1).contiguous()
    return HeadScores(runs.mean(0), runs, name)
