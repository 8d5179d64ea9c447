"""Conversion of a pretrained model: attention transfer, adapters, files, and what a killed run comes back to."""

import pytest
import torch

import regard
from regard.losses import attention_transfer_loss, fit_linear_maps, fit_lora, load_converted, next_token_loss
from regard.losses.runner import fingerprint
from regard.methods import linear_maps, load_linear_maps
from tiny import tiny_llama

DATA = [torch.randint(1, 128, (2, 24), generator=torch.Generator().manual_seed(i)) for i in range(4)]


def _sharp():
    """A small model whose attention is spiky: random weights alone attend to everything alike."""
    model = tiny_llama()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(12)
            layer.self_attn.k_proj.weight.mul_(12)
    return model


def test_the_loss():
    g = torch.Generator().manual_seed(0)
    a, b = (torch.rand(2, 3, 5, 5, generator=g).tril().clamp(min=0) for _ in range(2))
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    entropy = float(torch.special.entr(b).sum(-1).mean())
    assert float(attention_transfer_loss(b, b)) == pytest.approx(entropy, rel=1e-5)
    assert float(attention_transfer_loss(a, b)) > entropy
    y, t = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    both = attention_transfer_loss(a, b, y, t, xent=0.5, mse=3.0)
    torch.testing.assert_close(both, 0.5 * attention_transfer_loss(a, b) + 3 * (y - t).square().mean())
    rows = torch.ones(2, 5, dtype=torch.bool)
    rows[1] = False
    torch.testing.assert_close(attention_transfer_loss(a, b, rows=rows), attention_transfer_loss(a[:1], b[:1]))
    for change, names in (({"mse": 1.0}, "outputs"), ({"xent": 0.0}, "xent, mse")):
        with pytest.raises(ValueError, match=names):
            attention_transfer_loss(a, b, **change)
    with pytest.raises(ValueError, match="target: got"):
        attention_transfer_loss(a, b[:, :1])


def test_transfer_brings_the_maps_near_and_leaves_the_model_alone(tmp_path):
    model = _sharp()
    before = fingerprint(model)
    out = tmp_path / "maps.safetensors"
    maps = fit_linear_maps(model, DATA, steps=40, lr=0.03, out=out, progress=False)
    losses = maps.fitted.losses
    assert losses[-1] < 0.9 * losses[0]
    assert fingerprint(model) == before and not maps.training
    again = load_linear_maps(out)
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in maps.state_dict().items())

    def divergence(method):
        with torch.no_grad():
            want = model(DATA[0]).logits.log_softmax(-1)
            with regard.attach(model, method):
                got = model(DATA[0]).logits.log_softmax(-1)
        return float((want.exp() * (want - got)).sum(-1).mean())

    assert divergence(regard.Linearized(out)) < 0.8 * divergence(regard.Linearized(linear_maps(model)))


def test_padding_teaches_nothing():
    model, seen = _sharp(), []
    ids = DATA[0][:1]
    padded = torch.cat([torch.full((1, 6), 7), ids], 1)
    mask = (torch.arange(30) >= 6).long()[None]
    plain = {"input_ids": ids, "position_ids": torch.arange(24)[None]}
    given = {"input_ids": padded, "attention_mask": mask, "position_ids": (torch.arange(30) - 6).clamp(min=0)[None]}
    for batch in (plain, given):
        for mse in (0.0, 10.0):
            maps = linear_maps(model, "hedgehog")
            seen.append(fit_linear_maps(model, [batch], maps, steps=1, mse=mse, progress=False).fitted.losses[0])
    assert seen[0] == pytest.approx(seen[2], rel=1e-5) and seen[1] == pytest.approx(seen[3], rel=1e-5)
    assert seen[1] > seen[0]


def _dying(count):
    """Data that stops at the `count`-th batch that is asked for."""
    asked = 0

    def batch(number):
        nonlocal asked
        asked += 1
        if asked == count:
            raise KeyboardInterrupt
        return DATA[number % len(DATA)]

    return batch


def test_killed_runs_come_to_the_same_end(tmp_path):
    model = _sharp()
    options = {"steps": 6, "save_every": 2, "progress": False}
    whole = fit_linear_maps(model, DATA, linear_maps(model, "t2r", init="identity"), **options)
    out = tmp_path / "maps.safetensors"
    with pytest.raises(KeyboardInterrupt):
        fit_linear_maps(model, _dying(5), linear_maps(model, "t2r", init="identity"), out=out, **options)
    again = fit_linear_maps(model, DATA, linear_maps(model, "t2r", init="identity"), out=out, **options)
    assert again.fitted.resumed_at == 4 and again.fitted.losses == whole.fitted.losses
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in whole.state_dict().items())

    method, adapted = regard.Linearized(whole), tmp_path / "converted.safetensors"
    lora = {**options, "lr": 1e-2}
    peft = fit_lora(model, DATA, method, **lora)
    want = {name: t.clone() for name, t in peft.state_dict().items() if "lora" in name}
    model = peft.unload()
    with pytest.raises(KeyboardInterrupt):
        fit_lora(model, _dying(5), method, out=adapted, **lora)
    peft = fit_lora(_sharp(), DATA, method, out=adapted, **lora)
    assert peft.fitted.resumed_at == 4
    assert want and all(torch.equal(t, peft.state_dict()[name]) for name, t in want.items())


@pytest.mark.parametrize("train_maps", [False, True])
def test_adapters_help_and_their_file_is_enough(tmp_path, train_maps):
    model, out = _sharp(), tmp_path / "converted.safetensors"
    before = fingerprint(model)
    maps = linear_maps(model, "hedgehog")
    old = fingerprint(maps)
    method = regard.Linearized(maps)
    peft = fit_lora(model, DATA[:1], method, steps=12, lr=2e-2, train_maps=train_maps, out=out, progress=False)
    assert peft.fitted.losses[-1] < peft.fitted.losses[0]
    assert (fingerprint(maps) == old) is not train_maps
    assert all(p.requires_grad for p in maps.parameters()) and peft.fitted.steps == 12
    with regard.attach(peft, method), torch.no_grad():
        want = peft(DATA[1]).logits
    assert fingerprint(peft.unload()) == before
    fresh, loaded = load_converted(_sharp(), out)
    with regard.attach(fresh, loaded), torch.no_grad():
        torch.testing.assert_close(fresh(DATA[1]).logits, want)
        assert fresh.generate(input_ids=DATA[1][:, :4], max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (
            2,
            7,
        )


def test_plain_adapters_and_bad_input(tmp_path):
    model = tiny_llama()
    out = tmp_path / "lora.safetensors"
    peft = fit_lora(model, DATA, steps=2, rank=2, out=out, progress=False)
    _, method = load_converted(tiny_llama(), out)
    assert method is None
    with pytest.raises(ValueError, match=r"unload\(\)"):
        fit_lora(peft, DATA, steps=1)
    with pytest.raises(ValueError, match="nothing_like_it"):
        fit_lora(tiny_llama(), DATA, steps=1, targets=["nothing_like_it"])
    maps = tmp_path / "maps.safetensors"
    fit_linear_maps(tiny_llama(), DATA, steps=1, out=maps, progress=False)
    with pytest.raises(ValueError, match="no adapters"):
        load_converted(tiny_llama(), maps)
    with pytest.raises(ValueError, match="that is there"):
        load_converted(tiny_llama(), tmp_path / "nothing")


def test_padding_is_left_out_of_the_next_token_loss():
    model, ids = tiny_llama(), DATA[0][:1]
    mask = torch.ones_like(ids)
    mask[:, 20:] = 0
    torch.testing.assert_close(
        next_token_loss(model, {"input_ids": ids, "attention_mask": mask}), next_token_loss(model, ids[:, :20])
    )


def test_a_model_with_position_biases_is_refused():
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    model = GptOssForCausalLM(
        GptOssConfig(
            vocab_size=128, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            head_dim=8, num_local_experts=2, num_experts_per_tok=1, layer_types=["full_attention"], pad_token_id=0,
        )
    ).eval()  # fmt: skip
    with pytest.raises(regard.UnsupportedModelError, match="sink logits"):
        fit_linear_maps(model, DATA, steps=1, progress=False)
    with regard.attach(model, regard.Linearized(linear_maps(model))), pytest.raises(ValueError, match="sink logits"):
        model(DATA[0], use_cache=False)


def test_a_finetuned_classifier_is_converted_and_recovers():
    """Finetuned-conversion: a trained bidirectional model, maps taught on the task's data, then the whole model tuned again."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForSequenceClassification(BertConfig(vocab_size=20, num_labels=2, **sizes)).eval()
    ids = torch.randint(1, 20, (64, 8))
    labels = (ids == 5).any(1).long()

    def tune(steps):
        optimizer = torch.optim.Adam(model.parameters(), 5e-3)
        for _ in range(steps):
            loss = model(ids, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def right():
        with torch.no_grad():
            return float((model(ids).logits.argmax(-1) == labels).float().mean())

    tune(60)
    dense = right()
    run = lambda batch: model(batch)  # noqa: E731  (an encoder takes no `use_cache`)
    maps = fit_linear_maps(model, [ids], steps=30, lr=0.03, forward=run, progress=False)
    assert maps.fitted.losses[-1] < maps.fitted.losses[0]
    with regard.attach(model, regard.LinearizedEncoder(maps)):
        tune(30)
        assert right() >= dense - 0.05 > 0.7
