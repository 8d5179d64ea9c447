"""What the documentation says is what the code has."""

import re
from pathlib import Path

import pytest

import regard
from regard.papers.catalog import load_catalog
from regard.papers.markdown import page

ROOT = Path(__file__).parents[1]


def test_papers_page_is_the_catalog():
    assert (ROOT / "docs/papers.md").read_text() == page(load_catalog()), (
        "run: regard papers --markdown > docs/papers.md"
    )


@pytest.mark.parametrize("file", ["README.md", "docs/design.md", "docs/contracts.md", "CONTRIBUTING.md"])
def test_names_in_prose_exist(file):
    """Every `regard.x.y` that a page names resolves, and every path it names is there."""
    text = (ROOT / file).read_text()
    for dotted in sorted(set(re.findall(r"\bregard((?:\.[A-Za-z_]\w*)+)", text))):
        value = regard
        for name in dotted.strip(".").split("."):
            if name in ("py", "html", "json"):
                break
            assert hasattr(value, name), f"{file}: regard{dotted}"
            value = getattr(value, name)
    for path in re.findall(r"`((?:src|tests|docs|results|tools)/[\w./-]+\w)`", text):
        assert (ROOT / path).exists(), f"{file}: {path}"


def test_readme_picture_is_there():
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / path).stat().st_size > 1000
