"""Measured claims: for each of some papers a headline claim, measured small, beside its baseline, in one run.

One file a paper. Each has `PAPER`, `SLUG`, `SAYS` (what the paper claims, in our words) and `measure(scale) -> Outcome`. What comes
out is written to `results/NNN-slug.json` by `regard bench claims`; verdict and catalog line follow from the numbers.
"""

from __future__ import annotations

import importlib

from ..._checks import require_name
from .claim import Claim

MODULES = {
    "004": "c004_moh",
    "011": "c011_hip",
    "016": "c016_retrieval_heads",
    "042": "c042_s2_attention",
    "068": "c068_duo_attention",
    "080": "c080_adl",
    "081": "c081_zero_tuning",
    "092": "c092_dhsa",
    "115": "c115_agent_attention",
    "124": "c124_lightning_attention",
    "127": "c127_shvit",
    "129": "c129_ela",
    "189": "c189_largepig",
}
"""Paper id -> module of this package."""


def get_claim(paper: str) -> Claim:
    """The claim of a paper, by its three-digit id. Raises a `ValueError` where none is measured."""
    module = importlib.import_module(f".{MODULES[require_name('paper', paper, MODULES)]}", __package__)
    return Claim(module.PAPER, module.SLUG, module.SAYS, module.measure)
