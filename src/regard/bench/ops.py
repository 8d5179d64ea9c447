"""How fast the attention ops are: beside dense SDPA, beside what the share of computed pairs would allow, beside FlexAttention.

All times of one part come from one run, in turns (`timing.interleaved`). Ideals are ratios of pairs of a query and a key: dense pairs
over those that the mask or selection leaves, both causal where the dense one is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import masks
from .._checks import require_name
from ..ops import Selection, attention, attention_backend
from .timing import Ratio, interleaved, peak_bytes

PARTS = ("dense", "block-sparse", "window", "prefill", "linear", "recurrent", "selectors", "neighborhood", "decode")


@dataclass(frozen=True)
class Setting:
    """What is measured. The defaults are the ones that the targets are stated for, on the CPU."""

    seq_len: int = 8192
    num_heads: int = 8
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    block: int = 64
    density: float = 0.1
    window: int = 512
    rounds: int = 5
    seed: int = 0
    flex: bool = True

    @classmethod
    def of(cls, device: str = "cpu", quick: bool = False) -> Setting:
        """The CPU's targets, or the GPU's (bfloat16, head_dim 128, 32k tokens); `quick` only shows that it runs."""
        if device.startswith("cuda"):
            return cls(2048 if quick else 32768, 8, 128, torch.bfloat16, device, rounds=3 if quick else 7)
        return cls(1024, device=device, window=128, rounds=2, flex=False) if quick else cls(device=device)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.seq_len} tokens, {self.num_heads} heads, head_dim {self.head_dim}, {dtype}, batch 1"


@dataclass
class Row:
    """One line of the table.

    Attributes:
        what, pass_: which op, "forward" or "forward+backward". seconds: median. beside: the dense op it is compared with.
        ratio: how many times faster than that. ideal: how many times faster it could be. target: the least share of the ideal that
        is asked for (None: nothing is). peers: how many times faster than each of them, or why it is not there.
        backend: the one `attention()` took. extra_bytes: peak memory beyond inputs and results. note: what else to know.
    """

    what: str
    pass_: str
    seconds: float
    beside: str = ""
    ratio: Ratio | None = None
    ideal: float | None = None
    share: Ratio | None = None
    target: float | None = None
    target_ratio: float | None = None
    peers: dict[str, Ratio | str] = field(default_factory=dict)
    peer_target: float | None = None
    backend: str = ""
    extra_bytes: int | None = None
    note: str = ""

    @property
    def holds(self) -> bool | None:
        """Whether every target of the row is met; None when it has none."""
        met = []
        if self.target is not None and self.share is not None:
            met.append(self.share.median >= self.target)
        if self.target_ratio is not None and self.ratio is not None:
            met.append(self.ratio.median >= self.target_ratio)
        if self.peer_target is not None:
            met += [peer.median >= self.peer_target for peer in self.peers.values() if isinstance(peer, Ratio)]
        return all(met) if met else None


Say = Callable[[str], None]


def measure(setting: Setting, only: str | None = None, say: Say | None = None) -> list[Row]:
    """The rows of all parts, or of the one named `only`."""
    if only is not None:
        require_name("only", only, PARTS)
    rows: list[Row] = []
    for part in PARTS:
        if only in (None, part):
            measure_part = (
                _MEASURES[part] if part in _MEASURES else import_module(_ELSEWHERE[part], __package__).measure
            )
            rows += measure_part(setting, _about(part, say or (lambda text: None)))
    return rows


def _about(part: str, say: Say) -> Say:
    return lambda text: say(f"{part}: {text}")


def _inputs(setting: Setting, q_len: int | None = None) -> list[Tensor]:
    """q, k, v and a gradient of the output."""
    generator = torch.Generator().manual_seed(setting.seed)
    lengths = (q_len or setting.seq_len, setting.seq_len, setting.seq_len, q_len or setting.seq_len)
    shapes = [(1, setting.num_heads, length, setting.head_dim) for length in lengths]
    return [torch.randn(shape, generator=generator).to(setting.device, setting.dtype) for shape in shapes]


def _forward(op: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], Any]:
    q, k, v, _ = inputs

    def run() -> Tensor:
        with torch.no_grad():
            return op(q, k, v)

    return run


def _both(op: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], Any]:
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(op(*leaves), leaves, inputs[3])

    return run


def _dense(causal: bool) -> Callable[..., Tensor]:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def _runs(ops: dict[str, Callable[..., Tensor]], inputs: list[Tensor], passes: tuple[str, ...]) -> dict:
    makers = {"forward": _forward, "forward+backward": _both}
    return {(name, which): makers[which](op, inputs) for name, op in ops.items() for which in passes}


def _row(
    times: dict, name: str, which: str, beside: str, ideal: float | None, target: float | None, **more: Any
) -> Row:
    own, dense = times[name, which], times[beside, which]
    ratio = Ratio.of(dense, own)
    share = None if ideal is None else Ratio.of(dense, own, 1 / ideal)
    seconds = Ratio.of(own, [1.0] * len(own)).median
    return Row(name, which, seconds, beside, ratio, ideal, share, target, **more)


def _base(times: dict, name: str, which: str) -> Row:
    return Row(name, which, Ratio.of(times[name, which], [1.0] * len(times[name, which])).median)


_PASSES = ("forward", "forward+backward")


def _extra(run: Callable[[], Any], device: str) -> int:
    peak, kept = peak_bytes(run, device)
    return peak - kept


def _measure_dense(setting: Setting, say: Say) -> list[Row]:
    inputs = _inputs(setting)
    ops = {
        "dense causal SDPA": _dense(True),
        "dense causal, attention()": lambda q, k, v: attention(q, k, v, mask=masks.causal),
    }
    times = interleaved(_runs(ops, inputs, _PASSES), setting.rounds, device=setting.device, progress=say)
    backend = attention_backend(*inputs[:3], mask=masks.causal)
    rows = [_base(times, "dense causal SDPA", which) for which in _PASSES]
    rows += [
        _row(times, "dense causal, attention()", which, "dense causal SDPA", 1.0, 0.97, backend=backend)
        for which in _PASSES
    ]
    return rows


def _random_blocks(setting: Setting, causal: bool) -> Selection:
    """The same number of blocks for every query block and head, other ones for each; under causality that share of the past."""
    generator = torch.Generator().manual_seed(setting.seed + 1)
    blocks = -(-setting.seq_len // setting.block)
    score = torch.rand((1, setting.num_heads, blocks, blocks), generator=generator)
    if not causal:
        kept = score.argsort(-1).argsort(-1) < max(1, round(setting.density * blocks))
    else:
        past = torch.ones(blocks, blocks).tril().bool()
        score = score.masked_fill(~past, 2.0)
        wanted = (setting.density * torch.arange(1, blocks + 1)).round().clamp(min=1)[:, None]
        kept = (score.argsort(-1).argsort(-1) < wanted) & past
    return Selection.from_block_map(
        kept, block_q=setting.block, block_k=setting.block, q_len=setting.seq_len, kv_len=setting.seq_len
    ).to(setting.device)


def _measure_block_sparse(setting: Setting, say: Say) -> list[Row]:
    causal = setting.device.startswith("cuda")  # there the dense op to beat is the causal one
    inputs = _inputs(setting)
    selection = _random_blocks(setting, causal)
    mask = masks.causal if causal else None
    blocks = selection.num_q_blocks
    share = selection.density() if not causal else selection.density() * blocks * blocks / (blocks * (blocks + 1) / 2)
    name, base = f"block-sparse, {share:.1%} of blocks", "dense causal SDPA" if causal else "dense SDPA"
    op: Callable[..., Tensor] = lambda q, k, v: attention(q, k, v, selection=selection, mask=mask)  # noqa: E731
    times = interleaved(
        _runs({base: _dense(causal), name: op}, inputs, _PASSES), setting.rounds, device=setting.device, progress=say
    )
    backend = attention_backend(*inputs[:3], selection=selection, mask=mask)
    targets = {"forward": 0.7 if causal else 0.85, "forward+backward": None if causal else 0.6}
    rows = [_base(times, base, which) for which in _PASSES]
    for which, make in zip(_PASSES, (_forward, _both)):
        row = _row(times, name, which, base, 1 / share, targets[which], backend=backend)
        row.extra_bytes = _extra(make(op, inputs), setting.device)
        row.note = f"blocks of {setting.block}, random, other ones for each head"
        rows.append(row)
    return rows


def _causal_pairs(setting: Setting, window: int | None = None) -> int:
    n = setting.seq_len
    window = n if window is None else min(window, n)
    return window * (window + 1) // 2 + (n - window) * window


def _measure_window(setting: Setting, say: Say) -> list[Row]:
    inputs, base = _inputs(setting), "dense causal SDPA"
    mask = masks.sliding_window(setting.window) & masks.causal
    sinks = (masks.sliding_window(setting.window) | masks.sink(4)) & masks.causal
    name, with_sinks = f"sliding window {setting.window}", f"4 sinks + window {setting.window}"
    ops: dict[str, Callable[..., Tensor]] = {
        base: _dense(True),
        name: lambda q, k, v: attention(q, k, v, mask=mask),
        with_sinks: lambda q, k, v: attention(q, k, v, mask=sinks),
    }
    runs = _runs(ops, inputs, _PASSES)
    flex: Any = "not asked for"
    if setting.flex:
        say("compiling FlexAttention")
        flex = _flex(setting, inputs)
    if callable(flex):
        runs["FlexAttention", "forward"] = flex
    times = interleaved(runs, setting.rounds, device=setting.device, progress=say)
    backend = attention_backend(*inputs[:3], mask=mask)
    ideal = _causal_pairs(setting) / _causal_pairs(setting, setting.window)
    rows = [_base(times, base, which) for which in _PASSES]
    for which, make in zip(_PASSES, (_forward, _both)):
        target = 0.65 if which == "forward" else None
        row = _row(times, name, which, base, ideal, target, backend=backend)
        row.extra_bytes = _extra(make(ops[name], inputs), setting.device)
        if which == "forward":
            peer = Ratio.of(times["FlexAttention", which], times[name, which]) if callable(flex) else flex
            row.peers, row.peer_target = {"FlexAttention": peer}, 1.1
        rows.append(row)
    rows += [_row(times, with_sinks, which, base, ideal, None, backend=backend) for which in _PASSES]
    if callable(flex):
        rows.append(_row(times, "FlexAttention", "forward", base, ideal, None, backend="torch.compile, same window"))
    return rows


def _flex(setting: Setting, inputs: list[Tensor]) -> Callable[[], Any] | str:
    window = setting.window

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (q_idx >= kv_idx) & (q_idx - kv_idx < window)

    return flex_peer(mask_mod, setting.seq_len, setting.device, lambda op: _forward(op, inputs))


def flex_peer(
    mask_mod: Callable[..., Tensor],
    length: int,
    device: str,
    make: Callable[[Callable[..., Tensor]], Callable[[], Any]],
) -> Callable[[], Any] | str:
    """`make(FlexAttention)`, compiled and run once, as its users write it over `length` tokens; or why it cannot be had."""
    from ..ops.backends.flex import compiler_missing

    reason = compiler_missing(torch.device(device).type)
    if reason:
        return reason
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    block_mask = create_block_mask(mask_mod, None, None, length, length, device=device)
    compiled = torch.compile(flex_attention, dynamic=False)
    run = make(lambda q, k, v: compiled(q, k, v, block_mask=block_mask))
    try:
        run()
    except (RuntimeError, NotImplementedError) as error:
        return f"could not be compiled: {str(error).strip().splitlines()[0]}"
    return run


def _measure_prefill(setting: Setting, say: Say) -> list[Row]:
    rows_of = max(1, setting.seq_len // 16)
    inputs = _inputs(setting, rows_of)
    base, name = f"dense SDPA, last {rows_of} queries", f"causal, last {rows_of} queries"
    ops = {base: _dense(False), name: lambda q, k, v: attention(q, k, v, mask=masks.causal)}
    times = interleaved(_runs(ops, inputs, ("forward",)), setting.rounds, device=setting.device, calls=20, progress=say)
    past = setting.seq_len - rows_of
    ideal = rows_of * setting.seq_len / (rows_of * past + rows_of * (rows_of + 1) / 2)
    backend = attention_backend(*inputs[:3], mask=masks.causal)
    row = _row(times, name, "forward", base, ideal, None, backend=backend, note="one chunk of a chunked prefill")
    return [_base(times, base, "forward"), row]


def _measure_linear(setting: Setting, say: Say) -> list[Row]:
    from .ops_state import SCALING, measure_linear

    say("speed beside dense causal SDPA, growth up to 131072 tokens, memory")
    scaling = SCALING if setting.seq_len >= 8192 else (setting.seq_len, 2 * setting.seq_len)
    found = measure_linear(
        setting.seq_len,
        num_heads=setting.num_heads,
        head_dim=setting.head_dim,
        dtype=setting.dtype,
        device=setting.device,
        repeats=setting.rounds,
        seed=setting.seed,
        scaling=scaling,
    )
    memory = {(row["pass"], row["seq_len"]): row["extra_bytes"] for row in found if row["kind"] == "memory"}
    targets = {} if setting.device.startswith("cuda") else {"forward": 15.0, "forward+backward": 9.0}
    rows = []
    for line in found:
        if line["kind"] == "speed":
            ratio = Ratio(line["ratio"], line["ratio_low"], line["ratio_high"])
            row = Row(line["name"], line["pass"], line["seconds"], "dense causal SDPA", ratio)
            row.target_ratio, row.backend = targets.get(line["pass"]), str(line.get("backend", ""))
            row.note = f"{line.get('form', 'chunk')} form, chunks of {line.get('chunk_size')}"
            rows.append(row)
        elif line["kind"] == "scaling":
            # how constant the time per token is: first length over this one, 1.0 where it grows linearly
            per_token = line["time_per_token"]
            high, low = 1 / line["time_per_token_low"], 1 / line["time_per_token_high"]
            row = Row(f"{line['name']}, {line['seq_len']} tokens", line["pass"], line["seconds"])
            row.beside, row.ideal, row.share = "linear growth", 1.0, Ratio(1 / per_token, low, high)
            row.target = 1 / 1.15
            row.extra_bytes = memory.get((line["pass"], line["seq_len"]))
            rows.append(row)
    return rows


# Parts with a file of their own, which has `measure(setting, say) -> list[Row]`.
_ELSEWHERE = {
    "recurrent": ".ops_recurrent",
    "selectors": ".ops_selectors",
    "neighborhood": ".ops_neighborhood",
    "decode": ".ops_decode",
}


_MEASURES: dict[str, Callable[[Setting, Say], list[Row]]] = {
    "dense": _measure_dense,
    "block-sparse": _measure_block_sparse,
    "window": _measure_window,
    "prefill": _measure_prefill,
    "linear": _measure_linear,
}
