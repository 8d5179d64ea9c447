"""085 Hedgehog: a pretrained model converted to linear attention, by taught softmax-like maps and by 1 + elu at the same budget."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...integrations.embedded import cache_folder
from ...integrations.transformers import attach
from ...losses.linearize import transfer_loss_of_call
from ...losses.lora import fit_lora
from ...losses.runner import fit, layer_loss
from ...methods.caches.linear_maps import linear_maps
from ...methods.caches.linearized import Linearized, linearized_weights
from ..text import token_windows
from .claim import Outcome, Scale

PAPER, SLUG = "085", "hedgehog"
SAYS = (
    "Hedgehog: linear attention with feature maps taught to give the weights of the softmax keeps what a pretrained model knows, where "
    "earlier maps (1 + elu) lose it; converted and finetuned, GPT-2 reaches perplexity 16.7 where its softmax reaches 15.8."
)
BEFORE, HEDGEHOG, ELU, PLAIN = "softmax", "Hedgehog", "learned 1 + elu", "1 + elu, untaught"
PPL, KL, ENTROPY = "perplexity", "divergence from the softmax's weights", "entropy of a row of weights"
KINDS = {HEDGEHOG: "hedgehog", ELU: "learned_elu"}


def measure(scale: Scale) -> Outcome:
    model, tokenizer = scale.language_model()
    context, transfer, lora = scale.pick(256, 32), scale.pick(60, 2), scale.pick(25, 2)
    pieces = [torch.tensor([ids]) for ids in token_windows(tokenizer, context, scale.pick(150, 8))]
    held_out = pieces[-len(pieces) // 10 :][: scale.pick(8, 1)]
    learn = pieces[: -len(pieces) // 10 - 1]
    order = torch.randperm(len(learn), generator=torch.Generator().manual_seed(0)).tolist()
    learn = [learn[i] for i in order]
    out = Outcome(
        f"{len(held_out)} held-out pieces of {context} tokens of Python's documentation; all attention layers converted by {transfer} "
        f"steps of attention transfer and {lora} of LoRA (rank 8) on one piece each (the paper: the whole of WikiText-103)",
        "a held-out piece",
    )
    out.add(BEFORE, f"{PPL}, as it came", "", before := _perplexities(model, held_out))
    name = Path(scale.model_name).name if scale.model_name else "model"
    folder = cache_folder() / "claims" / f"085-{name}"  # a killed run goes on from here
    maps = _teach(model, learn, transfer, None if scale.quick else folder / "maps.safetensors")
    methods = {label: Linearized(own) for label, own in maps.items()}
    methods[PLAIN] = Linearized(linear_maps(model, "elu+1"))
    _look(out, model, held_out[:2], methods)
    for label, method in methods.items():
        with attach(model, method):
            out.add(label, f"{PPL}, after attention transfer", "", _perplexities(model, held_out))
    for label in (BEFORE, *methods):
        own = [methods[label]] if label in methods else []
        file = None if scale.quick else folder / f"{label.replace(' ', '').replace(',', '')}.safetensors"
        adapted = fit_lora(
            model, learn, own, steps=lora, lr=1e-3, schedule="linear", warmup=2, out=file, save_every=10, progress=False
        )  # fmt: skip
        if own:
            with attach(adapted, *own):
                found = _perplexities(adapted, held_out)
        else:
            found = _perplexities(adapted, held_out)
        out.add(label, f"{PPL}, after LoRA", "", found, against=None if label == BEFORE else BEFORE)
        model = adapted.unload()  # type: ignore[operator]
    if not scale.quick:
        shutil.rmtree(folder, ignore_errors=True)
    _judge(out, before)
    return out


def _judge(out: Outcome, before: list[float]) -> None:
    def perplexity(label: str, stage: str) -> float:
        return _mean(out.row(label, f"{PPL}, {stage}").values)

    taught, tuned = "after attention transfer", "after LoRA"
    out.check(
        "Hedgehog's attention, divergence from the softmax's, of 1 + elu's taught alike",
        out.row(HEDGEHOG, KL).mean / out.row(ELU, KL).mean, at_most=0.5,
    )  # fmt: skip
    for stage in (taught, tuned):
        out.check(
            f"perplexity {stage}, Hedgehog's of 1 + elu's taught alike",
            perplexity(HEDGEHOG, stage) / perplexity(ELU, stage), at_most=0.95, digits=3,
        )  # fmt: skip
    out.check(
        "perplexity after LoRA, Hedgehog's of the softmax model's with the same LoRA",
        perplexity(HEDGEHOG, tuned) / perplexity(BEFORE, tuned), at_most=1.06, digits=3,
    )  # fmt: skip
    found = {label: [perplexity(label, stage) for stage in (taught, tuned)] for label in (HEDGEHOG, ELU, PLAIN)}
    out.note = f"Perplexities: softmax {_mean(before):.1f}, with LoRA {perplexity(BEFORE, tuned):.1f}; after transfer, then LoRA: "
    out.note += ", ".join(f"{label} {one:.4g} and {two:.4g}" for label, (one, two) in found.items()) + ". "


def _teach(model: nn.Module, learn: list[Tensor], steps: int, file: Path | None) -> dict[str, nn.ModuleDict]:
    """Both kinds of maps at once, on the same calls of the softmax model: each gets what it would get alone."""
    maps = {label: linear_maps(model, kind) for label, kind in KINDS.items()}
    sides = nn.ModuleDict({KINDS[label]: own for label, own in maps.items()})

    def loss(call: Any) -> Tensor:
        each = [transfer_loss_of_call(call, own[str(call.layer)]) / len(own) for own in maps.values()]
        return torch.stack(each).sum()

    fit(
        sides, layer_loss(model, loss), learn, steps=steps, lr=1e-2, schedule="linear", warmup=2, frozen=model,
        out=file, save_every=20, progress=False,
    )  # fmt: skip
    sides.eval()
    return maps


@torch.no_grad()
def _perplexities(model: Any, pieces: list[Tensor]) -> list[float]:
    found = []
    for ids in pieces:
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        found.append(math.exp(float(nn.functional.cross_entropy(logits, ids[0, 1:]))))
    return found


def _mean(perplexities: list[float]) -> float:
    """That of all pieces together: the exponential of the mean loss a token."""
    return math.exp(sum(map(math.log, perplexities)) / len(perplexities))


@torch.no_grad()
def _look(out: Outcome, model: nn.Module, pieces: list[Tensor], methods: dict[str, Linearized]) -> None:
    """What the maps make of the softmax model's own queries and keys, a figure a layer (mean over pieces, heads and rows)."""
    layers = len(next(iter(methods.values())).maps)  # type: ignore[arg-type]
    entropy = {label: [0.0] * layers for label in (BEFORE, *methods)}
    apart = {label: [0.0] * layers for label in methods}

    def observe(call: Any) -> None:
        true = call.weights()
        entropy[BEFORE][call.layer] += float(torch.special.entr(true).sum(-1).mean()) / len(pieces)
        for label, method in methods.items():
            made = linearized_weights(call, method.pair(call.layer))  # type: ignore[arg-type]
            entropy[label][call.layer] += float(torch.special.entr(made).sum(-1).mean()) / len(pieces)
            gap = torch.special.entr(true) + true * made.clamp(min=1e-12).log()
            apart[label][call.layer] -= float(gap.sum(-1).mean()) / len(pieces)

    with attach(model) as session:
        session.observers.append(observe)
        for ids in pieces:
            model(ids, use_cache=False)
    for label, values in entropy.items():
        out.add(label, f"{ENTROPY}, a value a layer", "nats", values, against=None if label == BEFORE else BEFORE)
    for label, values in apart.items():
        out.add(label, KL, "nats", values)
