"""Pauses in a prompt: a learned token that says nothing and gives the model time, put where a long prompt is read worst (SCA, 057).

"Sorry, Come Again?" 2024 (arXiv 2403.18976); pauses to think: Goyal et al. 2024 (ICLR, arXiv 2310.02226). No code is known. Where pauses go
and how they are taught is open in the paper: here they go behind clauses of the first third and before the middle third, and one
embedding is trained while the model stays as it is (the paper's "reverse proxy tuning" changes the model:
`methods.decoders.ProxyMixer` is its mixture).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import bad_type, require, require_int, require_tensor
from .masked_lm import MaskedCollator, weighted_lm_loss
from .runner import Fitted, fit

__all__ = ["PAUSE", "PauseToken", "fit_pause", "insert_pause", "pause_positions"]

PAUSE = -1
"""Stands for a pause among token ids; `PauseToken` gives it its embedding."""
_CLAUSE_ENDS = (",", ";", ":", ".", "!", "?")
_CONJUNCTIONS = {"and", "but", "or", "because", "if", "although", "while", "when", "which", "that", "since", "so"}


def insert_pause(ids: Tensor, positions: Sequence[int], k: int = 1, token: int = PAUSE) -> Tensor:
    """Put `k` tokens before each of the positions (of the ids as they are; the length means the end): (N,) or (B, N) -> as long as it gets.

    k=0 gives the ids back.
    """
    require_tensor("ids", ids)
    require_int("k", k, 0)
    length = ids.shape[-1]
    bad = [p for p in positions if not 0 <= p <= length]
    require(not bad, "positions", bad, f"places from 0 to {length}")
    parts, last = [], 0
    pause = torch.full((*ids.shape[:-1], k), token, dtype=ids.dtype, device=ids.device)
    for position in sorted(positions):
        parts += [ids[..., last:position], pause]
        last = position
    return torch.cat([*parts, ids[..., last:]], dim=-1)


def pause_positions(tokenizer: Any, ids: Sequence[int] | Tensor, most: int = 4) -> list[int]:
    """Where to pause: before the middle third, and behind clauses and before conjunctions of the first third, the latest ones; sorted."""
    require_int("most", most, 1)
    listed = [int(i) for i in ids]
    third = len(listed) // 3
    texts = [tokenizer.decode([i]) for i in listed[: third + 1]]
    found = {
        place
        for place in range(1, third)
        if texts[place - 1].strip().endswith(_CLAUSE_ENDS) or texts[place].strip().lower() in _CONJUNCTIONS
    }
    return sorted([third, *sorted(found, reverse=True)[: most - 1]])


class PauseToken(nn.Module):
    """The embedding of a pause, begun as the mean of a model's embeddings.

    `embed(model, ids)` gives embeddings of ids in which `PAUSE` (-1) may stand: `model(inputs_embeds=...)`, and
    `model.generate(inputs_embeds=...)` as well.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        table = model.get_input_embeddings().weight  # type: ignore[operator]
        self.vector = nn.Parameter(table.detach().float().mean(0))

    def embed(self, model: nn.Module, ids: Tensor) -> Tensor:
        """ids (B, N) -> (B, N, D)."""
        require_tensor("ids", ids, dims=2)
        embeds = model.get_input_embeddings()(ids.clamp(min=0))  # type: ignore[operator]
        return torch.where((ids == PAUSE)[..., None], self.vector.to(embeds.dtype), embeds)

    def logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Of a batch of `MaskedCollator`, (B, N, V)."""
        given = {name: batch[name] for name in ("attention_mask", "position_ids") if name in batch}
        return model(inputs_embeds=self.embed(model, batch["input_ids"]), use_cache=False, **given).logits


def fit_pause(
    model: nn.Module,
    tokenizer: Any,
    samples: Sequence[tuple[str, str]],
    *,
    k: int = 3,
    most: int = 4,
    steps: int = 100,
    batch: int = 4,
    lr: float = 1e-2,
    out: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> tuple[PauseToken, Fitted]:
    """Teach a pause: prompts with pauses in them, loss on the answers alone; only the pause's embedding is trained.

    Args:
        samples: (prompt, answer) texts. k: pauses at each place, of which there are at most `most` (`pause_positions`).
        steps, lr, out, seed, progress: as in `regard.losses.fit`; batch: samples a step.

    Raises:
        ValueError: no sample. TypeError: samples that are not pairs of texts.
    """
    require(len(samples) > 0, "samples", "none", "at least one (prompt, answer)")
    for sample in samples:
        if len(sample) != 2 or not all(isinstance(text, str) for text in sample):
            raise bad_type("samples", sample, "(prompt, answer) pairs of texts")
    collate = MaskedCollator(tokenizer)
    prepared = []
    for prompt, answer in samples:
        ids = torch.tensor(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        paused = insert_pause(ids, pause_positions(tokenizer, ids, most), k)
        prepared.append([(paused.tolist(), 0.0), (answer, 1.0)])
    device = next(model.parameters()).device
    pause = PauseToken(model).to(device)

    def batches(number: int) -> dict[str, Tensor]:
        drawn = torch.randint(
            len(prepared), (batch,), generator=torch.Generator().manual_seed(seed * 1_000_003 + number)
        )
        return {name: value.to(device) for name, value in collate([prepared[i] for i in drawn]).items()}

    def loss(made: dict[str, Tensor]) -> Tensor:
        return weighted_lm_loss(pause.logits(model, made), made["labels"], made["weights"])

    fitted = fit(
        pause, loss, batches, steps=steps, lr=lr, frozen=model, out=out, seed=seed, progress=progress, label="pause token"
    )  # fmt: skip
    return pause, fitted
