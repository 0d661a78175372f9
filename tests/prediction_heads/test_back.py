"""The page on conversion, backwards: heads made flexible load into the static class they equal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import flexheads
from flexheads import BertModelWithHeads
from flexheads.errors import CheckpointError, ConversionWarning
from flexheads.testing import randomise

from .pages import AUTO

POOLED: dict[str, Any] = {"layers": 1, "activation_function": None, "use_pooler": True}
# The method that adds a head and its arguments, and the static class that it equals.
EQUAL: dict[str, tuple[str, dict[str, Any], str]] = {
    "classification": (
        "add_classification_head",
        {"num_labels": 3, **POOLED},
        "BertForSequenceClassification",
    ),
    "any activation": (
        "add_classification_head",
        {"num_labels": 3, **POOLED, "activation_function": "relu"},
        "BertForSequenceClassification",
    ),
    "multilabel": (
        "add_classification_head",
        {"num_labels": 3, "multilabel": True, **POOLED},
        "BertForSequenceClassification",
    ),
    "choice": ("add_multiple_choice_head", {**POOLED, "num_choices": 4}, "BertForMultipleChoice"),
    "tagging": ("add_tagging_head", {"num_labels": 3}, "BertForTokenClassification"),
    "qa": ("add_qa_head", {}, "BertForQuestionAnswering"),
    "masked_lm": ("add_masked_lm_head", {}, "BertForMaskedLM"),
    "causal_lm": ("add_causal_lm_head", {}, "BertLMHeadModel"),
}


@pytest.mark.parametrize("kind", EQUAL)
def test_a_head_made_flexible_loads_into_the_class_that_it_equals(
    kind: str, backbone_dir: str, tmp_path: Path, examples: Callable
) -> None:
    add, arguments, class_name = EQUAL[kind]
    flexible = BertModelWithHeads.from_pretrained(backbone_dir)
    getattr(flexible, add)("mine", **arguments)
    flexible.add_adapter("mine")
    randomise(flexible.heads["mine"], std=0.3)
    randomise(flexible.adapters["mine"], std=0.2)
    flexible.save_adapter(tmp_path, "mine")
    changes = {} if class_name == "BertForMultipleChoice" else {"num_labels": 3}
    changes = {} if class_name == "BertForQuestionAnswering" else changes
    model = getattr(flexheads, AUTO[class_name]).from_pretrained(backbone_dir, **changes)
    model.load_adapter(tmp_path)

    if kind == "multilabel":
        assert model.config.problem_type == "multi_label_classification"
    inputs, labels = examples(class_name, model.config)
    with torch.no_grad():
        found = model(**inputs, **labels, adapter_names="mine")
        expected = flexible(**inputs, **labels, adapter_names="mine", head="mine")
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.isfinite(value).all()
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-6)


REFUSED: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "layers": (
        "add_classification_head",
        {"num_labels": 3, **POOLED, "layers": 2},
        "BertForSequenceClassification",
        "'mine' cannot become a BertForSequenceClassification: layers=2",
    ),
    "pooler": (
        "add_classification_head",
        {"num_labels": 3, **POOLED, "use_pooler": False},
        "BertForSequenceClassification",
        "'mine' cannot become a BertForSequenceClassification: use_pooler=False",
    ),
    "type": (
        "add_tagging_head",
        {"num_labels": 3},
        "BertForSequenceClassification",
        "BertForSequenceClassification holds a classification head; 'mine' is of type tagging",
    ),
    "lm": (
        "add_masked_lm_head",
        {},
        "BertLMHeadModel",
        "BertLMHeadModel holds a causal_lm head; 'mine' is of type masked_lm",
    ),
    "activation": (
        "add_masked_lm_head",
        {"activation_function": "relu"},
        "BertForMaskedLM",
        "'mine' cannot become a BertForMaskedLM: activation_function='relu'",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_head_that_differs_is_refused_by_name(
    kind: str, backbone_dir: str, tmp_path: Path, snapshot: Callable
) -> None:
    add, arguments, class_name, message = REFUSED[kind]
    flexible = BertModelWithHeads.from_pretrained(backbone_dir)
    getattr(flexible, add)("mine", **arguments)
    flexible.add_adapter("mine")
    flexible.save_adapter(tmp_path, "mine")
    model = getattr(flexheads, AUTO[class_name]).from_pretrained(backbone_dir, num_labels=3)
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=message):
        model.load_head(tmp_path)
    assert snapshot(model) == before
    with pytest.warns(ConversionWarning, match=message):
        model.load_adapter(tmp_path)
    assert list(model.adapters) == ["mine"]
    model.delete_adapter("mine")
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_labels": 4}, r"classifier\.weight has shape \(4, 32\) instead of \(3, 32\)"),
        ({"num_labels": 3, "bias": False}, r"classifier\.bias is missing"),
    ],
)
def test_a_head_of_another_shape_is_refused(
    arguments: dict[str, Any], message: str, backbone_dir: str, tmp_path: Path, snapshot: Callable
) -> None:
    flexible = BertModelWithHeads.from_pretrained(backbone_dir)
    flexible.add_classification_head("mine", **POOLED, **arguments)
    flexible.add_adapter("mine")
    flexible.save_adapter(tmp_path, "mine")
    auto = flexheads.AutoModelForSequenceClassification
    model = auto.from_pretrained(backbone_dir, num_labels=3)
    before = snapshot(model)
    for load in (model.load_head, model.load_adapter):
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path)
        assert snapshot(model) == before
