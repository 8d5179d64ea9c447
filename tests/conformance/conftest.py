"""`pytest tests/conformance [--vectors DIR]`: the conformance runner over our own vectors, or over any other folder."""

from pathlib import Path

import pytest

from regard.bench.conformance import find_checks


def pytest_addoption(parser):
    parser.addoption(
        "--vectors",
        metavar="DIR",
        help="a folder holding *.safetensors, targets.toml and adapters to run instead of ours",
    )


def pytest_generate_tests(metafunc):
    if "check" not in metafunc.fixturenames:
        return
    # Only known when this file was loaded at start-up, that is, when tests/conformance was named on the command line.
    folder = metafunc.config.getoption("--vectors", default=None) or Path(__file__).parent
    try:
        checks = find_checks(Path(folder))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    metafunc.parametrize("check", checks, ids=[check.name for check in checks])
