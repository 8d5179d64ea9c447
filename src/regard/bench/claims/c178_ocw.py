"""OCW: walls with red herrings against the same groups dealt anew, solved by clusters of embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..ocw.scores import ocw_score
from ..ocw.solve import made_walls, solve_by_embeddings
from ..ocw.walls import Wall, randomize_walls
from .claim import Outcome, Scale

PAPER = "178"
SLUG = "ocw"
SAYS = (
    "Embeddings and language models solve few Only Connect walls, and red herrings are why: walls put together from groups of different "
    "walls, in which little misleads, are solved more often."
)
AMI, GROUPS, SOLVED = "adjusted mutual information", "groups found, of 4", "walls solved"
AS_MADE, ANEW = "with red herrings", "groups dealt anew"

# Ten walls of our own: in each, some words of one group seem to belong to another.
WALLS = """
Mercury Mars Saturn Venus | Twix Bounty Snickers Galaxy | Ford Lincoln Dodge Tesla | Iron Copper Gold Neon
Apple Orange Lime Peach | Nokia Samsung Sony Huawei | Olive Navy Teal Pink | Oak Ash Elm Pine
Tango Salsa Waltz Swing | Hummus Guacamole Pesto Mayonnaise | Foxtrot Golf Hotel Echo | Tennis Cricket Rugby Hockey
Beetle Ant Wasp Moth | Polo Passat Jetta Tiguan | Derby Dressage Rodeo Jumping | Extra Orbit Trident Mentos
Crane Swift Robin Kite | Adele Prince Sting Cher | Joker Alfred Penguin Bane | Digger Bulldozer Mixer Roller
Amazon Nile Thames Danube | Target Gap Boots Next | Sandals Slippers Trainers Pumps | Bow Arrow Quiver Bullseye
Bridge Snap Rummy Poker | Tongs Grate Log Coal | Neck Fret String Body | Crackle Pop Bang Buzz
Pound Dollar Euro Yen | Punch Beat Strike Thump | Juice Squash Cider Cocoa | Carrot Leek Onion Turnip
Palm Sole Calf Chest | Kitten Puppy Lamb Foal | Plaice Cod Haddock Trout | Desk Wardrobe Sofa Stool
Tin Lead Zinc Nickel | Can Jar Box Bottle | Dime Penny Quarter Cent | Collar Bowl Leash Kennel
"""

Embed = Callable[[Sequence[str]], Tensor]


def measure(scale: Scale) -> Outcome:
    count, rounds = scale.pick((60, 4), (12, 2))
    out = Outcome(
        f"{rounds} times {count} walls of made embeddings, in which 4 of 16 words lie near another group; ten walls of real words, mean "
        f"of {scale.model_name}'s input embeddings a word; clusters of four",
        repeats="world or deal",
    )
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for seed in range(rounds):
        walls, vectors = made_walls(count, 4, spread=0.4, seed=seed)

        def look(words: Sequence[str], vectors: dict[str, Tensor] = vectors) -> Tensor:
            return torch.stack([vectors[word] for word in words])

        _solve(found, "made", walls, look, seed)
    real, embed = _real_walls(), _embedder(*scale.language_model())
    for seed in range(rounds):
        _solve(found, "words", real, embed, seed)
    for kind in ("made", "words"):
        for figure, name in ((AMI, "ami"), (GROUPS, "correct_groups"), (SOLVED, "full_wall")):
            for label in (AS_MADE, ANEW):
                values = [one[name] / (1 if name == "ami" else one["walls"]) for one in found[kind, label]]
                out.add(f"{kind}, {label}", figure, "", values)

    def gain(kind: str, figure: str) -> float:
        return out.row(f"{kind}, {ANEW}", figure).mean - out.row(f"{kind}, {AS_MADE}", figure).mean

    out.check("walls solved, made embeddings, dealt anew above red herrings", gain("made", SOLVED), at_least=0.1)
    out.check("groups found, real words, dealt anew above red herrings", gain("words", GROUPS), at_least=0.0)
    out.check("agreement, real words, dealt anew above red herrings", gain("words", AMI), at_least=0.02)
    out.check("walls of real words with red herrings solved", out.row(f"words, {AS_MADE}", SOLVED).mean, at_most=0.3)
    out.note = "The authors' data set was not at hand; the walls are ours."
    return out


def _solve(
    found: dict[tuple[str, str], list[dict[str, float]]], kind: str, walls: list[Wall], embed: Embed, seed: int
) -> None:
    for label, some in ((AS_MADE, walls), (ANEW, _dealt(walls, seed))):
        answers = [solve_by_embeddings(wall, embed, starts=5, seed=seed) for wall in some]
        found.setdefault((kind, label), []).append(ocw_score(answers, some).total)


def _dealt(walls: list[Wall], seed: int) -> list[Wall]:
    """Randomised walls, from the first seed whose choices do not run out."""
    for attempt in range(1000):
        try:
            return randomize_walls(walls, 1000 * seed + attempt)
        except ValueError:
            continue
    raise RuntimeError("no deal of the groups was found")


def _real_walls() -> list[Wall]:
    made = []
    for number, line in enumerate(WALLS.strip().splitlines()):
        groups = tuple(tuple(part.split()) for part in line.split("|"))
        words = tuple(word for four in zip(*groups) for word in four)
        made.append(Wall(f"{number:02d}", words, groups, ("", "", "", "")))
    return made


def _embedder(model: torch.nn.Module, tokenizer: Callable[..., dict[str, list[int]]]) -> Embed:
    table = model.get_input_embeddings().weight.detach().float()  # type: ignore[operator, union-attr]

    def embed(words: Sequence[str]) -> Tensor:
        rows = [
            table[torch.tensor(tokenizer(" " + word, add_special_tokens=False)["input_ids"])].mean(0) for word in words
        ]
        return torch.nn.functional.normalize(torch.stack(rows), dim=1)

    return embed
