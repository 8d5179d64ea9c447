"""LightningAttention: both released layers and the paper's, decoding, padding, dtypes, bad input."""

import pytest
import torch
import torch.nn.functional as F

import regard
from regard.nn.sequence.lightning_attention import LightningState, LinearizedRelativePosition, SimpleRMSNorm
from regard.ops.state import layer_log_decay

VARIANTS = ("released", "transnormer", "paper")


def layer_of(variant, **options):
    torch.manual_seed(0)
    return regard.nn.LightningAttention(24, 3, layer_idx=1, num_layers=4, variant=variant, **options).double()


def tokens(length=11, batch=2, dim=24):
    return torch.randn(batch, length, dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def close(got, want, tolerance=1e-11):
    return float((got - want).detach().abs().max()) <= tolerance * float(want.detach().abs().max())


@pytest.mark.parametrize("lrpe", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_decoding_and_pieces_equal_the_whole(variant, lrpe):
    layer, x = layer_of(variant, lrpe=lrpe, bias=True), tokens()
    whole, end = layer(x, return_state=True)
    state, outs, sizes = None, [], set()
    for start, stop in [(0, 4), (4, 7), *((t, t + 1) for t in range(7, 11))]:
        out, state = layer(x[:, start:stop], state=state, return_state=True)
        outs.append(out)
        sizes.add(state.nbytes)
    assert close(torch.cat(outs, 1), whole)
    assert close(state.memory.kv, end.memory.kv)
    assert len(sizes) == 1, "the state must not grow"
    assert state.position == end.position == 11
    for form in ("parallel", "recurrent"):
        assert close(layer(x, form=form), whole)


def test_the_paper_by_its_equations():
    layer, x = layer_of("paper"), tokens()
    q, k, v, u = (t.unflatten(-1, (3, 8)).transpose(1, 2) for t in (x @ layer.qkvu_proj.weight.T).chunk(4, -1))
    rate = torch.tensor([8 / 3, 16 / 3, 8.0], dtype=torch.float64) * (1 - 1 / 4)
    age = (torch.arange(11)[:, None] - torch.arange(11)).double()
    weight = torch.where(age >= 0, (-rate[:, None, None] * age).exp(), 0.0)
    mixed = ((F.silu(q) @ F.silu(k).transpose(-1, -2)) * weight @ v).transpose(1, 2).flatten(2)
    normed = mixed / (mixed.norm(dim=-1, keepdim=True) / 24**0.5)
    want = (normed * u.transpose(1, 2).flatten(2)) @ layer.o_proj.weight.T
    assert close(layer(x), want, 2e-3)  # the release adds 1e-6 inside the root, and decay rates are float32
    assert torch.allclose(layer.log_decay.double(), -rate)


def test_variants_differ_where_they_say():
    released, transnormer, paper = (layer_of(variant) for variant in VARIANTS)
    assert torch.equal(released.log_decay, layer_log_decay(3, 1, 4))
    assert torch.equal(transnormer.log_decay, released.log_decay)
    assert not torch.equal(paper.log_decay, released.log_decay)
    assert set(released.state_dict()) == {
        *(f"{name}_proj.weight" for name in "qkvo"), "norm.weight", "norm.bias", "output_gate.0.weight", "output_gate.1.weight",
    }  # fmt: skip
    assert set(transnormer.state_dict()) == {"qkvu_proj.weight", "o_proj.weight"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_causal_and_alone_in_its_batch(variant):
    layer, x = layer_of(variant, lrpe=True), tokens()
    y = layer(x)
    changed = x.clone()
    changed[0, 7:] += 1.0
    z = layer(changed)
    assert torch.equal(z[0, :7], y[0, :7]) and torch.equal(z[1], y[1])
    assert not torch.allclose(z[0, 7:], y[0, 7:])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("lrpe", [False, True])
def test_lengths_and_the_decoding_after_them(variant, lrpe):
    """Right-padded sequences go on as if they had been alone, each from its own position."""
    layer, x = layer_of(variant, lrpe=lrpe), tokens(batch=3)
    lengths = torch.tensor([11, 4, 0])
    y, state = layer(x, lengths=lengths, return_state=True)
    step = tokens(1, 3) * 0.5
    after, _ = layer(step, state=state, return_state=True)
    for b, n in enumerate(lengths):
        alone, own = layer(x[b : b + 1, :n], return_state=True)
        assert torch.allclose(y[b : b + 1, :n], alone, rtol=1e-10, atol=1e-12)
        assert torch.allclose(after[b : b + 1], layer(step[b : b + 1], state=own), rtol=1e-9, atol=1e-12)


def test_left_padding_by_mask():
    layer, x = layer_of("transnormer"), tokens()
    mask = torch.ones(2, 11)
    mask[0, :5] = 0
    y = layer(x, padding_mask=mask)
    assert close(y[:1, 5:], layer(x[:1, 5:]))
    assert close(y[1:], layer(x[1:]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_half_models_keep_their_decay_rates(variant, dtype):
    layer, x = layer_of(variant, lrpe=True), tokens(40)
    want = layer(x)
    half = layer.to(dtype)
    got, state = half(x.to(dtype), return_state=True)
    assert got.dtype == dtype and state.memory.kv.dtype == torch.float32
    assert half.log_decay.dtype == torch.float32
    assert torch.equal(half.log_decay, layer_log_decay(3, 1, 4, "paper" if variant == "paper" else "released"))
    assert float(((got.double() - want).norm() / want.norm()).detach()) < (5e-2 if dtype == torch.bfloat16 else 1e-2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_learns(variant):
    layer, x = layer_of(variant, lrpe=True, bias=True), tokens().requires_grad_()
    layer(x).square().sum().backward()
    for name, parameter in [("x", x), *layer.named_parameters()]:
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert torch.autograd.gradcheck(lambda x: layer(x), tokens(3, 1).requires_grad_())


def test_lengths_zero_and_one():
    layer = layer_of("released")
    assert layer(tokens(0)).shape == (2, 0, 24)
    one, state = layer(tokens(1), return_state=True)
    assert one.shape == (2, 1, 24) and state.position == 1
    again, same = layer(tokens(0), state=state, return_state=True)
    assert again.shape == (2, 0, 24) and torch.equal(same.memory.kv, state.memory.kv)


def test_authors_names_load():
    source, target = layer_of("transnormer"), layer_of("transnormer")
    target.o_proj.weight.data.zero_()
    theirs = {key.replace("o_proj", "out_proj"): value for key, value in source.state_dict().items()}
    regard.load_official(target, theirs)
    assert torch.equal(target(tokens()), source(tokens()))


def test_simple_rms_norm_and_lrpe():
    x = tokens()
    assert close(SimpleRMSNorm(24)(x), F.rms_norm(x, (24,), eps=1e-6))
    assert SimpleRMSNorm(24)(x.bfloat16()).dtype == torch.bfloat16
    lrpe = LinearizedRelativePosition(2, 4).double()
    q, k = (torch.randn(1, 2, 6, 4, dtype=torch.float64) for _ in range(2))
    scores = lrpe(q) @ lrpe(k).transpose(-1, -2)
    shifted = lrpe(q, 1000) @ lrpe(k, 1000).transpose(-1, -2)
    assert close(shifted, scores, 1e-9), "only the distance counts"
    distance = (torch.arange(6)[:, None] - torch.arange(6)).double()
    cosines = torch.cos(lrpe.theta[:, :, None] * distance[..., None])
    assert close(scores, (q[:, :, :, None] * k[:, :, None] * cosines).sum(-1), 1e-12)
    offsets = lrpe(q.repeat(2, 1, 1, 1), torch.tensor([0, 3]))
    assert torch.equal(offsets[0], lrpe(q)[0]) and torch.equal(offsets[1], lrpe(q, 3)[0])


BAD = {
    "dim": (lambda: regard.nn.LightningAttention(24, 5), ValueError, "dim: .*num_heads"),
    "hidden_dim": (lambda: regard.nn.LightningAttention(24, 3, hidden_dim=25), ValueError, "hidden_dim: .*num_heads"),
    "num_heads": (lambda: regard.nn.LightningAttention(24, 0), ValueError, "num_heads: "),
    "layer": (lambda: regard.nn.LightningAttention(24, 3, 12, 12), ValueError, "layer_idx: .*num_layers"),
    "variant": (lambda: layer_of("transnorm"), ValueError, "variant: .*transnormer"),
    "activation": (lambda: layer_of("released", activation="silo"), ValueError, "activation: .*silu"),
    "activation type": (lambda: layer_of("released", activation=3), TypeError, "activation: "),
    "norm": (lambda: layer_of("released", norm="rms"), ValueError, "norm: "),
    "x": (lambda: layer_of("released")(tokens(dim=20)), ValueError, r"x: .*\(B, N, 24\)"),
    "x dims": (lambda: layer_of("released")(tokens()[0]), ValueError, "x: .*3 dimensions"),
    "state": (lambda: layer_of("released")(tokens(), state=torch.zeros(1)), TypeError, "state: "),
    "mask": (lambda: layer_of("released")(tokens(), padding_mask=torch.ones(2, 10)), ValueError, "padding_mask: "),
    "both": (
        lambda: layer_of("released")(tokens(), padding_mask=torch.ones(2, 11), lengths=torch.tensor([1, 2])),
        ValueError,
        "padding_mask: .*lengths",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    call, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        call()


def test_state_of_another_layer_is_refused():
    _, state = layer_of("released")(tokens(), return_state=True)
    assert isinstance(state, LightningState)
    with pytest.raises(ValueError, match="state.kv"):
        layer_of("released", lrpe=True)(tokens(), state=state)
