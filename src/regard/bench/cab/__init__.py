"""CAB, Comprehensive Attention Benchmarking (Zhang et al. 2023, ICML, arXiv 2210.07661): four attention patterns, seven tasks reduced
to what synthetic or shipped data can carry, nine methods, one report (`regard bench cab`).
"""

from ..._lazy import lazy_exports

_TABLE = {
    "LENGTHS": ".efficiency",
    "METHODS": ".methods",
    "PUBLISHED": ".index",
    "TASKS": ".tasks",
    "PatternTask": ".tasks",
    "causal_ops": ".causality",
    "causality_test": ".causality",
    "compositional_index": ".index",
    "efficiency_length": ".efficiency",
    "fit_efficiency_length": ".efficiency",
    "index_over": ".index",
    "layer_lengths": ".report",
    "leaks": ".causality",
    "Sizes": ".tasks",
    "indices": ".run",
    "rank_correlation": ".run",
    "register": ".methods",
    "run_tasks": ".run",
    "task_scores": ".index",
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _TABLE)
