"""The Triton chunk kernels of linear attention, in Triton's interpreter (no GPU needed)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from regard.ops import linear_attention


def test_kernels_in_the_interpreter():
    cases = Path(__file__).with_name("triton_linear_cases.py")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(cases)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "passed" in run.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_gpu_the_error_says_what_is_needed():
    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(ValueError, match="needs a CUDA GPU"):
        linear_attention(q, q, q, backend="triton")


@pytest.mark.parametrize(
    "options",
    [
        {"form": "parallel"},
        {"form": "recurrent"},
        {"causal": False},
        {"log_decay": -torch.ones(1, 2, 4)},
        {"log_decay": -torch.ones(2).requires_grad_()},
    ],
)
def test_what_the_kernels_do_not_do_is_said(options):
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match="chunk form"):
        linear_attention(q, q, q, backend="triton", **options)
