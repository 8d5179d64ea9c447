"""KeNet and its blocks: what they equal, what must not matter, where gradients go."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import f1_score, hamming_loss, precision_score, recall_score

from regard.bench.metrics_multilabel import multilabel_scores
from regard.models import KeNet, label_vectors, local_knowledge
from regard.nn import GatedFusion, LabelAttention, SelfAttentivePool

IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 0, 0], [2, 3, 4, 0]])
KNOWN = torch.tensor([[9, 10, 11], [5, 0, 0], [0, 0, 0]])


def test_label_attention_is_cross_attention_without_a_scale():
    torch.manual_seed(0)
    states, mask = torch.randn(2, 6, 8), torch.tensor([[1] * 6, [1, 1, 0, 1, 0, 0]])
    block = LabelAttention(8, 5)
    queries = block.labels[None].expand(2, -1, -1)
    want = F.scaled_dot_product_attention(queries, states, states, mask.bool()[:, None], scale=1.0)
    torch.testing.assert_close(block(states, mask), want)
    whole = LabelAttention(8, 5, init=torch.randn(5, 3))
    queries = whole.queries()[None].expand(2, -1, -1)
    torch.testing.assert_close(whole(states), F.scaled_dot_product_attention(queries, states, states, scale=1.0))


def test_self_attentive_pool_is_its_formula_and_skips_padding():
    torch.manual_seed(0)
    states, mask = torch.randn(2, 6, 8), torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])
    pool = SelfAttentivePool(8, 3)
    want = (pool.hops.weight @ torch.tanh(pool.proj.weight @ states[0].T)).softmax(-1) @ states[0]
    torch.testing.assert_close(pool(states, mask)[0], want)
    torch.testing.assert_close(pool(states, mask)[1], pool(states[1:, :3])[0])
    assert (pool(states, mask * 0) == 0).all()


def test_gates_sum_to_one_over_what_is_there():
    torch.manual_seed(0)
    fusion, parts = GatedFusion(4, 3), [torch.randn(2, 5, 4) for _ in range(3)]
    torch.testing.assert_close(fusion.weights(parts).sum(0), torch.ones(2, 5, 1))
    present = [None, torch.tensor([[True] * 5, [False] * 5]), None]
    weights = fusion.weights(parts, present)
    torch.testing.assert_close(weights.sum(0), torch.ones(2, 5, 1))
    assert (weights[1, 1] == 0).all() and (weights[1, 0] > 0).all()
    raw = [torch.sigmoid(gate(part)) for gate, part in zip(fusion.gates, parts)]
    torch.testing.assert_close(fusion.weights(parts), torch.stack(raw) / sum(raw))


def test_without_knowledge_and_self_attention_it_is_label_attention_over_the_lstm():
    torch.manual_seed(0)
    model = KeNet(12, 5, 6, 4, use_knowledge=False, self_attention=False)
    made = model(IDS)
    states = model.encoder(model.embed(IDS), IDS != 0)[0]
    queries = model.label_attention.queries()[None].expand(3, -1, -1)
    want = F.scaled_dot_product_attention(queries, states, states, (IDS != 0)[:, None], scale=1.0)
    torch.testing.assert_close(made.label_states, want)
    torch.testing.assert_close(made.logits, model.out(want)[..., 0])


def test_padding_and_batch_mates_change_nothing():
    torch.manual_seed(0)
    model = KeNet(12, 5, 6, 4)
    made = model(IDS, None, KNOWN)
    torch.testing.assert_close(made.shares.sum(0), torch.ones(3, 5))
    alone = model(IDS[1:2, :2], None, KNOWN[1:2, :1])
    torch.testing.assert_close(made.logits[1:2], alone.logits)
    none = model(IDS[2:], None, None)
    torch.testing.assert_close(made.logits[2:], none.logits)  # a row without knowledge, and a call without
    assert (made.shares[1:, 2] == 0).all() and (made.shares[1:, 0] > 0).all()
    torch.testing.assert_close(none.logits, model(IDS[2:], None, KNOWN[2:, :0]).logits)
    empty = model(torch.zeros(1, 3, dtype=torch.int64), None, torch.zeros(1, 2, dtype=torch.int64))
    assert empty.logits.isfinite().all() and (empty.label_states == 0).all()


def test_permuting_labels_permutes_outputs():
    torch.manual_seed(0)
    model, order = KeNet(12, 5, 6, 4, label_init=torch.randn(5, 7)), torch.tensor([3, 1, 4, 0, 2])
    want = model(IDS, None, KNOWN).logits[:, order]
    with torch.no_grad():
        model.label_attention.labels.copy_(model.label_attention.labels[order])
        for pool in model.self_attention:
            pool.hops.weight.copy_(pool.hops.weight[order])
    torch.testing.assert_close(model(IDS, None, KNOWN).logits, want)


def test_gradient_reaches_knowledge_only_where_there_is_some():
    torch.manual_seed(0)
    model = KeNet(12, 5, 6, 4)
    known = torch.randn(3, 3, 6, requires_grad=True)
    real = (KNOWN != 0).long()
    model(IDS, None, known, real).logits.square().sum().backward()
    size = known.grad.abs().sum((1, 2))
    assert size[0] > 0 and size[1] > 0 and size[2] == 0
    assert (known.grad[1, 1:] == 0).all() and known.grad.isfinite().all()


def test_a_hugging_face_encoder():
    from transformers import BertConfig, BertModel

    sizes = {
        "vocab_size": 20,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    model = KeNet(BertModel(BertConfig(**sizes)).eval(), 3, hidden=4)
    made = model(IDS, None, KNOWN)
    assert made.logits.shape == (3, 3)
    torch.testing.assert_close(made.logits[1:2], model(IDS[1:2, :2], None, KNOWN[1:2, :1]).logits, rtol=1e-4, atol=1e-5)


def test_knowledge_and_label_vectors():
    table = {"paris": ["city", "france"], "curie": ["physicist"]}
    assert local_knowledge(["in", "paris", "curie", "paris"], table) == ["city", "france", "physicist"]
    assert (
        local_knowledge(["paris", "curie"], table, most=1) == ["city", "france"] and local_knowledge(["x"], table) == []
    )
    vectors = {"data": torch.tensor([1.0, 0.0]), "base": torch.tensor([0.0, 1.0])}
    made = label_vectors(["Data-Base", "data", "unknown"], vectors)
    assert made[:2].tolist() == [[0.5, 0.5], [1.0, 0.0]] and made.shape == (3, 2)
    with pytest.raises(TypeError, match="table"):
        local_knowledge(["a"], [("a", ["b"])])
    with pytest.raises(ValueError, match="vectors"):
        label_vectors(["a"], {})


def test_scores_are_scikits():
    torch.manual_seed(0)
    said, real = torch.rand(30, 6) > 0.6, torch.rand(30, 6) > 0.7
    said[:, 5] = real[:, 5] = False
    found = multilabel_scores(said, real)
    options = {"average": "micro", "zero_division": 0}
    a, b = real.int().numpy(), said.int().numpy()
    assert found["micro_precision"] == pytest.approx(precision_score(a, b, **options))
    assert found["micro_recall"] == pytest.approx(recall_score(a, b, **options))
    assert found["micro_f1"] == pytest.approx(f1_score(a, b, **options))
    assert found["macro_f1"] == pytest.approx(f1_score(a, b, average="macro", zero_division=0))
    assert found["hamming_loss"] == pytest.approx(hamming_loss(a, b))
    with pytest.raises(ValueError, match="truth"):
        multilabel_scores(said, real[:3])


def test_bad_input():
    with pytest.raises(ValueError, match="embed_dim"):
        KeNet(torch.nn.Linear(2, 2), 3)
    with pytest.raises(ValueError, match="init"):
        LabelAttention(4, 3, init=torch.zeros(2, 5))
    with pytest.raises(ValueError, match="parts"):
        GatedFusion(4, 2)([torch.zeros(1, 4)])
    with pytest.raises(ValueError, match="knowledge_ids"):
        KeNet(12, 3, 6, 4)(IDS, None, KNOWN[:2])
