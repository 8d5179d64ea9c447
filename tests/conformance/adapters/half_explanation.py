"""Half explanation: SPES heat maps and their normalisations, deletion and insertion, area, size."""

import torch

from regard.lens.deletion import area_under, explained_size, without_most_relevant
from regard.lens.masked_saliency_maps import deviation_normalized, heat_of, moved_by, range_normalized


def heat(case):
    t = case.inputs
    out = {}
    for name, score in (("kl", "kl"), ("diff", "difference")):
        moved = moved_by(t["original"].log(), t["perturbed"].log(), score, t["target"])
        x = heat_of(moved, t["kept"])
        previous = heat_of(moved, t["kept_target"])
        previous = previous * torch.ones(previous.shape[:2]).tril()[..., None]
        out |= {f"{name}_x": x, f"{name}_t": previous}
        out |= {f"{name}_x_std": deviation_normalized(x), f"{name}_t_std": deviation_normalized(previous, causal=True)}
        out[f"{name}_x_range"], out[f"{name}_t_range"] = range_normalized(x, previous)
    return out


def metrics(case):
    t, args = case.inputs, case.args
    out = {}
    percents = [args["interval_size"] * i for i in range(args["num_intervals"])]
    for number in (0, 1):
        for mode in ("deletion", "insertion"):
            rows = [
                without_most_relevant(t[f"fbank_{number}"], t[f"heat_{number}"], percent, mode) for percent in percents
            ]
            out[f"{mode}_{number}"] = torch.stack(rows)
    out["auc"] = torch.tensor(area_under(t["scores"], percents), dtype=torch.float64)
    sizes = [
        [explained_size(t["size_fbank"], limit)[0], explained_size(t["size_tgt"], limit, causal=True)[0]]
        for limit in args["thresholds"]
    ]
    whole = [explained_size(t["size_fbank"], 0.0)[1], explained_size(t["size_tgt"], 0.0, causal=True)[1]]
    out["size"] = torch.tensor([*sizes, whole], dtype=torch.float64)
    return out
