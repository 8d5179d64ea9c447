"""The cost model held against the clock: predicted and measured times of attention with SmolLM2's heads, in one run."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import masks
from ..ops import Selection, attention, attention_backend
from .cost import MODELS, Cost, Device, ModelShape, attention_prefill_cost, decode_cost
from .cost_methods import DENSE, Reach, density_reach, window_reach
from .timing import Ratio, interleaved

BLOCK = 64


@dataclass(frozen=True)
class Row:
    """One op: what the model says, what the clock says.

    Attributes:
        what: the op. predicted: seconds. measured: seconds, median. ratio: measured over predicted, with its range over the rounds.
        flops, bytes: what the op has to do, by the model. backend: the one `attention()` took.
    """

    what: str
    predicted: float
    measured: float
    ratio: Ratio
    flops: float
    bytes: float
    backend: str


def check(
    device: Device,
    *,
    where: str = "cpu",
    dtype: torch.dtype = torch.float32,
    quick: bool = False,
    rounds: int = 5,
    say: Callable[[str], None] | None = None,
) -> list[Row]:
    """Time attention ops and set what the cost model predicts for `device` beside each.

    Args:
        device: usually `Device.measure(where, dtype)`, made just before. where: "cpu" or "cuda". quick: short sequences.
    """
    shape = MODELS["smollm2-135m"]
    cases: dict[str, tuple[Cost, Callable[[], Any], str]] = {}
    prompts, contexts = ((512, 1024), (2048, 8192)) if quick else ((1024, 2048, 4096), (4096, 16384, 32768))
    for n in prompts:
        _add(cases, f"prefill {n}, dense causal", shape, DENSE, n, where, dtype, mask=masks.causal)
    n = prompts[-1]
    window = masks.sliding_window(n // 8) & masks.causal
    _add(cases, f"prefill {n}, window {n // 8}", shape, window_reach(n // 8), n, where, dtype, mask=window)
    blocks = _random_blocks(n, shape, 0.1)
    share = _density(blocks)
    label = f"prefill {n}, {share:.0%} of the causal blocks"
    _add(
        cases,
        label,
        shape,
        density_reach(share),
        n,
        where,
        dtype,
        mask=masks.causal,
        selection=blocks.to(where),
    )
    for m in contexts:
        _add_decode(cases, f"decode at {m}, dense", shape, m, where, dtype)
    kept = contexts[-1] // 16
    _add_decode(cases, f"decode at {contexts[-1]}, {kept} keys kept", shape, kept, where, dtype)
    times = interleaved(
        {name: run for name, (_, run, _) in cases.items()}, rounds, device=where, calls=20, progress=say
    )
    rows = []
    for name, (cost, _, backend) in cases.items():
        predicted, took = cost.seconds(device), times[name]
        ratio = Ratio.of(took, [predicted] * len(took))
        rows.append(Row(name, predicted, statistics.median(took), ratio, cost.flops, cost.bytes, backend))
    return rows


def _tensors(shape: ModelShape, q_len: int, kv_len: int, where: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((shape.num_heads, q_len), (shape.num_kv_heads, kv_len), (shape.num_kv_heads, kv_len))
    made = [torch.randn(1, h, n, shape.head_dim, generator=generator).to(where, dtype) for h, n in sizes]
    return tuple(made)


def _add(
    cases: dict, name: str, shape: ModelShape, reach: Reach, n: int, where: str, dtype: torch.dtype, **options: Any
) -> None:
    q, k, v = _tensors(shape, n, n, where, dtype)
    cost = attention_prefill_cost(shape, reach, n, element_bytes=dtype.itemsize)

    def run() -> Tensor:
        with torch.no_grad():
            return attention(q, k, v, **options)

    cases[name] = (cost, run, attention_backend(q, k, v, **options))


def _add_decode(cases: dict, name: str, shape: ModelShape, keys: int, where: str, dtype: torch.dtype) -> None:
    """One decoded token of one layer: a query against `keys` keys."""
    q, k, v = _tensors(shape, 1, keys, where, dtype)
    layer = ModelShape(1, shape.num_heads, shape.num_kv_heads, shape.head_dim, 0.0)
    whole = decode_cost(layer, None, keys - 1, element_bytes=dtype.itemsize)
    cost = Cost(**{field: getattr(whole, field) for field in whole.__dataclass_fields__} | {"calls": 1.0})

    def run() -> Tensor:
        with torch.no_grad():
            return attention(q, k, v)

    cases[name] = (cost, run, attention_backend(q, k, v))


def _random_blocks(n: int, shape: ModelShape, density: float) -> Selection:
    """For every query block and head its own block and about that share of the earlier ones, drawn at random."""
    blocks = -(-n // BLOCK)
    generator = torch.Generator().manual_seed(1)
    past = torch.ones(blocks, blocks).tril().bool()
    kept = torch.rand(1, shape.num_heads, blocks, blocks, generator=generator) < density
    kept = (kept & past) | torch.eye(blocks, dtype=torch.bool)
    return Selection.from_block_map(kept, block_q=BLOCK, block_k=BLOCK, q_len=n, kv_len=n)


def _density(selection: Selection) -> float:
    """Share of the causal pairs that are left."""
    n, block = selection.q_len, selection.block_q
    heads = selection.indices.shape[1]
    off_diagonal = int(selection.counts.sum()) - heads * selection.num_q_blocks
    inside = block * (block + 1) / 2 * selection.num_q_blocks
    return (off_diagonal * block * block / heads + inside) / (n * (n + 1) / 2)
