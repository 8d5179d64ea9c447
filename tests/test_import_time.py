"""`import regard` costs what `import torch` costs, and the command line answers before torch is even loaded."""

import json
import subprocess
import sys

import pytest

HEAVY = ("transformers", "timm", "diffusers", "torchvision", "matplotlib", "accelerate", "ray", "pandas")
FRONT_DOOR = (
    "import regard; regard.ops.attention; regard.nn.AgentAttention; regard.masks.causal; regard.Method; regard.attach"
)


def python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("imported", ["import regard", FRONT_DOOR])
def test_nothing_heavier_than_torch_is_imported(imported):
    """The names people build with come without the libraries that hold other people's models or draw pictures."""
    names = json.loads(python(f"{imported}\nimport sys, json; print(json.dumps(sorted(sys.modules)))"))
    assert not {name.split(".")[0] for name in names} & set(HEAVY)


def test_regard_takes_at_most_0_3_seconds_beyond_torch():
    """Measured in one process, after torch, so that torch's own time cancels; on a busy machine the best of five counts."""
    code = f"import torch, time; t = time.perf_counter(); {FRONT_DOOR}; print(time.perf_counter() - t)"
    seconds = []
    while not seconds or (min(seconds) > 0.3 and len(seconds) < 5):
        seconds.append(float(python(code)))
    assert min(seconds) <= 0.3, seconds


@pytest.mark.parametrize(
    "arguments", [["--help"], ["papers"], ["papers", "129"], ["compare", "--help"], ["look", "--help"]]
)
def test_the_command_line_answers_without_loading_torch(arguments):
    code = f"""
import sys
sys.argv = ["regard", *{arguments!r}]
from regard.cli import app
app(standalone_mode=False)
assert "torch" not in sys.modules and "transformers" not in sys.modules, "torch was loaded"
"""
    assert python(code)
