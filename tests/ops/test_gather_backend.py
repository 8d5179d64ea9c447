"""The gather backend: one block of queries over its selected keys, by the numbers of the float64 reference, with gradients."""

import pytest
import torch
from test_attention import MASKS, TOLERANCE, a_mask, inputs, spec

from regard import masks, ops, scores
from regard.ops import Selection, attention, attention_backend


def a_selection(batch, heads, q_len, kv_len, block_k, seed=0, keep=0.4):
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(batch, heads, 1, -(-kv_len // block_k), generator=generator) < keep
    return Selection.from_block_map(chosen, block_q=max(q_len, 1), block_k=block_k, q_len=q_len, kv_len=kv_len)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_masks_and_types(mask, dtype):
    for number, (q_len, kv_len, block_k, heads) in enumerate(
        [(1, 33, 8, 4), (5, 40, 8, 2), (1, 17, 1, 1), (3, 7, 16, 4)]
    ):
        q, k, v = inputs(number, 2, 4, 2, q_len, kv_len, 6, 5, dtype)
        given = {
            "selection": a_selection(2, heads, q_len, kv_len, block_k, number),
            "mask": a_mask(mask, 2, 4, q_len, kv_len),
        }
        out, lse = attention(q, k, v, backend="gather", return_lse=True, **given)
        wanted, wanted_lse = spec(q, k, v, **given)
        size = TOLERANCE[dtype]
        torch.testing.assert_close(out.double(), wanted, rtol=size, atol=size)
        torch.testing.assert_close(lse.double(), wanted_lse, rtol=size, atol=size)
        assert torch.equal(attention(q, k, v, backend="gather", **given), out) or dtype != torch.float64


def test_bias_score_mod_offset_and_scale():
    q, k, v = inputs(3, 2, 4, 2, 3, 29, 6, 5)
    bias = torch.randn(2, 1, 1, 29, dtype=torch.float64)
    bias[0, 0, 0, 4] = -torch.inf
    given = {
        "selection": a_selection(2, 2, 3, 29, 4), "bias": bias, "score_mod": scores.soft_cap(0.7), "mask": masks.causal,
        "q_offset": 20, "scale": 0.3,
    }  # fmt: skip
    torch.testing.assert_close(attention(q, k, v, backend="gather", **given), spec(q, k, v, **given)[0])


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_gradients(heads):
    q, k, v = (x.requires_grad_() for x in inputs(4, 2, 4, 2, 2, 19, 4, 3))
    selection = a_selection(2, heads, 2, 19, 4, seed=heads)
    weight = torch.randn(2, 4, 2, 3, dtype=torch.float64)

    def total(out, lse):
        return (out * weight).sum() + lse.clamp(min=-99).sum()

    given = {"selection": selection, "mask": masks.causal}
    found = torch.autograd.grad(total(*attention(q, k, v, backend="gather", return_lse=True, **given)), (q, k, v))
    wanted = torch.autograd.grad(total(*spec(q, k, v, **given)), (q, k, v))
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b)


def test_room_at_the_end_of_a_cache():
    q, k, v = inputs(5, 2, 4, 2, 1, 40, 6, 6)
    room = torch.full((2, 2, 64, 6), torch.nan, dtype=torch.float64)
    room[:, :, :40] = k
    fused = torch.cat((k, v), dim=3)  # rows that are not one after the other
    given = {"selection": a_selection(2, 2, 1, 40, 8), "mask": masks.causal}
    wanted = spec(q, k, v, **given)[0]
    torch.testing.assert_close(attention(q, room[:, :, :40], v, **given), wanted)
    torch.testing.assert_close(attention(q, fused[..., :6], fused[..., 6:], **given), wanted)
    torch.testing.assert_close(attention(q, k.transpose(1, 2).contiguous().transpose(1, 2), v, **given), wanted)


def test_empty_lists_give_zeros():
    q, k, v = (x.requires_grad_() for x in inputs(6, 1, 2, 1, 1, 9, 4, 4))
    selection = Selection(torch.full((1, 1, 1, 2), -1), block_q=1, block_k=4, q_len=1, kv_len=9)
    out, lse = attention(q, k, v, selection=selection, backend="gather", return_lse=True)
    assert not out.any() and bool((lse == -torch.inf).all())
    assert not any(g.any() for g in torch.autograd.grad(out.sum(), (q, k, v)))


def test_it_is_chosen_for_decoding_and_refuses_the_rest():
    q, k, v = inputs(7, 1, 2, 1, 1, 64, 4, 4, torch.float32)
    assert attention_backend(q, k, v, selection=a_selection(1, 1, 1, 64, 8), mask=masks.causal) == "gather"
    with pytest.raises(ValueError, match="backend: got 'gather'.*it needs a selection"):
        attention(q, k, v, backend="gather")
    many = Selection(torch.zeros(1, 1, 2, 1, dtype=torch.long), block_q=1, block_k=8, q_len=2, kv_len=64)
    with pytest.raises(ValueError, match="serves one block of queries, and the selection has 2"):
        attention(q.expand(-1, -1, 2, -1), k, v, selection=many, backend="gather")
    assert "gather" in ops.BACKENDS
