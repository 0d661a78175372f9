"""SmolLM3 passes the checks that every architecture passes."""

from flexheads.testing import architecture_checks


@architecture_checks("smollm3")
def test_conformance(check):
    check()
