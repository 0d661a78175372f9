"""Heads of DistilBERT's static classes keep the dropout that those classes have, each its own."""

import pytest
from torch import nn
from transformers import DistilBertConfig

import flexheads
from flexheads.testing import tiny_config, tiny_model, tiny_static

DROPOUT = {"seq_classif_dropout": 0.3, "dropout": 0.2, "qa_dropout": 0.4}
CLASSES = {
    "DistilBertForSequenceClassification": 0.3,
    "DistilBertForMultipleChoice": 0.3,
    "DistilBertForTokenClassification": 0.2,
    "DistilBertForQuestionAnswering": 0.4,
}


@pytest.mark.parametrize(("static_class", "dropout"), CLASSES.items())
def test_dropout_there_and_back(static_class, dropout, tmp_path):
    static = flexheads.init(tiny_static(static_class, **DROPOUT))
    static.save_head(tmp_path)
    model = tiny_model("distilbert", **DROPOUT)
    model.load_head(tmp_path, load_as="a")
    found = [m.p for m in model.heads["a"].modules() if isinstance(m, nn.Dropout)]
    assert found == [dropout]
    model.save_head(tmp_path / "back", "a")
    flexheads.init(tiny_static(static_class, **DROPOUT)).load_head(tmp_path / "back")


def test_new_heads_have_none_unless_told():
    assert isinstance(tiny_config("distilbert"), DistilBertConfig)
    model = tiny_model("distilbert", **DROPOUT)
    model.add_classification_head("a")
    model.add_classification_head("b", dropout_prob=0.1)
    assert [model.heads[name].dropout_prob for name in ("a", "b")] == [0.0, 0.1]
