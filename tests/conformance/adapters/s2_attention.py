"""S2-Attention (DKernel): the block and token masks, and the merge of partial results."""

import torch

import regard
from regard import masks, ops

RENAMED = {
    "block_size": "block_size",
    "local_blocks": "local_blocks",
    "vert_stride": "stride",
    "homo_head": "homogeneous",
    "head_sliding_offset": "offset",
    "num_dense_heads": "dense_heads",
    "causal": "causal",
    "vert_position_type": "position",
}


def _mask(options):
    heads = options["num_heads"]
    kv_heads = options.get("num_kv_heads", heads)
    ours = {RENAMED[key]: value for key, value in options.items() if key in RENAMED}
    if isinstance(ours["local_blocks"], list):
        ours["local_blocks"] = tuple(ours["local_blocks"])
    return masks.head_sharded(kv_heads, group=heads // kv_heads, **ours)


def pattern(case):
    """Dense masks from `materialize`; block maps from the middle of each block as far as the sequence reaches; CSR from these."""
    out = {}
    for name, options in case.meta["official_kwargs"].items():
        mask, size = _mask(options), options["block_size"]
        length, past = options["seqlen"], options.get("past_len", 0)
        dense = mask.materialize(length - past, length, num_heads=options["num_heads"])[0]
        blocks = -(-length // size)
        last_rows = (
            torch.arange(-(-past // size), blocks)[:, None] * size + size - 1
        )  # the row that sees its whole diagonal block
        heads = torch.arange(dense.shape[0])[:, None, None]
        block = mask.keep(torch.zeros(1, 1, 1, dtype=torch.long), heads, last_rows, torch.arange(blocks) * size)
        out[f"dense.{name}"], out[f"block.{name}"] = dense, block.expand(dense.shape[0], -1, -1)
        crow = torch.cat([block.new_zeros(block.shape[0], 1, dtype=torch.long), block.sum(-1).cumsum(-1)], dim=1)
        columns = [row.nonzero()[:, 1] for row in block]
        out[f"crow.{name}"] = crow.int()
        out[f"col.{name}"] = torch.nn.utils.rnn.pad_sequence(columns, batch_first=True, padding_value=-1).int()
    options = case.meta["official_kwargs"]["rotating"]
    q, k, v = (case.inputs[name] for name in "qkv")
    out["attention"] = ops.attention(q, k, v, mask=_mask(options), scale=0.25)
    return out


def combine(case):
    outs = [case.inputs[f"o{i}"] for i in range(3)]
    return {"0": regard.ops.merge_lse(outs, [case.inputs[f"lse{i}"] for i in range(3)])[0]}
