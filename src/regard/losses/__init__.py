"""Losses and tuners: how attention is taught."""

from typing import TYPE_CHECKING

from .._lazy import lazy_exports

if TYPE_CHECKING:  # names that a file of this package has too: what they mean to a type checker
    from .attention_diversification import attention_diversification as attention_diversification

_TABLE = {
    "focal_bce": ".focal_bce",
    "soft_label_transform": ".focal_bce",
    "duo_distillation_loss": ".duo_gates",
    "duo_gate_penalty": ".duo_gates",
    "duo_lr_factor": ".duo_gates",
    "duo_mixed_attention": ".duo_gates",
    "attention_diversification": ".attention_diversification",
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _TABLE)
