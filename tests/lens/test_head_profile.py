"""The search for heads to tune: gains head by head, and the factor on a grid."""

import pytest
import torch

import regard
from regard.lens import fit_zero_tuning, profile_heads, tune_gamma
from tiny import tiny_llama


@pytest.fixture(scope="module")
def model():
    model = tiny_llama(4)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(10)
    return model


@pytest.fixture(scope="module")
def batches():
    ids = torch.randint(1, 128, (6, 9), generator=torch.Generator().manual_seed(2))
    short = torch.cat([torch.zeros(3, 2, dtype=torch.long), ids[3:, :7]], 1)
    mask = (torch.arange(9) >= 2).long().expand(3, -1)
    return [
        {"input_ids": ids[:3], "attention_mask": torch.ones(3, 9, dtype=torch.long)},
        {"input_ids": short, "attention_mask": mask},
    ]


def entropy(model, batches, *methods):
    values = []
    with torch.no_grad(), regard.attach(model, *methods):
        for batch in batches:
            p = model(**batch).logits[:, -1].softmax(-1)
            values.append(-(p * p.log()).sum(-1))
    return float(torch.cat(values).mean())


@pytest.mark.parametrize(("each", "shape"), [("head", (1, 4)), ("layer", (3, 1)), ("both", (3, 4))])
def test_gains_are_the_difference_to_the_untouched_model(model, batches, each, shape):
    profile = profile_heads(model, batches, each=each, gammas=(3.0, 0.2))
    assert profile.up.scores.shape == shape == profile.down.scores.shape
    base = entropy(model, batches)
    assert profile.baseline == pytest.approx(-base, rel=1e-5)
    method = {
        "head": regard.ZeroTuning(3.0, heads=[2]),
        "layer": regard.ZeroTuning(3.0, layers=[2]),
        "both": regard.ZeroTuning(3.0, heads=[(2, 2)]),
    }[each]
    place = {"head": (0, 2), "layer": (2, 0), "both": (2, 2)}[each]
    assert profile.up[place] == pytest.approx(base - entropy(model, batches, method), abs=1e-5)


def test_groups(model, batches):
    profile = profile_heads(model, batches, gammas=(3.0, 0.2))
    up, down = profile.up_heads, profile.down_heads
    assert not set(up) & set(down) and all(isinstance(head, int) for head in up + down)
    assert profile.dominant == max(up, down, key=len) and profile.dominant
    for head in up:
        assert profile.up[0, head] > max(0.0, profile.down[0, head])
    pairs = profile_heads(model, batches, each="both", heads=[1], layers=[0, 2])
    assert set(pairs.up_heads + pairs.down_heads) <= {(0, 1), (2, 1)}
    assert pairs.up.scores.isnan().sum() == 10
    with regard.attach(model, regard.ZeroTuning(3.0, heads=profile.dominant)), torch.no_grad():
        model(**batches[0])


def test_accuracy_and_choices(model, batches):
    with torch.no_grad():
        said = [model(**batch).logits[:, -1].argmax(-1) for batch in batches]
    profile = profile_heads(model, batches, said, heads=[0])
    assert profile.baseline == 1.0 and profile.up[0, 0] <= 0
    choices = torch.tensor([5, 9, 40])
    with torch.no_grad():
        among = [choices[model(**batch).logits[:, -1][:, choices].argmax(-1)] for batch in batches]
    assert profile_heads(model, batches, among, heads=[0], choices=choices).baseline == 1.0
    assert profile_heads(model, batches, [label + 1 for label in said], heads=[0]).baseline == 0.0


def test_padding_on_either_side_asks_the_same(model, batches):
    right = {
        "input_ids": batches[1]["input_ids"].roll(-2, 1),
        "attention_mask": batches[1]["attention_mask"].roll(-2, 1),
    }
    left, other = (profile_heads(model, [batch], heads=[1]) for batch in (batches[1], right))
    assert left.baseline == pytest.approx(other.baseline, rel=1e-4)
    assert left.up[0, 1] == pytest.approx(other.up[0, 1], abs=1e-4)


def test_the_factor_of_least_entropy(model, batches):
    best, table = tune_gamma(model, batches, gammas=(0.25, 1.0, 4.0), heads=[0, 1])
    assert list(table) == [0.25, 1.0, 4.0] and table[best] == max(table.values())
    assert table[4.0] == pytest.approx(-entropy(model, batches, regard.ZeroTuning(4.0, heads=[0, 1])), rel=1e-5)
    assert (
        tune_gamma(model, batches, gammas=(0.5, 2.0, 1.0), heads=[])[0] == 1.0
    )  # of equals the one that changes least


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gammas": (0.5, 2.0)}, "gammas"),
        ({"each": "neuron"}, "each"),
        ({"objective": "loss"}, "objective"),
        ({"objective": "accuracy"}, "labels"),
    ],
)
def test_bad_settings(model, batches, options, words):
    with pytest.raises(ValueError, match=words):
        profile_heads(model, batches, **options)
    with pytest.raises(ValueError, match="inputs"):
        profile_heads(model, [])


@pytest.mark.parametrize("each", ["head", "layer", "both"])
def test_the_whole_procedure_never_does_worse_than_nothing(model, batches, each):
    method, profile, table = fit_zero_tuning(model, batches, each=each, gammas=(0.25, 4.0), probe_gammas=(3.0, 0.2))
    assert set(table) == {0.25, 1.0, 4.0} and table[method.gamma] == max(table.values()) >= profile.baseline - 1e-6
    assert entropy(model, batches, method) == pytest.approx(-table[method.gamma], rel=1e-5)
    tried = {"head": 4, "layer": 3, "both": 12}[each]
    chosen = method.layers if each == "layer" else method.heads
    assert round(0.4 * tried) <= len(chosen) <= round(0.7 * tried)


def test_shares_bound_the_group(model, batches):
    method, _, _ = fit_zero_tuning(model, batches, gammas=(2.0,), share=(1.0, 1.0))
    assert sorted(method.heads) == [0, 1, 2, 3]
    method, _, _ = fit_zero_tuning(model, batches, gammas=(2.0,), share=(0.01, 0.25))
    assert len(method.heads) == 1
    with pytest.raises(ValueError, match="share"):
        fit_zero_tuning(model, batches, share=(0.7, 0.4))


def test_labels_choose_by_accuracy_or_log_probability(model, batches):
    labels = [torch.tensor([5, 6, 7]), torch.tensor([8, 9, 10])]
    for objective in ("accuracy", "log-probability"):
        method, profile, table = fit_zero_tuning(model, batches, labels, gammas=(0.5, 2.0), objective=objective)
        assert table[method.gamma] >= table[1.0] and profile.each == "head"
