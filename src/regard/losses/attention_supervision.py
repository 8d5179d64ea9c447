"""Teaching attention where to look: a loss on its weights, and mining what to teach from the model's own mistakes (PSSAttention, 166).

Su et al. 2021, "Enhanced Aspect-Based Sentiment Analysis Models with Progressive Self-supervised Attention Learning" (Artificial
Intelligence 296, arXiv 2103.03446; ACL 2019, 1906.01213). Code read for numbers: DeepLearnXMU/PSSAttention @ 7e23d8d (no licence),
`TNet(+AS)/utils.py`, `Bert(+AS)/bert_model.py`, `Bert(+AS)/main_total.py`.

What differs: the paper expects weight 1 / (number of active words) of each active word, the released code 1 (`target`). A row whose scores
are all zero teaches nothing here; theirs marks its first place as misleading. Their files keep the sign of a row for right or wrong;
here that is a tensor of its own (`signed_rounds` reads theirs).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .._checks import require, require_int, require_name, require_tensor

__all__ = [
    "MinedAttention",
    "ProgressiveAttentionMiner",
    "attention_supervision_loss",
    "signed_rounds",
    "smoothgrad_scores",
]

TARGETS = ("one", "uniform")


def attention_supervision_loss(attention: Tensor, amask: Tensor, avalue: Tensor) -> Tensor:
    """Mean over rows of sum_t (attention * amask - avalue)^2: `loss = cross_entropy + lam * attention_supervision_loss(...)`.

    attention (B, T), after the softmax, with its graph; amask (B, T): which places are taught; avalue (B, T): the weight each should have
    (`MinedAttention.targets`). lam of the paper: 0.1 to 1. Zero exactly where active words have their value and misleading ones none.
    """
    require_tensor("attention", attention, dims=2, floating=True)
    for name, tensor in (("amask", amask), ("avalue", avalue)):
        require(tensor.shape == attention.shape, name, f"shape {tuple(tensor.shape)}", f"{tuple(attention.shape)}")
    return (attention * amask.to(attention.dtype) - avalue.to(attention.dtype)).square().sum(1).mean()


@dataclass
class MinedAttention:
    """What rounds of mining have found of n texts.

    Attributes:
        found: (rounds, n), the place taken in each round, -1 for none. right: (rounds, n) bool, whether the prediction was.
        length: T.
    """

    found: Tensor
    right: Tensor
    length: int

    def sets(self, rounds: int | None = None) -> tuple[Tensor, Tensor]:
        """(active, misleading), each (n, T) bool, after the first `rounds` rounds (None = all). A place found by a right and by a wrong
        prediction is active."""
        count = len(self.found) if rounds is None else require_int("rounds", rounds, 0)
        require(count <= len(self.found), "rounds", count, f"at most {len(self.found)}")
        active = torch.zeros(self.found.shape[1], self.length, dtype=torch.bool)
        wrong = torch.zeros_like(active)
        for place, right in zip(self.found[:count], self.right[:count]):
            rows = (place >= 0).nonzero()[:, 0]
            (active_rows, wrong_rows) = rows[right[rows]], rows[~right[rows]]
            active[active_rows, place[active_rows]] = True
            wrong[wrong_rows, place[wrong_rows]] = True
        return active, wrong & ~active

    def erased(self, rounds: int | None = None) -> Tensor:
        """(n, T) bool: what is masked after that many rounds, active or not."""
        active, misleading = self.sets(rounds)
        return active | misleading

    def targets(self, rounds: int | None = None, target: str = "one") -> tuple[Tensor, Tensor]:
        """(amask, avalue), (n, T) float32, for `attention_supervision_loss`. Misleading words should have weight 0, active ones 1
        ("one", as released) or 1 / (active words of the text) ("uniform", as in the paper)."""
        require_name("target", target, TARGETS)
        active, misleading = self.sets(rounds)
        value = active.float()
        if target == "uniform":
            value = value / active.sum(1, keepdim=True).clamp(min=1)
        return (active | misleading).float(), value

    def share(self) -> list[tuple[float, float]]:
        """Of each round: share of the texts that gave an active word, and a misleading one."""
        taken = self.found >= 0
        rows = zip((taken & self.right).double().mean(1).tolist(), (taken & ~self.right).double().mean(1).tolist())
        return list(rows)


Round = Callable[[int, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class ProgressiveAttentionMiner:
    """Train, take the word each text attends to most, mask it, train again.

    A word is taken where attention is clear: where its entropy is below `max_entropy` bits. Where the prediction was right, it is active
    (the final model should attend to it), else misleading.

    Args:
        rounds: trainings, default 5. max_entropy: in bits; default 4, i.e. as unclear as 16 words alike.
    """

    rounds: int = 5
    max_entropy: float = 4.0

    def __post_init__(self) -> None:
        require_int("rounds", self.rounds, 0)
        require(self.max_entropy > 0, "max_entropy", self.max_entropy, "bits > 0")

    def run(self, train_round: Round, mask: Tensor) -> MinedAttention:
        """The mining loop.

        Args:
            train_round: (number from 0, erased (n, T) bool) -> (scores (n, T), right (n,) bool): trains a NEW model on the texts without
                the erased words (as padding: no attention on them) and says how it attends to each training text, and whether it
                predicts it rightly. The authors take both from the epoch of best training accuracy; scores are attention weights, or
                `smoothgrad_scores`.
            mask: (n, T), which places are words.
        """
        require_tensor("mask", mask, dims=2)
        real = mask.bool().cpu()
        mined = MinedAttention(
            torch.empty(0, len(real), dtype=torch.int64), torch.empty(0, len(real), dtype=torch.bool), real.shape[1]
        )
        for number in range(self.rounds):
            erased = mined.erased()
            scores, right = train_round(number, erased)
            require(scores.shape == real.shape, "train_round", f"scores {tuple(scores.shape)}", f"{tuple(real.shape)}")
            require(right.shape == (len(real),), "train_round", f"right {tuple(right.shape)}", f"({len(real)},)")
            scores = scores.detach().cpu().masked_fill(~real | erased, 0.0)
            mined.found = torch.cat([mined.found, self.take(scores)[None]])
            mined.right = torch.cat([mined.right, right.detach().cpu().bool()[None]])
        return mined

    def take(self, scores: Tensor) -> Tensor:
        """(n,): the place of the largest score of each row (n, T), the first of equals; -1 where the entropy is too high or all are 0."""
        weights = require_tensor("scores", scores, dims=2, floating=True).abs()
        entropy = torch.special.entr(weights.double()).sum(1) / torch.log(torch.tensor(2.0, dtype=torch.float64))
        clear = (entropy < self.max_entropy) & (weights > 0).any(1)
        return torch.where(clear, weights.argmax(1), -1)


def signed_rounds(alphas: Tensor, max_entropy: float = 4.0) -> MinedAttention:
    """Mined sets from rounds as the authors' files keep them: (rounds, n, T), a row negative where the prediction was wrong."""
    require_tensor("alphas", alphas, dims=3, floating=True)
    miner = ProgressiveAttentionMiner(len(alphas), max_entropy)
    found = (
        torch.stack([miner.take(rows) for rows in alphas])
        if len(alphas)
        else torch.empty(0, alphas.shape[1], dtype=torch.int64)
    )
    at = alphas.gather(2, found.clamp(min=0)[..., None])[..., 0] if len(alphas) else alphas[..., 0]
    return MinedAttention(found, at > 0, alphas.shape[2])


def smoothgrad_scores(
    head: Callable[[Tensor], Tensor],
    states: Tensor,
    labels: Tensor,
    mask: Tensor,
    *,
    passes: int = 10,
    noise: float = 0.15,
    generator: torch.Generator | None = None,
    noises: Tensor | None = None,
) -> Tensor:
    """Word importance in place of attention (the journal paper): gradient times state, averaged over noisy passes. (B, T), rows sum to 1.

    s_t = sum over channels of states * d logit[label] / d states, at states with N(0, noise^2) added, mean over `passes`; less the row's
    minimum (over all places, those outside the mask counting 0), outside the mask 0, divided by the row's sum.

    Args:
        head: states (B, T, dim) -> logits (B, classes), in eval mode: `lambda s: model.classify(s, context, aspect).logits`.
        mask: (B, T), words of the context. noises: (passes, B, T, dim), to give the noise itself.
    """
    require_tensor("states", states, dims=3, floating=True)
    require(mask.shape == states.shape[:2], "mask", f"shape {tuple(mask.shape)}", f"{tuple(states.shape[:2])}")
    require_int("passes", passes, 1)
    total = torch.zeros(states.shape[:2], dtype=states.dtype, device=states.device)
    keep = mask.to(states.dtype)
    for number in range(passes if noises is None else len(noises)):
        if noises is None:
            drawn = torch.randn(states.shape, generator=generator, dtype=states.dtype).to(states.device) * noise
        else:
            drawn = noises[number]
        point = states.detach().requires_grad_()
        with torch.enable_grad():
            logits = head(point + drawn)
            chosen = logits.gather(1, labels[:, None]).sum()
            total += (torch.autograd.grad(chosen, point)[0] * point.detach()).sum(-1) * keep
    mean = total / (passes if noises is None else len(noises))
    raised = (mean - mean.amin(1, keepdim=True)) * keep
    return raised / raised.sum(1, keepdim=True).clamp(min=torch.finfo(raised.dtype).tiny)
