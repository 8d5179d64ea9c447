"""Selectors: who looks at whom, by content. Each gives a `regard.ops.Selection` for `regard.ops.attention`.

A selector is one file; `summaries` (blocks and chunks of keys), `boundaries` (where chunks end), `membership` (a selection as a
mask) and `choice` are shared.
"""

from ..._lazy import lazy_exports

_TABLE = {
    "Choice": ".choice",
    "in_selection": ".membership",
    # shared summaries
    "BlockSummaries": ".running_summaries",
    "block_summaries": ".summaries",
    "block_summary": ".summaries",
    "block_lengths": ".summaries",
    "split_blocks": ".summaries",
    "chunk_means": ".summaries",
    "chunk_of": ".summaries",
    # selectors over block scores
    "BlockGrid": ".blocks",
    "block_scores": ".blocks",
    "select_blocks": ".blocks",
    "share_scores": ".blocks",
    "block_topk": ".block_topk",
    "block_topk_attention": ".block_topk",
    "tree_topk": ".block_topk",
    # fixed patterns
    "butterfly": ".butterfly",
    "distance_bernoulli": ".distance_bernoulli",
    # HyperAttention
    "angular_lsh": ".angular_lsh",
    "draw_projections": ".angular_lsh",
    # SeerAttention
    "gate_block_map": ".gate",
    "decode_block_map": ".gate",
    # DMA
    "topk_bias_mask": ".bias_masks",
    "relu_bias_mask": ".bias_masks",
    "block_smooth": ".bias_masks",
    "topk_expiry": ".bias_masks",
    # HiP
    "hierarchical_topk": ".hierarchical_topk",
    "hierarchical_choice": ".hierarchical_attention",
    "hierarchical_topk_attention": ".hierarchical_attention",
    # Kinetics: rules on the scores of a decoded query
    "apply_rule": ".grouped_topk",
    "grouped_block_topk": ".grouped_topk",
    "grouped_topk": ".grouped_topk",
    "importance_shift": ".grouped_topk",
    "oracle_sample": ".grouped_topk",
    "random_sample": ".grouped_topk",
    "random_select": ".grouped_topk",
    "recent_only": ".grouped_topk",
    "strided_block_topk": ".grouped_topk",
    # LongHeads
    "chunk_features": ".chunk_features",
    "choose_chunks": ".chunk_features",
    "chunk_select_attention": ".chunk_features",
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
    "a_shape_blocks": ".a_shape",
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _TABLE)
