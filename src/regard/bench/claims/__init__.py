"""Measured claims: for each of some papers a headline claim, measured small, beside its baseline, in one run.

One file a paper. Each has `PAPER`, `SLUG`, `SAYS` (what the paper claims, in our words) and `measure(scale) -> Outcome`. What comes
out is written to `results/NNN-slug.json` by `regard bench claims`; verdict and catalog line follow from the numbers.
"""

from __future__ import annotations

import importlib

from ..._checks import require_name
from .claim import Claim

MODULES = {
    "003": "c003_attention_at",
    "028": "c028_attention_vat",
    "004": "c004_moh",
    "005": "c005_landmark",
    "007": "c007_consciousness",
    "010": "c010_routing",
    "011": "c011_hip",
    "015": "c015_based",
    "016": "c016_retrieval_heads",
    "018": "c018_moa",
    "020": "c020_seer_attention",
    "021": "c021_sea",
    "023": "c023_dare",
    "025": "c025_vit_heads",
    "026": "c026_neighborhood",
    "030": "c030_hyper_attention",
    "032": "c032_look_m",
    "033": "c033_gaam",
    "037": "c037_dsf",
    "038": "c038_mas_former",
    "041": "c041_sink_lora",
    "042": "c042_s2_attention",
    "057": "c057_sca_pause",
    "051": "c051_transnormer_llm",
    "049": "c049_titans",
    "058": "c058_selective_attention",
    "062": "c062_mqsa_ted",
    "066": "c066_mote",
    "067": "c067_recycled_attention",
    "050": "c050_combiner",
    "054": "c054_lofit",
    "052": "c052_circuit_reuse",
    "068": "c068_duo_attention",
    "070": "c070_prflash",
    "074": "c074_gated_attention",
    "076": "c076_l2vit",
    "077": "c077_act",
    "078": "c078_kinetics",
    "079": "c079_fusemax",
    "080": "c080_adl",
    "081": "c081_zero_tuning",
    "083": "c083_deconstructed",
    "084": "c084_mala",
    "085": "c085_hedgehog",
    "087": "c087_inline",
    "088": "c088_attention_sink",
    "089": "..scale.claim",  # of a floor above: named, not imported
    "092": "c092_dhsa",
    "106": "c106_lamamba",
    "115": "c115_agent_attention",
    "124": "c124_lightning_attention",
    "125": "c125_cca",
    "127": "c127_shvit",
    "129": "c129_ela",
    "142": "c142_pointer_networks",
    "094": "c094_block_transformer",
    "122": "c122_cab",
    "146": "c146_key_driven",
    "149": "c149_fit",
    "168": "c168_flash_attention",
    "175": "c175_arithmetic_heads",
    "178": "c178_ocw",
    "176": "c176_letter_heads",
    "180": "c180_rat",
    "181": "c181_dma",
    "182": "c182_icl_multihead",
    "150": "c150_long_heads",
    "162": "c162_rcmha",
    "165": "c165_kenet",
    "166": "c166_pss_attention",
    "167": "c167_retrieval_attention",
    "194": "c194_context_awareness",
    "071": "c071_kant",
    "179": "c179_ptr",
    "177": "c177_attention_influence",
    "188": "c188_pgi",
    "189": "c189_largepig",
    "091": "c091_half_explanation",
    "190": "c190_querybandits",
}
"""Paper id -> module of this package."""


def get_claim(paper: str) -> Claim:
    """The claim of a paper, by its three-digit id. Raises a `ValueError` where none is measured."""
    module = importlib.import_module(f".{MODULES[require_name('paper', paper, MODULES)]}", __package__)
    return Claim(module.PAPER, module.SLUG, module.SAYS, module.measure)
