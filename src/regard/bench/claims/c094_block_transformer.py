"""094 Block Transformer: cheaper decoding through a cache of blocks, paid for with parameters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models import BlockTransformer
from ...nn import NeoXStack
from ...ops.growing_store import GrowingStore
from ..small_training import ByteText, train
from .claim import Outcome, Scale
from .timing import times

PAPER, SLUG = "094", "block-transformer"
SAYS = (
    "Block Transformer: with two to three times the parameters it has the loss of a vanilla transformer and decodes 10 to 20 times as "
    "fast; its cache is that of half the layers over a quarter of the positions."
)
VANILLA, BLOCKS = "vanilla", "blocks of 4"
BITS = "held-out bits per byte"


class _Vanilla(nn.Module):
    """The same GPT-NeoX layers as a plain language model."""

    def __init__(self, vocab_size: int, dim: int, layers: int, heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, dim)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.stack = NeoXStack(layers, dim, heads)
        self.head = nn.Linear(dim, vocab_size, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, ids: Tensor, stores: list[GrowingStore] | None = None) -> Tensor:
        return self.head(self.stack(self.embedding(ids), stores=stores))


def measure(scale: Scale) -> Outcome:
    batch, context, dim = scale.pick((16, 2048, 256), (2, 32, 32))
    length, steps = scale.pick(256, 32), scale.pick(200, 3)
    out = Outcome(
        f"decoding: {batch} sequences with {context} tokens in the cache, 6 + 6 layers of width {dim}; loss: byte LM, {length} bytes, "
        f"{steps} steps, tables not counted as parameters",
        "a quarter of the held-out texts, or a round",
    )
    _decoding(out, scale, batch, context, dim)
    _loss(out, scale, length, steps)
    return out


def _decoding(out: Outcome, scale: Scale, batch: int, context: int, dim: int) -> None:
    layers, heads = scale.pick(6, 1), 4
    torch.manual_seed(0)
    vanilla = _Vanilla(256, dim, 2 * layers, heads).eval()
    blocks = BlockTransformer(256, dim, layers, layers, heads, eos=None).eval()
    count = 8

    def filled(stack: NeoXStack, rows: int) -> list[GrowingStore]:
        stores = stack.new_stores(page=32)
        for store in stores:
            store.append(*torch.randn(2, batch, heads, rows, dim // heads))
        return stores

    plain_stores, block_stores = filled(vanilla.stack, context), filled(blocks.block_decoder, context // 4)
    cache = {VANILLA: plain_stores, BLOCKS: block_stores}
    vectors, ids = torch.randn(batch, dim), torch.zeros(batch, 1, dtype=torch.long)

    def by_token() -> None:
        token = ids
        for _ in range(count):
            token = vanilla(token, plain_stores)[:, -1:].argmax(-1)
        for store in plain_stores:
            store.drop_last(count)

    def by_block() -> None:
        state = vectors
        for _ in range(count // 4):
            made = blocks.token_decoder.decode(state, lambda logits: logits.argmax(-1), 4, None, 1)
            embeds = blocks.embed(made[:, None], torch.ones_like(made, dtype=torch.bool)[:, None])
            state = blocks.block_decoder(embeds, stores=block_stores)[:, -1]
        for store in block_stores:
            store.drop_last(count // 4)

    found = times({VANILLA: by_token, BLOCKS: by_block}, rounds=scale.pick(5, 1), inner=1)
    for label, values in found.items():
        base = None if label == VANILLA else VANILLA
        out.add(label, "time a token", "s", [value / count / batch for value in values], against=base)
        held = sum(2 * store.length * batch * dim * 4 for store in cache[label])
        out.add(label, "cache", "bytes", held, against=base)
        out.add(label, "cache as stored", "bytes", sum(store.nbytes for store in cache[label]), against=base)
    held_share = out.row(BLOCKS, "cache").ratio or 1.0
    out.check("cache of the block transformer, of that of as many vanilla layers", held_share, at_most=0.125, digits=3)
    speed = [1 / ratio for ratio in out.row(BLOCKS, "time a token").ratios or []]
    out.check(
        "speed of decoding, over that of as many vanilla layers",
        sum(speed) / len(speed),
        at_least=10.0,
        spread=(max(speed) - min(speed)) / 2,
        digits=1,
    )


def _loss(out: Outcome, scale: Scale, length: int, steps: int) -> None:
    text = ByteText()
    kept = text.held_out(scale.pick(64, 4), length)
    small, large = scale.pick((96, 2), (32, 1)), scale.pick((128, 3), (64, 1))
    plain, same, more = VANILLA + ", trained", BLOCKS + ", as many parameters", BLOCKS + ", 2.7 times the parameters"
    for label, (dim, layers) in ((plain, small), (same, small), (more, large)):
        torch.manual_seed(0)
        model = (
            _Vanilla(256, dim, 2 * layers, 4)
            if label == plain
            else BlockTransformer(256, dim, layers, layers, 4, eos=None)
        )
        draw = partial(text.batch, scale.pick(4, 2), length, torch.Generator().manual_seed(0))
        train(model.parameters(), partial(_step, model, draw), steps, lr=3e-3)
        model.eval()
        bits = [float(_mean_loss(model, part)) / 0.6931 for part in kept.chunk(4)]
        base = None if label == plain else plain
        out.add(label, BITS, "bits", bits, against=base)
        stacks = [m for m in model.modules() if isinstance(m, NeoXStack)]
        out.add(
            label, "parameters of the layers", "", sum(p.numel() for s in stacks for p in s.parameters()), against=base
        )
    row = out.row(more, BITS)
    out.check(
        f"bits per byte with {more[len(BLOCKS) + 2 :]}, over vanilla", row.ratio or 9.0, at_most=1.0, spread=row.spread
    )
    rate = out.row(same, BITS).ratio or float("nan")
    out.note = (
        f"With as many parameters bits per byte are {rate:.2f} times those of vanilla. The cache is filled with random numbers for the "
        "timing. So short a training says how fast each learns, not how far it gets; the paper trains on the Pile and times GPUs."
    )


def _step(model: nn.Module, draw: Callable[[], Tensor], step: int) -> Tensor:
    return _mean_loss(model, draw(), grad=True)


def _mean_loss(model: nn.Module, ids: Tensor, grad: bool = False) -> Tensor:
    """Nats a byte; the first block of 4 is left out of both, which the block transformer never predicts."""
    with torch.set_grad_enabled(grad):
        if isinstance(model, BlockTransformer):
            return model(ids, ids).loss
        logits = model(ids[:, :-1])
        return F.cross_entropy(logits[:, 3:].flatten(0, 1), ids[:, 4:].flatten())
