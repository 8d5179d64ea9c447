"""083 Deconstructing attention: without mixing a model fails; with standard attention in every other layer almost any variant will do."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...lens.attention_indicators import attention_indicators
from ...models.deconstructed_lm import DeconstructedLM
from ...testbeds.texts import ByteText
from ...testbeds.training import train
from .claim import Outcome, Scale

PAPER, SLUG = "083", "deconstructed"
SAYS = (
    "Deconstructing attention: mixing tokens is indispensable (an MLP in all layers: perplexity 993 against 38), but its exact "
    "form is not: scores without pairs of tokens fail in all layers and match in every other one (39.4 against 38.1), maps that do not "
    "look at the text stay near, and norms of queries and keys rescue what failed."
)
STANDARD, FIGURE = "standard", "perplexity of a byte"
MODELS: dict[str, dict[str, object]] = {
    STANDARD: {},
    "mlp, uniform": {"variant": "mlp"},
    "mlp, hybrid": {"variant": "mlp", "standard": "even"},
    "non-approximate, uniform": {"variant": "non_approximate"},
    "non-approximate, uniform, qk norm": {"variant": "non_approximate", "qk_norm": True},
    "non-approximate, hybrid": {"variant": "non_approximate", "standard": "even"},
    "random maps, uniform": {"variant": "random"},
    "random maps, hybrid": {"variant": "random", "standard": "even"},
}


def measure(scale: Scale) -> Outcome:
    dim, layers, length, steps = scale.pick((64, 4, 128, 250), (16, 2, 16, 2))
    out = Outcome(
        f"{layers} layers of width {dim}, trained here for {steps} steps of 8 texts of {length} bytes of Python's documentation",
        "a quarter of the held-out text",
    )
    text = ByteText()
    held = text.held_out(scale.pick(64, 8), length + 1)
    for label, options in MODELS.items():
        torch.manual_seed(0)
        model = DeconstructedLM(256, dim, layers, 4, mlp_ratio=4, max_len=length, **options)  # type: ignore[arg-type]
        train(model, text.batches(8, length, 1), steps=steps, lr=3e-3, progress=False)
        model.eval()
        out.add(label, FIGURE, "", _perplexities(model, held), against=None if label == STANDARD else STANDARD)
        maps = model.attentions(held[:8, :-1])
        if maps:
            sinks = [attention_indicators(one)["sink"] for one in maps.values()]
            out.add(label, "weight of the first byte", "share", sum(sinks) / len(sinks))

    def times(label: str) -> tuple[float, float]:
        row = out.row(label, FIGURE)
        return row.ratio or float("nan"), row.spread or 0.0

    fails = {"mlp, uniform": 1.3, "non-approximate, uniform": 1.3}
    stays = {
        "mlp, hybrid": 1.1,
        "non-approximate, uniform, qk norm": 1.3,
        "non-approximate, hybrid": 1.1,
        "random maps, uniform": 3.0,
        "random maps, hybrid": 1.1,
    }
    what = "perplexity, times that of standard attention:"
    for label, bound in fails.items():
        out.check(f"{what} {label}", times(label)[0], at_least=bound, spread=times(label)[1])
    for label, bound in stays.items():
        out.check(f"{what} {label}", times(label)[0], at_most=bound, spread=times(label)[1])
    return out


@torch.no_grad()
def _perplexities(model: DeconstructedLM, held: Tensor) -> list[float]:
    found = []
    for ids in held.chunk(4):
        found.append(F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).exp().item())
    return found
