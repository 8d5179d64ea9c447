"""Which heads to tune, and how much: the search procedure of ZeroTuning (081, see `methods/edits/zero_tuning.py`).

Each head is tried with the first token's weight raised and lowered; what happens to the accuracy on labelled prompts, or to the
entropy of the next-token distribution on unlabelled ones, says which way it should go (the paper's up- and down-effective heads).
The larger of the two groups is then tuned together, with the factor that does best on a grid.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._checks import require, require_name
from ..methods.edits.zero_tuning import ZeroTuning
from .head_scores import HeadScores
from .head_search import next_token_objective, search_heads

__all__ = ["HeadProfile", "fit_zero_tuning", "profile_heads", "tune_gamma"]

Inputs = Mapping[str, Tensor]
EACH = ("head", "layer", "both")


@dataclass(eq=False)
class HeadProfile:
    """What raising and lowering the first token's weight does, head by head.

    Attributes:
        up, down: gain in the objective over the untouched model with the factor above and below 1, as `HeadScores`: (1, H) where each
            head number was tried in all layers at once, (L, 1) where each layer was with all heads, (L, H) where each head was alone.
        baseline: the objective without any edit. each: "head", "layer" or "both".
    """

    up: HeadScores
    down: HeadScores
    baseline: float
    each: str

    def _better(self, this: HeadScores, other: HeadScores) -> list[tuple[int, int]]:
        wins = (this.scores > 0) & (this.scores > other.scores)
        return [head for head in this.ranking() if wins[head]]

    def _named(self, heads: list[tuple[int, int]]) -> list[Any]:
        part = {"head": 1, "layer": 0}.get(self.each)
        return heads if part is None else [head[part] for head in heads]

    @property
    def up_heads(self) -> list[Any]:
        """What gains from a factor above 1, and more than from one below, best first: head numbers, layer numbers, or pairs."""
        return self._named(self._better(self.up, self.down))

    @property
    def down_heads(self) -> list[Any]:
        """What gains from a factor below 1, and more than from one above, best first."""
        return self._named(self._better(self.down, self.up))

    @property
    def dominant(self) -> list[Any]:
        """The larger group, which the paper tunes (of equals, the first)."""
        return max(self.up_heads, self.down_heads, key=len)


@torch.no_grad()
def profile_heads(
    model: Any,
    inputs: Iterable[Inputs],
    labels: Iterable[Tensor] | None = None,
    *,
    gammas: tuple[float, float] = (2.0, 0.5),
    objective: str | None = None,
    each: str = "head",
    heads: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    choices: Tensor | None = None,
) -> HeadProfile:
    """Try every head with the first token's weight raised and lowered.

        profile = regard.lens.profile_heads(model, prompts)              # no labels: entropy
        method = regard.ZeroTuning(gamma=2.0, heads=profile.dominant)

    Args:
        model: a causal language model. inputs: batches of prompts, as the tokenizer gives them (padded on either side).
        labels: for the accuracy, the right next token of each prompt, one int64 (B,) a batch.
        gammas: factors to try, above and below 1.
        objective: "accuracy" (share of prompts whose likeliest next token is the label) or "entropy" (of the next-token
            distribution in nats, less is better), or "log-probability" of the label. None: accuracy where labels are given.
        each: "head": each head number in all `layers` at once (the authors' mode 1); "layer": each layer with all `heads` (mode 2);
            "both": each head of each layer alone (mode 0).
        heads, layers: restrict the search; None = all. choices: token ids that an answer may be; None = the whole vocabulary.

    Cost: 1 + 2 x (number tried) forwards of every batch.
    """
    require_name("each", each, EACH)
    require(gammas[0] > 1 > gammas[1] >= 0, "gammas", gammas, "a factor above 1 and one in [0, 1)")
    measure = next_token_objective(model, inputs, labels, objective=objective, choices=choices)
    baseline = measure(None)
    tables = []
    for gamma in gammas:
        table = search_heads(
            model,
            lambda pairs, gamma=gamma: ZeroTuning(gamma, heads=pairs),  # type: ignore[misc]
            measure,
            heads=heads,
            layers=layers,
            each=each,
            baseline=baseline,
        )
        table.name = f"gain at gamma {gamma:g}"
        tables.append(table)
    return HeadProfile(tables[0], tables[1], baseline, each)


@torch.no_grad()
def tune_gamma(
    model: Any,
    inputs: Iterable[Inputs],
    labels: Iterable[Tensor] | None = None,
    *,
    gammas: Sequence[float] = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0),
    objective: str | None = None,
    heads: Any = None,
    layers: Sequence[int] | None = None,
    choices: Tensor | None = None,
) -> tuple[float, dict[float, float]]:
    """The factor that does best on a grid, and the objective at each (entropy with its sign turned, so that more is better).

    Without labels this is the paper's unsupervised mode: the factor of least mean next-token entropy. Of equals, the one nearest 1.
    Other arguments as in `profile_heads` and `ZeroTuning`.
    """
    require(bool(gammas), "gammas", gammas, "at least one factor")
    measure = next_token_objective(model, inputs, labels, objective=objective, choices=choices)
    table = {float(gamma): measure(ZeroTuning(float(gamma), heads=heads, layers=layers)) for gamma in gammas}
    best = max(table, key=lambda gamma: (table[gamma], -abs(gamma - 1.0)))
    return best, table


def fit_zero_tuning(
    model: Any,
    inputs: Iterable[Inputs],
    labels: Iterable[Tensor] | None = None,
    *,
    probe_gammas: tuple[float, float] = (2.0, 0.5),
    gammas: Sequence[float] = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0),
    objective: str | None = None,
    each: str = "head",
    share: tuple[float, float] = (0.4, 0.7),
    layers: Sequence[int] | None = None,
    choices: Tensor | None = None,
) -> tuple[ZeroTuning, HeadProfile, dict[float, float]]:
    """The whole procedure: profile the heads, take the dominant group, find its factor. With labels by accuracy, without by entropy.

        method, profile, table = regard.lens.fit_zero_tuning(model, prompts)
        with regard.attach(model, method): ...

    Args:
        probe_gammas: factors of the profiling. gammas: grid of the factor, to which 1 is always added: nothing is done
            where nothing helps.
        share: least and largest share of what was tried (heads, layers or both) to tune; the paper finds 40 to 70 % best. A dominant group
            outside of it is filled up, or cut, by the order of its gains.
        Others as in `profile_heads`.

    Returns:
        (the `ZeroTuning` to attach, the `HeadProfile`, the objective at each factor).
    """
    require(0.0 < share[0] <= share[1] <= 1.0, "share", share, "(least, largest), 0 < least <= largest <= 1")
    batches, given = list(inputs), None if labels is None else list(labels)
    profile = profile_heads(
        model, batches, given, gammas=probe_gammas, objective=objective, each=each, layers=layers, choices=choices
    )
    group = profile.up if len(profile.up_heads) >= len(profile.down_heads) else profile.down
    ranked = profile._named(group.ranking())
    least, most = (max(1, round(part * len(ranked))) for part in share)
    chosen = ranked[: min(max(len(profile.dominant), least), most)]
    where: dict[str, Any] = {"heads": chosen, "layers": layers} if each == "head" else {}
    if each == "layer":
        where = {"layers": sorted(chosen)}
    elif each == "both":
        where = {"heads": chosen}
    best, table = tune_gamma(
        model, batches, given, gammas=sorted({*gammas, 1.0}), objective=objective, choices=choices, **where
    )
    return ZeroTuning(best, **where), profile, table
