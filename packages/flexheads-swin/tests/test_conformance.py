"""Swin passes the checks that every architecture passes."""

from flexheads.testing import architecture_checks


@architecture_checks("swin")
def test_conformance(check):
    check()
