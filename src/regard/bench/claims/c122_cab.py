"""122 CAB: efficient attention wins late, and a rank on one attention pattern does not carry over to another."""

from __future__ import annotations

import math
import statistics

from ..cab import METHODS, Sizes, causal_ops, indices, layer_lengths, leaks, rank_correlation, run_tasks
from .claim import Outcome, Scale

PAPER, SLUG = "122", "cab"
SAYS = (
    "CAB: most efficient attentions are faster than vanilla attention only beyond a thousand tokens or more; few of them can do all four "
    "patterns, and how a method ranks on one pattern says little of another."
)
NEVER = 1e6


def measure(scale: Scale) -> Outcome:
    lengths = scale.pick((256, 512, 1024, 2048, 4096), (32, 64, 128))
    steps = scale.pick(120, 2)
    sizes = scale.pick(Sizes(text=96), Sizes(dim=16, layers=1, batch=2, kept=4, text=32))
    out = Outcome(
        f"layers 128 wide with 4 heads on {lengths[0]} ... {lengths[-1]} tokens, forward; tasks TTS, MLM and LM in small, {steps} steps",
        "one fit, or one training",
    )
    efficient = [name for name in METHODS if name not in ("vanilla", "none")]
    found = {name: min(length, NEVER) for name, length in layer_lengths(efficient, lengths).items()}
    for name, length in found.items():
        out.add(name, "efficiency length (time)", "tokens", length)
    out.check("median efficiency length, tokens", statistics.median(found.values()), at_least=1000.0, digits=0)
    able = [name for name in efficient if len(METHODS[name].patterns) == 4]
    out.check("share of the nine that can do all four patterns", len(able) / len(efficient), at_most=0.5)

    both = [name for name in METHODS if {"NS", "CS"} <= METHODS[name].patterns and name != "none"]
    report = run_tasks(both, ["NS TTS", "NS MLM", "CS TTS", "CS LM"], steps=steps, sizes=sizes)
    scores = indices(report)
    for pattern in ("NS", "CS"):
        for name in both:
            out.add(name, f"compositional index, {pattern}", "", scores[pattern][name])
    alike = rank_correlation(scores["NS"], scores["CS"])
    if math.isfinite(alike):
        out.check(f"rank correlation of the index between NS and CS, {len(both)} methods", alike, at_most=0.5)

    leaking = {name: leaks(op) for name, op in causal_ops().items()}
    for name, size in leaking.items():
        out.add(name, "largest difference in the causality test", "", size)
    exact = [size for name, size in leaking.items() if name in _EXACT]
    out.check("largest difference among our causal ops without selection", max(exact), at_most=1e-4)
    late = [name for name, size in leaking.items() if size > 1e-4]
    out.note = (
        f"{len(late)} of {len(leaking)} ops tested depend on later tokens, two of them on purpose; the others pool queries of a block, "
        "sort all keys, or scale by a maximum over all keys. Length 0: faster at every length by the fit. The paper measures GPUs."
    )
    return out


_EXACT = (
    "attention, causal",
    "attention, window",
    "attention, sinks and window",
    "flash attention, causal",
    "tiled attention, causal",
    "neighbourhood, causal",
    "linear attention",
    "lightning attention",
)
