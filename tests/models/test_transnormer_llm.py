"""TransNormerLLM as a whole: state, padding, what its parts are, and its configuration files."""

import json

import pytest
import torch

import regard
from regard.models import TransNormerLLM

SIZES = {"vocab_size": 23, "dim": 16, "num_layers": 3, "num_heads": 4, "glu_dim": 24}


def _model(seed=0, **options):
    torch.manual_seed(seed)
    model = TransNormerLLM(**{**SIZES, "lrpe": [1, 0, 0], **options}).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model


def _ids(*shape, seed=0):
    return torch.randint(1, 23, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("options", [{}, {"norm": "layernorm", "bias": True}, {"variant": "paper", "hidden_dim": 24}])
def test_reading_on_equals_reading_at_once(options):
    model, ids = _model(**options), _ids(2, 21)
    whole, state, parts = model(ids), None, []
    for piece in ids.split([8, 1, 5, 7], dim=1):
        logits, state = model(piece, state, return_state=True)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(model(ids[:1]), whole[:1])
    torch.testing.assert_close(model(ids[:, :9]), whole[:, :9])  # later tokens do not matter


def test_generation_needs_the_same_memory_at_any_length():
    model = _model()
    assert model.state_nbytes(7) == model.state_nbytes(300)
    ids = _ids(1, 6)
    got, slow = model.generate(ids, 5), ids
    for _ in range(5):
        slow = torch.cat([slow, model(slow)[:, -1:].argmax(-1)], 1)
    assert torch.equal(got, slow)


def test_left_padding_changes_nothing_but_positions():
    model, ids = _model(), _ids(1, 9)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1)
    mask = torch.arange(13)[None] >= 4
    torch.testing.assert_close(model(padded, padding_mask=mask)[:, 4:], model(ids))
    new = model.generate(padded, 4, padding_mask=mask)[:, 13:]
    assert torch.equal(new, model.generate(ids, 4)[:, 9:])
    assert not torch.allclose(model(padded)[:, 4:], model(ids))


def test_layers_forget_fast_at_first_and_hardly_at_last():
    model = _model(num_layers=4, lrpe=None)
    rates = torch.stack([-block.mixer.log_decay for block in model.blocks])
    assert (rates[:-1] > rates[1:]).all() and float(rates[-1].max()) < 1e-4
    assert not any("lrpe" in name for name, _ in model.named_parameters())


def test_embeddings_are_scaled_and_padding_is_not_trained():
    model = _model()
    model(_ids(2, 5)).sum().backward()
    assert model.embedding.weight.grad[0].abs().max() == 0
    plain = _model(scale_embedding=False)
    plain.load_state_dict(model.state_dict())
    ids = _ids(1, 5)
    torch.testing.assert_close(plain._embed(ids, 0) * 4, model._embed(ids, 0))


def test_configurations(tmp_path):
    config = {
        "vocab_size": 30, "decoder_embed_dim": 16, "decoder_layers": 2, "decoder_attention_heads": 2, "hidden_dim": 24, "glu_dim": -1,
        "linear_use_lrpe_list": [1, 0], "no_scale_embedding": True, "bias": True, "norm_type": "layernorm", "pad_token_id": 3,
    }  # fmt: skip
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    model = TransNormerLLM.from_config(path)
    assert model.scale == 1.0 and model.blocks[0].mlp.l1.weight.shape == (16, 16) and model.embedding.padding_idx == 3
    assert [block.mixer.lrpe is not None for block in model.blocks] == [True, False]
    again = TransNormerLLM.from_config(config, scale_embedding=True)
    assert again.scale == 4.0 and again.state_dict().keys() == model.state_dict().keys()
    theirs = {"lm_head.weight": torch.randn(30, 16)}
    with pytest.raises(ValueError, match="missing"):
        regard.load_official(model, theirs)
    for bad in ({"vocab_size": 5}, tmp_path / "none.json"):
        with pytest.raises(ValueError, match="config: got"):
            TransNormerLLM.from_config(bad)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"lrpe": [1]}, "lrpe"),
        ({"variant": "old"}, "variant"),
        ({"norm": "rms"}, "norm"),
        ({"activation": "tanhh"}, "activation"),
        ({"glu_dim": 0}, "glu_dim"),
        ({"padding_id": 99}, "padding_id"),
        ({"num_heads": 3}, "dim"),
    ],
)
def test_errors_name_the_argument(change, names):
    with pytest.raises((ValueError, TypeError), match=names):
        TransNormerLLM(**{**SIZES, **change})
