"""Gather, attend, scatter over groups of tokens."""

import pytest
import torch

from regard.ops import attention, gather_groups, group_attention, masks, scatter_groups
from regard.ops.groups import memberships


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_gather_then_scatter_of_a_permutation_is_the_identity():
    x = randn(2, 3, 12, 4)
    order = torch.rand(2, 3, 12, generator=torch.Generator().manual_seed(1)).argsort(-1).view(2, 3, 3, 4)
    groups = gather_groups(x, order)
    assert groups.shape == (2, 3, 3, 4, 4)
    assert torch.equal(scatter_groups(groups, order, 12), x)


def test_empty_places_hold_zeros_and_give_nothing_back():
    x = randn(1, 1, 4, 2)
    index = torch.tensor([[[[3, -1], [0, 3]]]])
    groups = gather_groups(x, index)
    assert torch.equal(groups[0, 0, 0, 1], torch.zeros(2))
    back = scatter_groups(torch.ones_like(groups), index, 4, reduce="sum")
    assert back[0, 0, :, 0].tolist() == [1, 0, 0, 2]
    assert memberships(index, 4)[0, 0].tolist() == [1, 0, 0, 2]


def test_mean_divides_by_the_number_of_groups_plus_eps():
    index = torch.tensor([[[[0, 1], [1, 2]]]])
    out = scatter_groups(torch.ones(1, 1, 2, 2, 1), index, 4, eps=0.5)[0, 0, :, 0]
    assert torch.allclose(out, torch.tensor([1 / 1.5, 2 / 2.5, 1 / 1.5, 0]))
    assert torch.allclose(scatter_groups(torch.ones(1, 1, 2, 2, 1), index, 4)[0, 0, :, 0], torch.tensor([1.0, 1, 1, 0]))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("masked", [None, "causal", "tensor"])
def test_each_group_attends_within_itself(kv_heads, masked):
    q, k, v = randn(2, 4, 3, 5, 8), randn(2, kv_heads, 3, 5, 8, seed=1), randn(2, kv_heads, 3, 5, 6, seed=2)
    keep = torch.rand(2, 4, 3, 5, 5, generator=torch.Generator().manual_seed(3)) > 0.4
    mask = {None: None, "causal": masks.causal, "tensor": keep}[masked]
    bias = randn(2, 4, 3, 1, 5, seed=4)
    out, lse = group_attention(q, k, v, mask=mask, bias=bias, scale=0.3, return_lse=True)
    for g in range(3):
        own = keep[:, :, g] if masked == "tensor" else mask
        want, want_lse = attention(
            q[:, :, g], k[:, :, g], v[:, :, g], mask=own, bias=bias[:, :, g], scale=0.3, return_lse=True
        )
        assert torch.allclose(out[:, :, g], want, atol=1e-6)
        assert torch.allclose(lse[:, :, g], want_lse, atol=1e-6)


def test_no_groups_at_all():
    out, lse = group_attention(
        torch.zeros(1, 2, 0, 3, 4), torch.zeros(1, 2, 0, 3, 4), torch.zeros(1, 2, 0, 3, 5), return_lse=True
    )
    assert out.shape == (1, 2, 0, 3, 5) and lse.shape == (1, 2, 0, 3)


def test_gradients_reach_every_member_once_a_group():
    x = randn(1, 2, 5, 3).double().requires_grad_()
    index = torch.tensor([[[[0, 1], [1, 4]]]]).expand(1, 2, 2, 2)

    def through(x):
        own = gather_groups(x, index)
        return scatter_groups(group_attention(own, own, own), index, 5, eps=0.1)

    assert torch.autograd.gradcheck(through, (x,))


def test_errors_name_the_argument():
    x = randn(1, 2, 4, 3)
    with pytest.raises(ValueError, match="index"):
        gather_groups(x, torch.zeros(2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="index.*integers"):
        gather_groups(x, torch.zeros(1, 2, 1, 1))
    with pytest.raises(ValueError, match="x: got '2 heads'"):
        gather_groups(x, torch.zeros(1, 3, 1, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="reduce"):
        scatter_groups(torch.zeros(1, 1, 1, 1, 2), torch.zeros(1, 1, 1, 1, dtype=torch.long), 3, reduce="most")
    with pytest.raises(ValueError, match="k: got '2 groups'"):
        group_attention(torch.zeros(1, 1, 3, 2, 2), torch.zeros(1, 1, 2, 2, 2), torch.zeros(1, 1, 3, 2, 2))
