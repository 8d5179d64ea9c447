"""146 KDGQA, DGQA, PGQA: after turning a trained network's heads into groups, allocation by key norms recovers more than equal groups."""

from __future__ import annotations

import copy
import statistics
from typing import Any

import torch
from torch import Tensor, nn

from ...nn.sequence.grouped_query_attention import GroupedQueryAttention, convert_to_grouped
from ...nn.spatial.window_attention import WindowSoftmaxAttention
from ...ops.query_allocation import key_norms
from .claim import Outcome, Scale
from .glyphs import SIDE, accuracy, glyphs

PAPER, SLUG = "146", "key-driven"
SAYS = (
    "DGQA: when a vision transformer is turned into one with grouped queries and trained briefly, groups sized by the norms of their "
    "keys (best: DGQA, up to 8 % on Tiny-ImageNet) are more accurate than equal groups."
)
HEADS, GROUPS = 8, 4
WAYS: dict[str, dict[str, Any]] = {
    "equal groups": {},
    "KDGQA": {"allocation": "key_norm"},
    "DGQA, ema": {"allocation": "key_norm_ema", "every": 30},
    "DGQA, diff": {"allocation": "key_norm_diff", "every": 30},
    "PGQA": {"noise": "output_uniform"},
}
RIGHT = "right answers"


class _OnMap(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attn: nn.Module = WindowSoftmaxAttention(dim, HEADS, SIDE, relative_bias=False)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.attn(x.flatten(2).transpose(1, 2))
        return mixed.transpose(1, 2).unflatten(2, (x.shape[2], x.shape[3]))


def measure(scale: Scale) -> Outcome:
    steps, more, seeds = scale.pick(400, 3), scale.pick(60, 2), scale.pick((0, 1), (0,))
    out = Outcome(
        f"a retrieval task on rendered glyphs, 2 blocks of 48 channels, {HEADS} heads trained for {steps} steps, turned into {GROUPS} "
        f"groups and trained for {more} more",
        "a seed",
    )
    found: dict[str, list[float]] = {"all heads": [], "equal groups, not trained on": [], **{way: [] for way in WAYS}}
    spread = []
    for seed in seeds:
        right, net = accuracy(_OnMap, steps, seed)
        found["all heads"].append(right)
        for way, options in WAYS.items():
            grouped = copy.deepcopy(net)
            convert_to_grouped(grouped, GROUPS, **options)
            if way == "equal groups":
                found["equal groups, not trained on"].append(accuracy(grouped, 0, seed)[0])
            found[way].append(accuracy(grouped, more, seed + 100, lr=1e-3)[0])
            if way == "equal groups":
                spread.append(_norm_spread(grouped))
    base = "equal groups"
    for name in (base, *(name for name in found if name != base)):
        out.add(name, RIGHT, "", found[name], against=None if name == base else base)
    for way in ("KDGQA", "DGQA, ema", "DGQA, diff"):
        lead = out.row(way, RIGHT).mean - out.row(base, RIGHT).mean
        out.check(f"share of right answers, lead of {way} over equal groups", lead, at_least=0.0)
    out.add("key norms of groups", "largest over smallest", "", spread)
    out.note = f"Heads turned into groups without more training: {out.row('equal groups, not trained on', RIGHT).mean:.2f} right."
    return out


def _norm_spread(net: nn.Module) -> float:
    """Largest over smallest norm of a group's keys, mean of the layers."""
    ratios: list[float] = []

    def look(module: nn.Module, inputs: tuple[Tensor, ...], result: Tensor) -> None:
        norms = key_norms(module.k(inputs[0]).unflatten(-1, (GROUPS, -1)).transpose(1, 2))  # type: ignore[operator]
        ratios.append(float(norms.max() / norms.min()))

    hooks = [m.register_forward_hook(look) for m in net.modules() if isinstance(m, GroupedQueryAttention)]
    with torch.no_grad():
        net(glyphs(64, torch.Generator().manual_seed(1))[0])
    for hook in hooks:
        hook.remove()
    return statistics.fmean(ratios)
