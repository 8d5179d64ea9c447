"""Published attention algorithms as cascades of Einsums, and attention by any of them.

The taxonomy is FuseMax's (Nayak et al., 2024, arXiv 2406.10491): how many passes over the keys an algorithm needs decides what it has to
keep or read again. Ranks: p queries, m keys (m1 tiles of m0), e and f dims of keys and values. Scores are not scaled inside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .._checks import require_int, require_name
from .cascade_run import Trace, run_cascade
from .einsum_cascade import Cascade, parse_cascade

__all__ = ["CASCADES", "attention_cascade"]

_SCORES = "QK[m, p] += Q[e, p] * K[e, m]\n"
_TILED = "split m: m1, m0\nQK[m1, m0, p] += Q[e, p] * K[e, m1, m0]\nLM[m1, p] max= QK[m1, m0, p]\n"

_TEXTS = {
    "unsafe": (
        "softmax without its maximum, as a definition",
        _SCORES + "SN[m, p] = exp(QK[m, p])\nSD[p] += SN[m, p]\nA[m, p] = SN[m, p] / SD[p]\nAV[f, p] += A[m, p] * V[f, m]",
    ),
    "3-pass": (
        "numerically stable softmax as in PyTorch, TensorFlow and FLAT",
        _SCORES
        + """GM[p] max= QK[m, p]
        SN[m, p] = exp(QK[m, p] - GM[p])
        SD[p] += SN[m, p]
        A[m, p] = SN[m, p] / SD[p]
        AV[f, p] += A[m, p] * V[f, m]""",
    ),
    "3-pass, division last": (
        "the same with the division after the product with V, which saves a pass",
        _SCORES
        + """GM[p] max= QK[m, p]
        SN[m, p] = exp(QK[m, p] - GM[p])
        SD[p] += SN[m, p]
        SNV[f, p] += SN[m, p] * V[f, m]
        AV[f, p] = SNV[f, p] / SD[p]""",
    ),
    "2-pass": (
        "local maxima and sums of tiles corrected between the passes, as in TileFlow and Choi et al.",
        _TILED
        + """SLN[m1, m0, p] = exp(QK[m1, m0, p] - LM[m1, p])
        SLD[m1, p] += SLN[m1, m0, p]
        GM[p] max= LM[m1, p]
        PLM[m1, p] = exp(LM[m1, p] - GM[p])
        SD[p] += SLD[m1, p] * PLM[m1, p]
        A[m1, m0, p] = SLN[m1, m0, p] * PLM[m1, p] / SD[p]
        AV[f, p] += A[m1, m0, p] * V[f, m1, m0]""",
    ),
    "1-pass": (
        "FlashAttention-2, and FuseMax's choice: running maximum, sum and output, one division at the end",
        """split m: m1, m0
        RM[0, p] = -inf
        RD[0, p] = 0
        RNV[f, 0, p] = 0
        QK[m1, m0, p] += Q[e, p] * K[e, m1, m0]
        LM[m1, p] max= QK[m1, m0, p]
        RM[m1 + 1, p] = max(RM[m1, p], LM[m1, p])
        SLN[m1, m0, p] = exp(QK[m1, m0, p] - RM[m1 + 1, p])
        SLD[m1, p] += SLN[m1, m0, p]
        SLNV[f, m1, p] += SLN[m1, m0, p] * V[f, m1, m0]
        PRM[m1, p] = exp(RM[m1, p] - RM[m1 + 1, p])
        SPD[m1, p] = RD[m1, p] * PRM[m1, p]
        RD[m1 + 1, p] = SPD[m1, p] + SLD[m1, p]
        SPNV[f, m1, p] = RNV[f, m1, p] * PRM[m1, p]
        RNV[f, m1 + 1, p] = SPNV[f, m1, p] + SLNV[f, m1, p]
        AV[f, p] = RNV[f, M1, p] / RD[M1, p]""",
    ),
    "1-pass, normalized": (
        "FlashAttention: the running output is divided by the running sum at every tile",
        """split m: m1, m0
        RM[0, p] = -inf
        RD[0, p] = 0
        RO[f, 0, p] = 0
        QK[m1, m0, p] += Q[e, p] * K[e, m1, m0]
        LM[m1, p] max= QK[m1, m0, p]
        RM[m1 + 1, p] = max(RM[m1, p], LM[m1, p])
        SLN[m1, m0, p] = exp(QK[m1, m0, p] - RM[m1 + 1, p])
        SLD[m1, p] += SLN[m1, m0, p]
        SLNV[f, m1, p] += SLN[m1, m0, p] * V[f, m1, m0]
        PRM[m1, p] = exp(RM[m1, p] - RM[m1 + 1, p])
        SPD[m1, p] = RD[m1, p] * PRM[m1, p]
        RD[m1 + 1, p] = SPD[m1, p] + SLD[m1, p]
        RO[f, m1 + 1, p] = (RO[f, m1, p] * SPD[m1, p] + SLNV[f, m1, p]) / RD[m1 + 1, p]
        AV[f, p] = RO[f, M1, p] * 1""",
    ),
    "1-pass, parts": (
        "Rabe and Staats, and FlashDecoding: tiles by themselves, merged at the end by their maxima and sums",
        _TILED
        + """SLN[m1, m0, p] = exp(QK[m1, m0, p] - LM[m1, p])
        SLD[m1, p] += SLN[m1, m0, p]
        SLNV[f, m1, p] += SLN[m1, m0, p] * V[f, m1, m0]
        GM[p] max= LM[m1, p]
        PLM[m1, p] = exp(LM[m1, p] - GM[p])
        SD[p] += SLD[m1, p] * PLM[m1, p]
        SNV[f, p] += SLNV[f, m1, p] * PLM[m1, p]
        AV[f, p] = SNV[f, p] / SD[p]""",
    ),
}  # fmt: skip

CASCADES: dict[str, Cascade] = {name: parse_cascade(text, name, source) for name, (source, text) in _TEXTS.items()}
"""The algorithms by name."""

_BY_PASSES = {1: "1-pass", 2: "2-pass", 3: "3-pass"}


def attention_cascade(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    passes: int | None = None,
    cascade: str | Cascade = "1-pass",
    tile: int = 256,
    scale: float | None = None,
    return_trace: bool = False,
    watch: Callable[[str, Tensor], Any] | None = None,
) -> Tensor | tuple[Tensor, Trace]:
    """softmax(scale q k^T) v by a cascade of Einsums, executed as it is written, in the type of its inputs. Dense, no masks.

    Args:
        q: (..., N, D). k: (..., M, D). v: (..., M, Dv); equal leading axes.
        passes: 1, 2 or 3: FuseMax's representative with so many. Else `cascade`: a name in `CASCADES`, or a `Cascade` over inputs
            Q[e, p], K[e, m], V[f, m] (split or not) with output AV[f, p].
        tile: keys a tile. scale: default D ** -0.5. watch: called with the name and value of everything that is computed.
        return_trace: also a `Trace` of what was visited, kept and computed.

    Returns: (..., N, Dv).
    """
    if passes is not None:
        require_name("passes", str(passes), [str(count) for count in _BY_PASSES])
        cascade = _BY_PASSES[passes]
    chosen = CASCADES[require_name("cascade", cascade, CASCADES)] if isinstance(cascade, str) else cascade
    require_int("tile", tile, 1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    inputs = {"Q": (q * scale).mT, "K": k.mT, "V": v.mT}
    made, trace = run_cascade(chosen, inputs, rank="m", tile=tile, watch=watch)
    out = made["AV"].mT
    return (out, trace) if return_trace else out
