"""Gemma passes the checks that every architecture passes."""

from flexheads.testing import architecture_checks


@architecture_checks("gemma")
def test_gemma(check):
    check()


@architecture_checks("gemma2")
def test_gemma2(check):
    check()


@architecture_checks("gemma3_text")
def test_gemma3_text(check):
    check()
