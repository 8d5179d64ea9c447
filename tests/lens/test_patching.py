"""Patching: against full forwards with hooks of the test's own, and the identities that effects must obey."""

import pytest
import torch

import regard
from regard.integrations.anatomy import blocks, head_slices
from regard.lens import (
    AnswerCorrect,
    AnswerLogProb,
    AnswerProbability,
    AnswerRank,
    LabelLoss,
    LabelMargin,
    LogitDifference,
    Patcher,
    direct_effects,
    logit_attribution,
    path_effects,
    total_effects,
)
from tiny import tiny_llama


def sharpened(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() == 2 else 1)
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    return GPT2LMHeadModel(GPT2Config(vocab_size=128, n_positions=64, n_embd=32, n_layer=3, n_head=4))


def neox():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(2)
    sizes = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    return GPTNeoXForCausalLM(GPTNeoXConfig(intermediate_size=48, max_position_embeddings=64, **sizes))


def qwen3():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(3)
    sizes = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    return Qwen3ForCausalLM(Qwen3Config(intermediate_size=48, num_key_value_heads=2, head_dim=8, **sizes))


FAMILIES = {"llama": tiny_llama, "gpt2": gpt2, "neox": neox, "qwen3": qwen3}


@pytest.fixture(scope="module")
def models():
    return {name: sharpened(make()) for name, make in FAMILIES.items()}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, models):
    return models[request.param]


@pytest.fixture(scope="module")
def pair():
    clean = torch.randint(1, 128, (3, 9), generator=torch.Generator().manual_seed(4))
    corrupted = clean.clone()
    corrupted[:, [2, 5]] = torch.randint(1, 128, (3, 2), generator=torch.Generator().manual_seed(5))
    return clean, corrupted


METRIC = LogitDifference(torch.tensor([3, 5, 7]), torch.tensor([11, 2, 60]))
ROWS = torch.arange(3)


def logits_of(model, ids):
    with torch.no_grad():
        return model(ids).logits[:, -1].float()


def heads_replaced(model, ids, changes):
    """A forward of the test's own: {layer: function of the head outputs (B, T, H, D)} at the output projection."""
    handles = []
    for block in blocks(model):
        fn = changes.get(block.layer)
        if fn is not None:
            out = head_slices(block.attention, 4, 2 if hasattr(block.attention, "k_proj") else 4, 8)["o"].name

            def hook(module, args, fn=fn):
                z = args[0]
                return (fn(z.unflatten(-1, (4, 8)).clone()).flatten(-2).reshape(z.shape), *args[1:])

            handles.append(getattr(block.attention, out).register_forward_pre_hook(hook))
    try:
        return logits_of(model, ids)
    finally:
        for handle in handles:
            handle.remove()


def outputs(model, ids):
    kept = {}

    def keep(layer):
        def fn(z):
            kept[layer] = z.clone()
            return z

        return fn

    heads_replaced(model, ids, {layer: keep(layer) for layer in range(3)})
    return kept


@pytest.mark.parametrize("position", [None, -1, -4])
def test_total_effects_are_those_of_full_forwards(model, pair, position):
    clean, corrupted = pair
    theirs = outputs(model, corrupted)
    found = total_effects(model, clean, corrupted, METRIC, position=position, tokens=90)
    at = slice(None) if position is None else position
    low, high = METRIC(logits_of(model, clean), ROWS).mean(), METRIC(logits_of(model, corrupted), ROWS).mean()
    wanted = torch.zeros(3, 4)
    for layer in range(3):
        for head in range(4):

            def fn(z, layer=layer, head=head):
                z[:, at, head] = theirs[layer][:, at, head]
                return z

            said = METRIC(heads_replaced(model, clean, {layer: fn}), ROWS).mean()
            wanted[layer, head] = (said - low) / (high - low)
    torch.testing.assert_close(found.scores.float(), wanted, rtol=1e-3, atol=1e-4)
    assert found.runs.shape == (3, 3, 4) and found.info["base"] == pytest.approx(float(low), rel=1e-4)


def test_path_effects_to_the_logits_hold_all_other_heads(model, pair):
    clean, corrupted = pair
    mine, theirs = outputs(model, clean), outputs(model, corrupted)
    found = path_effects(model, clean, corrupted, METRIC, relative="none")
    low = METRIC(logits_of(model, clean), ROWS).mean()
    for layer, head in ((0, 1), (1, 3), (2, 0)):

        def fn(z, at, layer=layer, head=head):
            z[:, -1] = mine[at][:, -1]
            if at == layer:
                z[:, -1, head] = theirs[at][:, -1, head]
            return z

        changes = {at: lambda z, at=at: fn(z, at) for at in range(3)}
        said = METRIC(heads_replaced(model, clean, changes), ROWS).mean() - low
        assert found[layer, head] == pytest.approx(float(said), rel=1e-3, abs=1e-4)


def test_patching_a_prompt_into_itself_changes_nothing(model, pair):
    clean, _ = pair
    for function in (total_effects, path_effects, direct_effects):
        found = function(model, clean, clean, METRIC, relative="none")
        assert found.scores.abs().max() < 1e-4
        with pytest.raises(ValueError, match="relative"):
            function(model, clean, clean, METRIC)


def test_effects_of_the_last_block_are_direct(model, pair):
    """Nothing comes after the last layer's parts, so total, path and direct effect of what they write last are one."""
    total = {of: total_effects(model, *pair, METRIC, of=of, position=-1) for of in ("head", "mlp", "attn")}
    direct = {of: direct_effects(model, *pair, METRIC, of=of, norm="recomputed") for of in total}
    torch.testing.assert_close(total["mlp"].scores[-1], direct["mlp"].scores[-1], rtol=1e-3, atol=1e-4)
    path = path_effects(model, *pair, METRIC, freeze_mlps=True)
    torch.testing.assert_close(path.scores, direct["head"].scores, rtol=1e-3, atol=1e-4)
    own = path_effects(model, *pair, METRIC)
    torch.testing.assert_close(own.scores[-1], total["head"].scores[-1], rtol=1e-3, atol=1e-4)


def test_whole_streams_and_modules(model, pair):
    clean, corrupted = pair
    stream = total_effects(model, clean, corrupted, METRIC, of="resid")
    assert stream.scores.shape == (3, 9)
    assert stream.scores[:, :2].abs().max() < 1e-4  # the prompts are the same up to there
    last = total_effects(model, clean, corrupted, METRIC, of="resid", position=-1)
    torch.testing.assert_close(last.scores[:, 0], stream.scores[:, -1], rtol=1e-3, atol=1e-4)
    first = total_effects(model, clean, corrupted, METRIC, of="resid", position=[2, 5])
    assert first[0, 0] == pytest.approx(1.0, rel=1e-4)  # all that differs enters at the first block
    back = total_effects(model, clean, corrupted, METRIC, of="resid", position=[2, 5], direction="restore")
    assert back[0, 0] == pytest.approx(1.0, rel=1e-4)
    both = total_effects(model, clean, corrupted, METRIC, of="attn")
    assert both.scores.shape == (3, 1) and both.scores.abs().max() > 1e-3


@pytest.mark.parametrize("component", ["q", "k", "v", "z"])
def test_receivers(model, pair, component):
    at = -4 if component in "kv" else -1
    found = path_effects(model, *pair, METRIC, [(2, 1), (1, 2)], component=component, position=at, relative="none")
    assert found.scores[2].abs().max() == 0 and found.scores[0].abs().max() > 1e-4
    assert found[1, 2] == 0  # a receiver is no sender
    wide = path_effects(
        model, *pair, METRIC, [(2, 1), (1, 2)], component=component, position=at, relative="none", truncate=False
    )
    torch.testing.assert_close(wide.scores, found.scores)
    deep = [
        path_effects(
            model, *pair, METRIC, [(2, 1), (0, 2)], component=component, position=at, relative="none", truncate=t
        ).scores
        for t in (True, False)
    ]
    assert deep[0][1].abs().max() == 0 < deep[1][1].abs().max()


def test_a_stream_that_receives_everything_is_the_path_to_the_logits(model, pair):
    own = path_effects(model, *pair, METRIC, relative="none")
    same = path_effects(model, *pair, METRIC, [3], relative="none")
    torch.testing.assert_close(own.scores, same.scores)
    by_block = path_effects(model, *pair, METRIC, [2], relative="none")  # past block 2, heads there included
    free = total_effects(model, *pair, METRIC, position=-1, relative="none")
    torch.testing.assert_close(by_block.scores[1], free.scores[1], rtol=1e-3, atol=1e-4)
    assert by_block.scores[2].abs().max() == 0


def test_shares_of_the_logits_add_up(model, pair):
    clean, _ = pair
    found = logit_attribution(model, clean, METRIC.right, METRIC.wrong)
    assert found.total == pytest.approx(float(METRIC(logits_of(model, clean), ROWS).mean()), rel=1e-4)
    parts = found.heads.scores.sum() + found.mlps.scores.sum() + found.embedding + found.rest
    assert float(parts) == pytest.approx(found.total, rel=1e-4, abs=1e-4)
    assert sum(found.parts().values()) == pytest.approx(found.total, rel=1e-4, abs=1e-4)
    many = logit_attribution(model, clean, METRIC.right, torch.arange(6).expand(3, -1))
    labels = LabelMargin(METRIC.right, torch.arange(6))
    assert many.total == pytest.approx(float(labels(logits_of(model, clean), ROWS).mean()), rel=1e-3)


def test_left_padding_and_batch_mates_do_not_matter(models, pair):
    model = models["gpt2"]  # with learned positions
    clean, corrupted = pair
    alone = [
        total_effects(model, clean[i : i + 1], corrupted[i : i + 1], lambda x, _, i=i: x[:, 3 + i], relative="none")
        for i in range(3)
    ]
    pad = torch.zeros(3, 2, dtype=torch.long)
    mask = torch.cat([pad, torch.ones_like(clean)], 1)
    padded = [{"input_ids": torch.cat([pad + 9, ids], 1), "attention_mask": mask} for ids in pair]
    together = total_effects(model, *padded, lambda x, rows: x.gather(1, 3 + rows[:, None])[:, 0], relative="none")
    for i in range(3):
        torch.testing.assert_close(together.runs[i], alone[i].scores, rtol=1e-3, atol=1e-4)
    last = total_effects(model, *padded, METRIC, position=-1)
    torch.testing.assert_close(
        last.scores, total_effects(model, *pair, METRIC, position=-1).scores, rtol=1e-3, atol=1e-4
    )


def test_goes_on_where_it_stopped(models, pair, tmp_path):
    model, path = models["llama"], tmp_path / "effects.safetensors"
    calls = []

    def metric(logits, rows):
        calls.append(len(rows))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return METRIC(logits, rows)

    with pytest.raises(KeyboardInterrupt):
        total_effects(model, *pair, metric, out=path, tokens=60)
    stopped = len(calls)
    found = total_effects(model, *pair, metric, out=path, tokens=60)
    whole = total_effects(model, *pair, METRIC, tokens=60)
    torch.testing.assert_close(found.scores, whole.scores)
    before = len(calls)
    total_effects(model, *pair, metric, out=path, tokens=60)
    assert len(calls) == before  # everything is there
    assert 5 == stopped < before
    with pytest.raises(ValueError, match="this very measurement"):
        total_effects(model, *pair, metric, out=path, position=-1)
    total_effects(model, *pair, metric, out=path, position=-1, resume=False)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match="whole file"):
        total_effects(model, *pair, metric, out=path, position=-1)


def test_the_model_is_left_as_it_was(models, pair):
    model = models["llama"]
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    total_effects(model, *pair, METRIC, nodes=[(2, 1)])
    assert model.training and not model._forward_hooks
    model.eval()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert regard.integrations.transformers.session_of(model) is None
    some = total_effects(model, *pair, METRIC, nodes=[(2, 1), (0, 3)])
    assert some.scores.isnan().sum() == 10
    full = total_effects(model, *pair, METRIC, keep="cpu")
    assert some[2, 1] == pytest.approx(full[2, 1], rel=1e-3, abs=1e-5)


def test_metrics():
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0], [5.0, 1.0, 1.0, 1.0]])
    rows, right = torch.arange(2), torch.tensor([2, 2])
    assert LogitDifference(right, torch.tensor([1, 0]))(logits, rows).tolist() == [-1.0, -4.0]
    assert AnswerRank(right)(logits, rows).tolist() == [1.0, 3.0]  # ties count against it
    assert AnswerRank(right, torch.tensor([0, 2]))(logits, rows).tolist() == [0.0, 1.0]
    assert AnswerCorrect(right, torch.tensor([[0, 2], [2, 3]]))(logits, rows).tolist() == [1.0, 0.0]
    assert LabelMargin(right, torch.tensor([0, 1, 2]))(logits, rows)[0] == 0.0
    p = AnswerProbability(right)(logits, rows)
    torch.testing.assert_close(p.log(), AnswerLogProb(right)(logits, rows))
    torch.testing.assert_close(LabelLoss(right, torch.arange(4))(logits, rows), -p.log())
    assert LogitDifference(right, torch.tensor([1, 0]))(logits[:1], torch.tensor([1])).tolist() == [1.0]
    with pytest.raises(ValueError, match="right"):
        LogitDifference(torch.tensor([1.0]), right)


@pytest.mark.parametrize(
    ("function", "options", "words"),
    [
        (total_effects, {"nodes": [(3, 0)]}, "nodes"),
        (total_effects, {"nodes": [(0, 4)]}, "nodes"),
        (total_effects, {"position": 9}, "positions"),
        (total_effects, {"of": "neuron"}, "of"),
        (total_effects, {"direction": "up"}, "direction"),
        (path_effects, {"receivers": [(3, 0)]}, "receivers"),
        (path_effects, {"receivers": [(0, 4)]}, "receivers"),
        (path_effects, {"receivers": [5]}, "receivers"),
        (path_effects, {"receivers": []}, "receivers"),
        (path_effects, {"receivers": "everything"}, "receivers"),
        (path_effects, {"component": "o"}, "component"),
        (path_effects, {"position": 0}, "position"),
        (direct_effects, {"norm": "none"}, "norm"),
        (total_effects, {"relative": "clean"}, "relative"),
    ],
)
def test_bad_settings(models, pair, function, options, words):
    with pytest.raises(ValueError, match=words):
        function(models["llama"], *pair, METRIC, **options)


def test_bad_pairs(models, pair):
    model, (clean, corrupted) = models["llama"], pair
    with pytest.raises(ValueError, match="same length"):
        total_effects(model, clean, corrupted[:, 1:], METRIC)
    right = {"input_ids": clean, "attention_mask": torch.ones_like(clean).index_fill_(1, torch.tensor([8]), 0)}
    with pytest.raises(ValueError, match="left"):
        total_effects(model, right, right, METRIC)
    left = {"input_ids": clean, "attention_mask": torch.ones_like(clean).index_fill_(1, torch.tensor([0]), 0)}
    with pytest.raises(ValueError, match="padded alike"):
        Patcher(model, left, corrupted)
    with pytest.raises(ValueError, match="metric"):
        total_effects(model, clean, corrupted, lambda x, rows: x)
    with pytest.raises(ValueError, match="right"):
        logit_attribution(model, clean, METRIC.right[:2])


def test_models_whose_parts_do_not_add_up():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {
        "vocab_size": 128,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(intermediate_size=48, head_dim=8, **sizes)).eval()
    ids = torch.randint(1, 128, (2, 2, 7))
    metric = LogitDifference(torch.tensor([1, 2]), torch.tensor([3, 4]))
    found = total_effects(
        model, ids[0], ids[1], metric, position=-1
    )  # its cache is no plain one: all positions are computed
    assert found.scores.abs().max() > 0
    with pytest.raises(regard.UnsupportedModelError):
        direct_effects(model, ids[0], ids[1], metric)


def test_a_family_without_a_feed_forward_module(pair):
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48}
    model = OPTForCausalLM(OPTConfig(max_position_embeddings=64, word_embed_proj_dim=32, **sizes)).eval()
    for of in ("head", "attn"):
        assert total_effects(model, *pair, METRIC, of=of, relative="none").scores.abs().max() > 0
    with pytest.raises(regard.UnsupportedModelError, match="feed-forward"):
        total_effects(model, *pair, METRIC, of="mlp")
