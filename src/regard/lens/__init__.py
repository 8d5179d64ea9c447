"""Looking: `record.py` keeps what a model looked at in one forward (`regard.record`); probes and pictures read such a record."""

from typing import TYPE_CHECKING

from .._lazy import lazy_exports

if TYPE_CHECKING:  # names that a file of this package has too: what they mean to a type checker
    from .attention_influence import attention_influence as attention_influence
    from .icl_circuits import icl_circuits as icl_circuits
    from .look import look as look
    from .retrieval_heads import retrieval_heads as retrieval_heads

_TABLE = {
    "attention_boundaries": ".boundaries",
    "look": ".look",
    "ICLCircuits": ".icl_circuits",
    "icl_circuits": ".icl_circuits",
    "attention_entropy": ".probes",
    "attention_influence": ".attention_influence",
    "answered_by_dense": ".attention_influence",
    "influence_blocks": ".attention_influence",
    "span_plan": ".span_search",
    "span_plans": ".span_search",
    "sink_mass": ".probes",
    "locality": ".probes",
    "previous_token": ".probes",
    "induction": ".probes",
    "profile": ".probes",
    "Record": ".record",
    "HeadScores": ".head_scores",
    "retrieval_heads": ".retrieval_heads",
    "Needle": ".needle",
    "NeedleHaystack": ".needle",
    "find_span": ".needle",
    "profile_heads": ".head_profile",
    "tune_gamma": ".head_profile",
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _TABLE)
