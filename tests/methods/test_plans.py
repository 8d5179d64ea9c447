"""Head plans: a rule means the same as mask, as predicate, as slots and as a number; plans come back from files."""

import json

import pytest
import torch

from regard import HeadPlan, masks
from regard.methods.plans import BlockLocal, Full, Sharded, Span, Window, union

RULES = [
    Full(),
    Window(3, 5),
    Window(0, 4),
    Window(8, 12, 4),
    BlockLocal(4, 1),
    BlockLocal(5, 0),
    BlockLocal(3, 2),
    Sharded(4, 2, 3, 1),
    Sharded(4, 1, 3, 2, sink=3),
    Sharded(3, 2, 1, 0),
    Sharded(2, 3, 4, 5, sink=5),
]


def seen(rule, length, heads=1):
    mask = rule.mask()
    whole = masks.causal if mask is None else mask & masks.causal
    return whole.materialize(length, length, num_heads=heads)[0, -1]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("length", [1, 2, 13, 30, 61])
def test_a_rule_means_the_same_in_every_form(rule, length):
    kept = seen(rule, length)
    assert torch.equal(kept.sum(-1), rule.row_lengths(length))
    assert torch.equal(kept, seen(rule, length, heads=3))
    position = torch.arange(length)
    if getattr(rule, "block", 1) == 1 or not isinstance(rule, Window):
        assert torch.equal(rule.visible(position[:, None], position), kept)
    slots = rule.slots()
    size = torch.tensor([[[length]]])
    held = slots.held(size, slots.capacity(length))[0, 0]
    inside = held[held >= 0]
    assert len(inside) == len(set(inside.tolist())) == slots.held_tokens(length) == rule.tokens(length)
    assert torch.equal(held[slots.of(inside[None, None], size)[0, 0]], inside)
    for later in range(length - 1, length + 40):  # whatever any later query sees is still held
        needed = rule.visible(torch.tensor(later), position).nonzero().flatten()
        assert set(needed.tolist()) <= set(inside.tolist())


def test_spans_follow_the_authors_formula():
    assert Span(1024, 0.0).entries(3072) == 1024
    assert Span(-512, 0.5).entries(4096) == 2048
    assert Span(0, 0.0).entries(5000) == 128
    assert Span(9000, 0.0).entries(100) == 1152
    assert Span(1024, 0.0).at(3072) == Window(64, 960, 64)
    assert Span(1024, 0.0, exact=True).at(3072) == Window(64, 960)
    assert Span(100, 0.0, block=1, sink=4, minimum=8, reserve=0).at(500) == Window(4, 96)
    with pytest.raises(ValueError, match="need a settled one"):
        Span().mask()


def test_plans_count_what_they_keep():
    plan = HeadPlan(((Full(),), (Window(4, 12), Full()), (BlockLocal(8, 1),)))
    assert plan.tokens(64) == [64, 40, 16]
    assert plan.kv_share(64) == pytest.approx((64 + 40 + 16) / 192)
    dense = 64 * 65 / 2
    window, block = seen(Window(4, 12), 64).sum().item(), seen(BlockLocal(8, 1), 64).sum().item()
    assert plan.density(64) == pytest.approx((1 + (window / dense + 1) / 2 + block / dense) / 3)


def test_plans_come_back_from_files(tmp_path):
    plan = HeadPlan((tuple(RULES), (Span(5.5, 0.25, exact=True),), (Full(), Window(1, 2))))
    assert HeadPlan.load(plan.save(tmp_path / "plan.json")) == plan
    theirs = tmp_path / "moa_alpha_beta.json"
    theirs.write_text(json.dumps({"alphas": [[0.0, 1024.0], [-1024.0, 0.0]], "betas": [[0.125, 0.0], [1.0, 0.5]]}))
    loaded = HeadPlan.load(theirs)
    assert loaded.layers[1][0] == Span(-1024.0, 1.0)
    alphas, betas = loaded.spans()
    assert alphas.tolist() == [[0.0, 1024.0], [-1024.0, 0.0]] and betas.tolist() == [[0.125, 0.0], [1.0, 0.5]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "need a plan"),
        ('{"format": "other"}', "need a plan"),
        ('{"format": "regard.head_plan/1", "rules": [{"kind": "round"}], "layers": []}', "rules: got 'round'"),
        ('{"format": "regard.head_plan/1", "rules": [], "layers": [[0]]}', "is not a whole plan"),
        ('{"format": "regard.head_plan/1", "rules": []}', "is not a whole plan"),
    ],
)
def test_broken_files_are_told(tmp_path, content, message):
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        HeadPlan.load(path)


def test_heads_that_share_a_cache():
    assert union([Window(4, 8), Window(4, 20)]) == Window(4, 20)
    assert union([Full(), Window(4, 20)]) == Full()
    assert union([BlockLocal(4), BlockLocal(4)]) == BlockLocal(4)
    with pytest.raises(ValueError, match="rules of one kind"):
        union([BlockLocal(4), Window(0, 8)])
    with pytest.raises(ValueError, match="equal sinks"):
        union([Window(1, 8), Window(0, 8)])


def test_gates_make_a_plan():
    plan = HeadPlan.from_gates(torch.tensor([[0.9, 0.1], [0.2, 0.8]]), 0.5, sink=4, recent=8)
    assert plan.layers == ((Full(), Window(4, 8)), (Window(4, 8), Full()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Window(-1, 4), "sink: got -1"),
        (lambda: Window(0, 0), "window: got 0"),
        (lambda: Window(0, 10, 4), "window: got 10, need a multiple of the block, 4"),
        (lambda: BlockLocal(0), "block: got 0"),
        (lambda: Sharded(stride=0), "stride: got 0"),
        (lambda: Span(sink=128), "minimum: got 128"),
        (lambda: Span(sink=10), "sink: got 10, need a multiple of the block"),
        (lambda: HeadPlan(((1, 2),)), r"layers\[0\]: got tuple"),
        (lambda: HeadPlan.from_spans([[1.0]], [[1.0, 2.0]]), "betas: got 'shape"),
        (lambda: HeadPlan(((Full(), Full()),)).rules(0, 9, 3), "plan: got .2 rules in layer 0., need 1, 3"),
        (lambda: HeadPlan(((Full(),),)).check(2, 9, 3), "plan: got .1 layers., need 2"),
    ],
)
def test_bad_options_are_named(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
