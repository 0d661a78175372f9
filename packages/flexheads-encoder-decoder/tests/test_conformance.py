"""Two models that make one pass the checks that every architecture passes."""

from flexheads.testing import architecture_checks


@architecture_checks("encoder-decoder")
def test_conformance(check):
    check()
