"""Based's language model: state and whole agree, presets, the authors' checkpoints' names, bad input."""

from __future__ import annotations

import pytest
import torch

import regard
from regard.models import BasedLM

SMALL = {"linear_layers": (1,), "window_layers": (2,), "feature_dim": 3, "window_size": 6, "hidden": 8}


def test_reading_on_from_the_state_and_generating():
    torch.manual_seed(0)
    model = BasedLM(21, 16, 4, 2, **SMALL).eval()
    ids = torch.randint(21, (2, 15))
    whole = model(ids)
    assert whole.shape == (2, 15, 24)
    first, state = model(ids[:, :9], return_state=True)
    rest, state = model(ids[:, 9:], state, return_state=True)
    torch.testing.assert_close(torch.cat((first, rest), dim=1), whole, rtol=1e-4, atol=1e-6)
    assert state.nbytes == model.state_nbytes(40, batch=2)
    assert model.generate(ids, 3).shape == (2, 18)
    whole.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_presets_are_the_authors_sizes():
    with torch.device("meta"):
        model = BasedLM.from_preset("360m")
        large = BasedLM.from_preset("1.3b", window_size=128)
    kinds = [type(block.mixer).__name__ for block in model.blocks]
    assert kinds.count("BasedLinearAttention") == kinds.count("SoftmaxAttention") == 5 and len(kinds) == 27
    assert model.blocks[2].mixer.window == 129 and large.blocks[34].mixer.window == 65
    assert 3.3e8 < sum(p.numel() for p in model.parameters()) < 4.0e8
    assert 1.2e9 < sum(p.numel() for p in large.parameters()) < 1.6e9


def test_a_checkpoint_with_prefixes_counters_and_one_copy_of_tied_weights_loads():
    torch.manual_seed(0)
    model, again = (BasedLM(21, 16, 3, 2, **SMALL).eval() for _ in range(2))
    state = model.state_dict()
    theirs = {"model.train_metrics.num-tokens.count": torch.zeros(()), "model.transformer.decay.decay": torch.zeros(2)}
    swap = {"norm": "norm1", "mlp_norm": "norm2"}
    for name, tensor in state.items():
        if name.startswith("blocks."):
            _, index, part, rest = name.split(".", 3)
            if part == "mixer" and index == "2" and rest[0] in "qkv":
                continue
            for ours, official in (("q_proj", "proj_q"), ("k_proj", "proj_k"), ("v_proj", "proj_v")):
                rest = rest.replace(ours, official)
            rest = rest.replace("o_proj", "out_proj").replace("conv.weight", "conv.conv.weight")
            theirs[f"model.transformer.layers.{index}.{swap.get(part, part)}.{rest}"] = tensor
    qkv = [state[f"blocks.2.mixer.{one}_proj.weight"] for one in "qkv"]
    theirs["model.transformer.layers.2.mixer.Wqkv.weight"] = torch.cat(qkv)
    theirs["model.transformer.ln_f.weight"] = state["norm.weight"]
    theirs["model.transformer.embeddings.word_embeddings.weight"] = state["embedding.weight"]
    regard.load_official(again, theirs)
    ids = torch.randint(21, (1, 9))
    assert torch.equal(again(ids), model(ids))


@pytest.mark.parametrize(
    "change, match",
    [
        ({"linear_layers": (5,)}, "linear_layers"),
        ({"window_layers": (1,)}, "window_layers"),
        ({"window_size": 0}, "window_size"),
        ({"hidden": 0}, "hidden"),
        ({"mlp_ratio": 2}, "option"),
    ],
)
def test_bad_input(change, match):
    with pytest.raises(ValueError, match=match):
        BasedLM(21, 16, 3, 2, **{**SMALL, **change})
    with pytest.raises(ValueError, match="name"):
        BasedLM.from_preset("7b")
