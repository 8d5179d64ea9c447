"""Small random models of every family that joining is tested on, in float32, with inputs for one forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

SMALL: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=97
)
GQA: dict[str, Any] = dict(
    SMALL, num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=None
)
VISION: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4
)
GPT2: dict[str, Any] = dict(
    n_embd=32, n_layer=3, n_head=4, vocab_size=97, n_positions=256, pad_token_id=0, bos_token_id=1, eos_token_id=None
)


def _gemma3() -> Any:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**GQA, head_dim=8, sliding_window=8, layer_types=kinds))


def _whisper() -> Any:
    sizes = dict(d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4)
    config = hf.WhisperConfig(
        **sizes,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=64,
        vocab_size=97,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        begin_suppress_tokens=None,
    )
    return hf.WhisperForConditionalGeneration(config)


def _llava() -> Any:
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION),
        text_config=hf.LlamaConfig(**GQA),
        image_token_id=90,
        image_seq_length=16,
    )
    return hf.LlavaForConditionalGeneration(config)


CAUSAL: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GQA)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**GQA, sliding_window=8)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**GQA)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GQA, head_dim=8)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(**GQA, head_dim=8, sliding_window=8, attn_logit_softcapping=2.0)
    ),
    "gemma3": _gemma3,
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**GQA, sliding_window=8)),
    "olmo2": lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**GQA)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(
        hf.GPTNeoXConfig(**SMALL, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=None)
    ),
}
ENCODERS: dict[str, Callable[[], Any]] = {
    "bert": lambda: hf.BertModel(hf.BertConfig(**SMALL, max_position_embeddings=64)),
    "vit": lambda: hf.ViTModel(hf.ViTConfig(**VISION)),
    "clip": lambda: hf.CLIPModel(
        hf.CLIPConfig(
            text_config=dict(SMALL, max_position_embeddings=64, eos_token_id=2), vision_config=VISION, projection_dim=32
        )
    ),
    "siglip": lambda: hf.SiglipModel(
        hf.SiglipConfig(text_config=dict(SMALL, max_position_embeddings=64), vision_config=VISION)
    ),
    "dinov2": lambda: hf.Dinov2Model(
        hf.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4)
    ),
    "whisper": _whisper,
    "llava": _llava,
}
FAMILIES = CAUSAL | ENCODERS


def build(name: str, seed: int = 0, implementation: str | None = None) -> Any:
    """The model, with weights large enough that attention is far from uniform."""
    torch.manual_seed(seed)
    model = FAMILIES[name]().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(
                torch.randn_like(weight) * (0.4 if weight.dim() > 1 else 0.1) + (1.0 if weight.dim() == 1 else 0.0)
            )
    if implementation is not None:
        model.set_attn_implementation(implementation)
    return model


def inputs(name: str, batch: int = 2, length: int = 17, seed: int = 1) -> dict[str, torch.Tensor]:
    """Inputs for one forward of `build(name)`; token sequences come with left padding in the first row."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 89, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    pixels = torch.randn(batch, 3, 16, 16, generator=generator)
    if name in CAUSAL or name == "bert":
        return {"input_ids": ids, "attention_mask": mask}
    if name in ("vit", "dinov2"):
        return {"pixel_values": pixels}
    if name in ("clip", "siglip"):
        return {"input_ids": ids, "pixel_values": pixels, "attention_mask": mask.flip(1)}
    if name == "whisper":
        return {"input_features": torch.randn(batch, 8, 40, generator=generator), "decoder_input_ids": ids}
    ids = torch.cat([ids[:, :4], torch.full((batch, 16), 90), ids[:, 4:]], dim=1)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def main_output(output: Any) -> torch.Tensor:
    """The tensor to compare: logits, per-image logits or the last hidden state."""
    for name in ("logits", "logits_per_image", "last_hidden_state"):
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    raise AssertionError(f"no tensor to compare in {type(output).__name__}")
