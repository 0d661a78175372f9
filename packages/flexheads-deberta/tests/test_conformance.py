"""DeBERTa passes the checks that every architecture passes."""

from flexheads.testing import architecture_checks


@architecture_checks("deberta-v2")
def test_conformance_deberta_v2(check):
    check()


@architecture_checks("deberta")
def test_conformance_deberta(check):
    check()
