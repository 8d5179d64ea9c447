"""Letter heads: kinds on hand-made attention, and subspaces that keep or lose what they must."""

import pytest
import torch

import regard
from regard.lens import HeadScores, head_subspace, letter_heads, nodes_needed, value_weighted_attention
from regard.methods.edits import HeadSubspace, ProjectHead
from tiny import tiny_llama

LABELS = torch.tensor([[1, 3, 5]]).expand(6, -1)
RIGHT = torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.fixture(scope="module")
def model():
    model = tiny_llama(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() == 2 else 1)
    return model


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 128, (6, 8), generator=torch.Generator().manual_seed(4))


def made(rows):
    """(P, 1, 1, 8) shares from {place: share} a prompt; the rest on token 0."""
    read = torch.zeros(6, 1, 1, 8)
    for p, row in enumerate(rows):
        for place, share in row.items():
            read[p, 0, 0, place] = share
        read[p, 0, 0, 0] += 1 - sum(row.values())
    return 3.0 * read  # its size does not matter


def test_kinds():
    perfect = letter_heads(made([{int(LABELS[p, r]): 0.8} for p, r in enumerate(RIGHT)]), LABELS, RIGHT)
    assert perfect["correct letter"][0, 0] == pytest.approx(0.8)
    assert perfect["single letter"][0, 0] == pytest.approx(0.0, abs=1e-6) == perfect["uniform"][0, 0]
    single = letter_heads(made([{1: 0.9} if r == 0 else {} for r in RIGHT]), LABELS, RIGHT)
    assert single["single letter"][0, 0] == pytest.approx(0.9 - 0.3)
    always = letter_heads(made([{1: 0.9}] * 6), LABELS, RIGHT)
    assert always["correct letter"][0, 0] == pytest.approx(0.0, abs=1e-6)
    uniform = letter_heads(made([{1: 0.2, 3: 0.2, 5: 0.2, 7: 0.1}] * 6), LABELS, RIGHT)
    assert uniform["uniform"][0, 0] == pytest.approx(0.6) and uniform["correct letter"][0, 0] == pytest.approx(
        0, abs=1e-6
    )
    assert uniform["amplification"][0, 0] == pytest.approx(0.3)  # tokens 5, 6 and 7
    assert letter_heads(made([{7: 0.5}] * 6), LABELS, RIGHT, recent=1)["amplification"][0, 0] == pytest.approx(0.5)


def test_what_is_read(model, ids):
    read = value_weighted_attention(model, ids)
    assert read.shape == (6, 3, 4, 8)
    found = []
    with regard.attach(model) as session, torch.no_grad():
        session.observers.append(
            lambda call: found.append(call.weights()[:, :, -1] * call.v.repeat_interleave(2, 1).norm(dim=-1))
        )
        model(ids)
    torch.testing.assert_close(read, torch.stack(found, 1), rtol=1e-4, atol=1e-5)
    mask = torch.cat([torch.zeros(6, 2), torch.ones(6, 8)], 1).long()
    padded = value_weighted_attention(model, {"input_ids": torch.cat([ids[:, :2], ids], 1), "attention_mask": mask})
    torch.testing.assert_close(padded[..., 2:], read, rtol=1e-3, atol=1e-4)
    assert padded[..., :2].abs().max() == 0


def logits(model, ids, *methods):
    with regard.attach(model, *methods), torch.no_grad():
        return model(ids).logits


def test_full_rank_changes_nothing_and_lower_ranks_change_more(model, ids):
    plain = logits(model, ids)
    off = []
    for rank in (8, 4, 1, 0):
        some = [head_subspace(model, ids, LABELS, layer, head, rank) for layer, head in ((1, 0), (1, 3), (2, 1))]
        off.append(float((logits(model, ids, ProjectHead(some, LABELS, parts=("q", "k", "v"))) - plain).abs().max()))
    assert off[0] < 1e-3 * float(plain.abs().max()) < off[2] and off[1] < off[3]
    one = head_subspace(model, ids, LABELS, 2, 1, 2)
    edited = logits(model, ids, ProjectHead(one, LABELS))
    torch.testing.assert_close(edited[:, :-1], plain[:, :-1])  # the last token alone
    assert one.bases["q"].shape == (8, 2) and one.means["k"].shape == (3, 8) and one.means["q"].shape == (1, 8)
    torch.testing.assert_close(one.bases["k"].T @ one.bases["k"], torch.eye(2, dtype=torch.float64))
    assert 0 < one.explained["k"] <= 1


def test_scores_are_those_of_projected_queries_and_keys(model, ids):
    one = head_subspace(model, ids, LABELS, 1, 2, 2)
    seen = {}

    def observe(call):
        if call.layer == 1:
            seen["weights"], seen["q"], seen["k"] = call.weights(rows=[-1])[:, 2, 0], call.q[:, 2, -1:], call.k[:, 1]

    with regard.attach(model, ProjectHead(one, LABELS)) as session, torch.no_grad():
        session.observers.append(observe)
        model(ids)
    k = seen["k"].clone()
    scores = (seen["q"] @ k.mT)[:, 0] / 8**0.5
    at = LABELS[0]
    scores[:, at] = (one.project("q", seen["q"]) * one.project("k", k[:, at])).sum(-1) / 8**0.5
    torch.testing.assert_close(seen["weights"], scores.softmax(-1), rtol=1e-4, atol=1e-5)
    spread = one.coordinates("k", k[:, at].double())
    assert spread.shape == (6, 3, 2) and spread.mean(0).abs().max() < 1e-5


def test_values_in_few_dimensions(model, ids):
    """Rank 0 of the values reads the mean value at the labels, whoever is there."""
    one = head_subspace(model, ids, LABELS, 2, 1, 0)
    found = {}

    def look(name):
        def observe(call):
            if call.layer == 2:
                found[name] = (call.weights(rows=[-1])[:, 1, 0], call.v[:, 0].clone())

        return observe

    for name, method in (("plain", []), ("projected", [ProjectHead(one, LABELS, parts=("v",))])):
        with regard.attach(model, *method) as session, torch.no_grad():
            session.observers.append(look(name))
            model(ids)
    torch.testing.assert_close(found["plain"], found["projected"])  # weights stay
    call_out = []
    with regard.attach(model, ProjectHead(one, LABELS, parts=("v",))), torch.no_grad():
        o_proj = model.model.layers[2].self_attn.o_proj
        handle = o_proj.register_forward_pre_hook(lambda m, a: call_out.append(a[0][:, -1, 8:16]))
        model(ids)
        handle.remove()
    weights, v = found["plain"]
    v = v.clone()
    v[:, LABELS[0]] = one.means["v"].float()
    torch.testing.assert_close(call_out[0], (weights[:, None] @ v)[:, 0], rtol=1e-4, atol=1e-5)


def test_nodes_needed():
    heads = HeadScores(torch.tensor([[0.5, 0.2], [-0.1, 0.1]]))
    mlps = HeadScores(torch.tensor([[0.2], [0.0]]))
    assert nodes_needed({"heads": heads, "mlps": mlps}, 0.5) == 1  # of 1.0: what goes against the sum is left out
    assert nodes_needed({"heads": heads, "mlps": mlps}, 0.8) == 3
    assert nodes_needed({"heads": heads, "mlps": mlps}, 1.0) == 4
    assert nodes_needed({"heads": HeadScores(-heads.scores), "mlps": HeadScores(-mlps.scores)}, 0.6) == 2


def test_bad_input(model, ids):
    with pytest.raises(ValueError, match="layer, head"):
        head_subspace(model, ids, LABELS, 3, 0)
    with pytest.raises(ValueError, match="layer, head"):
        head_subspace(model, ids, LABELS, 0, 4)
    with pytest.raises(ValueError, match="rank"):
        head_subspace(model, ids, LABELS, 0, 0, rank=9)
    with pytest.raises(ValueError, match="labels"):
        head_subspace(model, ids, LABELS[:3], 0, 0)
    with pytest.raises(ValueError, match="two"):
        head_subspace(model, ids[:1], LABELS[:1], 0, 0)
    one = head_subspace(model, ids, LABELS, 1, 2, 2)
    with pytest.raises(ValueError, match="labels"):
        ProjectHead(one, LABELS[:, :2])
    with pytest.raises(TypeError, match="subspaces"):
        ProjectHead([3], LABELS)
    with pytest.raises(ValueError, match="parts"):
        ProjectHead(one, LABELS, parts=("o",))
    with pytest.raises(ValueError, match="batch"):
        logits(model, ids[:2], ProjectHead(one, LABELS))
    far = HeadSubspace(1, 9, one.means, one.bases, one.explained)
    with pytest.raises(ValueError, match="subspaces"):
        logits(model, ids, ProjectHead(far, LABELS))
    with pytest.raises(ValueError, match="right"):
        letter_heads(made([{}] * 6), LABELS, RIGHT + 1)
    with pytest.raises(ValueError, match="share"):
        nodes_needed({"heads": HeadScores(torch.ones(1, 1))}, 0.0)
