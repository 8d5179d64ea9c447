"""`fit_duo`: gates find the heads that need the past, the model keeps its bits, runs resume; passkeys are what they say."""

import pytest
import torch

import regard
from regard.losses import DuoGates, Passkeys, fit_duo
from regard.losses.runner import fingerprint
from regard.methods.caches import load_gates
from tiny import CharTokenizer, tiny_llama


def batches(length=48, count=4):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 128, (count, 1, length), generator=generator)
    labels = ids.clone()
    labels[..., : length // 2] = -100
    return [{"input_ids": one, "labels": two} for one, two in zip(ids, labels)]


SMALL = dict(data=batches(), sink=2, recent=4, progress=False)


def test_gates_of_one_are_the_teacher_and_only_the_penalty_pulls():
    model = tiny_llama()
    before = fingerprint(model)
    gates = fit_duo(model, steps=1, **SMALL)
    assert gates.fitted.losses == pytest.approx([0.05], abs=1e-7)  # no distance from the teacher
    assert fingerprint(model) == before and all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not model.training and gates.gates.shape == (3, 2)


def test_a_window_over_everything_makes_every_gate_equal():
    gates = fit_duo(tiny_llama(), steps=10, **(SMALL | {"recent": 64}))
    assert gates.gates.unique().numel() == 1 and float(gates.gates.detach().max()) < 1.0


@pytest.mark.parametrize("full_branch", ["teacher", "student"])
def test_the_head_that_reads_far_keeps_its_gate(full_branch):
    """Of two kv heads in the only layer, one has nothing to say: its gate falls, the other's stays above it."""
    model = tiny_llama(num_hidden_layers=1)
    with torch.no_grad():
        attention = model.model.layers[0].self_attn
        for name in ("q_proj", "k_proj"):
            getattr(attention, name).weight.mul_(12)  # sharp attention
        attention.v_proj.weight[:8].mul_(20)
        attention.v_proj.weight[8:] = 0  # kv head 1 is silent
    gates = fit_duo(model, steps=60, lr=0.05, full_branch=full_branch, **SMALL)
    loud, silent = gates.gates.detach()[0].tolist()
    assert silent < 0.05 and loud > silent + 0.3
    found = regard.DuoAttention(0.5, gates.gates.detach(), sink=2, recent=4)
    with regard.attach(model, found):
        assert model.generate(batches()[0]["input_ids"], max_new_tokens=3, do_sample=False).shape == (1, 51)


def test_the_two_branches_differ_as_the_paper_and_the_code_do():
    one, two = (
        fit_duo(tiny_llama(), steps=6, initial=0.5, full_branch=branch, **SMALL).fitted.losses
        for branch in ("teacher", "student")
    )
    assert one[0] != two[0]
    shallow = [
        fit_duo(tiny_llama(num_hidden_layers=1), steps=6, initial=0.5, full_branch=branch, **SMALL).fitted.losses
        for branch in ("teacher", "student")
    ]
    assert shallow[0] == pytest.approx(shallow[1], rel=1e-5)  # in the first layer both have the same hidden states


def test_it_resumes_to_the_same_bits(tmp_path):
    whole = fit_duo(tiny_llama(), steps=8, initial=0.6, **SMALL).gates.detach()

    class Killed(BaseException):
        pass

    def stops_at(number):
        if number >= 5 and alive:
            raise Killed
        return SMALL["data"][number % 4]

    alive = True
    options = SMALL | {"data": stops_at, "out": tmp_path / "gates.safetensors", "save_every": 2}
    with pytest.raises(Killed):
        fit_duo(tiny_llama(), steps=8, initial=0.6, **options)
    alive = False
    again = fit_duo(tiny_llama(), steps=8, initial=0.6, **options)
    assert again.fitted.resumed_at == 4 and torch.equal(again.gates.detach(), whole)
    path = again.save_tsv(tmp_path / "full_attention_heads.tsv")
    torch.testing.assert_close(load_gates(path), whole, rtol=0, atol=0)


def test_padding_on_the_right_does_not_count():
    one = SMALL["data"][0]
    more = {name: torch.nn.functional.pad(t, (0, 8), value=fill) for (name, t), fill in zip(one.items(), (0, -100))}
    more["attention_mask"] = (torch.arange(56) < 48).long()[None]
    losses = [
        fit_duo(tiny_llama(), steps=3, initial=0.5, **(SMALL | {"data": [given]})).fitted.losses
        for given in (one, more)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    left = {
        "input_ids": one["input_ids"],
        "labels": one["labels"],
        "attention_mask": (torch.arange(48) >= 3).long()[None],
    }
    with pytest.raises(ValueError, match="data: got left-padded rows"):
        fit_duo(tiny_llama(), steps=1, **(SMALL | {"data": [left]}))


def test_passkeys_are_hidden_and_asked_for():
    tokenizer = CharTokenizer()
    passkeys = Passkeys(
        tokenizer, max_length=1500, min_length=700, num_lengths=3, num_passkeys=3, passkey_words=4, seed=5
    )
    assert len(passkeys) == 3 and sorted(passkeys.lengths) == [700, 1100, 1500]
    lengths = set()
    for number in range(6):
        batch = passkeys(number)
        assert all(torch.equal(a, b) for a, b in zip(batch.values(), passkeys(number).values()))
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        lengths.add(len(ids))
        assert len(ids) % 16 == 0 and len(ids) <= 1500
        asked = labels >= 0
        first = int(asked.nonzero()[0])
        assert asked[first:].all() and torch.equal(labels[first:], ids[first:])
        book, questions = tokenizer.decode(ids[:first]), tokenizer.decode(ids[first:])
        for ordinal in ("first", "second", "third"):
            key = questions.split(f"{ordinal} passkey of the vault?\nPasskey: ")[1].split("\n\n")[0]
            assert len(key.split()) == 4 and f"the {ordinal} passkey of the vault: {key}\n\n" in book
    assert len(lengths) > 1
    assert not torch.equal(
        passkeys(0)["input_ids"],
        Passkeys(tokenizer, max_length=1500, min_length=700, seed=6, num_lengths=3, num_passkeys=3, passkey_words=4)(0)[
            "input_ids"
        ],
    )


def test_from_passkeys_to_gates():
    tokenizer = CharTokenizer()
    data = Passkeys(
        tokenizer, max_length=420, min_length=420, num_lengths=1, num_passkeys=1, passkey_words=2, reserve=0
    )
    gates = fit_duo(tiny_llama(), tokenizer, data, sink=4, recent=16, steps=3, progress=False)
    assert len(gates.fitted.losses) == 3 and bool(gates.gates.isfinite().all())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fit_duo(tiny_llama()), "tokenizer: got NoneType"),
        (lambda: fit_duo(tiny_llama(), full_branch="both", **SMALL), "full_branch: unknown name 'both'"),
        (lambda: fit_duo(tiny_llama(), gates=DuoGates(2, 2), **SMALL), "gates: got 'shape"),
        (lambda: fit_duo(tiny_llama(), initial=2.0, **SMALL), "initial: got 2.0"),
        (lambda: fit_duo(tiny_llama(), steps=1, **(SMALL | {"data": [torch.ones(1, 4)]})), "data: got Tensor"),
        (lambda: fit_duo(tiny_llama(), steps=1, **(SMALL | {"recent": 0})), "recent: got 0"),
        (lambda: Passkeys(CharTokenizer(), max_length=500, min_length=100), "max_length: got 500, need more than"),
        (lambda: Passkeys(CharTokenizer(), num_passkeys=21), "num_passkeys: got 21"),
        (lambda: Passkeys(CharTokenizer(), "short", max_length=40000), "text: got '5 tokens'"),
        (lambda: Passkeys(CharTokenizer(), depths=(0.5, 0.1)), r"depths: got \(0.5, 0.1\)"),
    ],
)
def test_bad_options_are_named(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
