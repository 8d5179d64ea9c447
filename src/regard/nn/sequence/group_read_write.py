"""Groups of tokens with a few latents each: latents read their group, and write back to it.

FIT: Far-reaching Interleaved Transformers (Chen and Li 2023, arXiv 2305.12689); code read for numbers: google-research/pix2seq @
eabd4e9 (Apache-2.0), `architectures/transformers.py` and `utils.py`. Nothing differs; the network is `regard.models.FIT`.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from ..._checks import require, require_int, require_name, require_tensor
from .pre_norm import CrossAttend

__all__ = ["GroupReadWrite", "group_image", "ungroup_image"]


class GroupReadWrite(nn.Module):
    """The two cross attentions of a FIT stage between tokens x (B, t, n, dim) and latents (B, t, m, latent_dim) of the same group.

    `read(latents, x)` gives new latents, `write(x, latents)` new tokens; shapes are kept. Both work inside each of the t groups:
    cost t·n·m. There are min(num_heads, latent_heads) heads of min(dim, latent_dim) // heads channels.

    Args:
        dim, latent_dim: channels of tokens and latents. num_heads, latent_heads: heads that each side uses on its own.
        writes: False leaves `write` out (the last stage of a network only reads).
        norm_context: whether what is attended to is normalised. ratio: an MLP of that ratio after each (None: none).

    Raises ValueError or TypeError naming the argument.
    """

    def __init__(
        self,
        dim: int,
        latent_dim: int,
        num_heads: int,
        latent_heads: int | None = None,
        writes: bool = True,
        norm_context: bool = True,
        ratio: float | None = None,
    ) -> None:
        super().__init__()
        require_int("dim", dim, 1)
        require_int("latent_dim", latent_dim, 1)
        require_int("num_heads", num_heads, 1)
        heads = min(num_heads, require_int("latent_heads", latent_heads or num_heads, 1))
        width = min(dim, latent_dim)
        require(width >= heads, "num_heads", heads, f"at most the narrower of dim and latent_dim ({width})")
        head_dim = width // heads
        self._read = CrossAttend(latent_dim, dim, heads, head_dim, norm_context, ratio)
        self._write = CrossAttend(dim, latent_dim, heads, head_dim, norm_context, ratio) if writes else None

    def read(self, latents: Tensor, x: Tensor) -> Tensor:
        """Latents (B, t, m, latent_dim) after attending to the tokens (B, t, n, dim) of their group."""
        _same_groups(latents, x)
        groups = x.shape[1]
        return _split(self._read(_merge(latents), _merge(x)), groups)

    def write(self, x: Tensor, latents: Tensor) -> Tensor:
        """Tokens (B, t, n, dim) after attending to the latents (B, t, m, latent_dim) of their group."""
        require(self._write is not None, "write", "a module built with writes=False", "writes=True")
        _same_groups(latents, x)
        assert self._write is not None
        return _split(self._write(_merge(x), _merge(latents)), x.shape[1])

    def forward(self, x: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        """`read` then `write`: (x, latents) -> (new x, new latents)."""
        latents = self.read(latents, x)
        return self.write(x, latents), latents


def _same_groups(latents: Tensor, x: Tensor) -> None:
    require_tensor("x", x, dims=4, floating=True)
    require_tensor("latents", latents, dims=4, floating=True)
    need = f"(B, t, m, latent_dim) with B, t = {tuple(x.shape[:2])}"
    require(latents.shape[:2] == x.shape[:2], "latents", f"shape {tuple(latents.shape)}", need)


def _merge(x: Tensor) -> Tensor:
    return x.flatten(0, 1)


def _split(x: Tensor, groups: int) -> Tensor:
    return x.unflatten(0, (-1, groups))


def group_image(x: Tensor, tile: int, patch: int = 1, order: str = "raster") -> Tensor:
    """Images (B, C, H, W) as groups of patch tokens (B, t, n, patch * patch * C): one group a tile, tiles and patches in rows.

    Args:
        tile: side of a tile in pixels; it divides H and W. patch: side of a patch; it divides tile. n = (tile / patch)².
        order: of the tiles: "raster", or "snake" (every second row of tiles from right to left, as FIT's autoregressive model).

    Channels of a token run over patch rows, patch columns, image channels. `ungroup_image` undoes it.
    """
    require_tensor("x", x, dims=4)
    height, width = x.shape[2:]
    require_int("patch", patch, 1)
    require(require_int("tile", tile, 1) % patch == 0, "tile", tile, f"a multiple of patch ({patch})")
    require(height % tile == 0 and width % tile == 0, "tile", tile, f"a divisor of height and width {(height, width)}")
    tokens = rearrange(
        x, "b c (i ti p) (j tj q) -> b i j (ti tj) (p q c)", p=patch, q=patch, ti=tile // patch, tj=tile // patch
    )
    return _ordered(tokens, order).flatten(1, 2)


def ungroup_image(tokens: Tensor, height: int, width: int, tile: int, patch: int = 1, order: str = "raster") -> Tensor:
    """Undo `group_image`: (B, t, n, patch * patch * C) -> (B, C, height, width)."""
    require_tensor("tokens", tokens, dims=4)
    require(height % tile == 0 and width % tile == 0 and tile % patch == 0, "tile", tile, "see group_image")
    rows, columns, side = height // tile, width // tile, tile // patch
    need = f"(B, {rows * columns}, {side * side}, a multiple of {patch * patch})"
    fits = tokens.shape[1:3] == (rows * columns, side * side) and tokens.shape[-1] % (patch * patch) == 0
    require(fits, "tokens", f"shape {tuple(tokens.shape)}", need)
    tokens = _ordered(tokens.unflatten(1, (rows, columns)), order)
    return rearrange(tokens, "b i j (ti tj) (p q c) -> b c (i ti p) (j tj q)", ti=side, tj=side, p=patch, q=patch)


def _ordered(tokens: Tensor, order: str) -> Tensor:
    """Turn every second row of tiles, (B, rows, columns, ...), around for "snake"; its own inverse."""
    if require_name("order", order, ("raster", "snake")) == "raster":
        return tokens
    turned = torch.arange(tokens.shape[1], device=tokens.device) % 2 == 1
    return torch.where(turned[:, None, None, None], tokens.flip(2), tokens)
