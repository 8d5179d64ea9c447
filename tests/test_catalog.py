"""What the catalog says, held to what is on disk: a row cannot claim more than it has (docs/design.md, section 6)."""

import ast
import re
from pathlib import Path

import pytest

from regard.bench.conformance import find_checks, read_vector, resolve
from regard.papers import load_catalog

REPO = Path(__file__).parents[1]
CONFORMANCE = REPO / "tests" / "conformance"
ROWS = load_catalog()
CHECKS = find_checks(CONFORMANCE)
WORKS = [paper for paper in ROWS if paper.status == "works"]
# Snippets that run without fetching a model or an image; the others are held to their public names only.
ALONE = [paper for paper in WORKS if "regard.load(" not in paper.use]


def by_id(papers):
    return pytest.mark.parametrize("paper", papers, ids=[paper.id for paper in papers])


def test_all_196_rows_are_there_once_and_in_order():
    assert [paper.id for paper in ROWS] == [f"{number:03d}" for number in range(1, 197)]
    assert len({paper.key for paper in ROWS}) == 196


def test_rows_are_complete():
    for paper in ROWS:
        assert paper.name and paper.title and paper.kind, paper.id
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", paper.key), paper.key
        assert re.fullmatch(r"\d{4}\.\d{4,5}", paper.arxiv), f"{paper.id}: arXiv {paper.arxiv!r}"
        assert 2012 <= paper.year <= 2026, paper.id
        for code in filter(None, (paper.code, paper.code_other)):
            assert re.fullmatch(r"[\w.-]+/[\w.-]+(@[0-9a-f]{6,40})?", code), f"{paper.id}: code {code!r}"


def test_planned_rows_claim_nothing():
    for paper in ROWS:
        if paper.status == "planned":
            claims = (
                paper.exports,
                paper.vectors,
                paper.sources,
                paper.results,
                paper.outcome,
                paper.use,
                paper.summary,
            )
            assert not any(claims) and not paper.verified, f"{paper.id} is planned and claims something"


@by_id(WORKS)
def test_working_rows_name_public_documented_code(paper):
    assert paper.summary and paper.note and paper.docs and paper.use and paper.exports
    for name in paper.exports:
        assert name.startswith("regard."), name
        assert not any(part.startswith("_") for part in name.split(".")), f"{name} is not public"
        documented = resolve(name).__doc__
        assert documented and documented.strip(), f"{name} has no docstring"


@by_id(WORKS)
def test_working_rows_are_tested(paper):
    sources = [path.read_text(encoding="utf-8") for path in (REPO / "tests").rglob("*.py")]
    last_names = {name.rpartition(".")[2] for name in paper.exports}
    assert any(re.search(rf"\b{name}\b", source) for name in last_names for source in sources), (
        f"no test names {last_names}"
    )


@by_id(WORKS)
def test_snippets_use_names_that_exist(paper):
    tree = ast.parse(paper.use)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("regard."):
            dotted = ast.unparse(node)
            if re.fullmatch(r"regard(\.\w+)+", dotted):
                resolve(dotted)


@by_id(ALONE)
def test_snippets_run(paper):
    exec(compile(paper.use, f"use of {paper.id}", "exec"), {"__name__": "__main__"})


@by_id(ROWS)
def test_verified_exactly_when_vectors_with_targets_are_there(paper):
    described = {check.stem for check in CHECKS if not check.problem}
    for vector in paper.vectors:
        path = CONFORMANCE / "vectors" / vector
        assert path.is_file(), f"{paper.id} lists {vector}, which is not there"
        assert path.stem in described, f"{paper.id} lists {vector}, which no target describes"
    assert paper.verified == bool(paper.vectors), f"{paper.id}: verified is {paper.verified}, vectors {paper.vectors}"


@by_id([paper for paper in ROWS if paper.vectors])
def test_vectors_are_of_this_paper_and_sources_are_theirs(paper):
    metas = [read_vector(CONFORMANCE / "vectors" / vector).meta for vector in paper.vectors]
    assert [meta["paper"] for meta in metas] == [paper.id] * len(metas)
    assert list(paper.sources) == [meta["source"] for meta in metas]


def test_measured_exactly_when_results_and_their_outcome_are_there():
    for paper in ROWS:
        assert bool(paper.outcome) == bool(paper.results), (
            f"{paper.id}: results need an outcome in words, and the other way round"
        )
        for result in paper.results:
            path = REPO / result
            assert result.startswith("results/") and path.is_file(), f"{paper.id} lists {result}, which is not there"
            assert path.stat().st_size > 0, f"{result} is empty"
