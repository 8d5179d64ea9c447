"""Staircase quantisation: bits fall with age, bytes with them, and nothing else changes."""

import pytest
import torch
from cache_driver import feed, run, sequence

import regard
from regard.methods.caches import kv_bytes
from regard.methods.caches.staircase import StaircaseLayer
from regard.ops import attention, masks, quantise
from tiny import tiny_llama

STEPS = ((8, 16), (8, 8), (12, 4), (None, 2))


def layer(steps=STEPS, group=4):
    return StaircaseLayer(regard.StaircaseQuantCache(steps, group))


def stored(one, number=0):
    """Keys and values as they would be read now, (b, H, n, D), of the rows in stair `number`."""
    pieces = one.stairs[number].pieces(1 << 40)
    return torch.cat([k() for k, _ in pieces], 2), torch.cat([v() for _, v in pieces], 2)


def test_unquantised_steps_are_dense_attention():
    qkv = sequence()
    starts = [0, 13]
    real = masks.causal & masks.padding(torch.tensor([40, 40]), start=torch.tensor(starts))
    want = attention(*qkv, mask=real)
    for cuts in ([20, *range(21, 41)], [5, 16, 40], [40]):
        torch.testing.assert_close(run(layer(((None, 16),)), qkv, cuts, starts), want, rtol=1e-9, atol=1e-11)


def test_steps_hold_what_they_say():
    """Token by token: after every step each stretch of age has its bits, and reads come from what is stored."""
    qkv = sequence(length=70)
    one = layer()
    feed(one, qkv, 0, 40)
    for at in range(40, 70):
        out = feed(one, qkv, at, at + 1)
        keys, values = stored(one)
        assert keys.shape[2] == at + 1
        want = attention(qkv[0][:, :, at : at + 1], keys, values)
        torch.testing.assert_close(out, want, rtol=1e-9, atol=1e-11)
        stair = one.stairs[0]
        lengths = [stair.k.shape[2], *(held[0].rows for held in stair.packed)]
        assert sum(lengths) == at + 1
        assert 8 <= lengths[0] < 8 + 4 + 1 and all(length % 4 == 0 for length in lengths[1:])
        assert (8 <= lengths[1] < 8 + 4 and 12 <= lengths[2] < 12 + 4) or at < 50
        assert [held[0].bits for held in stair.packed] == [8, 4, 2]
    error = (stored(one)[0] - qkv[1]).abs().amax((0, 1, 3))
    assert error[-8:].max() == 0 < error[-20:-12].max() < error[-36:-26].max() < error[:20].max()


def test_a_prompt_goes_straight_to_its_bits():
    qkv = sequence(length=60)
    one = layer()
    feed(one, qkv, 0, 60)
    keys, values = stored(one)
    old = 60 - 8 - 8 - 12
    torch.testing.assert_close(keys[:, :, :old], quantise(qkv[1][:, :, :old], 2, 4, "tokens").dequantise())
    torch.testing.assert_close(values[:, :, :old], quantise(qkv[2][:, :, :old], 2, 4, "channels").dequantise())
    assert torch.equal(keys[:, :, -8:], qkv[1][:, :, -8:])


def test_rows_are_as_if_alone():
    qkv = sequence(batch=3, length=60)
    starts = [0, 21, 5]
    cuts = [30, 38, *range(39, 61)]
    one = layer()
    outs = run(one, qkv, cuts, starts)
    for row, start in enumerate(starts):
        part = [t[row : row + 1, :, start:] for t in qkv]
        want = run(layer(), part, [cut - start for cut in cuts])
        torch.testing.assert_close(outs[row : row + 1, :, start:], want, rtol=1e-9, atol=1e-11)


def test_bytes_shrink_as_the_bits_do():
    qkv = sequence(batch=1, heads=3, kv_heads=3, length=4096, dim=64, dtype=torch.float32)
    one = StaircaseLayer(regard.StaircaseQuantCache())
    feed(one, qkv, 0, 4096)
    numbers, old = 2 * 3 * 64, 4096 - 384
    codes = numbers * (128 * 4 + 128 * 1 + 128 * 0.5 + old * 0.25)
    scales = numbers * (4096 - 128) / 32 * 2 * 4
    assert kv_bytes(one) == pytest.approx(codes + scales, rel=1e-3)
    half = StaircaseLayer(regard.StaircaseQuantCache())
    feed(half, [t.to(torch.bfloat16) for t in qkv], 0, 4096)
    assert kv_bytes(half) < 0.25 * numbers * 4096 * 2


def test_crop_takes_back_candidates_exactly():
    qkv = sequence(length=60)
    other = [torch.cat([a[:, :, :34], b[:, :, 34:]], 2) for a, b in zip(qkv, sequence(length=60, seed=1))]
    straight, cropped = layer(), layer()
    run(straight, qkv, [24, 30, 34])
    run(cropped, qkv, [24, 30])
    feed(cropped, other, 30, 38)
    cropped.crop(-4)
    for a, b in ((34, 35), (35, 41), (41, 42)):
        torch.testing.assert_close(feed(cropped, qkv, a, b), feed(straight, qkv, a, b), rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="crop: got -30, need at most"):
        cropped.crop(-30)
    cropped.crop(-42)
    assert cropped.get_seq_length() == 0


@pytest.mark.parametrize("starts", [None, [0, 13]])
def test_rows_reordered_repeated_and_selected(starts):
    qkv = sequence(length=60)
    one, want = layer(), layer()
    run(one, qkv, [40, 41], starts)
    run(want, qkv, [40, 41], starts)
    one.reorder_cache(torch.tensor([1, 0]))
    flipped = [t.flip(0) for t in qkv]
    torch.testing.assert_close(feed(one, flipped, 41, 42).flip(0), feed(want, qkv, 41, 42))
    one.batch_repeat_interleave(2)
    out = feed(one, [t.repeat_interleave(2, 0) for t in flipped], 42, 43)
    torch.testing.assert_close(out[::2].flip(0), feed(want, qkv, 42, 43))
    one.batch_select_indices(torch.tensor([2]))
    torch.testing.assert_close(feed(one, [t[:1] for t in qkv], 43, 44), feed(want, qkv, 43, 44)[:1])


def test_generates_with_padding_beams_and_half_types():
    model = tiny_llama()
    ids = torch.randint(1, 128, (2, 60))
    mask = torch.ones_like(ids)
    mask[0, :22] = 0
    method = regard.StaircaseQuantCache(STEPS, group=4)
    with regard.attach(model, method):
        both = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, num_beams=3)
        alone = model.generate(ids[:1, 22:], max_new_tokens=8, do_sample=False, num_beams=3)
    assert torch.equal(both[:1, 22:], alone)
    half = tiny_llama().to(torch.bfloat16)
    with regard.attach(half, method):
        assert half.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False).shape == (2, 64)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"steps": ()}, "steps: got"),
        ({"steps": ((128, 16),)}, "a last step of"),
        ({"steps": ((100, 16), (None, 2))}, "steps: got 100, need a multiple of group = 32"),
        ({"steps": ((128, 4), (None, 8))}, "never rise"),
        ({"steps": ((128, 16), (None, 3))}, "bits of 16, 8, 4 or 2"),
        ({"steps": 4}, "steps: got int"),
        ({"group": 0}, "group: got 0"),
    ],
)
def test_bad_values(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        regard.StaircaseQuantCache(**options)
