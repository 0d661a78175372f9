"""T5 and mT5 pass the checks that every architecture passes."""

from flexheads.testing import architecture_checks


@architecture_checks("t5")
def test_t5(check):
    check()


@architecture_checks("mt5")
def test_mt5(check):
    check()
