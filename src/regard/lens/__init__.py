"""Looking: `record.py` keeps what a model looked at in one forward (`regard.record`); probes and pictures read such a record."""

from .._lazy import lazy_exports

_TABLE = {
    "attention_boundaries": ".boundaries",
    "look": ".look",
    "attention_entropy": ".probes",
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
