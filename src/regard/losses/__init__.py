"""Losses and tuners: how attention is taught."""

from typing import TYPE_CHECKING

from .._lazy import lazy_exports

if TYPE_CHECKING:  # names that a file of this package has too: what they mean to a type checker
    from .attention_diversification import attention_diversification as attention_diversification
    from .fit_boundaries import fit_boundaries as fit_boundaries
    from .fit_duo import fit_duo as fit_duo

_TABLE = {
    "fit": ".runner",
    "layer_loss": ".runner",
    "Fitted": ".runner",
    "TrainingStopped": ".runner",
    "block_map_distillation": ".seer_gates",
    "fit_seer_gates": ".seer_gates",
    "sea_distillation": ".sea",
    "focal_bce": ".focal_bce",
    "soft_label_transform": ".focal_bce",
    "boundary_labels": ".fit_boundaries",
    "boundary_loss": ".fit_boundaries",
    "boundary_metrics": ".fit_boundaries",
    "fit_boundaries": ".fit_boundaries",
    "score_boundaries": ".fit_boundaries",
    "fit_duo": ".fit_duo",
    "DuoGates": ".fit_duo",
    "Passkeys": ".passkeys",
    "duo_distillation_loss": ".duo_gates",
    "duo_gate_penalty": ".duo_gates",
    "duo_lr_factor": ".duo_gates",
    "duo_mixed_attention": ".duo_gates",
    "attention_diversification": ".attention_diversification",
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _TABLE)
