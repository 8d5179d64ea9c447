"""Selectors: who looks at whom, by content. Each gives a `regard.ops.Selection` for `regard.ops.attention`.

A selector is one file; `summaries` (blocks and chunks of keys), `boundaries` (where chunks end), `membership` (a selection as a
mask) and `choice` are shared.
"""

from ..._lazy import lazy_exports

_TABLE = {
    "Choice": ".choice",
    "in_selection": ".membership",
    # shared summaries
    "block_summary": ".summaries",
    "block_lengths": ".summaries",
    "split_blocks": ".summaries",
    "chunk_means": ".summaries",
    "chunk_of": ".summaries",
    # HiP
    "hierarchical_topk": ".hierarchical_topk",
    "hierarchical_choice": ".hierarchical_attention",
    "hierarchical_topk_attention": ".hierarchical_attention",
    # DHSA
    "attention_mass_ratio": ".boundaries",
    "even_boundaries": ".boundaries",
    "pick_boundaries": ".boundaries",
    "chunk_scores": ".chunk_topk",
    "chunk_topk": ".chunk_topk",
    "chunk_topk_keys": ".chunk_topk",
    "key_counts": ".chunk_topk",
    "chunk_choice": ".chunk_attention",
    "chunk_topk_attention": ".chunk_attention",
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _TABLE)
