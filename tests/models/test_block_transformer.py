"""Block Transformer beyond its recorded numbers: who depends on whom, generation, padding, uptraining, what is refused."""

import pytest
import torch
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, RobertaConfig, RobertaModel

from regard.models import BlockTransformer, block_transformer, left_pad_to_block
from regard.nn import NeoXStack, T5Decoder

VOCAB = 19
STRATEGIES = ("prefix", "summation", "cross")


def small(strategy="prefix", **options):
    torch.manual_seed(0)
    sizes = {"dim": 24, "block_layers": 2, "token_layers": 2, "num_heads": 2, "rotary": 0.5}
    if strategy == "cross":
        options.setdefault("t5", {"head_dim": 8})
    model = BlockTransformer(VOCAB, strategy=strategy, **(sizes | options))
    for name, p in model.named_parameters():
        if p.dim() > 1 and "embedding" not in name:
            p.data *= 3
    return model.eval()


def tokens(*shape, seed=0):
    return torch.randint(2, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_token_is_told_by_earlier_blocks_and_earlier_tokens_of_its_own(strategy):
    model = small(strategy)
    ids = tokens(1, 4, 4)
    logits = model(ids).logits
    assert logits.shape == (1, 3, 4, VOCAB)
    for block, place in ((0, 0), (1, 2), (2, 3), (3, 0)):
        changed = ids.clone()
        changed[0, block, place] = (changed[0, block, place] - 1) % (VOCAB - 2) + 2
        differs = (model(changed).logits - logits).abs().amax(-1)[0] > 1e-6
        expected = torch.zeros(3, 4, dtype=torch.bool)
        if block > 0:
            expected[block - 1, place + 1 :] = True
        expected[block:] = True
        assert torch.equal(differs, expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("block", [1, 3, 4])
def test_generation_is_the_argmax_of_teacher_forcing(strategy, block):
    model = small(strategy, block=block, eos=None)
    for length in (1, 4, 6):
        prompt = tokens(2, length, seed=length)
        made = model.generate(prompt, 9)
        assert made.shape == (2, length + 9) and torch.equal(made[:, :length], prompt)
        whole, _ = left_pad_to_block(prompt, block, model.pad)
        sequence = torch.cat([whole.flatten(1), made[:, length:]], 1)
        missing = -sequence.shape[1] % block
        padded = torch.cat([sequence, sequence[:, :1].expand(-1, missing)], 1)
        mask = torch.ones_like(padded)
        mask[:, : whole[0].numel() - length] = 0
        forced = (
            model(padded.unflatten(1, (-1, block)), mask=mask.unflatten(1, (-1, block))).logits.argmax(-1).flatten(1)
        )
        start = whole[0].numel() - block
        assert torch.equal(forced[:, start : start + 9], made[:, length:])


def test_prompts_of_different_lengths_do_not_disturb_each_other():
    model = small(eos=None)
    prompts = [tokens(1, n, seed=n) for n in (2, 5, 14)]
    width = max(p.shape[1] for p in prompts)
    ids = torch.cat([nn.functional.pad(p, (width - p.shape[1], 0), value=model.pad) for p in prompts])
    mask = torch.cat([nn.functional.pad(torch.ones_like(p), (width - p.shape[1], 0)) for p in prompts])
    together = model.generate(ids, 10, mask=mask)
    for row, prompt in enumerate(prompts):
        assert torch.equal(model.generate(prompt, 10)[0, prompt.shape[1] :], together[row, width:])


def test_rows_end_by_themselves_and_all_stop_with_the_last():
    model = small(eos=None)
    prompts = tokens(3, 6)
    free = model.generate(prompts, 12)[:, 6:]
    eos = int(free[0, 5])
    model.eos = eos
    made = model.generate(prompts, 12)[:, 6:]
    assert made.shape[1] <= 12
    longest = 0
    for row in range(3):
        ends = (free[row] == eos).nonzero()
        stop = int(ends[0]) + 1 if len(ends) else 12
        longest = max(longest, stop)
        assert torch.equal(made[row, :stop], free[row, :stop])
        assert (made[row, stop:] == model.pad).all()
    assert made.shape[1] == longest


def test_the_cache_holds_one_entry_a_block():
    model = small(eos=None)
    vectors, state = model.prefill(tokens(2, 40))
    assert vectors.shape == (2, 24) and [store.length for store in state.stores] == [10, 10]
    model.next_block(tokens(2, 4), state)
    assert [store.length for store in state.stores] == [11, 11]
    # two layers of keys and values, one page of 32 blocks, 2 rows, 24 channels, float32
    assert state.nbytes == 2 * 2 * 32 * 2 * 24 * 4


def test_sampling_is_repeatable():
    model = small(eos=None)

    def draw(seed):
        return model.generate(tokens(2, 5), 8, do_sample=True, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(3), draw(3)) and not torch.equal(draw(3), draw(4))
    assert torch.equal(model.generate(tokens(2, 5), 0), tokens(2, 5))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_loss_is_the_mean_over_real_tokens_of_later_blocks(strategy):
    model = small(strategy)
    ids, mask = tokens(2, 3, 4), torch.ones(2, 3, 4)
    ids[1, 2, 1:], mask[1, 2, 1:] = model.pad, 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 1, 0] = -100
    logits = model(ids, mask=mask).logits.log_softmax(-1)
    wanted = labels[:, 1:]
    kept = wanted != -100
    expected = -logits.gather(-1, wanted.clamp(min=0)[..., None])[..., 0][kept].mean()
    torch.testing.assert_close(model(ids, labels, mask).loss, expected)
    assert kept.sum() == 8 + 5 - 1


def test_flat_input_is_padded_on_the_left():
    model = small()
    ids = tokens(2, 10)
    blocks, real = left_pad_to_block(ids, 4, model.pad)
    torch.testing.assert_close(model(ids).logits, model(blocks, mask=real).logits)
    torch.testing.assert_close(model(ids, ids).loss, model(blocks, blocks, real).loss)
    assert not real[:, 0, :2].any() and real[:, 0, 2:].all()


def test_random_padding_shows_every_alignment():
    ids = torch.arange(2, 12).expand(64, 10)
    blocks, real = left_pad_to_block(ids, 4, 1, random=True, generator=torch.Generator().manual_seed(0))
    assert blocks.shape == (64, 4, 4)
    assert torch.equal(blocks[real].view(64, 10), ids) and (blocks[~real] == 1).all()
    assert set(real.flatten(1).int().argmax(1).tolist()) == {0, 1, 2, 3}
    model = small().train()
    out = model(ids, ids, random_padding=True)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_padding_blocks_are_not_predicted_and_disturb_nobody():
    model = small(block_loss="contrastive", auto_encoding=True)
    ids = tokens(1, 4, 4)
    wide = torch.cat([torch.full((1, 1, 4), model.pad), ids, torch.full((1, 1, 4), model.pad)], 1)
    mask = torch.zeros_like(wide)
    mask[:, 1:5] = 1
    logits = model(wide, mask=mask).logits
    assert (logits[:, 0] == 0).all() and (logits[:, 4] == 0).all()
    # rotary angles are relative, so three blocks further on they say the same
    torch.testing.assert_close(logits[:, 1:4], model(ids).logits, rtol=1e-4, atol=1e-5)
    plain, padded = model(ids, ids), model(wide, wide, mask)
    for name in ("loss", "token_loss", "block_loss", "auto_encoding_loss"):
        torch.testing.assert_close(getattr(plain, name), getattr(padded, name), rtol=1e-4, atol=1e-5)


def test_blocks_of_one_token_make_a_language_model():
    model = small(block=1, prefix=1, eos=None)
    ids = tokens(1, 6)
    logits = model(ids).logits[:, :, 0]
    for place in range(1, 6):
        cut = model(ids[:, : place + 1]).logits[:, place - 1, 0]
        torch.testing.assert_close(logits[:, place - 1], cut, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["partition", "skip", "duplicate"])
def test_uptraining_starts_from_the_vanilla_layers(method):
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=24, max_position_embeddings=64
    )  # fmt: skip
    vanilla = GPTNeoXForCausalLM(config).eval()
    before = {name: t.clone() for name, t in vanilla.state_dict().items()}
    model = BlockTransformer.from_vanilla(vanilla, block=4, method=method, prefix=3)
    counts = {"partition": (2, 2), "skip": (2, 2), "duplicate": (4, 4)}[method]
    assert (len(model.block_decoder.layers), len(model.token_decoder.stack.layers)) == counts
    ids = tokens(2, 3, 4)
    embeds = model.embed(ids, torch.ones_like(ids))
    torch.testing.assert_close(embeds, vanilla.gpt_neox.embed_in(ids).mean(2))
    torch.testing.assert_close(model.token_decoder.expand(embeds[:, 0]), embeds[:, :1].expand(-1, 3, -1))
    model(ids, ids).loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    assert all(torch.equal(t, before[name]) for name, t in vanilla.state_dict().items())


def test_neox_layers_are_those_of_transformers():
    torch.manual_seed(0)
    for parallel in (True, False):
        config = GPTNeoXConfig(
            vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40,
            use_parallel_residual=parallel, max_position_embeddings=64,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
        )  # fmt: skip
        theirs = GPTNeoXForCausalLM(config).gpt_neox.eval()
        ours = NeoXStack(3, 32, 4, 40, 0.5, 500.0, parallel).eval()
        state = {k: v for k, v in theirs.state_dict().items() if not k.startswith("embed_in") and "rotary" not in k}
        ours.load_state_dict(state)
        x = torch.randn(2, 7, 32)
        with torch.no_grad():
            expected = theirs(inputs_embeds=x).last_hidden_state
            torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5)
            stores = ours.new_stores()
            pieces = [ours(x[:, a:b], stores=stores) for a, b in ((0, 3), (3, 4), (4, 7))]
            torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=1e-5, atol=1e-5)


def test_t5_layers_decode_as_they_train():
    torch.manual_seed(0)
    stack = T5Decoder(2, 16, 2, 8, buckets=4, max_distance=6).eval()
    x, context = torch.randn(2, 9, 16), stack.read(torch.randn(2, 3, 16))
    with torch.no_grad():
        whole, stores = stack(x, context), stack.new_stores()
        steps = torch.cat([stack(x[:, i : i + 1], context, stores) for i in range(9)], 1)
    torch.testing.assert_close(steps, whole, rtol=1e-5, atol=1e-6)


def test_any_module_may_embed_blocks():
    config = RobertaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        pad_token_id=1,
    )

    class Encoder(nn.Module):
        """The authors' "cls" form in small: the first vectors of an encoder, side by side."""

        def __init__(self):
            super().__init__()
            self.encoder, self.out = RobertaModel(config, add_pooling_layer=False), nn.Linear(32, 24)

        def forward(self, ids, mask):
            ids, mask = nn.functional.pad(ids, (2, 0), value=0), nn.functional.pad(mask.long(), (2, 0), value=1)
            return self.out(self.encoder(ids, attention_mask=mask).last_hidden_state[:, :2].flatten(1))

    model = small(embedder=Encoder(), eos=None)
    prompt = tokens(2, 7)
    assert model.generate(prompt, 5).shape == (2, 12)
    assert model(prompt, prompt).loss.isfinite()


def test_published_sizes():
    with torch.device("meta"):
        model = block_transformer("85m")
    tables = {"embedder.table.weight", "token_decoder.embedding.weight", "token_decoder.head.weight"}
    count = sum(p.numel() for name, p in model.named_parameters() if name not in tables)
    assert 84e6 < count < 88e6
    assert model.token_decoder.count == 2 and model.embedder.table.embedding_dim == 192


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: small(strategy="add"), "strategy"),
        (lambda: small(block=5), "dim"),
        (lambda: small(pad=VOCAB), "pad"),
        (lambda: small(block_loss="l1"), "block_loss"),
        (lambda: small(embedder="roberta"), "embedder"),
        (lambda: small(t5={"head_dim": 4}), "t5"),
        (lambda: small(num_heads=5), "num_heads"),
        (lambda: small(rotary=0.25, num_heads=4), "rotary"),
        (lambda: small()(torch.zeros(1, 2, 3, dtype=torch.long)), "ids"),
        (lambda: small()(torch.zeros(1, 0, dtype=torch.long)), "ids"),
        (lambda: small()(torch.zeros(1, 8)), "ids"),
        (lambda: small()(tokens(1, 8), labels=tokens(1, 7)), "labels"),
        (lambda: small().generate(tokens(1, 8), 2, mask=torch.tensor([[1] * 7 + [0]])), "mask"),
        (lambda: small().generate(tokens(1, 8), 2, variant="old"), "variant"),
        (lambda: BlockTransformer.from_vanilla(nn.Linear(2, 2)), "vanilla"),
        (lambda: block_transformer("2b"), "size"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_one_block_alone_predicts_nothing():
    model = small()
    ids = tokens(2, 3)
    assert model(ids).logits.shape == (2, 0, 4, VOCAB)
    out = model(ids, ids)
    assert out.loss == 0
    out.loss.backward()


def test_shared_tables_may_have_been_saved_once():
    model = small("cross", t5={"head_dim": 8, "tied": True})
    state = model.state_dict()
    given = {
        "token_decoder.lm_head.weight" if name == "token_decoder.head.weight" else name: t
        for name, t in state.items()
        if name != "token_decoder.embedding.weight"
    }
    renamed = BlockTransformer.official_keys(given)
    assert set(renamed) == set(state)
    assert torch.equal(renamed["token_decoder.embedding.weight"], state["token_decoder.embedding.weight"])


def test_half_precision():
    for strategy in STRATEGIES:
        model = small(strategy, eos=None)
        ids = tokens(2, 12)
        whole, half = model(ids).logits, model.bfloat16()(ids).logits
        assert half.dtype == torch.bfloat16
        assert (half - whole).abs().max() < 0.15 * whole.abs().max()
        assert model.generate(ids, 5).shape == (2, 17)
