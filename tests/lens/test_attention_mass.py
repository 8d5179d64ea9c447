"""Attention mass between spans."""

import pytest
import torch

import regard
from regard.lens import row_mass, span_mass
from tiny import tiny_llama
from tiny_chat import SIZE, chat_tokenizer

TALK = [
    {"role": "user", "content": "The key is in the box. Where is the key?"},
    {"role": "assistant", "content": "In the box."},
]


@pytest.fixture(scope="module")
def model():
    return tiny_llama(vocab_size=SIZE)


@pytest.fixture(scope="module")
def prompt():
    return regard.chat_spans(chat_tokenizer(), TALK, add_generation_prompt=False)


def test_is_the_mean_of_sums_of_weights(model, prompt):
    made = regard.record(model, prompt.inputs)
    found = span_mass(made, prompt)
    rows, columns = prompt.spans["assistant"][0], prompt.spans["user"][0]
    for layer in range(3):
        weights = made.weights(layer)[0]
        wanted = weights[:, rows][:, :, columns].sum(-1).mean(-1)
        torch.testing.assert_close(found.between("assistant", "user").scores[layer], wanted)
        torch.testing.assert_close(row_mass(made, layer, prompt.spans["user"])[0], weights[..., columns].sum(-1))


def test_disjoint_spans_that_cover_all_add_up_to_one(model, prompt):
    found = span_mass(model, prompt, keys=["user", "assistant", "template"])
    torch.testing.assert_close(found.mass.sum(-1), torch.ones(1, 3, 4, 3))
    assert (found.mean() >= 0).all()
    assert found.table()["user"]["assistant"] == 0.0  # what comes later is not seen


def test_batch_mates_and_padding_do_not_matter(model, prompt):
    longer = [*TALK, {"role": "user", "content": "And the other one, which I lost?"}]
    both = regard.chat_spans(chat_tokenizer(), [TALK, longer], add_generation_prompt=False)
    together, alone = span_mass(model, both), span_mass(model, prompt)
    torch.testing.assert_close(together.mass[0], alone.mass[0], atol=1e-5, rtol=1e-4)


def test_many_rows_in_pieces(model, prompt, monkeypatch):
    whole = span_mass(model, prompt)
    monkeypatch.setattr(regard.lens.attention_mass, "_ROWS", 7)
    torch.testing.assert_close(span_mass(model, prompt).mass, whole.mass)


def test_what_is_attached_takes_part(model, prompt):
    key = prompt.where("user")[0]
    plain = span_mass(model, prompt, queries=["last"], keys=["user"])
    with regard.attach(model, regard.ZeroTuning(50.0, key=key)):
        steered = span_mass(model, prompt, queries=["last"], keys=["user"])
    assert (steered.mass > plain.mass).all()


def test_last_is_the_last_real_token(model):
    talks = [TALK[:1], TALK]
    for side in ("left", "right"):
        both = regard.chat_spans(chat_tokenizer(), talks, padding_side=side)
        alone = regard.chat_spans(chat_tokenizer(), talks[0])
        found, wanted = (span_mass(model, p, queries=["last"], keys=["user"]).mass[0] for p in (both, alone))
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_table_and_picture(model, prompt, tmp_path):
    found = span_mass(model, prompt, layers=[0, 2])
    assert found.layers == [0, 2] and "assistant" in str(found) and len(str(found).splitlines()) == 4
    one = found.table(layer=2, head=1)["assistant"]["user"]
    assert one == pytest.approx(float(found.mass[0, 1, 1, found.queries.index("assistant"), found.keys.index("user")]))
    pytest.importorskip("matplotlib")
    assert found.plot(tmp_path / "mass.png", "assistant").stat().st_size > 1000


def test_bad_input(model, prompt):
    with pytest.raises(ValueError, match="queries"):
        span_mass(model, prompt, queries=["nobody"])
    with pytest.raises(TypeError, match="spans"):
        span_mass(model, prompt.inputs)
    with pytest.raises(ValueError, match="spans"):
        span_mass(model, prompt, spans={"x": torch.ones(1, 3, dtype=torch.bool)})
    with pytest.raises(ValueError, match="layer"):
        span_mass(model, prompt).table(layer=9)


def test_the_command(monkeypatch, tmp_path):
    from typer.testing import CliRunner

    from regard.cli import app

    monkeypatch.setattr(regard, "load", lambda name: (tiny_llama(vocab_size=SIZE), chat_tokenizer()))
    call = ["lens", "mass", "--prompt", "Ann pays. When?", "--part", "question=When?"]
    got = CliRunner().invoke(app, [*call, "--system", "Be brief.", "--layer", "1", "--png", str(tmp_path / "m.png")])
    assert got.exit_code == 0, got.output
    for word in ("question", "system", "template", "last token", "m.png"):
        assert word in got.output
    got = CliRunner().invoke(app, [*call, "--plain"])
    assert "prompt" in got.output and "template" not in got.output
    got = CliRunner().invoke(app, [*call, "--part", "oops"])
    assert isinstance(got.exception, ValueError) and "NAME=TEXT" in str(got.exception)
