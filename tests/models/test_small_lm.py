"""The shell: every mixer of the registry runs, is causal where it says so, decodes to what it computes at once, and errors are clear."""

from __future__ import annotations

import pytest
import torch

from regard.models import SmallLM
from regard.nn.mixers import MIXERS, build_mixer, can_decode, decode_mixer, mixer_names, run_mixer, state_bytes

# In a causal layer these let the choice of keys depend on the whole batch of tokens, by their papers.
ROUTES_OVER_ALL = {"routing"}


@pytest.mark.parametrize("name", mixer_names(True))
def test_causal_mixers_do_not_look_ahead_and_train(name):
    torch.manual_seed(0)
    layer = build_mixer(name, 32, 4, causal=True, max_len=64)
    x = torch.randn(2, 40, 32, requires_grad=True)
    y, aux = run_mixer(layer, x)
    assert y.shape == x.shape and y.isfinite().all()
    (y.square().mean() + (0 if aux is None else aux)).backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0
    if name in ROUTES_OVER_ALL:
        return
    layer.eval()
    with torch.no_grad():
        changed = torch.cat((x[:, :25], torch.randn(2, 15, 32)), dim=1)
        torch.testing.assert_close(
            run_mixer(layer, x)[0][:, :25], run_mixer(layer, changed)[0][:, :25], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("name", mixer_names(False))
def test_full_mixers_see_later_tokens(name):
    torch.manual_seed(0)
    layer = build_mixer(name, 32, 4, causal=False, max_len=64).eval()
    x = torch.randn(1, 40, 32)
    with torch.no_grad():
        y, moved = run_mixer(layer, x)[0], run_mixer(layer, torch.cat((x[:, :30], torch.randn(1, 10, 32)), dim=1))[0]
    assert y.shape == x.shape and not torch.allclose(y[:, :30], moved[:, :30], atol=1e-6)


DECODING = [name for name in mixer_names(True) if can_decode(build_mixer(name, 32, 4, causal=True, max_len=64))]


@pytest.mark.parametrize("name", [name for name in DECODING if name not in ROUTES_OVER_ALL])
def test_decoding_equals_the_parallel_form(name):
    torch.manual_seed(0)
    layer = build_mixer(name, 32, 4, causal=True, max_len=64).eval()
    x = torch.randn(2, 37, 32)
    with torch.no_grad():
        whole, state, pieces = run_mixer(layer, x)[0], None, []
        for piece in x.split([20, 1, 1, 15], dim=1):
            y, state = decode_mixer(layer, piece, state)
            pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-5)
    assert state_bytes(state) > 0


def test_constant_memory_is_constant():
    for name in ("linear", "linear_decay", "lightning", "s4d", "sliding_window"):
        layer = build_mixer(name, 32, 4, causal=True, **({"window": 8} if name == "sliding_window" else {})).eval()
        with torch.no_grad():
            sizes = {state_bytes(decode_mixer(layer, torch.randn(1, length, 32))[1]) for length in (20, 60)}
        assert len(sizes) == 1, name


@pytest.mark.parametrize("mixer", ["softmax", "linear", ("lightning", "sliding_window"), "combiner"])
@pytest.mark.parametrize("positions", ["auto", "learned", "none"])
def test_generates_what_a_full_read_would(mixer, positions):
    torch.manual_seed(0)
    model = SmallLM(50, 32, 3, 4, mixer, positions=positions, max_len=40, short_conv=3)
    ids = torch.randint(50, (2, 9))
    made = model.generate(ids, 12)
    assert made.shape == (2, 21) and torch.equal(made[:, :9], ids) and model.training
    with torch.no_grad():
        expected = model.eval()(made[:, :-1])[:, 8:].argmax(-1)
    assert torch.equal(made[:, 9:], expected)
    drawn = [model.generate(ids, 5, temperature=1.0, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*drawn)


def test_state_in_pieces_and_its_size():
    torch.manual_seed(0)
    model = SmallLM(50, 32, 2, 4, "linear", short_conv=4).eval()
    ids = torch.randint(50, (2, 30))
    with torch.no_grad():
        whole = model(ids)
        first, state = model(ids[:, :13], return_state=True)
        second, state = model(ids[:, 13:], state, return_state=True)
    torch.testing.assert_close(torch.cat((first, second), dim=1), whole, rtol=1e-4, atol=1e-5)
    # per layer: (heads, 8, 8) and (heads, 8) of memory, and 3 tokens for the convolution, float32
    assert model.state_nbytes(100) == 2 * 4 * (4 * 8 * 8 + 4 * 8 + 3 * 32)
    assert SmallLM(50, 32, 2, 4, "combiner").state_nbytes(10) is None


def test_options_reach_the_mixers():
    model = SmallLM(9, 16, 4, 2, ("linear", "sliding_window"), mixer_options={"sliding_window": {"window": 5}})
    assert [type(b.mixer).__name__ for b in model.blocks] == ["LinearAttention", "SoftmaxAttention"] * 2
    assert model.blocks[1].mixer.window == 5 and model.blocks[0].mixer.rope_base == 10000.0
    assert SmallLM(9, 16, 2, 2, "softmax", positions="none").blocks[0].mixer.rope_base is None
    assert [b.mixer.window for b in SmallLM(9, 16, 1, 2, "sliding_window", mixer_options={"window": 3}).blocks] == [3]
    assert model.head.weight is model.embedding.weight
    assert SmallLM(9, 16, 2, 2, "routing")(torch.randint(9, (2, 32)), return_aux=True)[1] > 0


def test_vectors_in_and_out():
    model = SmallLM(None, 16, 2, 2, "softmax", in_dim=5, out_dim=1, causal=False)
    assert model(torch.randn(3, 7, 5)).shape == (3, 7, 1)
    with pytest.raises(ValueError, match="generate"):
        model.generate(torch.zeros(1, 1, dtype=torch.long), 1)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (dict(mixer="softmxa"), "did you mean softmax"),
        (dict(mixer="performer"), "causal"),
        (dict(mixer="lightning", positions="rope"), "rotary"),
        (dict(mixer="softmax", mixer_options={"widnow": 4}), "options"),
        (dict(mixer=("softmax", "linear"), mixer_options={"bias": True}), "mixer_options"),
        (dict(mixer=()), "mixer"),
        (dict(mixer="softmax", causal=False, short_conv=3), "short_conv"),
        (dict(mixer="softmax", positions="polar"), "positions"),
        (dict(mixer="softmax", in_dim=3), "in_dim"),
    ],
)
def test_bad_arguments(given, says):
    with pytest.raises(ValueError, match=says):
        SmallLM(10, 16, 2, 2, **given)


def test_bad_input():
    model = SmallLM(10, 16, 2, 2, "linear", positions="learned", max_len=8)
    with pytest.raises(ValueError, match="max_len"):
        model(torch.zeros(1, 9, dtype=torch.long))
    with pytest.raises(TypeError, match="state"):
        model(torch.zeros(1, 2, dtype=torch.long), state=3)
    with pytest.raises(ValueError, match="ids"):
        model(torch.zeros(1, 2))
    _, state = SmallLM(10, 16, 3, 2, "linear")(torch.zeros(1, 2, dtype=torch.long), return_state=True)
    with pytest.raises(ValueError, match="3 layers"):
        model(torch.zeros(1, 2, dtype=torch.long), state)
    with pytest.raises(ValueError, match="state"):
        decode_mixer(build_mixer("combiner", 16, 2), torch.randn(1, 3, 16))


def test_every_line_of_the_registry_names_a_class():
    for kind in MIXERS.values():
        assert isinstance(kind.layer, type) and (kind.causal or kind.full)
