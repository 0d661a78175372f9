"""The page on static heads: transformers' own classes with adapters, and heads that match them."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import flexheads
from flexheads.errors import CheckpointError, ConfigError, ConversionWarning, UnknownNameError
from flexheads.testing import randomise, tiny_config, tiny_inputs, tiny_static

from .pages import AUTO

LABELS = {0: "no", 1: "yes", 2: "maybe"}

each_class = pytest.mark.parametrize("name", AUTO)


def fresh(name: str, directory: str, **changes: Any) -> Any:
    """The page's call; the backbone comes from the directory, the head is drawn anew."""
    if name in ("BertForSequenceClassification", "BertForTokenClassification"):
        changes = {"num_labels": 3} | changes
    model = getattr(flexheads, AUTO[name]).from_pretrained(directory, **changes)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if not key.startswith("bert."):
                parameter.normal_(std=0.2)
    return model


def tasked(name: str, directory: str, **changes: Any) -> Any:
    """The same with a random adapter "mrpc", active."""
    model = fresh(name, directory, **changes)
    model.add_adapter("mrpc", config="pfeiffer")
    randomise(model.adapters["mrpc"], std=0.2)
    model.set_active_adapters("mrpc")
    return model


@torch.no_grad()
def outputs(model: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    inputs = tiny_inputs(model.config)
    if type(model).__name__ == "BertForMultipleChoice":
        inputs = {key: value[:, None].repeat(1, 2, 1) for key, value in inputs.items()}
        inputs["input_ids"] = inputs["input_ids"].cumsum(1) % 90
    return tuple(model(**inputs, **kwargs).to_tuple())


def same(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


def head_state(model: Any) -> dict[str, Tensor]:
    return {
        key: tensor.clone()
        for key, tensor in model.state_dict().items()
        if not key.startswith(("bert.", "adapters."))
    }


@pytest.fixture(scope="module")
def saved(backbone_dir: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """For each class a directory with adapter and head, and what the model said."""
    found = {}
    for name in AUTO:
        directory = tmp_path_factory.mktemp(name)
        model = tasked(name, backbone_dir)
        model.save_adapter(str(directory), "mrpc", with_head=True)
        found[name] = (directory, outputs(model), head_state(model))
    return found


@each_class
def test_the_class_is_transformers_own(name: str, backbone_dir: str) -> None:
    model = fresh(name, backbone_dir)
    own = getattr(transformers, name)
    assert isinstance(model, own)
    assert type(model).__name__ == name
    assert type(model).__module__ == own.__module__
    original = own.from_pretrained(backbone_dir, num_labels=model.config.num_labels)
    assert list(model.state_dict()) == list(original.state_dict())
    original.load_state_dict(model.state_dict())
    assert same(outputs(model), outputs(original.eval()))
    assert not hasattr(model, "heads")
    assert model.active_adapters is None


@each_class
def test_init_gives_any_model_in_hand_the_same(name: str) -> None:
    model = tiny_static(name)
    expected, parameters = outputs(model), list(model.parameters())
    assert flexheads.init(model) is model
    assert flexheads.init(model) is model, "once more changes nothing"
    assert isinstance(model, getattr(transformers, name))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert same(outputs(model), expected)
    model.add_adapter("mrpc", config="pfeiffer")
    randomise(model.adapters["mrpc"], std=0.2)
    assert same(outputs(model), expected)
    model.set_active_adapters("mrpc")
    assert not same(outputs(model), expected)
    assert same(outputs(model, adapter_names=[]), expected)
    with pytest.raises(UnknownNameError, match=r"'nope'.*Known: 'mrpc'"):
        outputs(model, adapter_names="nope")


@each_class
def test_the_auto_class_from_config(name: str) -> None:
    model = getattr(flexheads, AUTO[name]).from_config(tiny_config("bert"))
    assert type(model).__name__ == name
    model.add_adapter("mrpc")
    with pytest.raises(TypeError):
        getattr(flexheads, AUTO[name])()


@each_class
def test_saving_writes_the_head_too(name: str, saved: dict[str, Any]) -> None:
    assert sorted(path.name for path in saved[name][0].iterdir()) == [
        "adapter.safetensors",
        "adapter_config.json",
        "head_config.json",
        "model_head.safetensors",
    ]


@each_class
def test_the_same_class_restores_the_head(
    name: str, saved: dict[str, Any], backbone_dir: str
) -> None:
    directory, expected, head = saved[name]
    model = fresh(name, backbone_dir)
    model.load_adapter(str(directory), set_active=True)
    assert same(outputs(model), expected)
    assert all(torch.equal(tensor, head[key]) for key, tensor in head_state(model).items())
    model = fresh(name, backbone_dir)
    model.load_head(directory)
    assert len(model.adapters) == 0
    assert all(torch.equal(tensor, head[key]) for key, tensor in head_state(model).items())


@each_class
def test_with_head_false_leaves_the_head(
    name: str, saved: dict[str, Any], backbone_dir: str
) -> None:
    model = fresh(name, backbone_dir)
    before = head_state(model)
    assert model.load_adapter(saved[name][0], load_as="b", with_head=False) == "b"
    assert all(torch.equal(tensor, before[key]) for key, tensor in head_state(model).items())
    assert list(model.adapters) == ["b"]


@each_class
def test_another_class_says_so_and_skips_the_head(
    name: str, saved: dict[str, Any], backbone_dir: str, hashed: Callable
) -> None:
    model = fresh(name, backbone_dir)
    for other, (directory, _, _) in saved.items():
        if other == name:
            continue
        config, head = model.config.to_dict(), head_state(model)
        with pytest.warns(ConversionWarning, match=rf"{other}\b.*{name}\b") as caught:
            model.load_adapter(directory, load_as=other, set_active=True)
        assert caught[0].filename == __file__, "the warning points at the caller"
        assert all(torch.equal(tensor, head[key]) for key, tensor in head_state(model).items())
        changed = {key for key, value in model.config.to_dict().items() if value != config.get(key)}
        assert changed == {"adapters"}
        assert model.active_adapters == flexheads.Stack(other)
        with pytest.raises(CheckpointError, match=rf"{other}\b.*{name}\b"):
            model.load_head(directory)
        assert all(torch.equal(tensor, head[key]) for key, tensor in head_state(model).items())
    states = [
        {key: hashed(t) for key, t in adapter.state_dict().items()}
        for adapter in model.adapters.values()
    ]
    assert len(states) == 7
    assert all(state == states[0] for state in states)


def test_labels_come_with_the_head(backbone_dir: str, tmp_path: Path) -> None:
    model = tasked("BertForSequenceClassification", backbone_dir, id2label=LABELS)
    model.save_adapter(tmp_path, "mrpc")
    loaded = fresh("BertForSequenceClassification", backbone_dir)
    assert loaded.config.id2label[0] == "LABEL_0"
    loaded.load_adapter(tmp_path)
    assert loaded.config.id2label == LABELS
    assert loaded.config.label2id == {"no": 0, "yes": 1, "maybe": 2}
    other = {0: "a", 1: "b", 2: "c"}
    loaded = fresh("BertForSequenceClassification", backbone_dir)
    loaded.load_adapter(tmp_path, id2label=other)
    assert loaded.config.id2label == other
    loaded = fresh("BertForSequenceClassification", backbone_dir)
    loaded.load_head(tmp_path, id2label=other)
    assert loaded.config.id2label == other


@pytest.mark.parametrize(
    "names", [{0: "a", 1: "b"}, {0: "a", 1: "a", 2: "b"}, {1: "a", 2: "b", 3: "c"}]
)
def test_label_names_that_do_not_fit_change_nothing(
    names: dict[int, str], saved: dict[str, Any], backbone_dir: str, snapshot: Callable
) -> None:
    model = fresh("BertForSequenceClassification", backbone_dir)
    before = snapshot(model)
    for load in (model.load_adapter, model.load_head):
        with pytest.raises(ValueError, match=r"id2label|label names"):
            load(saved["BertForSequenceClassification"][0], id2label=names)
        assert snapshot(model) == before


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "BertForTokenClassification"])
def test_another_number_of_labels_changes_nothing(
    name: str, saved: dict[str, Any], backbone_dir: str, snapshot: Callable
) -> None:
    model = tasked(name, backbone_dir, num_labels=5)
    before, expected = snapshot(model), outputs(model)
    message = r"classifier\.weight has shape \(3, 32\) instead of \(5, 32\)"
    with pytest.raises(CheckpointError, match=message):
        model.load_adapter(saved[name][0], load_as="b", set_active=True)
    assert snapshot(model) == before
    with pytest.raises(CheckpointError, match=message):
        model.load_adapter(saved[name][0], overwrite_ok=True)
    assert snapshot(model) == before
    with pytest.raises(CheckpointError, match=message):
        model.load_head(saved[name][0])
    assert snapshot(model) == before
    assert same(outputs(model), expected)
    model.load_adapter(saved[name][0], load_as="b", with_head=False)


def test_a_taken_name_needs_overwrite_ok(
    saved: dict[str, Any], backbone_dir: str, snapshot: Callable
) -> None:
    directory, expected, _ = saved["BertForSequenceClassification"]
    model = fresh("BertForSequenceClassification", backbone_dir)
    model.add_adapter("mrpc", config="houlsby", set_active=True)
    before = snapshot(model)
    with pytest.raises(ConfigError, match=r"adapter named 'mrpc'.*overwrite_ok"):
        model.load_adapter(directory)
    assert snapshot(model) == before
    model.load_adapter(directory, overwrite_ok=True)
    assert same(outputs(model), expected)


def test_the_model_without_a_head_saves_and_loads_adapters_alone(
    saved: dict[str, Any], backbone_dir: str, tmp_path: Path
) -> None:
    model = flexheads.AutoModel.from_pretrained(backbone_dir)
    assert type(model).__name__ == "BertModel"
    assert isinstance(model, transformers.BertModel)
    model.load_adapter(saved["BertForMaskedLM"][0], set_active=True)
    model.save_adapter(tmp_path, "mrpc", with_head=True)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"adapter.safetensors", "adapter_config.json"}
    again = flexheads.AutoModel.from_pretrained(backbone_dir)
    again.load_adapter(tmp_path, set_active=True)
    assert same(outputs(again), outputs(model))
    into = fresh("BertForMaskedLM", backbone_dir)
    before = head_state(into)
    into.load_adapter(tmp_path)
    assert all(torch.equal(tensor, before[key]) for key, tensor in head_state(into).items())
    with pytest.raises(CheckpointError, match="holds no head"):
        into.load_head(tmp_path)


def test_training_a_static_model_trains_adapter_and_head(
    backbone_dir: str, hashed: Callable
) -> None:
    model = tasked("BertForSequenceClassification", backbone_dir)
    model.train_adapter("mrpc")
    own = {
        n for n, _ in model.named_parameters() if n.startswith(("adapters.mrpc.", "classifier."))
    }
    assert {n for n, p in model.named_parameters() if p.requires_grad} == own
    before = {key: hashed(tensor) for key, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    model(**tiny_inputs(model.config), labels=torch.tensor([0, 1, 2])).loss.backward()
    optimizer.step()
    after = {key: hashed(tensor) for key, tensor in model.state_dict().items()}
    assert {key for key in after if after[key] != before[key]} == own


RELOAD = """
import sys, torch, flexheads
model = flexheads.AutoModelForTokenClassification.from_pretrained(sys.argv[1], num_labels=3)
model.load_adapter(sys.argv[2], set_active=True)
torch.save(model(**torch.load(sys.argv[3])).logits, sys.argv[4])
"""


def test_a_new_process_restores_adapter_and_head(
    saved: dict[str, Any], backbone_dir: str, tmp_path: Path
) -> None:
    directory, expected, _ = saved["BertForTokenClassification"]
    torch.save(tiny_inputs(tiny_config("bert")), tmp_path / "inputs.pt")
    paths = (backbone_dir, directory, tmp_path / "inputs.pt", tmp_path / "logits.pt")
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(RELOAD), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected[0])
