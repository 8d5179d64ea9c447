"""Masked saliency, deletion, and cross-attention beside them."""

import pytest
import torch
from tests.tiny import tiny_llama

from regard.lens import deletion_curve, explain_speech, masked_saliency, random_masks
from regard.lens.deletion import area_under, explained_size, without_most_relevant
from regard.lens.masked_saliency_maps import deviation_normalized, grid_segments, heat_of
from regard.lens.speech_explanations import pooled_saliency


def whisper(seed=0):
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(seed)
    config = WhisperConfig(
        vocab_size=24, num_mel_bins=6, d_model=16, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_source_positions=10, max_target_positions=12,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config)


def test_grid_covers_all_with_about_as_many_segments():
    for shape, count in (((50, 8), 40), ((9, 7), 63), ((5, 1), 5), ((3, 4), 1), ((4, 4), 400)):
        grid = grid_segments(shape, count)
        numbers = grid.unique()
        assert grid.shape == shape and numbers.min() == 0
        assert abs(len(numbers) - min(count, shape[0] * shape[1])) <= 0.5 * count


def test_masks_leave_out_whole_segments():
    grid = grid_segments((8, 6), 12)
    masks = random_masks(grid, 200, 0.3, torch.Generator().manual_seed(0))
    for segment in grid.unique():
        part = masks[:, grid == segment]
        assert bool((part == part[:, :1]).all())
    assert float(masks.float().mean()) == pytest.approx(0.7, abs=0.05)
    assert bool(random_masks(grid, 3, 0.0).all()) and not bool(random_masks(grid, 3, 1.0).any())


def test_a_prediction_that_reads_one_cell_points_at_it():
    torch.manual_seed(0)
    x = torch.rand(6, 5) + 1

    def log_probs(rows):
        logits = torch.stack([rows[:, 2, 3] * 3, torch.zeros(len(rows))], -1)
        other = torch.stack([rows[:, 4, 0] * 3, torch.zeros(len(rows))], -1)
        return torch.stack([logits, other], 1).log_softmax(-1)

    cells = [torch.arange(30).view(6, 5)]
    for score in ("kl", "difference"):
        heat = masked_saliency(log_probs, x, cells, 400, score=score, target=torch.tensor([0, 0]), at_once=16)
        assert heat.shape == (2, 6, 5)
        assert divmod(int(heat[0].argmax()), 5) == (2, 3) and divmod(int(heat[1].argmax()), 5) == (4, 0)
    again = masked_saliency(log_probs, x, cells, 400, at_once=7)
    torch.testing.assert_close(again, masked_saliency(log_probs, x, cells, 400, at_once=7))


def test_nothing_left_out_or_nothing_moved_gives_zero():
    x = torch.rand(4, 3)
    still = lambda rows: torch.zeros(len(rows), 2, 5).log_softmax(-1)  # noqa: E731
    assert masked_saliency(still, x, [grid_segments((4, 3), 4)], 20).abs().max() == 0
    moving = lambda rows: torch.stack([rows.sum((1, 2)), rows.sum((1, 2)) * 0], -1)[:, None].log_softmax(-1)  # noqa: E731
    assert masked_saliency(moving, x, [grid_segments((4, 3), 4)], 20, p=0.0).abs().max() == 0
    assert heat_of(torch.ones(2, 3), torch.ones(2, 4, 5)).abs().max() == 0


def test_default_segments_and_progress():
    seen = []
    heat = masked_saliency(
        lambda rows: rows.mean((1, 2), keepdim=True).expand(-1, 2, 3).log_softmax(-1), torch.rand(20, 4), masks=9, at_once=2,
        on_batch=lambda done, of: seen.append((done, of)),
    )  # fmt: skip
    assert heat.shape == (2, 20, 4) and seen[-1] == (9, 9)


def test_normalised_rows_have_mean_zero_and_deviation_one():
    heat = deviation_normalized(torch.rand(3, 5, 4))
    torch.testing.assert_close(heat.mean((1, 2)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(heat.flatten(1).std(1), torch.ones(3))
    assert deviation_normalized(torch.ones(2, 3, 3)).abs().max() == 0
    assert deviation_normalized(torch.rand(4, 4, 1), causal=True)[0].abs().max() == 0  # one place has no deviation


def test_deletion_of_a_linear_model():
    torch.manual_seed(0)
    x, weight = torch.rand(5, 4), torch.randn(5, 4)
    score = lambda rows: float((rows * weight).sum())  # noqa: E731
    right, area = deletion_curve(score, x, x * weight)
    wrong, other = deletion_curve(score, x, -x * weight)
    assert right[0] == wrong[0] == pytest.approx(score(x)) and right[-1] == wrong[-1] == 0
    assert area < other
    assert torch.equal(without_most_relevant(x, x, 0), x)
    assert torch.equal(without_most_relevant(x, x, 100, "insertion"), x)
    assert area_under([1.0, 3.0], [0, 10]) == 20
    assert explained_size(torch.tensor([[[0.1], [0.9]], [[0.6], [0.4]]]), 0.5, causal=True) == (1, 3)


def test_explains_whisper():
    model = whisper().train()
    x = torch.randn(1, 6, 20)
    tokens = torch.tensor([[1, 5, 7, 2]])
    found = explain_speech(model, {"input_features": x}, tokens, masks=40, granularity=(200,), at_once=16)
    assert model.training
    assert found.cross.shape == (2, 2, 3, 10) and found.states.shape == (3, 10) and found.features.shape == (3, 20, 6)
    torch.testing.assert_close(found.cross.sum(-1), torch.ones(2, 2, 3))
    with torch.no_grad():
        model.eval().set_attn_implementation("eager")
        want = model(input_features=x, decoder_input_ids=tokens[:, :-1], output_attentions=True).cross_attentions
    torch.testing.assert_close(found.cross, torch.stack(want)[:, 0], rtol=1e-4, atol=1e-5)
    mean = torch.stack([found.attention([layer]) for layer in (0, 1)]).mean(0)
    torch.testing.assert_close(mean, found.attention())  # means commute
    table = found.heads("features")
    assert table.scores.shape == (2, 2)
    assert table[1, 0] == pytest.approx(found.agreement("features", [1], [0]))
    assert -1 <= found.agreement(kind="spearman") <= 1
    with pytest.raises(ValueError, match="beside"):
        explain_speech(model, {"input_features": x}, tokens, masks=4, features=False).agreement("features")


def test_generates_its_own_tokens():
    model = whisper()
    model.generation_config.max_length = 5
    found = explain_speech(model, {"input_features": torch.randn(1, 6, 20)}, masks=4, features=False)
    assert len(found.tokens) == found.states.shape[0] >= 1


def test_pooling_takes_the_largest():
    heat = torch.zeros(1, 6, 3)
    heat[0, 3, 2] = 5
    assert pooled_saliency(heat, 3).tolist() == [[0, 5, 0]]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: grid_segments((3,), 2), "shape"),
        (lambda: random_masks(torch.zeros(2, 2).long(), 1, 2.0), "p"),
        (lambda: masked_saliency(None, torch.zeros(2, 2), [torch.zeros(3, 2).long()]), "segments"),
        (lambda: masked_saliency(None, torch.zeros(2, 2), score="l2"), "score"),
        (lambda: without_most_relevant(torch.zeros(2), torch.zeros(3), 5), "heat"),
        (lambda: without_most_relevant(torch.zeros(2), torch.zeros(2), 101), "percent"),
        (lambda: area_under([1.0], [0]), "scores"),
        (
            lambda: explain_speech(tiny_llama(), {"input_features": torch.zeros(1, 6, 20)}),
            "model: got 'LlamaForCausalLM'",
        ),
        (lambda: explain_speech(whisper(), {"input_features": torch.zeros(2, 6, 20)}), "input_features"),
    ],
)
def test_bad_input(make, text):
    with pytest.raises(ValueError, match=text):
        make()
