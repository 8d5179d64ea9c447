"""ACT: sinks lose weight, rows keep their sum, padding and batch mates do not matter."""

import pytest
import torch

import regard
from regard.lens import next_token_objective, search_heads
from regard.methods import AttentionCall
from regard.ops import calibrate_sinks, key_means, sink_keys
from tiny import tiny_llama


def maps(batch=2, heads=3, length=15, seed=0, sinks=(0, 6, 9)):
    scores = torch.randn(
        batch, heads, length, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    for sink in sinks:
        scores[..., sink] += 2.5
    return scores.masked_fill(~torch.ones(length, length).tril().bool(), float("-inf")).softmax(-1)


def test_definition_written_out():
    weights = maps()
    made = calibrate_sinks(weights, 0.3, 0.12)
    for b in range(2):
        for h in range(3):
            a = weights[b, h]
            found = [k for k in range(15) if float(a[:, k].sum()) / (15 - k) > 0.12][1:]
            others = [k for k in range(15) if k not in found]
            assert found
            for i in range(15):
                freed = 0.7 * float(a[i, found].sum())
                rest = float(a[i, others].sum())
                for k in range(15):
                    want = 0.3 * a[i, k] if k in found else a[i, k] + freed * a[i, k] / rest
                    assert float(made[b, h, i, k]) == pytest.approx(float(want), abs=1e-12)


def test_rows_keep_their_sum_and_the_others_their_ratios():
    weights = maps(seed=3)
    for variant in ("paper", "released"):
        made = calibrate_sinks(weights, 0.2, 0.1, variant=variant)
        torch.testing.assert_close(made.sum(-1), torch.ones(2, 3, 15, dtype=torch.float64))
        torch.testing.assert_close(made, calibrate_sinks(weights, 0.2, 0.1))  # of a prompt the variants say the same
    assert torch.equal(calibrate_sinks(weights, 1.0), weights)
    assert torch.equal(calibrate_sinks(weights, 0.2, 0.999), weights)


def test_the_first_sink_is_spared_wherever_it_stands():
    weights = maps(sinks=(4, 9))
    found = sink_keys(weights, 0.12)
    made = calibrate_sinks(weights, 0.0, 0.12)
    for b, h in ((0, 0), (1, 2)):
        places = found[b, h].nonzero().flatten().tolist()
        assert float(made[b, h, :, places[0]].sum()) > 0
        assert all(float(made[b, h, :, place].sum()) == 0 for place in places[1:])


def test_decode_rows():
    row = torch.tensor([0.45, 0.05, 0.3, 0.2], dtype=torch.float64)[None, None, None]
    paper = calibrate_sinks(row, 0.5, 0.1)
    assert float(paper.sum()) == pytest.approx(1.0)
    assert paper[0, 0, 0, 2] == 0.15 and paper[0, 0, 0, 3] == 0.1
    assert float(calibrate_sinks(row, 0.5, 0.1, variant="released").sum()) > 1.1


def test_relative_threshold_and_means():
    uniform = torch.ones(1, 1, 8, 8).tril()
    uniform = uniform / uniform.sum(-1, keepdim=True)
    means = key_means(uniform)
    assert means[0, 0, -1] == 0.125 and means[0, 0, 0] > means[0, 0, 1]
    assert torch.equal(sink_keys(uniform, 1.6, relative=True), means > 0.2)
    alone = torch.tensor([[[[0.0, 1.0]]]])  # weight on sinks alone has nowhere to go
    assert torch.equal(
        calibrate_sinks(alone.expand(1, 1, 2, 2), 0.5, 0.1, visible=torch.ones(2, 2).bool()), alone.expand(1, 1, 2, 2)
    )


@pytest.fixture(scope="module")
def model():
    model = tiny_llama(1)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(12)  # sharp enough for sinks
    return model


def test_only_its_heads_change_and_nothing_stays(model):
    ids = torch.randint(1, 128, (2, 20), generator=torch.Generator().manual_seed(1))
    plain = model(ids).logits
    seen = {}
    with regard.attach(model, regard.ACT([(1, 2), (-1, 0)], beta=0.0, threshold=0.02)) as session:
        session.observers.append(lambda call: seen.setdefault(call.layer, [heads for _, heads in call.weight_edits]))
        changed = model(ids).logits
    assert seen == {0: [], 1: [[2]], 2: [[0]]}
    assert not torch.allclose(changed, plain) and torch.equal(model(ids).logits, plain)
    with regard.attach(model, regard.ACT([(1, 2)], beta=1.0)):
        torch.testing.assert_close(model(ids).logits, plain, rtol=1e-4, atol=1e-5)
    with regard.attach(model, regard.ACT([])):
        assert torch.equal(model(ids).logits, plain)


def test_padding_and_batch_mates_do_not_matter(model):
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, 128, (2, 16), generator=generator)
    short = ids[1, 5:]
    padded = ids.clone()
    padded[1, :5] = 0
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    method = regard.ACT({0: [0, 1, 2, 3], 2: [1]}, beta=0.1, threshold=0.05)
    with torch.no_grad(), regard.attach(model, method):
        together = model(input_ids=padded, attention_mask=mask).logits
        alone = model(input_ids=ids[:1]).logits
        other = model(input_ids=short[None]).logits
        right = model(input_ids=torch.nn.functional.pad(short[None], (0, 5)), attention_mask=mask[1:].flip(1)).logits
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together[1:, 5:], other, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(right[:, :11], other, rtol=1e-4, atol=1e-5)


def test_decode_steps_can_be_left_alone(model):
    ids = torch.randint(1, 128, (1, 12), generator=torch.Generator().manual_seed(3))
    counts = {}
    for phase in ("all", "prefill"):
        seen = []
        with regard.attach(model, regard.ACT([(0, 0)], phase=phase)) as session:
            session.observers.append(lambda call, seen=seen: seen.append(bool(call.weight_edits)))
            model.generate(ids, max_new_tokens=3, do_sample=False)
        counts[phase] = sum(seen)
    assert counts == {"all": 3, "prefill": 1}


def test_search_gives_the_difference_each_head_makes(model):
    ids = torch.randint(1, 128, (5, 12), generator=torch.Generator().manual_seed(4))
    labels = torch.randint(1, 128, (5,), generator=torch.Generator().manual_seed(5))
    measure = next_token_objective(model, [{"input_ids": ids}], [labels], objective="log-probability")
    told = []
    gains = search_heads(
        model,
        lambda heads: regard.ACT(heads, threshold=0.05),
        measure,
        layers=[1, -1],
        heads=[0, 3],
        progress=lambda *n: told.append(n),
    )
    assert gains.scores.shape == (3, 4) and int(gains.scores.isnan().sum()) == 8 and told[-1] == (4, 4)
    with torch.no_grad(), regard.attach(model, regard.ACT([(2, 3)], threshold=0.05)):
        logits = model(ids).logits[:, -1].log_softmax(-1)
    want = float(logits[torch.arange(5), labels].mean()) - gains.info["baseline"]
    assert gains[2, 3] == pytest.approx(want, abs=1e-5)
    wide = search_heads(model, lambda heads: regard.ACT(heads, threshold=0.05), measure, each="layer", layers=[0])
    assert wide.scores.shape == (3, 1)


def test_bad_input(model):
    with pytest.raises(ValueError, match="beta"):
        regard.ACT([(0, 0)], beta=1.5)
    with pytest.raises(ValueError, match="heads"):
        regard.ACT([0, 1])
    with pytest.raises(ValueError, match="variant"):
        regard.ACT([(0, 0)], variant="relesed")
    with pytest.raises(ValueError, match="layer 3"):
        regard.attach(model, regard.ACT([(3, 0)]))
    with regard.attach(model, regard.ACT([(0, 9)])), pytest.raises(ValueError, match="head numbers in"):
        model(torch.ones(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"layers: got \[7\]"):
        search_heads(model, regard.ACT, lambda method: 0.0, layers=[7])
    with pytest.raises(ValueError, match="labels"):
        next_token_objective(model, [{"input_ids": torch.ones(1, 2).long()}], objective="accuracy")
    with pytest.raises(ValueError, match="N, M"):
        key_means(torch.ones(3))


def test_without_a_mask_every_query_counts_for_every_key():
    call = AttentionCall(
        module=None, layer=0, q=torch.zeros(1, 2, 3, 4), k=torch.zeros(1, 2, 3, 4), v=torch.eye(3).expand(1, 2, 3, 3)
    )
    out = call.run([regard.ACT([(0, 1)], beta=0.4)])  # three sinks of a third each: the first gets what the others lose
    torch.testing.assert_close(out[0, 0], torch.full((3, 3), 1 / 3))
    torch.testing.assert_close(out[0, 1], torch.tensor([[1 - 0.8 / 3, 0.4 / 3, 0.4 / 3]]).expand(3, 3))
