"""The landmark layer, its memory and the GPT: exact where everything is retrieved, stingy positions, piece sizes, training, errors."""

import pytest
import torch

import regard
from regard.models import LandmarkGPT
from regard.nn import LandmarkAttention, LandmarkCache
from regard.ops import insert_landmarks, landmark_attention


def gpt(**options):
    torch.manual_seed(0)
    model = LandmarkGPT(30, 24, 2, 3, **options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def text(length, batch=2, seed=0):
    return torch.randint(0, 29, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_one_piece_with_an_empty_memory_is_the_model_without():
    model, ids = gpt(), text(33)
    whole = insert_landmarks(ids, 29, 5)
    want = model(whole)[:, whole[0] != 29]
    torch.testing.assert_close(model(ids, cache=model.new_cache(block=5)), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sizes", [[4, 1, 9, 1, 1, 10], [12, 1, 13], [26]])
@torch.no_grad()
def test_with_every_block_retrieved_it_is_attention_over_everything(sizes):
    """`topk` above the number of blocks: positions are true ones, and pieces do not matter."""
    model, ids = gpt(), text(26)
    whole = insert_landmarks(ids, 29, 5)
    want = model(whole)[:, whole[0] != 29]
    for select in ("token_head", "heads", "tokens"):
        cache = model.new_cache(block=5, topk=9, select=select)
        got = torch.cat([model(piece, cache=cache) for piece in ids.split(sizes, dim=1)], 1)
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_exactly_topk_blocks_by_variant():
    model, ids = gpt(), text(16)
    whole = insert_landmarks(ids, 29, 5)
    want = model(whole)[:, whole[0] != 29][:, 10:]
    for variant, same in (("paper", True), ("released", False)):
        cache = model.new_cache(block=5, topk=2, variant=variant)
        model(ids[:, :10], cache=cache)
        got = model(ids[:, 10:], cache=cache)
        assert torch.allclose(got, want, rtol=1e-3, atol=1e-4) == same


@torch.no_grad()
def test_only_the_chosen_block_is_read():
    """One head, one query: the block with the best landmark key, at its stingy place, beside the begun block."""
    torch.manual_seed(1)
    layer = LandmarkAttention(8, 1).eval()
    cache = LandmarkCache(99, block=3, topk=1)
    x = torch.randn(1, 22, 8)
    ids = torch.arange(17)[None]
    first = cache.begin(ids[:, :16])
    layer(x[:, : first.shape[1]], first == 99, memory=cache.layer(0))
    last = cache.begin(ids[:, 16:])
    assert cache.start == 2 * 4 + 1 and last.shape == (1, 1) and cache.layer(0).blocks == 5
    got = layer(x[:, 21:], last == 99, memory=cache.layer(0))
    q, k, v = (part[:, None] for part in layer.c_attn(x).chunk(3, -1))

    def turn(y, at):
        i = torch.arange(4)
        angle = torch.as_tensor(at)[..., None] * 10 ** (-4.0 * 2 * i / 8)
        even, odd = y[..., 0::2], y[..., 1::2]
        return torch.stack(
            [even * angle.cos() - odd * angle.sin(), odd * angle.cos() + even * angle.sin()], -1
        ).flatten(-2)

    query = turn(q[0, 0, 21], torch.tensor(9))
    slots = torch.tensor([0, 0, 0, 0, 1])
    marks = turn(k[0, 0, 3:20:4], slots * 4 + 3)
    best = int((marks @ query).argmax())
    rows = torch.arange(4 * best, 4 * best + 4)
    at = torch.arange(4) + 4 * int(slots[best])
    keys = torch.cat([turn(k[0, 0, rows], at), turn(k[0, 0, 20:22], torch.tensor([8, 9]))])
    values = torch.cat([v[0, 0, rows], v[0, 0, 20:22]])
    mark = torch.tensor([[0, 0, 0, 1, 0, 0]]).bool()
    want = landmark_attention(query[None, None, None], keys[None, None], values[None, None], mark)
    torch.testing.assert_close(got, layer.c_proj(want[:, 0]), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_memory_is_bounded_offloaded_and_cleared():
    model, ids = gpt(), text(60)
    plain = model.new_cache(block=5, topk=2)
    away = model.new_cache(block=5, topk=2, offload="cpu")
    short = model.new_cache(block=5, topk=2, max_blocks=3)
    for piece in ids.split(13, dim=1):
        want = model(piece, cache=plain)
        torch.testing.assert_close(model(piece, cache=away), want)
        model(piece, cache=short)
    assert plain.layer(0).blocks == 12 and short.layer(1).blocks == 3 and short.layer(0).keys.shape == (2, 3, 3, 6, 8)
    plain.clear()
    fresh = model.new_cache(block=5, topk=2)
    assert torch.equal(model(ids[:, :7], cache=plain), model(ids[:, :7], cache=fresh))


def test_training_reaches_landmarks_and_everything_else():
    """A few steps on one batch: the loss falls, and all parameters have gradients."""
    torch.manual_seed(0)
    model = LandmarkGPT(12, 32, 2, 2, landmark_id=11, bias=True, group_dropout=0.1, position_jump=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = insert_landmarks(torch.randint(0, 11, (4, 20), generator=torch.Generator().manual_seed(0)), 11, 4)
    losses = []
    for _ in range(40):
        loss = torch.nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(bool((parameter.grad != 0).any()) for parameter in model.parameters())
    assert float(model.transformer["wte"].weight.grad[11].abs().sum()) > 0


def test_position_jumps_are_of_training_alone():
    model, ids = gpt(position_jump=50), insert_landmarks(text(20), 29, 5)
    assert torch.equal(model(ids), model(ids))
    torch.testing.assert_close(model(ids), model(ids, positions=torch.arange(ids.shape[1])))
    model.train()
    assert not torch.allclose(model(ids), model(ids))
    jumping = model._jumping(ids == 29)
    steps = jumping.diff(dim=1)
    assert (steps[:, (ids != 29)[0, :-1]] == 1).all() and (steps >= 1).all()


def test_official_keys():
    model = gpt()
    state = dict(model.state_dict()) | {"transformer.wpe.freqs": torch.ones(4)}
    state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
    del state["transformer.wte.weight"]
    other = LandmarkGPT(30, 24, 2, 3)
    regard.load_official(other, state)
    ids = text(9)
    assert torch.equal(other.eval()(ids), model(ids))


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: LandmarkCache(1, select="head"), "select: unknown name 'head'; did you mean heads"),
        (lambda: LandmarkCache(1, block=0), "block: got 0"),
        (lambda: LandmarkCache(1, topk=3, max_blocks=2), "max_blocks: got 2"),
        (lambda: LandmarkAttention(10, 3), r"dim: got 10, need a multiple of 2 \* 3 heads"),
        (lambda: LandmarkAttention(12, 3, group_dropout=1.0), r"group_dropout: got 1\.0"),
        (lambda: LandmarkGPT(30, 24, 2, 3, landmark_id=30), "landmark_id: got 30"),
        (lambda: gpt().train()(text(5), cache=LandmarkCache(29)), "cache: got 'a cache in training'"),
    ],
)
def test_bad_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()
