"""Packing a padded batch: attention over the packed tokens is attention over the padded ones."""

import pytest
import torch

from regard.ops import attention_varlen, flash_attention, pack_padded, unpack_padded


def test_packed_attention_is_padded_attention():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 9, 2, 4, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(3))
    real = torch.arange(9) < torch.tensor([[9], [0], [4]])
    packed = [pack_padded(x, real)[0] for x in (q, k, v)]
    starts = pack_padded(q, real)[1]
    assert starts.tolist() == [0, 9, 9, 13] and packed[0].shape == (13, 2, 4)
    out = unpack_padded(attention_varlen(*packed, starts, causal=True), real)
    padded = flash_attention(q, k, v, causal=True, query_padding_mask=real, key_padding_mask=real)
    torch.testing.assert_close(out, padded)
    grads = [torch.autograd.grad(y.square().sum(), (q, k, v)) for y in (out, padded)]
    for got, want in zip(*grads):
        torch.testing.assert_close(got, want)


def test_padding_may_stand_anywhere():
    x = torch.arange(8.0).view(2, 4)
    real = torch.tensor([[False, True, False, True], [True, False, False, False]])
    packed, starts = pack_padded(x, real)
    assert packed.tolist() == [1, 3, 4] and starts.tolist() == [0, 2, 3]
    assert unpack_padded(packed, real).tolist() == [[0, 1, 0, 3], [4, 0, 0, 0]]
    with pytest.raises(ValueError, match="x: got 'shape .2, 3.', need"):
        pack_padded(x[:, :3], real)
    with pytest.raises(ValueError, match="real: got torch.int64, need bool"):
        pack_padded(x, real.long())
    with pytest.raises(ValueError, match="packed: got 'shape .2,.', need 3 tokens"):
        unpack_padded(packed[:2], real)
