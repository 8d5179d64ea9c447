"""Paper 062: the losses, the masked scores and the gradients of the whole network; hit rate and NDCG."""

import torch

import regard
from regard.losses import TransitionDistilledLoss, transition_counts, transition_distillation
from regard.testbeds.recommendation import rank_metrics


def network(case):
    kw, given = case.meta["official_kwargs"], case.inputs
    model = regard.models.MQSATED(
        kw["num_item"], kw["num_factor"], kw["num_head"], kw["num_block"], kw["max_len"],
        (1, kw["L"]), (kw["alpha"], 1 - kw["alpha"]), 0.5,
    ).eval()  # fmt: skip
    regard.load_official(model, case.params)
    if "sequences" in given:
        rows = given["sequences"].split(given["lengths"].tolist())
        counts = transition_counts(rows, kw["num_item"], case.args["time_span"])
        tails = counts.index_select(0, given["item_head"]).to_dense()
        assert torch.equal(tails, given["item_tail"])
    else:
        counts = torch.zeros(kw["num_item"], kw["num_item"])
        counts[given["item_head"]] = given["item_tail"]
        counts = counts.to_sparse()
    loss = TransitionDistilledLoss(counts, kw["lambda_kd"], kw["tau"], kw["l2_reg"])
    batch = given["input_seq"], given["pred_seq"]
    total = loss(model, batch)
    total.backward()
    heads = model.embed_items(given["item_head"])
    made = {
        "loss": total,
        "loss_rec": loss.parts(model, batch)["next"],
        "loss_kd": transition_distillation(heads, model.items, given["item_tail"], kw["tau"]),
        "test_logits": model.scores(given["input_seq"]) - 2**32 * given["input_u_mask"],
        "grad.item_embedding": model.items.grad,
        "grad.position_embedding": model.positions.grad,
        "grad.Variable_1": model.mixer.branches[1][0].query_norm.weight.grad,
    }
    made = {name: value.reshape(-1) if value.dim() == 0 else value for name, value in made.items()}
    recorded = "gradients" in case.meta["call"]
    return {name: value for name, value in made.items() if recorded or not name.startswith("grad.")}


def metrics(case):
    found = rank_metrics(case.inputs["scores"], case.inputs["target"], case.inputs["seen"].bool(), case.args["k"])
    return {
        name: torch.tensor([found[f"{name}@{k}"] for k in case.args["k"]], dtype=torch.float64)
        for name in ("hr", "ndcg")
    }
