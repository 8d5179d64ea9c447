"""Who met what, and when: read from atomic files, thinned to a core, split by leaving the last ones out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..._checks import require, require_int, require_name
from .atomic import AtomicTable, read_atomic, write_atomic

__all__ = ["Interactions", "LeaveOneOut", "load_interactions"]


@dataclass(frozen=True)
class Interactions:
    """Interactions, those of a user together and in the order of their times.

    Attributes:
        users, items: (N,) int64, numbers of `user_names`, `item_names`. times: (N,) float64. labels: (N,) float32, or None.
        user_names, item_names: the tokens of the files. malformed: lines that were left out in reading, by reason.
    """

    users: Tensor
    items: Tensor
    times: Tensor
    user_names: list[str]
    item_names: list[str]
    labels: Tensor | None = None
    malformed: dict[str, int] | None = None

    def __len__(self) -> int:
        return len(self.users)

    @property
    def num_users(self) -> int:
        return len(self.user_names)

    @property
    def num_items(self) -> int:
        return len(self.item_names)

    def sequences(self) -> list[Tensor]:
        """The items of each user, oldest first."""
        counts = torch.bincount(self.users, minlength=self.num_users)
        return list(self.items.split(counts.tolist()))

    def k_core(self, user: int = 5, item: int = 5) -> Interactions:
        """What is left when users with fewer than `user` interactions and items with fewer than `item` are taken out until there are none.

        Users and items are numbered anew, in the old order. Raises a `ValueError` if nothing is left.
        """
        require_int("user", user, 1)
        require_int("item", item, 1)
        kept = torch.ones(len(self), dtype=torch.bool)
        while True:
            of_user = torch.bincount(self.users[kept], minlength=self.num_users)
            of_item = torch.bincount(self.items[kept], minlength=self.num_items)
            left = kept & (of_user[self.users] >= user) & (of_item[self.items] >= item)
            if torch.equal(left, kept):
                break
            kept = left
        require(bool(kept.any()), "user, item", (user, item), "a core that holds interactions: these leave none")
        users, user_ids = _renumbered(self.users[kept])
        items, item_ids = _renumbered(self.items[kept])
        return replace(
            self,
            users=users,
            items=items,
            times=self.times[kept],
            labels=None if self.labels is None else self.labels[kept],
            user_names=[self.user_names[i] for i in user_ids],
            item_names=[self.item_names[i] for i in item_ids],
        )

    def leave_one_out(self) -> LeaveOneOut:
        """The last item of each user for the test, the one before for validation, the others to learn from."""
        train, valid, test = [], [], []
        for row in self.sequences():
            short = len(row) < 3
            train.append(row if short else row[:-2])
            valid.append(-1 if short else int(row[-2]))
            test.append(-1 if short else int(row[-1]))
        return LeaveOneOut(train, torch.tensor(valid), torch.tensor(test), self.num_items)

    def item_codes(self, table: AtomicTable, column: str, key: str = "item_id") -> tuple[Tensor, list[str]]:
        """A token column of an `.item` file as numbers: (num_items,) int64, -1 where an item has none; and the tokens."""
        kind = table.types.get(require_name("column", column, table.types))
        require(kind == "token", "column", f"{column} of type {kind}", "a column of type token")
        of_item = dict(zip(table[key], table[column]))
        names = sorted({name for item in self.item_names if (name := of_item.get(item, ""))})
        code = {name: number for number, name in enumerate(names)}
        return torch.tensor([code.get(of_item.get(item, ""), -1) for item in self.item_names], dtype=torch.int64), names

    def write(self, path: str | Path) -> Path:
        """As an `.inter` file."""
        columns = {
            "user_id": [self.user_names[i] for i in self.users.tolist()],
            "item_id": [self.item_names[i] for i in self.items.tolist()],
            "timestamp": self.times.tolist(),
        }
        types = {"user_id": "token", "item_id": "token", "timestamp": "float"}
        if self.labels is not None:
            columns["label"], types["label"] = self.labels.tolist(), "float"
        return write_atomic(path, columns, types)


@dataclass(frozen=True)
class LeaveOneOut:
    """train: items to learn from, a tensor a user. valid, test: (users,) the items left out, -1 for users with fewer than three."""

    train: list[Tensor]
    valid: Tensor
    test: Tensor
    num_items: int


def load_interactions(
    path: str | Path,
    *,
    user: str = "user_id",
    item: str = "item_id",
    time: str | None = "timestamp",
    label: str | None = None,
    malformed: str = "raise",
) -> Interactions:
    """Read an `.inter` file, or the one in a folder.

    Args:
        path: the file, or the folder of a data set (RecBole's layout: `ml-100k/ml-100k.inter`).
        user, item: token columns. time: float column that orders a user's interactions; None: the order of the lines.
        label: float column to keep, such as "rating". malformed: "raise" or "skip", as `read_atomic`.

    Users and items are numbered in the order in which the file first names them. Equal times keep the order of the lines.
    """
    path = Path(path)
    if path.is_dir():
        found = sorted(path.glob("*.inter"))
        named = path / f"{path.name}.inter"
        found = [named] if named in found else found
        require(
            len(found) == 1, "path", f"{path} with {len(found)} files *.inter", "a folder that holds one, or a file"
        )
        path = found[0]
    keys = [user, item, *([time] if time else []), *([label] if label else [])]
    table = read_atomic(path, keys, required=keys, malformed=malformed)
    for name in keys:
        kind = "token" if name in (user, item) else "float"
        require(table.types[name] == kind, name, f"type {table.types[name]}", f"type {kind}")
    require(len(table) > 0, "path", str(path), "a file with interactions")
    users, user_names = _codes(table[user])
    items, item_names = _codes(table[item])
    times = torch.tensor(table[time] if time else range(len(table)), dtype=torch.float64)
    order = times.argsort(stable=True)
    order = order[users[order].argsort(stable=True)]
    labels = torch.tensor(table[label], dtype=torch.float32)[order] if label else None
    return Interactions(users[order], items[order], times[order], user_names, item_names, labels, table.malformed)


def _codes(tokens: list[str]) -> tuple[Tensor, list[str]]:
    code: dict[str, int] = {}
    numbers = [code.setdefault(token, len(code)) for token in tokens]
    return torch.tensor(numbers, dtype=torch.int64), list(code)


def _renumbered(ids: Tensor) -> tuple[Tensor, list[int]]:
    kept, numbers = ids.unique(return_inverse=True)
    return numbers, kept.tolist()
