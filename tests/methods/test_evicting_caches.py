"""Caches that evict by score: what they hold and compute is what the policy says, and memory follows."""

import pytest
import torch
from cache_driver import feed, held, run, sequence

import regard
from regard.methods.caches import EvictingLayer, EvictingMethod, Limits, kv_bytes
from tiny import tiny_llama

PROMPT = 24
STEPS = [PROMPT, *range(PROMPT + 1, 41)]


def naive(qkv, kind, total, recent, row=0, cuts=STEPS):
    """A slow eviction, one kv head and one token at a time: positions held after every call, and outputs (H, N, D)."""
    q, k, v = (t[row] for t in qkv)
    heads, dim = q.shape[0], q.shape[2]
    kv_heads = k.shape[0]
    out = torch.zeros(heads, cuts[-1], dim, dtype=q.dtype)
    history = []
    size = heads // kv_heads
    for h in range(kv_heads):
        kept: list[int] = []
        score: dict[int, float] = {}
        trail = []

        def evict(seen, kept=kept, score=score):
            while len(kept) > total:
                kept.remove(min((j for j in kept if j < seen - recent), key=lambda j: score[j]))

        for a, b in zip([0, *cuts[:-1]], cuts):
            evict(a)
            kept += range(a, b)
            given = {j: [] for j in kept}
            for i in range(a, b):
                sees = [j for j in kept if j <= i]
                for g in range(size):
                    weight = torch.softmax(k[h, sees] @ q[h * size + g, i] * dim**-0.5, 0)
                    out[h * size + g, i] = weight @ v[h, sees]
                    for j, w in zip(sees, weight.tolist()):
                        given[j].append((i, w))
            for j in kept:
                if kind == "h2o":
                    score[j] = score.get(j, 0.0) + sum(w for _, w in given[j])
                else:
                    score[j] = sum(w for i, w in given[j] if i == b - 1)
            if a == 0 or b - a > 64:
                evict(b)
            trail.append(sorted(kept))
        history.append(trail)
    return out, history


POLICIES = {
    "h2o": (regard.H2O(heavy=6, recent=4), 10, 4),
    "tova": (regard.TOVA(budget=9), 9, 1),
}


@pytest.mark.parametrize("kind", POLICIES)
def test_decoding_is_the_slow_definition(kind):
    method, total, recent = POLICIES[kind]
    qkv = sequence()
    layer = method.make_layer(None)
    feed(layer, qkv, 0, PROMPT)
    want = [naive(qkv, kind, total, recent, row=row) for row in range(2)]
    for at in range(PROMPT, 40):
        out = feed(layer, qkv, at, at + 1)
        for row, (outs, history) in enumerate(want):
            torch.testing.assert_close(out[row, :, 0], outs[:, at], rtol=1e-9, atol=1e-11)
            for h in range(2):
                assert held(layer)[row, h] == history[h][at - PROMPT + 1]


@pytest.mark.parametrize("kind", POLICIES)
def test_long_chunks_are_evicted_from_at_once_and_short_ones_later(kind):
    method, total, recent = POLICIES[kind]
    cuts = [70, 80, 81, 150, 151, 152, 220]
    qkv = sequence(batch=1, length=220)
    layer = method.make_layer(None)
    want, history = naive(qkv, kind, total, recent, cuts=cuts)
    for number, (a, b) in enumerate(zip([0, *cuts[:-1]], cuts)):
        out = feed(layer, qkv, a, b)
        torch.testing.assert_close(out[0], want[:, a:b], rtol=1e-8, atol=1e-10)
        assert [held(layer)[0, h] for h in range(2)] == [history[h][number] for h in range(2)]
    assert all(len(positions) == total for positions in held(layer).values())


def test_rows_that_reach_the_budget_come_together():
    qkv = sequence(batch=3, length=120)
    starts = [0, 30, 60]
    layer = regard.H2O(budget=90).make_layer(None)
    outs = [feed(layer, qkv, 0, 70, starts)]
    assert len(layer.store.parts) == 3
    outs += [feed(layer, qkv, at, at + 1, starts) for at in range(70, 120)]
    assert len(layer.store.parts) == 2  # the first two rows are full, the third has 60 tokens
    for row, start in enumerate(starts):
        alone = regard.H2O(budget=90).make_layer(None)
        want = run(alone, [t[row : row + 1, :, start:] for t in qkv], [70 - start, *range(71 - start, 121 - start)])
        torch.testing.assert_close(torch.cat(outs, 2)[row : row + 1, :, start:], want, rtol=1e-9, atol=1e-11)


def test_rows_of_very_different_lengths_are_as_if_alone():
    method = regard.H2O(heavy=0.25, recent=0.25)
    starts = [0, 19, 8]
    qkv = sequence(batch=3)
    layer = method.make_layer(None)
    outs = run(layer, qkv, STEPS, starts)
    for row, start in enumerate(starts):
        alone = method.make_layer(None)
        one = [t[row : row + 1, :, start:] for t in qkv]
        want = run(alone, one, [cut - start for cut in STEPS])
        torch.testing.assert_close(outs[row : row + 1, :, start:], want, rtol=1e-9, atol=1e-11)
        for h in range(2):
            assert [j - start for j in held(layer)[row, h]] == held(alone)[0, h]
    assert not outs[1, :, :19].any()


@pytest.mark.parametrize(
    "method",
    [
        regard.H2O(budget=1.0),
        regard.H2O(budget=40),
        regard.SnapKV(budget=40, window=4),
        regard.TOVA(budget=100),
        regard.KeyNorm(budget=64),
        regard.H2O(budget=64, positions="cache"),
    ],
)
def test_nothing_evicted_is_dense(method):
    model = tiny_llama()
    ids = torch.randint(1, 128, (2, 30))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    want = model.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False, num_beams=2)
    with regard.attach(model, method):
        got = model.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False, num_beams=2)
    # H2O(budget=1.0) is the prompt's length, so decoding evicts: but only from the second new token on
    same = slice(None) if method.budget != 1.0 else slice(0, 31)
    assert torch.equal(got[:, same], want[:, same])


@pytest.mark.parametrize("chunk", [5, 12, 70])
def test_chunks_of_a_prompt(chunk):
    """Nothing evicted: any chunks give dense attention; rows whose padding spans chunks too."""
    qkv = sequence(batch=2, length=90)
    starts = [0, 17]
    cuts = [*range(chunk, 90, chunk), 90]
    want = run(regard.H2O(budget=200).make_layer(None), qkv, [90], starts)
    got = run(regard.H2O(budget=200).make_layer(None), qkv, cuts, starts)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def test_chunks_count_as_their_tokens_do():
    """A chunk's queries add to the scores what they would add one at a time, while nothing leaves."""
    qkv = sequence()
    one, many = (regard.H2O(budget=39, heavy=None).make_layer(None) for _ in range(2))
    run(one, qkv, [10, *range(11, 36)])
    run(many, qkv, [10, 17, 35])
    feed(one, qkv, 35, 36), feed(many, qkv, 35, 36)
    torch.testing.assert_close(one.store.gathered("score")[0], many.store.gathered("score")[0], rtol=1e-5, atol=1e-6)


def test_budget_is_memory():
    qkv = sequence(batch=1, heads=9, kv_heads=3, length=5000, dim=64, dtype=torch.float32)
    layer = regard.H2O(budget=2048).make_layer(None)
    run(layer, qkv, [4990, *range(4991, 5001)])
    assert all(len(positions) == 2049 for positions in held(layer).values())
    want = 2048 * 3 * 64 * 2 * 4
    assert abs(kv_bytes(layer) / want - 1) <= 0.03
    assert len(layer.store.parts) == 1


def test_crop_takes_back_candidates_exactly():
    """Verifying candidates and cropping the wrong ones leaves the cache as if they had never been."""
    qkv = sequence(length=60)
    other = [torch.cat([a[:, :, :34], b[:, :, 34:]], 2) for a, b in zip(qkv, sequence(length=60, seed=1))]
    straight, cropped = (regard.H2O(budget=12).make_layer(None) for _ in range(2))
    run(straight, qkv, [24, 30, 34])
    run(cropped, qkv, [24, 30])
    feed(cropped, other, 30, 38)  # 30..33 are right, 34..37 are not
    cropped.crop(-4)
    assert cropped.get_seq_length() == 34
    for a, b in ((34, 35), (35, 40), (40, 41), (41, 42)):
        want, got = feed(straight, qkv, a, b), feed(cropped, qkv, a, b)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)
        assert held(straight) == held(cropped)
    with pytest.raises(ValueError, match="crop: got -30, need at most 1 tokens"):
        cropped.crop(-30)
    whole = regard.H2O(budget=50).make_layer(None)
    feed(whole, qkv, 0, 20)
    whole.crop(0 - 20)
    assert whole.get_seq_length() == 0
    torch.testing.assert_close(feed(whole, qkv, 0, 9), run(regard.H2O(budget=50).make_layer(None), qkv, [9]))


def test_assisted_generation_is_greedy_generation():
    model, assistant = tiny_llama(), tiny_llama(seed=1, num_hidden_layers=1)
    ids = torch.randint(1, 128, (1, 40), generator=torch.Generator().manual_seed(0))
    with regard.attach(model, regard.H2O(budget=60)):
        want = model.generate(ids, max_new_tokens=12, do_sample=False)
        got = model.generate(ids, max_new_tokens=12, do_sample=False, assistant_model=assistant)
    assert torch.equal(got, want)
    small = (
        regard.H2O(budget=20),
        regard.SnapKV(budget=20, window=4),
        regard.LookM(20, text_prior=False),
        regard.RecycledAttention(8, 5, trigger="similarity"),
        regard.StaircaseQuantCache(((8, 16), (None, 4)), group=4),
    )
    for method in small:  # what was evicted by tokens that stayed is gone, what candidates would have evicted is not
        with regard.attach(model, method):
            for way in ({"assistant_model": assistant}, {"prompt_lookup_num_tokens": 3}):
                assert model.generate(ids, max_new_tokens=12, do_sample=False, **way).shape == (1, 52)


@pytest.mark.parametrize("starts", [None, [0, 13]])
def test_rows_reordered_repeated_and_selected(starts):
    qkv = sequence()
    method = regard.H2O(heavy=0.2, recent=0.2)
    layer, want = method.make_layer(None), method.make_layer(None)
    run(want, qkv, STEPS[:6], starts)
    run(layer, qkv, STEPS[:6], starts)
    layer.reorder_cache(torch.tensor([1, 0]))
    flipped = [t.flip(0) for t in qkv]
    out = feed(layer, flipped, 29, 30, None if starts is None else starts[::-1])
    torch.testing.assert_close(out.flip(0), feed(want, qkv, 29, 30, starts))
    layer.batch_repeat_interleave(2)
    twice = [t.repeat_interleave(2, 0) for t in flipped]
    out = feed(layer, twice, 30, 31, None if starts is None else [starts[1]] * 2 + [starts[0]] * 2)
    torch.testing.assert_close(out[::2].flip(0), feed(want, qkv, 30, 31, starts))
    layer.batch_select_indices(torch.tensor([2]))
    out = feed(layer, [t[:1] for t in qkv], 31, 32, None if starts is None else starts[:1])
    torch.testing.assert_close(out, feed(want, qkv, 31, 32, starts)[:1])


def test_cache_positions_bound_the_distance():
    """What was evicted leaves no gap: dropping tokens from the text instead gives the same, with every remaining key re-rotated."""

    @regard.methods.method.dataclass
    class Oldest(EvictingMethod):
        positions: str = "cache"

        reads = False

        def limits(self, tokens):
            return Limits.of(12, tokens, sink=3)

        def rescore(self, look, old):
            return look.position.to(old.dtype)

    model = tiny_llama(num_hidden_layers=1)
    ids = torch.randint(1, 128, (2, 60), generator=torch.Generator().manual_seed(0))
    tail = torch.randint(1, 128, (2, 5), generator=torch.Generator().manual_seed(1))
    logits = []
    for text in (ids, torch.cat([ids[:, :3], ids[:, 20:]], 1)):
        with regard.attach(model, Oldest()) as session, torch.no_grad():
            cache = session.new_cache()
            model(text, past_key_values=cache, use_cache=True)
            steps = [model(t[:, None], past_key_values=cache, use_cache=True).logits for t in tail[:, :3].unbind(1)]
            steps.append(model(tail[:, 3:], past_key_values=cache, use_cache=True).logits)
        logits.append(torch.cat(steps, 1))
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-5)
    with regard.attach(model, Oldest(positions="kept")) as session, torch.no_grad():
        cache = session.new_cache()
        model(ids, past_key_values=cache, use_cache=True)
        kept = model(tail[:, :1], past_key_values=cache, use_cache=True).logits
    assert (kept[:, 0] - logits[0][:, 0]).abs().max() > 1e-4


@pytest.mark.parametrize(
    "method", [regard.H2O(0.3), regard.SnapKV(0.5, window=6), regard.TOVA(0.3), regard.KeyNorm(0.7)]
)
def test_generate_with_padding_beams_and_half_types(method):
    model = tiny_llama()
    ids = torch.randint(1, 128, (2, 50))
    mask = torch.ones_like(ids)
    mask[0, :22] = 0
    with regard.attach(model, method):
        both = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, num_beams=3)
        alone = model.generate(ids[:1, 22:], max_new_tokens=8, do_sample=False, num_beams=3)
    assert torch.equal(both[:1, 22:], alone)
    half = tiny_llama().to(torch.bfloat16)
    with regard.attach(half, method):
        assert half.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False).shape == (2, 54)


def test_detached_cache_and_changed_batch_say_so():
    model = tiny_llama()
    ids = torch.randint(1, 128, (2, 20))
    with regard.attach(model, regard.H2O(8)), torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="key_states: got 'a batch of 1', need 2 rows"):
            model(ids[:1], past_key_values=cache)
    layer = cache.layers[0]
    assert isinstance(layer, EvictingLayer)
    layer.reset()
    assert layer.get_seq_length() == 0 and not layer.is_initialized


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: regard.H2O(budget=0), "budget: got 0"),
        (lambda: regard.H2O(budget=1.5), "budget: got 1.5"),
        (lambda: regard.H2O(heavy=3), "recent: got NoneType"),
        (lambda: regard.H2O(heavy=0.1, recent=1.1), "recent: got 1.1"),
        (lambda: regard.H2O(heavy=1, recent=2, sink=4), "budget: got 3, need at least sink"),
        (lambda: regard.H2O(group="median"), "group: unknown name"),
        (lambda: regard.H2O(positions="moved"), "positions: unknown name"),
        (lambda: regard.SnapKV(budget=16), "budget: got 16, need at least sink \\+ recent = 32"),
        (lambda: regard.SnapKV(kernel=4), "kernel: got 4"),
        (lambda: regard.KeyNorm(budget=12), "budget: got 12, need at least sink \\+ recent = 20"),
    ],
)
def test_bad_values(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_a_cache_follows_the_model_to_another_device():
    """Keys arriving on another device take the past with them (the meta device stands for one here)."""
    qkv = sequence(batch=1, dtype=torch.float32)
    layer = regard.H2O(budget=10).make_layer(None)
    run(layer, qkv, [20, 21, 22])
    out = feed(layer, [t.to("meta") for t in qkv], 22, 23)
    assert out.device.type == "meta" and out.shape == (1, 4, 1, 8)
    assert {t.device.type for part in layer.store.parts for t in part.data.values()} == {"meta"}
    layer = regard.H2O(budget=10).make_layer(None)
    run(layer, qkv, [20, 21])
    layer.offload(), layer.prefetch()
    assert feed(layer, qkv, 21, 22).isfinite().all()


def test_uneven_heads_and_rows_in_one_store():
    """Sequences of any lengths: attention, log-sum-exps and appends are those of each alone."""
    from regard.methods.caches import PagedStore

    torch.manual_seed(0)
    batch, heads, group = 3, 2, 2
    rows = {name: torch.randn(batch, heads, 90, 8, dtype=torch.float64) for name in "kv"}
    rows["position"] = torch.arange(90, dtype=torch.int32).expand(batch, heads, -1)
    count = torch.tensor([[90, 3], [40, 0], [41, 90]])
    index = torch.rand(batch, heads, 90).argsort(-1)
    store = PagedStore()
    store.fill(rows, index, count)
    q = torch.randn(batch, heads * group, 5, 8, dtype=torch.float64)
    fresh = {name: torch.randn(batch, heads, 1, 8, dtype=torch.float64) for name in "kv"}
    fresh["position"] = torch.full((batch, heads, 1), 90, dtype=torch.int32)

    def check(extra):
        for rows_of in (1, 5):
            out, lse, _ = store.attend(q[:, :, :rows_of], 0.3, lse=True)
            for b in range(batch):
                for h in range(heads):
                    take = index[b, h, : count[b, h]]
                    k, v = (torch.cat([rows[n][b, h, take], *([fresh[n][b, h]] if extra else [])]) for n in "kv")
                    for g in range(group):
                        scores = q[b, h * group + g, :rows_of] @ k.T * 0.3
                        want = torch.softmax(scores, -1) @ v if len(k) else torch.zeros(rows_of, 8, dtype=q.dtype)
                        torch.testing.assert_close(out[b, h * group + g], want, rtol=1e-9, atol=1e-11)
                        torch.testing.assert_close(lse[b, h * group + g], torch.logsumexp(scores, -1))

    check(False)
    assert len(store.parts) > 2
    allocated = sum(t.numel() for part in store.parts for name, t in part.data.items() if name != "position")
    assert allocated <= 2 * 8 * (int(count.sum()) + 16 * 6)
    store.append(fresh)
    check(True)
    assert torch.equal(store.gathered("k")[1], count + 1)


def test_soft_caps_and_sliding_layers():
    """Gemma 2: scores are capped, and every second layer has a window and so keeps its own cache."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 16, "attn_logit_softcapping": 2.0}
    model = Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, query_pre_attn_scalar=1)).eval()
    ids = torch.randint(3, 97, (2, 40))

    def logits(*methods, cuts=(30, 31, 32, 37)):
        with regard.attach(model, *methods) as session, torch.no_grad():
            cache = session.new_cache() if methods else None
            rows, begin = [], 0
            for end in (*cuts, 40):
                out = model(ids[:, begin:end], past_key_values=cache, use_cache=True)
                cache, begin = out.past_key_values, end
                rows.append(out.logits)
        return torch.cat(rows, 1)

    want = logits()
    for method in (regard.H2O(64), regard.RecycledAttention(64, 5), regard.StaircaseQuantCache(((None, 16),))):
        torch.testing.assert_close(logits(method), want, rtol=1e-4, atol=1e-4)
    assert (logits(regard.H2O(12)) - want).abs().max() > 1e-3
