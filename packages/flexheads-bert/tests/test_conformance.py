"""BERT passes the checks that every architecture passes."""

import torch

from flexheads import Rows
from flexheads.testing import architecture_checks, tiny_inputs, tiny_model


@architecture_checks("bert")
def test_conformance(check):
    check()


@architecture_checks("bert-generation")
def test_bert_generation(check):
    check()


def test_rows_that_all_go_one_way_use_the_head_of_that_way():
    model = tiny_model("bert")
    model.add_adapter("a")
    model.add_classification_head("a", num_labels=2, set_active=False)
    with torch.no_grad():
        mixed = model(**tiny_inputs(model.config), adapter_names=Rows(["a", "a", "a"]))
        alone = model(**tiny_inputs(model.config), adapter_names="a", head="a")
    torch.testing.assert_close(mixed["a"].logits, alone.logits)
