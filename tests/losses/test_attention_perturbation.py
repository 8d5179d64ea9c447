"""Attention AT, iAT, VAT, iVAT beyond the recorded numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from regard.losses import AttentionAT, AttentionVAT, classification_loss
from regard.losses.attention_perturbation import difference_scale, perturbation_along
from regard.models import AttentionClassifier

IDS = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 2, 0, 0], [4, 0, 0, 0, 0]])
INPUTS = {"input_ids": IDS}
LABELS = torch.tensor([0, 1, 1])


def classifier(classes=2, **options):
    torch.manual_seed(0)
    model = AttentionClassifier(12, classes, 6, 5, **options).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.7)
    return model


@pytest.mark.parametrize("classes", [1, 2])
@pytest.mark.parametrize("options", [{}, {"interpretable": True}, {"interpretable": True, "differences": "sentence"}])
def test_the_attack_hurts_and_leaves_padding_alone(classes, options):
    model = classifier(classes)
    made = AttentionAT(0.05, **options)(model, INPUTS, LABELS)
    assert made.adversarial > made.clean
    assert (made.perturbation[IDS == 0] == 0).all()
    if not options:
        torch.testing.assert_close(made.perturbation.norm(dim=1)[:2], torch.full((2,), 0.05).double())
        # the first-order gain of a step along the gradient is eps times its norm, row by row
        delta = torch.zeros(IDS.shape, dtype=torch.double, requires_grad=True)
        loss = classification_loss(model(IDS, logits_delta=delta).logits, LABELS)
        slope = torch.autograd.grad(loss, delta)[0].norm(dim=1).sum()
        assert float((made.adversarial - made.clean).detach()) == pytest.approx(float(0.05 * slope), rel=0.1)
    torch.testing.assert_close(made.total, made.clean + made.adversarial)
    assert all(p.grad is None for p in model.parameters())  # nothing is left behind before backward
    made.total.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_nothing_is_nothing():
    model = classifier()
    made = AttentionAT(0.0, lam=0.5)(model, INPUTS, LABELS)
    torch.testing.assert_close(made.adversarial, made.clean)
    torch.testing.assert_close(made.total, 1.5 * made.clean)
    assert float(AttentionVAT(0.0)(model, INPUTS).loss.detach()) == pytest.approx(0.0, abs=1e-12)


def test_released_iat_is_at_with_the_sign_flipped_and_plain_counts_twice():
    model = classifier()
    at, iat = (AttentionAT(0.3, interpretable=i, variant="released")(model, INPUTS, LABELS) for i in (False, True))
    torch.testing.assert_close(iat.perturbation, -at.perturbation)
    assert iat.adversarial < iat.clean < at.adversarial
    torch.testing.assert_close(at.total, 2 * at.clean + at.adversarial)


def explicit(logits, gradient, eps, differences):
    """iAT with all T x T differences and weights, row by row."""
    made = torch.zeros_like(logits)
    for row, (a, g) in enumerate(zip(logits, gradient)):
        real = torch.isfinite(a)
        d = torch.where(real[:, None] & real, a - a[:, None], 0.0).nan_to_num()
        d = F.normalize(d, dim=1) if differences == "word" else d / d.norm().clamp(min=1e-12)
        alpha = torch.zeros_like(d, requires_grad=True)
        first_order = ((alpha * d).sum(1) * g).sum()
        by_alpha = torch.autograd.grad(first_order, alpha)[0]
        made[row] = (eps * by_alpha / by_alpha.norm().clamp(min=1e-12) * d).sum(1)
    return made


@pytest.mark.parametrize("differences", ["word", "sentence"])
def test_iat_in_closed_form_is_the_definition_over_all_pairs(differences):
    torch.manual_seed(0)
    logits, gradient = torch.randn(4, 7).double(), torch.randn(4, 7).double()
    for row, length in enumerate((7, 4, 2, 1)):
        logits[row, length:], gradient[row, length:] = -torch.inf, 0
    found = perturbation_along(gradient, 1.7, difference_scale(logits, differences))
    torch.testing.assert_close(found, explicit(logits, gradient, 1.7, differences))
    if differences == "word":  # what the paper's formula comes to: scalars have one direction each
        torch.testing.assert_close(found[:3], perturbation_along(gradient, 1.7)[:3])
    assert (found[3] == 0).all()  # one word has no differences


def test_two_words_are_pushed_apart_or_together():
    model = classifier()
    ids = torch.tensor([[3, 4], [5, 6]])
    for made in (
        AttentionAT(0.5, interpretable=True, differences="sentence")(model, {"input_ids": ids}, torch.tensor([0, 1])),
        AttentionVAT(0.5, interpretable=True, differences="sentence")(model, {"input_ids": ids}),
    ):
        torch.testing.assert_close(made.perturbation.sum(1), torch.zeros(2).double())
        assert (made.perturbation.abs() > 0).all()


@pytest.mark.parametrize("classes", [1, 2, 4])
def test_vat_is_a_divergence_that_grows(classes):
    model = classifier(classes)
    losses = [
        float(AttentionVAT(eps)(model, INPUTS, torch.Generator().manual_seed(0)).loss.detach())
        for eps in (0.05, 0.2, 0.8)
    ]
    assert 0 < losses[0] < losses[1] < losses[2]
    assert losses[1] / losses[0] == pytest.approx(16, rel=0.3)  # quadratic near zero
    made = AttentionVAT(0.5)(model, INPUTS)
    assert (made.perturbation[IDS == 0] == 0).all()
    made.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert model.pooling.v.weight.grad.abs().sum() > 0


def test_one_logit_is_two_classes():
    one, two = classifier(1), classifier(2)
    two.load_state_dict(
        {k: v if not k.startswith("output") else torch.cat([0 * v, v]) for k, v in one.state_dict().items()}
    )
    found = [AttentionVAT(0.7)(m, INPUTS, torch.Generator().manual_seed(3)).loss for m in (one, two)]
    torch.testing.assert_close(*found)


def test_power_iteration_finds_the_gradient_of_the_logit():
    """Two classes and a small step: the Hessian of the KL is w g g^T, so its top direction is the logit's own gradient."""
    model = classifier(1)
    ids = IDS[:1]
    r = AttentionVAT(1.0, xi=1e-3)(model, {"input_ids": ids}).perturbation
    delta = torch.zeros(ids.shape, dtype=torch.double, requires_grad=True)
    g = torch.autograd.grad(model(ids, logits_delta=delta).logits.sum(), delta)[0]
    assert float(F.cosine_similarity(r, g).abs()) == pytest.approx(1.0, abs=1e-4)


def test_labels_in_place_of_the_prediction_give_attention_at():
    """KL to a one-hot p is the label loss: near zero, its gradient is AT's direction."""
    model = classifier(2)
    at = AttentionAT(1.0)(model, INPUTS, LABELS)
    hot = F.one_hot(LABELS, 2).double()
    delta = torch.zeros(IDS.shape, dtype=torch.double, requires_grad=True)
    log_q = model(IDS, logits_delta=delta).logits.log_softmax(1)
    divergence = -(hot * log_q).sum(1).mean()
    r = perturbation_along(torch.autograd.grad(divergence, delta)[0], 1.0)
    torch.testing.assert_close(r, at.perturbation)


def test_every_pass_sees_the_same_dropout_and_every_call_another_direction():
    model = classifier(2, dropout=0.5).train()
    assert float(AttentionVAT(0.0)(model, INPUTS).loss) == pytest.approx(0.0, abs=1e-12)
    still = classifier(2).eval()
    first, second = (AttentionVAT(1.0, xi=3.0)(still, INPUTS).perturbation for _ in range(2))
    assert not torch.equal(first, second)
    same = [AttentionVAT(1.0)(still, INPUTS, torch.Generator().manual_seed(5)).perturbation for _ in range(2)]
    assert torch.equal(*same)


def test_rows_do_not_depend_on_batch_mates():
    model = classifier()
    whole = AttentionAT(0.5)(model, INPUTS, LABELS).perturbation
    alone = AttentionAT(0.5)(model, {"input_ids": IDS[1:2, :3]}, LABELS[1:2]).perturbation
    torch.testing.assert_close(whole[1:2, :3], alone)


def test_weighted_binary_loss_and_bad_input():
    logits, labels = torch.tensor([[0.3], [-0.2]]), torch.tensor([1, 0])
    want = (3 * F.softplus(torch.tensor(-0.3)) + F.softplus(torch.tensor(-0.2))) / 2
    torch.testing.assert_close(classification_loss(logits, labels, 3.0), want)
    with pytest.raises(ValueError, match="pos_weight"):
        classification_loss(torch.zeros(2, 2), labels, 3.0)
    for bad in ({"eps": -1}, {"variant": "official"}, {"differences": "row"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            AttentionAT(**bad)
    for bad in ({"xi": 0.0}, {"n_power": 0}, {"eps": -0.1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            AttentionVAT(**bad)
    with pytest.raises(ValueError, match="inputs"):
        AttentionAT()(classifier(), {}, labels)
