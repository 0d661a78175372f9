"""GPT-2 passes the checks that every architecture passes."""

from flexheads.testing import architecture_checks


@architecture_checks("gpt2")
def test_conformance(check):
    check()
