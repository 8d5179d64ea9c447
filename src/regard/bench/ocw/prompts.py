"""Walls put to a language model in words, and its answers read.

After OCW (arXiv 2306.11167), TaatiTeam/OCW @ d092d89 (MIT), `notebooks/run_openai.ipynb`: the same parts in the same order and the same
drawing of examples, in our words; answers are read by the same rules.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from ..._checks import require, require_int, require_name
from .walls import SIDE, Wall

__all__ = ["ocw_prompt", "parse_connections", "parse_wall"]

_RULES = {
    "groups": (
        "This is the connecting wall of the quiz Only Connect. Sort the 16 clues below (words or phrases) into four groups of four "
        "clues that have something in common. Write one group a line, its clues separated by commas, and nothing else: no names of "
        "groups, no reasons, no clues of your own.\n\nTake care: walls are made to mislead. Some clues seem to fit several groups, "
        "yet exactly one solution uses every clue once."
    ),
    "connections": (
        "This is the connecting wall of the quiz Only Connect. Below are four groups of four clues (words or phrases). Say for each "
        "group what its clues have in common: repeat the four groups, one a line, and write the answer after "
        '"Connection:".\n\nWhat connects a group may be a theme, a fact, a number or a play on words, from any field.'
    ),
}


def ocw_prompt(
    wall: Wall, examples: Sequence[Wall] = (), shots: int = 3, *, task: str = "groups", seed: int = 42
) -> str:
    """A prompt that asks to solve a wall ("groups") or to name the connections of its groups ("connections").

    Args:
        wall: what is asked. examples: solved walls to draw from (the training walls). shots: how many are shown; 0 with no examples.
        seed: of the drawing: the same examples for every wall, those of the authors for the published training walls in their order.
    """
    rules = _RULES[require_name("task", task, _RULES)]
    require_int("shots", shots, 0)
    count = min(shots, len(examples)) if not examples else shots
    require(count <= len(examples), "shots", shots, f"at most {len(examples)}, the examples")
    parts = [rules]
    if count:
        shown = []
        for number, one in enumerate(random.Random(seed).sample(list(examples), k=count), start=1):
            lines = [f"{', '.join(g)}. Connection: {c}" for g, c in zip(one.groups, one.connections)]
            shown.append("\n".join((f"Example {number}", *lines)))
        parts += ["Solved walls:", *shown]
    if task == "groups":
        parts.append(f"Clues: {', '.join(wall.words)}")
    else:
        parts.append("\n".join(("Groups:", *(f"{', '.join(group)}. Connection:" for group in wall.groups))))
    return "\n\n".join((*parts, "Solved wall:")) + "\n"


def parse_wall(text: str) -> list[list[str]]:
    """Groups from an answer: one a line, words between commas, "Group 2:" and ". Connection: ..." left out.

    Four of four: what is too much is cut off, what is missing is an empty word.
    """
    lines = [line.strip() for line in re.sub(r"group\s*\d+\s*:?", "", text, flags=re.IGNORECASE).splitlines()]
    groups = []
    for line in [line for line in lines if line][:SIDE]:
        words = [word.strip() for word in line.split(",")][:SIDE]
        groups.append([re.sub(r"\. connection:.*", "", word, flags=re.IGNORECASE) for word in words])
    groups += [[] for _ in range(SIDE - len(groups))]
    return [group + [""] * (SIDE - len(group)) for group in groups]


def parse_connections(text: str) -> list[str]:
    """What stands after "Connection:" on each of the first four lines, an empty word where it does not."""
    found = [re.search(r"Connection:\s*(.*)", line) for line in text.splitlines()]
    said = [one.group(1).strip() if one else "" for one in found][:SIDE]
    return said + [""] * (SIDE - len(said))
