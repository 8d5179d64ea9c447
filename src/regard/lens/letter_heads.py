"""How a model picks the letter of the right answer: kinds of heads, and the few dimensions in which they work.

Paper: Lieberum et al. 2023, "Does Circuit Analysis Interpretability Scale? Evidence from Multiple Choice Capabilities in
Chinchilla" (arXiv 2307.09458). The model is closed and no code is published. Nodes that write the answer are found by
`direct_effects` and `total_effects` with `LabelMargin`; here are the kinds of heads by what the last token reads (attention times
the norm of the value), and the subspaces.

Set here where the text leaves it open: scores of the kinds as below; queries and keys are taken after the rotary embedding at their real
positions (the paper's model has relative positions of another kind); means are taken for each label place by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .._checks import require, require_int, require_tensor
from ..integrations.transformers import attach
from ..methods.call import AttentionCall
from ..methods.edits.project_head import HeadSubspace
from .head_scores import HeadScores
from .patch_work import Inputs, ids_and_mask

__all__ = ["head_subspace", "letter_heads", "nodes_needed", "value_weighted_attention"]

KINDS = ("correct letter", "single letter", "uniform", "amplification")


@torch.no_grad()
def _observe(model: Any, inputs: Inputs, look: Callable[[AttentionCall], None], batch_size: int = 16) -> None:
    """`look` at every attention call of the main tower, some prompts at a time."""
    given = ids_and_mask("inputs", inputs)
    ids = given["input_ids"]
    mask = given.get("attention_mask", torch.ones_like(ids))
    training = model.training
    model.eval()
    try:
        with attach(model) as session:

            def seen(call: AttentionCall) -> None:
                if call.kind == "self" and call.tower == session.main_tower:
                    look(call)

            session.observers.append(seen)
            for begin in range(0, len(ids), batch_size):
                rows = slice(begin, begin + batch_size)
                position = (mask[rows].cumsum(1) - 1).clamp(min=0)
                parts = {"input_ids": ids[rows], "attention_mask": mask[rows], "position_ids": position}
                model(**{name: value.to(model.device) for name, value in parts.items()}, use_cache=False)
    finally:
        model.train(training)


def _values(call: AttentionCall, part: str) -> Tensor:
    whole = getattr(call, part)
    return whole.repeat_interleave(call.num_heads // whole.shape[1], 1)


@torch.no_grad()
def value_weighted_attention(model: Any, inputs: Inputs) -> Tensor:
    """What the last token reads from each token: attention weight times the norm of the value, (P, L, H, T) float32.

    Args:
        model: a decoder-only transformers model. inputs: ids (P, T), or a mapping with a left-padded mask.
    """
    layers: dict[int, list[Tensor]] = {}

    def look(call: AttentionCall) -> None:
        weights = call.weights(rows=[-1])[:, :, 0]
        layers.setdefault(call.layer, []).append((weights * _values(call, "v").float().norm(dim=-1)).float().cpu())

    _observe(model, inputs, look)
    return torch.stack([torch.cat(layers[layer]) for layer in sorted(layers)], dim=1)


def letter_heads(read: Tensor, labels: Tensor, right: Tensor, recent: int = 3) -> dict[str, HeadScores]:
    """Scores of the paper's kinds of heads.

        kinds = letter_heads(value_weighted_attention(model, batch.clean), batch.labels, place_of_the_right_label)

    Args:
        read: (P, L, H, T), of `value_weighted_attention`; taken as shares of its sum over T. labels: (P, n) places of the labels.
        right: (P,) which of them is right, in [0, n). recent: tokens at the end that count as the end.

    Returns:
        "correct letter": share on the right label less the mean share on the others. "single letter": how much larger that is
        for the letter for which it is largest than on average over letters. "uniform": share on all labels, times the entropy
        among them (1 = all alike). "amplification": share on the last `recent` tokens. Each (L, H).
    """
    require_tensor("read", read, dims=4, floating=True)
    require_tensor("labels", labels, dims=2)
    count, places = labels.shape
    require(len(read) == count == len(right), "labels", f"{count} prompts", f"{len(read)}, like read and right")
    require(bool(((right >= 0) & (right < places)).all()), "right", right.tolist()[:4], f"numbers in [0, {places})")
    require_int("recent", recent, 1)
    share = read / read.sum(-1, keepdim=True).clamp(min=1e-30)
    at = labels[:, None, None].expand(-1, *read.shape[1:3], -1)
    mine = share.gather(-1, at)  # (P, L, H, n)
    hit = mine.gather(-1, right[:, None, None, None].expand(*mine.shape[:3], 1))[..., 0]
    lead = hit - (mine.sum(-1) - hit) / max(1, places - 1)
    by_letter = torch.stack([lead[right == j].mean(0) for j in range(places) if bool((right == j).any())])
    among = mine / mine.sum(-1, keepdim=True).clamp(min=1e-30)
    entropy = -(among * among.clamp(min=1e-30).log()).sum(-1) / torch.tensor(float(places)).log()
    values = {
        "correct letter": lead,
        "uniform": mine.sum(-1) * entropy,
        "amplification": share[..., -recent:].sum(-1),
    }
    tables = {kind: HeadScores(value.mean(0), value, kind) for kind, value in values.items()}
    tables["single letter"] = HeadScores(by_letter.max(0).values - by_letter.mean(0), None, "single letter")
    return {kind: tables[kind] for kind in KINDS}


@torch.no_grad()
def head_subspace(model: Any, inputs: Inputs, labels: Tensor, layer: int, head: int, rank: int = 3) -> HeadSubspace:
    """The `rank` leading directions of one head's queries (last token), keys and values (label tokens) over prompts.

    Args:
        inputs: ids (P, T), or a mapping with a left-padded mask. labels: (P, n) places of the label tokens.
        rank: directions kept, at most the head's dimension.

    Raises `ValueError` for a head that the model has not, or fewer prompts than would give a direction.
    """
    require_int("rank", rank)
    require_tensor("labels", labels, dims=2)
    given = ids_and_mask("inputs", inputs)
    fits = len(labels) == len(given["input_ids"])
    require(fits, "labels", f"{len(labels)} rows", f"{len(given['input_ids'])}, one a prompt")
    require(len(labels) >= 2, "inputs", f"{len(labels)} prompts", "at least two")
    found: dict[str, list[Tensor]] = {part: [] for part in "qkv"}
    shape = [0, 0]

    def look(call: AttentionCall) -> None:
        shape[:] = [max(shape[0], call.layer + 1), call.num_heads]
        if call.layer != layer or not 0 <= head < call.num_heads:
            return
        begin = sum(map(len, found["q"]))
        mine = labels[begin : begin + call.batch].to(call.q.device)
        batch = torch.arange(call.batch, device=call.q.device)[:, None]
        found["q"].append(call.q[:, head, -1:].cpu().double())
        for part in "kv":
            found[part].append(_values(call, part)[:, head][batch, mine].cpu().double())

    _observe(model, inputs, look)
    require(bool(found["q"]), "layer, head", (layer, head), f"layers in [0, {shape[0]}), heads in [0, {shape[1]})")
    means, bases, explained = {}, {}, {}
    for part, values in found.items():
        whole = torch.cat(values)
        require(rank <= whole.shape[-1], "rank", rank, f"at most {whole.shape[-1]}, the head's dimension")
        means[part] = whole.mean(0)
        centred = (whole - means[part]).flatten(0, 1)
        _, sizes, directions = torch.linalg.svd(centred, full_matrices=True)
        bases[part] = directions[:rank].T.contiguous()
        explained[part] = float(sizes[:rank].square().sum() / sizes.square().sum().clamp(min=1e-30))
    return HeadSubspace(layer, head, means, bases, explained)


def nodes_needed(effects: Mapping[str, HeadScores], share: float = 0.8) -> int:
    """How many nodes, largest effect first, make up `share` of all effect that goes the way the sum goes.

    Args:
        effects: tables of different kinds of nodes, as {"heads": direct_effects(...), "mlps": direct_effects(..., of="mlp")}.

    Nodes that act against the sum are left out: measured by the sum itself, one large node can seem to be all of it.
    """
    require(0 < share <= 1, "share", share, "a share in (0, 1]")
    values = torch.cat([table.scores.flatten() for table in effects.values()])
    helping = (values * (1 if float(values.sum()) >= 0 else -1)).clamp(min=0).sort(descending=True).values
    reached = helping.cumsum(0) >= share * helping.sum() * (1 - 1e-9)
    return int(reached.int().argmax()) + 1
