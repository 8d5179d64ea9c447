"""GatedAttention: every place, kind and combination of its gate; limits in which it is plain attention; loading; padding; errors."""

from __future__ import annotations

import itertools

import pytest
import torch

import regard
from regard.nn import GatedAttention, SoftmaxAttention, as_ltv, split_gated_query

PLACES = ("attention", "value", "key", "query", "output")


def tokens(length=9, dim=16):
    return torch.randn(2, length, dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def layer_of(**options):
    torch.manual_seed(0)
    return GatedAttention(16, 4, num_kv_heads=2, rope_base=50.0, **options).double().eval()


def plain_like(layer, **options):
    plain = SoftmaxAttention(16, 4, num_kv_heads=2, rope_base=50.0, **options).double().eval()
    plain.load_state_dict({name: t for name, t in layer.state_dict().items() if not name.startswith("gate_")})
    return plain


ALL = [
    {"place": place, "gate": gate, "shared": shared, "combine": combine, "input_dependent": depends}
    for place, gate, shared, combine, depends in itertools.product(
        PLACES, ("elementwise", "headwise"), (False, True), ("multiply", "add"), (True, False)
    )
    if place != "output" or (gate == "elementwise" and not shared)
]


@pytest.mark.parametrize("options", ALL, ids=str)
def test_decodes_trains_and_sees_no_later_token(options):
    layer, x = layer_of(**options), tokens()
    whole = layer(x)
    state, outs = None, []
    for piece in x.split([4, 1, 1, 3], dim=1):
        y, state = layer(piece, state=state, return_state=True)
        outs.append(y)
    torch.testing.assert_close(torch.cat(outs, 1), whole)
    whole[:, :5].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())
    moved = torch.cat((x[:, :5], x[:, 5:] + 1), 1)
    torch.testing.assert_close(layer(moved)[:, :5], whole[:, :5])


@pytest.mark.parametrize("options", [o for o in ALL if o["combine"] == "multiply"], ids=str)
def test_a_gate_is_what_it_says_at_each_place(options):
    """Gates of 1/2 everywhere: half the output behind attention or values, half the scores before it."""
    layer, x = layer_of(**options), tokens()
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if name.startswith("gate_"):
                p.zero_()
    plain = plain_like(layer)
    if options["place"] == "key":
        with torch.no_grad():
            plain.k_proj.weight *= 0.5
    if options["place"] == "query":
        with torch.no_grad():
            plain.q_proj.weight *= 0.5
    factor = 1.0 if options["place"] in ("key", "query") else 0.5
    torch.testing.assert_close(layer(x), plain(x) * factor)


def test_open_gates_are_plain_attention():
    layer, x = layer_of(input_dependent=False), tokens()
    with torch.no_grad():
        layer.gate_logits.fill_(50.0)
    torch.testing.assert_close(layer(x), plain_like(layer)(x))
    none = layer_of(gate=None)
    torch.testing.assert_close(none(x), plain_like(none)(x))
    with pytest.raises(ValueError, match="gate: got None"):
        none.gates(x)


def test_headwise_is_elementwise_with_equal_gates_in_a_head():
    head, x = layer_of(gate="headwise"), tokens()
    element = layer_of(gate="elementwise")
    state = dict(head.state_dict())
    state["gate_proj.weight"] = state["gate_proj.weight"].repeat_interleave(4, 0)
    element.load_state_dict(state)
    torch.testing.assert_close(element(x), head(x))


@pytest.mark.parametrize(
    ("activation", "low", "high"), [("sigmoid", 0, 1), ("half_sigmoid", 0.5, 1), ("silu", -0.3, 50)]
)
def test_activations(activation, low, high):
    gates = layer_of(activation=activation).gates(tokens() * 5)
    assert gates.shape == (2, 4, 9, 4)
    assert gates.min() >= low and gates.max() <= high
    assert layer_of(place="value", gate="headwise").gates(tokens()).shape == (2, 2, 9, 1)
    assert layer_of(shared=True).gates(tokens()).shape == (2, 1, 9, 4)
    assert layer_of(place="output").gates(tokens()).shape == (2, 9, 16)


@pytest.mark.parametrize("gate", ["headwise", "elementwise"])
def test_official_rows_stand_by_kv_head(gate):
    """Queries and gates of one kv head side by side: swapping whole kv heads swaps both."""
    layer = layer_of(gate=gate)
    own = layer.state_dict()
    size = 2 if gate == "headwise" else 8
    rows = [
        part
        for kv in range(2)
        for part in (own["q_proj.weight"][8 * kv : 8 * kv + 8], own["gate_proj.weight"][size * kv : size * kv + size])
    ]
    theirs = {name: t for name, t in own.items() if not name.startswith("gate_")} | {"q_proj.weight": torch.cat(rows)}
    other = GatedAttention(16, 4, num_kv_heads=2, rope_base=50.0, gate=gate).double().eval()
    regard.load_official(other, theirs)
    assert torch.equal(other(tokens()), layer(tokens()))
    regard.load_official(other, own)  # ours pass as they are
    with pytest.raises(ValueError, match="20 or 32 rows"):
        split_gated_query(torch.zeros(21, 3), 4, 2, 4)


def test_padding_on_the_left_is_as_if_it_were_not_there():
    layer = GatedAttention(16, 4).double().eval()
    x = tokens(6)
    padded = torch.cat((torch.full((2, 3, 16), 9.0, dtype=torch.float64), x), 1)
    there = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]] * 2)
    torch.testing.assert_close(layer(padded, padding_mask=there)[:, 3:], layer(x))
    state, outs = None, []
    for piece, mask in zip(padded.split([5, 1, 3], 1), there.split([5, 1, 3], 1)):
        y, state = layer(piece, padding_mask=mask, state=state, return_state=True)
        outs.append(y)
    torch.testing.assert_close(torch.cat(outs, 1)[:, 3:], layer(x))
    y, _ = layer(x[:, :1], state=state.select(torch.tensor([1, 0])), return_state=True)
    assert y.isfinite().all()
    windowed = GatedAttention(16, 4, window=3).double().eval()
    first, state = windowed(padded[:, :7], padding_mask=there[:, :7], return_state=True)
    second = windowed(padded[:, 7:], state=state)
    torch.testing.assert_close(torch.cat((first, second), 1)[:, 3:], windowed(x))
    with pytest.raises(ValueError, match="padding_mask"):
        layer(x, padding_mask=there)


@pytest.mark.parametrize("options", [{}, {"window": 3}, {"qk_norm": True, "rope_base": 20.0, "num_kv_heads": 2}])
def test_attention_weights_are_those_of_the_forward_pass(options):
    layer, x = SoftmaxAttention(16, 4, **options).double().eval(), tokens()
    weights = layer.attention_weights(x)
    v = layer._project(x)[2].repeat_interleave(4 // layer.num_kv_heads, 1)
    torch.testing.assert_close(layer.o_proj((weights @ v).transpose(1, 2).flatten(2)), layer(x))


def test_half_precision_and_full_attention():
    layer = GatedAttention(16, 4, causal=False, gate="headwise").bfloat16()
    y = layer(tokens().bfloat16())
    assert y.dtype == torch.bfloat16 and y.isfinite().all()


def test_the_paper_names_its_places_by_number():
    assert [GatedAttention(8, 2, place=f"G{i + 1}").place for i in range(5)] == list(PLACES)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"gate": "rowwise"}, "gate"),
        ({"place": "G6"}, "place"),
        ({"combine": "subtract"}, "combine"),
        ({"activation": "relu"}, "activation"),
        ({"place": "output", "gate": "headwise"}, "elementwise"),
        ({"place": "output", "shared": True}, "not shared"),
        ({"place": "key", "gate": "headwise", "qk_norm": True}, "qk_norm"),
    ],
)
def test_bad_arguments(options, says):
    with pytest.raises(ValueError, match=says):
        GatedAttention(16, 4, **options)


def test_is_not_taken_for_plain_attention():
    with pytest.raises(TypeError, match="layer"):
        as_ltv(GatedAttention(8, 2), torch.zeros(1, 2, 8))
