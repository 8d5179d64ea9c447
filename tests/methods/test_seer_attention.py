"""SeerAttention and SeerAttention-R on models: limits, padding, chunks, beams, files, and gates that are not made for the model."""

import copy

import pytest
import torch
from sparse_models import generated, logits, padded_batch, prompt

import regard
from regard import SeerAttention, SeerAttentionR, UnsupportedModelError
from regard.methods import load_seer_gates, save_seer_gates, seer_gates
from regard.methods.rotary import RotaryOf, query_positions
from regard.nn import AttentionGate
from tiny import tiny_llama


def gates_for(model, decode=False, **options):
    torch.manual_seed(5)
    gates = seer_gates(model, decode=decode, gate_dim=8, block_size=8, **options)
    for parameter in gates.parameters():
        parameter.data.normal_()
    return gates


@pytest.mark.parametrize("rule", [{"threshold": -1.0}, {"ratio": 1.0}, {"threshold": 2.0, "dense_last": 99}])
def test_dense_limits(rule):
    model, ids = tiny_llama(), prompt()
    dense, told = logits(model, ids), generated(model, ids)
    with regard.attach(model, SeerAttention(gates_for(model), **rule)):
        torch.testing.assert_close(logits(model, ids), dense, rtol=1e-5, atol=1e-5)
        assert torch.equal(generated(model, ids), told)
    assert torch.equal(logits(model, ids), dense)


def test_gates_see_queries_and_keys_before_the_rotary_embedding():
    model, ids = tiny_llama(), prompt(40)
    attention = model.model.layers[1].self_attn
    seen = {}
    hook = attention.register_forward_pre_hook(lambda m, a, kw: seen.update(x=kw["hidden_states"]), with_kwargs=True)
    rotary = RotaryOf(model, "test")
    with regard.attach(model) as session, torch.no_grad():
        rotary.watch(session)
        calls = []
        session.observers.append(calls.append)
        model(ids, position_ids=torch.arange(7, 47)[None])
    hook.remove()
    positions = query_positions(calls[1])
    assert positions[0, 0] == 7
    for turned, project, heads in ((calls[1].q, attention.q_proj, 4), (calls[1].k, attention.k_proj, 2)):
        plain = project(seen["x"]).unflatten(-1, (heads, 8)).transpose(1, 2)
        torch.testing.assert_close(rotary.undo(turned, positions), plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{"threshold": 0.1}, {"ratio": 0.5}, {"ratio": 0.4, "share": "max", "diagonal": True}]
)
def test_it_is_sparse_and_padding_changes_nothing(options):
    model = tiny_llama()
    ids, mask, alone = padded_batch()
    dense = logits(model, alone[0])
    with regard.attach(model, SeerAttention(gates_for(model), **options)):
        rows = logits(model, ids, attention_mask=mask)
        for row, text in zip(rows, alone):
            torch.testing.assert_close(row[-text.shape[1] :], logits(model, text)[0], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(rows[0], dense[0], atol=1e-3)
        told = generated(model, ids, attention_mask=mask)
        for row, text in zip(told, alone):
            assert torch.equal(row[-6:], generated(model, text)[0, -6:])


def test_a_prompt_in_two_calls():
    model, ids = tiny_llama(), prompt(80)
    method = SeerAttention(gates_for(model), threshold=0.15, dense_last=0)
    calls = []
    with regard.attach(model, method) as session, torch.no_grad():
        session.observers.append(lambda call: calls.append(call.selection.block_map()) if call.layer == 0 else None)
        model(ids)
        for cut in (48, 45):  # on a block boundary, and not
            first = model(ids[:, :cut], use_cache=True)
            assert torch.isfinite(model(ids[:, cut:], past_key_values=first.past_key_values).logits).all()
    whole, first, second, _, unaligned = calls
    assert torch.equal(torch.cat((torch.nn.functional.pad(first, (0, 4)), second), dim=2), whole)
    assert unaligned.shape[2:] == (5, 10)


def test_the_selection_is_the_gates_choice():
    model, ids = tiny_llama(), prompt(64)
    gates = gates_for(model)
    method = SeerAttention(gates, threshold=0.2, dense_last=0)
    rotary = RotaryOf(model, "test")
    calls = []
    with regard.attach(model, method) as session, torch.no_grad():
        session.observers.append(calls.append)
        model(ids)
        call = calls[0]
        positions = torch.arange(64)[None]
        q, k = rotary.undo(call.q, positions), rotary.undo(call.k, positions)
        probs = gates["0"](q, k, rotary.angles(positions[:, ::8], 8), softmax=True)
    wanted = (probs > 0.2).tril()
    assert torch.equal(call.selection.block_map(), wanted) and 0 < wanted.sum() < 4 * 36


@pytest.mark.parametrize("options", [{"budget": 10_000}, {"budget": 1.0}, {"threshold": -1.0}])
def test_decoding_dense_limits(options):
    model, ids = tiny_llama(), prompt()
    told = generated(model, ids)
    with regard.attach(model, SeerAttentionR(gates_for(model, True), **options)):
        assert torch.equal(generated(model, ids), told)
        assert torch.equal(logits(model, ids), logits(tiny_llama(), ids))


@pytest.mark.parametrize(
    "options", [{"budget": 24}, {"budget": 0.3, "variant": "paper"}, {"threshold": 0.2, "use_rope": False}]
)
def test_decoding_is_sparse_padding_and_caches_change_nothing(options):
    model = tiny_llama()
    ids, mask, alone = padded_batch()
    with regard.attach(model, SeerAttentionR(gates_for(model, True, qk_norm=True), **options)):
        kept = []
        with torch.no_grad():
            cache = model(alone[0], use_cache=True).past_key_values
            regard.integrations.transformers.session_of(model).observers.append(
                lambda call: kept.append(call.selection)
            )
            sparse = model(ids[:1, :1], past_key_values=cache).logits
        assert all(selection.counts.max() < 12 for selection in kept)
        told = generated(model, ids, 12, attention_mask=mask)
        for row, text in zip(told, alone):
            assert torch.equal(row[-12:], generated(model, text, 12)[0, -12:])
        assert torch.equal(generated(model, alone[0], cache_implementation="static"), generated(model, alone[0]))
    with torch.no_grad():
        cache = model(alone[0], use_cache=True).past_key_values
        assert not torch.allclose(sparse, model(ids[:1, :1], past_key_values=cache).logits, atol=1e-4)


def test_beams_keep_their_gate_keys():
    model, ids = tiny_llama(), prompt()
    gates = gates_for(model, True)
    checked = []

    class Checked(SeerAttentionR):
        def choose(self, stretch):
            choice = super().choose(stretch)
            fresh = copy.copy(stretch)
            kept, fresh.memory = stretch.memory["gate_keys"], {}
            rows = query_positions(stretch.call)
            again = self._keys(fresh, gates[str(stretch.call.layer)], rows)
            torch.testing.assert_close(kept.pooled.values, again.pooled.values, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(kept.finished, again.finished, rtol=1e-4, atol=1e-5)
            checked.append(kept.length)
            return choice

    with regard.attach(model, Checked(gates, budget=24, variant="paper")):
        generated(model, ids, 10, num_beams=3)
    assert max(checked) == 99


@pytest.mark.parametrize("decode", [False, True])
def test_files_of_ours_and_of_the_authors(tmp_path, decode):
    model = tiny_llama()
    options = {"qk_norm": True} if decode else {"force_double": True, "q_pool": ("avg", "max")}
    gates = gates_for(model, decode, **options)
    path = save_seer_gates(gates, tmp_path / "gates.safetensors")
    again = load_seer_gates(path)
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in gates.state_dict().items())
    assert repr(again) == repr(gates)
    method = (SeerAttentionR if decode else SeerAttention)(path)
    assert len(method.gates) == 3


def test_a_checkpoint_of_the_authors(tmp_path):
    model = tiny_llama()
    plain = {f"model.layers.{i}.self_attn.attn_gate.mask_linear_k.weight": torch.randn(4, 24, 8) for i in range(3)}
    torch.save(plain, tmp_path / "attn_gate_weights.pth")
    gates = load_seer_gates(tmp_path / "attn_gate_weights.pth", model, block_size=16)
    assert torch.equal(gates["2"].linear_k.weight, plain["model.layers.2.self_attn.attn_gate.mask_linear_k.weight"])
    assert gates["0"].block_size == 16 and gates["0"].k_pool == ("max", "min", "avg")
    name = "model.layers.1.self_attn.attn_gate.attngate_linear_{}.weight"
    r = {name.format("q"): torch.randn(2, 2, 8, 16), name.format("k"): torch.randn(2, 24, 16)}
    gate = load_seer_gates(r, model)["1"]
    assert torch.equal(gate.linear_q.weight, r[name.format("q")].flatten(1, 2)) and gate.q_head_pool == "Qproj"
    with pytest.raises(ValueError, match="is it another gate_type"):
        load_seer_gates(plain, model, gate_type="Qavg_Kavg")
    with pytest.raises(ValueError, match="as the file does not tell"):
        load_seer_gates(plain)
    with pytest.raises(ValueError, match="no gate in it"):
        load_seer_gates({"lm_head.weight": torch.zeros(1)}, model)
    with pytest.raises(ValueError, match="a file that is there"):
        SeerAttention(str(tmp_path / "nowhere.safetensors"))


def test_gates_of_another_model_are_refused():
    model = tiny_llama()
    with pytest.raises(
        UnsupportedModelError,
        match="4 query and 2 kv heads of 8, and the gates of SeerAttention were made for 4, 4 and 8",
    ):
        regard.attach(model, SeerAttention({0: AttentionGate(4, 4, 8)}))
    with pytest.raises(UnsupportedModelError, match="has 3 layers, and SeerAttention has a gate for 7"):
        regard.attach(model, SeerAttention({7: AttentionGate(4, 2, 8)}))


def test_models_without_rotary_embedding_are_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=4, n_embd=32, vocab_size=9))
    with pytest.raises(UnsupportedModelError, match="needs rotary embeddings of constant frequencies"):
        regard.attach(model, SeerAttention({0: AttentionGate(4, 4, 8)}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gates": None}, "gates: got NoneType"),
        ({"gates": {0: torch.nn.Linear(1, 1)}}, "AttentionGates by layer number"),
        ({"threshold": 0.1, "ratio": 0.1}, "threshold, ratio: got"),
        ({"ratio": 0.0}, "ratio: got 0.0"),
        ({"dense_last": -1}, "dense_last: got -1"),
        ({"share": "all"}, "share: unknown name"),
    ],
)
def test_bad_fields(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        SeerAttention(**({"gates": {0: AttentionGate(4, 2, 8)}} | options))
