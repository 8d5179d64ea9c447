"""PTR: rows of the authors' encoder and packing; their records are ids."""

import torch

from regard.losses import ThoughtMaskCollator


class Ids:
    def __init__(self, args):
        self.bos_token_id = args["bos"] if args["add_bos"] else None
        self.eos_token_id, self.pad_token_id = args["eos"], args["pad"]


def _rows(batch, width, pad):
    short = width - batch["input_ids"].shape[1]
    ids = torch.nn.functional.pad(batch["input_ids"], (0, short), value=pad)
    labels = torch.nn.functional.pad(batch["labels"], (0, short), value=-100)
    return ids, labels


def rows(case):
    args = case.args
    most, records = args["max_length"], args["records"]
    single = ThoughtMaskCollator(Ids(args), max_length=most)
    packed = ThoughtMaskCollator(Ids(args), pack=most)
    out = dict(zip(("single_ids", "single_labels"), _rows(single(records), most, args["pad"])))
    out |= dict(zip(("packed_ids", "packed_labels"), _rows(packed(records), most, args["pad"])))
    out["token_counts"] = torch.tensor([len(single.encode(record)[0]) for record in records])
    return out
