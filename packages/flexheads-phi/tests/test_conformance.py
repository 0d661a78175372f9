"""Phi passes the checks that every architecture passes."""

from flexheads.testing import architecture_checks


@architecture_checks("phi")
def test_phi(check):
    check()


@architecture_checks("phi3")
def test_phi3(check):
    check()
