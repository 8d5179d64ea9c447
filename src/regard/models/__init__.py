"""Whole networks, one file each: mixers stacked by plain modules; the authors' checkpoints load."""

from .._lazy import lazy_exports

_TABLE = {
    "BasedLM": ".based",
    "BlockOutput": ".block_transformer",
    "BlockState": ".block_transformer",
    "BlockTransformer": ".block_transformer",
    "block_transformer": ".block_transformer",
    "left_pad_to_block": ".block_transformer",
    "LookupEmbedder": ".block_parts",
    "TokenDecoder": ".block_parts",
    "FIT": ".fit",
    "FITAR": ".fit_ar",
    "FITDenoiser": ".fit_denoiser",
    "InLineDeiT": ".inline",
    "InLineSwin": ".inline",
    "inline_deit": ".inline",
    "inline_swin": ".inline",
    "L2ViT": ".l2vit",
    "l2vit": ".l2vit",
    "LandmarkGPT": ".landmark_gpt",
    "MAViT": ".mavit",
    "RATLM": ".rat_lm",
    "mavit": ".mavit",
    "Sampling": ".sampling",
    "parse_layers": ".fit_stages",
    "SHViT": ".shvit",
    "SmallLM": ".small_lm",
    "SmallLMState": ".small_lm",
    "SmallViT": ".small_vit",
    "shvit_s1": ".shvit",
    "shvit_s2": ".shvit",
    "shvit_s3": ".shvit",
    "shvit_s4": ".shvit",
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _TABLE)
