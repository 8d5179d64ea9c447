"""The head atlas: what each head of a language model is for, as one table of scores a kind of head.

| kind | score | prompts | after |
|---|---|---|---|
| retrieval | share of a hidden needle that the head copies | needles in prose | Wu et al. 2024 |
| induction | mass on what followed earlier copies of the query's token | random tokens, twice | Olsson et al. 2022 |
| duplicate token | mass on earlier copies of the query's token | random tokens, twice | Wang et al. 2022 |
| previous token | mass on the token before | prose | Elhage et al. 2021 |
| sink | mass on the first token | prose | Xiao et al. 2023 |
| local | mass on the last 8 tokens | prose | - |

Repeated random tokens have nothing to predict by but the repetition, so that what looks like induction there is no chance of the text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._checks import bad_value, require, require_int, require_name
from .._files import write_whole
from .._prose import haystack_text
from .head_plot import plot_scores
from .head_scores import Head, HeadScores
from .needle import NeedleHaystack, NeedleSample
from .probes import profile
from .record import record
from .retrieval_heads import retrieval_heads

__all__ = ["HeadAtlas", "head_atlas", "repeated_tokens"]

THRESHOLDS = {
    "retrieval": 0.1, "induction": 0.3, "duplicate token": 0.3, "previous token": 0.3, "sink": 0.7, "local": 0.7,
}  # fmt: skip
"""From where on a head is called by the name. 0.1 is that of Wu et al.; the others are ours, and no more than a manner of speaking."""
KINDS = tuple(THRESHOLDS)


@dataclass(eq=False)
class HeadAtlas:
    """Tables of scores, one a kind of head.

    Attributes:
        tables: kind -> `HeadScores` (L, H), scores in [0, 1] (retrieval may pass 1). info: model and settings, JSON values.
    """

    tables: dict[str, HeadScores]
    info: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, kind: str) -> HeadScores:
        return self.tables[require_name("kind", kind, self.tables)]

    def heads(self, kind: str, threshold: float | None = None) -> list[Head]:
        """Heads of a kind, best first: those above `threshold` (None: the kind's own, `THRESHOLDS`)."""
        return self[kind].above(THRESHOLDS.get(kind, 0.5) if threshold is None else threshold)

    def kinds_of(self, layer: int, head: int) -> list[str]:
        """All that one head is, by the kinds' own thresholds."""
        shape = next(iter(self.tables.values())).scores.shape
        require(0 <= layer < shape[0] and 0 <= head < shape[1], "head", (layer, head), f"within {tuple(shape)}")
        return [kind for kind in self.tables if (layer, head) in self.heads(kind)]

    def plot(self, path: str | Path) -> Path:
        """A heat map of every table, in one picture."""
        return plot_scores(self.tables, path, title=str(self.info.get("model", "")))

    def save(self, path: str | Path) -> Path:
        """Write all tables to one file, whole or not at all: `.safetensors`, or `.json` (with the heads of each kind)."""
        path = Path(path)
        if path.suffix == ".json":
            listed = {
                kind: {
                    "threshold": THRESHOLDS.get(kind),
                    "heads": [[*head, round(table[head], 6)] for head in self.heads(kind)],
                    "scores": [[None if x != x else round(x, 6) for x in row] for row in table.scores.tolist()],
                }
                for kind, table in self.tables.items()
            }
            return write_whole(path, json.dumps({"info": self.info, "kinds": listed}) + "\n")
        if path.suffix == ".safetensors":
            from safetensors.torch import save

            tensors = {kind: table.scores.float().contiguous() for kind, table in self.tables.items()}
            return write_whole(path, save(tensors, {"info": json.dumps(self.info)}))
        raise bad_value("path", str(path), "a name that ends in .safetensors or .json")

    @classmethod
    def load(cls, path: str | Path) -> HeadAtlas:
        """Read what `save` wrote, in either form."""
        path = Path(path)
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, framework="pt") as file:
                found = {kind: file.get_tensor(kind) for kind in file.keys()}  # noqa: SIM118
                info = json.loads((file.metadata() or {}).get("info", "{}"))
        elif path.suffix == ".json":
            try:
                kept = json.loads(path.read_text())
                info = kept["info"]
                found = {
                    kind: torch.tensor([[float("nan") if x is None else x for x in row] for row in entry["scores"]])
                    for kind, entry in kept["kinds"].items()
                }
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise bad_value("path", str(path), f"a file that HeadAtlas.save wrote ({error})") from None
        else:
            raise bad_value("path", str(path), "a name that ends in .safetensors or .json")
        order = [kind for kind in KINDS if kind in found] + sorted(set(found) - set(KINDS))
        return cls({kind: HeadScores(found[kind], name=kind) for kind in order}, info)


@torch.no_grad()
def head_atlas(
    model: Any,
    tokenizer: Any,
    *,
    kinds: Iterable[str] = KINDS,
    prompts: int = 4,
    length: int = 256,
    samples: NeedleHaystack | Iterable[NeedleSample] | None = None,
    text: str | None = None,
    seed: int = 0,
) -> HeadAtlas:
    """Score every head of a causal language model by each kind of the atlas.

        atlas = regard.lens.head_atlas(model, tokenizer)
        with regard.attach(model, regard.MaskHeads(atlas.heads("induction"), mode="zero", phase="all")):
            ...

    Args:
        model, tokenizer: any causal language model that `regard.attach` can join.
        kinds: which of "retrieval", "induction", "duplicate token", "previous token", "sink", "local"; retrieval takes the longest.
        prompts: pieces of prose, and of random tokens, that are looked at. length: tokens of each (the random ones: half, twice).
        samples: needles for the retrieval score (see `retrieval_heads`, with the answers fed); None = 12 of 256 and 512 tokens.
        text: the prose; None = Python's own. seed: of the random tokens.

    Raises:
        ValueError: a kind that is not known, or text too short for the prompts asked for.
    """
    wanted = [require_name("kinds", kind, KINDS) for kind in kinds]
    require(bool(wanted), "kinds", "none", f"some of {KINDS}")
    require_int("prompts", prompts, 1)
    require_int("length", length, 32)
    tables: dict[str, HeadScores] = {}
    if "retrieval" in wanted:
        tables["retrieval"] = retrieval_heads(model, tokenizer, samples, decode="forced")
    if {"induction", "duplicate token"} & set(wanted):
        ids = repeated_tokens(tokenizer, prompts, length // 2, seed=seed, vocabulary=_vocabulary(model))
        tables |= _profile(model, ids, {"induction": "induction", "duplicate token": "duplicate token"})
    if {"previous token", "sink", "local"} & set(wanted):
        ids = _prose(tokenizer, prompts, length, haystack_text() if text is None else text)
        tables |= _profile(model, ids, {"previous token": "previous token", "sink": "sink mass", "local": "locality"})
    info: dict[str, Any] = {"model": str(getattr(model.config, "_name_or_path", "")) or type(model).__name__}
    info |= {"prompts": prompts, "length": length, "seed": seed}
    return HeadAtlas({kind: tables[kind] for kind in wanted}, info)


def repeated_tokens(tokenizer: Any, batch: int, length: int, *, seed: int = 0, vocabulary: int | None = None) -> Tensor:
    """Random tokens, no two of a row alike where the vocabulary allows it, and the same again: (batch, 2 * length) int64.

    Special tokens never occur, but for the tokenizer's begin-of-text token, which then stands in front: (batch, 1 + 2 * length).
    """
    size = vocabulary or len(tokenizer)
    special = {int(i) for i in getattr(tokenizer, "all_special_ids", ())}
    free = torch.tensor([i for i in range(size) if i not in special])
    require(len(free) > 0, "tokenizer", f"{size} tokens, all special", "some that are not")
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(batch):
        some = free[torch.randperm(len(free), generator=generator)]
        rows.append(some.repeat(-(-length // len(some)))[:length])
    once = torch.stack(rows)
    begin = getattr(tokenizer, "bos_token_id", None)
    if begin is None or list(tokenizer("a")["input_ids"][:1]) != [begin]:
        return torch.cat([once, once], dim=1)
    return torch.cat([once.new_full((batch, 1), int(begin)), once, once], dim=1)


def _vocabulary(model: Any) -> int:
    return model.get_input_embeddings().weight.shape[0]


def _prose(tokenizer: Any, count: int, length: int, text: str) -> Tensor:
    """(count, length) tokens from places spread over the text."""
    ids = torch.as_tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    require(len(ids) >= length, "text", f"{len(ids)} tokens", f"at least length = {length}")
    room = len(ids) - length
    return torch.stack([ids[start : start + length] for start in (room * i // count for i in range(count))])


def _profile(model: Any, ids: Tensor, names: Mapping[str, str]) -> dict[str, HeadScores]:
    """The probes `names` (ours -> the probe's) on prompts, the mean over them."""
    device = next(model.parameters()).device
    parts = [profile(record(model, {"input_ids": row[None].to(device)})) for row in ids]
    return {kind: HeadScores.from_runs([part[name].scores for part in parts], kind) for kind, name in names.items()}
