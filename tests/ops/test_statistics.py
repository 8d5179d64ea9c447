"""Attention statistics equal those of the whole matrix, whatever the blocks, masks, groups and padding."""

import pytest
import torch

from regard import masks
from regard.ops import attention, attention_column_sums, statistics, window_scores
from regard.ops.reference import attention_scores, softmax_with_lse


def inputs(batch=2, heads=6, kv_heads=2, q_len=37, kv_len=37, dim=8, dtype=torch.float64):
    torch.manual_seed(0)
    return (
        torch.randn(batch, heads, q_len, dim, dtype=dtype),
        torch.randn(batch, kv_heads, kv_len, dim, dtype=dtype),
    )


def weights(q, k, mask, scale=None, q_offset=None, **options):
    q_offset = k.shape[2] - q.shape[2] if q_offset is None else q_offset
    mask = None if mask is None else masks.as_mask(mask)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return softmax_with_lse(attention_scores(q, k, mask=mask, q_offset=q_offset, scale=scale, **options))


PADDED = masks.causal & masks.padding(torch.tensor([37, 37]), start=torch.tensor([0, 11]))
MASKS = {
    "none": None,
    "causal": masks.causal,
    "window": masks.causal & masks.sliding_window(5),
    "left padding": PADDED,
    "tensor": torch.rand(2, 1, 37, 37, generator=torch.Generator().manual_seed(1)) > 0.3,
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("group", ["sum", "mean", "max", "none"])
def test_sums_are_those_of_the_matrix(monkeypatch, name, group):
    q, k = inputs()
    full, lse = weights(q, k, MASKS[name])
    want = full.sum(2)
    if group != "none":
        want = getattr(want.unflatten(1, (2, 3)), {"max": "amax"}.get(group, group))(2)
    for elements in (1, 4000, 1 << 20):  # a row at a time, a few rows, everything
        monkeypatch.setattr(statistics, "_BLOCK_ELEMENTS", elements)
        monkeypatch.setattr(statistics, "_COLUMNS", 7)
        for known in (None, lse):
            got = attention_column_sums(q, k, mask=MASKS[name], group=group, lse=known)
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_every_row_gives_away_one():
    q, k = inputs()
    sums = attention_column_sums(q, k, mask=PADDED, group="none").sum(-1)
    torch.testing.assert_close(sums, torch.tensor([37.0, 26.0], dtype=torch.float64)[:, None].expand(2, 6))


def test_part_of_the_keys_with_the_lse_of_all():
    q, k = inputs()
    full, lse = weights(q, k, None)
    got = attention_column_sums(q, k[:, :, 5:20], lse=lse, group="none")
    torch.testing.assert_close(got, full.sum(2)[..., 5:20], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", ["eager", "cpu", "sdpa"])
def test_the_lse_of_a_forward_pass_serves(backend):
    q, k = inputs(dtype=torch.float32)
    _, lse = attention(q, k, k, mask=masks.causal, return_lse=True, backend=backend)
    want = attention_column_sums(q, k, mask=masks.causal)
    torch.testing.assert_close(attention_column_sums(q, k, mask=masks.causal, lse=lse), want, rtol=1e-5, atol=1e-5)


def test_score_mod_bias_scale_and_offset():
    q, k = inputs(q_len=9)
    bias = torch.randn(1, 6, 9, 37, dtype=torch.float64)
    options = {"score_mod": lambda s, b, h, i, j: s + 0.1 * (i - j), "bias": bias, "scale": 0.7}
    full, _ = weights(q, k, masks.causal, q_offset=20, **options)
    got = attention_column_sums(q, k, mask=masks.causal, q_offset=20, group="none", **options)
    torch.testing.assert_close(got, full.sum(2), rtol=1e-10, atol=1e-12)


def test_window_scores_and_pooling():
    q, k = inputs()
    full, _ = weights(q, k, PADDED)
    want = full[:, :, -8:].mean(2).unflatten(1, (2, 3)).mean(2)
    torch.testing.assert_close(window_scores(q, k, 8, mask=PADDED), want, rtol=1e-10, atol=1e-12)
    pooled = window_scores(q, k, 8, mask=PADDED, pool="max", kernel=3)
    assert torch.equal(pooled[..., -8:], window_scores(q, k, 8, mask=PADDED)[..., -8:])
    for at in range(29):
        near = want[..., max(0, at - 1) : min(29, at + 2)].amax(-1)
        torch.testing.assert_close(pooled[..., at], near, rtol=1e-10, atol=1e-12)
    average = window_scores(q, k, 8, mask=PADDED, pool="avg", kernel=3)
    torch.testing.assert_close(average[..., 3], want[..., 2:5].mean(-1), rtol=1e-10, atol=1e-12)
    assert torch.equal(window_scores(q, k, 100), window_scores(q, k, 37))


def test_half_types_accumulate_in_float32_and_gradients_flow():
    q, k = inputs(dtype=torch.bfloat16)
    got = attention_column_sums(q, k, mask=masks.causal)
    assert got.dtype == torch.float32
    want = attention_column_sums(q.double(), k.double(), mask=masks.causal)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    q, k = inputs(q_len=5, kv_len=6, dim=3)
    q.requires_grad_(), k.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: attention_column_sums(a, b, mask=masks.causal), (q, k))


def test_empty_lengths():
    q, k = inputs(q_len=0)
    assert attention_column_sums(q, k).shape == (2, 2, 37)
    q, k = inputs(q_len=3, kv_len=0)
    assert attention_column_sums(q, k).shape == (2, 2, 0)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"group": "median"}, "group: unknown name 'median'"),
        ({"last": 0}, "last: got 0"),
        ({"lse": torch.zeros(2, 6, 3)}, r"lse: got 'shape \(2, 6, 3\)'"),
    ],
)
def test_bad_values(options, message):
    q, k = inputs()
    with pytest.raises(ValueError, match=message):
        attention_column_sums(q, k, **options)
    with pytest.raises(ValueError, match="kernel: got 4"):
        window_scores(q, k, pool="avg", kernel=4)
    with pytest.raises(ValueError, match="k: got '4 kv heads'"):
        attention_column_sums(q, k.repeat(1, 2, 1, 1))
