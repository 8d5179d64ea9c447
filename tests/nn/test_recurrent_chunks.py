"""RAT: equal to its definition and to its own decoding, at every length and split; limits of the chunk size; errors."""

from __future__ import annotations

import pytest
import torch

from regard.models import RATLM
from regard.nn import GatedRecurrence, RATAttention, rotate, state_bytes
from regard.ops import ChunkRecurrentState, attention, chunk_recurrent_attention, masks


def turning(x, number):
    """Rotary positions with tables in float64: those of `rotary_table` are float32, and turn a length a little."""
    dims = x.shape[-1]
    angles = number[..., None].double() / 50.0 ** (torch.arange(0, dims, 2, dtype=torch.float64) / dims)
    return rotate(x, tuple(torch.cat([f(angles)] * 2, dim=-1) for f in (torch.cos, torch.sin)))


def definition(q, k, v, gate, size, turn=lambda x, c: x):
    """Token by token and item by item."""
    length, dim = q.shape[2:]
    ends, held, out = [], None, []
    for t in range(length):
        g, one = gate[:, :, t], t % size == 0
        now = [(1 - g) * x[:, :, t] if one else g * h + (1 - g) * x[:, :, t] for x, h in zip((k, v), held or (0, 0))]
        held = now
        seen = [*ends, (turn(now[0], torch.tensor(t // size)), now[1])]
        keys, values = (torch.stack(s, dim=2) for s in zip(*seen))
        scores = (turn(q[:, :, t], torch.tensor(t // size))[:, :, None] * keys).sum(-1) * dim**-0.5
        out.append((scores.softmax(-1)[..., None] * values).sum(2))
        if t % size == size - 1:
            ends.append(seen[-1])
    return torch.stack(out, dim=2)


def make(length, dim=4, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    q, k, v, gate = torch.randn(4, 2, 3, length, dim, dtype=dtype)
    return q, k, v, gate.sigmoid()


@pytest.mark.parametrize("size", [1, 2, 4, 5, 30])
@pytest.mark.parametrize("length", [1, 4, 5, 13, 20])
def test_op_is_its_definition(length, size):
    given = make(length)
    out = chunk_recurrent_attention(*given, size)
    torch.testing.assert_close(out, definition(*given, size), rtol=1e-9, atol=1e-9)
    out = chunk_recurrent_attention(*given, size, rotate=turning)
    torch.testing.assert_close(out, definition(*given, size, turning), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("split", [[14], [1] * 14, [5, 9], [4, 0, 10], [3, 1, 2, 8], [8, 1, 5]])
def test_state_continues_anywhere(split):
    given = make(14)
    whole = chunk_recurrent_attention(*given, 4, rotate=turning)
    state, made, start = None, [], 0
    for count in split:
        piece = [t[:, :, start : start + count] for t in given]
        out, state = chunk_recurrent_attention(*piece, 4, rotate=turning, state=state, return_state=True)
        made.append(out)
        start += count
    torch.testing.assert_close(torch.cat(made, dim=2), whole, rtol=1e-9, atol=1e-9)
    assert state.position == 14 and state.k.shape == (2, 3, 3, 4) and state.nbytes == state_bytes(state) == 8 * 24 * 8
    rows = torch.tensor([1, 1, 0])
    picked = state.select(rows)
    assert torch.equal(picked.k, state.k[rows]) and torch.equal(picked.last_v, state.last_v[rows])


def test_long_chunks_are_scanned_in_rounds():
    given = make(150, dtype=torch.float32)
    out = chunk_recurrent_attention(*given, 70)
    torch.testing.assert_close(out, definition(*given, 70), rtol=1e-4, atol=1e-5)


def test_chunks_of_one_are_attention_and_one_chunk_is_a_recurrence():
    q, k, v, gate = make(12)
    ones = chunk_recurrent_attention(q, k, v, gate, 1)
    torch.testing.assert_close(ones, attention(q, (1 - gate) * k, (1 - gate) * v, mask=masks.causal))
    h, made = torch.zeros(2, 3, 4, dtype=torch.float64), []
    for t in range(12):
        h = gate[:, :, t] * h + (1 - gate[:, :, t]) * v[:, :, t]
        made.append(h)
    torch.testing.assert_close(chunk_recurrent_attention(q, k, v, gate, 12), torch.stack(made, dim=2))


def test_one_chunk_is_the_gated_recurrence():
    torch.manual_seed(0)
    rat, rnn = RATAttention(12, 3, chunk_size=40, rope_base=None), GatedRecurrence(12, max_len=40)
    state = rat.state_dict()
    rnn.load_state_dict(state | {"in_proj.weight": state["in_proj.weight"][:36]})
    x = torch.randn(2, 30, 12)
    torch.testing.assert_close(rat(x), rnn(x))
    whole, state, made = rnn(x), None, []
    for piece in x.split([7, 1, 0, 1, 21], dim=1):
        y, state = rnn(piece, state=state, return_state=True)
        made.append(y)
    torch.testing.assert_close(torch.cat(made, 1), whole)
    assert state.h.shape == (2, 12) and torch.equal(state.select(torch.tensor([1])).h, state.h[1:])


def test_gradients():
    torch.manual_seed(0)
    given = [t.requires_grad_() for t in torch.rand(4, 1, 2, 7, 2, dtype=torch.float64).unbind()]
    assert torch.autograd.gradcheck(lambda *t: chunk_recurrent_attention(*t, 3, rotate=turning), given)
    later = [t[:, :, 4:] for t in given]
    _, state = chunk_recurrent_attention(*(t[:, :, :4] for t in given), 3, return_state=True)
    out = chunk_recurrent_attention(*later, 3, state=state)
    assert all(grad[:, :, :3].abs().sum() > 0 for grad in torch.autograd.grad(out.sum(), given[1:]))


def test_nothing_later_is_seen():
    given = make(11)
    out = chunk_recurrent_attention(*given, 4)
    changed = [t.clone() for t in given]
    for t in changed:
        t[:, :, 6:] = 0.5
    assert torch.equal(chunk_recurrent_attention(*changed, 4)[:, :, :6], out[:, :, :6])


def test_half_types_and_empty_input():
    torch.manual_seed(0)
    layer = RATAttention(16, 4, chunk_size=4)
    x = torch.randn(1, 21, 16)
    whole = layer(x)
    half = layer.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16 and (half.float() - whole).abs().max() < 0.05 * whole.abs().max()
    empty, state = layer(x[:, :0].bfloat16(), return_state=True)
    assert empty.shape == (1, 0, 16) and state.position == 0


def test_chrono_initialisation():
    torch.manual_seed(0)
    bias = RATAttention(512, 8, chunk_size=16).gate_bias.detach().exp()
    assert bias.min() >= 1 and bias.max() <= 15.001 and abs(float(bias.mean()) - 8) < 0.7
    assert (RATAttention(8, 2, chunk_size=1).gate_bias == 0).all()


def test_model_reads_on_and_generates():
    torch.manual_seed(0)
    model = RATLM(20, 16, 4, 2, pattern=("rat", "local", "attention", "recurrence"), chunk_size=3, window=4).eval()
    assert model.decodes
    ids = torch.randint(20, (2, 17))
    whole = model(ids)
    first, state = model(ids[:, :8], return_state=True)
    made = [first]
    for t in range(8, 17):
        logits, state = model(ids[:, t : t + 1], state, return_state=True)
        made.append(logits)
    torch.testing.assert_close(torch.cat(made, 1), whole, rtol=1e-4, atol=1e-5)
    assert state.mixers[0].k.shape[2] == 5 and state.mixers[1].k.shape[2] == 4
    new = model.generate(ids[:, :5], 6)
    for t in range(5, 11):
        assert torch.equal(model(new[:, :t])[:, -1].argmax(-1), new[:, t])


def test_bad_arguments():
    q, k, v, gate = make(6)
    for say, given in {"k: ": (q, k[:, :2], v, gate), "gate": (q, k, v, gate[..., :2])}.items():
        with pytest.raises(ValueError, match=say):
            chunk_recurrent_attention(*given, 2)
    with pytest.raises(ValueError, match="chunk_size"):
        chunk_recurrent_attention(q, k, v, gate, 0)
    state = chunk_recurrent_attention(q, k, v, gate, 2, return_state=True)[1]
    assert isinstance(state, ChunkRecurrentState)
    with pytest.raises(ValueError, match="state: .*chunks of 4"):
        chunk_recurrent_attention(q, k, v, gate, 4, state=state)
    with pytest.raises(ValueError, match="state"):
        chunk_recurrent_attention(*(t[:1] for t in (q, k, v, gate)), 2, state=state)
    with pytest.raises(TypeError, match="state"):
        chunk_recurrent_attention(q, k, v, gate, 2, state=3)
    for options, say in (
        ({"num_heads": 5}, "dim"),
        ({"num_heads": 4, "num_groups": 3}, "num_groups"),
        ({"num_heads": 12}, "head_dim"),
        ({"num_heads": 4, "chunk_size": 0}, "chunk_size"),
        ({"num_heads": 4, "rope_base": 0.0}, "rope_base"),
    ):
        with pytest.raises(ValueError, match=say):
            RATAttention(12, **options)
    for layer in (RATAttention(12, 2), GatedRecurrence(12)):
        with pytest.raises(ValueError, match="x: "):
            layer(torch.randn(1, 3, 10))
        with pytest.raises(TypeError, match="state"):
            layer(torch.randn(1, 3, 12), state=3)
    for options, say in (
        ({"pattern": "rat"}, "pattern"),
        ({"pattern": ("rats",)}, "pattern"),
        ({"mixer": 1}, "option"),
    ):
        with pytest.raises(ValueError, match=say):
            RATLM(10, 8, 1, 2, **options)
