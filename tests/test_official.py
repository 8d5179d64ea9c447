"""`load_official`: the authors' names in, ours underneath, and one clear error for whatever does not fit."""

import pytest
import torch
from torch import nn

import regard


class Ours(nn.Module):
    """Two layers whose names differ from the authors' `fc1` and `fc2`, the second stored transposed by them."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(3, 4)
        self.down = nn.Linear(4, 2, bias=False)
        self.norm = nn.BatchNorm1d(4)

    @staticmethod
    def official_keys(state):
        renamed = {name.replace("fc1", "up"): value for name, value in state.items() if not name.startswith("fc2")}
        return renamed | {"down.weight": state["fc2.kernel"].T}


def official_state():
    torch.manual_seed(0)
    norm = {f"norm.{name}": torch.rand(4) for name in ("weight", "bias", "running_mean", "running_var")}
    return {"fc1.weight": torch.randn(4, 3), "fc1.bias": torch.randn(4), "fc2.kernel": torch.randn(4, 2), **norm}


def test_renames_and_relayouts_through_official_keys():
    module, state = Ours(), official_state()
    result = regard.load_official(module, state)
    assert result == ([], [])
    assert torch.equal(module.up.weight, state["fc1.weight"])
    assert torch.equal(module.down.weight, state["fc2.kernel"].T)
    assert torch.equal(module.norm.running_var, state["norm.running_var"])
    assert module.up.weight.requires_grad
    assert set(official_state()) == set(state), "the given state dict was changed"


def test_identity_without_official_keys_and_values_are_cast():
    layer = nn.Linear(3, 2)
    state = {"weight": torch.randn(2, 3, dtype=torch.float64), "bias": torch.randn(2, dtype=torch.float64)}
    regard.load_official(layer, state)
    assert layer.weight.dtype == torch.float32 and torch.equal(layer.weight, state["weight"].float())


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda s: s.pop("fc1.bias"), "does not fit Ours: missing up.bias"),
        (lambda s: s.update(extra=torch.zeros(1)), "unexpected extra"),
        (lambda s: s.update({"fc1.weight": torch.zeros(4, 7)}), r"wrong shape: up.weight is \(4, 7\), need \(4, 3\)"),
        (lambda s: s.pop("fc2.kernel"), "Ours needs 'fc2.kernel' in the authors' layout"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(change, complaint):
    module, state = Ours(), official_state()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    change(state)
    with pytest.raises(ValueError, match=complaint):
        regard.load_official(module, state)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_not_strict_reports_but_still_refuses_wrong_shapes():
    module, state = Ours(), official_state()
    del state["fc1.bias"]
    state["extra"] = torch.zeros(1)
    assert regard.load_official(module, state, strict=False) == (["up.bias"], ["extra"])
    assert torch.equal(module.up.weight, state["fc1.weight"])
    state["fc1.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match="wrong shape"):
        regard.load_official(module, state, strict=False)


def test_long_lists_are_cut():
    state = {f"layer.{index}.weight": torch.zeros(1) for index in range(50)}
    with pytest.raises(ValueError, match=r"unexpected layer.0.weight, .* … \(50 in all\)"):
        regard.load_official(nn.ReLU(), state)


def test_bad_arguments():
    with pytest.raises(TypeError, match="module: got str, need a torch.nn.Module"):
        regard.load_official("model", {})
    with pytest.raises(TypeError, match="state_dict: got list"):
        regard.load_official(nn.ReLU(), [])
    with pytest.raises(TypeError, match=r"no tensors \(model\).*checkpoint\['model'\]"):
        regard.load_official(nn.ReLU(), {"model": {}})
