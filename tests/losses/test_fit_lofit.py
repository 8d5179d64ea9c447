"""LoFiT: attached vectors, the two steps of training, the merge."""

import copy

import pytest
import torch

import regard
from regard.losses import dpo_loss, fit_lofit, lofit_heads, merge_lofit
from regard.losses.runner import fingerprint
from regard.methods import HeadAffine
from tiny import tiny_llama

QUIET = {"progress": False}


@pytest.fixture(scope="module")
def model():
    return tiny_llama(2)


@pytest.fixture(scope="module")
def batches():
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(3):
        ids = torch.randint(1, 128, (4, 9), generator=generator)
        labels = ids.clone()
        labels[:, :4] = -100
        made.append({"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)})
    return made


def some_vectors(heads=((0, 1), (2, 3)), seed=1, **options):
    tuned = HeadAffine(heads, 8, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return tuned


@torch.no_grad()
def logits(model, batch, *methods):
    with regard.attach(model, *methods):
        return model(batch["input_ids"]).logits


def test_zero_vectors_change_nothing_and_minus_one_switches_a_head_off(model, batches):
    plain = logits(model, batches[0])
    assert torch.equal(logits(model, batches[0], regard.LoFiT(HeadAffine([(0, 1)], 8))), plain)
    off = HeadAffine([(0, 1), (2, 3)], 8, shift=False)
    with torch.no_grad():
        off.scale.fill_(-1.0)
    zeroed = logits(model, batches[0], regard.MaskHeads([(0, 1), (2, 3)], mode="zero", phase="all"))
    torch.testing.assert_close(logits(model, batches[0], regard.LoFiT(off)), zeroed, rtol=1e-5, atol=1e-6)
    assert torch.equal(logits(model, batches[0], regard.LoFiT(some_vectors(), strength=0.0)), plain)
    half = logits(model, batches[0], regard.LoFiT(some_vectors(), strength=0.5))
    vectors = some_vectors()
    with torch.no_grad():
        for parameter in vectors.parameters():
            parameter.mul_(0.5)
    torch.testing.assert_close(half, logits(model, batches[0], regard.LoFiT(vectors)), rtol=1e-5, atol=1e-5)


def test_other_heads_come_back_bit_by_bit():
    outputs = torch.randn(2, 4, 5, 8)
    tuned = some_vectors(((1, 2),))
    assert tuned(outputs, 0) is outputs
    made = tuned(outputs, 1)
    assert torch.equal(made[:, [0, 1, 3]], outputs[:, [0, 1, 3]])
    torch.testing.assert_close(made[:, 2], outputs[:, 2] * (1 + tuned.scale[0]) + tuned.shift[0])


def test_generation_is_what_one_forward_says(model, batches):
    ids = batches[0]["input_ids"][:1]
    method = regard.LoFiT(some_vectors())
    with torch.no_grad(), regard.attach(model, method):
        made = model.generate(ids, max_new_tokens=4, do_sample=False)
        again = model(made[:, :-1]).logits[0, -4:].argmax(-1)
    assert torch.equal(again, made[0, -4:])


def test_merging_gives_the_attached_numbers(model, batches):
    for options in ({}, {"scale": False}, {"shift": False}):
        tuned = some_vectors(**options)
        attached = logits(model, batches[0], regard.LoFiT(tuned))
        merged = copy.deepcopy(model)
        merge_lofit(merged, tuned)
        torch.testing.assert_close(logits(merged, batches[0]), attached, rtol=1e-4, atol=1e-5)


def test_merging_into_conv1d(batches):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=32, n_layer=3, n_head=4, n_positions=64)).eval()
    tuned = some_vectors()
    attached = logits(gpt, batches[0], regard.LoFiT(tuned))
    merge_lofit(gpt, tuned)
    torch.testing.assert_close(logits(gpt, batches[0]), attached, rtol=1e-4, atol=1e-5)


def test_training_lowers_the_loss_and_leaves_the_model_alone(model, batches, tmp_path):
    before = fingerprint(model)
    scores = lofit_heads(model, batches, steps=6, lr=0.05, l1=1e-4, **QUIET)
    assert scores.scores.shape == (3, 4) and bool((scores.scores > 0).all())
    tuned = fit_lofit(model, batches, scores.top(3), steps=30, lr=0.05, out=tmp_path / "lofit.safetensors", **QUIET)
    assert fingerprint(model) == before and not any(p.grad is not None for p in model.parameters())
    assert sum(p.numel() for p in tuned.parameters()) == 3 * 8 and tuned.scale is None
    first, last = tuned.fitted.losses[:3], tuned.fitted.losses[-3:]
    assert sum(last) < sum(first) - 0.05
    again = HeadAffine.load(tmp_path / "lofit.safetensors")
    assert torch.equal(again.shift, tuned.shift) and torch.equal(again.heads, tuned.heads)
    assert torch.equal(
        logits(model, batches[0], regard.LoFiT(tmp_path / "lofit.safetensors")),
        logits(model, batches[0], regard.LoFiT(tuned)),
    )
    assert again.save(tmp_path / "again.safetensors").exists()


def test_a_strong_penalty_keeps_scales_small(model, batches):
    loose = lofit_heads(model, batches, steps=15, lr=0.02, l1=0.0, **QUIET)
    tight = lofit_heads(model, batches, steps=15, lr=0.02, l1=1.0, **QUIET)
    assert tight.scores.sum() < 0.5 * loose.scores.sum()


def test_preferences(model, batches):
    zeros = torch.zeros(2)
    assert float(dpo_loss(zeros, zeros, zeros, zeros)) == pytest.approx(0.693147, abs=1e-5)
    want = -torch.nn.functional.logsigmoid(torch.tensor(0.5 * (3.0 - 1.0)))
    assert float(dpo_loss(zeros + 3, zeros, zeros + 1, zeros)) == pytest.approx(float(want))
    pairs = [{"chosen": batches[0], "rejected": batches[1]}]
    tuned = fit_lofit(model, pairs, [(0, 0), (1, 1), (2, 2)], loss="dpo", steps=12, lr=0.05, **QUIET)
    assert tuned.fitted.losses[0] == pytest.approx(0.693, abs=0.01) and tuned.fitted.losses[-1] < 0.68


def test_a_number_of_heads_lets_step_one_choose(model, batches):
    tuned = fit_lofit(model, batches, 2, steps=2, select={"steps": 3, "l1": 0.0}, **QUIET)
    scores = lofit_heads(model, batches, steps=3, l1=0.0, **QUIET)
    assert [tuple(head) for head in tuned.heads.tolist()] == scores.top(2)


def test_bad_input(model, batches):
    with pytest.raises(ValueError, match="different"):
        HeadAffine([(0, 0), (0, 0)], 8)
    with pytest.raises(ValueError, match="at least one"):
        HeadAffine([], 8)
    with pytest.raises(ValueError, match=r"layers in \[0, 3\)"):
        fit_lofit(model, batches, [(3, 0)], steps=1)
    with pytest.raises(ValueError, match="layer 7"):
        regard.attach(model, regard.LoFiT(HeadAffine([(7, 0)], 8)))
    with regard.attach(model, regard.LoFiT(HeadAffine([(0, 0)], 5))), pytest.raises(ValueError, match="vectors of 5"):
        model(batches[0]["input_ids"])
    with pytest.raises(TypeError, match="HeadAffine"):
        regard.LoFiT(torch.zeros(3))
    with pytest.raises(TypeError, match="chosen"):
        fit_lofit(model, batches, [(0, 0)], loss="dpo", steps=1, **QUIET)
    with pytest.raises(ValueError, match="a batch without labels"):
        fit_lofit(model, [batches[0] | {"labels": torch.full((4, 9), -100)}], [(0, 0)], steps=1, **QUIET)
    with pytest.raises(ValueError, match="attn_A"):
        HeadAffine.from_official({"model.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2)})
