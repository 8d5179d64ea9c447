"""What a stranger gets: the licence, the commands, and nothing that ties them to one package index."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import regard

REPO = Path(__file__).parents[1]
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Spelt apart, so that this file does not name them either.
HOSTS = ["pypi" + ".org", "python" + "hosted.org", "download.py" + "torch.org", "ana" + "conda.org"]
HOSTS += ["npm" + "js.", "unp" + "kg.", "jsdel" + "ivr"]
ROOMS = ("src", "tests", "docs", "tools", "results", ".ci", ".github")
TEXT = {".py", ".md", ".toml", ".yml", ".yaml", ".sh", ".html", ".js", ".css", ".json", ""}


def project_text():
    """The text files of the repository; by name, since the machine need not have git."""
    files = [path for path in REPO.iterdir() if path.is_file()]
    files += [path for room in ROOMS for path in (REPO / room).rglob("*") if path.is_file()]
    return [path for path in files if path.suffix in TEXT]


def test_no_file_names_a_package_registry():
    pattern = re.compile("|".join(map(re.escape, HOSTS)))
    found = [
        str(path.relative_to(REPO))
        for path in project_text()
        if pattern.search(path.read_text(encoding="utf-8", errors="ignore"))
    ]
    assert not found


def test_version_is_said_once():
    assert PROJECT["version"] == regard.__version__
    done = subprocess.run([sys.executable, "-m", "regard.cli", "--version"], capture_output=True, text=True)
    assert done.stdout.strip() == f"regard {regard.__version__}"


def test_licence_is_apache_and_types_are_shipped():
    assert "Apache License" in (REPO / "LICENSE").read_text(encoding="utf-8")[:200]
    assert PROJECT["license"] == "Apache-2.0"
    assert (Path(regard.__file__).parent / "py.typed").is_file()


def test_core_needs_no_more_than_the_design_says():
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in PROJECT["dependencies"]}
    assert names == {"torch", "numpy", "einops", "safetensors", "typer", "rich"}
    assert {"llm", "vision", "diffusion", "lens", "bench", "scale", "all", "test"} <= set(
        PROJECT["optional-dependencies"]
    )


def test_scripts_are_sound():
    for script in (REPO / ".ci" / "run", *sorted((REPO / "tools").glob("*.sh"))):
        shell = "bash" if script.name == "run" else "sh"
        assert subprocess.run([shell, "-n", str(script)]).returncode == 0, script
    assert (REPO / ".ci" / "run").stat().st_mode & 0o111
    dry = subprocess.run(["make", "-n", "test", "demo"], cwd=REPO, capture_output=True, text=True)
    assert dry.returncode == 0 and "pytest" in dry.stdout and "regard compare" in dry.stdout
