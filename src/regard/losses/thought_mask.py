"""Thought-mask fine-tuning: earlier, weaker answers are read and not learned, the last one is.

PTR: Du et al. 2024, "Think Thrice Before You Act: Progressive Thought Refinement in Large Language Models" (ICLR 2025, arXiv 2410.13413);
authors' code run for numbers: cydu24/Progressive-Thought-Refinement @ 84182f1 (no licence),
`PTR_finetune/encoder/encode_types/encode_qa.py`. "Mask" is about the loss: attention sees the thoughts.

What differs: the paper's objective has two terms more, on agreement of successive answers and on confidence, whose functions it does not
define and the code does not have: here they are callables, off by default (`refinement_loss`). The answers of several rounds are
asked for by `regard.bench.refinement`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from .._checks import require, require_name
from .masked_lm import MaskedCollator, masked_lm_loss

__all__ = ["REFINE", "ThoughtMaskCollator", "refinement_loss", "thought_parts"]

REFINE = "\nLook at the answer above again and improve it.\n"


def thought_parts(
    query: str, thoughts: Sequence[str], answer: str, instruction: str = REFINE, learn: Sequence[str] = ("answer",)
) -> list[tuple[str, float]]:
    """query, thought, instruction, thought, instruction, ..., answer as parts of a `MaskedCollator`.

    Args:
        query, thoughts, answer: texts; thoughts from the first and weakest to the last. instruction: asks for the next answer.
        learn: of which parts the tokens are learned: "query", "thought", "instruction", "answer".
    """
    for name in learn:
        require_name("learn", name, ("query", "thought", "instruction", "answer"))
    require(bool(answer), "answer", answer, "a text")
    weight = {name: float(name in learn) for name in ("query", "thought", "instruction", "answer")}
    parts = [(query, weight["query"])]
    for thought in thoughts:
        parts += [(thought, weight["thought"]), (instruction, weight["instruction"])]
    return [*parts, (answer, weight["answer"])]


class ThoughtMaskCollator(MaskedCollator):
    """Records of a question and several answers -> a batch in which only the last answer is learned.

        collate = ThoughtMaskCollator(tokenizer, pack=4096)
        batch = collate([{"query": "2 + 2 * 2 = ", "thoughts": ["8"], "answer": "6"}, ...])

    A record may also be the authors' own form, {"q": all that is read, "a": the answer}, texts or token ids.

    Args:
        tokenizer, pad, max_length, pack: as `MaskedCollator`. instruction: asks for the next answer.
        variant: "released": a begin token before what is read and before the answer, which is learned (the authors tokenise the two one
            by one); packed samples see each other; a sample as long as `pack` is dropped. "paper": one begin token, packed samples apart.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        *,
        instruction: str = REFINE,
        pack: int | None = None,
        max_length: int | None = None,
        pad: int | None = None,
        variant: str = "released",
    ) -> None:
        require_name("variant", variant, ("released", "paper"))
        released = variant == "released"
        eos = getattr(tokenizer, "eos_token_id", None) is not None
        super().__init__(
            tokenizer, pad, "parts" if released else True, eos, max_length, "drop", pack, isolate=not released
        )
        self.instruction, self.variant = instruction, variant

    def encode(self, sample: Any) -> tuple[list[int], list[float]]:
        ids, weights = super().encode(self._parts(sample))
        if self.variant == "released" and self.pack is not None and len(ids) == self.pack:
            ids, weights = [*ids, 0], [*weights, 0.0]  # one too many: theirs takes only shorter ones
        return ids, weights

    def _parts(self, sample: Any) -> Sequence[Any]:
        if not isinstance(sample, Mapping):
            return sample
        if "q" in sample and "a" in sample:
            return [(sample["q"], 0.0), (sample["a"], 1.0)]
        missing = [name for name in ("query", "answer") if name not in sample]
        require(not missing, "sample", f"a record without {', '.join(missing)}", "query and answer (and thoughts)")
        parts = thought_parts(sample["query"], sample.get("thoughts", ()), sample["answer"], self.instruction)
        if self.variant == "released":
            return [("".join(text for text, _ in parts[:-1]), 0.0), parts[-1]]
        return parts


def refinement_loss(
    model: Any,
    batch: Mapping[str, Tensor],
    consistency: Callable[[Any, Mapping[str, Tensor]], Tensor] | None = None,
    confidence: Callable[[Any, Mapping[str, Tensor]], Tensor] | None = None,
    weights: tuple[float, float, float] = (1.0, 0.0, 0.0),
) -> Tensor:
    """weights[0] * (loss of the answer) + weights[1] * (1 - consistency) + weights[2] * (1 - confidence).

    The paper names the two further terms and leaves them open: `consistency(model, batch)` and `confidence(model, batch)` are scalars
    in [0, 1] of your own. The default is the authors' code: the answer alone.
    """
    require(len(weights) == 3 and min(weights) >= 0, "weights", weights, "three numbers >= 0")
    loss = weights[0] * masked_lm_loss(model, batch)
    for name, term, weight in (("consistency", consistency, weights[1]), ("confidence", confidence, weights[2])):
        if weight:
            require(term is not None, name, None, f"a function, as its weight is {weight}")
            loss = loss + weight * (1 - term(model, batch))  # type: ignore[misc]
    return loss
