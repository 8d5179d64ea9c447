"""In-context attention: heads by hand, the question apart from the examples, stacks, errors."""

import pytest
import torch

import regard
from regard.nn import InContextAttention, InContextStack


def test_heads_by_hand():
    torch.manual_seed(0)
    layer = InContextAttention(3, 2, 2, bias=True).double()
    query, z = torch.randn(2, 4, 3).double(), torch.randn(2, 5, 3).double()
    total = layer.o_proj.bias.expand(2, 4, 2)
    for head in range(2):
        part = slice(3 * head, 3 * head + 3)
        q, k, v = (
            (x @ to.weight[part].T + to.bias[part])
            for x, to in ((query, layer.q_proj), (z, layer.k_proj), (z, layer.v_proj))
        )
        total = total + (q @ k.transpose(1, 2) / 3**0.5).softmax(-1) @ v @ layer.o_proj.weight[:, part].T
    torch.testing.assert_close(layer(query, z), total)


def test_circuits_are_what_the_layer_computes():
    torch.manual_seed(1)
    layer = InContextAttention(4, 3).double()
    z, asked = torch.randn(2, 6, 4).double(), torch.randn(2, 1, 4).double()
    kq, ov = layer.circuits()
    weights = (torch.einsum("bli,hij,bqj->bhql", z, kq, asked) / 2).softmax(-1)
    torch.testing.assert_close(layer(asked, z), torch.einsum("bhql,bli,hio->bqo", weights, z, ov))
    (kq.sum() + ov.sum()).backward()
    assert all(p.grad.abs().sum() > 0 for p in layer.parameters())


def test_a_prompt_is_examples_and_question():
    layer = InContextAttention(4, 2)
    prompt = torch.randn(3, 8, 4)
    assert torch.equal(layer(prompt), layer(prompt[:, -1:], prompt[:, :-1]))
    order = torch.cat((torch.randperm(7), torch.tensor([7])))
    torch.testing.assert_close(layer(prompt[:, order]), layer(prompt))


def test_no_examples_give_nothing():
    layer = InContextAttention(3, 2)
    assert torch.equal(layer(torch.randn(2, 1, 3)), torch.zeros(2, 1, 1))


def test_stack_of_one_and_tied_layers():
    one = InContextStack(1, 4, 2, 2)
    prompt = torch.randn(2, 6, 4)
    assert torch.equal(one(prompt), one.layers[0](prompt[:, -1:], prompt[:, :-1]))
    tied, free = InContextStack(3, 4, 2, tied=True), InContextStack(3, 4, 2)
    assert tied.layers[0] is tied.layers[2] and free.layers[0] is not free.layers[2]
    assert len(list(tied.parameters())) == 5 and len(list(free.parameters())) == 13


def test_stack_sees_no_later_token_and_the_released_one_does():
    torch.manual_seed(2)
    x = torch.randn(1, 6, 4)
    other = x.clone()
    other[:, 4:] += 1
    for variant, alike in (("paper", True), ("released", False)):
        layer = InContextStack(2, 4, 2, variant=variant).layers[0]
        with torch.no_grad():
            for p in layer.parameters():
                p.normal_()
        early = [layer(given)[:, :4] for given in (x, other)]
        assert torch.allclose(*early, atol=1e-6) is alike


def test_stack_trains_and_takes_both_forms():
    stack = InContextStack(2, 4, 2)
    prompt = torch.randn(3, 7, 4)
    found = stack(prompt)
    assert found.shape == (3, 1, 1) and torch.equal(found, stack(prompt[:, -1:], prompt[:, :-1]))
    found.sum().backward()
    assert all(p.grad is not None for p in stack.parameters())


def test_released_state_dicts_load():
    stack = InContextStack(2, 4, 2)
    state = {f"attention_layers.{n}.{p}": v for n in range(2) for p, v in stack.layers[n].state_dict().items()}
    state |= {f"attention_layers.{n}.bias": torch.tensor(-1e9) for n in range(2)}
    other = InContextStack(2, 4, 2)
    regard.load_official(other, state | {"final_linear.weight": stack.out.weight})
    prompt = torch.randn(1, 5, 4)
    assert torch.equal(stack(prompt), other(prompt))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: InContextAttention(0, 2), "dim"),
        (lambda: InContextAttention(4, 0), "num_heads"),
        (lambda: InContextAttention(4, 3, init="opposite"), "num_heads"),
        (lambda: InContextAttention(4, 2, init="small"), "init"),
        (lambda: InContextAttention(4, 2)(torch.randn(2, 3, 5)), "query"),
        (lambda: InContextAttention(4, 2)(torch.randn(2, 1, 4), torch.randn(3, 5, 4)), "examples"),
        (lambda: InContextAttention(4, 2).set_pattern(torch.ones(3), torch.ones(2)), "omega"),
        (lambda: InContextAttention(4, 2, 2).set_pattern(torch.ones(2), torch.ones(2)), "out_dim"),
        (lambda: InContextStack(0, 4, 2), "depth"),
        (lambda: InContextStack(2, 4, 2, variant="both"), "variant"),
        (lambda: InContextStack(2, 4, 2)(torch.randn(2, 2, 4), torch.randn(2, 5, 4)), "query"),
        (lambda: InContextStack(2, 4, 2)(torch.randn(2, 3, 5)), "query"),
        (lambda: InContextStack(2, 4, 2)(torch.randn(2, 1, 4), torch.randn(2, 5, 3)), "examples"),
    ],
)
def test_errors(make, named):
    with pytest.raises(ValueError, match=rf"^{named}: "):
        make()
