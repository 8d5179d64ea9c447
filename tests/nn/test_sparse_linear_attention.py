"""SEA: what happens when everything is kept, causality, padding, gradients, the losses, errors."""

import pytest
import torch

from regard import masks
from regard.losses import fit, sea_distillation
from regard.nn import EstimatedSparseAttention, SparseLinearAttention
from regard.ops import attention


def core(causal=False, **options):
    torch.manual_seed(0)
    options = {"num_heads": 2, "head_dim": 8, "k": 3, "width": 16, "causal": causal, "max_len": 40} | options
    return EstimatedSparseAttention(**options).eval()


def qkv(length=30, batch=2, heads=2, dim=8, seed=1):
    return torch.randn(3, batch, heads, length, dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("causal", [False, True])
def test_all_keys_and_open_scales_are_dense_attention(causal):
    module, (q, k, v) = core(causal, k=64), qkv()
    module.scaler.weight.data.zero_()
    module.scaler.bias.data.fill_(40.0)
    torch.testing.assert_close(module(q, k, v), attention(q, k, v, mask=masks.causal if causal else None))
    module.scaler.bias.data[1] = -40.0  # the average alone
    found, record = module(q, k, v, return_record=True)
    if causal:
        torch.testing.assert_close(found[:, :, 9], v[:, :, :10].mean(2))
    assert bool((record.kept() == record.visible()).all())


@pytest.mark.parametrize("causal", [False, True])
def test_the_record_says_what_was_done(causal):
    module, (q, k, v) = core(causal), qkv()
    out, record = module(q, k, v, return_record=True)
    mixed = record.weights() @ v * record.scales[..., 1:]
    average = out - mixed
    torch.testing.assert_close(out, record.context)
    kept = record.kept().sum(-1).float().sum(1)
    assert abs(float(kept[:, 10:].mean()) - 6) < 1.5  # 2 heads, k = 3
    torch.testing.assert_close(record.probs_m.sum(-1), torch.ones(2, 2, 30))
    if causal:
        mean = v.cumsum(2) / torch.arange(1, 31)[:, None]
        torch.testing.assert_close(average, (1 - record.scales[..., 1:]) * mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module.estimate(q, k, v), record.probs_m)


def test_the_future_is_not_seen():
    module, (q, k, v) = core(True), qkv()
    late = [x.clone() for x in (q, k, v)]
    for x in late:
        x[:, :, 17:] += 1.0
    first, second = module(q, k, v, return_record=True), module(*late, return_record=True)
    torch.testing.assert_close(first[0][:, :, :17], second[0][:, :, :17])
    torch.testing.assert_close(first[1].probs_m[:, :, :17], second[1].probs_m[:, :, :17])


@pytest.mark.parametrize("length", [1, 2, 7])
@pytest.mark.parametrize("causal", [False, True])
def test_short_rows(length, causal):
    out, record = core(causal)(*qkv(length), return_record=True)
    assert torch.isfinite(out).all() and bool(record.kept().any(-1).all())


def test_padding():
    module, (q, k, v) = core(variant="paper"), qkv()
    mask = torch.arange(30) < torch.tensor([[30], [22]])
    other = [x.clone() for x in (q, k, v)]
    for x in other[1:]:
        x[1, :, 22:] = 9.0
    other[0][1, :, 22:] = -9.0
    first, record = module(q, k, v, mask, return_record=True)
    assert not record.kept()[1, :, :, 22:].any() and not record.kept()[1, :, 22:].any()
    v_before = other[2].clone()
    second = module(*other, mask)
    assert torch.equal(other[2], v_before)  # inputs stay as they are
    torch.testing.assert_close(first[0], second[0])
    with pytest.raises(ValueError, match="pad on the right"):
        core(True)(q, k, v, mask)


@pytest.mark.parametrize("causal", [False, True])
def test_distillation_reaches_everything_and_helps(causal):
    torch.manual_seed(0)
    module = core(causal, redraw_every=0)
    q, k, v = qkv(24)
    scores = q @ k.transpose(-1, -2) * 8**-0.5 * 3
    context = attention(q, k, v, mask=masks.causal if causal else None, scale=3 * 8**-0.5)

    def loss(_):
        return sea_distillation(module(q, k, v, return_record=True)[1], scores, context)

    result = fit(module, loss, [0], steps=25, lr=3e-3, progress=False)
    assert result.losses[-1] < 0.9 * result.losses[0]
    loss(0).backward()
    assert all(p.grad is not None for p in module.parameters())
    with pytest.raises(ValueError, match="teacher_scores: got"):
        sea_distillation(module(q, k, v, return_record=True)[1], scores[:, :1])


def test_a_perfect_student_has_no_map_loss():
    module, (q, k, v) = core(True), qkv(12)
    _, record = module(q, k, v, return_record=True)
    scores = record.scores()
    own = sea_distillation(record, q @ k.transpose(-1, -2) * 8**-0.5)
    estimate = sea_distillation(record, scores)
    both = 0.0
    for other in (scores, q @ k.transpose(-1, -2) * 8**-0.5):
        both += float(sea_distillation(record, other).detach())
    assert float(own.detach()) > 0 and float(estimate.detach()) > 0
    torch.testing.assert_close(torch.tensor(both), own.detach() + estimate.detach())
    record.scores_m = torch.zeros_like(record.scores_m)
    record.q = torch.zeros_like(q)  # both maps are uniform, and so is the teacher's
    assert float(sea_distillation(record, torch.zeros_like(scores))) == pytest.approx(0.0, abs=1e-6)


def test_features_are_redrawn_in_training_only():
    module, (q, k, v) = core(redraw_every=2), qkv(8)
    before = module.estimator.projection.clone()
    for _ in range(5):
        module(q, k, v)
    assert torch.equal(module.estimator.projection, before)
    module.train()
    for _ in range(3):
        module(q, k, v)
    assert not torch.equal(module.estimator.projection, before)


def test_the_layer():
    torch.manual_seed(0)
    layer = SparseLinearAttention(16, 2, k=3, width=16, causal=True, max_len=40)
    x = torch.randn(2, 20, 16)
    y, record = layer(x, return_record=True)
    torch.testing.assert_close(layer(x), y)
    assert y.shape == x.shape and record.probs_m.shape == (2, 2, 20, 16)
    y.square().sum().backward()
    assert all(p.grad is not None for name, p in layer.named_parameters() if "o_proj" in name or "v_proj" in name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 6, "causal": True}, "width: got 6, need 'a multiple of 4|width: got 6"),
        ({"causal": True, "competition": "head"}, "competition: got 'head'"),
        ({"k": 0}, "k: got 0"),
        ({"oversample": 0.5}, "oversample: got 0.5"),
        ({"variant": "old"}, "variant: unknown name"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        core(**options)


def test_bad_input():
    module, (q, k, v) = core(True, max_len=8), qkv(9)
    with pytest.raises(ValueError, match="at most max_len = 8 tokens"):
        module(q, k, v)
    with pytest.raises(ValueError, match="k: got"):
        module(q[:, :, :4], k, v)
    with pytest.raises(ValueError, match="a token in every row"):
        core()(q, k, v, torch.zeros(2, 9))
