"""What the tests of sparse methods share: a prompt, the same with left padding, and calls without a model."""

from __future__ import annotations

import torch
from torch import nn

from regard.methods.call import AttentionCall

LENGTH, PADDING = 90, 17


def prompt(length=LENGTH, seed=0):
    return torch.randint(1, 128, (1, length), generator=torch.Generator().manual_seed(seed))


def padded_batch(length=LENGTH, padding=PADDING):
    """Two prompts of different length in one batch: (ids, attention mask, the prompts alone)."""
    long, short = prompt(length), prompt(length - padding, seed=1)
    ids = torch.cat((long, torch.cat((torch.zeros(1, padding, dtype=torch.long), short), dim=1)))
    mask = (torch.arange(length) >= torch.tensor([[0], [padding]])).long()
    return ids, mask, [long, short]


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(ids, **kwargs).logits


def generated(model, ids, tokens=6, **kwargs):
    return model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, **kwargs)


def call(heads=4, kv_heads=2, rows=60, keys=60, dim=8, batch=1, padding=None, seed=0, **options):
    """An `AttentionCall` on random tensors, causal, with the mask of left-padded rows if `padding` (one number a row) is given."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, rows, dim, generator=generator)
    k = torch.randn(batch, kv_heads, keys, dim, generator=generator)
    v = torch.randn(batch, kv_heads, keys, dim, generator=generator)
    mask = None
    if padding is not None:
        t, j = torch.arange(rows)[:, None] + keys - rows, torch.arange(keys)
        mask = ((j <= t) & (j >= torch.tensor(padding).view(-1, 1, 1)))[:, None]
    return AttentionCall(nn.Identity(), 0, q, k, v, mask=mask, causal=mask is None, num_layers=1, **options)
