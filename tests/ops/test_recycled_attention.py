"""Recycled attention over a whole sequence: the slow definition, its limits, its gradients."""

import pytest
import torch

from regard.ops import attention, masks, recycled_attention


def inputs(batch=2, heads=4, kv_heads=2, length=37, dim=8):
    torch.manual_seed(0)
    shapes = [(batch, heads, length, dim), (batch, kv_heads, length, dim), (batch, kv_heads, length, dim)]
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def naive(q, k, v, budget, stride, group):
    out = torch.zeros_like(q)
    size = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(k.shape[1]):
            for i in range(q.shape[2]):
                first = i // stride * stride
                reads = list(range(i + 1))
                if i != first:
                    rows = [
                        torch.softmax(k[b, h, : first + 1] @ q[b, h * size + g, first] * 8**-0.5, 0)
                        for g in range(size)
                    ]
                    joined = torch.stack(rows).amax(0) if group == "max" else torch.stack(rows).mean(0)
                    reads = sorted(joined.topk(min(budget, first + 1)).indices.tolist()) + list(range(first + 1, i + 1))
                for g in range(size):
                    weights = torch.softmax(k[b, h, reads] @ q[b, h * size + g, i] * 8**-0.5, 0)
                    out[b, h * size + g, i] = weights @ v[b, h, reads]
    return out


@pytest.mark.parametrize("group", ["max", "mean"])
@pytest.mark.parametrize("budget,stride", [(3, 5), (8, 10), (1, 37), (4, 2)])
def test_the_slow_definition(monkeypatch, budget, stride, group):
    from regard.ops import recycled

    q, k, v = inputs()
    want = naive(q, k, v, budget, stride, group)
    for elements in (1, 1 << 22):
        monkeypatch.setattr(recycled, "_BLOCK_ELEMENTS", elements)
        got = recycled_attention(q, k, v, budget=budget, stride=stride, group=group)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def test_limits_are_causal_attention():
    q, k, v = inputs()
    want = attention(q, k, v, mask=masks.causal)
    for options in ({"budget": 2, "stride": 1}, {"budget": 37, "stride": 9}, {"budget": 36, "stride": 9}):
        torch.testing.assert_close(recycled_attention(q, k, v, **options), want, rtol=1e-9, atol=1e-11)


def test_gradients():
    q, k, v = (t[:1, :2, :9, :3].clone().requires_grad_() for t in inputs())
    assert torch.autograd.gradcheck(lambda *t: recycled_attention(*t, budget=2, stride=4), (q, k, v))


@pytest.mark.parametrize(
    "options,message",
    [
        ({"budget": 0, "stride": 2}, "budget: got 0"),
        ({"budget": 2, "stride": 0}, "stride: got 0"),
        ({"budget": 2, "stride": 2, "group": "min"}, "group: unknown name"),
    ],
)
def test_bad_values(options, message):
    q, k, v = inputs()
    with pytest.raises(ValueError, match=message):
        recycled_attention(q, k, v, **options)
    with pytest.raises(ValueError, match="k: got '36 keys'"):
        recycled_attention(q, k[:, :, 1:], v, budget=2, stride=2)
