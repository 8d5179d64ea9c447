"""One way to complain: every error names the argument, what it got and what it needs."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

import torch


def bad_value(argument: str, got: object, need: str) -> ValueError:
    return ValueError(f"{argument}: got {got!r}, need {need}")


def bad_type(argument: str, got: object, need: str) -> TypeError:
    return TypeError(f"{argument}: got {type(got).__name__}, need {need}")


def require(condition: bool, argument: str, got: object, need: str) -> None:
    """Raise a `ValueError` naming `argument` unless `condition` holds."""
    if not condition:
        raise bad_value(argument, got, need)


def require_int(argument: str, value: Any, minimum: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise bad_type(argument, value, f"an int >= {minimum}")
    require(value >= minimum, argument, value, f"an int >= {minimum}")
    return value


def require_fraction(argument: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise bad_type(argument, value, "a number in [0, 1]")
    require(0.0 <= value <= 1.0, argument, value, "a number in [0, 1]")
    return float(value)


def require_tensor(argument: str, value: Any, dims: int | None = None, floating: bool = False) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise bad_type(argument, value, "a torch.Tensor")
    if dims is not None and value.dim() != dims:
        raise bad_value(argument, f"shape {tuple(value.shape)}", f"{dims} dimensions")
    if floating and not value.is_floating_point():
        raise bad_type(argument, value.dtype, f"a floating point tensor (dtype is {value.dtype})")
    return value


def require_shape(argument: str, value: Any, need: Sequence[int | None]) -> torch.Tensor:
    """A tensor of shape `need`; None there: any number."""
    tensor = require_tensor(argument, value)
    fits = tensor.dim() == len(need) and all(want in (None, got) for want, got in zip(need, tensor.shape))
    wanted = ", ".join("n" if want is None else str(want) for want in need)
    require(fits, argument, f"shape {tuple(tensor.shape)}", f"shape ({wanted})")
    return tensor


def require_name(argument: str, name: str, known: Iterable[str]) -> str:
    """Return `name` if it is one of `known`; else a `ValueError` that lists the near ones."""
    known = list(known)
    if name in known:
        return name
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else f"one of: {', '.join(sorted(known))}"
    raise ValueError(f"{argument}: unknown name {name!r}; {hint}")


def resolve_budget(argument: str, budget: int | float, length: int) -> int:
    """Tokens meant by `budget`: an int is tokens, a float in (0, 1] is a fraction of `length` (at least one token).

    One meaning for every method that has a budget (design §3).
    """
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        raise bad_type(argument, budget, "tokens (int >= 1) or a fraction (float in (0, 1])")
    if isinstance(budget, int):
        require(budget >= 1, argument, budget, "tokens (int >= 1) or a fraction (float in (0, 1])")
        return budget
    require(0.0 < budget <= 1.0, argument, budget, "tokens (int >= 1) or a fraction (float in (0, 1])")
    return max(1, round(budget * length)) if length else 0
