"""Retrieval heads: the few heads that copy from a long context.

Paper: Wu et al. 2024, "Retrieval Head Mechanistically Explains Long-Context Factuality" (ICLR 2025, arXiv 2404.15574). Authors'
code, read for numbers: nightdessert/Retrieval_Head (`retrieval_head_detection.py`).

While a model answers from a needle in a haystack, a head copies at a step if the key it looks at most lies in the needle and holds
the very token that the model says next. Its score is the share of the needle copied so, averaged over the runs in which the model
found the needle. The authors call heads above 0.1 retrieval heads: a few percent of all.

What differs from the authors' code: decoding stops at any token with a line break and at the end of the text, where theirs knows
Llama's newline alone; samples come from `NeedleHaystack`, whose needles and text are ours.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import require, require_int, require_name
from ..integrations.transformers import attach
from ..methods.call import AttentionCall, Method
from .head_scores import HeadScores
from .needle import NeedleHaystack, NeedleSample
from .rouge import rouge1_recall

__all__ = ["CopyCounter", "copies", "retrieval_heads"]


def copies(looked_at: Tensor, prompt_ids: Tensor, span: tuple[int, int], token: int) -> Tensor:
    """Which heads copied `token` from the needle, bool of the leading shape.

    Args:
        looked_at: key positions each head looks at most, int64 (..., topk). prompt_ids: (T,). span: the needle, [start, end).
        token: what the model said.
    """
    start, end = span
    inside = (looked_at >= start) & (looked_at < min(end, len(prompt_ids)))
    same = prompt_ids[looked_at.clamp(0, max(0, len(prompt_ids) - 1))] == token
    return (inside & same).any(-1)


class CopyCounter:
    """Adds up, over the steps of one run, how much of the needle each head copied.

    Args:
        prompt_ids: (T,). span: the needle's tokens, [start, end).
        count: "steps": each step that copies counts 1 / n, n the needle's length, as in the authors' code; a head that copies a
            token twice counts it twice, so that scores above 1 happen. "set": the paper's |copied and needle| / |needle| over
            distinct tokens, never above 1.
    """

    def __init__(self, prompt_ids: Tensor, span: tuple[int, int], count: str = "steps") -> None:
        require_name("count", count, ("steps", "set"))
        require(0 <= span[0] < span[1], "span", span, "a needle of at least one token")
        self.prompt_ids, self.span, self.count = prompt_ids.reshape(-1).cpu(), span, count
        self._steps: list[Tensor] = []
        self._tokens: list[int] = []

    def add(self, looked_at: Tensor, token: int) -> Tensor:
        """One step: key positions (L, H, topk) and the token that was said. Returns which heads copied it, (L, H)."""
        self._steps.append(copies(looked_at.cpu(), self.prompt_ids, self.span, token))
        self._tokens.append(int(token))
        return self._steps[-1]

    def score(self) -> Tensor:
        """Scores so far, float64 (L, H)."""
        require(bool(self._steps), "steps", 0, "at least one step")
        hits = torch.stack(self._steps)
        if self.count == "steps":
            return hits.sum(0).double() / (self.span[1] - self.span[0])
        needle = set(self.prompt_ids[self.span[0] : self.span[1]].tolist())
        tokens = torch.tensor(self._tokens)
        copied = sum(hits[tokens == token].any(0).double() for token in sorted(needle))
        return torch.as_tensor(copied / len(needle))


@torch.no_grad()
def retrieval_heads(
    model: nn.Module,
    tokenizer: Any,
    samples: NeedleHaystack | Iterable[NeedleSample] | None = None,
    *,
    count: str = "steps",
    topk: int = 1,
    max_new_tokens: int = 50,
    min_recall: float = 0.5,
    decode: str = "greedy",
    methods: Iterable[Method] = (),
) -> HeadScores:
    """Score every head of a language model by how much it copies from a needle.

        scores = regard.lens.retrieval_heads(model, tokenizer)
        with regard.attach(model, regard.MaskHeads(scores.top(30))):
            ...

    Args:
        model: a decoder-only transformers model. tokenizer: its tokenizer.
        samples: a `NeedleHaystack`, or samples of one. None: three needles at 256 and 512 tokens and two depths, 12 runs (about a
            minute for 135M parameters on one CPU core); `NeedleHaystack.paper()` is the authors' grid.
        count: "steps" or "set", see `CopyCounter`. topk: keys of each head that count as looked at.
        max_new_tokens: longest answer; it ends earlier at a line break or end-of-text token.
        min_recall: a run counts if the ROUGE-1 recall of the needle's answer is above this.
        decode: "greedy": the model's own answer. "forced": the needle's answer is fed and every run counts; for models too weak
            to find the needle.
        methods: methods to have attached meanwhile, to see what they do to the scores.

    Returns:
        `HeadScores` with one table a counted run. `info`: "runs" tried, "counted", mean "recall". Without a counted run every score is
        NaN, and a warning says so.
    """
    require_name("decode", decode, ("greedy", "forced"))
    require_int("topk", topk, 1)
    require_int("max_new_tokens", max_new_tokens, 1)
    haystack = NeedleHaystack() if samples is None else samples
    runs, recalls, tried = [], [], 0
    training = model.training
    model.eval()
    try:
        with attach(model, *methods) as session:
            reader = _Reader(topk, session)
            for sample in haystack.samples(tokenizer) if isinstance(haystack, NeedleHaystack) else haystack:
                tried += 1
                counter = CopyCounter(sample.input_ids, sample.span, count)
                said = _run(model, tokenizer, sample, reader, counter, max_new_tokens, decode)
                recall = rouge1_recall(sample.needle.answer, tokenizer.decode(said, skip_special_tokens=True).strip())
                recalls.append(recall)
                if decode == "forced" or recall > min_recall:
                    runs.append(counter.score())
            shape = (session.num_layers, reader.num_heads)
    finally:
        model.train(training)
    require(tried > 0, "samples", "none", "at least one sample")
    if not runs:
        warnings.warn(
            f"in none of {tried} runs did the model find the needle, so no head has a score; use shorter contexts or decode='forced'",
            stacklevel=3,
        )
    info = {"runs": tried, "counted": len(runs), "recall": sum(recalls) / tried, "count": count, "decode": decode}
    if not runs:
        return HeadScores(torch.full(shape, torch.nan), None, "retrieval", info)
    return HeadScores.from_runs(runs, "retrieval", info)


def _run(
    model: nn.Module,
    tokenizer: Any,
    sample: NeedleSample,
    reader: _Reader,
    counter: CopyCounter,
    limit: int,
    decode: str,
) -> list[int]:
    """Answer one prompt; what was said."""
    ids = sample.input_ids.to(_device(model))
    require(ids.shape[1] >= 2, "samples", f"a prompt of {ids.shape[1]} tokens", "prompts of at least two")
    few = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    reader.on = False
    past = model(ids[:, :-1], use_cache=True, **few).past_key_values
    reader.on = True
    forced = sample.answer_ids.tolist() if decode == "forced" else None
    said: list[int] = []
    fed = ids[:, -1:]
    for step in range(limit if forced is None else len(forced)):
        out = model(fed, past_key_values=past, use_cache=True)
        past = out.past_key_values
        token = int(out.logits[0, -1].argmax()) if forced is None else forced[step]
        said.append(token)
        counter.add(reader.take(), token)
        if forced is None and _ends(tokenizer, token):
            break
        fed = ids.new_tensor([[token]])
    return said


class _Reader:
    """An observer that keeps, of every attention layer, where its last query looks."""

    def __init__(self, topk: int, session: Any) -> None:
        self.topk, self.session, self.on = topk, session, False
        self.num_heads = 0
        self.seen: dict[int, Tensor] = {}
        session.observers.append(self)

    def __call__(self, call: AttentionCall) -> None:
        self.num_heads = max(self.num_heads, call.num_heads)
        if not self.on or call.kind != "self" or call.tower != self.session.main_tower:
            return
        row = call.weights(rows=[-1])[0, :, 0]
        self.seen[call.layer] = row.topk(min(self.topk, row.shape[-1])).indices + call.key_offset

    def take(self) -> Tensor:
        """Positions looked at in the step that was just made, (L, H, topk); -1 where a layer has no attention or fewer heads."""
        looked = torch.full((self.session.num_layers, self.num_heads, self.topk), -1)
        for layer, positions in self.seen.items():
            looked[layer, : positions.shape[0], : positions.shape[1]] = positions.cpu()
        self.seen.clear()
        return looked


def _device(model: nn.Module) -> torch.device:
    device = getattr(model, "device", None)
    return device if isinstance(device, torch.device) else next(model.parameters()).device


def _ends(tokenizer: Any, token: int) -> bool:
    ends = getattr(tokenizer, "eos_token_id", None)
    return token == ends or "\n" in tokenizer.decode([token])
