"""Weights of a Block Transformer from elsewhere: the authors' state dicts, and GPT-NeoX models to train on from.

Ho et al. 2024 (arXiv 2406.02657); code read for numbers: itsnamgyu/block-transformer @ 17842dd (MIT), `model/utils.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._checks import require, require_name
from ..nn.layers import rename_keys
from .block_parts import LookupEmbedder

if TYPE_CHECKING:
    from .block_transformer import BlockTransformer

__all__ = ["block_keys", "plan_vanilla"]


def plan_vanilla(
    vanilla: nn.Module, block: int, method: str, prefix: int, block_layers: int | None
) -> tuple[dict[str, Any], Callable[[BlockTransformer], None]]:
    """Arguments of the constructor that follow from `vanilla`, and what fills the model made with them; see `from_vanilla`."""
    require_name("method", method, ("partition", "skip", "duplicate"))
    config = getattr(vanilla, "config", None)
    require(getattr(config, "model_type", None) == "gpt_neox", "vanilla", type(vanilla).__name__, "a GPT-NeoX model")
    assert config is not None
    layers = config.num_hidden_layers
    lower = (block_layers or layers // 2) if method == "partition" else layers
    need = f"a number of layers below {layers}"
    require(method != "partition" or 0 < lower < layers, "block_layers", lower, need)
    require(method != "skip" or layers % 2 == 0, "method", method, f"an even number of layers, not {layers}")
    block_part, token_part = {
        "partition": (range(lower), range(lower, layers)),
        "skip": (range(0, layers, 2), range(0, layers, 2)),
        "duplicate": (range(layers), range(layers)),
    }[method]
    rope = getattr(config, "rope_parameters", None) or {}
    given = {
        "vocab_size": config.vocab_size,
        "dim": config.hidden_size,
        "block_layers": len(block_part),
        "token_layers": len(token_part),
        "num_heads": config.num_attention_heads,
        "hidden": config.intermediate_size,
        "token_hidden": config.intermediate_size,
        "rotary": rope.get("partial_rotary_factor", getattr(config, "rotary_pct", 0.25)),
        "rotary_base": rope.get("rope_theta", getattr(config, "rotary_emb_base", 10000.0)),
        "parallel": config.use_parallel_residual,
        "eps": config.layer_norm_eps,
    }
    state = vanilla.state_dict()

    @torch.no_grad()
    def fill(model: BlockTransformer) -> None:
        embedder, decoder = model.embedder, model.token_decoder
        assert isinstance(embedder, LookupEmbedder) and embedder.projection is not None
        table = state["gpt_neox.embed_in.weight"]
        embedder.table.weight.copy_(table)
        decoder.embedding.weight.copy_(table)
        head = "embed_out.weight" if "embed_out.weight" in state else "lm_head.weight"  # the older name, the newer one
        decoder.head.weight.copy_(state[head])
        eye = torch.eye(config.hidden_size)
        embedder.projection.weight.copy_((eye / block)[..., None].expand(-1, -1, block))  # the mean of the tokens
        decoder.expansion.weight.copy_(eye.repeat(prefix, 1)[..., None])  # copies of the block state
        for bias in (embedder.projection.bias, decoder.expansion.bias):
            assert bias is not None
            bias.zero_()
        _copy_layers(state, model.block_decoder.layers, block_part)
        _copy_layers(state, decoder.stack.layers, token_part)
        final = {name: state[f"gpt_neox.final_layer_norm.{name}"] for name in ("weight", "bias")}
        decoder.stack.final_layer_norm.load_state_dict(final)  # type: ignore[union-attr]

    return given, fill


def _copy_layers(state: dict[str, Tensor], layers: Iterable[nn.Module], numbers: Iterable[int]) -> None:
    for layer, number in zip(layers, numbers):
        layer.load_state_dict({name: state[f"gpt_neox.layers.{number}.{name}"] for name in layer.state_dict()})


def block_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' state dict in our names; tables and buffers that nothing reads (the block decoder's `embed_in`) are dropped.

    A T5 token decoder that shares its tables may have been saved with one name for all: the others are filled in.
    """
    tables = (
        "token_decoder.shared.weight",
        "token_decoder.decoder.embed_tokens.weight",
        "token_decoder.lm_head.weight",
    )
    held = [state[name] for name in tables if name in state]
    if held:
        state = dict.fromkeys((tables[0], tables[2]), held[0]) | state
    unread = ("block_decoder.gpt_neox.embed_in.weight", "token_decoder.decoder.embed_tokens.weight")
    buffers = (".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq")
    kept = {name: t for name, t in state.items() if name not in unread and not name.endswith(buffers)}
    return rename_keys(kept, *_NAMES)


_T5 = r"^token_decoder\.decoder\."
_NAMES = (
    (r"^embedder\.embeddings\.", "embedder.table."),
    (r"^embedder\.projection_layer\.", "embedder.projection."),
    (r"^block_decoder\.gpt_neox\.", "block_decoder."),
    (r"^token_decoder\.gpt_neox\.embed_in\.", "token_decoder.embedding."),
    (r"^token_decoder\.gpt_neox\.", "token_decoder.stack."),
    (r"^token_decoder\.(embed_out|lm_head)\.", "token_decoder.head."),
    (r"^token_decoder\.expansion_layer\.", "token_decoder.expansion."),
    (r"^token_decoder\.shared\.", "token_decoder.embedding."),
    (_T5 + r"final_layer_norm\.", "token_decoder.stack.norm."),
    (
        _T5 + r"block\.0\.layer\.0\.SelfAttention\.relative_attention_bias\.",
        "token_decoder.stack.relative.",
    ),
    (_T5 + r"block\.(\d+)\.", r"token_decoder.stack.layers.\1."),
    (r"\.layer\.0\.SelfAttention\.", ".self_attention."),
    (r"\.layer\.0\.layer_norm\.", ".self_norm."),
    (r"\.layer\.1\.EncDecAttention\.", ".cross_attention."),
    (r"\.layer\.1\.layer_norm\.", ".cross_norm."),
    (r"\.layer\.2\.DenseReluDense\.", ".mlp."),
    (r"\.layer\.2\.layer_norm\.", ".mlp_norm."),
)
