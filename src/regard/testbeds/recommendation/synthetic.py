"""Users and items made here, with the truth known: what follows what, and which of the past a click hangs on."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._checks import require, require_fraction, require_int
from .clicks import ClickRows
from .interactions import Interactions

__all__ = ["ClickWorld", "TransitionWorld"]


class TransitionWorld:
    """Sequences in which the next item follows the last one, or is what people of the user's kind like.

    Args:
        num_items: items. kinds: of users; a kind likes an equal share of the items, popular ones more.
        successors: items that may follow an item, with chances that halve. follow: how often the next item is a successor of the last.
        seed: of the world.

    Attributes:
        transitions: (num_items, num_items), rows sum to 1. tastes: (kinds, num_items), rows sum to 1.
    """

    def __init__(
        self, num_items: int = 200, kinds: int = 8, successors: int = 3, follow: float = 0.5, seed: int = 0
    ) -> None:
        self.num_items, self.kinds = require_int("num_items", num_items, 2), require_int("kinds", kinds, 1)
        require(kinds <= num_items, "kinds", kinds, f"at most num_items ({num_items})")
        require(
            require_int("successors", successors, 1) < num_items, "successors", successors, f"less than {num_items}"
        )
        self.follow = require_fraction("follow", follow)
        made = torch.Generator().manual_seed(seed)
        self.transitions = torch.zeros(num_items, num_items)
        chances = 0.5 ** torch.arange(successors).float()
        for item, row in enumerate(self.transitions):
            others = torch.randperm(num_items - 1, generator=made)[:successors]
            row[others + (others >= item)] = chances / chances.sum()
        kind = torch.randperm(num_items, generator=made) % kinds
        common = torch.rand(num_items, generator=made) ** 2 + 0.05
        self.tastes = torch.stack([common * (kind == one) for one in range(kinds)])
        self.tastes /= self.tastes.sum(1, keepdim=True)

    def chances(self, last: Tensor, kind: Tensor) -> Tensor:
        """last, kind: (N,) -> (N, num_items), the true chances of the next item."""
        return self.follow * self.transitions[last] + (1 - self.follow) * self.tastes[kind]

    def interactions(self, users: int = 500, length: int = 20, seed: int = 0) -> tuple[Interactions, Tensor]:
        """`users` sequences of `length` items, and the kind of each user, (users,)."""
        require_int("users", users, 1)
        require_int("length", length, 1)
        made = torch.Generator().manual_seed(seed)
        kind = torch.randint(self.kinds, (users,), generator=made)
        steps = [torch.multinomial(self.tastes[kind], 1, generator=made)[:, 0]]
        for _ in range(length - 1):
            steps.append(torch.multinomial(self.chances(steps[-1], kind), 1, generator=made)[:, 0])
        items = torch.stack(steps, 1).flatten()
        who = torch.arange(users).repeat_interleave(length)
        names = [f"u{i}" for i in range(users)], [f"i{i}" for i in range(self.num_items)]
        return Interactions(who, items, torch.arange(length).double().repeat(users), *names), kind


class ClickWorld:
    """Clicks that hang on the past of the target's category and of those related to it, more on the recent.

    Each item has a hidden liking, -1 or +1, and the chance of a click is sigmoid(strength * sum_t weight_t * liking_t / sqrt(sum_t
    weight_t^2)): weight_t = relevance[target category, category_t] * decay^(places from the end). Which places matter is a question of
    categories and places (what attention should learn); what they say is a question of items (what representations should learn).

    Args:
        num_items, num_categories: numbers run from 1; 0 is padding. related: categories related to each, at relevance one half.
        decay: per place. strength: of the past on the click. seed: of the world.

    Attributes:
        categories: (num_items + 1,). relevance: (num_categories + 1, num_categories + 1). liking: (num_items + 1,).
    """

    def __init__(
        self,
        num_items: int = 400,
        num_categories: int = 20,
        related: int = 2,
        decay: float = 0.97,
        strength: float = 4.0,
        seed: int = 0,
    ) -> None:
        self.num_items, self.num_categories = (
            require_int("num_items", num_items, 2),
            require_int("num_categories", num_categories, 2),
        )
        require(require_int("related", related, 0) < num_categories, "related", related, f"less than {num_categories}")
        self.decay, self.strength = require_fraction("decay", decay), float(strength)
        made = torch.Generator().manual_seed(seed)
        self.categories = torch.cat(
            (torch.zeros(1, dtype=torch.int64), torch.randperm(num_items, generator=made) % num_categories + 1)
        )
        self.liking = torch.cat((torch.zeros(1), torch.randint(2, (num_items,), generator=made) * 2.0 - 1))
        self.relevance = torch.zeros(num_categories + 1, num_categories + 1)
        for one in range(1, num_categories + 1):
            others = torch.randperm(num_categories - 1, generator=made)[:related] + 1
            self.relevance[one, others + (others >= one)] = 0.5
            self.relevance[one, one] = 1.0

    def weights(self, rows: ClickRows) -> Tensor:
        """How much the click of each row hangs on each place of its history, (N, T); padding 0."""
        age = torch.arange(rows.history_items.shape[1] - 1, -1, -1)
        return self.relevance[rows.category[:, None], rows.history_categories] * self.decay**age

    def chances(self, rows: ClickRows) -> Tensor:
        """The true chance of a click, (N,)."""
        weight = self.weights(rows)
        told = (weight * self.liking[rows.history_items]).sum(1) / weight.square().sum(1).sqrt().clamp(min=1e-6)
        return torch.sigmoid(self.strength * told)

    def rows(self, count: int, length: int = 50, seed: int = 0, least: int | None = None) -> ClickRows:
        """`count` rows with histories of `least` (default half of `length`) to `length` items, all drawn evenly."""
        require_int("count", count, 1)
        require_int("length", length, 1)
        low = max(1, length // 2) if least is None else require_int("least", least, 0)
        require(low <= length, "least", least, f"at most length ({length})")
        made = torch.Generator().manual_seed(seed)
        history = torch.randint(1, self.num_items + 1, (count, length), generator=made)
        missing = length - torch.randint(low, length + 1, (count, 1), generator=made)
        history = history.masked_fill(torch.arange(length) < missing, 0)
        item = torch.randint(1, self.num_items + 1, (count,), generator=made)
        rows = ClickRows(item, self.categories[item], history, self.categories[history], torch.zeros(count))
        label = (torch.rand(count, generator=made) < self.chances(rows)).float()
        return ClickRows(rows.item, rows.category, rows.history_items, rows.history_categories, label)
