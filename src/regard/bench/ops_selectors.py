"""Prefill with keys chosen by content, selection included, beside dense causal attention: `regard bench ops --only selectors`.

Every way reads about a tenth of what causal attention reads. How good the choice is stands in the claims and in `regard compare`;
here it is what the choice and the attention over it cost on random data, which no selector finds easier than another.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import attention_backend
from ..ops.masks import causal
from ..ops.plan import make_plan
from ..ops.select import BlockGrid, even_boundaries, select_blocks, share_scores
from ..ops.select.block_topk import block_topk
from ..ops.select.choice import Choice
from ..ops.select.chunk_attention import chunk_choice
from ..ops.select.hierarchical_attention import hierarchical_choice
from .timing import Ratio, interleaved

if TYPE_CHECKING:
    from .ops import Row, Setting

BASE = "dense causal SDPA"


def measure(setting: Setting, say: Callable[[str], None]) -> list[Row]:
    """One row a selector: time with the selection, its share of that time, and the share of causal pairs that is read."""
    from .ops import Row

    q, k, v = _inputs(setting)
    ways = _ways(setting)
    with torch.no_grad():
        runs: dict[Any, Callable[[], Any]] = {(BASE, "whole"): lambda: _dense(q, k, v)}
        for name, (choose, _) in ways.items():
            runs[name, "whole"] = partial(_chosen, choose, q, k, v)
            runs[name, "choice"] = partial(choose, q, k)
        times = interleaved(runs, setting.rounds, device=setting.device, calls=3, progress=say)
        base = times[BASE, "whole"]
        rows = [Row(BASE, "forward", Ratio.of(base, [1.0] * len(base)).median)]
        for name, (choose, target) in ways.items():
            own, part = times[name, "whole"], times[name, "choice"]
            choice = choose(q, k)
            read = pairs_read(choice, q, k)
            row = Row(name, "forward", Ratio.of(own, [1.0] * len(own)).median, BASE, Ratio.of(base, own), 1 / read)
            row.share = Ratio.of(base, own, read)
            row.target_ratio = None if setting.device.startswith("cuda") and target < 6 else target
            mask = causal if choice.mask is None else causal & choice.mask
            row.backend = attention_backend(q, k, v, mask=mask, selection=choice.selection, score_mod=choice.score_mod)
            chosen = Ratio.of(part, own)
            row.note = f"reads {read:.1%} of the causal pairs; choosing is {chosen.median:.0%} of the time"
            rows.append(row)
    return rows


def _inputs(setting: Setting) -> list[Tensor]:
    """SmolLM2's heads on the CPU (9 query heads, 3 kv heads) at twice the usual length; on a GPU as many heads of each as set."""
    on_gpu = setting.device.startswith("cuda")
    length = setting.seq_len if on_gpu else 2 * setting.seq_len
    heads = (setting.num_heads, setting.num_heads) if on_gpu else (9, 3)
    generator = torch.Generator().manual_seed(setting.seed)
    shapes = [(1, count, length, setting.head_dim) for count in (heads[0], heads[1], heads[1])]
    return [torch.randn(shape, generator=generator).to(setting.device, setting.dtype) for shape in shapes]


def _chosen(choose: Callable[[Tensor, Tensor], Choice], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return choose(q, k).attention(q, k, v)


def _dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _ways(setting: Setting) -> dict[str, tuple[Callable[[Tensor, Tensor], Choice], float]]:
    """Name -> (how it chooses, how many times faster than dense it is to be)."""
    from ..nn.sequence.attention_gate import AttentionGate

    length = setting.seq_len * (1 if setting.device.startswith("cuda") else 2)
    block = setting.block
    # the mean causal row sees half of the length; a tenth of that, with sinks and the diagonal among them
    tenth = max(4 * block, length // 20 // block * block)
    q_block = 2 * block

    def blocks(summary: str) -> Callable[[Tensor, Tensor], Choice]:
        return lambda q, k: Choice(
            block_topk(q, k, block_q=q_block, block_k=block, summary=summary, budget=tenth, sink=block, recent=1)
        )

    gates: dict[tuple[int, int], AttentionGate] = {}

    def gate(q: Tensor, k: Tensor) -> Choice:
        heads = q.shape[1], k.shape[1]
        if heads not in gates:
            torch.manual_seed(setting.seed)
            gates[heads] = AttentionGate(*heads, q.shape[-1], block_size=block).to(q.device, q.dtype)
        scores = share_scores(gates[heads](q, k), k.shape[1])
        grid = BlockGrid(q.shape[2], k.shape[2], block, block, k.shape[2] - q.shape[2])
        return Choice(select_blocks(scores, grid, budget=tenth, sink=block))

    boundaries = even_boundaries(length, 16, device=setting.device)
    return {
        "block top-k, mean summaries": (blocks("mean"), 6.0),
        "block top-k, min-max summaries": (blocks("minmax"), 6.0),
        "SeerAttention's gate": (gate, 6.0),
        "HiP": (
            lambda q, k: hierarchical_choice(q, k, tenth * 2 // 3, block_q=64, block_k=8, window=tenth // 3),
            3.0,
        ),
        "DHSA, even chunks": (
            lambda q, k: chunk_choice(q, k, boundaries, tenth, block_q=128, local=128, sink=128, variant="paper"),
            3.0,
        ),
    }


def pairs_read(choice: Choice, q: Tensor, k: Tensor) -> float:
    """Share of the causal pairs of a query and a key that the choice computes, whole blocks counted as what is visible in them."""
    length = k.shape[2]
    offset = length - q.shape[2]
    mask = causal if choice.mask is None else causal & choice.mask
    plan = make_plan(
        mask,
        choice.selection,
        batch=q.shape[0],
        num_heads=q.shape[1],
        num_kv_heads=k.shape[1],
        q_len=q.shape[2],
        kv_len=length,
        q_offset=offset,
        max_tiles=0,
    )
    block_q, block_k = plan.block_q, plan.block_k
    first = torch.arange(plan.num_q_blocks, device=q.device)[:, None] * block_q
    rows = (q.shape[2] - first).clamp(max=block_q)
    key = plan.kv_blocks * block_k
    width = (length - key).clamp(max=block_k)
    # what of a block lies above the diagonal, no dense causal kernel computes either: row t of it hides `beyond - t` keys
    beyond = (key + width - 1 - (first + offset)).clamp(min=0)
    all_hidden, some_hidden = torch.minimum((beyond - width).clamp(min=0), rows), torch.minimum(beyond, rows)
    steps = (some_hidden * (some_hidden - 1) - all_hidden * (all_hidden - 1)) / 2
    hidden = all_hidden * width + (some_hidden - all_hidden) * beyond - steps
    seen = torch.where(plan.kv_blocks >= 0, rows * width - hidden, 0).double()
    seen = seen.sum() / (plan.kv_blocks.shape[0] * plan.kv_blocks.shape[1])
    total = q.shape[2] * offset + q.shape[2] * (q.shape[2] + 1) / 2
    return float(seen) / total
