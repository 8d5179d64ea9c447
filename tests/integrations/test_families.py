"""Joining leaves every family as it is: same numbers while nothing is to change, the same bits after detach."""

from __future__ import annotations

import re

import pytest
import torch
from families import CAUSAL, FAMILIES, build, inputs, main_output

import regard

TOLERANCE = 1e-5


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def compared(name: str, output, given) -> torch.Tensor:
    """What is compared: everything; but eager attention averages over all keys in a padding row, where ours gives zeros."""
    tensor = main_output(output)
    return tensor[given["attention_mask"].bool()] if name == "gemma2" else tensor


def sdpa_of(name: str):
    """The model as plain transformers runs it best: SDPA, or eager where SDPA cannot (Gemma 2's soft cap)."""
    return build(name, implementation="eager" if name == "gemma2" else "sdpa")


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_nothing_to_change_changes_nothing(name):
    model, given = sdpa_of(name), inputs(name)
    before = compared(name, model(**given), given)
    implementations = [c._attn_implementation for c in configs(model)]
    hooks = count_hooks(model)
    calls = []
    with regard.attach(model, regard.Dense()) as session:
        session.observers.append(lambda call: calls.append((call.tower, call.kind, call.layer)))
        during = compared(name, model(**given), given)
    after = compared(name, model(**given), given)
    assert relative(during, before) <= TOLERANCE
    assert torch.equal(after, before)
    assert [c._attn_implementation for c in configs(model)] == implementations
    assert count_hooks(model) == hooks
    assert not any("_regard" in key for module in model.modules() for key in module.__dict__)
    assert calls == EXPECTED_CALLS.get(name, [("text", "self", layer) for layer in range(3)])


EXPECTED_CALLS = {
    "vit": [("vision", "self", 0), ("vision", "self", 1)],
    "dinov2": [("vision", "self", 0), ("vision", "self", 1)],
    "clip": [("vision", "self", 0), ("vision", "self", 1)] + [("text", "self", layer) for layer in range(3)],
    "siglip": [("vision", "self", 0), ("vision", "self", 1)] + [("text", "self", layer) for layer in range(3)],
    "llava": [("vision", "self", 0), ("vision", "self", 1)] + [("text", "self", layer) for layer in range(3)],
    "whisper": [("encoder", "self", 0), ("encoder", "self", 1)]
    + [("decoder", kind, layer) for layer in range(2) for kind in ("self", "cross")],
}


def configs(model) -> list:
    found = {}
    for module in model.modules():
        config = module.__dict__.get("config")
        if hasattr(config, "_attn_implementation"):
            found[id(config)] = config
            for key in config.sub_configs:
                found[id(getattr(config, key))] = getattr(config, key)
    return list(found.values())


def count_hooks(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_flow_as_before(name):
    model, given = sdpa_of(name).train(), inputs(name)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    found = []
    for attached in (False, True):
        for config in configs(model):
            for key in ("attention_dropout", "attention_probs_dropout_prob"):
                if hasattr(config, key):
                    setattr(config, key, 0.0)
        model.zero_grad()
        session = regard.attach(model) if attached else None
        torch.manual_seed(3)
        compared(name, model(**given), given).square().mean().backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        if session:
            session.detach()
    plain, joined = found
    assert plain.keys() == joined.keys() and plain
    largest = max(float(g.abs().max()) for g in plain.values())
    assert max(float((plain[n] - joined[n]).abs().max()) for n in plain) <= 2e-5 * largest


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_the_window_of_a_sliding_layer_is_kept(name):
    """Row i of the logits depends on exactly the tokens it depended on before."""
    model, given = sdpa_of(name), inputs(name, batch=1, length=30)
    changed = {k: v.clone() for k, v in given.items()}
    changed["input_ids"][0, 6] = 95
    with regard.attach(model):
        joined = (model(**given).logits - model(**changed).logits).abs().amax(-1)[0]
    plain = (model(**given).logits - model(**changed).logits).abs().amax(-1)[0]
    assert torch.equal(joined[5:] > 1e-6, plain[5:] > 1e-6)
    assert not (joined[5:6] > 1e-6).any() and (joined[6:8] > 1e-6).all()


@pytest.mark.parametrize("name", ["llama", "gemma3", "bert", "whisper"])
@torch.no_grad()
def test_bfloat16(name):
    model, given = sdpa_of(name).bfloat16(), inputs(name)
    given = {k: v.bfloat16() if v.is_floating_point() else v for k, v in given.items()}
    before = main_output(model(**given))
    with regard.attach(model, regard.Dense()):
        during = main_output(model(**given))
    assert during.dtype == torch.bfloat16
    assert relative(during.float(), before.float()) <= 2e-2
    assert torch.equal(main_output(model(**given)), before)


@torch.no_grad()
def test_custom_masks_pass():
    """4-d masks given by the user, bool and additive; several sequences packed in one row."""
    model, ids = build("llama", implementation="sdpa"), inputs("llama")["input_ids"]
    keep = torch.rand(2, 1, 17, 17, generator=torch.Generator().manual_seed(0)) < 0.5
    keep |= torch.eye(17, dtype=torch.bool)
    additive = torch.where(keep, 0.0, torch.finfo(torch.float32).min)
    positions = torch.cat([torch.arange(9), torch.arange(8)])[None].expand(2, -1)
    for options in (
        {"attention_mask": keep},
        {"attention_mask": additive},
        {"position_ids": positions, "use_cache": False},
    ):
        before = model(ids, **options).logits
        with regard.attach(model):
            assert relative(model(ids, **options).logits, before) <= TOLERANCE


@pytest.mark.parametrize(
    "name, kinds",
    [
        ("llama", {"(causal & padding)"}),
        ("mistral", {"((causal & sliding_window(8)) & padding)"}),
        ("gemma3", {"(causal & padding)", "((causal & sliding_window(8)) & padding)"}),
        ("bert", {"(everything & padding)"}),
    ],
)
@torch.no_grad()
def test_masks_are_understood(name, kinds):
    """The N x M matrix of a padded batch is recognised for what it is, so that kernels can skip blocks; else it stays a matrix."""
    model, given, seen = build(name), inputs(name), set()

    def look(call):
        structure = call.mask.structure
        assert torch.equal(structure.materialize(17, 17, batch=2), call.mask)
        assert call.start.tolist() == [5, 0]
        seen.add(re.sub(r"padding\([^)]*\)", "padding", repr(structure)))

    with regard.attach(model) as session:
        session.observers.append(look)
        model(**given)
        assert seen == kinds
        session.observers.clear()
        session.observers.append(lambda call: seen.add(call.mask is None or call.mask.structure is None))
        seen.clear()
        holes = given["attention_mask"].clone()
        holes[1, 3] = 0
        joined = model(**given | {"attention_mask": holes})
        assert seen == {True}
    assert relative(main_output(joined), main_output(model(**given | {"attention_mask": holes}))) <= TOLERANCE


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "bert", "whisper"])
@torch.no_grad()
def test_lengths_of_many_blocks(name):
    model, given = sdpa_of(name), inputs(name, length=61 if name in ("bert", "whisper") else 211)
    before = main_output(model(**given))
    with regard.attach(model):
        assert relative(main_output(model(**given)), before) <= TOLERANCE
