"""Simple probes: what kind of thing each head does on a prompt. Each gives a `HeadScores` table [layers, heads].

All read a `regard.record(...)` and make weights layer by layer, a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._checks import require_int
from .head_scores import HeadScores
from .record import Record

_ROWS = 256


Probe = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""`probe(weights (B, H, n, M), rows (n,)) -> (value, counts)`, each (B, H, n): rows that do not count are left out of the mean."""


def attention_entropy(record: Record) -> HeadScores:
    """Mean over queries of the entropy of their attention, as a share of the most it could be (log of the visible keys); in [0, 1].

    0: every query reads one key; 1: all visible keys alike. Queries that see one key only are left out.
    """
    return _over_rows(record, {"entropy": _entropy})["entropy"]


def sink_mass(record: Record, sink: int = 1) -> HeadScores:
    """Mean attention mass on the first `sink` tokens, over queries that come after them; in [0, 1]."""
    return _over_rows(record, {"sink mass": _sink_mass(require_int("sink", sink, 1))})["sink mass"]


def locality(record: Record, window: int = 8) -> HeadScores:
    """Mean attention mass on the last `window` tokens, the query's own included, over queries that see more than those; in [0, 1]."""
    return _over_rows(record, {"locality": _locality(require_int("window", window, 1))})["locality"]


def previous_token(record: Record) -> HeadScores:
    """Mean attention mass on the token just before the query; in [0, 1]."""
    return _over_rows(record, {"previous token": _previous_token})["previous token"]


def induction(record: Record) -> HeadScores:
    """Mean attention mass on tokens that followed earlier copies of the query's token ("A B ... A" reads B); in [0, 1].

    Only queries whose token occurred before count; NaN where a prompt repeats nothing (Olsson et al. 2022).
    """
    return _over_rows(record, {"induction": _induction(record)})["induction"]


def duplicate_token(record: Record) -> HeadScores:
    """Mean attention mass on earlier copies of the query's own token; in [0, 1].

    Only queries whose token occurred before count; NaN where a prompt repeats nothing (Wang et al. 2022, the IOI circuit).
    """
    return _over_rows(record, {"duplicate token": _duplicate_token(record)})["duplicate token"]


def profile(record: Record) -> dict[str, HeadScores]:
    """All probes of this file, with their defaults, in one pass over the weights."""
    probes: dict[str, Probe] = {
        "entropy": _entropy,
        "sink mass": _sink_mass(1),
        "locality": _locality(8),
        "previous token": _previous_token,
    }
    if record.tokens is not None:
        probes["induction"] = _induction(record)
        probes["duplicate token"] = _duplicate_token(record)
    return _over_rows(record, probes)


def _entropy(weights: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    visible = (rows + 1).float()
    value = torch.special.entr(weights).sum(-1) / visible.log().clamp(min=1e-9)
    return value, (visible > 1).expand(value.shape)


def _sink_mass(sink: int) -> Probe:
    def mass(weights: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        value = weights[..., :sink].sum(-1)
        return value, (rows >= sink).expand(value.shape)

    return mass


def _locality(window: int) -> Probe:
    def mass(weights: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        distance = rows[:, None] - torch.arange(weights.shape[-1], device=weights.device)
        value = (weights * (distance < window)).sum(-1)
        return value, (rows >= window).expand(value.shape)

    return mass


def _previous_token(weights: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    index = (rows - 1).clamp(min=0)[:, None].expand(*weights.shape[:-1], 1)
    value = weights.gather(-1, index)[..., 0]
    return value, (rows >= 1).expand(value.shape)


def _induction(record: Record) -> Probe:
    same = _same_token(record)
    follows = torch.zeros_like(same)
    follows[:, :, 1:] = same[:, :, :-1]
    return _mass_on(follows & torch.ones_like(same[0]).tril())


def _duplicate_token(record: Record) -> Probe:
    same = _same_token(record)
    return _mass_on(same & torch.ones_like(same[0]).tril(-1))


def _same_token(record: Record) -> Tensor:
    """Which keys hold the query's token, bool (B, N, N)."""
    tokens = record.tokens
    if tokens is None:
        raise ValueError("record: it has no tokens, need a record of a language model")
    return tokens[:, :, None] == tokens[:, None, :]


def _mass_on(keys: Tensor) -> Probe:
    """The mass on some keys of each query, bool (B, N, N); queries that have none do not count."""

    def mass(weights: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        wanted = keys[:, rows.cpu()].to(weights.device)[:, None]
        value = (weights * wanted).sum(-1)
        return value, wanted.any(-1).expand(value.shape)

    return mass


def _over_rows(record: Record, probes: dict[str, Probe]) -> dict[str, HeadScores]:
    """The mean of each probe over batch and counted rows, layer by layer, a few rows of weights at a time."""
    tables: dict[str, list[Tensor]] = {name: [] for name in probes}
    for layer in record.layers:
        length, device = record.q(layer).shape[2], record.q(layer).device
        total = {name: torch.zeros((), dtype=torch.float64, device=device) for name in probes}
        count = dict(total)
        for start in range(0, length, _ROWS):
            rows = torch.arange(start, min(length, start + _ROWS), device=device)
            weights = record.weights(layer, rows=rows)
            for name, probe in probes.items():
                value, counts = probe(weights, rows)
                total[name] = total[name] + (value * counts).sum((0, 2)).double()
                count[name] = count[name] + counts.sum((0, 2)).double()
        for name, table in tables.items():
            table.append((total[name] / count[name]).float().cpu())
    return {name: HeadScores(torch.stack(table), name=name) for name, table in tables.items()}
