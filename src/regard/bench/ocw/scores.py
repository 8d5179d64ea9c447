"""How well walls were solved: groups and whole walls found, agreement of the partitions, distance of the wrong blocks; connections.

The metrics of OCW (arXiv 2306.11167), TaatiTeam/OCW @ d092d89 (MIT), `src/ocw/evaluate_only_connect.py`, `src/ocw/utils.py`. What differs:
walls without an answer score as sixteen words that are not there, where the code stops; BERTScore is left to a function of yours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..._checks import require
from ...lens.rouge import rouge1_f1
from .walls import SIDE, Wall

__all__ = ["WallScore", "WallsReport", "ocw_score", "score_connections", "score_groups"]

Groups = Sequence[Sequence[str]]


@dataclass(frozen=True)
class WallScore:
    """How one wall was solved.

    Attributes:
        correct_groups: groups found whole, 0 to 4. full_wall: all of them. ami, ari, fms: adjusted mutual information, adjusted Rand
            index and Fowlkes-Mallows score of the two partitions (1 is perfect, the first two 0 by chance). wd: distance of the wrong
            blocks, 0 to 1; it depends on the order in which wrong groups are given. invented: words that are not in the wall.
    """

    wall_id: str
    correct_groups: int
    full_wall: bool
    ami: float
    ari: float
    fms: float
    wd: float
    invented: int


@dataclass(frozen=True)
class WallsReport:
    """Scores of many walls: `walls`, and `total`: means of ami, ari, fms and wd, sums of correct_groups, full_wall and invented."""

    walls: list[WallScore]
    connections: list[dict[str, float]]

    @property
    def total(self) -> dict[str, float]:
        count = len(self.walls)
        made = {name: sum(getattr(wall, name) for wall in self.walls) / count for name in ("wd", "ami", "ari", "fms")}
        made |= {
            name: sum(getattr(wall, name) for wall in self.walls)
            for name in ("correct_groups", "full_wall", "invented")
        }
        for name in self.connections[0] if self.connections else ():
            made[name] = sum(one[name] for one in self.connections) / len(self.connections)
        return made | {"walls": count}

    def as_dict(self) -> dict[str, Any]:
        """In the layout of the authors' result files: "global" and "granular"."""
        granular = [asdict(wall) for wall in self.walls]
        for one, more in zip(granular, self.connections):
            one.update(more)
        return {"global": self.total, "granular": granular}

    def markdown(self) -> str:
        """A table of the totals."""
        rows = [f"| {name} | {value:.4g} |" for name, value in self.total.items()]
        return "\n".join(("| figure | value |", "|---|---:|", *rows)) + "\n"


def score_groups(predicted: Groups | None, wall: Wall | Groups) -> WallScore:
    """Score the groups predicted for a wall.

    Args:
        predicted: four groups of four words, in any order and case; missing ones count as empty words, what is too much is cut off. None:
            nothing. wall: a `Wall`, or its four true groups.

    Needs scikit-learn.
    """
    try:
        from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score, fowlkes_mallows_score
    except ImportError as error:
        raise ImportError("score_groups: needs scikit-learn (pip install scikit-learn)") from error
    groups = wall.groups if isinstance(wall, Wall) else wall
    fits = len(groups) == SIDE and all(len(group) == SIDE for group in groups)
    require(fits, "wall", [len(group) for group in groups], "four groups of four words")
    truth = [sorted(word.lower() for word in group) for group in groups]
    found = [sorted(word.lower() for word in group) for group in _square(predicted)]
    right = sum(group in found for group in truth)
    belongs = {word: i for i, group in enumerate(truth) for word in group}
    labels, fresh = [], SIDE
    for word in (word for group in found for word in group):
        if word in belongs:
            labels.append(belongs[word])
        else:
            labels.append(fresh)
            fresh += 1
    known = [belongs[word] for group in truth for word in group]
    return WallScore(
        wall.wall_id if isinstance(wall, Wall) else "",
        right,
        right == SIDE,
        float(adjusted_mutual_info_score(known, labels)),
        float(adjusted_rand_score(known, labels)),
        float(fowlkes_mallows_score(known, labels)),
        _distance(_blocks(labels), _blocks(known)),
        fresh - SIDE,
    )


def _square(predicted: Groups | None) -> list[list[str]]:
    rows = [[str(word) for word in group][:SIDE] for group in (predicted or [])][:SIDE]
    rows += [[]] * (SIDE - len(rows))
    return [row + [""] * (SIDE - len(row)) for row in rows]


def _blocks(labels: list[int]) -> list[list[int]]:
    return [labels[i : i + SIDE] for i in range(0, SIDE * SIDE, SIDE)]


def _distance(found: list[list[int]], truth: list[list[int]]) -> float:
    """Blocks that are equal go; the others meet in order: mean over the four of min(1, mean |sorted difference|)."""
    left, rest = [], list(truth)
    for block in found:
        if block in rest:
            rest.remove(block)
        else:
            left.append(block)
    total = 0.0
    for block, other in zip(left, rest):
        total += min(sum(abs(a - b) for a, b in zip(sorted(block), sorted(other))) / SIDE, 1.0)
    return total / SIDE


def score_connections(
    predicted: Sequence[str] | None,
    truth: Sequence[str],
    similarity: Callable[[list[str], list[str]], Iterable[float]] | None = None,
) -> dict[str, float]:
    """Means over a wall's four connections: `exact_match` and `rouge1_f1`, in lower case; `similarity` where that function is given.

    Args:
        predicted: in the order of the truth; None or missing ones count as empty. similarity: (predicted, truth) -> a number each, such as
            the F1 of BERTScore (English, rescaled with its baseline, as in the paper).
    """
    wanted = [one.lower().strip() for one in truth]
    given = [str(one).lower().strip() for one in (predicted or [])][: len(wanted)]
    given += [""] * (len(wanted) - len(given))
    require(bool(wanted), "truth", "no connection", "at least one")
    made = {
        "exact_match": sum(a == b for a, b in zip(given, wanted)) / len(wanted),
        "rouge1_f1": sum(rouge1_f1(b, a) for a, b in zip(given, wanted)) / len(wanted),
    }
    if similarity is not None:
        each = [float(one) for one in similarity(given, wanted)]
        require(len(each) == len(wanted), "similarity", f"{len(each)} numbers", f"{len(wanted)}")
        made["similarity"] = sum(each) / len(each)
    return made


def ocw_score(
    predicted: Mapping[str, Any] | Sequence[Any],
    walls: Sequence[Wall],
    similarity: Callable[[list[str], list[str]], Iterable[float]] | None = None,
) -> WallsReport:
    """Score predictions for walls.

    Args:
        predicted: groups for each wall, in the order of `walls`; or a mapping from wall ids to groups; or records {"wall_id",
            "predicted_groups", "predicted_connections"} as the authors' prediction files hold them. Walls without any score as unanswered.
        walls: what was asked. similarity: as `score_connections`.

    Connections are scored where any are given.
    """
    require(len(walls) > 0, "walls", "none", "at least one")
    groups: dict[str, Any] = {}
    said: dict[str, Any] = {}
    if isinstance(predicted, Mapping):
        groups = dict(predicted)
    elif len(predicted) and isinstance(predicted[0], Mapping):
        for record in predicted:
            require("wall_id" in record, "predicted", sorted(record), "'wall_id' in each record")
            groups[str(record["wall_id"])] = record.get("predicted_groups")
            if record.get("predicted_connections") is not None:
                said[str(record["wall_id"])] = record["predicted_connections"]
    else:
        require(len(predicted) == len(walls), "predicted", f"{len(predicted)} walls", f"{len(walls)}, one for each")
        groups = {wall.wall_id: one for wall, one in zip(walls, predicted)}
    unknown = groups.keys() - {wall.wall_id for wall in walls}
    require(not unknown, "predicted", sorted(unknown)[:3], "ids of the walls given")
    connections = [score_connections(said.get(w.wall_id), w.connections, similarity) for w in walls] if said else []
    return WallsReport([score_groups(groups.get(wall.wall_id), wall) for wall in walls], connections)
