"""The floors of docs/design.md, section 2: imports only point down, also those hidden inside functions."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import regard

SOURCE = Path(regard.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

# What each room may import. Rooms on one floor do not know each other, except that benchmarks run on testbeds.
NOTHING: set[str] = set()
_METHODS = {"ops", "nn"}  # a method may carry modules that are trained for it (gates, predictors)
_JOINED = _METHODS | {"methods"}
_SEEN = _JOINED | {"integrations"}
_ALL_BELOW = _SEEN | {"lens", "losses", "models"}
MAY_IMPORT = {
    "ops": NOTHING,
    "papers": NOTHING,
    "nn": {"ops"},
    "models": {"ops", "nn"},
    "methods": _METHODS,
    "integrations": _JOINED,
    "lens": _SEEN,
    "losses": _SEEN | {"lens"},  # tuners find heads first
    "testbeds": _ALL_BELOW,
    "bench": _ALL_BELOW | {"testbeds", "papers"},
    "scale": _ALL_BELOW | {"testbeds", "bench", "papers"},
    "cli": _ALL_BELOW | {"testbeds", "bench", "papers", "scale"},
}
# Small things at the root (`_checks`, `_lazy`, …) belong to no floor: anyone may import them, and they import only each other.
COMMON = {path.stem for path in SOURCE.glob("_[a-z]*.py")} | {"__version__"}
# Packages that know models. Nothing below the floor of methods may import them.
MODEL_LIBRARIES = {"transformers", "timm", "diffusers", "torchvision", "accelerate", "gguf"}


def module_of(path):
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path):
    """Every module a file imports anywhere in it, as absolute dotted names, with the line."""
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield name.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [base])])
            for name in node.names:
                yield f"{base}.{name.name}", node.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            first = node.args[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str) and not first.value.startswith("."):
                yield first.value, node.lineno


def room_of(module):
    """The room a dotted name lies in; a name of the front door (`regard.load`) lies in the room that defines it."""
    part = [*module.split("."), ""][1]
    return regard._TABLE[part].strip(".:").split(".")[0] if part in regard._TABLE else part


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_imports_only_point_down(path):
    room = room_of(module_of(path))
    allowed = COMMON if room in ("", *COMMON) else COMMON | {room} | MAY_IMPORT[room]
    upward = [
        f"line {line}: {name}"
        for name, line in imports(path)
        if name.split(".")[0] == "regard" and room_of(name) not in allowed
    ]
    assert not upward, f"{room or 'the package root'} may import {sorted(allowed)}, but does import {upward}"


@pytest.mark.parametrize("room", ["ops", "nn", "models", "papers"])
def test_lower_rooms_have_no_model_knowledge(room):
    found = [
        f"{path.relative_to(SOURCE)}:{line} {name}"
        for path in FILES
        if room_of(module_of(path)) == room
        for name, line in imports(path)
        if name.split(".")[0] in MODEL_LIBRARIES
    ]
    assert not found


def test_ops_have_no_parameters():
    found = []
    for path in FILES:
        if room_of(module_of(path)) != "ops":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and any(ast.unparse(base).endswith("Module") for base in node.bases):
                found.append(f"{path.relative_to(SOURCE)}:{node.lineno} {node.name}")
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("nn.Parameter", "register_parameter")):
                found.append(f"{path.relative_to(SOURCE)}:{node.lineno}")
    assert not found


def test_papers_import_no_code_and_no_torch():
    found = [
        f"{path.name}:{line} {name}"
        for path in FILES
        if room_of(module_of(path)) == "papers"
        for name, line in imports(path)
        if name.split(".")[0] in {"torch", "numpy"}
    ]
    assert not found


def test_every_room_is_known():
    rooms = {path.name for path in SOURCE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms <= set(MAY_IMPORT)


def test_rule_sees_relative_lazy_and_string_imports(tmp_path, monkeypatch):
    """The check itself: an upward import in any dress is found."""
    monkeypatch.setitem(globals(), "SOURCE", tmp_path / "regard")
    path = tmp_path / "regard" / "ops" / "x.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import math\nfrom ..nn.a import B\nfrom .masks import c\ndef f():\n    from ... import regard\n"
        "    from .. import lens\n    import importlib\n    importlib.import_module('regard.models.y')\n"
    )
    found = [name for name, _ in imports(path)]
    assert {"regard.nn.a.B", "regard.ops.masks.c", "regard.lens", "regard.models.y", "math"} <= set(found)


@pytest.mark.parametrize("path", FILES + sorted(Path(__file__).parent.rglob("*.py")), ids=lambda path: path.name)
def test_files_can_be_read_in_one_sitting(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 600


EVERY_PUBLIC_NAME = """
import importlib, pkgutil, types
import regard

infos = list(pkgutil.walk_packages(regard.__path__, "regard."))
for info in infos:
    importlib.import_module(info.name)
for package in [regard, *(importlib.import_module(info.name) for info in infos if info.ispkg)]:
    for name in getattr(package, "__all__", ()):
        try:
            value = getattr(package, name)
        except (ImportError, AttributeError) as error:
            print(f"{package.__name__}.{name}: {error}")
            continue
        meant = package._TABLE[name].endswith(":")
        if isinstance(value, types.ModuleType) and not meant:
            print(f"{package.__name__}.{name} is the module of that name, not the object in it")
"""


def test_public_names_resolve_whatever_was_imported_before():
    """Each name that a package exports lazily is there, and is itself even after every file has been imported."""
    done = subprocess.run([sys.executable, "-c", EVERY_PUBLIC_NAME], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stdout, done.stdout
