"""Arithmetic heads: the probability ratio by its definition, prompts that do not count, and mean outputs."""

import pytest
import torch

import regard
from regard.lens import AnswerProbability, arithmetic_heads, mean_head_outputs, path_effects
from tiny import tiny_llama


@pytest.fixture(scope="module")
def model():
    model = tiny_llama(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() == 2 else 1)
    return model


@pytest.fixture(scope="module")
def pair():
    clean = torch.randint(1, 128, (5, 8), generator=torch.Generator().manual_seed(4))
    corrupted = clean.clone()
    corrupted[:, [3, 6]] = torch.randint(1, 128, (5, 2), generator=torch.Generator().manual_seed(5))
    return clean, corrupted


def probability(model, ids, right):
    with torch.no_grad():
        return model(ids).logits[:, -1].softmax(-1).gather(1, right[:, None])[:, 0]


def test_share_of_the_probability_lost(model, pair):
    clean, corrupted = pair
    with torch.no_grad():
        right = model(clean).logits[:, -1].argmax(-1)
    p = probability(model, clean, right)
    bound = float(p.sort().values[2]) - 1e-6
    found = arithmetic_heads(model, clean, corrupted, right, min_probability=bound)
    assert found.num_runs == 3 and found.info["left out"] == 2
    rows = (p > bound).nonzero()[:, 0]
    plain = path_effects(model, clean[rows], corrupted[rows], AnswerProbability(right[rows]), relative="none")
    torch.testing.assert_close(found.runs, plain.runs / p[rows].double()[:, None, None], rtol=1e-3, atol=1e-4)
    assert (found.scores >= -1).all()
    mlps = arithmetic_heads(model, clean, corrupted, right, of="mlp", min_probability=0.0)
    assert mlps.scores.shape == (3, 1) and mlps.num_runs == 5
    same = arithmetic_heads(model, clean, clean, right, min_probability=0.0)
    assert same.scores.abs().max() < 1e-4


def test_mean_outputs(model, pair):
    clean, _ = pair
    found = []
    with regard.attach(model) as session, torch.no_grad():
        session.observers.append(lambda call: found.append(call.run()))
        model(clean)
    torch.testing.assert_close(mean_head_outputs(model, clean), torch.stack(found).mean((1, 3)), rtol=1e-4, atol=1e-5)
    last = mean_head_outputs(model, clean, position=-1)
    torch.testing.assert_close(last, torch.stack(found)[:, :, :, -1].mean(1), rtol=1e-4, atol=1e-5)
    mask = torch.cat([torch.zeros(5, 2), torch.ones(5, 8)], 1).long()
    padded = {"input_ids": torch.cat([clean[:, :2], clean], 1), "attention_mask": mask}
    torch.testing.assert_close(mean_head_outputs(model, padded), mean_head_outputs(model, clean), rtol=1e-3, atol=1e-4)
    with regard.attach(model, regard.MaskHeads([(2, 1)], mode="mean", phase="all", means=last)), torch.no_grad():
        assert model(clean).logits.isfinite().all()


def test_bad_input(model, pair):
    right = torch.zeros(5, dtype=torch.long)
    with pytest.raises(ValueError, match="no prompt"):
        arithmetic_heads(model, *pair, right, min_probability=1.0)
    with pytest.raises(ValueError, match="right"):
        arithmetic_heads(model, *pair, right[:3])
    with pytest.raises(ValueError, match="min_probability"):
        arithmetic_heads(model, *pair, right, min_probability=2.0)
    with pytest.raises(ValueError, match="of"):
        arithmetic_heads(model, *pair, right, of="attn", min_probability=0.0)
