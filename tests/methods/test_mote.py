"""MoTE: experts switched off and on, on small random mixtures of several families."""

import pytest
import torch
import transformers as hf

import regard
from regard.lens import HeadScores, expert_activation, expert_contrast
from regard.methods import find_routers, force_experts, suppress_experts
from tiny import tiny_llama

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


def mixture(name):
    torch.manual_seed(0)
    options = {
        "Mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2},
        "Olmoe": {"num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": False},
        "Qwen2Moe": {
            "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
            "decoder_sparse_step": 1, "norm_topk_prob": True, "mlp_only_layers": [0],
        },
        "DeepseekV3": {
            "n_routed_experts": 6, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 2, "first_k_dense_replace": 1,
            "moe_intermediate_size": 16, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
            "v_head_dim": 8, "num_key_value_heads": 4,
        },
    }[name]  # fmt: skip
    config = getattr(hf, f"{name}Config")(**{**SIZES, **options})
    model = getattr(hf, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for router in find_routers(model):
            router.module.weight.normal_()
    return model


FAMILIES = ("Mixtral", "Olmoe", "Qwen2Moe", "DeepseekV3")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return mixture(request.param)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 61, (3, 10), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model, ids, *methods, **given):
    with regard.attach(model, *methods):
        return model(ids, **given).logits


def choices(model, ids, *methods):
    seen = {}
    with torch.no_grad(), regard.attach(model, *methods):
        hooks = [
            router.module.register_forward_hook(lambda m, a, out, layer=router.layer: seen.update({layer: out}))
            for router in find_routers(model)
        ]
        model(ids)
        for hook in hooks:
            hook.remove()
    return seen


def test_nothing_to_do_changes_nothing_and_nothing_stays(model, ids):
    plain = logits(model, ids)
    assert torch.equal(logits(model, ids, regard.MoTE()), plain)
    layer = find_routers(model)[-1].layer
    for mode in ("zero", "exclude"):
        assert not torch.allclose(logits(model, ids, regard.MoTE([(layer, e) for e in range(3)], mode=mode)), plain)
    assert torch.equal(logits(model, ids), plain)


def test_suppressed_experts_weigh_nothing_and_rows_keep_their_sum(model, ids):
    layer = find_routers(model)[-1].layer
    before = choices(model, ids)[layer]
    _, weights, chosen = choices(model, ids, regard.MoTE([(layer, 2), (layer, 4)]))[layer]
    assert torch.equal(chosen, before[2])
    hit = (chosen == 2) | (chosen == 4)
    assert bool(hit.any()) and bool((weights[hit] == 0).all())
    left = ~hit.all(-1)
    torch.testing.assert_close(weights.sum(-1)[left], before[1].sum(-1)[left], rtol=1e-5, atol=1e-6)


def test_excluded_experts_are_never_chosen(model, ids):
    layer = find_routers(model)[-1].layer
    _, weights, chosen = choices(model, ids, regard.MoTE([(layer, 2), (layer, 4)], mode="exclude"))[layer]
    assert not bool(((chosen == 2) | (chosen == 4)).any()) and bool((weights > 0).all())
    plain = choices(model, ids)[layer]
    free = ~((plain[2] == 2) | (plain[2] == 4)).any(-1)  # rows that never wanted them
    torch.testing.assert_close(chosen[free].sort(-1).values, plain[2][free].sort(-1).values)


def test_forced_experts_are_in_every_row(model, ids):
    layer = find_routers(model)[-1].layer
    before = choices(model, ids)[layer]
    _, weights, chosen = choices(model, ids, regard.MoTE(force=[(layer, 5), (layer, 1)]))[layer]
    assert bool((chosen == 5).any(-1).all()) and bool((chosen == 1).any(-1).all())
    torch.testing.assert_close(weights.sum(-1), before[1].sum(-1), rtol=1e-5, atol=1e-6)
    assert all(len(set(row)) == len(row) for row in chosen.tolist())


def test_suppression_equals_experts_that_give_nothing(ids):
    """Without renormalising, a suppressed expert is one whose down projection is zero; with it, the others' share grows."""
    model = mixture("Mixtral")
    attached = logits(model, ids, regard.MoTE([(0, 3)], renormalise=False))
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[3].zero_()
    torch.testing.assert_close(logits(model, ids), attached, rtol=1e-5, atol=1e-5)


def test_rules_on_numbers():
    weights, experts = torch.tensor([[0.6, 0.3, 0.1]]), torch.tensor([[4, 0, 2]])
    off = torch.tensor([True, False, False, False, False])
    torch.testing.assert_close(suppress_experts(weights, experts, off), torch.tensor([[0.6 / 0.7, 0.0, 0.1 / 0.7]]))
    torch.testing.assert_close(
        suppress_experts(weights, experts, off, renormalise=False), torch.tensor([[0.6, 0.0, 0.1]])
    )
    every = torch.ones(5, dtype=torch.bool)
    assert torch.equal(suppress_experts(weights, experts, every), torch.zeros(1, 3))
    made, chosen = force_experts(weights, experts, [3])
    assert chosen.tolist() == [[4, 0, 3]]
    torch.testing.assert_close(made, torch.tensor([[0.6, 0.3, 1 / 3]]) / (0.9 + 1 / 3))
    made, chosen = force_experts(weights, experts, [4, 0])
    assert torch.equal(chosen, experts)
    torch.testing.assert_close(made, weights)
    made, chosen = force_experts(weights, experts, [1, 3], weight=0.5, renormalise=False)
    assert chosen.tolist() == [[4, 3, 1]] and made.tolist() == [[pytest.approx(0.6), 0.5, 0.5]]


def test_activation_maps_count_every_choice(model, ids):
    found = find_routers(model)
    maps = expert_activation(model, [ids[:2], {"input_ids": ids[2:]}])
    assert maps.shape == (3, 2, 6)
    with_router = {router.layer for router in found}
    for layer in range(2):
        if layer in with_router:
            assert maps[:, layer].sum(-1).tolist() == [10 * found[0].top_k] * 3
        else:
            assert bool(maps[:, layer].isnan().all())
    torch.testing.assert_close(expert_activation(model, [ids], per_token=True) * 10, maps, equal_nan=True)
    gates = expert_activation(model, [ids], weight="gate")
    layer = found[-1].layer
    weights = choices(model, ids)[layer][1].reshape(3, -1).double().sum(-1)
    torch.testing.assert_close(gates[:, layer].sum(-1), weights)


def test_padding_does_not_count(ids):
    model = mixture("Mixtral")
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids[:1]], 1)
    mask = (torch.arange(14) >= 4).long()[None]
    torch.testing.assert_close(
        expert_activation(model, [{"input_ids": padded, "attention_mask": mask}]), expert_activation(model, [ids[:1]])
    )


def test_contrast():
    maps = torch.zeros(4, 2, 3, dtype=torch.float64)
    maps[:2, 1, 2], maps[:, 0, 0], maps[2:, 0, 1] = 5.0, 7.0, 2.0
    table = expert_contrast(maps, ["a", "a", "b", "c"], "a")
    assert table.unit == "expert" and table.top(1) == [(1, 2)] and table[1, 2] == 5.0 and table[0, 1] == -2.0
    ratio = expert_contrast(maps, ["a", "a", "b", "c"], "a", rule="ratio")
    assert ratio[1, 2] == 1.0 and ratio[0, 0] == 0.0 and ratio[0, 1] == -1.0
    holes = HeadScores(torch.tensor([[float("nan")] * 3, [0.1, 0.2, 0.3]]), unit="expert")
    assert all(layer == 1 for layer, _ in holes.random(2, exclude=1))


def test_generation_goes_through_it(ids):
    model = mixture("Mixtral")
    with regard.attach(model, regard.MoTE(suppress=[(0, 1), (1, 4)])):
        made = model.generate(ids[:1], max_new_tokens=4, do_sample=False)
        again = model(made[:, :-1]).logits[0, -4:].argmax(-1)
    assert torch.equal(again, made[0, -4:])


def test_bad_input(ids):
    model = mixture("Qwen2Moe")
    with pytest.raises(regard.UnsupportedModelError, match="no router"):
        regard.attach(tiny_llama(), regard.MoTE())
    with pytest.raises(regard.UnsupportedModelError, match="no router"):
        expert_activation(tiny_llama(), [ids])
    with pytest.raises(ValueError, match=r"layers with a router, \[1\]"):
        regard.attach(model, regard.MoTE([(0, 1)]))
    with pytest.raises(ValueError, match=r"experts in \[0, 6\)"):
        regard.attach(model, regard.MoTE([(1, 6)]))
    with pytest.raises(ValueError, match="suppressed too"):
        regard.attach(model, regard.MoTE([(1, 1)], force=[(1, 1)]))
    with pytest.raises(ValueError, match="at most 2 experts"):
        regard.attach(model, regard.MoTE(force=[(1, 0), (1, 1), (1, 2)]))
    with pytest.raises(ValueError, match="left to choose from"):
        regard.attach(model, regard.MoTE([(1, e) for e in range(5)], mode="exclude"))
    with pytest.raises(ValueError, match="mode"):
        regard.MoTE(mode="off")
    with pytest.raises(ValueError, match="target"):
        expert_contrast(torch.zeros(2, 1, 3), ["a", "a"], "a")
    with pytest.raises(ValueError, match="labels"):
        expert_contrast(torch.zeros(2, 1, 3), ["a"], "a")
