"""The softmax in two levels: its definition in a loop, plain attention without landmarks, gradients, dropout of groups, errors."""

import pytest
import torch

from regard.ops import attention, insert_landmarks, landmark_attention, landmark_weights, masks


def example(length=23, batch=2, heads=4, kv_heads=2, dim=8, dtype=torch.float64, every=5):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, h, length, dim, generator=g, dtype=dtype) for h in (heads, kv_heads, kv_heads))
    is_landmark = torch.zeros(batch, length, dtype=torch.bool)
    is_landmark[0, every - 1 :: every] = True
    is_landmark[1, [place for place in (0, 7, 8, 15) if place < length]] = True
    return q, k, v, is_landmark


def in_words(scores, landmark):
    """One row of weights by the definition; scores of visible keys only."""
    block = [sum(landmark[:j]) for j in range(len(scores))]
    last = max(block)
    own = [j for j in range(len(scores)) if block[j] == last and not landmark[j]]
    marks = [j for j in range(len(scores)) if block[j] < last and landmark[j]]
    weights, first = torch.zeros_like(scores), torch.tensor(own + marks)
    if len(first) == 0:
        return weights
    share = dict(zip(first.tolist(), scores[first].softmax(0)))
    for j in own:
        weights[j] = share[j]
    for g in marks:
        inside = torch.tensor([j for j in range(len(scores)) if block[j] == block[g] and not landmark[j]])
        if len(inside):
            weights[inside] = share[g] * scores[inside].softmax(0)
    return weights


def test_weights_by_their_definition():
    q, k, _, is_landmark = example()
    scores = q @ k.repeat_interleave(2, 1).transpose(-1, -2)
    scores = scores.masked_fill(torch.ones(23, 23).triu(1).bool(), -torch.inf)
    weights = landmark_weights(scores, is_landmark)
    for b in range(2):
        for row in range(23):
            want = in_words(scores[b, 1, row, : row + 1], is_landmark[b, : row + 1].tolist())
            torch.testing.assert_close(weights[b, 1, row, : row + 1], want)
    assert (weights[0].sum(-1) - 1).abs().max() < 1e-12
    assert (weights.masked_select(is_landmark[:, None, None]) == 0).all()


def test_without_landmarks_it_is_causal_attention():
    q, k, v, _ = example()
    none = torch.zeros(2, 23, dtype=torch.bool)
    torch.testing.assert_close(landmark_attention(q, k, v, none), attention(q, k, v, mask=masks.causal))
    own = torch.zeros(2, 23, dtype=torch.bool)
    own[:, -1] = True  # the landmark of the own block is never attended to, not even by itself
    got = landmark_attention(q, k, v, own)
    torch.testing.assert_close(got[:, :, :-1], attention(q, k, v, mask=masks.causal)[:, :, :-1])
    torch.testing.assert_close(got[:, :, -1:], attention(q[:, :, -1:], k[:, :, :-1], v[:, :, :-1]))


def test_one_block_of_equal_keys_is_read_as_one():
    """Ordinary keys like their landmark and equal scores: a block counts once, however many tokens it has."""
    scores = torch.zeros(1, 1, 1, 9)
    is_landmark = torch.tensor([[0, 0, 1, 0, 0, 0, 1, 0, 0]]).bool()
    want = torch.tensor([0.125, 0.125, 0, 1 / 12, 1 / 12, 1 / 12, 0, 0.25, 0.25])
    torch.testing.assert_close(landmark_weights(scores, is_landmark)[0, 0, 0], want)


def test_hundreds_of_landmarks():
    """No limit on groups, which the release has. Blocks of one token: the landmark's key stands for it, but for the own block's."""
    q, k, v, is_landmark = example(600, every=2)
    is_landmark[1] = is_landmark[0]
    keys = torch.cat([k[:, :, 1:598:2], k[:, :, 598:599]], 2)
    values = torch.cat([v[:, :, 0:598:2], v[:, :, 598:599]], 2)
    want = attention(q[:, :, -1:], keys, values)
    torch.testing.assert_close(landmark_attention(q, k, v, is_landmark)[:, :, -1:], want)


def test_padding_offset_pieces_and_empty_rows(monkeypatch):
    q, k, v, is_landmark = example()
    whole = landmark_attention(q, k, v, is_landmark)
    torch.testing.assert_close(landmark_attention(q[:, :, -3:], k, v, is_landmark), whole[:, :, -3:])
    keep = torch.ones(2, 1, 1, 23, dtype=torch.bool)
    keep[0, ..., :6] = False
    padded = landmark_attention(q, k, v, is_landmark, mask=keep)
    alone = landmark_attention(q[:1, :, 6:], k[:1, :, 6:], v[:1, :, 6:], is_landmark[:1, 6:])
    torch.testing.assert_close(padded[:1, :, 6:], alone)
    assert (padded[0, :, :6] == 0).all()
    torch.testing.assert_close(padded[1], whole[1])
    monkeypatch.setattr("regard.ops.landmark._SCORES", 2 * 4 * 23 * 5)
    with torch.no_grad():
        torch.testing.assert_close(landmark_attention(q, k, v, is_landmark, mask=keep), padded)


def test_gradients():
    q, k, v, is_landmark = example(11, batch=2, heads=2, kv_heads=1, dim=4, every=3)
    is_landmark[1] = torch.tensor([0, 0, 1, 1, 0, 0, 0, 1, 0, 0, 0]).bool()
    leaves = tuple(x.requires_grad_() for x in (q, k, v))
    assert torch.autograd.gradcheck(lambda *x: landmark_attention(*x, is_landmark), leaves)
    keep = torch.ones(2, 1, 1, 11, dtype=torch.bool)
    keep[0, ..., :4] = False  # empty rows
    landmark_attention(*leaves, is_landmark, mask=keep).sum().backward()
    assert all(bool(x.grad.isfinite().all()) for x in leaves)


def test_group_dropout_leaves_the_own_block_alone():
    q, k, _, is_landmark = example()
    scores = (q @ k.repeat_interleave(2, 1).transpose(-1, -2)).masked_fill(
        torch.ones(23, 23).triu(1).bool(), -torch.inf
    )
    plain = landmark_weights(scores, is_landmark)
    torch.manual_seed(0)
    drawn = torch.stack([landmark_weights(scores, is_landmark, 0.3) for _ in range(400)])
    assert torch.equal(drawn[:, 0, :, 22, 20:], plain[None, 0, :, 22, 20:].expand(400, -1, -1))
    ratio = drawn[:, 0, 0, 22, :4].sum(-1) / plain[0, 0, 22, :4].sum()
    assert set(ratio.mul(7).round().int().tolist()) == {0, 10}  # dropped whole, or 1 / 0.7
    torch.testing.assert_close(drawn.mean(0), plain, rtol=0.0, atol=0.06)


def test_half_precision():
    q, k, v, is_landmark = example(dtype=torch.float32)
    want = landmark_attention(q, k, v, is_landmark)
    got = landmark_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), is_landmark)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.05)


def test_insert_landmarks():
    ids = torch.arange(7)[None]
    assert insert_landmarks(ids, 99, 3).tolist() == [[0, 1, 2, 99, 3, 4, 5, 99, 6]]
    assert insert_landmarks(ids[:, :2], 99, 3, filled=1).tolist() == [[0, 1, 99]]
    assert insert_landmarks(ids[:, :0], 99, 3).shape == (1, 0)
    pieces, filled = [], 0
    for piece in ids.split([1, 3, 3], dim=1):
        pieces.append(insert_landmarks(piece, 99, 3, filled))
        filled = (filled + piece.shape[1]) % 3
    assert torch.equal(torch.cat(pieces, 1), insert_landmarks(ids, 99, 3))
    with pytest.raises(ValueError, match="filled: got 3, need less than every, 3"):
        insert_landmarks(ids, 99, 3, filled=3)


def test_bad_input():
    q, k, v, is_landmark = example()
    with pytest.raises(TypeError, match="is_landmark: got"):
        landmark_attention(q, k, v, is_landmark.long())
    with pytest.raises(ValueError, match=r"is_landmark: got 'shape \(2, 22\)', need \(B, M\) = \(2, 23\)"):
        landmark_attention(q, k, v, is_landmark[:, 1:])
    with pytest.raises(ValueError, match=r"group_dropout: got 1\.0"):
        landmark_attention(q, k, v, is_landmark, group_dropout=1.0)
    with pytest.raises(ValueError, match="k: got '3 kv heads'"):
        landmark_attention(q, torch.cat([k, k[:, :1]], 1), v, is_landmark)
