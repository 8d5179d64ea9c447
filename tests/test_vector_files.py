"""What a vector file in this repository must be (docs/design.md, section 7), and that all it records is compared."""

from pathlib import Path

import pytest

from regard.bench.conformance import find_checks, read_vector, run_all, uncompared
from regard.papers import load_catalog

FOLDER = Path(__file__).parent / "conformance"
FILES = sorted((FOLDER / "vectors").glob("*"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_vector_file_is_small_and_says_where_it_comes_from(path):
    assert path.suffix == ".safetensors"
    assert path.stat().st_size <= 300_000
    meta = read_vector(path).meta
    missing = {"paper", "source", "official_kwargs", "call", "mode", "seed", "licence", "note"} - set(meta)
    assert not missing, f"metadata lacks {sorted(missing)}"
    assert path.name.startswith(meta["paper"] + "-")
    repo, _, rest = meta["source"].partition("@")
    assert repo.count("/") == 1 and ":" in rest, f"source {meta['source']!r} is not owner/repo@commit:path"


def test_every_vector_stands_in_the_catalog():
    listed = {vector for paper in load_catalog() for vector in paper.vectors}
    assert {path.name for path in FILES} == listed


def test_every_recorded_output_is_compared():
    assert uncompared(run_all(find_checks(FOLDER))) == {}
