"""`regard papers`: the table, one row in full, the filters, JSON, and what it says to names it does not know."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from regard.cli import app
from regard.papers import find_paper, load_catalog, search_papers


def papers(*arguments, columns=120):
    return CliRunner().invoke(app, ["papers", *arguments], env={"COLUMNS": str(columns)})


def as_json(*arguments):
    done = papers(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.output)


@pytest.mark.parametrize("columns", [100, 120])
def test_table_holds_all_196_rows_within_the_width(columns):
    done = papers(columns=columns)
    lines = done.output.splitlines()
    assert done.exit_code == 0
    assert max(map(len, lines)) <= columns
    assert [line[:3] for line in lines if line[:3].isdigit() and line[3] == " "][:196] == [p.id for p in load_catalog()]
    assert "196 papers" in done.output
    row = next(line for line in lines if line.startswith("129"))
    assert "ela" in row and "mixer" in row and "vision" in row


def test_json_of_all_rows_has_the_promised_fields():
    rows = as_json()
    assert len(rows) == 196
    for row in rows:
        assert {"id", "key", "family", "seam", "status", "verified", "measured"} <= set(row)
        assert isinstance(row["verified"], bool) and isinstance(row["measured"], bool)


def test_filters_narrow_and_combine():
    mask = as_json("--seam", "mask")
    assert mask and {row["seam"] for row in mask} == {"mask"}
    both = as_json("--seam", "mask", "--family", "vlm")
    assert [row["id"] for row in both] == [row["id"] for row in mask if row["family"] == "vlm"]
    assert all("probe" in row["kind"] for row in as_json("--kind", "probe"))
    works, planned = as_json("--status", "works"), as_json("--status", "planned")
    assert len(works) + len(planned) == 196
    assert [row["id"] for row in as_json("--status", "verified")] == [row["id"] for row in works if row["verified"]]
    assert [row["id"] for row in as_json("--status", "measured")] == [row["id"] for row in works if row["measured"]]


def test_free_text_needs_every_word_somewhere():
    assert (
        {row["id"] for row in as_json("lightning")}
        == {"051", "124"}
        == {row["id"] for row in as_json("--search", "lightning")}
    )
    assert [row["id"] for row in as_json("retrieval", "streaming")] == ["068"]
    assert as_json("--search", "zzz-nothing") == []
    assert "no paper matches" in papers("--search", "zzz-nothing").output


@pytest.mark.parametrize("name", ["004", "4", "moh", "MoH"])
def test_one_paper_by_id_key_and_name(name):
    assert as_json(name)["id"] == "004"
    done = papers(name)
    assert done.exit_code == 0 and "Mixture-of-Head" in done.output and "arXiv 2410.11842" in done.output


def test_planned_rows_say_that_there_is_nothing_to_use():
    paper = next(paper for paper in load_catalog() if paper.status == "planned")
    done = papers(paper.id)
    assert "not built yet" in done.output and "How to use it" not in done.output


def test_working_rows_show_what_how_verified_and_measured():
    for paper in load_catalog():
        if paper.status != "works":
            continue
        done = papers(paper.id)
        assert done.exit_code == 0, paper.id
        for heading in ("What it does", "How to use it", "Verified against", "Measured"):
            assert heading in done.output, f"{paper.id} lacks {heading}"
        assert paper.use.strip().splitlines()[0].strip() in done.output
        assert all(vector in done.output.replace("\n", "") for vector in paper.vectors)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["duoatention"], "unknown name 'duoatention'; did you mean 068 duoattention"),
        (["999"], "unknown name '999'"),
        (["qqqqq"], "`regard papers` lists all"),
        (["--seam", "mixr"], "seam: unknown value 'mixr'; did you mean mixer?"),
        (["--status", "done"], "status: unknown value 'done'; one of: planned, works, verified, measured"),
        (["--family", "x"], "family: unknown value"),
        (["--kind", "x"], "kind: unknown value"),
    ],
)
def test_unknown_names_and_values_list_the_near_ones(arguments, complaint):
    done = papers(*arguments)
    assert done.exit_code != 0 and complaint in str(done.exception)


def test_the_script_turns_errors_into_one_line():
    done = subprocess.run([sys.executable, "-m", "regard.cli", "papers", "duoatention"], capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: paper: unknown name 'duoatention'; did you mean 068 duoattention")


def test_from_python():
    assert find_paper("DuoAttention").id == "068"
    assert find_paper("68") is find_paper("duoattention")
    found = search_papers("efficient local attention", seam="mixer")
    assert "129" in [paper.id for paper in found] and all(paper.seam == "mixer" for paper in found)
    with pytest.raises(ValueError, match="paper: unknown name 'lightning'; did you mean 051"):
        find_paper("lightning")
