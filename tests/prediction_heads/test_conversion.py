"""The page on conversion: every static head becomes a flexible one that equals it, and back."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flexheads
from flexheads import AutoModelWithHeads, BertModelWithHeads
from flexheads.errors import CheckpointError, ConfigError, ConversionWarning
from flexheads.testing import randomise, tiny_inputs, tiny_static

from .pages import AUTO

UNTIED: dict[str, Any] = {"tie_word_embeddings": False}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "single label": ("BertForSequenceClassification", {"num_labels": 3}),
    "named labels": (
        "BertForSequenceClassification",
        {
            "id2label": {0: "z", 1: "y", 2: "x", 3: "w"},
            "label2id": {"z": 0, "y": 1, "x": 2, "w": 3},
        },
    ),
    "several labels": (
        "BertForSequenceClassification",
        {"num_labels": 4, "problem_type": "multi_label_classification"},
    ),
    "regression": ("BertForSequenceClassification", {"num_labels": 1}),
    "regression of three": (
        "BertForSequenceClassification",
        {"num_labels": 3, "problem_type": "regression"},
    ),
    "multiple choice": ("BertForMultipleChoice", {}),
    "tokens": ("BertForTokenClassification", {"num_labels": 5}),
    "question answering": ("BertForQuestionAnswering", {}),
    "masked lm, tied": ("BertForMaskedLM", {}),
    "masked lm, untied": ("BertForMaskedLM", UNTIED),
    "masked lm, relu": ("BertForMaskedLM", {"hidden_act": "relu"}),
    "causal lm, tied": ("BertLMHeadModel", {}),
    "causal lm, untied": ("BertLMHeadModel", UNTIED),
    "causal lm, decoder": ("BertLMHeadModel", {"is_decoder": True}),
    "next sentence": ("BertForNextSentencePrediction", {}),
    "pre-training, tied": ("BertForPreTraining", {}),
    "pre-training, untied": ("BertForPreTraining", UNTIED),
}
SECOND = "_next_sentence"

each_case = pytest.mark.parametrize("case", CASES)
each_single = pytest.mark.parametrize("case", [c for c in CASES if "pre-training" not in c])


class Static:
    """A static model with a random adapter "test", what it says, and where all of it lies."""

    def __init__(self, case: str, root: Path, examples: Callable) -> None:
        self.name, changes = CASES[case]
        self.model_dir, self.dir = str(root / "model"), str(root / "adapter")
        tiny_static(self.name, **changes).save_pretrained(self.model_dir)
        self.model = self.fresh()
        self.model.add_adapter("test")
        randomise(self.model.adapters["test"], std=0.2)
        self.model.save_adapter(self.dir, "test")
        self.inputs, self.labels = examples(self.name, self.model.config)
        self.expected = self.run(self.model)

    def fresh(self) -> Any:
        return getattr(flexheads, AUTO[self.name]).from_pretrained(self.model_dir)

    def other(self) -> Any:
        """The same backbone below another head."""
        model = self.fresh()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if not key.startswith("bert."):
                    parameter.add_(torch.randn_like(parameter))
        return model

    def run(self, model: Any, adapter: str = "test") -> dict[str, Tensor]:
        """Loss and logits of a model of the static class."""
        with torch.no_grad():
            output = model(**self.inputs, **self.labels, adapter_names=adapter)
        return {key: value for key, value in output.items() if isinstance(value, Tensor)}

    def flexible(self, model: Any, name: str = "test", head: str = "test") -> dict[str, Tensor]:
        """The same of a model with flexible heads, under the static class's names."""
        heads: Any = head
        labels: dict[str, Any] = dict(self.labels)
        if self.name == "BertForPreTraining":
            heads = [head, head + SECOND]
            labels = {"labels": dict(zip(heads, self.labels.values(), strict=True))}
        with torch.no_grad():
            output = model(**self.inputs, **labels, adapter_names=name, head=heads)
        if self.name == "BertForPreTraining":
            first, second = output[head], output[head + SECOND]
            found = {"loss": output.loss, "prediction_logits": first.logits}
            return found | {"seq_relationship_logits": second.logits}
        return {key: value for key, value in output.items() if isinstance(value, Tensor)}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.isfinite(value).all()
        torch.testing.assert_close(found[key], value, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory, examples: Callable) -> Callable[[str], Static]:
    """The static model of each case, made once."""
    made: dict[str, Static] = {}

    def get(case: str) -> Static:
        if case not in made:
            made[case] = Static(case, tmp_path_factory.mktemp("case"), examples)
        return made[case]

    return get


def edited_head(directory: str, target: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of a saved adapter whose head configuration is changed."""
    target.mkdir(exist_ok=True)
    for path in Path(directory).iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    content = json.loads((target / "head_config.json").read_text("utf-8"))
    change(content)
    (target / "head_config.json").write_text(json.dumps(content), encoding="utf-8")
    return target


def test_exactly_as_printed_on_the_page(backbone_dir: str) -> None:
    static_head_model = flexheads.AutoModelForSequenceClassification.from_pretrained(backbone_dir)
    static_head_model.add_adapter("test")
    with tempfile.TemporaryDirectory() as temp_dir:
        static_head_model.save_adapter(temp_dir, "test")

        flex_head_model = AutoModelWithHeads.from_pretrained(backbone_dir)
        flex_head_model.load_adapter(temp_dir)
        assert "test" in flex_head_model.config.adapters
        assert "test" in flex_head_model.heads
        flex_head_model.load_adapter(temp_dir, load_as="twice")

    inputs = tiny_inputs(flex_head_model.config)
    expected = static_head_model(**inputs, adapter_names="test").logits
    for name in ("test", "twice"):
        found = flex_head_model(**inputs, adapter_names=[name], head=name).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@each_case
def test_the_converted_head_equals_the_static_one(case: str, static: Callable) -> None:
    made = static(case)
    flexible = AutoModelWithHeads.from_pretrained(made.model_dir)
    assert flexible.load_adapter(made.dir) == "test"
    assert "test" in flexible.config.adapters
    assert "test" in flexible.heads
    names = ["test", "test" + SECOND] if made.name == "BertForPreTraining" else ["test"]
    assert list(flexible.heads) == names
    assert_same(made.flexible(flexible), made.expected)
    key = next(key for key in made.expected if key.endswith("logits"))
    bare = made.flexible(flexible, name=[])[key]
    assert not torch.allclose(bare, made.expected[key], atol=1e-3), "the adapter does nothing"
    if made.name == "BertForSequenceClassification":
        assert flexible.get_labels_dict("test") == made.model.config.id2label
    flexible.load_adapter(made.dir, load_as="b.c", set_active=True)
    assert list(flexible.heads) == names + [n.replace("test", "b.c") for n in names]
    assert flexible.active_adapters == flexheads.Stack("b.c")
    assert flexible.active_head == "b.c"
    assert_same(made.flexible(flexible, "b.c", "b.c"), made.expected)


@each_case
def test_the_head_converts_alone(case: str, static: Callable, snapshot: Callable) -> None:
    made = static(case)
    flexible = AutoModelWithHeads.from_pretrained(made.model_dir)
    before = snapshot(flexible)
    with pytest.raises(CheckpointError, match=rf"{made.name}, which has no name.*load_as"):
        flexible.load_head(made.dir)
    assert snapshot(flexible) == before
    assert flexible.load_head(made.dir, load_as="new") == "new"
    assert len(flexible.adapters) == 0
    assert flexible.active_head == "new"
    flexible.load_adapter(made.dir, with_head=False)
    assert_same(made.flexible(flexible, head="new"), made.expected)


@each_case
def test_the_head_converts_without_labels_in_the_file(
    case: str, static: Callable, tmp_path: Path
) -> None:
    made = static(case)

    def strip(content: dict[str, Any]) -> None:
        del content["label2id"], content["num_labels"]

    directory = edited_head(made.dir, tmp_path / "stripped", strip)
    flexible = AutoModelWithHeads.from_pretrained(made.model_dir)
    flexible.load_adapter(directory)
    assert_same(made.flexible(flexible), made.expected)
    if made.name in ("BertForSequenceClassification", "BertForTokenClassification"):
        count = made.model.config.num_labels
        assert flexible.get_labels("test") == [f"LABEL_{n}" for n in range(count)]
        named = {n: f"name {n}" for n in range(count)}
        flexible.load_adapter(directory, load_as="named", id2label=named)
        assert flexible.get_labels_dict("named") == named
        with pytest.raises(ValueError, match="label"):
            flexible.load_adapter(directory, load_as="wrong", id2label={0: "a", 1: "b"})
        assert list(flexible.heads) == list(flexible.adapters) == ["test", "named"]


@each_case
def test_a_converted_head_stays_equal_through_files(
    case: str, static: Callable, tmp_path: Path
) -> None:
    made = static(case)
    flexible = AutoModelWithHeads.from_pretrained(made.model_dir)
    flexible.load_adapter(made.dir)
    heads = list(flexible.heads)
    flexible.save_adapter(tmp_path / "adapter", "test")
    for head in heads:
        flexible.save_head(tmp_path / head, head)
    again = BertModelWithHeads.from_pretrained(made.model_dir)
    again.load_adapter(tmp_path / "adapter")
    for head in heads[1:]:
        again.load_head(tmp_path / head)
    assert_same(made.flexible(again), made.flexible(flexible), atol=0)
    flexible.save_pretrained(tmp_path / "whole")
    again = BertModelWithHeads.from_pretrained(tmp_path / "whole")
    assert_same(made.flexible(again), made.flexible(flexible), atol=0)


# --- and back --------------------------------------------------------------------------------


@each_single
def test_back_into_the_static_class(case: str, static: Callable, tmp_path: Path) -> None:
    made = static(case)
    flexible = AutoModelWithHeads.from_pretrained(made.model_dir)
    flexible.load_adapter(made.dir)
    flexible.save_adapter(tmp_path / "adapter", "test")
    flexible.save_head(tmp_path / "head", "test")

    back = made.other()
    back.load_adapter(tmp_path / "adapter")
    assert_same(made.run(back), made.expected)
    assert back.config.id2label == made.model.config.id2label

    back = made.other()
    back.load_head(tmp_path / "head")
    back.load_adapter(tmp_path / "adapter", with_head=False)
    assert_same(made.run(back), made.expected)
    # A second round through files of the static class.
    back.save_adapter(tmp_path / "static", "test")
    flexible.load_adapter(tmp_path / "static", load_as="again")
    assert_same(made.flexible(flexible, "again", "again"), made.expected)


def test_one_flexible_head_does_not_make_a_class_of_two(static: Callable, tmp_path: Path) -> None:
    made = static("pre-training, tied")
    flexible = AutoModelWithHeads.from_pretrained(made.model_dir)
    flexible.load_adapter(made.dir)
    flexible.save_adapter(tmp_path, "test")
    back = made.other()
    before = {key: tensor.clone() for key, tensor in back.state_dict().items()}
    with pytest.warns(ConversionWarning, match="BertForPreTraining has 2 heads"):
        back.load_adapter(tmp_path)
    assert list(back.adapters) == ["test"]
    assert all(torch.equal(back.state_dict()[key], tensor) for key, tensor in before.items())
    with pytest.raises(CheckpointError, match="BertForPreTraining has 2 heads"):
        back.load_head(tmp_path)


def test_an_untied_head_is_refused_where_the_class_ties(
    static: Callable, tmp_path: Path, snapshot: Callable
) -> None:
    untied = static("masked lm, untied")
    flexible = AutoModelWithHeads.from_pretrained(untied.model_dir)
    flexible.load_adapter(untied.dir)
    assert flexible.heads["test"].config.tied is False
    flexible.save_adapter(tmp_path, "test")
    tied = static("masked lm, tied").fresh()
    before = snapshot(tied)
    for directory in (tmp_path, untied.dir):
        with pytest.raises(CheckpointError, match="tied"):
            tied.load_adapter(directory)
        assert snapshot(tied) == before


def test_a_converted_name_that_is_taken_changes_nothing(
    static: Callable, snapshot: Callable
) -> None:
    made = static("pre-training, tied")
    flexible = AutoModelWithHeads.from_pretrained(made.model_dir)
    flexible.add_tagging_head("test" + SECOND)
    before = snapshot(flexible)
    with pytest.raises(ConfigError, match=r"head named 'test_next_sentence'"):
        flexible.load_adapter(made.dir)
    assert snapshot(flexible) == before
