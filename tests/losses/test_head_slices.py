"""Tuning slices of heads: what is chosen moves, as it would in ordinary training; nothing else does, to the bit."""

import pytest
import torch

from regard.losses import HeadTuner, precise_sft, tune_heads
from regard.losses.runner import fingerprint
from tiny import CharTokenizer, tiny_llama


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    return GPT2LMHeadModel(GPT2Config(vocab_size=128, n_positions=64, n_embd=32, n_layer=3, n_head=4)).eval()


def neox():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(2)
    sizes = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    return GPTNeoXForCausalLM(GPTNeoXConfig(intermediate_size=48, max_position_embeddings=64, **sizes)).eval()


MODELS = {"llama": tiny_llama, "gpt2": gpt2, "neox": neox}
IDS = torch.randint(1, 128, (2, 9), generator=torch.Generator().manual_seed(3))


def loss_of(model):
    return lambda ids: model(ids, labels=ids).loss


def head_outputs(model, ids):
    """q-dependent outputs of each head, (L, B, H, N, D), and what each adds to the stream."""
    import regard

    found = []
    with regard.attach(model) as session, torch.no_grad():
        session.observers.append(lambda call: found.append(call.run()))
        model(ids)
    return torch.stack(found)


@pytest.mark.parametrize("name", MODELS)
def test_only_the_slices_move(name):
    model = MODELS[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    first = head_outputs(model, IDS)
    tuned = tune_heads(
        model, loss_of(model), [IDS], [(0, 1)], steps=3, lr=1e-2, weight_decay=0.3, roles="qo", progress=False
    )
    moved = {
        key: (before[key] != value) for key, value in model.state_dict().items() if not torch.equal(before[key], value)
    }
    assert all(".0." in key for key in moved)
    assert sum(int(mask.sum()) for mask in moved.values()) <= tuned.count
    assert 2 * 8 * 32 <= tuned.count <= 2 * 8 * 32 + 8  # q and o of one head (and q's bias)
    assert tuned.share == pytest.approx(tuned.count / sum(p.numel() for p in model.parameters()))
    after = head_outputs(model, IDS)
    others = [0, 2, 3]
    torch.testing.assert_close(
        first[0][:, others], after[0][:, others]
    )  # the other heads of the layer are what they were
    assert (first[0][:, 1] - after[0][:, 1]).abs().max() > 1e-5
    assert tuned.fitted.losses[-1] < tuned.fitted.losses[0]


def test_gradients_are_those_of_ordinary_training():
    model = tiny_llama()
    tuner = HeadTuner(model, [(1, 2), (1, 3), (2, 0)], mlps=[0])
    model.requires_grad_(False)
    with tuner.applied():
        loss_of(model)(IDS).backward()
    model.requires_grad_(True)
    loss_of(model)(IDS).backward()
    for (module, name), part in zip(tuner._sites, tuner.parts):
        wanted = getattr(module, name).grad.index_select(part.axis, part.index)
        torch.testing.assert_close(part.part.grad, wanted, rtol=1e-4, atol=1e-7)


def test_everything_chosen_is_ordinary_training_of_these_matrices():
    sliced, plain = tiny_llama(), tiny_llama()
    heads = [(layer, head) for layer in range(3) for head in range(4)]
    tune_heads(sliced, loss_of(sliced), [IDS], heads, mlps=range(3), steps=4, lr=1e-3, weight_decay=0.1, progress=False)
    wanted = [p for n, p in plain.named_parameters() if "self_attn" in n or "mlp" in n]
    optimizer = torch.optim.AdamW(wanted, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(4):
        plain.zero_grad()
        loss_of(plain)(IDS).backward()
        optimizer.step()
    for (name, mine), theirs in zip(sliced.named_parameters(), plain.parameters()):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6, msg=name)


def test_grouped_heads():
    model = tiny_llama()  # 4 query heads, 2 key heads

    def rows(heads, **options):
        tuner = HeadTuner(model, heads, **options)
        names = {id(module): name.rsplit(".", 1)[-1] for name, module in model.named_modules()}
        return {names[id(module)]: sorted(part.index.tolist()) for (module, _), part in zip(tuner._sites, tuner.parts)}

    assert set(rows([(0, 0)])) == {"q_proj", "o_proj"}
    assert rows([(0, 0)], grouped="shared")["k_proj"] == list(range(8))
    both = rows([(0, 2), (0, 3)])
    assert both["k_proj"] == both["v_proj"] == list(range(8, 16)) and both["q_proj"] == list(range(16, 32))
    with pytest.raises(ValueError, match="nothing to train"):
        HeadTuner(model, [(0, 0)], roles="kv")


def test_left_as_it_was_without_merge_and_after_errors():
    model = tiny_llama().train()
    marks = fingerprint(model)
    tuned = tune_heads(model, loss_of(model), [IDS], [(1, 1)], steps=2, lr=1e-2, merge=False, progress=False)
    assert fingerprint(model) == marks and model.training and all(p.requires_grad for p in model.parameters())
    model.eval()
    with torch.no_grad():
        own = model(IDS).logits
        with tuned.tuner.applied():
            during = model(IDS).logits
        tuned.tuner.merge()
        torch.testing.assert_close(model(IDS).logits, during)
    assert not torch.allclose(own, during)

    model = tiny_llama()
    marks = fingerprint(model)

    def fails(ids):
        raise KeyError("no")

    with pytest.raises(KeyError):
        tune_heads(model, fails, [IDS], [(1, 1)], steps=1, progress=False)
    assert fingerprint(model) == marks and all(p.requires_grad for p in model.parameters())

    def meddles(ids):
        with torch.no_grad():
            model.model.norm.weight.add_(1.0)
        return loss_of(model)(ids)

    with pytest.raises(RuntimeError, match=r"norm\.weight"):
        tune_heads(model, meddles, [IDS], [(1, 1)], steps=1, progress=False)


def test_resumed_training_gives_the_same_bits(tmp_path):
    def run(out, stop=None):
        model = tiny_llama()
        seen = []

        def loss(ids):
            seen.append(1)
            if stop is not None and len(seen) > stop:
                raise KeyboardInterrupt
            return loss_of(model)(ids)

        options = {"steps": 6, "lr": 1e-2, "save_every": 2, "out": out, "progress": False}
        try:
            tune_heads(model, loss, [IDS, IDS.flip(0)], [(1, 2)], **options)
        except KeyboardInterrupt:
            return None
        return fingerprint(model)

    whole = run(tmp_path / "whole.safetensors")
    assert run(tmp_path / "part.safetensors", stop=4) is None
    assert run(tmp_path / "part.safetensors") == whole


def test_precise_sft_learns_answers():
    model = tiny_llama(6)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # a head of this size can say something
    samples = [(f"{a}+{b}=", str(a + b)) for a in range(5) for b in range(5)]
    heads = [(layer, head) for layer in range(3) for head in (0, 1)]
    tuned = precise_sft(model, CharTokenizer(), samples, heads, mlps=range(3), steps=120, lr=3e-2, progress=False)
    assert sum(tuned.fitted.losses[-4:]) < 0.7 * sum(tuned.fitted.losses[:4])
    with pytest.raises(ValueError, match="samples"):
        precise_sft(model, CharTokenizer(), [], heads)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"heads": [(3, 0)]}, "heads"),
        ({"heads": [(0, 4)]}, "heads"),
        ({"heads": [(0, -1)]}, "heads"),
        ({"mlps": [3]}, "mlps"),
        ({}, "nothing to train"),
        ({"heads": [(0, 0)], "roles": "qx"}, "roles"),
        ({"heads": [(0, 0)], "grouped": "some"}, "grouped"),
    ],
)
def test_bad_choices(options, words):
    with pytest.raises(ValueError, match=words):
        HeadTuner(tiny_llama(), **options)
