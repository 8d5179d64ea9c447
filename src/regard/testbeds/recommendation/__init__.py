"""Recommendation: RecBole's atomic files, filtering and splitting, batches, rankings and clicks measured, data made with a known truth."""

from ..._lazy import lazy_exports

_TABLE = {
    "AtomicTable": ".atomic",
    "ClickRows": ".clicks",
    "ClickWorld": ".synthetic",
    "Interactions": ".interactions",
    "LeaveOneOut": ".interactions",
    "TransitionWorld": ".synthetic",
    "auc": ".metrics",
    "click_rows": ".clicks",
    "evaluate_clicks": ".clicks",
    "evaluate_ranking": ".sequences",
    "grouped_auc": ".metrics",
    "load_interactions": ".interactions",
    "next_item_batches": ".sequences",
    "pad_left": ".sequences",
    "rank_metrics": ".metrics",
    "read_atomic": ".atomic",
    "write_atomic": ".atomic",
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _TABLE)
