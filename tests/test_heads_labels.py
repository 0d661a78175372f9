"""Names of labels: said once, kept in files, shown by the configuration of the model."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flexheads import BertModelWithHeads, Parallel
from flexheads.errors import (
    CheckpointError,
    ConfigError,
    FlexheadsError,
    LabelError,
    UnknownNameError,
    UnsupportedError,
)
from flexheads.testing import tiny_config, tiny_inputs, tiny_model

OWN = {0: "cat", 1: "dog", 2: "bird", 3: "fish"}
THREE = {0: "no", 1: "yes", 2: "maybe"}
TWO = {0: "down", 1: "up"}


def named_model(names: dict[int, str]) -> Any:
    return tiny_model("bert", id2label=names, label2id={name: n for n, name in names.items()})


@pytest.fixture
def model() -> Any:
    """A model whose configuration had names of labels before any head came."""
    return named_model(OWN)


def shown(model: Any) -> dict[int, str]:
    """What the configuration shows, which has to agree with itself."""
    config = model.config
    assert config.num_labels == len(config.id2label)
    assert config.label2id == {name: number for number, name in config.id2label.items()}
    found: dict[int, str] = dict(config.id2label)
    return found


# --- the configuration of the model follows --------------------------------------------------


def test_the_configuration_follows_the_active_head(model: Any) -> None:
    assert shown(model) == OWN
    model.add_classification_head("a", id2label=THREE)
    assert shown(model) == THREE
    model.add_tagging_head("b", id2label=TWO)
    assert shown(model) == TWO
    model.active_head = "a"
    assert shown(model) == THREE
    model.active_head = ["b"]
    assert shown(model) == TWO
    model.add_classification_head("c", num_labels=5, set_active=False)
    assert shown(model) == TWO
    model.active_head = None
    assert shown(model) == OWN


def test_several_heads_show_what_the_model_itself_had(model: Any) -> None:
    model.add_classification_head("a", id2label=THREE)
    model.add_tagging_head("b", id2label=TWO)
    model.active_head = ["a", "b"]
    assert shown(model) == OWN
    model.active_head = "a"
    assert shown(model) == THREE


def test_adapters_bring_the_labels_of_their_heads(model: Any) -> None:
    for name, labels in (("a", THREE), ("b", TWO)):
        model.add_adapter(name, config="lora")
        model.add_classification_head(name, id2label=labels)
    model.add_adapter("c", config="lora")
    model.set_active_adapters("a")
    assert shown(model) == THREE
    model.set_active_adapters(["a", "b"])
    assert shown(model) == TWO
    model.set_active_adapters("c")
    assert (model.active_head, shown(model)) == ("b", TWO)
    model.set_active_adapters(Parallel("a", "b"))
    assert shown(model) == OWN
    model.train_adapter("a")
    assert shown(model) == THREE
    model.delete_adapter("a")
    assert shown(model) == (THREE if model.active_head == "a" else OWN)


def test_deleting_brings_back_what_was(model: Any) -> None:
    model.add_classification_head("a", id2label=THREE)
    model.add_tagging_head("b", id2label=TWO)
    model.delete_head("a")
    assert shown(model) == TWO
    model.delete_head("b")
    assert shown(model) == OWN
    model.add_adapter("x", config="lora")
    model.add_adapter("y", config="lora")
    for name, labels in (("x", THREE), ("y", TWO)):
        model.add_classification_head(name, id2label=labels)
    model.set_active_adapters(Parallel("x", "y"))
    model.delete_adapter("x")
    assert model.active_head is None
    assert shown(model) == OWN


def test_heads_without_labels_change_nothing(model: Any) -> None:
    model.add_masked_lm_head("lm")
    assert shown(model) == OWN
    model.add_classification_head("a", id2label=THREE)
    model.active_head = "lm"
    assert shown(model) == THREE
    model.delete_head("a")
    assert (model.active_head, shown(model)) == ("lm", OWN)
    model.add_causal_lm_head("other")
    assert shown(model) == OWN


def test_what_is_assigned_since_is_the_model_s_own(model: Any) -> None:
    model.add_classification_head("a", id2label=THREE)
    model.config.id2label, model.config.label2id = TWO, {"down": 0, "up": 1}
    model.add_tagging_head("b", num_labels=4)
    assert shown(model) == {n: f"LABEL_{n}" for n in range(4)}
    model.active_head = None
    assert shown(model) == TWO


def test_a_head_in_place_of_another(model: Any) -> None:
    model.add_classification_head("a", id2label=THREE)
    model.add_classification_head("a", id2label=TWO, overwrite_ok=True, set_active=False)
    assert (model.active_head, shown(model)) == ("a", TWO)
    model.active_head = None
    assert shown(model) == OWN


def test_copies_know_what_the_model_had(model: Any) -> None:
    model.add_classification_head("a", id2label=THREE)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert shown(copied) == THREE
        copied.delete_head("a")
        assert shown(copied) == OWN
        assert shown(model) == THREE


def test_the_labels_of_a_call_do_not_touch_the_configuration(model: Any) -> None:
    model.add_classification_head("a", id2label=THREE)
    model.add_classification_head("b", id2label=TWO)
    model(**tiny_inputs(model.config), head="a")
    model(**tiny_inputs(model.config), head=["a", "b"])
    assert shown(model) == TWO
    assert type(model.config).__init__ is type(tiny_config("bert")).__init__


# --- the names of a head ---------------------------------------------------------------------


def test_every_type_tells_its_labels(model: Any) -> None:
    model.add_classification_head("a", id2label=THREE)
    model.add_multiple_choice_head("b", id2label=TWO)
    model.add_tagging_head("c", num_labels=2)
    model.add_qa_head("d", id2label={0: "start", 1: "end"})
    model.add_masked_lm_head("e")
    assert model.get_labels_dict("a") == THREE
    assert model.get_labels("b") == ["down", "up"]
    assert model.get_labels("c") == ["LABEL_0", "LABEL_1"]
    assert model.get_labels("d") == ["start", "end"]
    with pytest.raises(UnsupportedError, match="'e' has no labels"):
        model.get_labels("e")
    model.active_head = "b"
    assert model.get_labels() == ["down", "up"]
    assert shown(model) == TWO
    model.active_head = ["a", "b"]
    with pytest.raises(UnknownNameError, match="Name one"):
        model.get_labels()


def test_nothing_is_said_twice(model: Any) -> None:
    for number, said in enumerate(
        (
            {"id2label": THREE},
            {"label2id": {"no": 0, "yes": 1, "maybe": 2}},
            {"id2label": {"0": "no", "1": "yes", "2": "maybe"}},
            {"id2label": {2: "maybe", 0: "no", 1: "yes"}},
            {"id2label": THREE, "num_labels": 3},
            {"id2label": THREE, "label2id": {"no": 0, "yes": 1, "maybe": 2}},
        )
    ):
        for head_type in ("classification", "tagging", "multilabel_classification"):
            name = f"{head_type} {number}"
            model.add_head(name, head_type, **said)
            assert model.get_labels_dict(name) == THREE
            assert model.heads[name].num_outputs == 3
    model.add_head("m", "multiple_choice", id2label=THREE)
    assert model.heads["m"].config.num_choices == 3
    assert model.get_labels("m") == ["no", "yes", "maybe"]


CONTRADICTIONS: dict[str, tuple[Callable[[Any], Any], list[str]]] = {
    "more names": (lambda m: m.add_classification_head("x", 2, id2label=THREE), ["2", "3"]),
    "fewer names": (lambda m: m.add_tagging_head("x", 3, id2label=TWO), ["3", "2"]),
    "choices": (
        lambda m: m.add_multiple_choice_head("x", 2, id2label=THREE),
        ["num_choices=2", "3"],
    ),
    "by hand": (lambda m: m.add_head("x", "tagging", num_labels=2, id2label=THREE), ["2", "3"]),
    "by name": (
        lambda m: m.add_head("x", "tagging", num_labels=3, label2id={"a": 0, "b": 1}),
        ["3", "[0, 1]"],
    ),
    "of choices": (
        lambda m: m.add_head("x", "multiple_choice", num_choices=3, label2id={"a": 0, "b": 1}),
        ["3", "[0, 1]"],
    ),
    "one name twice": (
        lambda m: m.add_classification_head("x", id2label={0: "a", 1: "b", 2: "a"}),
        ["['a']"],
    ),
    "one number twice": (
        lambda m: m.add_head("x", "tagging", label2id={"a": 0, "b": 0}),
        ["0", "b"],
    ),
    "a gap": (lambda m: m.add_tagging_head("x", id2label={0: "a", 2: "b"}), ["[0, 2]"]),
    "two ways": (
        lambda m: m.add_head("x", "tagging", id2label=TWO, label2id={"down": 1, "up": 0}),
        ["{0: 'down', 1: 'up'}", "{'down': 1, 'up': 0}"],
    ),
    "no labels at all": (lambda m: m.add_head("x", "masked_lm", id2label=TWO), ["id2label"]),
    "answers": (lambda m: m.add_qa_head("x", num_labels=3), ["3", "2"]),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictions_state_both(case: str, model: Any, snapshot: Any) -> None:
    call, said = CONTRADICTIONS[case]
    before = snapshot(model)
    with pytest.raises(FlexheadsError) as caught:
        call(model)
    assert isinstance(caught.value, LabelError | ConfigError)
    assert all(part in str(caught.value) for part in said), str(caught.value)
    assert snapshot(model) == before


# --- files -----------------------------------------------------------------------------------

SAVED: dict[str, Callable[[Any], Any]] = {
    "classification": lambda m: m.add_classification_head(
        "x", id2label=THREE, pooling="mean", problem_type="multi_label_classification"
    ),
    "regression": lambda m: m.add_classification_head("x", 1, use_pooler=True),
    "tagging": lambda m: m.add_tagging_head("x", id2label=THREE, hidden_layer=1),
    "choice": lambda m: m.add_multiple_choice_head("x", 3, id2label=THREE),
    "attention": lambda m: m.add_classification_head("x", id2label=TWO, pooling="attention"),
}


@pytest.mark.parametrize("kind", SAVED)
def test_everything_travels_in_the_head_s_file(kind: str, model: Any, tmp_path: Path) -> None:
    SAVED[kind](model)
    head, labels = model.heads["x"], model.get_labels_dict("x")
    model.save_head(tmp_path, "x")
    fresh = named_model(TWO)
    fresh.load_head(tmp_path)
    assert fresh.heads["x"].to_dict() == head.to_dict()
    assert fresh.get_labels_dict("x") == labels == shown(fresh)
    inputs = tiny_inputs(model.config)
    if kind == "choice":
        inputs = {key: value[:, None].repeat(1, 3, 1) for key, value in inputs.items()}
    fresh.bert.load_state_dict(model.bert.state_dict())
    assert torch.equal(fresh(**inputs).logits, model(**inputs).logits)
    fresh.delete_head("x")
    assert shown(fresh) == TWO


@pytest.mark.parametrize("kind", ["classification", "tagging", "choice"])
def test_other_names_on_loading(kind: str, model: Any, tmp_path: Path, snapshot: Any) -> None:
    SAVED[kind](model)
    model.save_head(tmp_path, "x")
    other = {0: "p", 1: "q", 2: "r"}
    model.load_head(tmp_path, load_as="y", id2label=other)
    assert model.get_labels_dict("y") == other == shown(model)
    before = snapshot(model)
    for wrong in (TWO, OWN):
        with pytest.raises((LabelError, CheckpointError)) as caught:
            model.load_head(tmp_path, load_as="z", id2label=wrong)
        assert "3" in str(caught.value)
        assert str(len(wrong)) in str(caught.value)
    with pytest.raises((LabelError, CheckpointError), match=r"\['p'\]"):
        model.load_head(tmp_path, load_as="z", id2label={0: "p", 1: "p", 2: "r"})
    assert snapshot(model) == before


def test_names_for_a_head_without_labels(model: Any, tmp_path: Path, snapshot: Any) -> None:
    model.add_masked_lm_head("lm")
    model.save_head(tmp_path, "lm")
    before = snapshot(model)
    with pytest.raises(FlexheadsError, match="no labels"):
        model.load_head(tmp_path, load_as="z", id2label=TWO)
    assert snapshot(model) == before


def test_a_file_that_contradicts_itself(model: Any, tmp_path: Path, snapshot: Any) -> None:
    model.add_classification_head("x", id2label=THREE)
    model.save_head(tmp_path, "x")
    file = tmp_path / "head_config.json"
    content = json.loads(file.read_text("utf-8"))
    text = json.dumps(content).replace('"num_labels": 3', '"num_labels": 4')
    assert text != json.dumps(content)
    file.write_text(text, "utf-8")
    before = snapshot(model)
    with pytest.raises(CheckpointError) as caught:
        model.load_head(tmp_path, load_as="y")
    assert "4" in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert snapshot(model) == before


def test_whole_models_keep_the_labels(model: Any, tmp_path: Path) -> None:
    model.add_classification_head("a", id2label=THREE, pooling="max")
    model.add_tagging_head("b", id2label=TWO)
    model.active_head = "a"
    model.save_pretrained(tmp_path)
    again = BertModelWithHeads.from_pretrained(tmp_path)
    assert shown(again) == THREE
    assert again.get_labels("b") == ["down", "up"]
    again.active_head = "b"
    assert shown(again) == TWO


# --- any string is a name --------------------------------------------------------------------

NAMES = (
    "",
    " ",
    "a.b.c",
    "a/b",
    "%2E",
    "0",
    "7.5",
    "labels",
    "loss",
    "keys",
    "forward",
    "training",
    "_names",
    "heads",
    "head",
    "ünïcödé 名前 🎉",
    "line\nbreak",
    '"quotes"',
    "None",
)


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_any_string_names_a_head_and_an_adapter(name: str, model: Any, tmp_path: Path) -> None:
    model.add_adapter(name, config="lora")
    model.add_classification_head(name, id2label=THREE)
    model.add_tagging_head(f"{name}!", id2label=TWO)
    model.set_active_adapters(name)
    assert model.active_head == name
    assert model.get_labels_dict(name) == THREE == shown(model)
    inputs, labels = tiny_inputs(model.config), torch.tensor([0, 1, 2])
    alone = model(**inputs, labels=labels)
    both = model(**inputs, head=[name, f"{name}!"], labels={name: labels})
    assert torch.equal(both[name].logits, alone.logits)
    assert torch.equal(both.loss, alone.loss)
    model.save_adapter(tmp_path / "x", name)
    model.save_pretrained(tmp_path / "y")
    again = BertModelWithHeads.from_pretrained(tmp_path / "y")
    assert torch.equal(again(**inputs).logits, alone.logits)
    assert again.get_labels(name) == list(THREE.values())
    again.delete_adapter(name)
    again.delete_head(name)
    assert again.load_adapter(tmp_path / "x", set_active=True) == name
    assert again.active_head == name
    assert torch.equal(again(**inputs).logits, alone.logits)
