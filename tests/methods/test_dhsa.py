"""DHSA on models: limits, chunks from different sources, padding, dense decoding, composition."""

import pytest
import torch
from sparse_models import call, generated, logits, padded_batch, prompt

import regard
from regard import DHSA, UnsupportedModelError
from regard.lens import attention_boundaries
from regard.methods.call import Method
from regard.nn import BoundaryPredictor
from regard.ops.select import chunk_topk_attention, even_boundaries
from tiny import tiny_llama

SMALL = {"budget": 20, "block_q": 16, "local": 6, "sink": 6, "instruction": 8, "chunks_per_block": 4}
REPEATS = {"sink": 20, "budget": 30}  # sink > block_q: the released code counts keys several times


def predictor(channels=16, seed=0):
    torch.manual_seed(seed)
    net = BoundaryPredictor(channels, window=2, hidden=8, heads=2)
    with torch.no_grad():
        net.score[2].weight.mul_(20)
    return net.eval()


@pytest.mark.parametrize("variant", ["released", "paper"])
def test_a_budget_of_the_whole_context_is_dense(variant):
    model, ids = tiny_llama(), prompt()
    dense, told = logits(model, ids), generated(model, ids)
    for budget in (90, 1.0):
        with regard.attach(model, DHSA(**SMALL | {"budget": budget, "variant": variant})):
            torch.testing.assert_close(logits(model, ids), dense, rtol=1e-5, atol=1e-5)
            assert torch.equal(generated(model, ids), told)
    assert torch.equal(logits(model, ids), dense)


@pytest.mark.parametrize("options", [{}, REPEATS])
def test_a_call_is_the_op(options):
    small = SMALL | options
    budget, sink = small["budget"], small["sink"]
    one = call(rows=60, scale=0.5)
    net = predictor()
    cuts = net.boundaries(one.k, 60 // 16 * 4, theta=None, nms=3, instruction=8)[0]
    assert cuts.shape[1] > 8
    wanted = chunk_topk_attention(one.q, one.k, one.v, cuts, budget, 16, 6, sink, instruction=8, scale=0.5)
    for source in (net, net.gap_scores):
        method = DHSA(**small, predictor=source, theta=None, nms=3)
        torch.testing.assert_close(call(rows=60, scale=0.5).run([method]), wanted, rtol=1e-5, atol=1e-6)
    even = chunk_topk_attention(
        one.q, one.k, one.v, even_boundaries(60, 4), budget, 16, 6, sink, instruction=8, scale=0.5
    )
    torch.testing.assert_close(one.run([DHSA(**small)]), even, rtol=1e-5, atol=1e-6)
    assert options or not torch.allclose(even, wanted, atol=1e-3)  # so many sinks leave little to choose


def test_chunks_measured_in_the_layers_own_attention():
    one = call(rows=60)
    q, k = one.q, one.k.repeat_interleave(2, 1)
    weights = (q @ k.transpose(-1, -2) * 8**-0.5).masked_fill(torch.ones(60, 60).triu(1).bool(), -torch.inf).softmax(-1)
    cuts, _ = attention_boundaries(weights, 12, theta=1.1, nms=8, instruction=8)
    wanted = chunk_topk_attention(q, one.k, one.v, cuts, 20, 16, 6, 6, instruction=8)
    torch.testing.assert_close(one.run([DHSA(**SMALL, predictor="attention")]), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("source", ["even", "attention", "predictor"])
@pytest.mark.parametrize("options", [{}, REPEATS])
def test_it_is_sparse_and_padding_changes_nothing(source, options):
    model = tiny_llama()
    ids, mask, alone = padded_batch()
    dense = logits(model, alone[0])
    given = {"even": None, "attention": "attention", "predictor": predictor()}[source]
    with regard.attach(model, DHSA(**SMALL | options, predictor=given, theta=None)):
        position = (mask.cumsum(1) - 1).clamp(min=0)  # a predictor reads keys, which rotary embedding turns by position
        rows = logits(model, ids, attention_mask=mask, position_ids=position)
        for row, text in zip(rows, alone):
            torch.testing.assert_close(row[-text.shape[1] :], logits(model, text)[0], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(rows[0], dense[0], atol=1e-3)
        told = generated(model, ids, attention_mask=mask)
        for row, text in zip(told, alone):
            assert torch.equal(row[-6:], generated(model, text)[0, -6:])


def test_a_static_cache_gives_the_same():
    model, ids = tiny_llama(), prompt()
    with regard.attach(model, DHSA(**SMALL)):
        assert torch.equal(generated(model, ids, cache_implementation="static"), generated(model, ids))


def test_decoding_and_the_instruction_are_dense():
    model, ids = tiny_llama(num_hidden_layers=1), prompt()
    dense = logits(model, ids)
    with regard.attach(model, DHSA(**SMALL)), torch.no_grad():
        sparse = logits(model, ids)
        past = model(ids, use_cache=True).past_key_values
        step = model(ids[:, :1], past_key_values=past).logits
    with torch.no_grad():
        whole = model(torch.cat((ids, ids[:, :1]), 1)).logits[:, -1:]
    torch.testing.assert_close(sparse[:, -8:], dense[:, -8:], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(sparse[:, 40:-8], dense[:, 40:-8], atol=1e-3)
    torch.testing.assert_close(
        step, whole, rtol=1e-5, atol=1e-5
    )  # one layer: its keys do not depend on what was attended to


def test_layers_share_the_first_layers_chunks():
    model, ids = tiny_llama(), prompt()
    asked = []

    def scores(k):
        asked.append(k)
        return k.float().sum((1, 3))

    for share, expected in ((True, 1), (False, 3)):
        asked.clear()
        with regard.attach(model, DHSA(**SMALL, predictor=scores, theta=None, share_boundaries=share)):
            first = logits(model, ids)
            assert len(asked) == expected
            assert torch.equal(logits(model, ids), first) and len(asked) == 2 * expected  # anew in every forward


def test_sliding_layers_compete_within_their_window():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    model = Gemma2ForCausalLM(Gemma2Config(**sizes, num_key_value_heads=2, head_dim=8, sliding_window=32)).eval()
    ids, mask, alone = padded_batch()
    read = {}

    class Watch(Method):
        def edit(self, call):
            read[call.layer] = call

    dense = logits(model, alone[0])
    with regard.attach(model, DHSA(**SMALL), Watch()):
        rows = logits(model, ids, attention_mask=mask)
        for row, text in zip(rows, alone):
            torch.testing.assert_close(row[-text.shape[1] :], logits(model, text)[0], rtol=1e-5, atol=1e-5)
        logits(model, alone[0])
    assert not torch.allclose(rows[0], dense[0], atol=1e-3)
    for layer, call_ in read.items():
        seen = call_.weights()[0].sum(0) > 0
        t, j = torch.arange(90)[:, None], torch.arange(90)
        assert not (seen & (j > t)).any()
        assert (seen & (t - j >= 32)).any() == (layer == 1)  # layer 0 is the sliding one
        assert seen[40:80].sum(-1).max() <= 20


@pytest.mark.parametrize("padding", [None, [0, 11]])
@pytest.mark.parametrize("options", [{}, REPEATS])
def test_weights_and_edits_speak_of_what_was_chosen(padding, options):
    torch.manual_seed(0)
    bias, factor = torch.randn(1, 4, 1, 60), torch.rand(4, 1, 1)

    class Edits(Method):
        def __init__(self, factor):
            self.factor = factor

        def edit(self, call):
            call.add_bias(bias)
            if self.factor is not None:
                call.on_weights(lambda weights: weights * self.factor)

    for edits in (Edits(None), Edits(factor)):
        one = call(batch=2, padding=padding)
        out = one.run([edits, DHSA(**SMALL | options)])
        weights = one.weights()
        assert (weights[:, :, 51] > 0).sum(-1).max() <= (SMALL | options)["budget"]
        if edits.factor is not None:
            weights = weights * factor
        torch.testing.assert_close(out, weights @ one.v.repeat_interleave(2, 1), rtol=1e-5, atol=1e-6)


def test_models_that_it_cannot_serve():
    from transformers import BertConfig, BertModel

    with pytest.raises(UnsupportedModelError, match="2 x 8 = 16 channels, and the boundary predictor was made for 24"):
        regard.attach(tiny_llama(), DHSA(predictor=predictor(24)))
    bert = BertModel(
        BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=50)
    )
    with pytest.raises(UnsupportedModelError, match="BertModel has no causal self-attention"):
        regard.attach(bert, DHSA())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "budget: got 0"),
        ({"block_q": 0}, "block_q: got 0"),
        ({"chunks_per_block": 0}, "chunks_per_block: got 0"),
        ({"predictor": "labels"}, "predictor: got 'labels'"),
        ({"pooling": "avg"}, "pooling: unknown name 'avg'"),
        ({"variant": "new"}, "variant: unknown name 'new'"),
        ({"dense_layers": None}, "dense_layers: got NoneType"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        DHSA(**options)


def test_a_predictor_of_the_wrong_shape_is_named():
    with pytest.raises(ValueError, match=r"predictor: got 'scores of shape \(1, 2, 60\)', need \(B, N\) = \(1, 60\)"):
        call().run([DHSA(**SMALL, predictor=lambda k: k.sum(-1))])
