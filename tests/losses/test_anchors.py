"""KANT: what is read and what is learned behind an anchor, and which anchors a question finds."""

import pytest
import torch
from tests.tiny import CharTokenizer

from regard.losses import AnchorIndex, MaskedCollator, anchor_prompt, anchored_answers, anchored_files, read_repository
from regard.losses.anchors import Markers, split_text

FILES = {"a/b.py": "x = 1\ny = 2\n", "c.md": "text", "d.txt": "q" * 50}


def test_files_are_whole_and_only_the_target_is_learned():
    samples = anchored_files(FILES, fim_rate=1.0, seed=3)
    for (path, text), sample in zip(FILES.items(), samples):
        (read, none), (target, all_) = sample
        assert (none, all_) == (0, 1)
        prefix, suffix = read.removeprefix(f"[KEY] {path} [CTX] ").split("<FILL>")
        assert prefix + target + suffix == text and target
        batch = MaskedCollator(CharTokenizer())([sample])
        assert (batch["labels"] >= 0).sum() == len(target)
    whole = anchored_files(FILES, fim_rate=0.0)
    assert whole[1] == [("[KEY] c.md [CTX] ", 0), ("text", 1)]
    assert anchored_files(FILES, seed=5) == anchored_files(FILES, seed=5)


def test_answers_and_prompt():
    (sample,) = anchored_answers([("a/b.py", "what is x?", "1")])
    assert sample == [("[KEY] a/b.py [Q] what is x? ", 0), ("[A] 1", 1)]
    assert anchor_prompt(["a/b.py"], "what is x?") == sample[0][0] + "[A] "
    assert anchor_prompt(["a", "b"], "q") == "[KEY] a [KEY] b [Q] q [A] "
    (plain,) = anchored_answers([("a/b.py", "what is x?", "1")], anchored=False)
    assert plain[0][0] == "[Q] what is x? "
    assert anchor_prompt(["a"], "q", Markers(key="<k>")).startswith("<k> a")


def test_repository(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "sub" / "one.py").write_text("print(1)\n")
    (tmp_path / ".git" / "config").write_text("hidden")
    (tmp_path / "image.bin").write_bytes(b"\0\1")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "large.txt").write_text("x" * 100)
    found = read_repository(tmp_path, largest=50)
    assert found.files == {"sub/one.py": "print(1)\n"}
    assert set(found.skipped) == {"image.bin", "latin.txt", "large.txt"}
    assert set(read_repository(tmp_path, suffixes=(".txt",)).files) == {"large.txt"}
    with pytest.raises(ValueError, match="folder"):
        read_repository(tmp_path / "none")


def test_split_is_lossless_and_bounded():
    text = "ab\n" * 5 + "c" * 23 + "\nend"
    pieces = split_text(text, CharTokenizer(), most=7)
    assert "".join(pieces) == text and max(map(len, pieces)) <= 7
    assert pieces[0] == "ab\nab\n"
    assert split_text("", CharTokenizer()) == []


def test_index_finds_by_nearest_text():
    words = {"red": 0, "green": 1, "blue": 2}

    def embed(texts):
        rows = torch.zeros(len(texts), 3)
        for row, text in zip(rows, texts):
            for word, i in words.items():
                row[i] += text.count(word)
        return rows + 1e-3

    index = AnchorIndex(embed, {"a": "red", "b": ["green green", "blue"], "c": "red green"})
    assert index.search("red red", k=2) == ["a", "c"]
    assert index.search("blue")[0] == "b" and len(index.search("blue")) == 3


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: anchored_files({"a": ""}), ValueError, "files"),
        (lambda: anchored_files(FILES, fim_rate=2), ValueError, "fim_rate"),
        (lambda: anchored_answers([("a", "", "x")]), ValueError, "answers"),
        (lambda: anchor_prompt(["a\nb"], "q"), ValueError, "path"),
        (lambda: AnchorIndex(lambda t: torch.zeros(1, 2), {}), ValueError, "texts"),
        (lambda: AnchorIndex(lambda t: torch.zeros(1, 2), {"a": []}), ValueError, "no text for 'a'"),
        (lambda: AnchorIndex(lambda t: torch.zeros(3, 2), {"a": "x"}), ValueError, "embed: got '3 rows'"),
        (lambda: AnchorIndex(None, {"a": "x"}), TypeError, "embed"),
    ],
)
def test_bad_input(make, error, text):
    with pytest.raises(error, match=text):
        make()
