"""Run by test_triton_attention.py in a process with TRITON_INTERPRET=1 (the flag must be set before triton is imported)."""

import pytest
import torch

from regard import masks, ops
from regard.ops import Selection

CASES = {
    "dense": None,
    "causal": masks.causal,
    "window": masks.sliding_window(20) & masks.causal,
    "sink": (masks.sliding_window(9) | masks.sink(3)) & masks.causal,
    "empty rows": masks.dense(torch.arange(70)[None, :] > torch.arange(45)[:, None] + 40),
    "per head": masks.per_head([masks.causal, masks.block(16), masks.causal, masks.sink(2)]),
    "padding": masks.padding(torch.tensor([13, 70])),
    "neighborhood": masks.neighborhood((7, 10), (3, 5), dilation=(1, 2), is_causal=(True, False), tile=(2, 4)),
    "intervals": masks.intervals(torch.arange(70) // 3 * 2 - 5, torch.arange(70) - 4),
}


def inputs(dtype=torch.float32, q_len=45, kv_len=70, num_kv_heads=2, head_dim=12, value_dim=20):
    torch.manual_seed(0)
    shapes = [(2, 4, q_len, head_dim), (2, num_kv_heads, kv_len, head_dim), (2, num_kv_heads, kv_len, value_dim)]
    return [torch.randn(s).to(dtype).requires_grad_() for s in shapes]


def compare(q, k, v, tolerance, **options):
    """Outputs, lse and all gradients (a gradient through the lse included) against float64 eager."""
    results = []
    for dtype, backend in ((q.dtype, "triton"), (torch.float64, "eager")):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
        out, lse = ops.attention(*leaves, return_lse=True, backend=backend, **options)
        finite = lse.masked_fill(lse == -torch.inf, 0.0)
        weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
        ((out.double() * weight).sum() + (finite.double() * 0.3).sum()).backward()
        results.append([out, lse, *(leaf.grad for leaf in leaves)])
    for name, got, want in zip(("out", "lse", "dq", "dk", "dv"), *results):
        torch.testing.assert_close(
            got.double(), want.double(), rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", CASES)
def test_masks(name):
    compare(*inputs(), 2e-5, mask=CASES[name])


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_selection_per_head(heads):
    q, k, v = inputs()
    torch.manual_seed(1)
    indices = torch.rand(1, heads, 3, 5).argsort(-1)[..., :2]
    selection = Selection(indices, block_q=16, block_k=16, q_len=45, kv_len=70)
    compare(q, k, v, 2e-5, selection=selection)
    compare(q, k, v, 2e-5, selection=selection, mask=masks.causal)


@pytest.mark.parametrize("dtype,tolerance", [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_half_types(dtype, tolerance):
    compare(*inputs(dtype), tolerance, mask=masks.causal)


@pytest.mark.parametrize("q_len,kv_len", [(1, 1), (1, 33), (64, 64), (65, 17)])
def test_lengths(q_len, kv_len):
    compare(*inputs(q_len=q_len, kv_len=kv_len, num_kv_heads=4), 2e-5, mask=masks.causal)


def test_forced_backend_says_why_it_cannot():
    q, k, v = inputs()
    with pytest.raises(ValueError, match=r"backend.*triton.*no dropout"):
        ops.attention(q, k, v, dropout=0.1, backend="triton")
