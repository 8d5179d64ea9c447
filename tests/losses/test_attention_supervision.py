"""Supervised attention and its mining, aspect networks, aspect files, beyond the recorded numbers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from regard.losses import (
    AttentionVAT,
    ProgressiveAttentionMiner,
    attention_supervision_loss,
    signed_rounds,
    smoothgrad_scores,
)
from regard.models import AspectClassifier, AspectMemoryNetwork, aspect_position_weight
from regard.nn import AspectAttention
from regard.testbeds.aspects import AspectTexts, aspect_batch, load_aspects, planted_aspects
from regard.testbeds.text_classification import Vocabulary

ASPECT = torch.tensor([[0, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def test_loss_is_zero_only_at_what_is_taught():
    amask, avalue = torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]])
    assert float(attention_supervision_loss(torch.tensor([[1.0, 0.0, 0.0]]), amask, avalue)) == 0.0
    weights = torch.tensor([[0.2, 0.3, 0.5]], requires_grad=True)
    loss = attention_supervision_loss(weights, amask, avalue)
    assert float(loss.detach()) == pytest.approx(0.8**2 + 0.3**2)
    loss.backward()
    assert weights.grad[0, 2] == 0 and weights.grad[0, 0] < 0 < weights.grad[0, 1]
    assert float(attention_supervision_loss(weights.detach(), amask * 0, avalue * 0)) == 0.0


def test_mining_takes_the_clearest_word_and_masks_it_for_the_next_round():
    seen = []
    base = torch.tensor([[0.6, 0.3, 0.1, 0.0], [0.5, 0.3, 0.2, 0.0]])

    def train_round(number, erased):
        seen.append(erased.clone())
        left = base.masked_fill(erased, 0.0)
        return left / left.sum(1, keepdim=True).clamp(min=1e-9), torch.tensor([True, number == 0])

    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0]])
    mined = ProgressiveAttentionMiner(4).run(train_round, mask)
    assert mined.found.tolist() == [[0, 0], [1, 1], [2, 2], [-1, -1]]  # then there is nothing left
    assert [e.sum().item() for e in seen] == [0, 2, 4, 6]
    active, misleading = mined.sets(2)
    assert active.tolist() == [[True, True, False, False], [True, False, False, False]]
    assert misleading.tolist() == [[False] * 4, [False, True, False, False]]
    amask, avalue = mined.targets(2, "uniform")
    assert avalue.tolist() == [[0.5, 0.5, 0, 0], [1, 0, 0, 0]] and amask.sum(1).tolist() == [2, 2]
    assert mined.targets(0)[0].sum() == 0 and mined.share()[0] == (1.0, 0.0) and mined.share()[1] == (0.5, 0.5)


def test_unclear_attention_gives_nothing():
    miner = ProgressiveAttentionMiner(max_entropy=2.0)
    even = torch.full((1, 4), 0.25)  # exactly 2 bits: not below
    sharp = torch.tensor([[0.26, 0.24, 0.25, 0.25]])
    assert miner.take(even).tolist() == [-1] and miner.take(sharp).tolist() == [0]
    assert miner.take(torch.zeros(1, 4)).tolist() == [-1]
    assert ProgressiveAttentionMiner(max_entropy=4.0).take(torch.full((1, 15), 1 / 15)).tolist() == [0]
    assert ProgressiveAttentionMiner(max_entropy=4.0).take(torch.full((1, 17), 1 / 17)).tolist() == [-1]


def test_a_word_that_was_right_once_stays_active():
    alphas = torch.tensor([[[0.9, 0.1]], [[-0.9, -0.1]]])
    mined = signed_rounds(alphas)
    assert mined.right.tolist() == [[True], [False]]
    active, misleading = mined.sets()
    assert active.tolist() == [[True, False]] and not misleading.any()
    assert signed_rounds(alphas.flip(0)).sets()[0].tolist() == [[True, False]]


def test_smoothgrad_without_noise_is_gradient_times_state():
    torch.manual_seed(0)
    states, w = torch.randn(2, 4, 3), torch.randn(4, 3)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 1]])
    labels = torch.tensor([0, 1])

    def head(s):
        score = (s * w).sum((1, 2))
        return torch.stack([score, 2 * score], 1)

    raw = (states * w).sum(-1) * (1 + labels[:, None]) * mask
    raised = (raw - raw.amin(1, keepdim=True)) * mask
    want = raised / raised.sum(1, keepdim=True)
    torch.testing.assert_close(smoothgrad_scores(head, states, labels, mask, noise=0.0, passes=2), want)
    torch.testing.assert_close(smoothgrad_scores(head, states, labels, mask), want)  # a linear head does not mind noise
    assert (smoothgrad_scores(head, states * 0, labels, mask) == 0).all()


def test_aspect_attention_reads_the_context_and_never_the_aspect():
    torch.manual_seed(0)
    head, states = AspectAttention(6), torch.randn(2, 5, 6)
    pooled = head(states, MASK, ASPECT)
    assert (pooled.weights[ASPECT.bool()] == 0).all() and (pooled.weights[~MASK.bool()] == 0).all()
    torch.testing.assert_close(pooled.weights.sum(1), torch.ones(2))
    query = states[1, :1]  # one word of aspect: itself
    want = F.scaled_dot_product_attention(query, states[1, 1:3], states[1, 1:3]) + query
    torch.testing.assert_close(pooled.context[1:], want)
    none = head(states, MASK, ASPECT * 0)
    torch.testing.assert_close(none.context[0], states[0].mean(0))


@pytest.mark.parametrize("encoder", ["lstm", "none", "bert"])
def test_aspect_classifier_does_not_mind_padding_and_shows_its_logits(encoder):
    torch.manual_seed(0)
    if encoder == "bert":
        from transformers import BertConfig, BertModel

        sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        encoder = BertModel(BertConfig(**sizes, intermediate_size=8))
    model = AspectClassifier(20, 3, 6, 4, encoder=encoder).eval()
    ids = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 2, 0, 0]])
    made, alone = model(ids, MASK, ASPECT), model(ids[1:, :3], MASK[1:, :3], ASPECT[1:, :3])
    torch.testing.assert_close(made.logits[1:], alone.logits, rtol=1e-4, atol=1e-5)
    vat = AttentionVAT(1.0)(
        model, {"input_ids": ids, "attention_mask": MASK, "aspect_mask": ASPECT}
    )  # 028 works here too
    assert (vat.perturbation[ASPECT.bool()] == 0).all() and vat.loss > 0
    special = MASK.clone()
    special[:, -1] = special[1, 2] = 0
    assert (model(ids, MASK, ASPECT, context_mask=special).attention[:, -1] == 0).all()


def test_memory_network_is_its_formula_over_hops():
    torch.manual_seed(0)
    model = AspectMemoryNetwork(20, 6, hops=2)
    ids, aspect = torch.tensor([[3, 4, 5], [6, 7, 0]]), torch.tensor([[4, 0], [6, 7]])
    made = model(ids, None, aspect)
    for row, (text, about) in enumerate((([3, 4, 5], [4]), ([6, 7], [6, 7]))):
        u = model.B.weight[about].mean(0)
        for _ in range(2):
            alpha = (model.A.weight[text] @ (model.M.weight @ u)).softmax(0)
            u = alpha @ model.C.weight[text] + model.H.weight @ u
        torch.testing.assert_close(made.logits[row], model.W.weight @ u)
        torch.testing.assert_close(made.attention[row, : len(text)], alpha)


def test_aspect_files(tmp_path):
    path = tmp_path / "train.txt"
    path.write_text(
        "the battery/n life/n is bad and/or old\nscreen/p good\nno aspect here\n\nok keyboard/0 .\n", encoding="utf-8"
    )
    texts = load_aspects(path)
    assert texts.data.labels == [0, 1, 2] and texts.data.skipped == 1
    assert texts.data.texts[0] == ["the", "battery", "life", "is", "bad", "and/or", "old"]
    assert texts.aspects[0] == [False, True, True, False, False, False, False]
    assert texts.distances()[0] == [2, 0, 1, 2, 3, 4, 5]
    batch, mask = aspect_batch(texts, Vocabulary(texts.data.texts))
    assert mask.shape == batch.input_ids.shape and mask.sum(1).tolist() == [2, 1, 1]
    weight = aspect_position_weight(torch.tensor([[0, 10, 40, 41, -1]]))
    assert weight.tolist() == [[1.0, 0.75, 0.0, 0.0, 0.0]]
    with pytest.raises(ValueError, match="path"):
        load_aspects(tmp_path / "none.txt")
    path.write_text("nothing\n")
    with pytest.raises(ValueError, match="path"):
        load_aspects(path)
    path.write_text("a b/p\nc/p d\n")
    with pytest.raises(ValueError, match="one class only"):
        load_aspects(path)


def test_planted_aspects_have_a_deciding_word():
    texts = planted_aspects(300, seed=1)
    assert isinstance(texts, AspectTexts) and len(texts) == 300
    common = 0
    for text, label, why, aspect in zip(texts.data.texts, texts.data.labels, texts.data.rationales, texts.aspects):
        (cue,) = [word for word, mark in zip(text, why) if mark]
        assert cue == f"common{label}" or cue.startswith(f"rare{label}x")
        common += cue.startswith("common")
        assert [word.startswith("aspect") for word in text] == list(aspect)
    assert math.isclose(common / 300, 0.7, abs_tol=0.1)


def test_bad_input():
    weights = torch.full((1, 3), 1 / 3)
    with pytest.raises(ValueError, match="avalue"):
        attention_supervision_loss(weights, weights, weights[:, :2])
    with pytest.raises(ValueError, match="train_round"):
        ProgressiveAttentionMiner(1).run(lambda n, e: (weights[:, :2], torch.ones(1).bool()), torch.ones(1, 3))
    with pytest.raises(ValueError, match="max_entropy"):
        ProgressiveAttentionMiner(max_entropy=0)
    with pytest.raises(ValueError, match="rounds"):
        signed_rounds(torch.rand(2, 1, 3)).sets(3)
    with pytest.raises(ValueError, match="target"):
        signed_rounds(torch.rand(2, 1, 3)).targets(target="all")
    with pytest.raises(ValueError, match="aspect_mask"):
        AspectClassifier(20)(torch.ones(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="dim"):
        AspectClassifier(encoder=torch.nn.Linear(2, 2))
