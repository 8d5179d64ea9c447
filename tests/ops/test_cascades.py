"""Cascades of Einsums: the language, the count of passes, and the executor that confirms it."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from regard.ops import CASCADES, attention_cascade, count_passes, parse_cascade, reference, run_cascade
from regard.ops.einsum_cascade import schedule

QUICK = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
PASSES = {
    "unsafe": 2,
    "3-pass": 3,
    "3-pass, division last": 2,
    "2-pass": 2,
    "1-pass": 1,
    "1-pass, normalized": 1,
    "1-pass, parts": 1,
}


def qkv(n=5, m=23, d=4, dv=6, seed=0, dtype=torch.float64, lead=(2,)):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*lead, *shape, generator=generator, dtype=dtype) for shape in ((n, d), (m, d), (m, dv))]


def test_the_passes_of_published_algorithms():
    assert {name: count_passes(cascade) for name, cascade in CASCADES.items()} == PASSES
    for cascade in CASCADES.values():  # every algorithm goes over its queries and dims once at most
        assert count_passes(cascade, "p") == 1 and count_passes(cascade, "e") == 1


@QUICK
@given(st.sampled_from(sorted(CASCADES)), st.integers(1, 30), st.sampled_from([1.0, 1e4]), st.integers(1, 25))
def test_every_cascade_is_attention(name, tile, factor, m):
    q, k, v = qkv(m=m)
    q = q if name == "unsafe" else q * factor
    out, trace = attention_cascade(q, k, v, cascade=name, tile=tile, return_trace=True)
    exact = torch.softmax(q @ k.mT / 2, -1) @ v
    torch.testing.assert_close(out, exact, rtol=1e-12, atol=1e-12)
    assert trace.passes == PASSES[name] and trace.tiles == -(-m // tile)
    for sweep in trace.sweeps:  # every pass goes over whole tensors
        assert set(sweep.values()) == {trace.tiles}
    assert trace.visits("K") == trace.visits("V") == trace.tiles


def test_what_is_kept_between_tiles():
    def kept(name, m, tile):
        n, dv = 3, 6
        trace = attention_cascade(*qkv(n, m, lead=()), cascade=name, tile=tile, return_trace=True)[1]
        return trace.kept_peak / n, trace.live_peak / n, dv

    for m in (32, 64):
        row, live, dv = kept("1-pass", m, 8)
        assert row == dv + 2 and live <= 3 * 8 + 6 * dv + 10  # a maximum, a sum and an output, however many keys
        assert kept("1-pass, normalized", m, 8)[0] == dv + 2
        assert m <= kept("3-pass", m, 8)[0] <= 2 * m + 4
        assert m <= kept("2-pass", m, 8)[0] <= m + 3 * m // 8 + 12
        assert kept("1-pass, parts", m, 8)[0] == pytest.approx((dv + 2) * m / 8, abs=dv + 2)


def test_one_tile_of_one_pass_is_three_passes():
    q, k, v = qkv(dtype=torch.float32)
    torch.testing.assert_close(
        attention_cascade(q, k, v, passes=1, tile=64),
        attention_cascade(q, k, v, passes=3, tile=64),
        rtol=1e-6,
        atol=1e-6,
    )
    torch.testing.assert_close(
        reference.attention_cascade(q, k, v, passes=2, tile=5),
        reference.attention(*(x[None] for x in (q, k, v)), q_offset=0, scale=0.5)[0],
    )


def test_gradients_flow_through():
    q, k, v = (x.requires_grad_() for x in qkv(2, 5, 2, 2))
    assert torch.autograd.gradcheck(lambda *x: attention_cascade(*x, passes=1, tile=2), (q, k, v))


def test_other_cascades_than_attention():
    # a mean and a variance: two passes as textbooks write it, one with running sums
    two = parse_cascade("""
        S[p] += X[m, p]
        N[p] += ONE[m, p]
        D[m, p] = X[m, p] - S[p] / N[p]
        VAR[p] += D[m, p] * D[m, p]
    """)  # fmt: skip
    one = parse_cascade("""
        S[p] += X[m, p]
        Q[p] += X[m, p] * X[m, p]
        N[p] += ONE[m, p]
        VAR[p] = Q[p] - S[p] * S[p] / N[p]
    """)  # fmt: skip
    assert (count_passes(two), count_passes(one)) == (2, 1)
    x = torch.randn(11, 3, dtype=torch.float64)
    given = {"X": x, "ONE": torch.ones_like(x)}
    exact = x.var(0, correction=0) * 11
    for cascade in (two, one):
        made, trace = run_cascade(cascade, given, tile=4)
        torch.testing.assert_close(made["VAR"], exact)
        assert trace.passes == count_passes(cascade)
    # a running sum whose every step is kept, and one that is read after the last tile
    prefix = parse_cascade(
        "split m: m1, m0\nR[0] = 0\nT[m1] += X[m1, m0]\nR[m1 + 1] = R[m1] + T[m1]\nY[m1] = R[m1 + 1] * 2\nZ[m1, m0] = X[m1, m0] * R[M1]"
    )
    assert count_passes(prefix) == 2
    made, trace = run_cascade(prefix, {"X": x[:, 0]}, tile=4)
    torch.testing.assert_close(made["Y"], 2 * x[:, 0].cumsum(0)[[3, 7, 10]])
    torch.testing.assert_close(made["Z"], x[:, 0] * x[:, 0].sum())
    assert trace.passes == 2 and trace.visits("X") == 2 * 3


def test_operations_are_those_of_the_hardware():
    einsums = {einsum.name: dict(einsum.operations) for einsum in CASCADES["1-pass"].einsums[3:]}
    assert einsums["QK"] == {"mac": 1} and einsums["LM"] == {"max": 1} and einsums["SLN"] == {"exp": 1, "sub": 1}
    assert einsums["SLD"] == {"add": 1} and einsums["SPNV"] == {"mul": 1} and einsums["AV"] == {"div": 1}
    stages = {e.name: s for e, s in zip(CASCADES["2-pass"].einsums, schedule(CASCADES["2-pass"], "m"))}
    assert (stages["PLM"].grain, stages["PLM"].ready, stages["PLM"].complete) == ("tiles", 2, 1)
    assert not stages["PLM"].streams and stages["SD"].complete == 1 and stages["A"].ready == 2


def test_what_is_watched_and_left_alone():
    seen = []
    inputs = qkv()
    before = [x.clone() for x in inputs]
    attention_cascade(*inputs, passes=1, tile=12, watch=lambda name, value: seen.append((name, tuple(value.shape))))
    assert seen.count(("QK", (2, 12, 5))) == 1 and ("QK", (2, 11, 5)) in seen and seen[-1][0] == "AV"
    assert all(torch.equal(a, b) for a, b in zip(inputs, before))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A[p] = X[m, p]", "line 1 .'A.p. = X.m, p.'.: m stands on the right only: say how to reduce it"),
        ("A[m] += X[m]", "nothing to reduce"),
        ("A[p] = log(X[p])", "need exp.x. or max.x, y."),
        ("A[p] = X[p] ** 2", "need tensors with their indices"),
        ("A = X[p]", "need NAME.ranks. = expression"),
        ("A[p] = B[p]\nB[p] = X[p]", "reads B before anything defines it"),
        ("A[p] = X[p]\nB[m] = A[m]", "before it was .p."),
        ("A[m + 1] = X[m]", "rank . 1, of a rank of tiles"),
        ("A[p] = X[M1, p]", "capital form of a rank of tiles"),
        ("A[p, 0] = X[p]", "exactly one rank of tiles"),
        ("split m: m1, m0\nA[p] += X[m, p]", "a rank that is split by its parts only"),
        ("", "at least one Einsum"),
    ],
)
def test_errors_of_the_language(text, message):
    with pytest.raises(ValueError, match=message):
        parse_cascade(text)


def test_bad_input():
    q, k, v = qkv()
    with pytest.raises(ValueError, match="passes: unknown name '4'"):
        attention_cascade(q, k, v, passes=4)
    with pytest.raises(ValueError, match="cascade: unknown name '1-pas'; did you mean 1-pass"):
        attention_cascade(q, k, v, cascade="1-pas")
    with pytest.raises(ValueError, match="tile: got 0"):
        attention_cascade(q, k, v, tile=0)
    with pytest.raises(ValueError, match="V: got '22 along m', need 23"):
        attention_cascade(q, k, v[:, :22])
    with pytest.raises(ValueError, match="K: got 'leading axes .1,.', need .2,.|leading axes"):
        attention_cascade(q, k[:1], v)
    with pytest.raises(ValueError, match="inputs: got .'X'., need also"):
        run_cascade(CASCADES["1-pass"], {"X": q})
    with pytest.raises(ValueError, match="rank: unknown name 'z'"):
        count_passes(CASCADES["1-pass"], "z")
