"""Saliency against closed forms; the same functions on classifiers, causal and masked language models."""

from __future__ import annotations

import pytest
import scipy.stats
import torch
from sklearn.metrics import auc, precision_recall_curve

import regard
from regard.lens import (
    ModelScore,
    attention_agreement,
    attention_rollout,
    correlation,
    gradient_input,
    integrated_gradients,
    occlusion,
    rationale_agreement,
    saliency,
)
from regard.models import AttentionClassifier
from tiny import tiny_llama

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 24, "max_position_embeddings": 32}


def linear(seed=0):
    torch.manual_seed(seed)
    w, x, base = (torch.randn(2, 5, 3, dtype=torch.float64) for _ in range(3))
    return w[0], x, base, lambda points: (points * w[0]).sum((1, 2))


def test_linear_score_has_closed_forms():
    w, x, base, score = linear()
    torch.testing.assert_close(gradient_input(score, x), w * x)
    for options in ({}, {"sequential": True}, {"steps": 1}, {"steps": 7, "at_once": 3}):
        torch.testing.assert_close(integrated_gradients(score, x, base, **options), w * (x - base))
    torch.testing.assert_close(occlusion(score, x, base), (w * (x - base)).sum(2))
    wide = (w * (x - base)).sum(2)
    together = torch.stack([wide[:, max(0, t - 1) : t + 2].sum(1) for t in range(5)], 1)
    torch.testing.assert_close(occlusion(score, x, base, window=3, at_once=2), together)
    masks = torch.tensor([[True, False, True, False, False], [False] * 5])
    found = occlusion(score, x, base, masks=masks)
    torch.testing.assert_close(found, torch.stack([wide[:, 0] + wide[:, 2], torch.zeros(2, dtype=torch.float64)], 1))


def test_integrated_gradients_of_a_product_and_completeness():
    """score = x0 * x1: the line from 0 gives each factor half of the product; the midpoint rule is exact for it."""
    x = torch.tensor([[3.0, 5.0]], dtype=torch.float64)
    torch.testing.assert_close(
        integrated_gradients(lambda p: p[:, 0] * p[:, 1], x, steps=3), torch.tensor([[7.5, 7.5]], dtype=torch.float64)
    )
    one_by_one = integrated_gradients(lambda p: p[:, 0] * p[:, 1], x, steps=1, sequential=True)
    torch.testing.assert_close(one_by_one, torch.tensor([[15.0, 15.0]], dtype=torch.float64))
    torch.manual_seed(0)
    x, base = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)

    def score(p):
        return torch.tanh(p).prod(1) + p.square().sum(1).sin()

    errors = [(integrated_gradients(score, x, base, n).sum(1) - score(x) + score(base)).abs().max() for n in (20, 40)]
    assert errors[1] < 1e-2 and 3.5 < errors[0] / errors[1] < 4.5  # second order


@pytest.mark.parametrize("family", ["llama", "bert", "classifier", "hf-classifier"])
def test_completeness_on_models(family):
    model, inputs, options = {
        "llama": language_model,
        "bert": masked_model,
        "classifier": classifier,
        "hf-classifier": hf_classifier,
    }[family]()
    mode = model.training
    word = 5  # not 0.0: an RMSNorm has a kink there
    for of in ("logit", "log_prob"):
        found = saliency(model, inputs, "integrated_gradients", baseline=word, steps=200, at_once=50, of=of, **options)
        score = ModelScore(model, inputs, of=of, **options)
        with torch.no_grad():
            start = model.get_input_embeddings().weight[word].expand_as(score.x)
            whole = score(score.x) - score(torch.where(score.mask[..., None], start, score.x))
        torch.testing.assert_close(found.sum(1), whole, rtol=2e-3, atol=2e-4)
    assert found.shape == inputs["input_ids"].shape and model.training == mode
    assert all(p.grad is None for p in model.parameters())
    lost = saliency(model, inputs, "occlusion", baseline=word, at_once=3, **options)
    alone = saliency(model, inputs, "sequential", baseline=word, steps=200, at_once=50, **options)
    real = ModelScore(model, inputs, **options).mask
    torch.testing.assert_close(alone[real], lost[real], rtol=2e-3, atol=2e-4)
    assert float(lost.abs().sum()) > 0


def language_model():
    return tiny_llama(), {"input_ids": torch.randint(1, 128, (2, 7))}, {"target": torch.tensor([3, 9])}


def masked_model():
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(**SIZES)
    return BertForMaskedLM(config), {"input_ids": torch.randint(1, 40, (2, 6))}, {"position": torch.tensor([1, -2])}


def hf_classifier():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(**SIZES, num_labels=3)
    ids = torch.randint(1, 40, (2, 6))
    return BertForSequenceClassification(config), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, {}


def classifier():
    torch.manual_seed(0)
    ids = torch.tensor([[3, 4, 5, 6], [7, 2, 0, 0]])
    return AttentionClassifier(12, 1, 6, 4, dropout=0.5), {"input_ids": ids}, {}


def test_defaults_are_the_models_own_answer_at_the_last_real_token():
    model = tiny_llama()
    ids = torch.randint(1, 128, (2, 6))
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    score = ModelScore(model, {"input_ids": ids, "attention_mask": mask})
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
    assert score.position.tolist() == [5, 3]
    assert score.target.tolist() == [int(logits[0, 5].argmax()), int(logits[1, 3].argmax())]
    found = saliency(model, {"input_ids": ids, "attention_mask": mask})
    alone = saliency(model, {"input_ids": ids[1:, :4]})
    torch.testing.assert_close(found[1, :4], alone[0], rtol=1e-4, atol=1e-6)
    assert (found[1, 4:] == 0).all()


def test_one_logit_has_two_sides_and_a_function_may_be_the_target():
    model, inputs, _ = classifier()
    up, down = (saliency(model, inputs, target=t) for t in (1, 0))
    torch.testing.assert_close(up, -down)
    as_function = saliency(model, inputs, target=lambda output: output.logits[:, 0])
    torch.testing.assert_close(as_function, up)
    pad = saliency(model, inputs, "occlusion", baseline=0)  # the pad token's embedding, which is zero
    torch.testing.assert_close(pad, saliency(model, inputs, "occlusion", baseline=0.0))
    assert (saliency(model, inputs, magnitude=True) >= up.abs() - 1e-7).all()


def test_rollout_is_the_product_of_maps():
    torch.manual_seed(0)
    maps = [torch.rand(2, 3, 5, 5).softmax(-1) for _ in range(3)]
    eye = torch.eye(5)
    want = torch.eye(5)
    for weights in maps:
        want = (0.5 * weights.mean(1) + 0.5 * eye) @ want
    torch.testing.assert_close(attention_rollout(maps), want)
    torch.testing.assert_close(attention_rollout(maps[:1], residual=0.0), maps[0].mean(1))
    torch.testing.assert_close(attention_rollout(maps, heads="max").sum(-1), torch.ones(2, 5))
    empty = maps[0].clone()
    empty[:, :, 2] = 0
    assert attention_rollout([empty])[0, 2].tolist() == eye[2].tolist()
    model = tiny_llama()
    record = regard.record(model, torch.randint(1, 128, (1, 6)))
    rolled = attention_rollout(record)
    assert rolled.shape == (1, 6, 6) and (rolled.triu(1) == 0).all()
    torch.testing.assert_close(rolled.sum(-1), torch.ones(1, 6))


@pytest.mark.parametrize("ties", [False, True])
def test_correlations_are_scipys(ties):
    torch.manual_seed(1)
    a, b = torch.randn(4, 9), torch.randn(4, 9)
    if ties:
        a, b = (a * 2).round(), (b * 2).round()
    mask = torch.rand(4, 9) > 0.3
    kinds = {"pearson": scipy.stats.pearsonr, "spearman": scipy.stats.spearmanr, "kendall": scipy.stats.kendalltau}
    for kind, theirs in kinds.items():
        found = correlation(a, b, kind, mask)
        for row in range(4):
            want = theirs(a[row][mask[row]].double(), b[row][mask[row]].double()).statistic
            assert float(found[row]) == pytest.approx(want, abs=1e-9)
    assert correlation(a[:1], torch.ones(1, 9)).isnan().all()
    assert correlation(a[:1, :1], b[:1, :1]).isnan().all()


def test_agreement_with_a_models_own_attention_and_with_rollout():
    model, inputs, _ = classifier()
    found = attention_agreement(model, inputs)
    assert set(found) == {"pearson", "spearman", "kendall"} and found["kendall"].shape == (2,)
    assert abs(float(found["spearman"][1])) == pytest.approx(1.0)  # a row of two real tokens
    model, inputs, _ = language_model()
    with pytest.raises(ValueError, match="attention"):
        attention_agreement(model, inputs)
    row = attention_rollout(regard.record(model, inputs))[:, -1]
    assert attention_agreement(model, inputs, attention=row)["pearson"].isfinite().all()


def test_rationale_figures():
    torch.manual_seed(0)
    scores, truth = torch.rand(6, 10), torch.rand(6, 10) > 0.6
    truth[:, 0] = True
    areas = []
    for row, marks in zip(scores, truth):
        precision, recall, _ = precision_recall_curve(marks.int(), row)
        areas.append(auc(recall, precision))
    assert rationale_agreement(scores, truth)["auprc"] == pytest.approx(sum(areas) / 6, abs=1e-9)
    perfect = rationale_agreement(truth.float(), truth)
    assert perfect == {"auprc": 1.0, "token_f1": 1.0, "iou_f1": 1.0}
    one = rationale_agreement(torch.tensor([[0.9, 0.8, 0.1, 0.0]]), torch.tensor([[True, False, False, True]]))
    assert one["token_f1"] == pytest.approx(0.5)
    assert one["iou_f1"] == pytest.approx(2 * 1 * 0.5 / 1.5)  # the span [0, 2) covers half of [0, 1); [3, 4) is missed
    assert all(v != v for v in rationale_agreement(scores, torch.zeros(6, 10, dtype=torch.bool)).values())
    padded = rationale_agreement(torch.tensor([[0.1, 0.9]]), torch.tensor([[True, False]]), torch.tensor([[1, 0]]))
    assert padded["token_f1"] == 1.0


def test_bad_input():
    model, inputs, _ = classifier()
    ids = inputs["input_ids"]
    for arguments, name in (
        ({"method": "gradients"}, "method"),
        ({"target": 2}, "target"),
        ({"of": "prob"}, "of"),
        ({"method": "occlusion", "window": 2}, "window"),
        ({"position": 9}, "position"),
    ):
        with pytest.raises(ValueError, match=name):
            saliency(model, inputs, **arguments)
    with pytest.raises(ValueError, match="inputs"):
        saliency(model, {"attention_mask": torch.ones_like(ids)})
    with pytest.raises(TypeError, match="inputs"):
        saliency(model, ids)
    with pytest.raises(ValueError, match="self-attention"):
        attention_rollout([torch.ones(1, 1, 2, 3)])
    with pytest.raises(ValueError, match="kind"):
        correlation(torch.rand(1, 3), torch.rand(1, 3), "tau")
