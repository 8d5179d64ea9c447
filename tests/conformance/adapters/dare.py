"""Paper 023: the whole click model in each form, its gradients, and the AUC of its evaluation."""

import torch

import regard
from regard.testbeds.recommendation import auc, grouped_auc

TABLES = {"DARE": "dare", "four_embedding": "four", "three_embedding": "three", "DIN": "din", "twin": "twin"}
NAMES = {
    "iid": "item", "cid": "category", "tid": "position", "hist_iid": "history_items", "hist_cid": "history_categories",
    "hist_tid": "history_positions", "mask": "mask",
}  # fmt: skip


def network(case):
    kw = case.meta["official_kwargs"]
    field = ("item", "category", "time")
    dims = tuple(kw[f"{name}_embedding_dim"] for name in field)
    narrow = [kw.get(f"attention_{name}_embedding_dim", -1) for name in field]
    tables = TABLES.get(kw["model_name"])
    if tables is None:
        tables = "projection" if kw["mlp_position_after_concat"] else "projection_by_field"
    rows = case.params["time_id_embedding_layer_for_attention_of_target.weight"].shape[0]
    model = regard.models.DARE(
        kw["item_n"], kw["cate_n"], dims, None if max(narrow) < 0 else tuple(narrow), tables=tables,
        positions=kw.get("use_time_mode", "concat") if kw["use_time"] else None, num_positions=rows,
        search="soft" if kw["soft_search"] else "hard", top_k=kw["top_k"], product=kw["use_cross_feature"],
        only_product=kw.get("only_odot", False), average=kw["use_long_seq_average"], aux=kw["use_aux_loss"],
        hidden=(kw["main_mlp_hidden_1"], kw["main_mlp_hidden_2"]),
    )  # fmt: skip
    regard.load_official(model, case.params)
    model.train(case.meta["mode"] == "train")
    batch = {ours: case.inputs[theirs] for theirs, ours in NAMES.items()}
    made = model(batch | {"label": case.inputs["target"][:, 0]})
    found = {"p": made.p, "loss": made.loss.reshape(1)}
    if made.aux_loss is not None:
        found["aux_loss"] = made.aux_loss.reshape(1)
    if not model.training:
        return found | {"scores": made.attended.scores, "representation": made.features}
    made.loss.backward()
    for kind in ("attention", "representation"):
        for theirs, ours in (("item", "item"), ("category", "category"), ("time", "position")):
            found[f"grad.{kind}.{theirs}"] = getattr(model.tables[f"{kind}_target"], ours).weight.grad
    state = model.state_dict()
    for ours, theirs in (("head", "main_mlp"), ("aux_head", "auxiliary_mlp")):
        for name in ("running_mean", "running_var"):
            found[f"after.{theirs}.0.{name}"] = state[f"{ours}.0.{name}"]
    return found


def areas(case):
    given = case.inputs
    return {
        "auc": torch.tensor([auc(given["scores"], given["labels"], variant="released")], dtype=torch.float64),
        "gauc": torch.tensor(
            [grouped_auc(given["scores"], given["labels"], given["groups"], variant="released")], dtype=torch.float64
        ),
    }
