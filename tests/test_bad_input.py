"""Bad input is told what, where and the way out, and changes neither the model nor the files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import flexheads
from flexheads import BatchSplit, BertModelWithHeads, Parallel, Rows, Stack
from flexheads.errors import (
    CompositionError,
    ConfigError,
    FlexheadsError,
    LabelError,
    UnknownNameError,
    UnsupportedError,
)
from flexheads.testing import randomise, tiny_config, tiny_inputs, tiny_model, tiny_static

KNOWN = ("first", "second")


def build(kind: str) -> Any:
    """A model with two adapters, and two heads where it can have them; one of each is active."""
    if kind == "static":
        model = flexheads.init(tiny_static("BertForSequenceClassification", num_labels=3))
    else:
        model = randomise(tiny_model("bert"), std=0.1)
    for number, name in enumerate(KNOWN):
        model.add_adapter(name, config="lora" if number else "pfeiffer")
        randomise(model.adapters[name], std=0.2, seed=number)
        if kind == "flexible":
            model.add_classification_head(name, num_labels=3 + number)
    model.set_active_adapters("first")
    return model


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """One model of each kind for all tests: each leaves them as they were, or fails."""
    return {kind: build(kind) for kind in ("flexible", "static")}


@pytest.fixture(params=["flexible", "static"])
def model(request: pytest.FixtureRequest, models: dict[str, Any], snapshot: Callable) -> Any:
    """A model that has to be the same after the test, and that has to work still."""
    found = models[request.param]
    before, said = snapshot(found), found(**tiny_inputs(found.config)).logits
    yield found
    assert snapshot(found) == before
    assert torch.equal(found(**tiny_inputs(found.config)).logits, said)


@pytest.fixture
def flexible(models: dict[str, Any], snapshot: Callable) -> Any:
    """The same with flexible heads only."""
    found = models["flexible"]
    before = snapshot(found)
    yield found
    assert snapshot(found) == before


# --- names -----------------------------------------------------------------------------------

ADAPTER_CALLS: dict[str, Callable[[Any, Path], Any]] = {
    "save_adapter": lambda m, path: m.save_adapter(path / "new", "frist"),
    "delete_adapter": lambda m, _: m.delete_adapter("frist"),
    "get_adapter": lambda m, _: m.get_adapter("frist"),
    "adapters[]": lambda m, _: m.adapters["frist"],
    "merge_adapter": lambda m, _: m.merge_adapter("frist"),
    "set_active_adapters": lambda m, _: m.set_active_adapters("frist"),
    "active_adapters": lambda m, _: setattr(m, "active_adapters", ["second", "frist"]),
    "train_adapter": lambda m, _: m.train_adapter(["frist"]),
    "parallel": lambda m, _: m.set_active_adapters(Parallel("first", "frist")),
    "call": lambda m, _: m(**tiny_inputs(m.config), adapter_names="frist"),
    "call in a block": lambda m, _: m(
        **tiny_inputs(m.config), adapter_names=Rows(["first", None, "frist"])
    ),
}
HEAD_CALLS: dict[str, Callable[[Any, Path], Any]] = {
    "save_head": lambda m, path: m.save_head(path / "new", "frist"),
    "delete_head": lambda m, _: m.delete_head("frist"),
    "heads[]": lambda m, _: m.heads["frist"],
    "active_head": lambda m, _: setattr(m, "active_head", "frist"),
    "active heads": lambda m, _: setattr(m, "active_head", ["first", "frist"]),
    "get_labels": lambda m, _: m.get_labels("frist"),
    "get_labels_dict": lambda m, _: m.get_labels_dict("frist"),
    "call": lambda m, _: m(**tiny_inputs(m.config), head="frist"),
    "call of two": lambda m, _: m(**tiny_inputs(m.config), head=["first", "frist"]),
}


@pytest.mark.parametrize("call", ADAPTER_CALLS)
def test_an_unknown_adapter(call: str, model: Any, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError) as caught:
        ADAPTER_CALLS[call](model, tmp_path)
    message = str(caught.value)
    assert message.startswith("There is no adapter named 'frist'. Known: 'first', 'second'.")
    assert "Did you mean 'first'?" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", HEAD_CALLS)
def test_an_unknown_head(call: str, flexible: Any, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError) as caught:
        HEAD_CALLS[call](flexible, tmp_path)
    message = str(caught.value)
    assert message.startswith("There is no head named 'frist'. Known: 'first', 'second'.")
    assert "Did you mean 'first'?" in message
    assert list(tmp_path.iterdir()) == []


def test_a_head_is_asked_for_where_none_is_active(tmp_path: Path) -> None:
    model = tiny_model("bert")
    model.add_classification_head("x", set_active=False)
    for call in (model.get_labels, model.get_labels_dict, lambda: model.save_head(tmp_path / "a")):
        with pytest.raises(UnknownNameError, match="'x'"):
            call()
    assert list(tmp_path.iterdir()) == []
    model.add_masked_lm_head("lm")
    with pytest.raises(UnsupportedError, match="'lm' has no labels"):
        model.get_labels()


@pytest.mark.parametrize("name", [None, 5, b"x", ("a",)], ids=repr)
def test_names_are_strings(name: Any, flexible: Any) -> None:
    with pytest.raises(ConfigError, match=r"name.*string"):
        flexible.add_classification_head(name)
    with pytest.raises(ConfigError, match=r"name.*string"):
        flexible.add_adapter(name)


# --- configurations --------------------------------------------------------------------------

HEADS: dict[str, Callable[[Any], Any]] = {
    "taken": lambda m: m.add_classification_head("first"),
    "no labels": lambda m: m.add_classification_head("x", num_labels=0),
    "fewer than none": lambda m: m.add_tagging_head("x", num_labels=-1),
    "labels in words": lambda m: m.add_classification_head("x", num_labels="two"),
    "half a label": lambda m: m.add_classification_head("x", num_labels=2.5),
    "no layers": lambda m: m.add_classification_head("x", layers=0),
    "layers in words": lambda m: m.add_tagging_head("x", layers="two"),
    "no such activation": lambda m: m.add_classification_head("x", activation_function="sosilu"),
    "an activation that is none": lambda m: m.add_qa_head("x", activation_function=5),
    "too much dropout": lambda m: m.add_classification_head("x", dropout_prob=1.5),
    "dropout in words": lambda m: m.add_tagging_head("x", dropout_prob="much"),
    "three ends": lambda m: m.add_qa_head("x", num_labels=3),
    "no choice": lambda m: m.add_multiple_choice_head("x", num_choices=0),
    "too many names": lambda m: m.add_multiple_choice_head(
        "x", 2, id2label={0: "a", 1: "b", 2: "c"}
    ),
    "no such type": lambda m: m.add_head("x", "clasification"),
    "no such field": lambda m: m.add_head("x", "classification", num_labels=2, layer=1),
    "no number of labels": lambda m: m.add_head("x", "tagging"),
    "no such problem": lambda m: m.add_head("x", "classification", num_labels=2, problem_type="x"),
    "labels that are no names": lambda m: m.add_classification_head("x", id2label=["a", "b"]),
    "no layers below": lambda m: m.add_masked_lm_head("x", layers=0),
}
ADAPTERS: dict[str, Any] = {
    "no such configuration": "pfeifer",
    "no such field": "pfeiffer[reduction=2]",
    "no such field in a mapping": {"mh_adapter": True, "outputs": True},
    "unreadable": "pfeiffer[reduction_factor=",
    "no such activation": "pfeiffer[non_linearity=sosilu]",
    "no reduction": "pfeiffer[reduction_factor=0]",
    "reduction in words": "pfeiffer[reduction_factor=two]",
    "no such layer": "pfeiffer[leave_out=[7]]",
    "all layers left out": "pfeiffer[leave_out=[0, 1]]",
    "nothing adapted": {"mh_adapter": False, "output_adapter": False},
    "no such method": {"architecture": "nothing"},
    "no rank": "lora[r=0]",
    "no such matrix": "lora[attn_matrices=[z]]",
    "no configuration": 5,
    "no such file": "missing.json",
}


@pytest.mark.parametrize("case", HEADS)
def test_a_head_that_cannot_be(case: str, flexible: Any) -> None:
    with pytest.raises(FlexheadsError) as caught:
        HEADS[case](flexible)
    assert len(str(caught.value)) > 20


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_that_cannot_be(case: str, model: Any) -> None:
    with pytest.raises(FlexheadsError) as caught:
        model.add_adapter("x", config=ADAPTERS[case])
    assert len(str(caught.value)) > 20
    with pytest.raises(FlexheadsError):
        model.add_adapter("first", config=ADAPTERS[case], overwrite_ok=True)
    with pytest.raises(ConfigError, match=r"adapter named 'first'.*overwrite_ok"):
        model.add_adapter("first")


# --- calls -----------------------------------------------------------------------------------

CALLS: dict[str, tuple[dict[str, Any], type[FlexheadsError], str]] = {
    "a setup that is none": ({"adapter_names": 5}, CompositionError, "5"),
    "a list in a list": ({"adapter_names": [["first"]]}, CompositionError, "Parallel"),
    "too few rows": (
        {"adapter_names": BatchSplit("first", "second", batch_sizes=[1, 1])},
        CompositionError,
        "batch has 3",
    ),
    "too many rows": ({"adapter_names": Rows(["first"] * 4)}, CompositionError, "batch has 3"),
    "branches of different numbers": (
        {"adapter_names": Stack(Parallel("first", "second"), Parallel(*["first"] * 3))},
        CompositionError,
        r"Stack\[1\].* 3 times .* 2 times",
    ),
}
HEADED_CALLS: dict[str, tuple[dict[str, Any], type[FlexheadsError], str]] = {
    "a head that is none": ({"head": 5}, ConfigError, "5"),
    "a head in a list that is none": ({"head": ["first", 5]}, UnknownNameError, "5"),
    "labels without a head": ({"head": [], "labels": torch.zeros(3)}, LabelError, "no head"),
    "labels of another head": (
        {"labels": {"second": torch.zeros(3).long()}},
        UnknownNameError,
        "'second'.*Known: 'first'",
    ),
    "choices for some inputs": (
        {"token_type_ids": torch.zeros(3, 1, 7).long()},
        ConfigError,
        "token_type_ids has shape",
    ),
}


@pytest.mark.parametrize("case", CALLS)
def test_a_call_that_cannot_be(case: str, model: Any) -> None:
    arguments, error, message = CALLS[case]
    for _ in range(2):
        with pytest.raises(error, match=message):
            model(**tiny_inputs(model.config), **arguments)


@pytest.mark.parametrize("case", HEADED_CALLS)
def test_a_call_of_heads_that_cannot_be(case: str, flexible: Any) -> None:
    arguments, error, message = HEADED_CALLS[case]
    for _ in range(2):
        with pytest.raises(error, match=message):
            flexible(**tiny_inputs(flexible.config), **arguments)


def test_an_active_head_that_is_none(flexible: Any) -> None:
    for wrong in (5, ["first", None], {"first": 1.0, "x": 2}):
        with pytest.raises(FlexheadsError):
            flexible.active_head = wrong


def test_an_error_inside_a_call_leaves_nothing_behind(model: Any) -> None:
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[10_000]]), adapter_names="second")


def test_merging_what_cannot_be_merged(model: Any) -> None:
    with pytest.raises(UnsupportedError, match="cannot be merged"):
        model.merge_adapter("first")
    model.merge_adapter("second")
    with pytest.raises(UnsupportedError, match=r"'second' is merged already.*reset_adapter"):
        model.merge_adapter("first")
    with pytest.raises(UnsupportedError, match="reset_adapter"):
        model.train_adapter("second")
    model.reset_adapter()


def test_a_model_of_no_installed_architecture(tmp_path: Path) -> None:
    plain = transformers.BertForSequenceClassification(tiny_config("bert"))
    plain.config.model_type = "nothing"
    before = {**plain.__dict__}
    with pytest.raises(UnknownNameError, match=r"'nothing'.*'bert'"):
        flexheads.init(plain)
    assert type(plain) is transformers.BertForSequenceClassification
    assert plain.__dict__.keys() == before.keys()
    with pytest.raises(UnknownNameError, match="'nothing'"):
        flexheads.AutoModelWithHeads.from_config(plain.config)
    with pytest.raises((OSError, ValueError), match="nowhere"):  # transformers' own errors
        BertModelWithHeads.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(AttributeError, match="AutoModelForNothing"):
        _ = flexheads.AutoModelForNothing
    with pytest.raises(ImportError, match="pip install flexheads-nothing"):
        _ = flexheads.NothingModelWithHeads
