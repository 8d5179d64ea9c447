"""MoTE: single experts of a mixture switched off, or always on, at inference.

Paper: Dahlke, Vehreschild et al. (TNG) 2025, "Mixture of Tunable Experts: Behavior Modification of DeepSeek-R1 at Inference Time" (arXiv
2502.11096). No code was published; written from the card's formulas. Which experts are typical of a behaviour is found with
`regard.lens.expert_activation` and `expert_contrast` (the paper's functional token resonance imaging).

What the paper leaves open, and what is done here: a suppressed expert's weight becomes 0 after the choice and the others' are scaled to the
row's sum before ("zero"), or it is kept out of the choice, so that the next best fills its place ("exclude"). A forced expert takes the
place of the weakest one with the row's mean weight. Shared experts and attention are never touched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..._checks import require, require_name
from ..method import Method
from ..routers import experts_by_layer, find_routers, tune

__all__ = ["MoTE"]


@dataclass
class MoTE(Method):
    """Suppress or force experts, for every token of the prompt and of what is generated.

        contrast = regard.lens.expert_contrast(maps, labels, "refused")
        with regard.attach(model, regard.MoTE(suppress=contrast.top(10))):
            model.generate(**inputs)

    Args:
        suppress, force: (layer, expert) pairs, as `HeadScores.top` gives them, or {layer: experts}; layers are the model's block numbers.
        mode: "zero" (default): suppressed experts get the weight 0, fewer experts work; "exclude": the next best takes their place.
        weight: of a forced expert that was not chosen: "mean" of its row, or a share of the row's sum.
        renormalise: scale the weights of a changed row to the sum they had.

    Works on transformers models with routers of the usual form; others raise `UnsupportedModelError`. Attach beside any method: it claims
    no seam of attention.
    """

    suppress: Any = ()
    force: Any = ()
    mode: str = "zero"
    weight: str | float = "mean"
    renormalise: bool = True

    def __post_init__(self) -> None:
        require_name("mode", self.mode, ("zero", "exclude"))
        if self.weight != "mean":
            fits = isinstance(self.weight, (int, float)) and not isinstance(self.weight, bool) and 0 <= self.weight <= 1
            require(fits, "weight", self.weight, "'mean' or a share in [0, 1]")

    def check(self, model: nn.Module) -> None:
        found = find_routers(model)
        tables = [experts_by_layer(name, getattr(self, name), found) for name in ("suppress", "force")]
        for router in found:
            off, on = (set(table.get(router.layer, ())) for table in tables)
            require(
                not off & on, "force", sorted(off & on), f"experts that are not suppressed too (layer {router.layer})"
            )
            require(
                len(on) <= router.top_k, "force", sorted(on), f"at most {router.top_k} experts in layer {router.layer}"
            )

    def setup(self, session: Any) -> None:
        found = find_routers(session.entry)
        suppress = experts_by_layer("suppress", self.suppress, found)
        force = experts_by_layer("force", self.force, found)
        for router in found:
            off, on = suppress.get(router.layer, []), force.get(router.layer, [])
            if off or on:
                session.override(
                    router.module, "forward", tune(router, off, on, self.mode, self.weight, self.renormalise)
                )
