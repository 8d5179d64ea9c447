"""DARE's forms against each other, its search against full attention, what reaches which vectors, padding; the probes by definition."""

import math

import pytest
import torch

import regard
from regard.lens import cluster_information, gradient_conflict, learned_correlation, search_quality, target_information
from regard.models import DARE
from regard.nn import TargetAttention
from regard.testbeds.recommendation import ClickWorld, evaluate_clicks
from regard.testbeds.training import train

SIZE = {
    "num_items": 31,
    "num_categories": 6,
    "dims": (4, 3, 2),
    "num_positions": 20,
    "top_k": 5,
    "hidden": (8, 6),
    "aux_hidden": 8,
}
WORLD = ClickWorld(30, 5)
ROWS = WORLD.rows(12, 9, seed=1)


def made(seed=0, **options):
    torch.manual_seed(seed)
    model = DARE(**(SIZE | options)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def test_two_sets_of_equal_vectors_are_twin():
    twin, dare = made(tables="twin"), made(1)
    dare.load_state_dict(twin.state_dict())
    assert torch.equal(twin(ROWS.batch()).p, dare(ROWS.batch()).p)
    four = made(2, tables="four")
    four.load_state_dict(twin.state_dict())
    assert torch.equal(twin(ROWS.batch()).p, four(ROWS.batch()).p)
    identity = made(3, tables="projection")
    identity.load_state_dict(twin.state_dict(), strict=False)
    for to in identity.project.values():
        torch.nn.init.eye_(to.weight)
        torch.nn.init.zeros_(to.bias)
    assert torch.allclose(twin(ROWS.batch()).p, identity(ROWS.batch()).p, atol=1e-6)


def test_a_search_that_keeps_all_is_attention_over_all():
    everything, soft = made(search=None), made(top_k=9)
    rows = WORLD.rows(6, 9, seed=3, least=9)
    one, other = everything(rows.batch()), soft(rows.batch())
    assert torch.allclose(one.p, other.p, atol=1e-6)
    assert torch.allclose(other.attended.out, other.attended.whole, atol=1e-6)


def test_the_search_keeps_the_best_scores():
    found = made()(ROWS.batch()).attended
    for row in range(12):
        best = found.scores[row].sort(descending=True).values[:5]
        assert torch.equal(found.scores[row, found.chosen[row]], best)
    assert torch.allclose(found.weights.sum(1), torch.ones(12), atol=1e-6)


def test_attention_vectors_learn_from_weights_alone_and_representations_not_from_scores():
    model = made(aux=False)
    model(ROWS.batch()).attended.scores[ROWS.history_items > 0].sum().backward()
    assert all(p.grad is None for p in model.tables["representation_target"].parameters())
    assert model.tables["attention_target"].item.weight.grad.abs().sum() > 0
    model.zero_grad()
    model(ROWS.batch()).attended.out.sum().backward()
    assert model.tables["representation_history"].item.weight.grad.abs().sum() > 0


def test_padding_weighs_nothing_in_the_paper_variant_and_length_does_not_matter():
    model = made(variant="paper", positions=None)
    batch = ROWS.batch()
    batch["history_items"], batch["history_categories"] = (
        batch["history_items"].clone(),
        batch["history_categories"].clone(),
    )
    batch["history_items"][:, :7] = 0
    batch["history_categories"][:, :7] = 0
    short = batch | {name: batch[name][:, 7:] for name in ("history_items", "history_categories")}
    assert torch.allclose(model(batch).p, model(short).p, atol=1e-6)
    released = made(positions=None)
    assert not torch.allclose(released(batch).p, released(short).p, atol=1e-3)
    batch["history_items"].zero_()
    assert (model(batch).attended.out == 0).all() and torch.isfinite(model(batch).p).all()


def test_rows_do_not_matter_to_each_other():
    model = made(average=True)
    whole = model(ROWS.batch()).p
    assert torch.allclose(whole[3:4], model(ROWS[torch.tensor([3])].batch()).p, atol=1e-6)


def test_hard_search_looks_at_the_latest_of_the_category():
    rows = WORLD.rows(40, 18, seed=5, least=18)
    found = made(search="hard", top_k=2)(rows.batch()).attended
    for row in range(40):
        same = (rows.history_categories[row] == rows.category[row]).nonzero()[:, 0]
        if len(same) >= 2:
            assert found.chosen[row].tolist() == same[-2:].tolist()


def test_narrow_attention_tables():
    model = made(attention_dims=(2, 1, 2))
    assert model.attention.parts == (3, 2) and model(ROWS.batch()).p.shape == (12, 2)
    with pytest.raises(ValueError, match="attention_dims"):
        made(tables="twin", attention_dims=(2, 1, 2))


@pytest.mark.parametrize("tables", ["dare", "twin", "projection", "projection_by_field", "four", "three", "din"])
def test_gradients_are_finite_and_reach_all_that_is_used(tables):
    model = made(tables=tables).train()
    model(ROWS.batch()).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    assert model.penalty().item() == pytest.approx(
        sum(float(p.square().sum()) for n, p in model.named_parameters() if "bias" not in n and "tables" not in n),
        rel=1e-5,
    )


def test_a_learned_score_by_the_formula():
    torch.manual_seed(0)
    layer = TargetAttention((3,), score="learned", search=None)
    q, k = torch.randn(2, 3), torch.randn(2, 4, 3)
    target = q[:, None].expand(-1, 4, -1)
    want = layer.mlp(torch.cat((target, k, target - k, target * k), 2))[..., 0] / 3
    assert torch.allclose(layer(q, k, k).scores, want)


def test_information_by_the_definition():
    torch.manual_seed(0)
    category, history, label = torch.randint(1, 4, (300,)), torch.randint(0, 4, (300, 3)), torch.randint(2, (300,))
    found = target_information(category, history, label, 4)
    for a in (1, 2, 3):
        rows = category == a
        for b in (1, 2, 3):
            for p in range(3):
                event = (history[rows, 2 - p] == b).long()
                want = 0.0
                for x in (0, 1):
                    for y in (0, 1):
                        both = ((event == x) & (label[rows] == y)).double().mean()
                        apart = (event == x).double().mean() * (label[rows] == y).double().mean()
                        want += float(both * (both / apart).log2()) if both > 0 else 0.0
                assert found[a, b, p] == pytest.approx(want, abs=1e-9)
    assert (found[0] == 0).all() and (found[:, 0] == 0).all()


def test_a_search_by_the_worth_itself_is_perfect():
    worth = torch.rand(5, 12)
    worth[0] = 0
    quality = search_quality(worth, worth, 4)
    assert quality[0].isnan() and torch.allclose(quality[1:], torch.ones(4))
    assert (search_quality(-worth, worth, 4)[1:] < 0.5).all()


def test_conflict_of_gradients_adds_up_to_the_gradient_of_the_shared_vectors():
    model = made(tables="twin").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = gradient_conflict(model, ROWS.batch())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    model(ROWS.batch()).loss.backward()
    grad = model.tables["attention_target"].category.weight.grad
    there = ~found.cosine.isnan()
    squares = found.attention**2 + found.representation**2 + 2 * found.cosine * found.attention * found.representation
    assert torch.allclose(grad.norm(dim=1)[there] ** 2, squares[there], rtol=1e-3)
    assert 0 <= found.share <= 1 and -1 <= found.mean <= 1
    with pytest.raises(ValueError, match="twin"):
        gradient_conflict(made(), ROWS.batch())


def test_clusters_of_what_tells_all_and_of_noise():
    torch.manual_seed(0)
    label = torch.randint(2, (400,))
    shared, normalised = cluster_information(label[:, None] * 8 + torch.randn(400, 1) * 0.1, label, 2)
    share = label.double().mean().item()
    assert shared == pytest.approx(-share * math.log(share) - (1 - share) * math.log(1 - share), rel=1e-6)
    assert normalised == pytest.approx(1.0, rel=1e-6)
    assert cluster_information(torch.randn(400, 3), label, 5)[0] < 0.05


def test_learned_correlation_lies_between_0_and_1():
    found = learned_correlation(made(), 9)
    assert found.shape == (6, 6, 9) and (found.amax((1, 2)) == 1).all() and (found.amin((1, 2)) == 0).all()
    with pytest.raises(ValueError, match="model"):
        learned_correlation(made(tables="din"), 9)


def test_it_learns_a_known_world():
    world = ClickWorld(40, 4, related=0)
    rows, test = world.rows(2000, 10, seed=1), world.rows(1000, 10, seed=2)
    torch.manual_seed(0)
    model = DARE(41, 5, (8, 8, 8), num_positions=20, top_k=5, hidden=(32, 16), aux_hidden=32)
    train(model, rows.batches(200), steps=60, loss=lambda m, b: m(b).loss, lr=1e-2, weight_decay=0.0, progress=False)
    found = evaluate_clicks(model, test)
    assert found["auc"] > 0.65 and found["loss"] < 0.7 and found["gauc"] > 0.6


def test_bad_input():
    model, batch = made(), ROWS.batch()
    for name, value, message in (
        ("item", batch["item"] + 100, "item"), ("history_categories", batch["history_categories"] - 5, "history_categories"),
        ("history_items", batch["history_items"][0], "history_items"), ("label", torch.ones(3), "label"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            model(batch | {name: value})
    with pytest.raises(ValueError, match="category"):
        model({"item": batch["item"]})
    with pytest.raises(TypeError, match="batch"):
        model(batch["item"])
    for options, message in (
        ({"tables": "dair"}, "tables"), ({"search": "all"}, "search"), ({"positions": "add"}, "dims"),
        ({"product": False, "only_product": True}, "only_product"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            made(**options)
    with pytest.raises(ValueError, match="k:"):
        TargetAttention((3,))(torch.zeros(2, 3), torch.zeros(2, 4, 5), torch.zeros(2, 4, 5))
    assert regard.models.DAREOutput is type(model(batch))
