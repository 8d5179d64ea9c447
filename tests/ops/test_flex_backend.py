"""FlexAttention over our plans: what it refuses, that a BlockMask says what the plan says, and (slow, it compiles C++) its numbers."""

import pytest
import torch

from regard import masks, ops, scores
from regard.ops import Selection, make_plan
from regard.ops.backends import flex


def inputs(q_len=200, kv_len=300, dtype=torch.float32, **options):
    torch.manual_seed(0)
    shapes = [(2, 4, q_len, 32), (2, 2, kv_len, 32), (2, 2, kv_len, 32)]
    return [torch.randn(shape, dtype=dtype, **options) for shape in shapes]


REFUSED = [
    (inputs(dtype=torch.float64), {}, "float32, float16 or bfloat16, not torch.float64"),
    (inputs(requires_grad=True), {}, "no backward on the cpu"),
    (inputs(), {"return_lse": True}, "does not return the log-sum-exp on the cpu"),
    (inputs(), {"dropout": 0.1}, "no dropout"),
    (inputs(q_len=0), {}, "empty"),
    (
        inputs(),
        {"selection": Selection(torch.zeros(1, 1, 13, 1).long(), block_q=16, block_k=16, q_len=200, kv_len=300)},
        "multiples of 64, not (16, 16)",
    ),
]


@pytest.mark.parametrize("tensors, options, message", REFUSED, ids=[message for _, _, message in REFUSED])
def test_refuses_with_a_reason(tensors, options, message):
    with pytest.raises(ValueError, match="backend: got 'flex', need another backend") as caught:
        ops.attention(*tensors, backend="flex", **options)
    assert message in str(caught.value)


def test_without_a_compiler(monkeypatch):
    monkeypatch.setattr(flex.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="no compiler"):
        ops.attention(*inputs(), backend="flex")
    assert "not on" in (flex.compiler_missing("mps") or "")


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize(
    "mask",
    [
        masks.causal,
        masks.padding(torch.tensor([90, 300])) & masks.sliding_window(70),
        masks.document(torch.arange(300) // 50),
    ],
    ids=repr,
)
def test_a_block_mask_says_what_the_plan_says(mask, heads):
    generator = torch.Generator().manual_seed(heads)
    kept = torch.rand(1, heads, 4, 5, generator=generator) < 0.6
    selection = Selection.from_block_map(kept, block_q=64, block_k=64, q_len=200, kv_len=300)
    plan = make_plan(mask, selection, batch=2, num_heads=4, num_kv_heads=2, q_len=200, kv_len=300, q_offset=100)
    block_mask = flex.block_mask_of(plan, 2, 4)
    said = torch.zeros(2, 4, 4 * 64, 5 * 64, dtype=torch.bool)
    b, h, q, kv = masks.index_grid(2, 4, 4 * 64, 5 * 64, 0, None)
    looked_up = block_mask.mask_mod(b, h, q, kv).expand(2, 4, -1, -1)
    for counts, indices, full in (
        (block_mask.kv_num_blocks, block_mask.kv_indices, False),
        (block_mask.full_kv_num_blocks, block_mask.full_kv_indices, True),
    ):
        counts, indices = counts.expand(2, 4, -1), indices.expand(2, 4, -1, -1)
        for batch, head, i in (counts > 0).nonzero().tolist():
            for j in indices[batch, head, i, : counts[batch, head, i]].tolist():
                part = (batch, head, slice(64 * i, 64 * i + 64), slice(64 * j, 64 * j + 64))
                assert not said[part].any(), "a block twice"
                said[part] = True if full else looked_up[part]
    chosen = selection.materialize()
    chosen = chosen if heads != 2 else chosen.repeat_interleave(2, dim=1)
    want = mask.materialize(200, 300, batch=2, num_heads=4) & chosen
    assert torch.equal(said[:, :, :200, :300], want.expand(2, 4, 200, 300))


@pytest.mark.slow
def test_masks_gqa_offsets_and_empty_rows():
    """One compiled kernel serves masks that are not traceable together: the second call compiles nothing."""
    tensors = inputs()
    ids = torch.arange(300) // 70
    # two masks with tiles of the same number and shape
    for mask, offset in ((masks.sliding_window(40) & masks.causal, -30), (masks.document(ids) & masks.causal, None)):
        out = ops.attention(*tensors, mask=mask, q_offset=offset, backend="flex")
        want = ops.attention(*tensors, mask=mask, q_offset=offset, backend="eager")
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    rows = ops.attention(*tensors, mask=masks.causal, q_offset=-30, backend="flex")[:, :, :30]
    assert (rows == 0).all()


@pytest.mark.slow
def test_score_mod_bias_and_selection():
    tensors = inputs()
    bias = torch.randn(4, 1, 300)
    selection = Selection.from_block_map(torch.rand(2, 2, 4, 5) < 0.5, block_q=64, block_k=64, q_len=200, kv_len=300)
    options = dict(mask=masks.causal, bias=bias, selection=selection, score_mod=scores.alibi(4) >> scores.soft_cap(3.0))
    out = ops.attention(*tensors, backend="flex", **options)
    torch.testing.assert_close(out, ops.attention(*tensors, backend="eager", **options), rtol=1e-5, atol=1e-5)
