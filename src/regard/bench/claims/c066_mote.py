"""066 MoTE: a few experts set a behaviour apart, and switching those off changes it where random ones do not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...integrations.transformers import attach
from ...lens.experts import expert_activation, expert_contrast
from ...methods.edits import MoTE
from ...testbeds.training import train
from .claim import Outcome, Scale

PAPER, SLUG = "066", "mote"
SAYS = (
    "MoTE: contrasting expert activation between prompts of two behaviours finds a few experts, and suppressing those changes the "
    "one behaviour far more than suppressing as many random experts."
)
TOP = 10
LENGTH = 24


def measure(scale: Scale) -> Outcome:
    model = _mixture()
    steps = scale.pick(400, 15)
    train(
        model,
        lambda number: _batch(number, 32),
        steps=steps,
        loss=_loss,
        lr=3e-3,
        progress=False,
    )
    model.eval()
    out = Outcome(
        f"a mixture of 4 layers x 16 experts trained for {steps} steps on two kinds of token sequences; {TOP} of 64 experts suppressed",
        "a kind of sequence, the target's first",
    )
    count = scale.pick(64, 8)
    prompts = {kind: _sequences(kind, count, 10_000) for kind in (0, 1)}
    fresh = {kind: _sequences(kind, count, 20_000) for kind in (0, 1)}
    maps = expert_activation(model, [prompts[0], prompts[1]])
    plain = [_perplexity_loss(model, fresh[kind]) for kind in (0, 1)]
    out.add("as it is", "loss", "nats a token", plain)
    found, other, drawn = [], [], []
    for target in (0, 1):
        contrast = expert_contrast(maps, [0] * count + [1] * count, target)
        kinds = (target, 1 - target)
        top = _raised(model, MoTE(contrast.top(TOP)), fresh, kinds, plain)
        out.add(f"the {TOP} most typical of kind {target} off", "loss added", "nats a token", top)
        found.append(top[0])
        other.append(top[1])
        for seed in range(scale.pick(5, 1)):
            heads = contrast.random(TOP, exclude=TOP, seed=seed)
            drawn.append(_raised(model, MoTE(heads), fresh, kinds, plain)[0])
    out.add(f"{TOP} random experts off", "loss added (a draw, the target)", "nats a token", drawn)
    mine, rest, random = (sum(values) / len(values) for values in (found, other, drawn))
    out.check("loss added on the target kind over that on the other", mine / max(rest, 1e-3), at_least=2.0)
    out.check(
        "loss added on the target kind over that of random experts", mine / max(random, 1e-3), at_least=2.0,
        spread=(max(drawn) - min(drawn)) / 2,
    )  # fmt: skip
    out.note = "An added loss below 0.001 counts as 0.001 in the ratios."
    return out


def _mixture() -> Any:
    from transformers import OlmoeConfig, OlmoeForCausalLM

    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=64, hidden_size=64, intermediate_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
        num_experts=16, num_experts_per_tok=2, norm_topk_prob=True, max_position_embeddings=64, router_aux_loss_coef=0.01,
        pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return OlmoeForCausalLM(config)


def _sequences(kind: int, count: int, seed: int) -> Tensor:
    """Kind 0: steps of a fixed size in one half of the tokens; kind 1: a random half and its mirror image, in the other half."""
    generator = torch.Generator().manual_seed(seed * 2 + kind)
    if kind == 0:
        start = torch.randint(32, (count, 1), generator=generator)
        step = torch.randint(1, 8, (count, 1), generator=generator)
        return (start + step * torch.arange(LENGTH)) % 32
    half = 32 + torch.randint(32, (count, LENGTH // 2), generator=generator)
    return torch.cat([half, half.flip(1)], dim=1)


def _batch(number: int, size: int) -> Tensor:
    return torch.cat([_sequences(kind, size // 2, number) for kind in (0, 1)])


def _loss(model: Any, ids: Tensor) -> Tensor:
    made = model(ids, labels=ids, output_router_logits=True, use_cache=False)
    return made.loss  # with the balance of the routers, as the family trains it


@torch.no_grad()
def _perplexity_loss(model: Any, ids: Tensor) -> float:
    """Mean loss of the second half, which the first half determines."""
    logits = model(ids, use_cache=False).logits[:, LENGTH // 2 - 1 : -1]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, LENGTH // 2 :].flatten()))


def _raised(
    model: Any, method: MoTE, fresh: dict[int, Tensor], kinds: tuple[int, int], plain: list[float]
) -> list[float]:
    with attach(model, method):
        return [_perplexity_loss(model, fresh[kind]) - plain[kind] for kind in kinds]
