"""GPT-J passes the checks that every architecture passes."""

from flexheads.testing import architecture_checks


@architecture_checks("gptj")
def test_conformance(check):
    check()
