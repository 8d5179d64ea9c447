"""Titans layers: nothing looks ahead, decoding equals reading at once, limits that are plain attention, gradients, errors."""

from __future__ import annotations

import pytest
import torch

from regard.models import TitansLM
from regard.nn import ChunkedNeuralMemory, NeuralMemory, TitansMAC, TitansMAG, TitansMAL, state_bytes

SMALL = {"depth": 2, "chunk_size": 4, "persistent": 3}
KINDS = {
    "mac": lambda **o: TitansMAC(8, 2, **{"segment": 5, "rope_base": 100.0, **SMALL, **o}),
    "mag": lambda **o: TitansMAG(8, 2, **{"window": 5, "rope_base": 100.0, **SMALL, **o}),
    "mal": lambda **o: TitansMAL(8, 2, **{"window": 5, "rope_base": 100.0, **SMALL, **o}),
    "lmm": lambda **o: NeuralMemory(8, 2, **{"depth": 2, "chunk_size": 4, **o}),
}


def make(kind, seed=0, **options):
    """Every parameter random, so that none hides behind a zero."""
    torch.manual_seed(seed)
    layer = KINDS[kind](**options).double().eval()
    with torch.no_grad():
        for one in layer.parameters():
            one.add_(0.3 * torch.randn_like(one))
    return layer


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", [[1] * 13, [5, 8], [3, 0, 9, 1], [7, 1, 5]])
def test_decoding_is_reading_at_once(kind, split, residual):
    layer, x = make(kind, residual=residual), torch.randn(2, 13, 8, dtype=torch.float64)
    whole, state, made = layer(x), None, []
    for piece in x.split(split, dim=1):
        y, state = layer(piece, state=state, return_state=True)
        made.append(y)
    torch.testing.assert_close(torch.cat(made, dim=1), whole, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_sees_the_past_and_none_the_future(kind):
    layer = make(kind)
    x = torch.randn(1, 12, 8, dtype=torch.float64)
    with torch.no_grad():
        base = layer(x)
        for place in (1, 4, 7):  # within and at the ends of segments and windows of 5 and chunks of 4
            moved = x.clone()
            moved[:, place] += 1.0
            changed = (layer(moved) - base).abs().amax(dim=(0, 2)) > 1e-9
            assert not changed[:place].any() and changed[place:].all()


@pytest.mark.parametrize("kind", ["mac", "mag", "mal"])
def test_the_state_does_not_grow(kind):
    layer, x = make(kind), torch.randn(1, 60, 8, dtype=torch.float64)
    sizes = {state_bytes(layer(x[:, :n], return_state=True)[1]) for n in (20, 40, 60)}
    assert len(sizes) == 1


def test_mac_recalls_only_what_earlier_segments_stored():
    """What is recalled comes from the memory as the segment began: the first segment's from the learned weights alone."""
    layer, x = make("mac"), torch.randn(1, 5, 8, dtype=torch.float64)
    _, state = layer(x, return_state=True)
    h = layer.memory.recall(x, layer.memory.start(1).memory)
    _, k, v = layer._project(h, 0)
    torch.testing.assert_close(state.recalled[0], k)
    torch.testing.assert_close(state.recalled[1], v)


def test_windows_are_what_attention_sees():
    """With no gradient steps the memory is a fixed function of the last `conv` tokens, and older ones are out of sight."""
    layer = make("mag", persistent=2)
    with torch.no_grad():
        layer.memory.scalar_proj.weight.zero_()
        layer.memory.scalar_proj.bias.fill_(-1e9)
        x = torch.randn(1, 12, 8, dtype=torch.float64)
        moved = x.clone()
        moved[:, 3] += 1.0
        changed = (layer(moved) - layer(x)).abs().amax(dim=(0, 2)) > 1e-9
    assert changed.tolist() == [3 <= place < 3 + 5 for place in range(12)]


def test_chunk_and_recurrent_forms_of_the_layer_agree():
    fast, slow = make("lmm"), make("lmm", form="recurrent")
    slow.load_state_dict(fast.state_dict())
    x = torch.randn(2, 11, 8, dtype=torch.float64)
    torch.testing.assert_close(fast(x), slow(x), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_all_parameters_learn_and_batch_mates_do_not_matter(kind):
    layer, x = make(kind, residual=True), torch.randn(3, 11, 8, dtype=torch.float64)
    y = layer(x)
    y.square().sum().backward()
    for name, one in layer.named_parameters():
        assert one.grad is not None and one.grad.abs().sum() > 0, name
    torch.testing.assert_close(layer(x[1:2]), y[1:2], rtol=1e-9, atol=1e-10)


def test_a_state_can_be_cut_off_and_reordered():
    layer, x = make("lmm"), torch.randn(2, 6, 8, dtype=torch.float64)
    _, state = layer(x, return_state=True)
    assert state.memory.weights[0].requires_grad and not state.detach().memory.weights[0].requires_grad
    rows = torch.tensor([1, 0])
    a, _ = layer(x[:, :2], state=state, return_state=True)
    b, _ = layer(x[rows, :2], state=state.select(rows), return_state=True)
    torch.testing.assert_close(a[rows], b)


@pytest.mark.parametrize("architecture", ["mac", "mag", "mal", "lmm"])
def test_language_model_trains_and_generates(architecture):
    torch.manual_seed(0)
    own = {"mac": {"segment": 8}, "mag": {"window": 8}, "mal": {"window": 8}, "lmm": {}}[architecture]
    model = TitansLM(11, 16, 2, 2, architecture=architecture, chunk_size=4, mlp_ratio=2, **own)
    ids = torch.randint(11, (2, 20))
    model(ids).logsumexp(-1).sum().backward()
    assert model.decodes
    made = model.generate(ids, 5)
    with torch.no_grad():
        again = model.eval()(made[:, :-1]).argmax(-1)[:, 19:]
    assert torch.equal(made[:, 20:], again)


def test_errors_name_the_argument():
    x = torch.zeros(1, 3, 8)
    cases = [
        ("dim", lambda: TitansMAC(9, 2)),
        ("segment", lambda: TitansMAC(8, 2, segment=0)),
        ("window", lambda: TitansMAG(8, 2, window=0)),
        ("head_dim", lambda: TitansMAL(6, 2, rope_base=10.0)),
        ("persistent", lambda: TitansMAG(8, 2, persistent=-1)),
        ("start", lambda: NeuralMemory(8, 2, start=(0.0, 0.5, 0.5))),
        ("max_step", lambda: NeuralMemory(8, 2, max_step=0.0)),
        ("activation", lambda: NeuralMemory(8, 2, activation="none")),
        ("x", lambda: TitansMAC(8, 2)(x[..., :4])),
        ("state", lambda: NeuralMemory(8, 2)(x, state=3)),
        ("state", lambda: TitansMAG(8, 2)(x, state=3)),
        ("architecture", lambda: TitansLM(9, 8, architecture="max")),
    ]
    for name, call in cases:
        with pytest.raises((ValueError, TypeError), match=f"^{name}"):
            call()
    layer = make("mag")
    _, state = layer(torch.zeros(2, 3, 8, dtype=torch.float64), return_state=True)
    with pytest.raises(ValueError, match="^state"):
        layer(torch.zeros(1, 3, 8, dtype=torch.float64), state=state)


def chunked(variant="paper", **options):
    torch.manual_seed(4)
    layer = ChunkedNeuralMemory(8, 2, **{"chunk_size": 3, "depth": 2, "variant": variant, **options}).double().eval()
    with torch.no_grad():
        for one in layer.parameters():
            one.add_(0.3 * torch.randn_like(one))
    return layer


@pytest.mark.parametrize("batch_size", [None, 3, 6])
def test_chunked_memory_read_in_pieces(batch_size):
    layer, x = chunked(batch_size=batch_size), torch.randn(2, 14, 8, dtype=torch.float64)
    mask = torch.rand(2, 14) < 0.7
    whole = layer(x, store_mask=mask)
    torch.testing.assert_close(chunked("released", batch_size=batch_size)(x, store_mask=mask), whole)
    state, made = None, []
    for piece, own in zip(x.split([4, 1, 1, 6, 0, 2], dim=1), mask.split([4, 1, 1, 6, 0, 2], dim=1)):
        y, state = layer(piece, store_mask=own, state=state, return_state=True)
        made.append(y)
    torch.testing.assert_close(torch.cat(made, dim=1), whole, rtol=1e-9, atol=1e-10)
    assert state.waiting.shape[1] == 14 % 3 and state.memory.position == 12


def test_chunked_memory_sees_whole_chunks_only():
    layer, x = chunked(), torch.randn(1, 12, 8, dtype=torch.float64)
    with torch.no_grad():
        moved = x.clone()
        moved[:, 4] += 1.0  # in the chunk of tokens 3, 4, 5
        changed = (layer(moved) - layer(x)).abs().amax(dim=(0, 2)) > 1e-9
    assert changed.tolist() == [place in (4,) or place >= 5 for place in range(12)]


def test_chunked_memory_with_nothing_stored_reads_what_it_began_with():
    layer, x = chunked(momentum=False), torch.randn(1, 9, 8, dtype=torch.float64)
    with torch.no_grad():
        layer.forget_proj.weight.zero_()
        layer.forget_proj.bias.fill_(-1e9)
        alone = torch.cat([layer(token) for token in x.split(1, dim=1)], dim=1)  # one token ends no chunk
        torch.testing.assert_close(layer(x, store_mask=torch.zeros(1, 9)), alone)
        assert not torch.allclose(layer(x), alone)


def test_errors_of_the_chunked_memory_name_the_argument():
    x = torch.zeros(1, 3, 8)
    cases = [
        ("dim", lambda: ChunkedNeuralMemory(8, 3)),
        ("head_dim", lambda: ChunkedNeuralMemory(8, 1, head_dim=4)),
        ("batch_size", lambda: ChunkedNeuralMemory(8, chunk_size=4, batch_size=6)),
        ("variant", lambda: ChunkedNeuralMemory(8, variant="official")),
        ("store_mask", lambda: ChunkedNeuralMemory(8)(x, store_mask=torch.ones(1, 2))),
        ("state", lambda: ChunkedNeuralMemory(8)(x, state=())),
    ]
    for name, call in cases:
        with pytest.raises((ValueError, TypeError), match=f"^{name}"):
            call()
