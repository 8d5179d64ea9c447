"""MoA: elastic spans on models: limits, the cache's size, prefill by blocks or tokens, and the whole way from profile to text."""

import json

import pytest
import torch
from sparse_models import generated, logits, padded_batch, prompt

import regard
from regard import HeadPlan, MoA, masks
from regard.lens import answered_by_dense, attention_influence, span_plan
from regard.methods.caches import kv_bytes
from regard.methods.plans import Full, Span
from tiny import tiny_llama

SMALL = {"block": 4, "sink": 4, "minimum": 8}


def spans(alphas, betas, **options):
    return HeadPlan.from_spans(alphas, betas, **(SMALL | options))


@pytest.mark.parametrize(
    "method",
    [MoA(), MoA(spans([[200.0]] * 3, [[0.0]] * 3)), MoA(spans([[0.0]] * 3, [[1.0]] * 3, block=8, sink=8, minimum=16))],
)
@pytest.mark.parametrize("variant", ["released", "paper"])
def test_spans_over_everything_change_nothing(method, variant):
    """Also the default on a short prompt: half of 90 and 1024 tokens to come."""
    model, ids = tiny_llama(), prompt()
    dense, told = logits(model, ids), generated(model, ids)
    method = MoA(method.plan, variant=variant)
    with regard.attach(model, method):
        torch.testing.assert_close(logits(model, ids), dense, rtol=1e-5, atol=1e-5)
        assert torch.equal(generated(model, ids), told)


def test_a_uniform_constant_span_is_streaming_llm():
    model, ids = tiny_llama(), prompt()
    plan = spans([[24.0]] * 3, [[0.0]] * 3)
    with regard.attach(model, MoA(plan, variant="paper")):
        one = logits(model, ids), generated(model, ids, 12)
    with regard.attach(model, regard.StreamingLLM(sink=4, window=20, positions="kept")):
        torch.testing.assert_close(logits(model, ids), one[0], rtol=1e-5, atol=1e-5)
        assert torch.equal(generated(model, ids, 12), one[1])


def test_released_prompts_are_read_in_blocks():
    model, ids = tiny_llama(), prompt(60)
    plan = spans([[16.0, 32.0, 16.0, 8.0]] * 3, [[0.0] * 4] * 3)
    with regard.attach(model, MoA(plan)):
        record = regard.record(model, ids)
    i, j = torch.arange(60)[:, None], torch.arange(60)
    for head, entries in enumerate((16, 32, 16, 8)):
        band = (i // 4 - j // 4 < entries // 4 - 1) | (j < 4)
        seen = record.weights(1)[0, head] > 0
        assert torch.equal(seen, band & (j <= i))


SPANS = {
    False: ([[16.0, 32.0, 8.0, 24.0]] * 3, [[0.0] * 4] * 3),
    True: ([[0.0, 16.0, 0.0, -8.0]] * 3, [[0.25, 0.125, 0.25, 0.5]] * 3),
}


@pytest.mark.parametrize("growing", SPANS)
@pytest.mark.parametrize("variant", ["released", "paper"])
def test_padding_changes_nothing_and_heads_of_a_group_may_differ(variant, growing):
    """Also where spans depend on the length: each row has those of its own."""
    model = tiny_llama()
    ids, mask, alone = padded_batch()
    plan = spans(*SPANS[growing])
    with regard.attach(model, MoA(plan, new_tokens=12, variant=variant)):
        rows = logits(model, ids, attention_mask=mask)
        told = generated(model, ids, 12, attention_mask=mask)
        swapped = generated(model, ids.flip(0), 12, attention_mask=mask.flip(0), num_beams=2)
        assert torch.equal(swapped.flip(0), generated(model, ids, 12, attention_mask=mask, num_beams=2))
        for row, text, said in zip(rows, alone, told):
            torch.testing.assert_close(row[-text.shape[1] :], logits(model, text)[0], rtol=1e-5, atol=1e-5)
            assert torch.equal(said[-12:], generated(model, text, 12)[0, -12:])


def test_decoding_reads_the_ring():
    """Each decoded token sees, in each head, the sinks and the last tokens of the head's own span."""
    model, ids = tiny_llama(), prompt(50)
    entries = (16, 32, 8, 24)
    plan = spans([[float(n) for n in entries]] * 3, [[0.0] * 4] * 3)
    with regard.attach(model, MoA(plan)) as session, torch.no_grad():
        cache = session.new_cache()
        model(ids, past_key_values=cache)
        steps = [model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1] for token in (5, 9, 60, 31)]
    more = torch.cat([ids, torch.tensor([[5, 9, 60, 31]])], 1)
    heads = [masks.sink(4) | masks.sliding_window(n - 4) for n in entries]
    blocks = [masks.sink(4) | masks.block_local(4, n // 4 - 2) for n in entries]

    class AsMask(regard.Method):
        def mask(self, call):
            decoded = masks.from_function(lambda b, h, i, j: (i >= 50) & (j == j))
            return decoded & masks.per_head(heads) | ~decoded & masks.per_head(blocks)

    with regard.attach(model, AsMask()):
        want = logits(model, more, use_cache=False)[0, 50:]
    torch.testing.assert_close(torch.stack(steps), want, rtol=1e-5, atol=1e-5)


def test_the_cache_is_as_large_as_the_formula_says():
    model, ids = tiny_llama(), prompt(400)
    plan = spans(
        [[0.0, 0.0, 64.0, 64.0], [0.0] * 4, [-40.0, -40.0, 0.0, 16.0]], [[0.25] * 4, [0.125] * 4, [0.5, 0.5, 0.5, 0.0]]
    )
    with regard.attach(model, MoA(plan, new_tokens=16)) as session, torch.no_grad():
        cache = session.new_cache()
        model(ids, past_key_values=cache)
        before = kv_bytes(cache)
        for _ in range(40):
            model(torch.tensor([[7]]), past_key_values=cache)
    kept = [(104, 168), (52, 52), (168, 208)]  # ceil4 of alpha + beta * 416, the wider of two query heads
    assert [sum(g.keys.shape[2] * len(g.heads) for g in layer.groups) for layer in cache.layers] == [
        sum(k) for k in kept
    ]
    entry = 2 * 8 * 4
    assert kv_bytes(cache) == before and before == pytest.approx(sum(map(sum, kept)) * entry, rel=0.02)


def test_budgets_and_the_authors_files(tmp_path):
    assert MoA(budget=0.25, new_tokens=0).rules_of(0, 3, 4, 2)[0].entries(4096) == 1024
    assert MoA(budget=300, new_tokens=0).rules_of(0, 3, 4, 2)[0].entries(4096) == 320
    path = tmp_path / "moa_alpha_beta.json"
    path.write_text(json.dumps({"alphas": [[0.0, 1024.0]] * 3, "betas": [[0.5, 0.0]] * 3}))
    method = MoA(path, new_tokens=100, block=16)
    assert method.rules_of(1, 3, 4, 2) == tuple(
        Span(a, b, sink=16, block=16, minimum=32, reserve=100)
        for a, b in ((0.0, 0.5), (0.0, 0.5), (1024.0, 0.0), (1024.0, 0.0))
    )
    with regard.attach(tiny_llama(), method):
        pass


def test_from_profile_to_text(tmp_path):
    model = tiny_llama()
    samples = [answered_by_dense(model, prompt(n, seed=s), 8) for n in (56, 120) for s in (0, 1)]
    profile = attention_influence(model, samples, block=8)
    assert sorted(profile) == [64, 128]
    plan = span_plan(profile, 0.5, num_kv_heads=2, block=8, alpha_interval=16, num_betas=5, extend=(256,), points=2)
    loaded = HeadPlan.load(plan.save(tmp_path / "plan.json"))
    assert loaded == plan and plan.kv_share(1000) < 0.75
    with regard.attach(model, MoA(loaded, new_tokens=16)):
        assert generated(model, prompt(100), 10).shape == (1, 110)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MoA(budget=0), "budget: got 0"),
        (lambda: MoA(budget=1.5), "budget: got 1.5"),
        (lambda: MoA(budget="half"), "budget: got str"),
        (lambda: MoA(new_tokens=-1), "new_tokens: got -1"),
        (lambda: MoA(variant="old"), "variant: unknown name 'old'"),
        (lambda: MoA(3), "plan: got int"),
        (lambda: MoA(HeadPlan(((Full(),),))), "plan: got 'rules of other kinds'"),
        (lambda: MoA(block=8, sink=3), "sink: got 3, need a multiple of the block"),
        (lambda: regard.attach(tiny_llama(), MoA(spans([[0.0]], [[0.5]]))), "plan: got '1 layers', need 3"),
        (
            lambda: regard.attach(tiny_llama(), MoA(spans([[0.0] * 3] * 3, [[0.5] * 3] * 3))),
            "plan: got '3 rules in layer 0'",
        ),
    ],
)
def test_bad_options_are_named(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
