"""BART, mBART and PLBart pass the checks that every architecture passes."""

from flexheads.testing import architecture_checks


@architecture_checks("bart")
def test_bart(check):
    check()


@architecture_checks("mbart")
def test_mbart(check):
    check()


@architecture_checks("plbart")
def test_plbart(check):
    check()
