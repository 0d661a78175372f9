"""Qwen passes the checks that every architecture passes."""

from flexheads.testing import architecture_checks


@architecture_checks("qwen2")
def test_qwen2(check):
    check()


@architecture_checks("qwen3")
def test_qwen3(check):
    check()
