"""GPT-NeoX passes the checks that every architecture passes."""

from flexheads.testing import architecture_checks


@architecture_checks("gpt_neox")
def test_conformance(check):
    check()
