"""attach and detach: what may be joined to what, and that nothing stays behind."""

from __future__ import annotations

import copy
import pickle
import warnings
from dataclasses import dataclass

import pytest
import torch
import transformers as hf
from families import GPT2, GQA, build, inputs
from torch import nn

import regard
from regard import masks
from regard.integrations import session_of
from tiny import tiny_llama


@pytest.fixture
def model():
    return build("llama", implementation="sdpa")


@pytest.fixture
def given():
    return inputs("llama")


def logits(model, given):
    with torch.no_grad():
        return model(**given).logits


@dataclass
class Window(regard.Method):
    size: int = 3

    def mask(self, call):
        return masks.sliding_window(self.size)


@dataclass
class Sharper(regard.Method):
    factor: float = 2.0

    def score(self, call):
        return lambda score, b, h, q_idx, kv_idx: score * self.factor


@dataclass
class Blocks(regard.Method):
    """Selects the first block and the own one."""

    size: int = 4

    def select(self, call):
        rows, columns = -(-call.q_len // self.size), -(-call.kv_len // self.size)
        chosen = torch.eye(rows, columns, dtype=torch.bool)
        chosen[:, 0] = True
        return regard.ops.Selection.from_block_map(
            chosen[None, None], block_q=self.size, block_k=self.size, q_len=call.q_len, kv_len=call.kv_len
        )


@dataclass
class Shift(regard.Method):
    layers: tuple[int, ...] | None = None
    amount: float = 1.0

    def edit(self, call):
        call.on_output(lambda out: out + self.amount)


@dataclass
class Mean(regard.Method):
    def attend(self, call):
        return (
            call.v.mean(2, keepdim=True).repeat_interleave(call.num_heads // call.num_kv_heads, dim=1).expand_as(call.q)
        )


def test_handle_detaches_and_so_does_the_function(model, given):
    before = logits(model, given)
    session = regard.attach(model, Window())
    assert session_of(model) is session and "Window" in repr(session)
    assert not torch.equal(logits(model, given), before)
    session.detach()
    session.detach()
    assert session_of(model) is None and torch.equal(logits(model, given), before)
    regard.attach(model, Window())
    regard.detach(model)
    regard.detach(model)
    assert torch.equal(logits(model, given), before)


def test_an_exception_inside_the_block_detaches(model, given):
    before = logits(model, given)
    with pytest.raises(KeyError), regard.attach(model, Window()):
        raise KeyError
    assert torch.equal(logits(model, given), before)


def test_weights_are_never_changed(model, given):
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with regard.attach(model, Window(), Shift()):
        logits(model, given)
        assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_methods_compose_where_seams_differ(model, given):
    with regard.attach(model, Window(4), Sharper(), Blocks(), Shift()):
        together = logits(model, given)

    @dataclass
    class AllAtOnce(Window):
        size: int = 4

        def score(self, call):
            return Sharper().score(call)

        def select(self, call):
            return Blocks().select(call)

        def edit(self, call):
            Shift().edit(call)

    assert AllAtOnce.seams() == ("mask", "score", "select", "edit")
    with regard.attach(model, AllAtOnce()):
        assert torch.equal(logits(model, given), together)
    for alone in (Window(4), Sharper(), Blocks(), Shift()):
        with regard.attach(model, alone):
            assert not torch.allclose(logits(model, given), together, atol=1e-3)


def test_limits_change_nothing(model, given):
    before = logits(model, given)
    for method in (Window(17), Sharper(1.0), Blocks(32), Shift(amount=0.0), Shift(layers=()), regard.SlidingWindow(17)):
        with regard.attach(model, method):
            assert (logits(model, given) - before).abs().max() <= 1e-5 * before.abs().max()


def test_layers_restrict_a_method(model, given):
    seen = {}
    for layers in (None, (0,), (2,), (-1,), (0, 1, 2), (7,)):
        with regard.attach(model, Shift(layers=layers)):
            seen[layers] = logits(model, given)
    assert torch.equal(seen[(2,)], seen[(-1,)]) and torch.equal(seen[None], seen[(0, 1, 2)])
    assert torch.equal(seen[(7,)], logits(model, given))
    assert not torch.equal(seen[(0,)], seen[(2,)])


def test_attend_takes_over_and_is_alone_with_the_scores(model, given):
    before = logits(model, given)
    with regard.attach(model, Mean(), Shift(amount=0.0)):
        assert not torch.allclose(logits(model, given), before)
    for other, seam in ((Window(), "mask"), (Sharper(), "score"), (Blocks(), "select")):
        with pytest.raises(ValueError, match=rf"Mean.*{seam}.*{type(other).__name__}"):
            regard.attach(model, Mean(), other)

    @dataclass
    class Bias(regard.Method):
        def edit(self, call):
            call.add_bias(torch.zeros(1, 1, 1, call.kv_len))

    with regard.attach(model, Bias(), Mean()), pytest.raises(ValueError, match="Mean.*Bias"):
        logits(model, given)


def test_two_methods_on_one_seam(model):
    with pytest.raises(ValueError, match=r"SlidingWindow and Window both claim the seam 'mask'"):
        regard.attach(model, regard.SlidingWindow(4), Window())
    assert session_of(model) is None


def test_attaching_twice_and_nested(model, given):
    before = logits(model, given)
    with regard.attach(model, Window()):
        for part in (model, model.model, model.model.layers[1]):
            with pytest.raises(ValueError, match="Window is attached to this LlamaForCausalLM already"):
                regard.attach(part, Shift())
    with regard.attach(model.model, Window()):
        with pytest.raises(ValueError, match="Window is attached to this LlamaModel already"):
            regard.attach(model, Shift())
        assert not torch.equal(logits(model, given), before)
    assert torch.equal(logits(model, given), before)


@pytest.mark.parametrize("bad", [Window, "window", None, masks.causal])
def test_what_is_no_method(model, bad):
    with pytest.raises(TypeError, match="methods"):
        regard.attach(model, bad)
    with pytest.raises(TypeError, match="model"):
        regard.attach("smollm2-135m", Window())


def test_check_refuses_before_anything_is_changed(model):
    @dataclass
    class Picky(regard.Method):
        def check(self, model):
            raise regard.UnsupportedModelError(f"model: {type(model).__name__} is not good enough")

    with pytest.raises(regard.UnsupportedModelError, match="LlamaForCausalLM is not good enough"):
        regard.attach(model, Picky())
    assert session_of(model) is None and model.config._attn_implementation == "sdpa"


def test_a_failing_setup_leaves_nothing_behind(model, given):
    @dataclass
    class Broken(regard.Method):
        def setup(self, session):
            raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        regard.attach(model, Broken())
    assert session_of(model) is None and model.config._attn_implementation == "sdpa"
    assert not model._forward_pre_hooks and not model._forward_hooks


# Architectures that cannot be joined


def test_architectures_beside_the_interface():
    bloom = hf.BloomForCausalLM(hf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=97))
    with pytest.raises(regard.UnsupportedModelError, match=r"BloomForCausalLM \(BloomAttention\).*AttentionInterface"):
        regard.attach(bloom, Window())
    for module in (nn.Linear(3, 3), nn.TransformerEncoderLayer(8, 2), nn.Sequential(nn.MultiheadAttention(8, 2))):
        with pytest.raises(regard.UnsupportedModelError, match="AttentionInterface"):
            regard.attach(module, regard.Dense())


def test_a_part_beside_the_interface_is_warned_about(given):
    class OwnAttention(nn.Module):
        def forward(self, x):
            return x

    model = build("llama", implementation="sdpa")
    model.vision_tower = OwnAttention()
    with pytest.warns(UserWarning, match=r"vision.*OwnAttention"):
        regard.attach(model, Window()).detach()


def test_a_forward_that_never_arrives_is_an_error(model, given):
    with regard.attach(model, Window()):
        model.set_attn_implementation("eager")
        with pytest.raises(regard.UnsupportedModelError, match="no attention call that reached regard.*Window"):
            logits(model, given)
    assert model.config._attn_implementation == "sdpa"


# Models that share things


def test_models_that_share_a_config(given):
    config = hf.LlamaConfig(**GQA)
    first, second = hf.LlamaForCausalLM(config).eval(), hf.LlamaForCausalLM(config).eval()
    assert first.config is second.config
    before = [logits(m, given) for m in (first, second)]
    with regard.attach(first, Window()):
        assert not torch.equal(logits(first, given), before[0])
        assert (logits(second, given) - before[1]).abs().max() <= 1e-5 * before[1].abs().max()
        inner = regard.attach(second, Shift())
        assert not torch.allclose(logits(second, given), before[1], atol=1e-3)
    assert not torch.allclose(logits(second, given), before[1], atol=1e-3)
    assert torch.equal(logits(first, given), before[0]) or config._attn_implementation == "regard"
    inner.detach()
    assert config._attn_implementation == "sdpa"
    assert all(torch.equal(logits(m, given), b) for m, b in zip((first, second), before))


@pytest.mark.parametrize("how", ["copy", "pickle"])
def test_copies_are_plain_models(model, given, how):
    before = logits(model, given)
    greedy = model.generate(**given, max_new_tokens=4, do_sample=False)
    with regard.attach(model, Window()) as session:
        windowed = logits(model, given)
        twin = copy.deepcopy(model)
        if how == "pickle":
            session.detach()
            twin = pickle.loads(pickle.dumps(model))
    assert not torch.equal(windowed, before)
    assert session_of(twin) is None
    assert (logits(twin, given) - before).abs().max() <= 1e-5 * before.abs().max()
    assert torch.equal(twin.generate(**given, max_new_tokens=4, do_sample=False), greedy)
    with regard.attach(twin, Window()):
        assert (logits(twin, given) - windowed).abs().max() <= 1e-5 * before.abs().max()


def test_a_copy_of_a_model_with_its_own_cache_generates_as_itself(model, given):
    @dataclass
    class Own(regard.Method):
        def cache(self, model):
            return hf.DynamicCache()

        def logits(self, model, session):
            return []

    with regard.attach(model, Own()):
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for weight in twin.parameters():
                weight.copy_(torch.randn_like(weight))
        other = twin.generate(**given, max_new_tokens=6, do_sample=False)
    assert not torch.equal(other, model.generate(**given, max_new_tokens=6, do_sample=False))


def test_saving_while_attached(model, given, tmp_path):
    before = logits(model, given)
    with regard.attach(model, Window()):
        model.save_pretrained(tmp_path)
    again = hf.LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    assert torch.equal(logits(again, given), before)


def test_a_layer_alone_and_a_layer_added_later(model, given):
    with regard.attach(model.model.layers[1], Shift()) as session:
        alone = logits(model, given)
        assert session.num_layers == 2
    with regard.attach(model, Shift(layers=(1,))):
        assert torch.equal(logits(model, given), alone)
        model.model.layers[1].self_attn = copy.deepcopy(model.model.layers[1].self_attn)
        model.model.layers[1].self_attn.config = model.config
        assert torch.equal(logits(model, given), alone)


# Spans, towers, modes


def test_spans_follow_the_keys(model, given):
    seen = []

    @dataclass
    class Look(regard.Method):
        layers: tuple[int, ...] = (0,)

        def edit(self, call):
            seen.append({name: span.clone() for name, span in call.spans.items()})

    system = torch.zeros(2, 17, dtype=torch.bool)
    system[:, 5:8] = True
    with regard.attach(model, Look(), spans={"system": system}):
        model.generate(**given, max_new_tokens=3, num_beams=2, do_sample=False)
    assert [s["system"].shape for s in seen] == [(4, 17), (4, 18), (4, 19)]
    assert torch.equal(seen[0]["system"], system.repeat_interleave(2, 0))
    assert (
        torch.equal(seen[2]["system"][:, :17], system.repeat_interleave(2, 0)) and not seen[2]["system"][:, 17:].any()
    )
    for bad in ({"system": system[0]}, {"system": system.float()}):
        with pytest.raises((ValueError, TypeError), match="system"):
            regard.attach(model, spans=bad)
    with (
        regard.attach(model, Look(), spans={"system": torch.zeros(3, 17, dtype=torch.bool)}),
        pytest.raises(ValueError, match="3 rows"),
    ):
        logits(model, given)


def test_image_tokens_and_towers():
    model, given = build("llava", implementation="sdpa"), inputs("llava")
    seen = []

    @dataclass
    class Look(regard.Method):
        def edit(self, call):
            seen.append((call.tower, call.layer, call.phase, call.position, call.spans["image"]))

    with regard.attach(model, Look()) as session:
        assert session.main_tower == "text" and session.num_layers == 3
        model.generate(**given, max_new_tokens=2, do_sample=False, suppress_tokens=[90])
    assert [s[:4] for s in seen] == [("text", i, "prefill", 0) for i in range(3)] + [
        ("text", i, "decode", 33) for i in range(3)
    ]
    assert torch.equal(seen[0][4], given["input_ids"] == 90) and seen[0][4].sum() == 32
    assert torch.equal(seen[3][4], nn.functional.pad(given["input_ids"] == 90, (0, 1)))

    @dataclass
    class Everywhere(Look):
        towers = ("vision", "text")

        def edit(self, call):
            seen.append(call.tower)

    seen.clear()
    with regard.attach(model, Everywhere()):
        model(**given)
    assert seen == ["vision"] * 2 + ["text"] * 3


def test_training_with_dropout_and_checkpointing(given):
    torch.manual_seed(0)
    model = hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2, attn_pdrop=0.5, embd_pdrop=0.0, resid_pdrop=0.0)).train()
    with regard.attach(model, regard.Dense()):
        first, second = (model(**given).logits for _ in range(2))
        assert not torch.equal(first, second)
        model.eval()
        assert torch.equal(model(**given).logits, model(**given).logits)
    model.config.attn_pdrop = 0.0
    for block in model.transformer.h:
        block.attn.attn_dropout.p = 0.0
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    grads = []
    for methods in ((), (regard.SlidingWindow(64),)):
        model.zero_grad()
        with regard.attach(model, *methods):
            model(**given, use_cache=False).logits.square().mean().backward()
        grads.append(model.transformer.wte.weight.grad.clone())
    assert (grads[0] - grads[1]).abs().max() <= 1e-5 * grads[0].abs().max()


def test_attention_weights_on_request(given):
    whisper, heard = build("whisper", implementation="eager"), inputs("whisper")
    with torch.no_grad():
        eager = whisper(**heard, output_attentions=True)
        before = whisper(**heard).logits
        with regard.attach(whisper):
            joined = whisper(**heard, output_attentions=True)
    assert (before - joined.logits).abs().max() <= 1e-5 * before.abs().max()
    for name in ("encoder_attentions", "decoder_attentions", "cross_attentions"):
        for a, b in zip(getattr(joined, name), getattr(eager, name)):
            assert (a - b).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["gpt_oss", "t5"])
def test_learned_sinks_and_position_biases(name, given):
    torch.manual_seed(0)
    if name == "gpt_oss":
        model = hf.GptOssForCausalLM(
            hf.GptOssConfig(**GQA, head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=8),
        )
        for layer in model.model.layers:
            nn.init.normal_(layer.self_attn.sinks)
    else:
        config = hf.T5Config(
            d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=97, decoder_start_token_id=0
        )
        model = hf.T5ForConditionalGeneration(config)
        given = given | {"decoder_input_ids": given["input_ids"]}
    model = model.eval()
    model.set_attn_implementation("eager")
    try:
        session = regard.attach(model)
    except regard.UnsupportedModelError as error:  # T5 joined the interface in a later transformers
        assert name == "t5" and "T5Attention" in str(error)
        return
    with session:
        joined = logits(model, given)
    before = logits(model, given)
    real = given["attention_mask"].bool() if name == "gpt_oss" else slice(None)
    assert (joined - before)[real].abs().max() <= 1e-5 * before.abs().max()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("method", [regard.Dense(), regard.SlidingWindow(64)])
def test_traced_in_one_graph(name, method):
    """Where plain transformers traces into one graph, so does the joined model, with gradients."""
    model, given = build(name, implementation="sdpa"), inputs(name)
    before = logits(model, given)
    torch._dynamo.reset()
    with regard.attach(model, method):
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        out = compiled(**given).logits
        assert (out - before).abs().max() <= 1e-5 * before.abs().max()
        out.square().mean().backward()
        assert all(p.grad is not None for p in model.parameters())
    torch._dynamo.reset()
    assert torch.equal(logits(model, given), before)


@pytest.mark.slow
def test_compiled():
    model, given = build("llama", implementation="sdpa"), inputs("llama")
    before = logits(model, given)
    torch._dynamo.reset()
    with regard.attach(model, regard.Dense()):
        assert (logits(torch.compile(model), given) - before).abs().max() <= 1e-5 * before.abs().max()
    torch._dynamo.reset()


def test_a_context_past_the_models_positions_is_warned_of_once():
    model = tiny_llama(max_position_embeddings=32)
    ids = torch.arange(1, 31)[None]
    with regard.attach(model, regard.SlidingWindow(8)), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(ids)
        assert not caught
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    told = [str(w.message) for w in caught if "max_position_embeddings = 32" in str(w.message)]
    assert len(told) == 1 and told[0].startswith("SlidingWindow: the context has 33 tokens")
    with regard.attach(model, regard.StreamingLLM(window=8)), warnings.catch_warnings():
        warnings.simplefilter("error")  # distances are counted in its cache: nothing to warn of
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
