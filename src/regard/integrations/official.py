"""Loading the authors' state dicts: their names in, ours underneath.

Where our parameter names equal the authors', nothing needs saying. Where they differ, the class has a static or class method
`official_keys(state) -> dict` that renames (and, where layouts differ, reshapes) the authors' tensors to ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._checks import bad_type


class LoadResult(NamedTuple):
    """What `load_official(..., strict=False)` could not match; both empty after a strict load."""

    missing: list[str]
    unexpected: list[str]


def _listed(names: list[str], most: int = 8) -> str:
    more = f", … ({len(names)} in all)" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def load_official(module: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True) -> LoadResult:
    """Load a state dict in the authors' layout into `module`.

    Args:
        module: a layer or network of `regard`. If its class has `official_keys`, that renames the entries first.
        state_dict: parameter and buffer names of the authors' code to tensors. Values are cast to the module's own dtype
            and device.
        strict: whether every parameter and persistent buffer must be given and nothing may be left over. Counters of
            batch norm (`num_batches_tracked`), which older checkpoints lack, may always be missing.

    Returns:
        The names that were missing and left over (ours, after renaming).

    Raises:
        TypeError: `module` is no `nn.Module`, or `state_dict` holds something other than tensors under strings.
        ValueError: a name is missing or left over (`strict`), or a tensor has another shape than the module's. Nothing
            has been loaded then.
    """
    if not isinstance(module, nn.Module):
        raise bad_type("module", module, "a torch.nn.Module")
    if not isinstance(state_dict, Mapping):
        raise bad_type("state_dict", state_dict, "a dict of parameter names to tensors")
    others = [
        str(name) for name, value in state_dict.items() if not isinstance(value, Tensor) or not isinstance(name, str)
    ]
    if others:
        raise TypeError(
            f"state_dict: got entries that are no tensors ({_listed(others)}), need parameter names to tensors; "
            "a checkpoint often holds them one level down, as in checkpoint['model']"
        )

    owner = type(module).__name__
    given = dict(state_dict)
    rename = getattr(module, "official_keys", None)
    if rename is not None:
        try:
            given = dict(rename(given))
        except KeyError as error:
            raise ValueError(
                f"state_dict: {owner} needs {error.args[0]!r} in the authors' layout, which is not there"
            ) from None

    ours = module.state_dict()
    missing = [name for name in ours if name not in given and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in given if name not in ours]
    wrong = [
        f"{name} is {tuple(given[name].shape)}, need {tuple(ours[name].shape)}"
        for name in ours
        if name in given and given[name].shape != ours[name].shape
    ]
    problems = []
    if strict and missing:
        problems.append(f"missing {_listed(missing)}")
    if strict and unexpected:
        problems.append(f"unexpected {_listed(unexpected)}")
    if wrong:
        problems.append(f"wrong shape: {_listed(wrong)}")
    if problems:
        raise ValueError(f"state_dict: does not fit {owner}: {'; '.join(problems)}")

    with torch.no_grad():
        module.load_state_dict({name: value for name, value in given.items() if name in ours}, strict=False)
    return LoadResult(missing, unexpected)
