"""Attention pooling and the classifier around it: formulas, padding, hooks, what a loss may do with the logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from regard.models import AttentionClassifier, PointerHead, RecurrentEncoder
from regard.nn import AdditiveAttention, ScaledDotPooling
from regard.ops import additive_scores


def test_additive_scores_are_their_formula_and_the_pointers():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 5), torch.randn(2, 4, 5), torch.randn(5)
    want = torch.stack([torch.stack([torch.tanh(q[:, i] + k[:, j]) @ v for j in range(4)], 1) for i in range(3)], 1)
    torch.testing.assert_close(additive_scores(q, k, v), want)
    head, pooling = PointerHead(5), AdditiveAttention(5, hidden=5, query_dim=5)
    with torch.no_grad():
        pooling.proj.weight.copy_(head.w1.weight)
        pooling.query_proj.weight.copy_(head.w2.weight)
        pooling.proj.bias.zero_(), pooling.query_proj.bias.zero_()
        pooling.v.weight.copy_(head.v[None])
    torch.testing.assert_close(pooling(k, query=q[:, 0]).logits, head(q[:, :1], k)[:, 0])


def test_dot_pooling_is_sdpa_with_one_query():
    torch.manual_seed(0)
    states, query = torch.randn(2, 6, 8), torch.randn(2, 8)
    mask = torch.tensor([[1, 1, 0, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    pooled = ScaledDotPooling(8, query=True)(states, mask, query)
    want = F.scaled_dot_product_attention(query[:, None], states, states, mask.bool()[:, None])
    torch.testing.assert_close(pooled.context, want[:, 0])
    learned = ScaledDotPooling(8)
    with torch.no_grad():
        learned.q.weight.copy_(query[:1])
    torch.testing.assert_close(
        learned(states[:1]).weights, ScaledDotPooling(8, query=True)(states[:1], query=query[:1]).weights
    )


@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize("both", [True, False])
def test_encoder_reads_each_row_as_if_alone(kind, both):
    torch.manual_seed(0)
    encoder = RecurrentEncoder(5, 4, kind, both)
    x = torch.randn(4, 7, 5)
    mask = torch.tensor([[1] * 7, [1] * 3 + [0] * 4, [0] * 5 + [1] * 2, [0, 0, 1, 1, 1, 0, 0]])
    states, last = encoder(x, mask)
    for row, (a, b) in enumerate(((0, 7), (0, 3), (5, 7), (2, 5))):
        alone, end = encoder(x[row : row + 1, a:b])
        torch.testing.assert_close(states[row, a:b], alone[0])
        torch.testing.assert_close(last[row], end[0])
        assert (states[row, :a] == 0).all() and (states[row, b:] == 0).all()
    read = encoder.rnn(x[:1])[0]
    torch.testing.assert_close(states[0], read[0])
    holes = torch.tensor([[1, 0, 1, 1, 0, 1, 1]])
    torch.testing.assert_close(encoder(x[:1], holes)[0], encoder(x[:1] * holes[..., None])[0])


@pytest.mark.parametrize("options", [{}, {"attention": "dot"}, {"encoder": "gru"}, {"encoder": "none"}, {"pair": True}])
def test_batch_mates_and_padding_change_nothing(options):
    torch.manual_seed(0)
    model = AttentionClassifier(20, 3, 6, 4, **options).eval()
    ids = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 0, 0, 0]])
    asked = {"question_ids": torch.tensor([[2, 3], [4, 0]])} if options.get("pair") else {}
    made = model(ids, **asked)
    assert made.logits.shape == (2, 3)
    assert (made.attention[1, 2:] == 0).all() and (made.attention_logits[1, 2:] == -torch.inf).all()
    torch.testing.assert_close(made.attention.sum(1), torch.ones(2))
    alone = model(ids[1:, :2], **{name: value[1:, :1] for name, value in asked.items()})
    torch.testing.assert_close(made.logits[1:], alone.logits)
    torch.testing.assert_close(made.attention[1:, :2], alone.attention)
    embeds = model.get_input_embeddings()(ids)
    same = model(inputs_embeds=embeds, attention_mask=(ids != 0).long(), **asked)
    torch.testing.assert_close(same.logits, made.logits)


def test_the_logits_are_open_to_losses():
    torch.manual_seed(0)
    model = AttentionClassifier(20, 2, 6, 4)
    ids = torch.tensor([[3, 4, 5, 6], [8, 9, 0, 0]])
    plain = model(ids)
    delta = torch.tensor([[0.0, 5.0, 0.0, 0.0], [1.0, -1.0, 7.0, 7.0]], requires_grad=True)
    made = model(ids, logits_delta=delta)
    torch.testing.assert_close(made.attention_logits, plain.attention_logits)
    want = (plain.attention_logits + delta).softmax(1)
    torch.testing.assert_close(made.attention, want)
    gradient = torch.autograd.grad(made.logits.square().sum(), delta)[0]
    assert gradient[0].abs().min() > 0 and (gradient[1, 2:] == 0).all()
    torch.testing.assert_close(gradient.sum(1), torch.zeros(2), atol=1e-6, rtol=0)  # a shift changes no softmax
    F.mse_loss(plain.attention, want.detach()).backward()  # supervision reaches the scoring network
    assert model.pooling.v.weight.grad.abs().sum() > 0


def test_a_row_without_a_token_is_an_empty_context_with_finite_gradients():
    model = AttentionClassifier(20, 2, 6, 4)
    made = model(torch.tensor([[0, 0, 0], [3, 4, 5]]))
    assert (made.context[0] == 0).all() and (made.attention[0] == 0).all()
    torch.testing.assert_close(made.logits[0], model.output.bias)
    made.logits.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_half_types_accumulate_in_float32():
    torch.manual_seed(0)
    pooling = AdditiveAttention(8).bfloat16()
    pooled = pooling(torch.randn(2, 300, 8).bfloat16())
    assert pooled.weights.dtype == torch.float32 and pooled.context.dtype == torch.bfloat16
    torch.testing.assert_close(pooled.weights.sum(1), torch.ones(2))


def test_bad_input():
    model, ids = AttentionClassifier(20, 2, 6, 4), torch.tensor([[3, 4]])
    for arguments, name in (
        ({}, "input_ids"),
        ({"input_ids": ids, "inputs_embeds": torch.zeros(1, 2, 6)}, "input_ids"),
        ({"input_ids": ids, "question_ids": ids}, "question_ids"),
        ({"input_ids": ids, "logits_delta": torch.zeros(1, 3)}, "logits_delta"),
        ({"input_ids": ids, "attention_mask": torch.ones(1, 3)}, "mask"),
    ):
        with pytest.raises(ValueError, match=name):
            model(**arguments)
    with pytest.raises(ValueError, match="question_ids"):
        AttentionClassifier(20, 2, 6, 4, pair=True)(ids)
    with pytest.raises(ValueError, match="query"):
        AdditiveAttention(5, query_dim=3)(torch.zeros(1, 2, 5))
    with pytest.raises(ValueError, match="inputs_embeds"):
        AttentionClassifier(None, 2, 6, 4)(ids)
    with pytest.raises(ValueError, match="encoder"):
        AttentionClassifier(20, encoder="rnn")
    with pytest.raises(ValueError, match="attention"):
        AttentionClassifier(20, attention=AdditiveAttention(5))
    with pytest.raises(ValueError, match="states"):
        AdditiveAttention(5)(torch.zeros(1, 2, 6))
