"""LOOK-M: keep the text, let the images share what is left, and merge what is dropped into what stays, once, after the prompt.

Wan et al. 2024 (EMNLP Findings), arXiv 2406.18139. Numbers from SUSTechBruce/LOOK-M (MIT). Differences: the released code is for
batch 1, images of 576 tokens, heads of 128 channels and one kv head a query head; here the sums of a group's query heads are added,
each row of a batch is treated alone and without its padding, images are wherever `call.spans["image"]` says, and the N x N weights are
never stored. The released wrapper leaves prompts without an image alone whatever the class; here that holds with the text prior.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..._checks import require, require_int, require_name, require_tensor, resolve_budget
from ..call import AttentionCall
from .evicting import EvictingLayer, prompt_sums
from .h2o import check_part
from .merge import MERGES, scatter_merge
from .paged import Pages
from .policy import EvictingMethod, Limits, check_budget

_ANTI_IMAGE = (
    65516.0  # what the released code takes from an image token's score; in float32 that rounds scores to 1/128
)


def look_m_compress(
    keys: Tensor,
    values: Tensor,
    scores: Tensor,
    *,
    heavy: int,
    recent: int,
    image: Tensor | None = None,
    merge: str = "pivot",
    sink: int = 4,
    variant: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One prompt's cache, cut down to what LOOK-M keeps.

    Args:
        keys: (H, N, D). values: (H, N, Dv), one sequence. scores: (H, N), the attention that each token received from the prompt.
        heavy, recent: tokens kept by score among the first N - recent, and the last ones.
        image: bool (N,), the image tokens: all other tokens stay, whatever the budget, and `heavy` counts them (text prior).
            None: no text prior; the `heavy` highest scores stay, the first `sink` tokens always among them.
        merge, variant: as in `LookM`.
    Returns:
        keys (H, K, D), values (H, K, Dv), and the positions kept, int64 (H, K), ascending. Unchanged if N <= heavy + recent.
    """
    require_name("merge", merge, MERGES)
    require_int("heavy", heavy, 0)
    require_int("recent", recent, 0)
    length = require_tensor("keys", keys, dims=3, floating=True).shape[1]
    require(
        tuple(scores.shape) == keys.shape[:2],
        "scores",
        f"shape {tuple(scores.shape)}",
        f"(H, N) = {tuple(keys.shape[:2])}",
    )
    variant = _variant(merge, variant)
    everything = torch.arange(length, device=keys.device).expand(keys.shape[0], -1)
    if length <= heavy + recent:
        return keys, values, everything
    early = scores[:, : length - recent]
    stays = torch.zeros(scores.shape, dtype=torch.bool, device=keys.device)
    stays[:, length - recent :] = True
    if image is None:
        early = early.clone()
        early[:, :sink] = torch.inf
        stays.scatter_(1, early.argsort(dim=-1, descending=True)[:, :heavy], True)
    else:
        require(tuple(image.shape) == (length,), "image", f"shape {tuple(image.shape)}", f"(N,) = ({length},)")
        pictured = image[: length - recent]
        if variant == "released":
            ranked = early + torch.where(pictured, -_ANTI_IMAGE, 0.0).to(early.dtype)
        else:  # all text stays anyway
            ranked = torch.where(pictured, early, torch.inf)
        stays.scatter_(1, ranked.topk(heavy, dim=-1).indices, True)
        stays |= ~image
    count = int(stays[0].sum())
    order = stays.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    kept, dropped = order[:, :count], order[:, count:]
    k, v = scatter_merge(
        _rows(keys, kept), _rows(values, kept), _rows(keys, dropped), _rows(values, dropped), merge, variant
    )
    return k, v, kept


def _rows(tensor: Tensor, index: Tensor) -> Tensor:
    return tensor.gather(1, index[..., None].expand(-1, -1, tensor.shape[-1]))


def _variant(merge: str, variant: str | None) -> str:
    if variant is None:
        return "paper" if merge == "average" else "released"
    return require_name("variant", variant, ("released", "paper"))


@dataclass
class LookM(EvictingMethod):
    """After the prompt, images give way to text: dropped tokens are merged into those that stay. Decoding then only appends.

    Attributes:
        budget: tokens (int) or a fraction of the prompt, half for tokens of high attention, half for the most recent ones.
        heavy, recent: the two halves by themselves, each tokens or a fraction (rounded down); both or neither (paper: 0.1 and 0.1).
        merge: "pivot" (the paper's best), "average", "weighted", or "none": only evict. See `caches.scatter_merge`.
        text_prior: True: no text token leaves, so with much text the cache is larger than the budget; a row without an image is left
            alone. Images are the span "image": `attach(..., spans={"image": bool (B, tokens)})`, filled in by itself for
            models with an image token. False: the twins without it, H2O's choice and the same merging, for any prompt.
        sink: without the text prior, first tokens that always count among the heavy ones.
        variant: "released" or "paper" where they differ: in "weighted" the release merges only dropped tokens that are more alike than
            the mean; in "average" it mismatches sources and targets; and its image scores are rounded to 1/128. None: "paper" for
            merge="average", whose release is broken, else "released".

    A prompt read in several chunks is compressed after the first of them. Raises `ValueError` on bad budgets and names.
    """

    reads: ClassVar[bool] = False
    budget: int | float = 0.2
    heavy: int | float | None = None
    recent: int | float | None = None
    merge: str = "pivot"
    text_prior: bool = True
    sink: int = 4
    variant: str | None = None

    def __post_init__(self) -> None:
        require_name("merge", self.merge, MERGES)
        _variant(self.merge, self.variant)
        require_int("sink", self.sink, 0)
        if self.heavy is None and self.recent is None:
            check_budget(self.budget)
        else:
            check_part("heavy", self.heavy)
            check_part("recent", self.recent)

    def make_layer(self, rotary: Any) -> EvictingLayer:
        return LookMLayer(self)

    def limits(self, tokens: Tensor) -> Limits:
        """No limit while decoding: LOOK-M looks once."""
        return Limits(torch.full_like(tokens, 1 << 60), torch.zeros_like(tokens))

    def parts(self, tokens: int) -> tuple[int, int]:
        """(heavy, recent) for a prompt of so many tokens."""
        if self.heavy is None or self.recent is None:
            whole = resolve_budget("budget", self.budget, tokens)
            return whole - whole // 2, whole // 2
        heavy, recent = (part if isinstance(part, int) else int(tokens * part) for part in (self.heavy, self.recent))
        return heavy, recent


class LookMLayer(EvictingLayer):
    """The cache layer of `LookM`: compresses the prompt, then grows."""

    policy: LookM

    def fill(self, call: AttentionCall, keys: Tensor, values: Tensor, tokens: Tensor) -> None:
        method, kv_heads = self.policy, keys.shape[1]
        image = call.spans.get("image")
        scores: Tensor | None = None
        found = []
        for row, (count, start) in enumerate(zip(tokens.tolist(), self.starts().tolist())):
            heavy, recent = method.parts(count)
            span = None
            if method.text_prior:
                span = torch.zeros(count, dtype=torch.bool, device=keys.device) if image is None else image[row, start:]
            if count <= heavy + recent or (span is not None and not bool(span.any())):
                kept = torch.arange(count, device=keys.device).expand(kv_heads, -1)
                found.append((keys[row, :, start:], values[row, :, start:], kept + start))
                continue
            scores = prompt_sums(call, keys, None, "sum") if scores is None else scores
            options: dict[str, Any] = {"merge": method.merge, "sink": method.sink, "variant": method.variant}
            one = (keys[row, :, start:], values[row, :, start:], scores[row, :, start:])
            k, v, kept = look_m_compress(*one, heavy=heavy, recent=recent, image=span, **options)
            found.append((k, v, kept + start))
            self.evicted_after(keys.shape[2])
        self._store(found)

    def _store(self, found: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        lengths = torch.tensor([k.shape[1] for k, _, _ in found])
        longest, like = int(lengths.max()), found[0][0]
        rows = {}
        for name, number in (("k", 0), ("v", 1), ("position", 2)):
            one = found[0][number]
            dtype = torch.int32 if name == "position" else one.dtype
            whole = torch.zeros(len(found), one.shape[0], longest, *one.shape[2:], dtype=dtype, device=like.device)
            for row, parts in enumerate(found):
                whole[row, :, : parts[number].shape[1]] = parts[number]
            rows[name] = whole
        index = torch.arange(longest, device=like.device).expand(len(found), like.shape[0], -1)
        self.store.fill(rows, index, lengths[:, None].expand(-1, like.shape[0]))

    def _rows(self, keys: Tensor, values: Tensor, before: int) -> dict[str, Tensor]:
        rows = super()._rows(keys, values, before)
        return {name: rows[name] for name in ("k", "v", "position")}

    def _rescore(self, part: Pages, q_len: int, sums: Callable[[int | None, str], Tensor]) -> None:
        """Nothing is scored after the prompt."""
