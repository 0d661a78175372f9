"""RoBERTa and its relatives pass the checks that every architecture passes."""

from flexheads.testing import architecture_checks


@architecture_checks("roberta")
def test_roberta(check):
    check()


@architecture_checks("xlm-roberta")
def test_xlm_roberta(check):
    check()


@architecture_checks("camembert")
def test_camembert(check):
    check()


@architecture_checks("xlm-roberta-xl")
def test_xlm_roberta_xl(check):
    check()
