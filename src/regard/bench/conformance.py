"""Conformance vectors: numbers recorded from the authors' code, and how our code meets them.

A folder holds `*.safetensors` (directly or under `vectors/`), `targets.toml` and/or `targets.d/*.toml`, and adapters. The form
of a vector is docs/design.md, section 7; a target is one table named after the vector file without its suffix:

    ["129-ela-variants"]                            # or ["129-ela-variants".cases.NAME], any number of them
    target = "regard.nn.EfficientLocalAttention"    # a class is built, a function is called
    kwargs = { channels = 64 }                      # for the constructor of a class, for the call of a function
    kwargs_from = "official_kwargs"                 # start from this JSON of the metadata …
    kwargs_rename = { dim = "channels", seed = "" } # … under our names; "" drops one; `kwargs` overrides
    params = "mb_ela72."                            # load only what stands below `param.mb_ela72.` (default: all)
    inputs = ["x"]                                  # in.* names, positional; or { our_argument = "in name" or [names] }
    call_kwargs = { mask = true }                   # further arguments of the call
    method = "forward"                              # call this method instead of the object itself
    train = false                                   # train mode instead of eval
    outputs = { "0" = "mb_ela72" }                  # our output (index, key or attribute, dots to go deeper) = out.* name
    grads = { dx = "x" }                            # out.dx is the gradient with respect to in.x …
    grad_out = "grad_out"                           # … for this in.* tensor arriving at …
    grad_of = "0"                                   # … this output of ours; without grad_out its sum is differentiated
    ignore = ["l_aux"]                              # out.* names that are deliberately compared nowhere
    rtol = 1e-5                                     # max|ours - theirs| <= atol + rtol * max|theirs|; whole numbers: equal
    adapter = "adapters/duo.py:run"                 # instead of target: run(case: Case) -> {out name: tensor}

Keys above `cases` hold for each case. Nothing is unpickled: vectors are safetensors, adapters are code in the folder.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..integrations.official import load_official

DEFAULT_RTOL = 1e-5
_ENTRY = {
    *("target", "adapter", "kwargs", "kwargs_from", "kwargs_rename", "params", "inputs", "call_kwargs", "method"),
    *("train", "outputs", "grads", "grad_out", "grad_of", "ignore", "rtol", "atol"),
}


@dataclass(frozen=True)
class Case:
    """What an adapter is given: the recorded tensors under their own names, and the numbers beside them."""

    name: str
    inputs: dict[str, Tensor]
    params: dict[str, Tensor]
    args: dict[str, Any]
    kwargs: dict[str, Any]
    meta: dict[str, Any]


@dataclass(frozen=True)
class Vector:
    """One file of recorded numbers, its tensors sorted by what they are."""

    path: Path
    inputs: dict[str, Tensor]
    params: dict[str, Tensor]
    outputs: dict[str, Tensor]
    meta: dict[str, Any]


@dataclass(frozen=True)
class Check:
    """One vector with one way our code meets it, or with the `problem` that keeps them from meeting."""

    stem: str
    case: str = ""
    path: Path | None = None
    root: Path = field(default_factory=Path)
    entry: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""

    @property
    def name(self) -> str:
        return f"{self.stem}:{self.case}" if self.case else self.stem

    @property
    def paper(self) -> str:
        """The three digits a vector's file name begins with; empty where it does not."""
        return self.stem[:3] if self.stem[:3].isdigit() else ""


@dataclass(frozen=True)
class Comparison:
    """One recorded output beside ours. `error` and `tolerance` are relative to the largest recorded magnitude."""

    output: str
    error: float
    tolerance: float
    ok: bool
    detail: str = ""


def read_vector(path: Path) -> Vector:
    """Read a vector. A file that is cut short, tampered with or no safetensors raises a `ValueError` that names it."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            meta: dict[str, Any] = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"vector {path}: cannot be read as safetensors ({error})") from None
    for key in ("official_kwargs", "args"):
        try:
            meta[key] = json.loads(meta.get(key) or "{}")
        except json.JSONDecodeError as error:
            raise ValueError(f"vector {path}: metadata {key!r} is no JSON ({error})") from None
    parts: dict[str, dict[str, Tensor]] = {"in": {}, "param": {}, "out": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        if part not in parts or not rest:
            raise ValueError(f"vector {path}: tensor {name!r}, need a name that begins with in., param. or out.")
        parts[part][rest] = tensor
    if not parts["out"]:
        raise ValueError(f"vector {path}: holds no out.* tensor, so there is nothing to compare")
    return Vector(path, parts["in"], parts["param"], parts["out"], meta)


def _entries(file: Path, root: Path) -> list[Check]:
    """The checks one target file asks for; what is wrong with it is a check with a problem, so that the others still run."""
    where = file.relative_to(root).as_posix()
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        return [Check(where, problem=f"{where}: cannot be read ({error})")]
    checks = []
    for stem, table in tables.items():
        if not isinstance(table, dict):
            checks.append(Check(where, problem=f"{where}: {stem!r} stands outside a table named after a vector"))
            continue
        shared = {key: value for key, value in table.items() if key != "cases"}
        for case, own in (table.get("cases") or {"": {}}).items():
            entry = shared | own
            problem = ""
            if unknown := sorted(set(entry) - _ENTRY):
                problem = f"{where}: unknown key {', '.join(unknown)}; need one of {', '.join(sorted(_ENTRY))}"
            elif ("target" in entry) == ("adapter" in entry):
                problem = f"{where}: need either a target or an adapter"
            checks.append(Check(stem, case, root=root, entry=entry, problem=problem))
    return checks


def find_checks(root: Path) -> list[Check]:
    """Everything that a conformance folder asks to be compared, one item a vector and case, sorted by name.

    A vector without a target, a target without its vector and a target file with a mistake are items too, each with its problem.
    Raises a `ValueError` when there is no such folder or nothing is recorded in it.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"vectors: {str(root)!r} is no folder")
    paths = {path.stem: path for folder in (root, root / "vectors") for path in sorted(folder.glob("*.safetensors"))}
    if not paths:
        raise ValueError(f"vectors: no *.safetensors in {str(root)!r} or its vectors/")
    files = [root / "targets.toml"] if (root / "targets.toml").is_file() else []
    files += sorted((root / "targets.d").glob("*.toml"))

    checks: dict[str, Check] = {}
    for check in (check for file in files for check in _entries(file, root)):
        if check.name in checks:
            check = replace(check, problem="described twice in the target files")
        elif not check.problem and check.stem not in paths:
            check = replace(check, problem=f"no such vector: {check.stem}.safetensors")
        checks[check.name] = replace(check, path=paths.get(check.stem))
    described = {check.stem for check in checks.values()}
    for stem, path in paths.items():
        if stem not in described:
            checks[stem] = Check(stem, path=path, root=root, problem="no target: no table of the target files names it")
    return [checks[name] for name in sorted(checks)]


def resolve(dotted: str) -> Any:
    """The object that a dotted path names, through lazily exporting packages and into classes."""
    parts = dotted.split(".")
    for split in range(len(parts), 0, -1):
        module = ".".join(parts[:split])
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name and (module == error.name or module.startswith(error.name + ".")):
                continue
            raise
        for name in parts[split:]:
            if not hasattr(found, name):
                raise ValueError(f"target: {dotted!r} is not there; {type(found).__name__} has no {name!r}")
            found = getattr(found, name)
        return found
    raise ValueError(f"target: {dotted!r} is not there")


def _adapter(root: Path, spec: str) -> Any:
    """The function an `adapters/file.py:function` names, loaded from the folder it stands in."""
    file, _, function = spec.partition(":")
    path = (root / file).resolve()
    if not path.is_file() or not function:
        raise ValueError(f"adapter: {spec!r} is not there, need FILE.py:FUNCTION below {root}")
    name = f"regard_adapter_{path.stem}_{abs(hash(str(path)))}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, function):
        raise ValueError(f"adapter: {file} has no function {function!r}")
    return getattr(module, function)


def _pick(part: str, tensors: dict[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise ValueError(f"{part}.{name} is not recorded; there is {', '.join(sorted(tensors)) or 'nothing'}")
    return tensors[name]


def _output(result: Any, name: str) -> Tensor:
    """Our output called `name`: an index into a tuple, a key, or an attribute; dots go deeper."""
    found = result
    if isinstance(found, Tensor) and name == "0":
        return found
    for step in name.split("."):
        try:
            if isinstance(found, (tuple, list)) and step.lstrip("-").isdigit():
                found = found[int(step)]
            elif isinstance(found, Mapping):
                found = found[step] if step in found else found[int(step)]
            else:
                found = getattr(found, step)
        except (LookupError, AttributeError, ValueError):
            raise ValueError(f"outputs: ours has no {name!r} (it is a {type(result).__name__})") from None
    if isinstance(found, (bool, int, float)):
        found = torch.tensor(found)
    if not isinstance(found, Tensor):
        raise ValueError(f"outputs: ours at {name!r} is a {type(found).__name__}, need a tensor")
    return found


def _call(entry: Mapping[str, Any], case: Case) -> Any:
    """Build or find the target, load the parameters, call it with the recorded inputs."""
    given = entry.get("inputs", list(case.inputs) if len(case.inputs) == 1 else {name: name for name in case.inputs})

    def tensors(names: str | list[str]) -> Any:
        many = [_pick("in", case.inputs, name) for name in ([names] if isinstance(names, str) else names)]
        return many[0] if isinstance(names, str) else many

    positional = [tensors(names) for names in given] if isinstance(given, list) else []
    named = {ours: tensors(names) for ours, names in given.items()} if isinstance(given, dict) else {}
    named |= entry.get("call_kwargs", {})

    target = resolve(entry["target"])
    if not isinstance(target, type):
        return target(*positional, **named, **case.kwargs)
    built = target(**case.kwargs)
    if isinstance(built, nn.Module):
        kinds = {value.dtype for value in case.params.values() if value.is_floating_point()}
        if len(kinds) == 1:
            built.to(kinds.pop())
        load_official(built, case.params)
        built.train(bool(entry.get("train", False)))
    return (getattr(built, entry["method"]) if "method" in entry else built)(*positional, **named)


def _differentiate(entry: Mapping[str, Any], case: Case, result: Any) -> dict[str, Tensor]:
    """The gradients that `grads` asks for."""
    wanted = entry["grads"]
    upstream = _pick("in", case.inputs, entry["grad_out"]) if "grad_out" in entry else None
    output = _output(result, str(entry.get("grad_of", "0")))
    if upstream is None:
        output = output.sum()
    sources = [_pick("in", case.inputs, name) for name in wanted.values()]
    return dict(zip(wanted, torch.autograd.grad(output, sources, upstream)))


def _case(check: Check, vector: Vector) -> Case:
    entry = check.entry
    prefix = entry.get("params", "")
    params = {name.removeprefix(prefix): value for name, value in vector.params.items() if name.startswith(prefix)}
    if prefix and not params:
        raise ValueError(f"params: nothing recorded below param.{prefix}")
    kwargs = dict(vector.meta.get(entry["kwargs_from"]) or {}) if "kwargs_from" in entry else {}
    for theirs, ours in entry.get("kwargs_rename", {}).items():
        value = kwargs.pop(theirs, None)
        if ours and value is not None:
            kwargs[ours] = value
    return Case(
        check.name, dict(vector.inputs), params, vector.meta["args"], kwargs | entry.get("kwargs", {}), vector.meta
    )


def compare(output: str, ours: Tensor, theirs: Tensor, rtol: float = DEFAULT_RTOL, atol: float = 0.0) -> Comparison:
    """Hold one output to the recorded one: `max|ours - theirs| <= atol + rtol * max|theirs|`; whole numbers and truth values equal.

    Infinite and undefined entries must stand in the same places. The dtype of ours may differ, its shape may not.
    """
    ours = ours.detach().cpu()
    if ours.shape != theirs.shape:
        detail = f"shape {tuple(ours.shape)}, need {tuple(theirs.shape)}"
        return Comparison(output, float("inf"), rtol, False, detail)
    exact = not theirs.is_floating_point()
    a, b = ours.double(), theirs.double()
    gap = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs()).nan_to_num(nan=float("inf"))
    worst = gap.max().item() if gap.numel() else 0.0
    finite = b[b.isfinite()].abs()
    size = finite.max().item() if finite.numel() else 0.0
    allowed = 0.0 if exact else atol + rtol * size
    relative = worst / size if size else worst
    detail = "" if worst <= allowed else f"max |ours - theirs| = {worst:.3g}, allowed {allowed:.3g}"
    return Comparison(output, relative, 0.0 if exact else (allowed / size if size else atol), worst <= allowed, detail)


def run_check(check: Check) -> list[Comparison]:
    """Run our code on the recorded inputs and compare each output the entry names.

    Raises a `ValueError` that names the vector and what kept it from being compared; errors of the code under test come through.
    """
    if check.problem or check.path is None:
        raise ValueError(f"{check.name}: {check.problem}")
    vector = read_vector(check.path)
    entry = check.entry
    try:
        case = _case(check, vector)
        torch.manual_seed(0)
        if "adapter" in entry:
            found = _adapter(check.root, entry["adapter"])(case)
            if not isinstance(found, Mapping) or not found:
                raise ValueError("adapter: returned nothing to compare, need {out name: tensor}")
            ours = {str(name): _output([value], "0") for name, value in found.items()}
        else:
            grads = entry.get("grads", {})
            for name in grads.values():
                case.inputs[name] = _pick("in", case.inputs, name).clone().requires_grad_()
            with torch.set_grad_enabled(bool(grads)):
                result = _call(entry, case)
            outputs = entry.get("outputs") or {name: name for name in vector.outputs if name not in grads}
            ours = {theirs: _output(result, str(name)) for name, theirs in outputs.items()}
            if grads:
                ours |= _differentiate(entry, case, result)
        rtol, atol = float(entry.get("rtol", DEFAULT_RTOL)), float(entry.get("atol", 0.0))
        return [compare(name, value, _pick("out", vector.outputs, name), rtol, atol) for name, value in ours.items()]
    except ValueError as error:
        raise ValueError(f"{check.name}: {error}") from error


@dataclass(frozen=True)
class Result:
    """What became of one check: its comparisons, or the `failure` it died of."""

    check: Check
    comparisons: tuple[Comparison, ...] = ()
    failure: str = ""

    @property
    def ok(self) -> bool:
        return not self.failure and all(row.ok for row in self.comparisons)

    @property
    def worst(self) -> Comparison | None:
        return max(self.comparisons, key=lambda row: (not row.ok, row.error), default=None)

    @property
    def detail(self) -> str:
        """What is wrong, in one line; empty when nothing is."""
        return self.failure or "; ".join(f"{row.output}: {row.detail}" for row in self.comparisons if not row.ok)


def run_all(checks: list[Check]) -> list[Result]:
    """Run each check. Whatever one dies of is its result; the others still have theirs to give."""
    results = []
    for check in checks:
        try:
            results.append(Result(check, tuple(run_check(check))))
        except ValueError as error:
            results.append(Result(check, failure=str(error).removeprefix(f"{check.name}: ")))
        except Exception as error:
            results.append(Result(check, failure=f"{type(error).__name__}: {error}"))
    return results


def uncompared(results: list[Result]) -> dict[str, list[str]]:
    """Per vector, the out.* names that no check compared and none said to ignore."""
    left: dict[str, set[str]] = {}
    for result in results:
        check = result.check
        if check.path is None or result.failure:
            continue
        names = left.setdefault(check.stem, set(read_vector(check.path).outputs))
        names -= {row.output for row in result.comparisons} | set(check.entry.get("ignore", ()))
    return {stem: sorted(names) for stem, names in left.items() if names}
