"""Head outputs from another run, as a method."""

import pytest
import torch

import regard
from regard.lens import LogitDifference, head_outputs, total_effects
from tiny import tiny_llama


@pytest.fixture(scope="module")
def model():
    model = tiny_llama(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() == 2 else 1)
    return model


@pytest.fixture(scope="module")
def pair():
    return torch.randint(1, 128, (2, 2, 7), generator=torch.Generator().manual_seed(1))


def logits(model, ids, *methods):
    with regard.attach(model, *methods), torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("position", [None, -2])
def test_agrees_with_the_patching_engine(model, pair, position):
    clean, corrupted = pair
    other = head_outputs(model, corrupted, position)
    assert other.shape == (3, 2, 4, 7 if position is None else 1, 8)
    metric = LogitDifference(torch.tensor([1, 2]), torch.tensor([3, 4]))
    effect = total_effects(model, clean, corrupted, metric, position=position, relative="none")
    plain = metric(logits(model, clean)[:, -1], torch.arange(2)).mean()
    for layer, head in ((0, 1), (2, 3)):
        method = regard.PatchHeads({(layer, head): other[layer][:, head]}, None if position is None else [position])
        said = metric(logits(model, clean, method)[:, -1], torch.arange(2)).mean()
        assert float(said - plain) == pytest.approx(effect[layer, head], rel=1e-3, abs=1e-4)


def test_its_own_outputs_change_nothing(model, pair):
    clean = pair[0]
    mine = head_outputs(model, clean)
    every = {(layer, head): mine[layer][:, head] for layer in range(3) for head in range(4)}
    torch.testing.assert_close(
        logits(model, clean, regard.PatchHeads(every)), logits(model, clean), rtol=1e-4, atol=1e-4
    )
    one = regard.PatchHeads({(-1, 2): mine[2][0, 2]})  # one prompt's values for both rows
    said = logits(model, clean, one)
    torch.testing.assert_close(said[0], logits(model, clean)[0], rtol=1e-4, atol=1e-4)
    assert (said[1] - logits(model, clean)[1]).abs().max() > 1e-3


def test_decoding_goes_on(model, pair):
    clean, corrupted = pair
    method = regard.PatchHeads({(1, 0): head_outputs(model, corrupted)[1][:, 0]})
    with regard.attach(model, method), torch.no_grad():
        out = model.generate(clean, max_new_tokens=3, do_sample=False)
    assert out.shape == (2, 10)


def test_bad_input(model, pair):
    clean = pair[0]
    good = torch.zeros(7, 8)
    with pytest.raises(TypeError, match="values"):
        regard.PatchHeads([(1, 1)])
    with pytest.raises(ValueError, match="values"):
        regard.PatchHeads({(1, 1): 3})
    with pytest.raises(ValueError, match="pairs"):
        regard.PatchHeads({1: good})
    with pytest.raises(ValueError, match="one a position"):
        regard.PatchHeads({(1, 1): good}, positions=[0])
    with pytest.raises(ValueError, match="layer 3"):
        regard.attach(model, regard.PatchHeads({(3, 1): good}))
    for values, positions, words in (
        ({(1, 4): good}, None, r"heads in \[0, 4\)"),
        ({(1, 1): good[:, :4]}, None, "shape"),
        ({(1, 1): good[:5]}, None, "shape"),
        ({(1, 1): good.expand(3, -1, -1)}, None, "shape"),
        ({(1, 1): good[:1]}, [7], "positions"),
    ):
        with pytest.raises(ValueError, match=words):
            logits(model, clean, regard.PatchHeads(values, positions))
