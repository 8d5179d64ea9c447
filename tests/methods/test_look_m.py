"""LOOK-M: what stays, what is merged into it, and that rows, groups and models are treated as the paper has it."""

import pytest
import torch
from cache_driver import feed, held, sequence

import regard
from regard.methods.caches import kv_bytes, look_m_compress, scatter_merge
from tiny import tiny_llama


def one(length=60, heads=2, dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(heads, length, dim, generator=generator, dtype=torch.float64) for _ in range(2))
    return k, v, torch.rand(heads, length, generator=generator, dtype=torch.float64)


def span(length, *stretches):
    image = torch.zeros(length, dtype=torch.bool)
    for a, b in stretches:
        image[a:b] = True
    return image


def test_all_text_stays_and_images_fill_what_is_left():
    k, v, scores = one()
    image = span(60, (5, 30), (33, 50))
    text = (~image).nonzero()[:, 0]
    for heavy, recent in ((6, 6), (30, 8)):
        k2, v2, kept = look_m_compress(k, v, scores, heavy=heavy, recent=recent, image=image, merge="none")
        early_text = int((text < 60 - recent).sum())
        assert kept.shape[1] == max(heavy, early_text) + recent == k2.shape[1]
        for h in range(2):
            stayed = set(kept[h].tolist())
            assert set(text.tolist()) | set(range(60 - recent, 60)) <= stayed
            pictured = [j for j in range(60 - recent) if image[j]]
            best = sorted(pictured, key=lambda j: -scores[h, j])[: max(0, heavy - early_text)]
            assert stayed == set(text.tolist()) | set(range(60 - recent, 60)) | set(best)
            torch.testing.assert_close(k2[h], k[h, kept[h]], rtol=0, atol=0)
            torch.testing.assert_close(v2[h], v[h, kept[h]], rtol=0, atol=0)


@pytest.mark.parametrize("merge", ["pivot", "average", "weighted"])
def test_merging_by_the_slow_definition(merge):
    k, v, scores = one()
    image = span(60, (5, 50))
    k2, v2, kept = look_m_compress(k, v, scores, heavy=20, recent=6, image=image, merge=merge, variant="paper")
    for h in range(2):
        stays = kept[h].tolist()
        gone = [j for j in range(60) if j not in stays]
        given = {j: [(k[h, j], v[h, j])] for j in stays}
        for j in gone:
            cosine = torch.stack([torch.cosine_similarity(k[h, j], k[h, i], dim=0) for i in stays])
            at = stays[int(cosine.argmax())]
            if merge == "pivot":
                given[at].append(((k[h, j] + k[h, at]) / 2, (v[h, j] + v[h, at]) / 2))
            else:
                factor = float(cosine.max()) if merge == "weighted" else 1.0
                given[at].append((factor * k[h, j], factor * v[h, j]))
        for got, number in ((k2, 0), (v2, 1)):
            want = torch.stack([torch.stack([pair[number] for pair in given[j]]).mean(0) for j in stays])
            torch.testing.assert_close(got[h], want, rtol=1e-10, atol=1e-12)


def test_identical_copies_merge_into_themselves():
    k, v, _ = one(length=4)
    for merge in ("pivot", "average"):
        a, b = scatter_merge(k, v, k.repeat(1, 3, 1), v.repeat(1, 3, 1), merge)
        torch.testing.assert_close(a, k, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(b, v, rtol=1e-12, atol=1e-12)


def test_similarities_in_blocks(monkeypatch):
    from regard.methods.caches import merge

    k, v, _ = one(length=50)
    want = scatter_merge(k[:, :10], v[:, :10], k[:, 10:], v[:, 10:])
    monkeypatch.setattr(merge, "_BLOCK_ELEMENTS", 40)
    for got, expected in zip(scatter_merge(k[:, :10], v[:, :10], k[:, 10:], v[:, 10:]), want):
        assert torch.equal(got, expected)


def test_enough_budget_or_nothing_to_drop_changes_nothing():
    k, v, scores = one()
    for options in ({"heavy": 40, "recent": 20}, {"heavy": 4, "recent": 4, "image": span(60)}):
        k2, v2, kept = look_m_compress(k, v, scores, **options)
        assert torch.equal(k2, k) and torch.equal(v2, v) and kept.shape == (2, 60)


def test_rows_of_a_batch_are_as_if_alone():
    """Other padding, other images, none at all: each row keeps and merges what it would keep and merge alone."""
    qkv = sequence(batch=3, length=50)
    starts = [0, 13, 4]
    spans = torch.stack([span(50, (3, 30)), span(50, (20, 40)), span(50)])
    method = regard.LookM(heavy=0.2, recent=0.1)
    layer = method.make_layer(None)
    feed(layer, qkv, 0, 45, starts, {"image": spans[:, :45]})
    for at in range(45, 50):
        out = feed(layer, qkv, at, at + 1, starts)
    assert len(held(layer)[2, 0]) == 46
    for row, start in enumerate(starts):
        alone = method.make_layer(None)
        part = [t[row : row + 1, :, start:] for t in qkv]
        feed(alone, part, 0, 45 - start, None, {"image": spans[row : row + 1, start:45]})
        for at in range(45 - start, 50 - start):
            want = feed(alone, part, at, at + 1)
        torch.testing.assert_close(out[row : row + 1], want, rtol=1e-9, atol=1e-11)
        assert [j - start for j in held(layer)[row, 1]] == held(alone)[0, 1]


def llava():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    text = LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=99, vision_feature_layer=-1)
    return LlavaForConditionalGeneration(config).eval()


def test_llava_finds_its_own_images():
    model = llava()
    ids = torch.randint(1, 90, (1, 60))
    ids[:, 8:24] = ids[:, 30:46] = 99
    pixels = torch.randn(2, 3, 32, 32)
    dense = model(input_ids=ids, pixel_values=pixels).past_key_values
    with regard.attach(model, regard.LookM(heavy=0.2, recent=0.1)), torch.no_grad():
        cache = model(input_ids=ids, pixel_values=pixels).past_key_values
    stayed = held(cache.layers[0])
    assert all(len(positions) == 28 for positions in stayed.values())
    assert set(range(8)) | set(range(24, 30)) <= set(stayed[0, 0])
    assert kv_bytes(cache) < kv_bytes(dense)
    with regard.attach(model, regard.LookM(heavy=0.2, recent=0.1)):
        out = model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=5, do_sample=False, num_beams=2)
    assert out.shape == (1, 65)


def test_text_models_need_the_twin_without_the_prior():
    model = tiny_llama()
    ids = torch.randint(1, 128, (2, 60))
    lengths = []
    for prior in (True, False):
        with regard.attach(model, regard.LookM(budget=20, text_prior=prior)) as session, torch.no_grad():
            cache = session.new_cache()
            model(ids, past_key_values=cache)
            model(ids[:, :3], past_key_values=cache)
        lengths.append({len(positions) for positions in held(cache.layers[1]).values()})
    assert lengths == [{63}, {23}]


def test_of_a_compressed_prompt_the_last_tokens_can_be_cropped():
    qkv = sequence(length=110)
    layer = regard.LookM(budget=40, text_prior=False).make_layer(None)
    feed(layer, qkv, 0, 100)
    first = feed(layer, qkv, 100, 105)
    layer.crop(-5)
    torch.testing.assert_close(feed(layer, qkv, 100, 105), first)
    layer.crop(-15)
    assert all(max(positions) == 89 for positions in held(layer).values())
    with pytest.raises(ValueError, match="crop: got -60, need at most 54 tokens"):
        layer.crop(-60)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"merge": "sum"}, "merge: unknown name 'sum'"),
        ({"budget": 0.0}, "budget: got 0.0"),
        ({"heavy": 0.1}, "recent: got NoneType"),
        ({"heavy": 0.1, "recent": -1}, "recent: got -1"),
        ({"variant": "code"}, "variant: unknown name"),
        ({"sink": -1}, "sink: got -1"),
    ],
)
def test_bad_values(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        regard.LookM(**options)


def test_bad_shapes():
    k, v, scores = one()
    with pytest.raises(ValueError, match="scores: got"):
        look_m_compress(k, v, scores[:, 1:], heavy=2, recent=2)
    with pytest.raises(ValueError, match="image: got"):
        look_m_compress(k, v, scores, heavy=2, recent=2, image=torch.ones(7, dtype=torch.bool))
    with pytest.raises(ValueError, match="kept_k: got"):
        scatter_merge(k[0], v[0], k[0], v[0])
