"""Walls: reading the published data, and walls whose groups come from different walls, so that nothing misleads.

Large Language Models are Fixated by Red Herrings (Alavi Naeini et al. 2023, arXiv 2306.11167). Code read: TaatiTeam/OCW @ d092d89 (MIT),
`scripts/randomize_test_set.py`, whose random choices are met exactly. What differs: a data set in which no group can be found is an error.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..._checks import bad_type, require, require_int

__all__ = ["Wall", "load_walls", "randomize_walls"]

SIDE = 4


@dataclass(frozen=True)
class Wall:
    """One wall.

    Attributes:
        wall_id. words: the sixteen, shuffled. groups: four of four words. connections: what the groups have in common. group_ids.
        season, episode: of the show, or None. human_groups, human_connections: whether the players found each group, each connection
            (1, 0), empty where not known.
    """

    wall_id: str
    words: tuple[str, ...]
    groups: tuple[tuple[str, ...], ...]
    connections: tuple[str, ...]
    group_ids: tuple[str, ...] = ("", "", "", "")
    season: int | None = None
    episode: int | None = None
    human_groups: tuple[int, ...] = ()
    human_connections: tuple[int, ...] = ()


def load_walls(source: str | Path | Iterable[Mapping[str, Any]], malformed: str = "raise") -> list[Wall]:
    """Walls of the published JSON (`OCW/test.json`), or of records of the same form.

    Args:
        source: a file that holds {"dataset": [...]} or a list; or the records themselves (rows of the Hugging Face data set do).
        malformed: what to do about records that are no wall: "raise", an error that counts them and shows the first; "skip".
    """
    require(malformed in ("raise", "skip"), "malformed", malformed, "'raise' or 'skip'")
    name = "source"
    if isinstance(source, (str, Path)):
        path, name = Path(source), str(source)
        if not path.is_file():
            raise FileNotFoundError(f"source: got {name!r}, need a JSON file of walls")
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{name}: is no JSON ({error}), need a file of walls") from error
        listed = found.get("dataset") if isinstance(found, Mapping) else found
        if not isinstance(listed, list):
            raise ValueError(f"{name}: need a list of walls, or one under 'dataset'")
        source = listed
    walls, wrong, first, count = [], 0, "", 0
    for count, record in enumerate(source, start=1):
        try:
            walls.append(_wall(record))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            wrong += 1
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            first = first or f"record {count}: {what}"
    if wrong and malformed == "raise":
        raise ValueError(
            f"{name}: {wrong} of {count} records are no walls, the first is {first}; need four groups of four words each"
        )
    require(bool(walls), name, "no wall", "at least one")
    return walls


def _wall(record: Mapping[str, Any]) -> Wall:
    if not isinstance(record, Mapping):
        raise bad_type("record", record, "an object")
    given = [record["groups"][f"group_{i}"] for i in range(1, SIDE + 1)]
    groups = tuple(tuple(map(str, group["gt_words"])) for group in given)
    if any(len(group) != SIDE for group in groups):
        raise ValueError(f"groups of {[len(group) for group in groups]} words")
    words = tuple(map(str, record.get("words") or [word for group in groups for word in group]))
    if sorted(words) != sorted(word for group in groups for word in group):
        raise ValueError("words that are not those of the groups")
    human = record.get("overall_human_performance") or {}
    connections = record.get("gt_connections") or [group["gt_connection"] for group in given]
    return Wall(
        str(record["wall_id"]),
        words,
        groups,
        tuple(map(str, connections)),
        tuple(str(group.get("group_id", "")) for group in given),
        record.get("season"),
        record.get("episode"),
        tuple(human.get("grouping") or ()),
        tuple(human.get("connections") or ()),
    )


def randomize_walls(walls: Sequence[Wall], seed: int = 42) -> list[Wall]:
    """Each wall keeps its first group and takes three from other walls (never their first): walls without red herrings (OCW-Randomized).

    No group is used twice, no word comes twice in a wall, and the groups of a wall are from different walls. With the published test set
    and the default seed these are the authors' choices. As every group is needed, choices can run out: a `ValueError`; try another seed.
    """
    require_int("seed", seed)
    chance = random.Random(seed)
    by_id = {wall.wall_id: wall for wall in walls}
    require(
        len(by_id) == len(walls), "walls", f"{len(walls)} with {len(by_id)} different ids", "an id of its own for each"
    )
    used: set[tuple[str, int]] = set()
    made = []
    for wall in walls:
        from_walls, words = {wall.wall_id}, set(wall.groups[0])
        groups, connections, ids = [wall.groups[0]], [wall.connections[0]], [wall.group_ids[0]]
        people = [(wall.human_groups[:1], wall.human_connections[:1])]
        while len(groups) < SIDE:
            others = sorted(by_id.keys() - from_walls)
            fitting = any(
                (other, place) not in used and words.isdisjoint(by_id[other].groups[place])
                for other in others
                for place in range(1, SIDE)
            )
            require(
                fitting, "walls", f"{len(walls)} walls", f"more: no group is left that fits into wall {wall.wall_id!r}"
            )
            while True:
                other = by_id[chance.choice(others)]
                place = chance.choice(range(SIDE - 1)) + 1
                if (other.wall_id, place) not in used and words.isdisjoint(other.groups[place]):
                    break
            from_walls.add(other.wall_id)
            used.add((other.wall_id, place))
            words.update(other.groups[place])
            groups.append(other.groups[place])
            connections.append(other.connections[place])
            ids.append(other.group_ids[place])
            people.append((other.human_groups[place : place + 1], other.human_connections[place : place + 1]))
        shuffled = [word for group in groups for word in group]
        chance.shuffle(shuffled)
        made.append(
            replace(
                wall,
                words=tuple(shuffled),
                groups=tuple(groups),
                connections=tuple(connections),
                group_ids=tuple(ids),
                human_groups=sum((one for one, _ in people), ()),
                human_connections=sum((one for _, one in people), ()),
            )
        )
    return made
