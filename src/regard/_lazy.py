"""Lazy module attributes: `regard` must import in torch's own time, so public names are resolved on first use."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any


def lazy_exports(
    package: str, table: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Build `__getattr__`, `__dir__` and `__all__` for a package.

    `table` maps a public name to the dotted module (relative to `package`, with a leading dot) that defines it;
    a target with a trailing colon (".masks:") is the module itself.

    A public name may equal the file that defines it (`ops.attention`). Importing that file anywhere makes Python store the module
    under the name; the package keeps the public object there, so that what a name means does not depend on who imported what first.
    """
    names = sorted(table)
    own_files = {f"{package}.{name}": name for name, target in table.items() if target == f".{name}"}

    class Package(ModuleType):
        def __setattr__(self, name: str, value: Any) -> None:
            if isinstance(value, ModuleType) and own_files.get(value.__name__) == name:
                value = getattr(value, name)
            super().__setattr__(name, value)

    sys.modules[package].__class__ = Package

    def __getattr__(name: str) -> Any:
        target = table.get(name)
        if target is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        whole = target.endswith(":")
        module = importlib.import_module(target.rstrip(":"), package)
        value = module if whole else getattr(module, name)
        sys.modules[package].__dict__[name] = value
        return value

    def __dir__() -> list[str]:
        return names

    return __getattr__, __dir__, names
