"""Lazy module attributes: `regard` must import in torch's own time, so public names are resolved on first use."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazy_exports(
    package: str, table: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Build `__getattr__`, `__dir__` and `__all__` for a package.

    `table` maps a public name to the dotted module (relative to `package`, with a leading dot) that defines it;
    a target with a trailing colon (".masks:") is the module itself.
    """
    names = sorted(table)

    def __getattr__(name: str) -> Any:
        target = table.get(name)
        if target is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        whole = target.endswith(":")
        module = importlib.import_module(target.rstrip(":"), package)
        value = module if whole else getattr(module, name)
        importlib.import_module(package).__dict__[name] = value
        return value

    def __dir__() -> list[str]:
        return names

    return __getattr__, __dir__, names
