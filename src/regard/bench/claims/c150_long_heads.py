"""150 LongHeads: a model reads texts longer than it was trained on, and finds what a window has lost."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...integrations.hub import load
from ...integrations.transformers import attach
from ...methods import LongHeads, SlidingWindow
from ...methods.call import Method
from ...testbeds import recall
from ..small_training import ByteText, train
from .claim import Outcome, Scale

PAPER, SLUG = "150", "long-heads"
SAYS = (
    "LongHeads: without any training a model keeps its perplexity on texts many times longer than those it was trained on, and finds a "
    "passkey in them; the plain model and a sliding window do not."
)
DENSE, WINDOW, HEADS = "the model as it is", "sinks and a sliding window", "LongHeads"
NLL, FOUND = "negative log-likelihood of a byte", "answers found"


def measure(scale: Scale) -> Outcome:
    trained, longer, steps = scale.pick((128, 8, 400), (32, 4, 3))
    context, budget = scale.pick((2048, 512), (96, 48))
    out = Outcome(
        f"a model of bytes trained here on texts of {trained}, read at {longer} times that; "
        f"tiny-recall at {context} words with a budget of {budget}",
        "text",
    )
    _perplexity(out, trained, longer, steps, scale)
    _recall(out, context, budget, scale)
    return out


def _byte_model(length: int, steps: int, scale: Scale) -> Any:
    """A small Llama that has only seen texts of `length` bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=scale.pick(128, 32), intermediate_size=scale.pick(384, 64), num_hidden_layers=scale.pick(3, 2),
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1 << 14, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    text, generator = ByteText(), torch.Generator().manual_seed(0)

    def loss(step: int) -> Tensor:
        ids = text.batch(16, length, generator)
        return model(ids, labels=ids, use_cache=False).loss

    train(model.parameters(), loss, steps)
    return model.eval()


def _perplexity(out: Outcome, trained: int, longer: int, steps: int, scale: Scale) -> None:
    model, length = _byte_model(trained, steps, scale), trained * longer
    texts = ByteText().held_out(scale.pick(6, 2), length)
    chunk = trained // 8
    ways: dict[str, list[Method]] = {
        DENSE: [],
        WINDOW: [SlidingWindow(trained - 4, sink=4)],
        HEADS: [LongHeads(chunk=chunk, budget=trained)],
        f"{HEADS}, own keys seen": [LongHeads(chunk=chunk, budget=trained, variant="paper")],
    }
    short = "as long as in training"
    out.add(short, NLL, "nats", [_nll(model, text[:trained], trained // 2) for text in texts])
    for label, methods in ways.items():
        with attach(model, *methods):
            out.add(label, NLL, "nats", [_nll(model, text, length // 2) for text in texts], against=short)
    base, ours = out.row(short, NLL).mean, out.row(HEADS, NLL).mean
    out.check("LongHeads, nats a byte above texts of the trained length", ours - base, at_most=0.15)
    out.check("the plain model above LongHeads, nats a byte", out.row(DENSE, NLL).mean - ours, at_least=0.0)


@torch.no_grad()
def _nll(model: Any, text: Tensor, last: int) -> float:
    """Of the last bytes, so that all of them stand deep in the text."""
    logits = model(text[None], use_cache=False).logits[0, :-1].float()
    return float(torch.nn.functional.cross_entropy(logits[-last:], text[1:][-last:]))


def _recall(out: Outcome, context: int, budget: int, scale: Scale) -> None:
    model, _ = load("tiny-recall")
    samples = [
        recall.recall_sample(context, scale.pick(32, 8), scale.pick(16, 4), torch.Generator().manual_seed(seed))
        for seed in range(scale.pick(6, 2))
    ]
    ways: dict[str, list[Method]] = {
        DENSE: [],
        WINDOW: [SlidingWindow(budget - 4, sink=4)],
        HEADS: [LongHeads(chunk=budget // 16, budget=budget)],
        f"{HEADS}, own keys seen": [LongHeads(chunk=budget // 16, budget=budget, variant="paper")],
    }
    for label, methods in ways.items():
        with attach(model, *methods):
            found = [recall.accuracy(model, [sample]) for sample in samples]
        out.add(f"{label} (recall)", FOUND, "share", found)
    window, ours = out.row(f"{WINDOW} (recall)", FOUND).mean, out.row(f"{HEADS} (recall)", FOUND).mean
    out.check("LongHeads' lead over the window in recall", ours - window, at_least=0.1)
    out.note = f"Recall with everything attended: {out.row(f'{DENSE} (recall)', FOUND).mean:.2f}; that model extrapolates by itself."
