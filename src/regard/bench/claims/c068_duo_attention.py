"""068 DuoAttention: memory and attention time fall by about the share of streaming heads; which heads stream matters."""

from __future__ import annotations

import copy
import time
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from ...integrations.transformers import attach
from ...lens.needle import NeedleHaystack
from ...lens.retrieval_heads import retrieval_heads
from ...losses.fit_duo import fit_duo
from ...losses.passkeys import Passkeys
from ...methods.caches import DuoAttention, kv_bytes
from ...methods.call import AttentionCall
from ..text import needle_prompt, token_windows
from .claim import Outcome, Scale
from .language import answer_log_prob, filled_cache

PAPER, SLUG = "068", "duo-attention"
SAYS = (
    "DuoAttention: with half of the kv heads streaming, KV memory and decoding time fall by about that share, and the long context "
    "survives if the right heads keep it (random ones fail)."
)
STEPS = 8  # of gate training
DENSE, PAGED, HALF = "dense (DynamicCache, SDPA)", "paged cache, every head full", "half the heads streaming"


def measure(scale: Scale) -> Outcome:
    model, tokenizer = scale.language_model()
    context, steps = scale.pick(8192, 256), scale.pick(40, 8)
    sink, recent = scale.pick((64, 256), (4, 16))
    needle = scale.pick(768, 200)
    out = Outcome(
        f"{context} tokens (time, memory) and {needle} (needle)", "a quarter of the decoded tokens, or a prompt"
    )
    _cost(out, model, tokenizer, context, steps, sink, recent)
    _needle(out, model, tokenizer, needle, scale)
    return out


# Memory and time


def _cost(out: Outcome, model: Any, tokenizer: Any, context: int, steps: int, sink: int, recent: int) -> None:
    """Decode the same tokens over three caches filled from one prefill, in turns; attention is timed inside the model."""
    ids = token_windows(tokenizer, context, 1)[0]
    dense = filled_cache(model, ids[: context - steps])
    config = model.config.get_text_config()
    readers, size = {}, {DENSE: kv_bytes(dense)}
    with ExitStack() as opened:
        for label, share in ((PAGED, 1.0), (HALF, 0.5)):
            method = DuoAttention(share, _every_other(config, share), sink, recent)
            twin = _twin(model)
            cache = opened.enter_context(attach(twin, method)).new_cache()
            _fill(twin, method, cache, dense)
            size[label] = kv_bytes(cache)
            readers[label] = opened.enter_context(_Reader(twin, cache))
        readers[DENSE] = opened.enter_context(_Reader(model, dense))
        labels = list(size)
        seconds: dict[str, list[list[float]]] = {label: [] for label in labels}
        for step in range(steps):
            token = torch.tensor([[ids[context - steps + step]]], device=model.device)
            for label in labels[step % 3 :] + labels[: step % 3]:
                seconds[label].append(readers[label].attention_seconds(token))
    for label in labels:
        out.add(label, "KV cache", "bytes", float(size[label]), against=None if label == DENSE else DENSE)
    quarter = steps // 4
    for label in labels:
        # of each layer the least time in a quarter of the steps: other work on the machine only ever adds
        quarters = [seconds[label][i * quarter : (i + 1) * quarter] for i in range(4)]
        parts = [sum(min(layer) for layer in zip(*rows)) for rows in quarters]
        out.add(label, "attention time per decoded token", "s", parts, against=None if label == DENSE else DENSE)
    memory, clock = out.row(HALF, "KV cache"), out.row(HALF, "attention time per decoded token")
    out.check("KV bytes, of dense", memory.ratio, at_most=0.55)  # type: ignore[arg-type]
    out.check("attention time per token, of dense", clock.ratio, at_most=0.65, spread=clock.spread)  # type: ignore[arg-type]
    paged = out.row(PAGED, "attention time per decoded token")
    fair = [a / b for a, b in zip(clock.values, paged.values)]
    spread = (max(fair) - min(fair)) / 2
    # transformers' DynamicCache copies itself at every step; our own paged cache with every head full is the harder baseline
    out.check("of the same cache with every head full instead", sum(fair) / len(fair), at_most=0.65, spread=spread)


def _every_other(config: Any, share: float) -> Tensor:
    """Gates (layers, kv heads) whose upper `share` is spread evenly over the layers. Which heads they are does not touch the cost."""
    layers, heads = config.num_hidden_layers, config.num_key_value_heads
    rank = torch.tensor([[(head + layer) % heads for head in range(heads)] for layer in range(layers)])
    return (
        1.0 - (rank + 0.5 * (torch.arange(layers)[:, None] % 2)) / (2.0 * heads)
        if share < 1.0
        else torch.ones(layers, heads)
    )


def _twin(model: Any) -> Any:
    """The same model again, sharing every weight, so that another method can be attached to it at the same time."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, memo)


def _fill(model: Any, method: DuoAttention, cache: Any, dense: Any) -> None:
    """Hand a filled dense cache to the method's own, layer by layer, as one call of its attention with a single query."""
    config = model.config.get_text_config()
    for number, (layer, source) in enumerate(zip(cache.layers, dense.layers)):
        layer.update(source.keys, source.values)
        query = source.keys.new_zeros(1, config.num_attention_heads, 1, source.keys.shape[-1])
        method.attend(AttentionCall(model, number, query, source.keys, source.values, cache=layer))


class _Reader:
    """Decodes token by token and times each layer from its cache update to its output projection: cache handling and attention."""

    def __init__(self, model: Any, cache: Any) -> None:
        self.model, self.cache = model, cache
        self._began, self._layers = 0.0, []  # type: float, list[float]
        update = cache.update

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._began = time.perf_counter()
            return update(*args, **kwargs)

        def done(*_: Any) -> None:
            self._layers.append(time.perf_counter() - self._began)

        cache.update = timed
        projections = [module for name, module in model.named_modules() if name.endswith("self_attn.o_proj")]
        self._hooks = [module.register_forward_pre_hook(done) for module in projections]

    @torch.no_grad()
    def attention_seconds(self, token: Tensor) -> list[float]:
        """One step; the seconds of each layer."""
        self._layers = []
        self.model(token, past_key_values=self.cache, use_cache=True)
        return self._layers

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        del self.cache.update  # the class's own again
        for hook in self._hooks:
            hook.remove()


# Which heads


def _needle(out: Outcome, model: Any, tokenizer: Any, context: int, scale: Scale) -> None:
    """Log-probability of a needle with the same share of streaming heads, chosen in different ways. Mask as in training."""
    sink, recent = scale.pick((16, 64), (4, 16))
    hay = NeedleHaystack(lengths=(scale.pick(384, 220),), depths=(30, 70))
    scores = retrieval_heads(model, tokenizer, hay, decode="forced").scores
    config = model.config.get_text_config()
    gates = scores.view(scores.shape[0], config.num_key_value_heads, -1).amax(-1)
    gates = gates + 1e-6 * torch.rand(gates.shape, generator=torch.Generator().manual_seed(0))  # ties, as released
    ways: dict[str, DuoAttention | None] = {"every head full": None}
    ways["half stream: least retrieval score"] = DuoAttention(0.5, gates, sink, recent, "paper")
    ways["half stream: ranked from the prompt"] = DuoAttention(0.5, None, sink, recent, "paper")
    ways["half stream: trained gates"] = DuoAttention(
        0.5, _trained(model, tokenizer, sink, recent, scale), sink, recent, "paper"
    )
    seeds = scale.pick(4, 2)
    for seed in range(seeds):
        random = torch.rand(gates.shape, generator=torch.Generator().manual_seed(seed + 1))
        ways[f"half stream: random {seed}"] = DuoAttention(0.5, random, sink, recent, "paper")
    prompts = [needle_prompt(tokenizer, context, depth, number) for number in range(3) for depth in (0.2, 0.6)]
    found: dict[str, list[float]] = {label: [] for label in ways}
    for prompt, answer in prompts[: scale.pick(6, 2)]:
        for label, method in ways.items():
            with attach(model, *([method] if method else [])):
                found[label].append(answer_log_prob(model, prompt, answer))
    for label, values in found.items():
        if "random" not in label:
            out.add(label, "needle log-probability", "nats", values)
    drawn = [found[label] for label in ways if "random" in label]
    random_mean = [sum(column) / len(column) for column in zip(*drawn)]
    out.add("half stream: random", "needle log-probability", "nats", random_mean)
    dense = out.row("every head full", "needle log-probability").mean
    best = max(sum(values) / len(values) for values in drawn)
    chosen = out.row("half stream: least retrieval score", "needle log-probability").mean
    ranked = out.row("half stream: ranked from the prompt", "needle log-probability").mean
    out.check("needle log-prob lost by retrieval-score choice, nats", dense - chosen, at_most=1.0)
    out.check("its lead over the best of the random choices, nats", chosen - best, at_least=0.0)
    out.check("lead of ranking from the prompt over it, nats", ranked - best, at_least=0.0)
    trained = out.row("half stream: trained gates", "needle log-probability").mean
    out.check("lead of trained gates over it, nats", trained - best, at_least=0.0)
    out.note = (
        f"Needle: every head full {dense:.2f} nats, chosen by retrieval score {chosen:.2f}, ranked from the prompt {ranked:.2f}, random "
        f"{sum(random_mean) / len(random_mean):.2f} (mean of {seeds} draws), gates of {STEPS} steps (theirs: 2000) {trained:.2f}."
    )


def _trained(model: Any, tokenizer: Any, sink: int, recent: int, scale: Scale) -> Tensor:
    """Gates after a few steps, from the middle so that they have somewhere to go."""
    passkeys = Passkeys(
        tokenizer, min_length=416, max_length=416, num_lengths=1, num_passkeys=1, passkey_words=4, reserve=0
    )
    options: dict[str, Any] = {"initial": 0.5, "lr": 0.05, "steps": scale.pick(STEPS, 1), "progress": False}
    return fit_duo(model, tokenizer, passkeys, sink=sink, recent=recent, **options).gates.detach()
