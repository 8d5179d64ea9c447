"""DistCA: plans as sorted rows. The authors number the documents of `equal_flops` within each rank."""

import torch

from regard.scale import balance, pack_by_workload, place_documents, place_whole, water_filling
from regard.scale.tasks import count_pairs, tasks_of


def _rows(pieces, number=None):
    made = []
    for task in tasks_of(pieces):
        if number is None:
            made.append([task.doc, task.kv_len, task.q_len, task.home, task.server])
        else:
            made.append([task.home, number[task.doc], task.kv_len, task.q_len, task.server])
    return torch.tensor(sorted(made))


def _poured(batches):
    number = {}
    for batch in batches:
        number |= {len(number) + i: i for i in range(len(batch))}
    pieces = water_filling(batches)
    return pieces, _rows(pieces, number)


def equal_flops(case):
    pieces, rows = _poured([case.inputs[f"batch{i}"].tolist() for i in range(4)])
    load = [0] * 4
    for piece in pieces:
        load[piece.server] += sum(count_pairs(q, kv) for q, kv in piece.spans)
    return {"plan": rows, "load": torch.tensor(load)}


def planner(case):
    out = {}
    for name, given in case.meta["official_kwargs"].items():
        options = dict(given)
        budget, ranks, whole = (options.pop(key) for key in ("budget", "ranks", "whole"))
        if whole:
            placed = place_whole([case.inputs[f"doc_lens.{name}.{i}"].tolist() for i in range(ranks)])
        else:
            placed = place_documents(case.inputs[f"doc_lens.{name}"].tolist(), ranks, budget)
        planned = balance(placed, ranks, **options)
        load = [0] * ranks
        for piece in planned:
            load[piece.server] += piece.pairs
        out |= {f"placed.{name}": _rows(placed), f"planned.{name}": _rows(planned), f"load.{name}": torch.tensor(load)}
    return out


def baselines(case):
    out, kwargs = {}, case.meta["official_kwargs"]
    for name, ranks in kwargs["pour"].items():
        out[f"plan.{name}"] = _poured([case.inputs[f"batch.{name}.{i}"].tolist() for i in range(ranks)])[1]
    for name, given in kwargs["pack"].items():
        docs = case.inputs[f"docs.{name}"].tolist()
        placed = pack_by_workload(docs, given["ranks"], given["limit"], breakpoint=given["breakpoint"])
        for rank, numbers in enumerate(placed):
            out[f"pack.{name}.{rank}"] = torch.tensor([docs[doc] for doc in numbers])
    return out
