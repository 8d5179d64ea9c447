"""041 SinkLoRA: training inside shifted groups is cheap and carries over to full attention; H2O beats a window of its size."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...integrations.transformers import attach
from ...methods.caches.h2o import H2O
from ...methods.caches.streaming_llm import StreamingLLM
from ...methods.sparse.sink_lora import SinkLoRA
from ...ops import masks
from ...ops.attention import attention
from ...ops.shifted_groups import shifted_group_attention
from ..text import token_windows
from .claim import Outcome, Scale
from .language import next_log_probs
from .timing import times

PAPER, SLUG = "041", "sink-lora"
SAYS = (
    "SinkLoRA: trained with SF-Attn (shifted groups, some heads returned, sinks), models do better than with S2-Attn and nearly as well "
    "as with full attention, at a quarter of its attention cost; at inference H2O keeps quality with a small cache."
)
FULL, SF, S2 = "full attention", "SF-Attn", "S2-Attn as released"
LOSS = "loss with full attention"


def measure(scale: Scale) -> Outcome:
    context, steps = scale.pick((192, 140), (64, 3))
    length, prompt = scale.pick((8192, 700), (512, 120))
    out = Outcome(
        f"a small byte model trained for {steps} steps of {context} tokens; {length} tokens (time); {prompt} tokens of SmolLM2 (cache)",
        "a seed, a round, or a text",
    )
    _trained(out, scale, context, steps)
    _time(out, scale, length)
    _cache(out, scale, prompt)
    out.note = "Models this small and this short in training: a first trial of one seed already told the same order."
    return out


def _trained(out: Outcome, scale: Scale, context: int, steps: int) -> None:
    ways = {FULL: None, SF: SinkLoRA(), S2: SinkLoRA(variant="released")}
    for label, method in ways.items():
        found = [_loss(method, context, steps, seed) for seed in range(scale.pick(2, 1))]
        out.add(label, LOSS, "nats a byte", found, against=None if label == FULL else FULL)
    sf, s2 = out.row(SF, LOSS), out.row(S2, LOSS)
    out.check("trained with SF-Attn: loss over that of full training", sf.ratio, at_most=1.05)  # type: ignore[arg-type]
    out.check("loss of SF-Attn less that of S2-Attn, nats", sf.mean - s2.mean, at_most=0.0)


def _loss(method: SinkLoRA | None, context: int, steps: int, seed: int) -> float:
    """Train a byte model with the method; its loss on other text, with full attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from ..._prose import haystack_text

    torch.manual_seed(seed)
    data = torch.tensor(list(haystack_text().encode()), dtype=torch.long) % 128
    held, data = data[-20 * context :], data[: -20 * context]
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    tokens = {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **tokens, max_position_embeddings=context)).train()
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    generator = torch.Generator().manual_seed(seed)
    with attach(model, *([method] if method else [])):
        for _ in range(steps):
            first = torch.randint(len(data) - context, (8,), generator=generator)
            ids = torch.stack([data[i : i + context] for i in first.tolist()])
            optimizer.zero_grad()
            model(ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        ids = held.view(20, context)
        return float(model(ids, labels=ids, use_cache=False).loss)


def _time(out: Outcome, scale: Scale, length: int) -> None:
    """Forward and backward of one layer's attention, eight heads."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (t.requires_grad_() for t in torch.randn(3, 1, 8, length, 64, generator=generator))

    def step(work: Any) -> None:
        with torch.enable_grad():
            torch.autograd.grad(work(q, k, v).sum(), (q, k, v))

    ways: dict[str, Any] = {FULL: partial(attention, mask=masks.causal)}
    ways[SF] = partial(shifted_group_attention, group=length // 4, shift_heads=0.25, sink=4)
    found = times(
        {label: partial(step, work) for label, work in ways.items()},
        rounds=scale.pick(2, 1),
        inner=1,
        warmup=scale.pick(1, 0),
    )
    out.add(FULL, "training step of the attention", "s", found[FULL])
    row = out.add(SF, "training step of the attention", "s", found[SF], against=FULL)
    out.check("time of a training step of the attention, of full", row.ratio, at_most=0.45, spread=row.spread)  # type: ignore[arg-type]


def _cache(out: Outcome, scale: Scale, prompt: int) -> None:
    """Text goes on after a prompt, read token by token from a cache of a fifth of it."""
    model, tokenizer = scale.language_model()
    more = scale.pick(24, 3)
    budget = prompt // 5
    ways = {
        "H2O, a fifth of the cache": H2O(budget=budget),
        "sinks and window, a fifth of the cache": StreamingLLM(sink=4, window=budget - 4, positions="kept"),
    }
    windows = token_windows(tokenizer, prompt + more, scale.pick(2, 1))
    for label, method in ways.items():
        found = []
        for ids in windows:
            want = next_log_probs(model, ids, more)
            with attach(model, method) as session:
                got = _decoded(model, session.new_cache(), ids, prompt)
            found.append(float((want.exp() * (want - got)).sum(-1).mean()))
        out.add(label, "divergence from the dense model", "nats", found)
    h2o, window = (out.row(label, "divergence from the dense model").mean for label in ways)
    out.check("divergence with H2O, of that with sinks and a window of its size", h2o / window, at_most=1.0)


@torch.no_grad()
def _decoded(model: Any, cache: Any, ids: list[int], prompt: int) -> Tensor:
    """Log-probabilities after each token from `prompt` on, read one by one: (more, V)."""
    tokens = torch.tensor([ids], device=model.device)
    model(tokens[:, :prompt], past_key_values=cache, use_cache=True, logits_to_keep=1)
    rows = []
    for i in range(prompt, tokens.shape[1]):
        out = model(tokens[:, i : i + 1], past_key_values=cache, use_cache=True)
        rows.append(out.logits[0, -1].float().log_softmax(-1).cpu())
    return torch.stack(rows)
