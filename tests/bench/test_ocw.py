"""Only Connect walls: reading and refusing, the card's scores, prompts and answers, clusters of equal size, made walls, the command."""

import itertools
import json

import pytest
import torch
from typer.testing import CliRunner

from regard.bench.ocw import (
    equal_kmeans,
    load_walls,
    made_walls,
    ocw_prompt,
    ocw_score,
    parse_connections,
    parse_wall,
    randomize_walls,
    score_connections,
    score_groups,
    solve_by_embeddings,
)
from regard.cli import app

GROUPS = [
    ["Ant", "Bee", "Wasp", "Fly"],
    ["Run", "Walk", "Jog", "Hop"],
    ["Red", "Blue", "Pink", "Tan"],
    ["Oak", "Elm", "Ash", "Fir"],
]


def record(number=1, groups=GROUPS):
    four = {
        f"group_{i + 1}": {"group_id": f"{number}-{i}", "gt_words": list(group), "gt_connection": f"kind {i}",
                           "human_performance": {"grouping": 1, "connection": 0}}
        for i, group in enumerate(groups)
    }  # fmt: skip
    words = [word for group in zip(*groups) for word in group]
    return {
        "wall_id": f"wall{number}", "season": 1, "episode": number, "words": words, "gt_connections": [f"kind {i}" for i in range(4)],
        "groups": four, "overall_human_performance": {"grouping": [1, 1, 0, 1], "connections": [0, 0, 1, 0]},
    }  # fmt: skip


def test_walls_come_from_files_lists_and_records(tmp_path):
    path = tmp_path / "test.json"
    path.write_text(json.dumps({"season_to_walls_map": {}, "dataset": [record(1), record(2)]}))
    walls = load_walls(path)
    assert [wall.wall_id for wall in walls] == ["wall1", "wall2"] and walls == load_walls([record(1), record(2)])
    assert walls[0].groups[1] == ("Run", "Walk", "Jog", "Hop") and walls[0].human_groups == (1, 1, 0, 1)


def test_what_is_no_wall_is_counted_and_told(tmp_path):
    broken = [
        record(1),
        {"wall_id": "x"},
        record(2, [*GROUPS[:3], ["Oak", "Elm"]]),
        record(3) | {"words": ["a"] * 16},
        5,
    ]
    with pytest.raises(ValueError, match=r"4 of 5 records are no walls, the first is record 2: no 'groups'"):
        load_walls(broken)
    assert len(load_walls(broken, malformed="skip")) == 1
    with pytest.raises(ValueError, match="no wall"):
        load_walls([])
    path = tmp_path / "x.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        load_walls(path)
    path.write_text('{"dataset": 3}')
    with pytest.raises(ValueError, match="a list of walls"):
        load_walls(path)
    with pytest.raises(FileNotFoundError, match="source"):
        load_walls(tmp_path / "no.json")


def swapped():
    made = [list(group) for group in GROUPS]
    made[0][0], made[1][0] = made[1][0], made[0][0]
    return made


@pytest.mark.parametrize(
    ("predicted", "groups", "ami", "ari", "fms", "wd"),
    [
        (GROUPS, 4, 1.0, 1.0, 1.0, 0.0),
        ([[word.upper() for word in group[::-1]] for group in GROUPS[::-1]], 4, 1.0, 1.0, 1.0, 0.0),
        (swapped(), 2, 0.71733, 0.6875, 0.75, 0.125),
        (list(zip(*GROUPS)), 0, -0.39369, -0.25, 0.0, 1.0),
        ([["Moth", "Bee", "Wasp", "Fly"], *GROUPS[1:]], 3, 0.92767, 0.91803, 0.93541, None),
        (None, 0, 0.0, 0.0, 0.0, 1.0),
    ],
)
def test_scores_of_the_card(predicted, groups, ami, ari, fms, wd):
    score = score_groups(predicted, GROUPS)
    assert score.correct_groups == groups and score.full_wall == (groups == 4)
    assert (score.ami, score.ari, score.fms) == pytest.approx((ami, ari, fms), abs=1e-5)
    if wd is not None:
        assert score.wd == pytest.approx(wd)


def test_a_random_partition_agrees_by_chance():
    flat = [word for group in GROUPS for word in group]
    chance = torch.Generator().manual_seed(0)
    scores = []
    for _ in range(150):
        mixed = [flat[i] for i in torch.randperm(16, generator=chance)]
        scores.append(score_groups([mixed[i : i + 4] for i in range(0, 16, 4)], GROUPS))
    assert abs(sum(score.ami for score in scores) / 150) < 0.05 and abs(sum(score.ari for score in scores) / 150) < 0.05


def test_reports_take_lists_mappings_and_records():
    walls = load_walls([record(1), record(2)])
    listed = ocw_score([GROUPS, swapped()], walls)
    assert (
        listed.total["correct_groups"] == 6
        and listed.total["full_wall"] == 1
        and listed.total["wd"] == pytest.approx(0.0625)
    )
    assert ocw_score({"wall2": swapped(), "wall1": GROUPS}, walls) == listed
    said = [
        {"wall_id": "wall1", "predicted_groups": GROUPS, "predicted_connections": ["Kind 0", "kind 1 ", "kind", ""]}
    ]
    report = ocw_score(said, walls)
    assert report.total["correct_groups"] == 4 and report.total["invented"] == 16
    assert report.total["exact_match"] == 0.25 and report.total["rouge1_f1"] == pytest.approx((1 + 1 + 2 / 3 + 0) / 8)
    assert (
        json.loads(json.dumps(report.as_dict()))["granular"][0]["wall_id"] == "wall1" and "| ami |" in report.markdown()
    )
    with pytest.raises(ValueError, match="ids of the walls"):
        ocw_score({"other": GROUPS}, walls)
    with pytest.raises(ValueError, match="one for each"):
        ocw_score([GROUPS], walls)


def test_connections_are_compared_without_case_and_with_a_function_of_ones_own():
    made = score_connections(
        [" Trees", "colours of the sea"], ["trees", "sea colours"], lambda a, b: [float(x == y) for x, y in zip(a, b)]
    )
    assert made["exact_match"] == 0.5 and made["similarity"] == 0.5
    assert made["rouge1_f1"] == pytest.approx((1 + 2 * 2 / 6) / 2)
    assert score_connections(None, ["x"])["exact_match"] == 0.0


def test_an_answer_as_asked_for_is_read_back():
    wall = load_walls([record()])[0]
    answer = "\n".join(f"Group {i + 1}: {', '.join(group)}. Connection: kind {i}" for i, group in enumerate(GROUPS))
    assert parse_wall(answer) == GROUPS and parse_connections(answer) == list(wall.connections)
    assert parse_wall("a, b\n\nc, d, e, f, g") == [["a", "b", "", ""], ["c", "d", "e", "f"], [""] * 4, [""] * 4]
    assert parse_connections("Connection: x\nnothing") == ["x", "", "", ""]


def test_prompts_show_clues_and_the_same_examples_but_not_the_answer():
    walls = load_walls([record(i, [[f"{word}{i}" for word in group] for group in GROUPS]) for i in range(6)])
    prompt = ocw_prompt(walls[0], walls[1:], 2)
    assert all(word in prompt for word in walls[0].words) and prompt.count("Example ") == 2
    assert ", ".join(walls[0].groups[0]) not in prompt and "Connection: kind 0" in prompt
    shown = [wall for wall in walls[1:] if wall.words[0] in prompt]
    assert len(shown) == 2 and all(
        wall.words[0] in ocw_prompt(walls[0], walls[1:], 2, task="connections") for wall in shown
    )
    assert "Example" not in ocw_prompt(walls[0]) and ", ".join(walls[0].groups[0]) in ocw_prompt(
        walls[0], task="connections"
    )
    with pytest.raises(ValueError, match="shots"):
        ocw_prompt(walls[0], walls[1:2], 3)


def test_randomised_walls_keep_the_first_group_and_take_others_once():
    walls, _ = made_walls(20)
    made = randomize_walls(walls)
    assert [wall.groups[0] for wall in made] == [wall.groups[0] for wall in walls]
    taken = [group for wall in made for group in wall.groups[1:]]
    assert len(set(taken)) == 60 and all(group not in {wall.groups[0] for wall in walls} for group in taken)
    assert all(len({word.split("g")[0] for word in wall.words}) == 4 for wall in made)
    assert randomize_walls(walls) == made != randomize_walls(walls, seed=1)
    with pytest.raises(ValueError, match="no group is left"):
        randomize_walls(walls[:3])


def test_equal_clusters_are_equal_and_best():
    torch.manual_seed(0)
    x = torch.randn(8, 3)
    labels = equal_kmeans(x, 2, starts=20)
    assert torch.bincount(labels).tolist() == [4, 4]

    def cost(rows):
        return sum(
            float((x[list(part)] - x[list(part)].mean(0)).square().sum()) for part in (rows, set(range(8)) - set(rows))
        )

    best = min(cost(rows) for rows in itertools.combinations(range(8), 4))
    assert cost((labels == 0).nonzero()[:, 0].tolist()) == pytest.approx(best, rel=1e-5)
    with pytest.raises(ValueError, match="multiple"):
        equal_kmeans(x, 3)


def test_clear_groups_are_solved_and_herrings_mislead():
    clear, vectors = made_walls(10, 0, spread=0.2)
    report = ocw_score(
        [solve_by_embeddings(wall, lambda words: torch.stack([vectors[w] for w in words])) for wall in clear], clear
    )
    assert report.total["full_wall"] == 10
    hard, vectors = made_walls(10, 5, spread=0.2)
    report = ocw_score(
        [solve_by_embeddings(wall, lambda words: torch.stack([vectors[w] for w in words])) for wall in hard], hard
    )
    assert report.total["full_wall"] < 10


def test_the_command_scores_files(tmp_path):
    walls, answers, out = tmp_path / "test.json", tmp_path / "said.json", tmp_path / "out.json"
    walls.write_text(json.dumps({"dataset": [record(1)]}))
    answers.write_text(json.dumps([{"wall_id": "wall1", "predicted_groups": swapped(), "predicted_connections": None}]))
    done = CliRunner().invoke(app, ["bench", "ocw", str(answers), "--walls", str(walls), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "correct_groups" in done.output and json.loads(out.read_text())["global"]["correct_groups"] == 2
    answers.write_text("[")
    assert CliRunner().invoke(app, ["bench", "ocw", str(answers), "--walls", str(walls)]).exit_code != 0
