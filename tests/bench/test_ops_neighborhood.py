"""`regard bench ops --only neighborhood`: what is timed beside what. No test asserts a time."""

import pytest
import torch

from regard.bench import ops, ops_neighborhood
from regard.bench.ops import Setting

TINY = Setting(seq_len=256, num_heads=2, head_dim=8, rounds=2, flex=False)


def test_rows_are_compared_pass_by_pass():
    rows = {(row.what, row.pass_): row for row in ops.measure(TINY, "neighborhood")}
    own = "neighborhood 5x5, 16x16 tokens"
    assert set(rows) == {(what, which) for what in (ops_neighborhood.DENSE, own) for which in ops._PASSES}
    forward, both = (rows[own, which] for which in ops._PASSES)
    assert (
        forward.backend == "tiled"
        and forward.target_ratio == 5.0
        and forward.peers == {"FlexAttention": "not asked for"}
    )
    assert forward.ideal == pytest.approx(256 / 25) and both.ratio.median > 0 and both.target_ratio is None
    assert forward.share.median == pytest.approx(forward.ratio.median / forward.ideal)


def test_the_peer_has_the_same_mask():
    pytest.importorskip("torch.nn.attention.flex_attention")
    from torch.nn.attention import flex_attention as flex

    seen = {}

    def eager(q, k, v, block_mask):
        seen["mask"] = flex.create_mask(block_mask.mask_mod, None, None, 256, 256, device="cpu")
        return q

    inputs = torch.randn(3, 1, 16, 16, 2, 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda *a, **b: eager)
        patch.setattr("regard.ops.backends.flex.compiler_missing", lambda device: None)
        run = ops_neighborhood._flex(16, 6, "cpu", *inputs)
    assert callable(run)
    assert torch.equal(seen["mask"], ops_neighborhood.masks.neighborhood((16, 16), 6).materialize(256, 256))
