"""Packed tensors: the codes come back, the error is bounded, and the bytes are as few as they say."""

import pytest
import torch

from regard.ops import quantise
from regard.ops.packed import cat_packed, pack_bits, unpack_bits


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("channels", [1, 3, 8, 13])
def test_codes_survive_packing(bits, channels):
    codes = torch.randint(0, 2**bits, (2, 5, channels), dtype=torch.uint8)
    packed = pack_bits(codes, bits)
    assert packed.shape == (2, 5, -(-channels * bits // 8)) and packed.dtype == torch.uint8
    assert torch.equal(unpack_bits(packed, bits, channels), codes)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("axis", ["tokens", "channels"])
def test_error_is_at_most_half_a_step(bits, axis):
    x = torch.randn(2, 3, 24, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    packed = quantise(x, bits, 8, axis)
    error = (packed.dequantise() - x).abs()
    step = packed.scale.repeat_interleave(8, -2 if axis == "tokens" else -1)
    assert bool((error <= step / 2 + 1e-12).all())
    spread = x.unflatten(-2 if axis == "tokens" else -1, (-1, 8))
    inner = -2 if axis == "tokens" else -1
    want = (spread.amax(inner) - spread.amin(inner)) / (2**bits - 1)
    torch.testing.assert_close(packed.scale, want)
    assert packed.codes.numel() == 2 * 3 * 24 * 16 * bits // 8


def test_equal_entries_come_back_and_halves_stay_halves():
    x = torch.full((1, 4, 6), 2.7)
    assert torch.equal(quantise(x, 2, 4, "tokens").dequantise(), x)
    half = torch.randn(2, 8, 8).to(torch.bfloat16)
    packed = quantise(half, 8, 8, "channels")
    assert packed.dequantise().dtype == packed.scale.dtype == torch.bfloat16
    assert (packed.dequantise() - half).abs().max() < 0.05


@pytest.mark.parametrize("axis", ["tokens", "channels"])
def test_slices_and_joining(axis):
    x = torch.randn(2, 24, 8)
    packed = quantise(x, 4, 8, axis)
    whole = packed.dequantise()
    assert torch.equal(packed[8:24].dequantise(), whole[:, 8:])
    joined = cat_packed(packed[:8], packed[8:])
    assert torch.equal(joined.dequantise(), whole) and joined.rows == 24
    if axis == "tokens":
        with pytest.raises(ValueError, match="rows: got .* whole groups of 8"):
            packed[4:8]


@pytest.mark.parametrize(
    "options,message",
    [
        ({"bits": 3}, "bits: got 3"),
        ({"axis": "rows"}, "axis: got 'rows'"),
        ({"group": 5}, "group: got 5, need a divisor of 24 tokens"),
        ({"group": 0}, "group: got 0"),
    ],
)
def test_bad_values(options, message):
    with pytest.raises(ValueError, match=message):
        quantise(torch.randn(2, 24, 8), **{"bits": 4, "group": 8, "axis": "tokens"} | options)
