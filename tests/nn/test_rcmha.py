"""RelativeConvAttention: scores by their index formula, limits in which it is plain attention, memory, decoding, loading, errors."""

from __future__ import annotations

import pytest
import torch

import regard
from regard.nn import RelativeConvAttention, SoftmaxAttention, relative_shift
from regard.nn.sequence import rcmha


def layer_of(dim=12, heads=3, filled=True, **options):
    torch.manual_seed(0)
    layer = RelativeConvAttention(dim, heads, **({"max_len": 24} | options)).double().eval()
    if filled:
        with torch.no_grad():
            for name in ("position_keys", "position_bias", "query_bias"):
                getattr(layer, name).normal_(std=0.5)
    return layer


def tokens(length=9, dim=12, batch=2, seed=1):
    return torch.randn(batch, length, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("length", "kv_len"), [(1, 1), (1, 5), (4, 4), (3, 7), (2, 2)])
def test_position_scores_by_index(length, kv_len):
    layer = layer_of()
    q = torch.randn(2, 3, length, 4, dtype=torch.float64)
    offset = kv_len - length
    got = layer.position_scores(q, kv_len, offset)
    assert got.shape == (2, 3, length, kv_len)
    for i in range(length):
        for j in range(kv_len):
            e = 24 - (offset + i - j)
            want = (q[:, :, i] * layer.position_keys[e]).sum(-1) + layer.position_bias[e]
            torch.testing.assert_close(got[:, :, i, j], want)


def test_shift_refuses_other_widths():
    with pytest.raises(ValueError, match="scores"):
        relative_shift(torch.zeros(3, 5), 4)


@pytest.mark.parametrize("causal", [True, False])
def test_plain_attention_without_positions_and_convolution(causal):
    layer, x = layer_of(filled=False, causal=causal), tokens()
    plain = SoftmaxAttention(12, 3, causal, bias=True).double()
    with torch.no_grad():
        for conv in layer.convs.values():
            conv.weight.zero_()
            conv.weight[:, :, -1] = 1
            conv.bias.zero_()
        for name in ("q", "k", "v", "o"):
            ours, theirs = getattr(layer, f"{name}_proj"), getattr(plain, f"{name}_proj")
            theirs.weight.copy_(ours.weight)
            theirs.bias.zero_() if ours.bias is None else theirs.bias.copy_(ours.bias)
    torch.testing.assert_close(layer(x), plain(x))
    bare = layer_of(filled=False, causal=causal, conv_on="")
    bare.load_state_dict({name: t for name, t in layer.state_dict().items() if not name.startswith("convs")})
    torch.testing.assert_close(bare(x), plain(x))


@pytest.mark.parametrize("conv_on", ["qkv", "kv", "q", ""])
@pytest.mark.parametrize("kernel", [1, 2, 5])
def test_decodes_and_sees_no_later_token(conv_on, kernel):
    layer, x = layer_of(conv_on=conv_on, kernel=kernel), tokens()
    whole, state, outs = layer(x), None, []
    for piece in x.split([1, 3, 1, 4], 1):
        y, state = layer(piece, state=state, return_state=True)
        outs.append(y)
    torch.testing.assert_close(torch.cat(outs, 1), whole)
    moved = torch.cat((x[:, :5], x[:, 5:] * 2), 1)
    torch.testing.assert_close(layer(moved)[:, :5], whole[:, :5])
    swapped = state.select(torch.tensor([1, 0]))
    y = layer(x[:, :1], state=state)
    torch.testing.assert_close(layer(x[:, :1].flip(0), state=swapped).flip(0), y)


def test_memory_stands_before_the_keys_and_values_alone():
    layer, x, memory = layer_of(conv_on="kv"), tokens(4), tokens(5, seed=2)
    torch.testing.assert_close(layer(x, memory), layer(torch.cat((memory, x), 1))[:, 5:])
    convolved = layer_of()
    got, whole = convolved(x, memory), convolved(torch.cat((memory, x), 1))[:, 5:]
    torch.testing.assert_close(got[:, 2:], whole[:, 2:])
    assert not torch.allclose(got[:, :2], whole[:, :2])


def test_rows_in_parts_are_the_rows_at_once(monkeypatch):
    layer, x = layer_of(), tokens(11)
    mask = torch.rand(2, 1, 11, 11, generator=torch.Generator().manual_seed(3)) < 0.6
    whole, masked = layer(x), layer.attend(x, x, x, mask)
    monkeypatch.setattr(rcmha, "ROWS", 4)
    torch.testing.assert_close(layer(x), whole)
    torch.testing.assert_close(layer.attend(x, x, x, mask), masked)


def test_a_row_that_sees_nothing_gives_the_output_bias():
    layer, x = layer_of(), tokens(3)
    mask = torch.ones(3, 3, dtype=torch.bool)
    mask[1] = False
    y = layer.attend(x, x, x, mask)
    torch.testing.assert_close(y[:, 1], layer.o_proj.bias.expand(2, -1))


def test_everything_learns():
    layer, x = layer_of(filled=False, dropout=0.1).train(), tokens()
    layer(x).square().sum().backward()
    for name, p in layer.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        assert p.grad.abs().sum() > 0, name


def test_longer_official_tables_give_their_middle():
    long, x = layer_of(max_len=32), tokens()
    short = layer_of(max_len=9)
    names = {"q_proj": "query.0.linear", "k_proj": "key.0.linear", "v_proj": "value.0.linear", "o_proj": "output"}
    names |= {f"convs.{n[0]}": f"{n}.1.conv" for n in ("query", "key", "value")}
    whole = {"position_keys": "key_pos_embeddings", "position_bias": "key_pos_bias", "query_bias": "query_pos_bias"}
    theirs = {}
    for name, tensor in long.state_dict().items():
        head, _, kind = name.rpartition(".")
        theirs[whole.get(name) or f"{names[head]}.{kind}"] = tensor
    regard.load_official(short, theirs)
    torch.testing.assert_close(short(x), long(x))
    regard.load_official(short, short.state_dict())


def test_bfloat16_and_its_table_is_used_up_to_the_end():
    layer = layer_of(max_len=6).bfloat16()
    assert layer(tokens(6).bfloat16()).isfinite().all()
    with pytest.raises(ValueError, match=r"at most max_len \(6\)"):
        layer(tokens(7).bfloat16())
    state = layer(tokens(6).bfloat16(), return_state=True)[1]
    with pytest.raises(ValueError, match="max_len"):
        layer(tokens(1).bfloat16(), state=state)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: RelativeConvAttention(10, 3), ValueError, "dim"),
        (lambda: RelativeConvAttention(12, 3, kernel=0), ValueError, "kernel"),
        (lambda: RelativeConvAttention(12, 3, conv_on="qx"), ValueError, "conv_on"),
        (lambda: RelativeConvAttention(12, 3, conv_on=3), TypeError, "conv_on"),
        (lambda: RelativeConvAttention(12, 3, max_len=0), ValueError, "max_len"),
        (lambda: layer_of()(tokens(dim=10)), ValueError, "x"),
        (lambda: layer_of()(tokens(), tokens(batch=1)), ValueError, "memory"),
        (lambda: layer_of()(tokens(), tokens(), return_state=True), ValueError, "memory"),
        (lambda: layer_of()(tokens(), state=3), TypeError, "state"),
        (lambda: layer_of(causal=False)(tokens(), return_state=True), ValueError, "causal"),
        (lambda: layer_of()(tokens(), state=layer_of()(tokens(batch=1), return_state=True)[1]), ValueError, "state"),
        (lambda: layer_of().attend(tokens(9), tokens(4), tokens(4)), ValueError, "query"),
        (lambda: layer_of().attend(tokens(3), tokens(4), tokens(5)), ValueError, "value"),
    ],
)
def test_bad_input(make, error, says):
    with pytest.raises(error, match=says):
        make()
