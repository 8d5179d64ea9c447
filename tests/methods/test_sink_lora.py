"""SinkLoRA: grouped attention while training, full attention otherwise, no look ahead, and the released variant that has one."""

import pytest
import torch
from sparse_models import call, generated, logits, padded_batch, prompt
from torch import nn

import regard
from regard import SinkLoRA, ops
from tiny import tiny_llama


@pytest.fixture
def training():
    return tiny_llama().train()  # no dropout in it


def test_eval_mode_is_the_model_itself():
    model, ids = tiny_llama(), prompt()
    dense, told = logits(model, ids), generated(model, ids)
    for variant in ("paper", "released"):
        with regard.attach(model, SinkLoRA(variant=variant)):
            assert torch.equal(logits(model, ids), dense)
            assert torch.equal(generated(model, ids), told)


def test_training_is_the_op(training):
    one = call(rows=64, keys=64)
    one.module.train()
    want = ops.shifted_group_attention(one.q, one.k, one.v, 16, sink=4, shift_heads=0.25)
    torch.testing.assert_close(one.run([SinkLoRA()]), want, rtol=1e-5, atol=1e-6)
    want = ops.shifted_group_attention(one.q, one.k, one.v, 16, shift="cyclic")
    other = call(rows=64, keys=64)
    other.module.train()
    torch.testing.assert_close(other.run([SinkLoRA(variant="released")]), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{"group": 128, "share": 1.0}, {"group_ratio": 1.0, "share": 1.0}, {"sink": 90}])
def test_limits_are_full_attention(training, options):
    ids = prompt()
    dense = logits(training, ids)
    with regard.attach(training, SinkLoRA(**options)):
        torch.testing.assert_close(logits(training, ids), dense, rtol=1e-5, atol=1e-5)
    with regard.attach(training, SinkLoRA(group=16)):
        assert not torch.allclose(logits(training, ids), dense, atol=1e-3)


@pytest.mark.parametrize(("variant", "leaks"), [("paper", False), ("released", True)])
def test_only_the_released_variant_sees_the_future(training, variant, leaks):
    ids = prompt(64)
    other = ids.clone()
    other[0, -1] = 1 + other[0, -1] % 127
    with regard.attach(training, SinkLoRA(variant=variant)):
        changed = (logits(training, ids) != logits(training, other)).any(-1)[0, :-1]
    assert bool(changed.any()) == leaks
    if leaks:
        assert bool(changed[:8].all())  # the first half group, group 16


def test_padding_changes_nothing(training):
    ids, mask, alone = padded_batch()
    with regard.attach(training, SinkLoRA(group=16)):
        rows = logits(training, ids, attention_mask=mask)
        for row, text in zip(rows, alone):
            torch.testing.assert_close(row[-text.shape[1] :], logits(training, text)[0], rtol=1e-5, atol=1e-5)
        right = logits(training, ids.flip(1), attention_mask=mask.flip(1))
        want = logits(training, ids.flip(1)[1:, :73])
        torch.testing.assert_close(right[1, :73], want[0], rtol=1e-5, atol=1e-5)


class LowRank(nn.Module):
    """What peft's LoRA does to a linear layer."""

    def __init__(self, base, rank=4, alpha=8):
        super().__init__()
        self.base, self.scale = base, alpha / rank
        self.down, self.up = (
            nn.Linear(base.in_features, rank, bias=False),
            nn.Linear(rank, base.out_features, bias=False),
        )
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base(x) + self.scale * self.up(self.down(x))


def test_low_rank_changes_norms_and_embeddings_are_enough_to_train(training):
    """LongLoRA's recipe: inside the groups for training, with full attention afterwards."""
    ids = prompt(64)
    for layer in training.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, LowRank(getattr(layer.self_attn, name)))
    for name, parameter in training.named_parameters():
        parameter.requires_grad_(any(part in name for part in ("norm", "embed", ".up.", ".down.")))
    trained = [parameter for parameter in training.parameters() if parameter.requires_grad]
    before = training.eval()(ids, labels=ids).loss.item()
    optimizer = torch.optim.Adam(trained, 1e-2)
    with regard.attach(training.train(), SinkLoRA()):
        for _ in range(30):
            optimizer.zero_grad()
            training(ids, labels=ids).loss.backward()
            assert all(bool(parameter.grad.isfinite().all()) for parameter in trained)
            optimizer.step()
    assert training.eval()(ids, labels=ids).loss.item() < before - 0.5


def test_released_needs_whole_groups_and_no_padding(training):
    with regard.attach(training, SinkLoRA(variant="released", group=16)):
        with pytest.raises(
            ValueError, match="got '90 queries and 90 keys', need a sequence without a past, of a multiple"
        ):
            logits(training, prompt(90))
        ids, mask, _ = padded_batch(96)
        with pytest.raises(ValueError, match="got 'padded rows'"):
            logits(training, ids, attention_mask=mask)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_ratio": 0.0}, "group_ratio: got 0.0"),
        ({"group_ratio": 1.5}, "group_ratio: got 1.5"),
        ({"group": 0}, "group: got 0"),
        ({"sink": -1}, "sink: got -1"),
        ({"share": 2}, "share: got 2"),
        ({"variant": "sf"}, "variant: unknown name 'sf'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        SinkLoRA(**options)
