"""OLMo passes the checks that every architecture passes."""

from flexheads.testing import architecture_checks


@architecture_checks("olmo")
def test_olmo(check):
    check()


@architecture_checks("olmo2")
def test_olmo2(check):
    check()
