"""The head atlas: kinds of heads on models whose heads are known, the files, the picture, the command."""

import json
import math

import pytest
import torch
from typer.testing import CliRunner

import regard
from regard.lens import HeadAtlas, HeadScores, NeedleHaystack, head_atlas, probes, repeated_tokens
from tiny import CharTokenizer, tiny_llama

QUICK = ("induction", "duplicate token", "previous token", "sink", "local")


class FakeRecord:
    def __init__(self, weights, tokens):
        self.layers, self._weights, self.tokens = [0], weights, tokens

    def q(self, layer):
        return self._weights

    def weights(self, layer, rows):
        return self._weights[:, :, rows]


def test_duplicate_token_reads_earlier_copies_and_never_itself():
    tokens = torch.tensor([[5, 6, 5, 6]])
    rows = torch.eye(4)
    rows[2] = torch.tensor([0.5, 0.25, 0.25, 0.0])  # its copy at 0, itself at 2
    rows[3] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    assert probes.duplicate_token(FakeRecord(rows[None, None], tokens))[0, 0] == 0.75
    assert math.isnan(probes.duplicate_token(FakeRecord(rows[None, None], torch.arange(4)[None]))[0, 0])


def test_repeated_tokens():
    ids = repeated_tokens(CharTokenizer(), 3, 20, seed=1, vocabulary=128)
    assert ids.shape == (3, 40) and torch.equal(ids[:, :20], ids[:, 20:])
    assert all(len(set(row[:20].tolist())) == 20 for row in ids) and not torch.equal(ids[0], ids[1])
    assert torch.equal(ids, repeated_tokens(CharTokenizer(), 3, 20, seed=1, vocabulary=128))


def test_the_atlas_finds_a_head_that_was_made_to_do_one_thing():
    """A method turns two heads into a previous-token and an induction head; the atlas sees it, and only there."""
    model, tokenizer = tiny_llama(), CharTokenizer()
    length = 64

    class Planted(regard.Method):
        def edit(self, call):
            n = call.q_len
            bias = torch.zeros(1, call.num_heads, n, n)
            if call.layer == 1:
                bias[0, 2, torch.arange(1, n), torch.arange(n - 1)] = 50.0
            if call.layer == 2:
                half = length // 2
                rows = torch.arange(half, n)
                bias[0, 3, rows, rows - half + 1] = 50.0
                bias[0, 0, rows, rows - half] = 50.0
            call.add_bias(bias)

    with regard.attach(model, Planted()):
        atlas = head_atlas(model, tokenizer, kinds=QUICK, prompts=2, length=length)
    assert atlas.heads("previous token") == [(1, 2)]
    assert atlas["induction"].top(1) == [(2, 3)] and atlas["induction"][2, 3] > 0.99
    assert atlas["duplicate token"].top(1) == [(2, 0)] and atlas["duplicate token"][2, 0] > 0.99
    assert "induction" in atlas.kinds_of(2, 3) and "induction" not in atlas.kinds_of(1, 2)


def test_files_and_picture(tmp_path):
    samples = NeedleHaystack(lengths=(256,), depths=(50,), chat=False)
    atlas = head_atlas(tiny_llama(), CharTokenizer(), prompts=1, length=64, samples=samples)
    assert list(atlas.tables) == ["retrieval", *QUICK]
    assert all(table.scores.shape == (3, 4) for table in atlas.tables.values())
    for suffix in ("json", "safetensors"):
        again = HeadAtlas.load(atlas.save(tmp_path / f"heads.{suffix}"))
        assert list(again.tables) == list(atlas.tables) and again.info == atlas.info
        for kind, table in atlas.tables.items():
            assert torch.allclose(again[kind].scores, table.scores.float(), atol=1e-6, equal_nan=True)
    assert atlas.plot(tmp_path / "heads.png").read_bytes()[:4] == b"\x89PNG"
    experts = HeadScores(torch.rand(2, 5), name="contrast", unit="expert")
    assert experts.plot(tmp_path / "one.svg").read_text().startswith("<?xml")
    experts.save(tmp_path / "one.safetensors")
    assert HeadScores.load(tmp_path / "one.safetensors").unit == "expert" and "5 experts" in repr(experts)


def test_bad_input(tmp_path):
    model, tokenizer = tiny_llama(), CharTokenizer()
    with pytest.raises(ValueError, match="did you mean induction"):
        head_atlas(model, tokenizer, kinds=["inductoin"])
    with pytest.raises(ValueError, match="text: got .5 tokens"):
        head_atlas(model, tokenizer, kinds=["sink"], text="short")
    atlas = HeadAtlas({"sink": HeadScores(torch.rand(2, 2))})
    with pytest.raises(ValueError, match="kind: unknown name"):
        atlas["induction"]
    with pytest.raises(ValueError, match="a name that ends in"):
        atlas.save(tmp_path / "heads.txt")
    with pytest.raises(ValueError, match="a name that ends in one of"):
        atlas.plot(tmp_path / "heads.docx")
    (tmp_path / "broken.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"HeadAtlas\.save wrote"):
        HeadAtlas.load(tmp_path / "broken.json")


def test_the_command(tmp_path, monkeypatch):
    from regard.cli import app

    monkeypatch.setattr(regard, "load", lambda name: (tiny_llama(), CharTokenizer()), raising=False)
    got = CliRunner().invoke(
        app, ["lens", "heads", "--model", "tiny", "--out", str(tmp_path), "--kinds", "sink,induction", "--length", "64"]
    )
    assert got.exit_code == 0, got.output
    assert "sink" in got.output and "3 layers x 4 heads" in got.output
    assert set(json.loads((tmp_path / "heads.json").read_text())["kinds"]) == {"sink", "induction"}
    assert (tmp_path / "heads.png").exists() and HeadAtlas.load(tmp_path / "heads.safetensors").info["model"] == "tiny"
