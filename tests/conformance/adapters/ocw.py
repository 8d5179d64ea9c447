"""Paper 178: scores of predicted groups and the walls of OCW-Randomized. Words stand as numbers."""

import torch

from regard.bench.ocw import Wall, randomize_walls, score_groups


def words(numbers):
    return [[f"w{n:04d}" for n in group] for group in numbers.tolist()]


def groups(case):
    pairs = zip(case.inputs["predicted"], case.inputs["truth"])
    scores = [score_groups(words(predicted), words(truth)) for predicted, truth in pairs]
    found = {
        name: torch.tensor([getattr(one, name) for one in scores], dtype=torch.float64)
        for name in ("wd", "ami", "ari", "fms")
    }
    return found | {"correct_groups": torch.tensor([one.correct_groups for one in scores])}


def randomized(case):
    walls = []
    for number, truth, human in zip(case.inputs["ids"].tolist(), case.inputs["truth"], case.inputs["human"].tolist()):
        four = tuple(tuple(group) for group in words(truth))
        flat = tuple(word for group in four for word in group)
        walls.append(Wall(f"{number:04x}", flat, four, ("", "", "", ""), human_groups=tuple(human)))
    made = randomize_walls(walls)
    return {
        "groups": torch.tensor([[[int(w[1:]) for w in group] for group in wall.groups] for wall in made]),
        "words": torch.tensor([[int(w[1:]) for w in wall.words] for wall in made]),
        "human": torch.tensor([wall.human_groups for wall in made]),
    }
