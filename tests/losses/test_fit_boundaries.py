"""Training the boundary predictor beside a frozen model: it learns, resumes, survives padding; kept and loaded; bad input."""

import pytest
import torch

import regard
from regard.losses import boundary_labels, boundary_loss, boundary_metrics, fit_boundaries, score_boundaries
from regard.losses.runner import fingerprint
from regard.nn import BoundaryPredictor
from regard.ops.select import attention_mass_ratio
from tiny import tiny_llama


def batches(count=2, length=60):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, 128, (1, length), generator=generator) for _ in range(count)]


def predictor(seed=0, channels=16):
    torch.manual_seed(seed)
    return BoundaryPredictor(channels, hidden=16, heads=2)


def test_it_learns_and_the_model_stays(tmp_path):
    model, made = tiny_llama(), predictor()
    before = fingerprint(model)
    fitted = fit_boundaries(model, made, batches(), steps=12, lr=1e-2, beta=0.3, out=tmp_path / "p", progress=False)
    assert fitted.modules is made and fingerprint(model) == before
    assert sum(fitted.losses[-3:]) < 0.8 * sum(fitted.losses[:3])
    scores = score_boundaries(model, made, batches(1), k=10)
    assert set(scores) == {0, 1, 2} and all(0 <= value <= 1 for one in scores.values() for value in one.values())
    again = predictor()
    half = fit_boundaries(model, again, batches(), steps=12, lr=1e-2, beta=0.3, out=tmp_path / "p", progress=False)
    assert half.resumed_at == 12 and torch.equal(again.qkv.weight, made.qkv.weight)
    with regard.attach(model, regard.DHSA(budget=20, block_q=8, local=4, sink=2, predictor=made, theta=None)):
        assert torch.isfinite(model(batches(1)[0]).logits).all()


def test_the_loss_of_a_batch_is_the_sum_over_layers():
    """One step's loss, put together by hand from a record of the model's own attention."""
    model, made, ids = tiny_llama(), predictor(), batches(1)[0]
    record = regard.record(model, {"input_ids": ids}, keep="qkv")
    total = 0.0
    for layer in (0, 2):
        ratio = attention_mass_ratio(record.weights(layer))
        total += float(boundary_loss(made(record.calls["text", "self", layer].k), ratio.float()).detach())
    fitted = fit_boundaries(model, made, [ids], layers=[0, -1], steps=1, progress=False)
    assert fitted.losses[0] == pytest.approx(total, rel=1e-4)


def test_left_padding_has_no_part():
    model, ids = tiny_llama(), batches(1)[0]
    padded = torch.cat((torch.zeros(1, 9, dtype=torch.long), ids), 1)
    mask = (torch.arange(69) >= 9).long()[None]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    plain = fit_boundaries(model, predictor(), [{"input_ids": ids}], steps=1, progress=False)
    inputs = {"input_ids": padded, "attention_mask": mask, "position_ids": positions}
    assert fit_boundaries(model, predictor(), [inputs], steps=1, progress=False).losses[0] == pytest.approx(
        plain.losses[0], rel=1e-4
    )


def test_labels():
    ratio = torch.full((2, 30), 1.5)
    ratio[0, 12], ratio[1, 3] = 2.1, 9.0
    inner, targets = boundary_labels(ratio, start=torch.tensor([0, 5]))
    assert inner[0].nonzero()[[0, -1], 0].tolist() == [7, 21] and inner[1].nonzero()[0, 0] == 12
    assert (targets & inner).nonzero().tolist() == [[0, 12]]
    logits = torch.where(targets, 5.0, -5.0)
    assert boundary_metrics(logits, ratio, k=1)["f1"] == pytest.approx(1.0)
    assert boundary_metrics(-logits, ratio, k=1)["recall"] == 0.0
    assert boundary_metrics(torch.zeros(1, 4), torch.ones(1, 4))["overlap"] == 0.0
    assert boundary_loss(logits, ratio) < 1e-3 < boundary_loss(-logits, ratio)


def test_a_predictor_is_kept(tmp_path):
    made = BoundaryPredictor(12, window=3, hidden=7, heads=3, window_pool=True).eval()
    keys = torch.randn(1, 2, 40, 6)
    loaded = BoundaryPredictor.load(made.save(tmp_path / "sub" / "predictor.safetensors"))
    assert (loaded.window, loaded.heads, loaded.channels) == (3, 3, 12) and not loaded.training
    assert torch.equal(loaded(keys), made(keys))
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    (tmp_path / "text").write_text("no")
    for name in ("other", "text"):
        with pytest.raises(ValueError, match="path: .* is no file that BoundaryPredictor.save wrote"):
            BoundaryPredictor.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        BoundaryPredictor.load(tmp_path / "missing")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: boundary_loss(torch.zeros(1, 5), torch.ones(1, 6)), "logits: got"),
        (lambda: boundary_labels(torch.ones(6)), "ratio: got"),
        (lambda: boundary_metrics(torch.zeros(1, 5), torch.ones(1, 5), k=0), "k: got 0"),
        (lambda: fit_boundaries(tiny_llama(), predictor(channels=10), batches(), steps=1, progress=False), "k: got"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
