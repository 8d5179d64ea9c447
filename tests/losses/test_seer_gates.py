"""Teaching gates: the loss, what it reaches, and training that helps and leaves the model alone."""

import pytest
import torch

import regard
from regard.losses import block_map_distillation, fit_seer_gates
from regard.losses.runner import fingerprint
from regard.methods import load_seer_gates, seer_gates
from tiny import tiny_llama


def test_the_loss():
    target = torch.rand(2, 3, 8, 8).tril()
    target = target / target.sum(-1, keepdim=True)
    hidden = torch.full((8, 8), torch.finfo(torch.float32).min).triu(1)
    perfect = target.clamp(min=1e-38).log() + hidden
    assert float(block_map_distillation(perfect, target)) == pytest.approx(0.0, abs=1e-6)
    logits = torch.randn(2, 3, 8, 8) + hidden
    terms = torch.special.xlogy(target, target) - target * logits.log_softmax(-1).clamp(min=-1e9)
    for skip, first in ((0.25, 2), (0.0, 0)):
        torch.testing.assert_close(block_map_distillation(logits, target, skip, 3.0), 3.0 * terms[:, :, first:].mean())
    with pytest.raises(ValueError, match="target: got"):
        block_map_distillation(logits, target[:, :1])


@pytest.mark.parametrize("decode", [False, True])
def test_training_helps_and_leaves_the_model_alone(tmp_path, decode):
    model = tiny_llama()
    before = fingerprint(model)
    data = [torch.randint(1, 128, (2, 64), generator=torch.Generator().manual_seed(i)) for i in range(4)]
    options = {"gate_dim": 8, "block_size": 8}
    out = tmp_path / "gates.safetensors"
    gates = fit_seer_gates(
        model, data, gate=options, decode=decode, steps=40, lr=0.03, warmup=2, out=out, save_every=15, progress=False
    )
    losses = gates.fitted.losses
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    assert fingerprint(model) == before and not gates.training
    again = load_seer_gates(out)
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in gates.state_dict().items())
    method = regard.SeerAttentionR(out, budget=24) if decode else regard.SeerAttention(out, ratio=0.5)
    with regard.attach(model, method), torch.no_grad():
        assert torch.isfinite(model(data[0]).logits).all()


def test_resumed_training_is_the_same(tmp_path):
    model = tiny_llama()
    data = [torch.randint(1, 128, (1, 32), generator=torch.Generator().manual_seed(i)) for i in range(3)]
    options = {"gate_dim": 8, "block_size": 8}
    given = {"steps": 6, "save_every": 2, "progress": False}

    def fresh():
        torch.manual_seed(3)
        return seer_gates(model, **options)

    whole = fit_seer_gates(model, data, fresh(), **given).state_dict()
    count = 0

    def dying(number):
        nonlocal count
        count += 1
        if count == 5:
            raise KeyboardInterrupt
        return data[number % 3]

    out = tmp_path / "gates.safetensors"
    with pytest.raises(KeyboardInterrupt):
        fit_seer_gates(model, dying, fresh(), out=out, **given)
    again = fit_seer_gates(model, data, fresh(), out=out, **given)
    assert again.fitted.resumed_at == 4
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in whole.items())
