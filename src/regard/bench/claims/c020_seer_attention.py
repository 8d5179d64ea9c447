"""020 SeerAttention: a trained gate finds more of the attention mass than untrained summaries or a window, and pays on the clock."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...integrations.transformers import attach
from ...losses.runner import fit
from ...losses.seer_gates import block_map_distillation
from ...methods.rotary import RotaryOf, query_positions
from ...methods.sparse.seer_gates import seer_gates
from ...nn.sequence.attention_gate import AttentionGate
from ...ops.attention import attention
from ...ops.block_maps import pooled_attention_map
from ...ops.masks import causal
from ...ops.select.block_topk import block_topk, block_topk_attention
from ...ops.select.blocks import BlockGrid, block_scores, select_blocks, share_scores
from ...ops.select.gate import gate_block_map
from ...ops.select.summaries import block_summaries
from ...ops.selection import Selection
from ..text import token_windows
from .claim import Outcome, Scale
from .timing import times

PAPER, SLUG = "020", "seer-attention"
SAYS = (
    "SeerAttention: a small gate distilled from the model's own attention picks the blocks that matter better than untrained rules, one "
    "gate serving every sparsity, and at 90 % sparsity attention is several times faster (5.67x over FlashAttention-2 at 32k)."
)
GATE, MEANS, BOUNDS, WINDOW = "trained gate", "block means, untrained", "min/max bounds, untrained", "sink and window"
MASS = "attention mass read"


def measure(scale: Scale) -> Outcome:
    out = Outcome("", "a prompt and layer")
    length = scale.pick(16384, 1024)
    settings = [_recall(out, scale), _time(out, scale, length)]
    out.setting = "; ".join(settings)
    return out


def _recall(out: Outcome, scale: Scale) -> str:
    model, tokenizer = scale.language_model()
    context, block = scale.pick(1024, 128), scale.pick(32, 16)
    depth = model.config.get_text_config().num_hidden_layers
    layers = sorted({round(i * (depth - 1) / 4) for i in range(5)})
    windows = token_windows(tokenizer, context, scale.pick(9, 3))
    held_out = scale.pick((3, 6), (1,))
    seen = [_queries_and_keys(model, ids, layers, block) for ids in windows]
    torch.manual_seed(0)
    gates = seer_gates(model, gate_dim=64, block_size=block)
    gates = nn.ModuleDict({str(layer): gates[str(layer)] for layer in layers})
    rotary = RotaryOf(model, "claim")
    angles = rotary.angles(torch.arange(0, context, block)[None], 64)

    def loss(item: dict[int, tuple[Tensor, ...]]) -> Tensor:
        parts = [block_map_distillation(gates[str(n)](q, k, angles), target) for n, (q, k, target, *_) in item.items()]
        return torch.stack(parts).sum()

    steps = scale.pick(120, 4)
    train = [item for number, item in enumerate(seen) if number not in held_out]
    fit(gates, loss, train, steps=steps, lr=1e-3, warmup=20, schedule="cosine", progress=False)
    gates.eval()
    for read in (0.2, 0.1):
        found: dict[str, list[float]] = {label: [] for label in (GATE, MEANS, BOUNDS, WINDOW)}
        for number in held_out:
            for layer, item in seen[number].items():
                for label, share in _shares(gates[str(layer)], item, angles, read, block).items():
                    found[label].append(share)
        for label, shares in found.items():
            out.add(f"{label}, {read:.0%} of the blocks", MASS, "", shares)
        gate = out.row(f"{GATE}, {read:.0%} of the blocks", MASS).mean
        for label in (MEANS, BOUNDS, WINDOW):
            lead = gate - out.row(f"{label}, {read:.0%} of the blocks", MASS).mean
            out.check(
                f"mass read by the gate, lead over {label}, {read:.0%} of the blocks", lead, at_least=0.0, digits=3
            )
        out.note += f"Mass read at {read:.0%}: " + ", ".join(
            f"{label} {out.row(f'{label}, {read:.0%} of the blocks', MASS).mean:.3f}" for label in found
        )
        out.note += ". "
    return (
        f"{len(held_out)} held-out prompts of {context} tokens, blocks of {block}, gates of {len(layers)} layers trained {steps} steps on "
        f"{len(train)} prompts (the paper: 500 M tokens)"
    )


@torch.no_grad()
def _queries_and_keys(model: Any, ids: list[int], layers: list[int], block: int) -> dict[int, tuple[Tensor, ...]]:
    """For each layer: queries and keys before rotary embedding, the block map, and both after it."""
    rotary, calls = RotaryOf(model, "claim"), []
    with attach(model) as session:
        rotary.watch(session)
        session.observers.append(lambda call: calls.append(call) if call.layer in layers else None)
        model(torch.tensor([ids], device=model.device), use_cache=False, logits_to_keep=1)
        at = query_positions(calls[0])
    found: dict[int, tuple[Tensor, ...]] = {}
    for call in calls:
        target = pooled_attention_map(call.q, call.k, block, "max", scale=call.scale, normalize=True)
        mass = pooled_attention_map(call.q, call.k, block, "sum", scale=call.scale)
        found[call.layer] = (rotary.undo(call.q, at), rotary.undo(call.k, at), target, mass, call.q, call.k)
    return found


@torch.no_grad()
def _shares(gate: Any, item: tuple[Tensor, ...], angles: Any, read: float, block: int) -> dict[str, float]:
    """How much of the attention falls on the chosen blocks, by each way of choosing; equally many blocks a row."""
    plain_q, plain_k, _, mass, q, k = item
    blocks = mass.shape[-1]
    count = max(1, int((1 - (1 - read) ** 0.5) * blocks))
    grid = BlockGrid(q.shape[2], k.shape[2], block, block, 0)
    low = torch.ones(blocks, blocks, dtype=torch.bool).tril()
    # scores that grow towards the diagonal: the window, with one block for the sink
    distance = torch.arange(blocks).expand(1, 1, blocks, blocks).float()
    kept = {
        GATE: gate_block_map(gate(plain_q, plain_k, angles), ratio=read),
        MEANS: _untrained(q, k, "mean", grid, count),
        BOUNDS: _untrained(q, k, "minmax", grid, count),
        WINDOW: select_blocks(distance, grid, topk=count, sink=1 if count > 1 else 0).block_map(),
    }
    rows = torch.arange(blocks) >= count  # rows that have something to leave out
    return {label: float((mass * (map_ & low))[:, :, rows].sum(-1).mean()) for label, map_ in kept.items()}


def _untrained(q: Tensor, k: Tensor, kind: str, grid: BlockGrid, count: int) -> Tensor:
    scores = block_scores(q, block_summaries(k, grid.block_k, kind), kind, block_q=grid.block_q, share="none")
    return select_blocks(scores, grid, topk=count, recent=0).block_map()


def _time(out: Outcome, scale: Scale, length: int) -> str:
    """The attention op alone, selection included, on random tensors: what is chosen does not matter for the time, how much does."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, length, 64, generator=generator) for heads in (9, 3, 3))
    torch.manual_seed(0)
    gate, read = AttentionGate(9, 3, 64, gate_dim=64), 0.1

    def choose(share: str) -> Selection:
        with torch.no_grad():
            kept = gate_block_map(share_scores(gate(q, k), 3, share), ratio=read, diagonal=True)
        return Selection.from_block_map(kept, block_q=64, block_k=64, q_len=length, kv_len=length)

    def seer(share: str) -> Tensor:
        return attention(q, k, v, mask=causal, selection=choose(share))

    means: dict[str, Any] = {"block_q": 64, "ratio": read, "sink": 1}
    ways: dict[str, Any] = {
        "dense causal": partial(attention, q, k, v, mask=causal),
        "gate, a choice a head": partial(seer, "none"),
        "gate, a choice a kv head": partial(seer, "max"),
        "block means": partial(block_topk_attention, q, k, v, **means),
        "gate alone": partial(choose, "max"),
        "block means alone": partial(block_topk, q, k, **means),
    }
    found = times(ways, rounds=scale.pick(2, 1), inner=1)
    for label in ways:
        out.add(label, "time", "s", found[label], against=None if label == "dense causal" else "dense causal")
    for label, alone in (("gate, a choice a kv head", "gate alone"), ("block means", "block means alone")):
        ratios = [a / b for a, b in zip(found["dense causal"], found[label])]
        spread = (max(ratios) - min(ratios)) / 2
        out.check(
            f"times faster than dense, {label}, selection included",
            sum(ratios) / len(ratios),
            at_least=6.0,
            spread=spread,
        )
        share = sum(found[alone]) / sum(found[label])
        out.note += f"Selection is {share:.0%} of the time of {label}. "
    own = sum(found["dense causal"]) / sum(found["gate, a choice a head"])
    out.note += f"With a choice a query head, as released: {own:.1f} times. "
    return f"times at {length} tokens, 9 query and 3 kv heads of 64, float32, 10 % of the causal blocks, blocks of 64"
