"""Recycled attention: full steps choose, recycled steps read the choice and everything since."""

import copy

import pytest
import torch
from cache_driver import feed, run, sequence

import regard
from regard.methods.caches import RecycledLayer, kv_bytes
from regard.ops import attention, masks
from tiny import tiny_llama

PROMPT = 20
CUTS = [PROMPT, *range(PROMPT + 1, 41)]


def naive(qkv, budget, stride, group="max", row=0):
    """One row, token by token: outputs (H, N, D) and the small caches that each full step chose."""
    q, k, v = (t[row] for t in qkv)
    heads, length, dim = q.shape
    size = heads // k.shape[0]
    out, choices = torch.zeros_like(q), []
    small = {}
    for i in range(length):
        full = i < PROMPT or (i - PROMPT + 1) % stride == 0
        if i == PROMPT - 1 or (full and i >= PROMPT):
            pass
        for h in range(k.shape[0]):
            reads = list(range(i + 1)) if full else small[h] + [i]
            rows = [torch.softmax(k[h, reads] @ q[h * size + g, i] * dim**-0.5, 0) for g in range(size)]
            for g, row_weights in enumerate(rows):
                out[h * size + g, i] = row_weights @ v[h, reads]
            if not full:
                small[h] = reads
            elif i >= PROMPT - 1:
                stacked = torch.stack(rows)
                joined = stacked.amax(0) if group == "max" else stacked.mean(0)
                small[h] = sorted(joined.topk(min(budget, i + 1)).indices.tolist())
        if full and i >= PROMPT - 1:
            choices.append({h: list(s) for h, s in small.items()})
    return out, choices


def small_cache(layer):
    found = {}
    for part in layer.recycled.parts:
        for member, length, position in zip(part.members.tolist(), part.length.tolist(), part["position"]):
            found[divmod(member, layer.recycled.heads)] = sorted(position[:length].tolist())
    return found


@pytest.mark.parametrize("group", ["max", "mean"])
@pytest.mark.parametrize("budget,stride", [(6, 4), (5, 100), (12, 2)])
def test_the_slow_definition(budget, stride, group):
    qkv = sequence()
    layer = RecycledLayer(regard.RecycledAttention(budget, stride, group=group))
    want = [naive(qkv, budget, stride, group, row) for row in range(2)]
    feed(layer, qkv, 0, PROMPT)
    chosen = [small_cache(layer)]
    for at in range(PROMPT, 40):
        out = feed(layer, qkv, at, at + 1)
        for row in range(2):
            torch.testing.assert_close(out[row, :, 0], want[row][0][:, at], rtol=1e-9, atol=1e-11)
        if (at - PROMPT + 1) % stride == 0:
            chosen.append(small_cache(layer))
        else:  # every token since the last full step is there
            since = range(at - (at - PROMPT + 1) % stride + 1, at + 1)
            assert all(set(since) <= set(positions) for positions in small_cache(layer).values())
    for number, small in enumerate(chosen):
        for (row, h), positions in small.items():
            assert positions == want[row][1][number][h]
    whole, length = layer.full.gathered("k")
    assert torch.equal(whole, qkv[1]) and bool((length == 40).all())


@pytest.mark.parametrize(
    "method",
    [
        regard.RecycledAttention(budget=100, stride=7),
        regard.RecycledAttention(budget=3, stride=1),
        regard.RecycledAttention(budget=3, trigger="similarity", threshold=1.0, scope="layer"),
        regard.RecycledAttention(budget=3, stride=100, dense_layers=(0, 1, -1)),
    ],
)
def test_limits_are_dense(method):
    model = tiny_llama()
    ids = torch.randint(1, 128, (2, 30))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "num_beams": 2}
    want = model.generate(ids, **options)
    with regard.attach(model, method):
        assert torch.equal(model.generate(ids, **options), want)


def test_the_previous_token_decides_for_all_layers():
    """With a cosine of 1 asked for, every token that follows a recycled one takes a full step, in all layers alike."""
    model = tiny_llama()
    ids = torch.randint(1, 128, (1, 20))
    with regard.attach(model, regard.RecycledAttention(3, trigger="similarity", threshold=1.0)), torch.no_grad():
        cache, since = model(ids).past_key_values, []
        for token in ids[0, :6]:
            model(token.view(1, 1), past_key_values=cache)
            since.append([layer.since.item() for layer in cache.layers])
    assert since == [[1] * 3, [0] * 3] * 3


@pytest.mark.parametrize("scope", ["model", "layer"])
@pytest.mark.parametrize("trigger", ["stride", "similarity"])
def test_rows_are_as_if_alone(trigger, scope):
    model = tiny_llama(num_hidden_layers=2)
    ids = torch.randint(1, 128, (3, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :25] = 0
    mask[2, :7] = 0
    method = regard.RecycledAttention(
        0.25, stride=6, trigger=trigger, scope=scope, threshold=0.0 if scope == "model" else 0.35
    )
    forced = torch.randint(1, 128, (3, 12), generator=torch.Generator().manual_seed(1))

    def decode(ids, mask, forced):
        with regard.attach(model, method) as session, torch.no_grad():
            cache = session.new_cache()
            model(ids, attention_mask=mask, past_key_values=cache)
            logits, since = [], []
            for token in forced.unbind(1):
                mask = torch.cat([mask, mask[:, -1:]], 1)
                logits.append(model(token[:, None], attention_mask=mask, past_key_values=cache).logits)
                since.append(cache.layers[1].since.tolist())
        return torch.cat(logits, 1), torch.tensor(since)

    got, when = decode(ids, mask, forced)
    for row, start in enumerate((25, 0, 7)):
        want, alone = decode(ids[row : row + 1, start:], mask[row : row + 1, start:], forced[row : row + 1])
        torch.testing.assert_close(got[row : row + 1], want, rtol=1e-4, atol=1e-5)
        assert torch.equal(when[:, row], alone[:, 0])
    if trigger == "similarity":  # or nothing was tried: rows take their full steps at different times
        assert (when == 0).any(1).sum() > (when == 0).all(1).sum()


def test_chunks_are_full_and_choose():
    qkv = sequence()
    method = regard.RecycledAttention(6, 50)
    layer = RecycledLayer(method)
    starts = [0, 11]
    out = run(layer, qkv, [7, 15, 16, 30], starts)
    real = masks.causal & masks.padding(torch.tensor([40, 40]), start=torch.tensor(starts))
    want = attention(*(t[:, :, :30] for t in qkv), mask=real)
    assert (out[:, :, 15] - want[:, :, 15]).abs().max() > 1e-6  # one token alone was a recycled step
    keep = [i for i in range(30) if i != 15]
    torch.testing.assert_close(out[:, :, keep], want[:, :, keep], rtol=1e-9, atol=1e-11)
    again = RecycledLayer(method)
    run(again, qkv, [30], starts)
    assert small_cache(layer) == small_cache(again)


def test_crop_makes_the_next_step_full():
    qkv = sequence()
    layer = RecycledLayer(regard.RecycledAttention(4, 50))
    run(layer, qkv, [20, 26])
    layer.crop(-3)
    out = feed(layer, [torch.cat([t[:, :, :23], t[:, :, 30:]], 2) for t in qkv], 23, 24)
    one = [torch.cat([t[:, :, :23], t[:, :, 30:31]], 2) for t in qkv]
    torch.testing.assert_close(out[:, :, 0], attention(*one, mask=masks.causal)[:, :, -1], rtol=1e-9, atol=1e-11)
    assert layer.since.tolist() == [0, 0]
    layer.crop(-24)
    assert layer.get_seq_length() == 0 and not layer.full.parts


def test_beams_copies_and_bytes():
    qkv = sequence()
    layer = RecycledLayer(regard.RecycledAttention(6, 50, trigger="similarity", threshold=-1.0))
    run(layer, qkv, CUTS[:5])
    twin = copy.deepcopy(layer)
    layer.reorder_cache(torch.tensor([1, 0]))
    out = feed(layer, [t.flip(0) for t in qkv], 24, 25)
    torch.testing.assert_close(out.flip(0), feed(twin, qkv, 24, 25))
    model = tiny_llama()
    with regard.attach(model, regard.RecycledAttention(10)), torch.no_grad():
        cache = model(torch.randint(1, 128, (1, 50))).past_key_values
        assert kv_bytes(cache.layers[0]) < kv_bytes(cache) / 2


def test_recent_tokens_in_place_of_the_most_attended():
    qkv = sequence()
    layer = RecycledLayer(regard.RecycledAttention(8, 50, choice="recent"))
    run(layer, qkv, [20, 21])
    assert all(positions == [0, 1, 2, 3, 16, 17, 18, 19, 20] for positions in small_cache(layer).values())


@pytest.mark.parametrize(
    "options,message",
    [
        ({"budget": 0}, "budget: got 0"),
        ({"stride": 0}, "stride: got 0"),
        ({"trigger": "never"}, "trigger: unknown name"),
        ({"threshold": 2.0}, "threshold: got 2.0"),
        ({"group": "min"}, "group: unknown name"),
        ({"choice": "random"}, "choice: unknown name"),
        ({"scope": "head"}, "scope: unknown name"),
    ],
)
def test_bad_values(options, message):
    with pytest.raises(ValueError, match=message):
        regard.RecycledAttention(**options)


def test_layers_that_are_not_there():
    with pytest.raises(ValueError, match=r"dense_layers: got \[7\], need layers of 3"):
        regard.attach(tiny_llama(), regard.RecycledAttention(dense_layers=[7]))


def test_training_reads_as_decoding_does():
    """Without a cache, one layer deep, the whole sequence gives what a prompt of one token and decoding on from it give."""
    model = tiny_llama(num_hidden_layers=1)
    ids = torch.randint(1, 128, (2, 30))
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    method = regard.RecycledAttention(4, 6, whole=True)
    with regard.attach(model, method):
        whole = model(ids, attention_mask=mask, use_cache=False)
        whole.logits[mask.bool()].sum().backward()
        rows = [(ids[:1], whole.logits[:1]), (ids[1:, 11:], whole.logits[1:, 11:])]
        for one, want in rows:
            with torch.no_grad():
                cache, logits = None, []
                for token in one.unbind(1):
                    out = model(token[:, None], past_key_values=cache, use_cache=True)
                    cache = out.past_key_values
                    logits.append(out.logits)
            torch.testing.assert_close(torch.cat(logits, 1), want, rtol=1e-4, atol=1e-5)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.model.layers.parameters())
    with regard.attach(model, regard.RecycledAttention(4, 6)), torch.no_grad():
        dense = model(ids, attention_mask=mask, use_cache=False).logits
    assert (dense - whole.logits).abs().max() > 1e-3
