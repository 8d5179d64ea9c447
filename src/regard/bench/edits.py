"""What an edit costs: time and peak memory of a prefill with it, beside the same model without, in one run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .._checks import require_int
from ..integrations.transformers import attach
from ..methods import ACT, Emphasize, LoFiT, MaskHeads, Method, ZeroTuning
from ..methods.edits import HeadAffine
from .text import token_windows
from .timing import Ratio, interleaved, peak_bytes

__all__ = ["MOST", "Row", "measure"]

MOST = 1.15  # times the plain prefill that an edit of scores or head outputs may take
PLAIN = "plain"


@dataclass
class Row:
    """One way to run the prefill.

    Attributes: what, stage ("", "scores", "head outputs", "weights"). seconds: median. ratio: to the plain model, with its range.
    extra_bytes: peak beyond inputs and results. weights_bytes: what the N x N weights of its own heads alone would take.
    """

    what: str
    stage: str
    seconds: float
    ratio: Ratio
    extra_bytes: int
    weights_bytes: int = 0

    @property
    def holds(self) -> bool | None:
        """Whether an edit that needs no weights is cheap enough."""
        return None if self.stage not in ("scores", "head outputs") else self.ratio.median <= MOST

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "holds": self.holds}


def contenders(model: Any) -> dict[str, tuple[str, Method | None, int]]:
    """What is compared: name -> (stage, method, heads whose weights it makes)."""
    config = model.config.get_text_config()
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    some = [(layer, layer % heads) for layer in range(0, layers, 3)]
    few = [(layers // 3, 0), (layers // 3, 1)]
    affine = HeadAffine(some, dim)
    return {
        PLAIN: ("", None, 0),
        "ZeroTuning, first key, every head": ("scores", ZeroTuning(2.0), 0),
        f"ZeroTuning, a third of the layers' heads ({len(some)})": ("scores", ZeroTuning(2.0, heads=some), 0),
        "Emphasize, a span, every head": ("scores", Emphasize("given", 0.9), 0),
        f"MaskHeads, output zero, {len(some)} heads": ("head outputs", MaskHeads(some, "zero", "all"), 0),
        f"MaskHeads, even attention, {len(some)} heads": ("scores", MaskHeads(some, "uniform", "all"), 0),
        f"LoFiT, {len(some)} heads": ("head outputs", LoFiT(affine), 0),
        f"ACT, {len(few)} heads of one layer": ("weights", ACT(few), len(few)),
    }


@torch.no_grad()
def measure(
    model: Any, tokenizer: Any, tokens: int = 2048, rounds: int = 3, say: Callable[[str], None] | None = None
) -> list[Row]:
    """Prefill of `tokens` tokens of prose, with each edit and without; medians over `rounds`, in turns."""
    require_int("tokens", tokens, 8)
    ids = torch.tensor(token_windows(tokenizer, tokens, 1), device=next(model.parameters()).device)
    span = torch.zeros(1, tokens, dtype=torch.bool)
    span[:, tokens // 3 : tokens // 2] = True
    listed = contenders(model)

    def runner(method: Method | None) -> Callable[[], Any]:
        def run() -> Any:
            given = {} if method is None else {"spans": {"given": span}}
            with attach(model, method, **given) if method is not None else nullcontext():
                return model(ids, use_cache=False, logits_to_keep=1).logits

        return run

    runs = {name: runner(method) for name, (_, method, _) in listed.items()}
    device = str(ids.device)
    times = interleaved(runs, rounds, device=device, calls=1, progress=say)
    rows = []
    for name, (stage, _, heads) in listed.items():
        if say is not None:
            say(f"memory: {name}")
        peak, kept = peak_bytes(runs[name], device)
        median = Ratio.of(times[name], [1.0] * rounds).median
        ratio = Ratio.of(times[name], times[PLAIN])
        rows.append(Row(name, stage, median, ratio, peak - kept, heads * tokens * tokens * 4))
    return rows
