"""The compiled FlexAttention backend."""

import pytest
import torch
from test_attention import a_mask, inputs, spec

from regard import ops, scores

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "kind, mod", [("causal", None), ("sinks", scores.soft_cap(3.0)), ("lengths", None), ("per head", scores.alibi(4))]
)
def test_forward_is_the_reference(kind, mod):
    q, k, v = inputs(0, 2, 4, 2, 70, 90, 16, 16, torch.float32)
    mask = a_mask(kind, 2, 4, 70, 90)
    out = ops.attention(q, k, v, mask=mask, score_mod=mod, backend="flex")
    want, _ = spec(q, k, v, mask=mask, score_mod=mod)
    torch.testing.assert_close(out.double(), want, rtol=2e-5, atol=2e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what FlexAttention lacks on the CPU")
def test_what_it_lacks_on_the_cpu():
    q, k, v = (t.requires_grad_() for t in inputs(0, 1, 2, 2, 8, 8, 16, 16, torch.float32))
    with pytest.raises(ValueError, match=r"backend: got 'flex', need another backend"):
        ops.attention(q, k, v, backend="flex")
