"""HiP: the search alone. The authors list key offsets; a query block with fewer keys than the budget goes on counting upwards."""

import torch

from regard.ops.select import hierarchical_topk


def _find(q, k, budget, block_q, block_k, window, group, **options):
    """Their indices (N, query blocks, m) and ks (N, query blocks) from q, k (N, T, d)."""
    found = hierarchical_topk(q[:, None], k[:, None], budget, block_q, block_k, window, group, **options)
    counts = found.counts[:, 0]
    width = -(-budget // (block_k * group))
    indices = torch.nn.functional.pad(found.indices[:, 0], (0, width - found.indices.shape[-1]), value=-1)
    place = torch.arange(width)
    return torch.where(place < counts[..., None], indices, place) * found.block_k, counts


def group(case):
    x, options = case.inputs, case.meta["official_kwargs"]
    names = ("mask_k", "block_size_q", "block_size_k", "sliding_window_size", "block_size_k_group")
    indices, ks = _find(x["q"], x["k"], *(options[name] for name in names))
    return {"indices": indices, "ks": ks}


def search(case):
    out = {}
    for name, sizes in case.meta["official_kwargs"].items():
        best = "best" if sizes.get("oracle") else "first"
        arguments = (sizes[key] for key in ("mask_k", "bq", "bk", "window", "g"))
        q, k = case.inputs[f"q.{name}"], case.inputs[f"k.{name}"]
        out[f"indices.{name}"], out[f"ks.{name}"] = _find(q, k, *arguments, representative=best)
    return out


def first_version(case):
    """v1.0, one query at a time."""
    out = {}
    for length, budget in case.meta["official_kwargs"]["cases"]:
        q, k = case.inputs[f"q.{length}"], case.inputs[f"k.{length}"]
        found = hierarchical_topk(q[:, None, None], k[:, None], budget, 1, 1, 0, variant="paper")
        out[f"chosen.{length}"] = found.materialize()[:, 0, 0]
    return out


def options(case):
    """Two sifters, few query channels: which key blocks are chosen."""
    out = {}
    for name, given in case.meta["official_kwargs"].items():
        q, k = case.inputs[f"q.{name}"][:, None], case.inputs[f"k.{name}"][:, None]
        out[f"chosen.{name}"] = hierarchical_topk(q, k, **given).block_map()[:, 0].to(torch.uint8)
    return out
