"""Influence: the first-order change of the loss by its definition, against real changes, and what the profile leaves alone."""

import pytest
import torch
from torch import nn

import regard
from regard.lens import answered_by_dense, attention_influence, influence_blocks
from regard.methods import AttentionCall
from tiny import tiny_llama


def by_definition(weights, gradient):
    """Sum over k of G_ik (A'_ik - A_ik), A' = row i after taking A_ij away and renormalising."""
    out = torch.zeros_like(weights)
    for i in range(weights.shape[2]):
        row = weights[:, :, i]
        for j in range(i + 1):
            changed = row.clone()
            changed[:, :, j] = 0
            left = changed.sum(-1, keepdim=True)
            changed = torch.where(left > 0, changed / left, changed)
            out[:, :, i, j] = (gradient[:, :, i] * (changed - row)).sum(-1)
    return out


@pytest.mark.parametrize("block", [1, 4, 6, 32])
def test_blocks_are_the_definition_summed(block):
    generator = torch.Generator().manual_seed(0)
    q, grad = (torch.randn(2, 4, 20, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    k, v = (torch.randn(2, 2, 20, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    call = AttentionCall(nn.Identity(), 0, q, k, v, causal=True)
    want = by_definition(call.weights(), grad @ v.repeat_interleave(2, 1).mT)
    size = -(-20 // block)
    want = nn.functional.pad(want, (0, size * block - 20, 0, size * block - 20))
    want = want.unflatten(-1, (size, block)).sum(-1).unflatten(2, (size, block)).sum(3).mean(0)
    torch.testing.assert_close(influence_blocks(call, grad, block), want, rtol=1e-9, atol=1e-9)


def test_it_foretells_the_change_of_the_loss():
    """Take one small weight away in one layer of a real forward: the loss changes by what the profile says, to first order."""
    model = tiny_llama().double()
    ids = torch.randint(1, 128, (1, 12), generator=torch.Generator().manual_seed(1))
    found = attention_influence(model, ids, block=1)[12]

    def loss(layer=None, head=0, i=0, j=0):
        class Without(regard.Method):
            def edit(self, call):
                def drop(weights):
                    weights = weights.clone()
                    weights[0, 0, i, j] = 0
                    return weights / weights.sum(-1, keepdim=True)

                if call.layer == layer:
                    call.on_weights(drop, [head])

        with regard.attach(model, *([Without()] if layer is not None else [])), torch.no_grad():
            return float(model(ids, labels=ids).loss)

    base = loss()
    record = regard.record(model, ids)
    checked = 0
    for layer in range(3):
        weights = record.weights(layer)[0]
        for head, i, j in ((0, 5, 2), (1, 11, 7), (3, 8, 8), (2, 3, 1)):
            change, told = loss(layer, head, i, j) - base, float(found[layer, head, i, j])
            assert change == pytest.approx(told, rel=0.15, abs=2e-5), (layer, head, i, j, float(weights[head, i, j]))
            checked += abs(told) > 1e-4
    assert checked >= 4


def test_a_profile_leaves_the_model_alone():
    model = tiny_llama().train()
    model.lm_head.weight.requires_grad_(False)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    ids = torch.randint(1, 128, (2, 30), generator=torch.Generator().manual_seed(1))
    found = attention_influence(model, [ids, {"input_ids": ids[:1, :16]}], block=8)
    assert {length: tuple(t.shape) for length, t in found.items()} == {16: (3, 4, 2, 2), 32: (3, 4, 4, 4)}
    assert all(not t.triu(1).any() and bool(t.isfinite().all()) for t in found.values())
    assert model.training and not model.lm_head.weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_samples_are_averaged_and_labels_choose():
    model = tiny_llama()
    ids = torch.randint(1, 128, (2, 24), generator=torch.Generator().manual_seed(2))
    both = attention_influence(model, ids, block=8)[24]
    alone = [attention_influence(model, ids[i : i + 1], block=8)[24] for i in range(2)]
    torch.testing.assert_close(both, (alone[0] + alone[1]) / 2, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(attention_influence(model, list(ids[:, None]), block=8)[24], both, rtol=1e-4, atol=1e-7)
    labels = torch.full_like(ids, -100)
    labels[:, 10] = ids[:, 10]
    early = attention_influence(model, {"input_ids": ids, "labels": labels}, block=8)[24]
    assert early[:, :, :2].abs().max() > 0 and not early[:, :, 2].any()  # later rows cannot matter for token 10


def test_calibration_answers_are_the_models_own():
    model = tiny_llama()
    ids = torch.randint(1, 128, (1, 20), generator=torch.Generator().manual_seed(2))
    sample = answered_by_dense(model, ids, 5)
    assert sample["input_ids"].shape == (1, 25) and torch.equal(sample["input_ids"][:, :20], ids)
    assert (sample["labels"][:, :20] == -100).all() and torch.equal(
        sample["labels"][:, 20:], sample["input_ids"][:, 20:]
    )


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            {"input_ids": torch.ones(1, 8).long(), "attention_mask": torch.tensor([[0] + [1] * 7])},
            "attention_mask: got",
        ),
        ({"input_ids": torch.ones(1, 8).long(), "labels": torch.full((1, 8), -100)}, "labels: got 'none that counts'"),
        ({"input_ids": torch.ones(1, 8).long(), "labels": torch.ones(1, 7).long()}, "labels: got 'shape"),
        (torch.ones(1, 1).long(), "input_ids: got"),
        ([], "batches: got 'none'"),
        ("text", "batches: got str"),
    ],
)
def test_bad_batches_are_named(batch, message):
    with pytest.raises((ValueError, TypeError), match=message):
        attention_influence(tiny_llama(), [batch] if isinstance(batch, str) else batch)
