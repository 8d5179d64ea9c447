"""MQSA-TED against SASRec, causality, padding and shorter inputs; the distillation's limits; it learns a known world."""

import pytest
import torch
import torch.nn.functional as F

import regard
from regard.losses import TransitionDistilledLoss, transition_counts, transition_distillation
from regard.models import MQSATED
from regard.nn.sequence.multi_query_self_attention import trailing_mean
from regard.testbeds.recommendation import TransitionWorld, evaluate_ranking, next_item_batches
from regard.testbeds.training import train


def made(**options):
    torch.manual_seed(0)
    model = MQSATED(**({"num_items": 11, "dim": 8, "num_heads": 2, "max_len": 7} | options)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


IDS = torch.tensor([[11, 11, 3, 5, 0, 2, 9], [1, 2, 3, 4, 5, 6, 7]])


def test_trailing_mean_by_the_definition():
    x, exists = torch.randn(2, 6, 3), torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 1]]).bool()
    x = x * exists[..., None]
    for window in (1, 3, 10):
        found = trailing_mean(x, exists, window)
        for b in range(2):
            for t in range(6):
                some = [x[b, s] for s in range(max(0, t - window + 1), t + 1) if exists[b, s]]
                want = torch.stack(some).mean(0) if some else torch.zeros(3)
                assert torch.allclose(found[b, t], want, atol=1e-6)


def test_equal_branches_make_the_weights_irrelevant_and_are_sasrec():
    model, alone = made(windows=(1, 1), weights=(0.3, 0.7)), made(windows=(1,), weights=(1.0,))
    model.mixer.branches[1].load_state_dict(model.mixer.branches[0].state_dict())
    model.mixer.norms[1].load_state_dict(model.mixer.norms[0].state_dict())
    state = model.state_dict()
    alone.load_state_dict({name: state[name] for name in alone.state_dict()})
    assert torch.allclose(model(IDS), alone(IDS), atol=1e-5)


def test_a_weight_of_one_leaves_the_other_branch_out():
    model = made(windows=(1, 3), weights=(1.0, 0.0))
    before = model(IDS)
    torch.nn.init.normal_(model.mixer.branches[1][0].v_proj.weight)
    assert torch.equal(before, model(IDS))
    assert not torch.allclose(before, made(windows=(1, 3), weights=(0.0, 1.0))(IDS), atol=1e-2)


def test_what_comes_later_and_other_rows_do_not_matter():
    model = made(depth=2)
    whole = model(IDS)
    changed = IDS.clone()
    changed[0, 5:] = 10
    assert torch.allclose(whole[0, 2:5], model(changed)[0, 2:5], atol=1e-5)
    assert not torch.allclose(whole[0, 5], model(changed)[0, 5], atol=1e-3)
    assert torch.allclose(whole[:1], model(IDS[:1]), atol=1e-5)


def test_padding_is_as_if_it_were_not_there():
    model = made(depth=2, windows=(1, 4))
    assert torch.allclose(model(IDS[:1])[:, 2:], model(IDS[:1, 2:]), atol=1e-5)
    assert torch.allclose(model.scores(IDS), model(IDS)[:, -1, :-1], atol=1e-5)
    assert torch.isfinite(model(torch.full((1, 7), 11))).all()


def test_weights_shown_are_rows_of_one_over_what_was_seen():
    model = made(windows=(1, 3))
    for weights in model.attention_weights(IDS):
        assert weights.shape == (2, 2, 7, 7) and torch.allclose(weights.sum(-1), torch.ones(2, 2, 7), atol=1e-5)
        assert (weights.triu(1) == 0).all() and (weights[0, :, 2:, :2] == 0).all()


def test_a_hot_teacher_is_uniform_and_a_cold_one_the_most_common():
    torch.manual_seed(0)
    items, counts = torch.randn(6, 4), torch.rand(3, 6)
    student = (items[:3] @ items.T / 1e4).softmax(1)
    assert transition_distillation(items[:3], items, counts, 1e4) == pytest.approx(
        -student.log().mean().item(), rel=1e-4
    )
    cold = transition_distillation(items[:3] * 1e-3, items * 1e-3, counts, 1e-3)
    assert cold == pytest.approx(F.cross_entropy(items[:3] @ items.T * 1e-3, counts.argmax(1)).item(), rel=1e-2)
    assert torch.isfinite(transition_distillation(items[:3], items, torch.zeros(3, 6)))


def test_transitions_are_counted():
    rows = [torch.tensor([0, 1, 2]), torch.tensor([1, 2, 1]), torch.tensor([3])]
    want = torch.zeros(4, 4)
    for a, b in [(0, 1), (1, 2), (1, 2), (2, 1)]:
        want[a, b] += 1
    assert torch.equal(transition_counts(rows, 4).to_dense(), want)
    want[0, 2] += 1
    want[1, 1] += 1
    assert torch.equal(transition_counts(rows, 4, 2).to_dense(), want)
    assert transition_counts([], 4).to_dense().sum() == 0


def test_gradients_reach_every_parameter_and_the_parts_add_up():
    model = made(depth=2).train()
    loss = TransitionDistilledLoss(transition_counts([IDS[1]], 11))
    torch.manual_seed(1)
    total = loss(model, (IDS, IDS.roll(-1, 1)))
    total.backward()
    assert all(
        p.grad is not None and torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0 for p in model.parameters()
    )
    torch.manual_seed(1)
    assert sum(part.item() for part in loss.parts(model, (IDS, IDS.roll(-1, 1))).values()) == pytest.approx(
        total.item()
    )
    assert set(TransitionDistilledLoss(loss.counts, 0.0, l2=0.0).parts(model, (IDS, IDS))) == {"next"}


def test_it_learns_what_follows_what(tmp_path):
    world = TransitionWorld(30, 2, 1, 0.9, seed=1)
    met, _ = world.interactions(150, 9, seed=2)
    split = met.leave_one_out()
    torch.manual_seed(0)
    model = MQSATED(30, 16, max_len=8, dropout=0.1)
    before = evaluate_ranking(model, split, length=8)
    loss = TransitionDistilledLoss(transition_counts(split.train, 30))
    train(model, next_item_batches(split.train, 30, 8, 50), steps=60, loss=loss, lr=1e-2, progress=False)
    after = evaluate_ranking(model, split, length=8)
    assert after["ndcg@5"] > before["ndcg@5"] + 0.2
    assert evaluate_ranking(model, split, "valid", length=8, batch=7) == pytest.approx(
        evaluate_ranking(model, split, "valid", length=8)
    )


@pytest.mark.parametrize(
    ("options", "name"),
    [({"windows": ()}, "windows"), ({"weights": (0.5,)}, "weights"), ({"weights": (0.9, 0.9)}, "weights"), ({"dim": 9}, "dim"),
     ({"windows": (0, 1)}, "window"), ({"dropout": 1.5}, "dropout")],
)  # fmt: skip
def test_bad_options(options, name):
    with pytest.raises(ValueError, match=name):
        made(**options)


def test_bad_input():
    model = made()
    with pytest.raises(ValueError, match="ids"):
        model(torch.full((1, 3), 12))
    with pytest.raises(ValueError, match="max_len"):
        model(torch.zeros(1, 8, dtype=torch.int64))
    with pytest.raises(TypeError, match="ids"):
        model(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="counts"):
        transition_distillation(torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="sequences"):
        transition_counts([torch.tensor([0, 9])], 4)
    with pytest.raises(ValueError, match="padding_mask"):
        regard.nn.MultiQuerySelfAttention(8)(torch.zeros(1, 3, 8), torch.ones(1, 4))
