"""Losses and tuners: how attention is taught."""

from typing import TYPE_CHECKING

from .._lazy import lazy_exports

if TYPE_CHECKING:  # names that a file of this package has too: what they mean to a type checker
    from .attention_diversification import attention_diversification as attention_diversification
    from .fit_boundaries import fit_boundaries as fit_boundaries
    from .fit_duo import fit_duo as fit_duo
    from .fit_lofit import fit_lofit as fit_lofit

_TABLE = {
    "fit": ".runner",
    "layer_loss": ".runner",
    "Fitted": ".runner",
    "TrainingStopped": ".runner",
    "block_map_distillation": ".seer_gates",
    "fit_seer_gates": ".seer_gates",
    "sea_distillation": ".sea",
    "add_indicator": ".indicator",
    "add_tag_token": ".indicator",
    "MaskedCollator": ".masked_lm",
    "chat_parts": ".masked_lm",
    "masked_lm_loss": ".masked_lm",
    "weighted_lm_loss": ".masked_lm",
    "ThoughtMaskCollator": ".thought_mask",
    "refinement_loss": ".thought_mask",
    "thought_parts": ".thought_mask",
    "focal_bce": ".focal_bce",
    "soft_label_transform": ".focal_bce",
    "boundary_labels": ".fit_boundaries",
    "boundary_loss": ".fit_boundaries",
    "boundary_metrics": ".fit_boundaries",
    "fit_boundaries": ".fit_boundaries",
    "score_boundaries": ".fit_boundaries",
    "attention_transfer_loss": ".linearize",
    "fit_linear_maps": ".linearize",
    "fit_lora": ".lora",
    "load_converted": ".lora",
    "next_token_loss": ".lora",
    "dpo_loss": ".fit_lofit",
    "fit_lofit": ".fit_lofit",
    "lofit_heads": ".fit_lofit",
    "merge_lofit": ".fit_lofit",
    "fit_duo": ".fit_duo",
    "DuoGates": ".fit_duo",
    "Passkeys": ".passkeys",
    "duo_distillation_loss": ".duo_gates",
    "duo_gate_penalty": ".duo_gates",
    "duo_lr_factor": ".duo_gates",
    "duo_mixed_attention": ".duo_gates",
    "attention_diversification": ".attention_diversification",
    "MinedAttention": ".attention_supervision",
    "ProgressiveAttentionMiner": ".attention_supervision",
    "attention_supervision_loss": ".attention_supervision",
    "signed_rounds": ".attention_supervision",
    "smoothgrad_scores": ".attention_supervision",
    "AttentionAT": ".attention_perturbation",
    "AttentionVAT": ".attention_perturbation",
    "classification_loss": ".attention_perturbation",
    "TransitionDistilledLoss": ".transition_distillation",
    "transition_counts": ".transition_distillation",
    "transition_distillation": ".transition_distillation",
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _TABLE)
