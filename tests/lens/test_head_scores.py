"""HeadScores: choosing heads, comparing tables, keeping them."""

import json

import pytest
import torch

from regard.lens import HeadScores


@pytest.fixture
def scores():
    runs = torch.rand(7, 5, 6, generator=torch.Generator().manual_seed(0))
    return HeadScores.from_runs(runs, "retrieval", {"model": "random"})


def test_best_heads(scores):
    order = sorted(((float(scores.scores[i, j]), -(6 * i + j)) for i in range(5) for j in range(6)), reverse=True)
    assert scores.ranking() == [divmod(-place, 6) for _, place in order]
    assert scores.top(3) == scores.ranking()[:3]
    assert (
        len(scores.top(0.1)) == 3 and len(scores.top(0.001)) == 1 and len(scores.top(1.0)) == 30 == len(scores.top(99))
    )
    assert scores.top(2, largest=False) == scores.ranking()[:-3:-1]
    assert scores.top(1)[0] == max(((i, j) for i in range(5) for j in range(6)), key=lambda head: scores[head])
    assert scores.above(0.5) == [head for head in scores.ranking() if scores[head] > 0.5]
    assert scores.share_above(0.5) == len(scores.above(0.5)) / 30
    assert scores.mask(scores.top(4)).sum() == 4 and scores.mask(scores.top(4))[scores.top(1)[0]]


def test_equal_scores_keep_their_order():
    assert HeadScores(torch.zeros(2, 2)).ranking() == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_heads_without_a_score_are_never_chosen():
    table = HeadScores(torch.tensor([[float("nan"), 0.5], [0.1, float("nan")]]))
    assert table.ranking() == [(0, 1), (1, 0)] and table.ranking(largest=False) == [(1, 0), (0, 1)]
    assert len(table.top(1.0)) == 2


def test_the_control_never_holds_an_excluded_head(scores):
    for seed in range(40):
        drawn = scores.random(10, exclude=12, seed=seed)
        assert len(set(drawn)) == 10 and not set(drawn) & set(scores.top(12))
    assert not set(scores.random(15)) & set(scores.top(15))  # by default the better half of a small model stays out
    banned = [(0, 0), [4, 5]]
    assert set(scores.random(28, exclude=banned)) == {divmod(i, 6) for i in range(30)} - {(0, 0), (4, 5)}
    assert (
        scores.random(4, exclude=0, seed=3)
        == scores.random(4, exclude=0, seed=3)
        != scores.random(4, exclude=0, seed=4)
    )
    with pytest.raises(ValueError, match="at most 2 heads"):
        scores.random(3, exclude=28)


def test_rank_correlation_and_overlap(scores):
    same = HeadScores(scores.scores * 3 + 1)
    assert scores.correlation(same) == pytest.approx(1.0) and scores.overlap(same, 0.2) == 1.0
    assert scores.correlation(HeadScores(-scores.scores)) == pytest.approx(-1.0)
    assert scores.overlap(HeadScores(-scores.scores), 15) == 0.0
    # Spearman's definition with ties: ranks 1, 2.5, 2.5, 4 against 1, 3, 2, 4
    first, second = HeadScores(torch.tensor([[1.0, 2.0, 2.0, 9.0]])), HeadScores(torch.tensor([[0.0, 5.0, 4.0, 7.0]]))
    assert first.correlation(second) == pytest.approx(4.5 / (4.5 * 5.0) ** 0.5)
    assert HeadScores(torch.ones(1, 4)).correlation(second) != HeadScores(torch.ones(1, 4)).correlation(second)  # NaN
    with pytest.raises(ValueError, match="shape"):
        scores.correlation(first)


def test_activation_frequency():
    runs = torch.tensor([[[0.0, 0.2]], [[0.0, 0.0]], [[float("nan"), 0.1]]])
    assert HeadScores.from_runs(runs).active().tolist() == [[0.0, pytest.approx(2 / 3)]]
    with pytest.raises(ValueError, match="runs"):
        HeadScores(torch.zeros(1, 2)).active()


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_saved_and_loaded_again(scores, tmp_path, suffix):
    path = tmp_path / f"scores{suffix}"
    scores.save(path)
    again = HeadScores.load(path)
    torch.testing.assert_close(again.scores, scores.scores, rtol=0, atol=0)
    torch.testing.assert_close(again.runs, scores.runs, rtol=0, atol=0, check_dtype=False)
    assert again.correlation(scores) == pytest.approx(1.0)
    if suffix == ".safetensors":
        assert (again.name, again.info) == (scores.name, scores.info)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_the_published_layout(tmp_path):
    path = tmp_path / "model.json"
    path.write_text(json.dumps({"0-0": [0.0, 0.5], "0-1": [1.0, 1.0], "1-0": [0.25], "1-1": []}) + "\n")
    table = HeadScores.load(path)
    assert table.scores[0].tolist() == [0.25, 1.0] and table[1, 0] == 0.25 and table.scores[1, 1].isnan()
    assert table.num_runs == 2 and table.name == "model" and table.top(1) == [(0, 1)]
    table.save(tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == json.loads(path.read_text())


@pytest.mark.parametrize("content", ["", "[1, 2]", "{}", '{"a-b": [1]}', '{"0-0": 3}', '{"0-0": ["x"]}'])
def test_files_that_are_no_scores(tmp_path, content):
    path = tmp_path / "broken.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="broken.json"):
        HeadScores.load(path)


def test_a_truncated_file_and_wrong_names(scores, tmp_path):
    path = tmp_path / "scores.safetensors"
    scores.save(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="scores.safetensors"):
        HeadScores.load(path)
    for call in (scores.save, HeadScores.load):
        with pytest.raises(ValueError, match="safetensors or .json"):
            call(tmp_path / "scores.pt")
    with pytest.raises(OSError):
        scores.save(tmp_path / "nowhere" / "scores.json")


def test_bad_tables():
    with pytest.raises(ValueError, match="scores"):
        HeadScores(torch.zeros(3))
    with pytest.raises(TypeError, match="scores"):
        HeadScores(torch.zeros(2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="runs"):
        HeadScores(torch.zeros(2, 2), torch.zeros(3, 2, 3))
