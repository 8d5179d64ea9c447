"""Names of the Routing Transformer's TensorFlow variables and what `RoutingAttention` calls them."""

OFFICIAL_NAMES = (
    (r"^(?:.*/)?(q|k|v)/kernel$", r"to_\1.weight"),
    (r"^(?:.*/)?output_transform/kernel$", "proj.weight"),
    (r"^(?:.*/)?attention_nd(?:_\d+)?/dense/kernel$", "mix.weight"),
    (r"^(?:.*/)?(cluster|cluster_strided)_attention/(means|ema_count|ema_means)$", r"clusters.\1.\2"),
    (r"^(?:.*/)?(cluster|cluster_strided)_attention/projection_tensors$", r"projections.\1"),
    (r"^(?:.*/)?local_nd/relative_positions_(keys|values)/embeddings$", r"relative.local.\1"),
    (
        r"^(?:.*/)?(cluster|cluster_strided|strided)_attention/relative_positions_(keys|values)/embeddings$",
        r"relative.\1.\2",
    ),
)
