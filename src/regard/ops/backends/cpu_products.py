"""Which library multiplies float32 matrices while a blocked attention call runs.

torch sends float32 products to MKL, which uses half the vector width on CPUs that are not Intel's. oneDNN, also in torch, uses all
of it, but torch only asks it for float32 products where lower precision is permitted (`torch.backends.mkldnn.matmul.fp32_precision =
"bf16"`). On a CPU without matrix units oneDNN has nothing lower to offer and multiplies in float32 all the same, twice as fast.

So for the time of a call, and only where a test at first use finds products as exact as before, the permission is given. It is
process-wide, hence the counting: concurrent calls share it, the last one takes it back. `REGARD_CPU_PRODUCTS=torch` leaves
everything as torch has it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_lock = threading.Lock()
_inside = 0
_before = "none"


@contextlib.contextmanager
def fast_products(dtype: torch.dtype) -> Iterator[bool]:
    """oneDNN for float32 products inside the block, where that is known to be faster and as exact. Yields whether it is."""
    if dtype != torch.float32 or not onednn_is_better():
        yield False
        return
    global _inside, _before
    with _lock:
        if _inside == 0:
            _before = _precision().fp32_precision
            if _before in ("none", "ieee"):
                _precision().fp32_precision = "bf16"
        _inside += 1
    try:
        yield True
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _precision().fp32_precision = _before


@functools.cache
def onednn_is_better() -> bool:
    """Whether oneDNN's float32 products beat MKL's here, without losing a digit."""
    if os.environ.get("REGARD_CPU_PRODUCTS", "auto") == "torch":
        return False
    return _is_wide_but_not_intel() and _is_as_exact()


def _precision() -> Any:
    return torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


def _is_wide_but_not_intel() -> bool:
    """AVX-512 that MKL does not use, and no matrix units that would multiply in bfloat16."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkl.is_available():
        return False
    if not hasattr(torch.backends.mkldnn, "matmul") or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "AuthenticAMD" in info and "amx_tile" not in info


def _is_as_exact() -> bool:
    """Products of several shapes under the permission, against float64: errors as small as without it."""
    generator = torch.Generator().manual_seed(0)
    precision = _precision()
    before = precision.fp32_precision
    if before not in ("none", "ieee"):
        return False
    for n, r, d, w in ((2, 64, 64, 192), (1, 128, 64, 640), (3, 33, 80, 65), (8, 64, 128, 64)):
        a, b = (torch.randn(shape, generator=generator) for shape in ((n, r, d), (n, w, d)))
        exact = torch.bmm(a.double(), b.double().mT)
        plain = _worst(torch.bmm(a, b.mT), exact)
        try:
            precision.fp32_precision = "bf16"
            permitted = max(_worst(torch.bmm(a, b.mT), exact), _worst(torch.bmm(b, a.mT).mT, exact))
        finally:
            precision.fp32_precision = before
        if permitted > 4 * plain + 1e-6:
            return False
    return True


def _worst(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).abs().max() / exact.abs().max())
