"""Each recorded vector, run through our code. A vector without a target and a target without its vector fail here too."""

from regard.bench.conformance import run_check


def test_vector(check):
    compared = run_check(check)
    assert compared, f"{check.name}: nothing was compared"
    wrong = [f"{row.output}: {row.detail}" for row in compared if not row.ok]
    assert not wrong, f"{check.name}: " + "; ".join(wrong)
