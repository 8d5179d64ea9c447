"""What a public name means does not depend on which file was imported first."""

import subprocess
import sys

import pytest

import regard

PACKAGES = ("regard", "regard.ops", "regard.nn", "regard.models", "regard.methods", "regard.lens", "regard.losses")


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_file_and_function_of_one_name():
    code = (
        "import regard.ops.attention, regard.lens.retrieval_heads, regard.lens.record\nfrom regard import lens, ops\n"
    )
    result = run(code + "assert all(map(callable, (ops.attention, lens.retrieval_heads))), ops.attention")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_resolves(package):
    module = __import__(package, fromlist=["x"])
    for name in module.__all__:
        assert getattr(module, name) is not None


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'atention'"):
        regard.atention  # noqa: B018
