"""Damaged files and failing saves: an error says which file, and nothing else has happened."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import flexheads
from flexheads import BertModelWithHeads
from flexheads.checkpoints import store
from flexheads.checkpoints.hub import format as hub_format
from flexheads.errors import CheckpointError, FlexheadsError, UnknownNameError
from flexheads.testing import randomise, tiny_inputs, tiny_model, tiny_static

FILES = ("adapter_config.json", "adapter.safetensors", "head_config.json", "model_head.safetensors")
CONFIGS = {"adapter": FILES[0], "head": FILES[2]}
POOLED: dict[str, Any] = {"layers": 1, "activation_function": None, "use_pooler": True}
WEIGHTS = {"adapter": FILES[1], "head": FILES[3]}


def build(kind: str, seed: int) -> Any:
    if kind == "static":
        model = flexheads.init(tiny_static("BertForSequenceClassification", num_labels=3))
        randomise(model.classifier, std=0.2, seed=seed)
    else:
        model = randomise(tiny_model("bert"), std=0.1)
        model.add_classification_head("x", num_labels=3, **POOLED)
        randomise(model.heads["x"], std=0.2, seed=seed)
    model.add_adapter("x", config="pfeiffer")
    randomise(model.adapters["x"], std=0.2, seed=seed)
    model.set_active_adapters("x")
    return model


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """One model of each kind for all tests: each leaves them as they were, or fails."""
    return {kind: build(kind, seed=0) for kind in ("flexible", "static")}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For each kind a directory with another adapter "x" and its head. Read only."""
    directories = {}
    for kind in ("flexible", "static"):
        directories[kind] = tmp_path_factory.mktemp(kind)
        build(kind, seed=1).save_adapter(directories[kind], "x")
    return directories


@pytest.fixture(params=["flexible", "static"])
def model(request: pytest.FixtureRequest, models: dict[str, Any], snapshot: Callable) -> Any:
    """A model that has to be the same after the test, and that has to work still."""
    found = models[request.param]
    before, said = snapshot(found), found(**tiny_inputs(found.config)).logits
    yield found
    assert snapshot(found) == before
    assert torch.equal(found(**tiny_inputs(found.config)).logits, said)


@pytest.fixture(params=["flexible", "static"])
def damaged(request: pytest.FixtureRequest, saved: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of a saved adapter and head, to be damaged; saved by either kind of model."""
    return Path(shutil.copytree(saved[request.param], tmp_path / "x"))


def edit(path: Path, **fields: Any) -> None:
    """Sets fields of a JSON file; `...` removes one, and ``a__b`` is a field in a field."""
    content = json.loads(path.read_text("utf-8"))
    for name, value in fields.items():
        *outer, last = name.split("__")
        target = content
        for word in outer:
            target = target[word]
        target.pop(last, None)
        if value is not ...:
            target[last] = value
    path.write_text(json.dumps(content), encoding="utf-8")


def retensor(path: Path, change: Callable[[dict[str, torch.Tensor], str], None]) -> None:
    """Rewrites a file of tensors, changed by a function that is told the first key."""
    tensors = load_file(path)
    change(tensors, min(tensors))
    path.unlink()
    save_file(tensors, path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def into_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def longer(tensors: dict[str, torch.Tensor], key: str) -> None:
    tensors[key] = torch.cat([tensors[key], tensors[key]])


DAMAGED_WEIGHTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut short": (cut, "Cannot read the tensors"),
    "empty": (lambda p: p.write_bytes(b""), "Cannot read the tensors"),
    "garbage": (lambda p: p.write_bytes(os.urandom(500)), "Cannot read the tensors"),
    "text": (lambda p: p.write_text("version https://git-lfs"), "Cannot read the tensors"),
    "missing": (Path.unlink, "no weights|should be a file"),
    "a directory": (into_directory, "no weights|should be a file"),
    "a tensor is missing": (lambda p: retensor(p, lambda t, k: t.pop(k)), "is missing"),
    "no tensors": (lambda p: retensor(p, lambda t, k: t.clear()), "missing|no weights"),
    "a tensor is left over": (
        lambda p: retensor(p, lambda t, k: t.update({"left.over": torch.ones(2)})),
        r"left\.over",
    ),
    "a tensor has another shape": (lambda p: retensor(p, longer), r"has shape \(.*instead of \("),
}
DAMAGED_CONFIGS: dict[str, tuple[dict[str, Any] | Callable[[Path], Any], str]] = {
    "cut short": (cut, "Cannot read"),
    "empty": (lambda p: p.write_bytes(b""), "Cannot read"),
    "garbage": (lambda p: p.write_bytes(b"\xff\x00" * 50), "Cannot read"),
    "a list": (lambda p: p.write_text("[1, 2]"), "JSON object"),
    "an empty object": (lambda p: p.write_text("{}"), "has no"),
    "a number": (lambda p: p.write_text("3"), "JSON object"),
    "model type of another kind": ({"model_type": "roberta"}, "'roberta'"),
    "hidden size of another kind": ({"hidden_size": 768}, "768"),
}
ADAPTER_CONFIGS: dict[str, dict[str, Any]] = {
    "no name": {"name": ...},
    "name is a number": {"name": 5},
    "no configuration": {"config": ...},
    "configuration is text": {"config": "pfeiffer"},
    "configuration is a list": {"config": [1]},
    "unknown method": {"config__architecture": "nothing"},
    "another method": {"config__architecture": "lora"},
    "reduction in words": {"config__reduction_factor": "many"},
    "reduction of nothing": {"config__reduction_factor": 0},
    "reduction in a list": {"config__reduction_factor": [1, 2]},
    "another reduction": {"config__reduction_factor": 2},
    "no such activation": {"config__non_linearity": "sosilu"},
    "activation is a number": {"config__non_linearity": 7},
    "layers that are not there": {"config__leave_out": [99]},
    "layers in words": {"config__leave_out": "all"},
    "our own section is a list": {"flexheads": [1]},
    "our own section is text": {"flexheads": "1.0"},
    "our own section holds text": {"flexheads": {"config": "pfeiffer"}},
}
HEAD_CONFIGS: dict[str, dict[str, Any]] = {
    "no name": {"name": ...},
    "configuration is text": {"config": "x", "flexheads": {}},
    "no type": {"config__head_type": ..., "flexheads": {}},
    "unknown type": {"config__head_type": "nothing", "flexheads": {}},
    "another type": {"config__head_type": "masked_lm", "flexheads": {}},
    "layers in words": {"config__layers": "two", "flexheads": {}},
    "more layers": {"config__layers": 5, "flexheads": {}},
    "labels in words": {"config__num_labels": "three", "flexheads": {}},
    "fewer labels": {"config__num_labels": 2, "flexheads": {}},
    "labels are a list": {"config__label2id": ["a", "b", "c"], "flexheads": {}},
    "labels are not numbered": {"config__label2id": {"a": "b"}, "flexheads": {}},
    "no such activation": {"config__activation_function": "sosilu", "flexheads": {}},
    "our own section is a list": {"flexheads": [1]},
    "our own section holds text": {"flexheads": {"config": "x"}},
}
STATIC_CONFIGS: dict[str, dict[str, Any]] = {
    "no class": {"model_class": ...},
    "labels are a list": {"label2id": ["a", "b", "c"]},
    "labels are not numbered": {"label2id": {"a": "b", "c": "d", "e": "f"}},
    "labels are numbered wrongly": {"label2id": {"a": 1, "b": 2, "c": 3}},
    "fewer labels": {"label2id": {"a": 0, "b": 1}},
    "no such problem": {"problem_type": "sosilu"},
}


def refused(model: Any, directory: Path, what: str, message: str | None = None) -> None:
    """Loading fails, under every name, and says where it was reading."""
    loads = [
        lambda: model.load_adapter(directory, overwrite_ok=True, set_active=True),
        lambda: model.load_adapter(str(directory), load_as="new"),
    ]
    if what == "head":
        loads.append(lambda: model.load_head(directory, **named(model)))
    for load in loads:
        with pytest.raises(FlexheadsError, match=message) as caught:
            load()
        if isinstance(caught.value, UnknownNameError):
            assert "'nothing'" in str(caught.value), "a type that is not installed"
        else:
            assert isinstance(caught.value, CheckpointError)
            assert str(directory) in str(caught.value)


def named(model: Any) -> dict[str, Any]:
    return {"load_as": "new"} if hasattr(model, "heads") else {}


@pytest.mark.parametrize("what", WEIGHTS)
@pytest.mark.parametrize("case", DAMAGED_WEIGHTS)
def test_damaged_weights(case: str, what: str, model: Any, damaged: Path) -> None:
    damage, message = DAMAGED_WEIGHTS[case]
    damage(damaged / WEIGHTS[what])
    refused(model, damaged, what, message)


@pytest.mark.parametrize("what", CONFIGS)
@pytest.mark.parametrize("case", DAMAGED_CONFIGS)
def test_a_damaged_configuration(case: str, what: str, model: Any, damaged: Path) -> None:
    damage, message = DAMAGED_CONFIGS[case]
    if isinstance(damage, dict):
        edit(damaged / CONFIGS[what], **damage)
    else:
        damage(damaged / CONFIGS[what])
    refused(model, damaged, what, message)


@pytest.mark.parametrize("case", ADAPTER_CONFIGS)
def test_a_wrong_adapter_configuration(case: str, model: Any, damaged: Path) -> None:
    edit(damaged / CONFIGS["adapter"], **ADAPTER_CONFIGS[case])
    refused(model, damaged, "adapter")


@pytest.mark.parametrize("case", HEAD_CONFIGS)
def test_a_wrong_head_configuration(
    case: str, models: dict[str, Any], saved: dict[str, Path], tmp_path: Path, snapshot: Callable
) -> None:
    directory = Path(shutil.copytree(saved["flexible"], tmp_path / "x"))
    edit(directory / CONFIGS["head"], **HEAD_CONFIGS[case])
    before = snapshot(models["flexible"])
    refused(models["flexible"], directory, "head")
    assert snapshot(models["flexible"]) == before


@pytest.mark.parametrize("case", STATIC_CONFIGS)
def test_a_wrong_static_head_configuration(
    case: str, model: Any, saved: dict[str, Path], tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(saved["static"], tmp_path / "x"))
    edit(directory / CONFIGS["head"], **STATIC_CONFIGS[case])
    refused(model, directory, "head")


@pytest.mark.parametrize("case", ["cut", "garbage", "roberta", "missing", "no configuration"])
def test_with_head_false_does_not_read_the_head(
    case: str, models: dict[str, Any], damaged: Path, snapshot: Callable
) -> None:
    weights, config = damaged / WEIGHTS["head"], damaged / CONFIGS["head"]
    {
        "cut": lambda: cut(weights),
        "garbage": lambda: config.write_text("{"),
        "roberta": lambda: edit(config, model_type="roberta"),
        "missing": weights.unlink,
        "no configuration": config.unlink,
    }[case]()
    for target in models.values():
        before = snapshot(target)
        assert target.load_adapter(damaged, load_as="new", with_head=False) == "new"
        target.delete_adapter("new")
        assert snapshot(target) == before


class Evil:
    """Runs code where it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("what", WEIGHTS)
@pytest.mark.parametrize("writer", ["torch", "old torch", "pickle"])
def test_code_in_a_file_is_refused_and_not_run(
    what: str, writer: str, model: Any, damaged: Path
) -> None:
    proof = damaged.parent / "proof"
    tensors = load_file(damaged / WEIGHTS[what])
    (damaged / WEIGHTS[what]).unlink()
    name = {"adapter": "pytorch_adapter.bin", "head": "pytorch_model_head.bin"}[what]
    content = {**tensors, "evil": Evil(proof)}
    if writer == "pickle":
        (damaged / name).write_bytes(pickle.dumps(content))
    else:
        zipped = writer == "torch"
        torch.save(content, damaged / name, _use_new_zipfile_serialization=zipped)
    refused(model, damaged, what, "code in files is never run")
    assert not proof.exists()
    pickle.loads(pickle.dumps(Evil(proof)))
    assert proof.exists(), "the file would have done it"


def test_a_file_of_tensors_alone_is_read(damaged: Path, models: dict[str, Any]) -> None:
    tensors = load_file(damaged / WEIGHTS["adapter"])
    (damaged / WEIGHTS["adapter"]).unlink()
    torch.save(tensors, damaged / "pytorch_adapter.bin")
    model = models["flexible"]
    model.load_adapter(damaged, load_as="bin", with_head=False)
    model.delete_adapter("bin")
    torch.save({"a": 1}, damaged / "pytorch_adapter.bin")
    with pytest.raises(CheckpointError, match="dictionary of tensors"):
        model.load_adapter(damaged, load_as="bin")


# --- directories -----------------------------------------------------------------------------


def test_a_directory_that_is_none(model: Any, tmp_path: Path, saved: dict[str, Path]) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("x")
    for path, message in (
        ("nowhere", "There is no directory"),
        ("no/where/at/all", "There is no directory"),
        ("file", "is a file"),
        ("empty", "holds no adapter and no head"),
        ("other", "holds no adapter and no head"),
    ):
        for load in (model.load_adapter, model.load_head):
            for given in (tmp_path / path, str(tmp_path / path)):
                with pytest.raises(CheckpointError, match=message) as caught:
                    load(given)
                assert str(tmp_path / path) in str(caught.value)
    with pytest.raises(CheckpointError, match="is a file"):
        model.load_adapter(saved["flexible"] / "adapter_config.json")


def test_a_repository_that_is_none(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **kwargs: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(CheckpointError, match=r"no repository 'some/where'.*no network"):
        model.load_adapter("some/where")


def test_an_adapter_or_a_head_alone(model: Any, saved: dict[str, Path], tmp_path: Path) -> None:
    for what in ("adapter", "head"):
        (tmp_path / what).mkdir()
        for file in (CONFIGS[what], WEIGHTS[what]):
            shutil.copy(saved["flexible"] / file, tmp_path / what / file)
    with pytest.raises(CheckpointError, match=r"holds no adapter; see load_head"):
        model.load_adapter(tmp_path / "head", load_as="new")
    with pytest.raises(CheckpointError, match="holds no head"):
        model.load_head(tmp_path / "adapter")


# --- saving ----------------------------------------------------------------------------------


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Path]:
    """A directory that holds another adapter and head, and a file of the user's."""
    directory = tmp_path / "parent" / "target"
    build("flexible", seed=5).save_adapter(directory, "x")
    (directory / "notes.txt").write_text("mine")
    return directory


def saves(model: Any, directory: Path) -> list[Callable[[], Any]]:
    head = () if not hasattr(model, "heads") else ("x",)
    return [
        lambda: model.save_adapter(directory, "x"),
        lambda: model.save_head(directory, *head),
    ]


def test_saving_where_no_directory_can_be(model: Any, tmp_path: Path, files: Callable) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "config.json").write_text("{}")
    (tmp_path / "whole" / "model.safetensors").write_bytes(b"")
    before = files(tmp_path)
    for path, message in (
        ("file", "is a file"),
        ("file/below", "is a file"),
        ("file/far/below", "is a file"),
        ("whole", "whole model"),
    ):
        for save in saves(model, tmp_path / path):
            with pytest.raises(CheckpointError, match=message):
                save()
            assert files(tmp_path) == before


def test_saving_in_no_known_format(model: Any, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"'nothing'.*'adapterhub'"):
        model.save_adapter(tmp_path / "new", "x", format="nothing")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=repr)
def test_a_save_that_fails_half_way_leaves_the_files(
    after: int,
    error: BaseException,
    model: Any,
    target: Path,
    files: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    count = 0
    write = hub_format.write_tensors

    def fail(*args: Any) -> None:
        nonlocal count
        count += 1
        if count > after:
            raise error
        write(*args)

    monkeypatch.setattr(hub_format, "write_tensors", fail)
    before = files(target.parent.parent)
    for directory in (target, target.parent / "new", target.parent / "far" / "new"):
        count = 0
        with pytest.raises(type(error)):
            model.save_adapter(directory, "x")
        assert files(target.parent.parent) == before


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_a_save_that_fails_while_files_are_replaced(
    after: int, model: Any, target: Path, files: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 0
    replace = os.replace

    def fail(source: Any, destination: Any) -> None:
        nonlocal count
        count += 1
        if count == after + 1:
            raise OSError("busy")
        replace(source, destination)

    before = files(target.parent)
    monkeypatch.setattr(store.os, "replace", fail)
    with pytest.raises(OSError, match="busy"):
        model.save_adapter(target, "x")
    monkeypatch.undo()
    assert files(target.parent) == before


KILLED = """
import os, sys
import flexheads
from flexheads.checkpoints.hub import format as hub_format
from flexheads.testing import tiny_model

model = tiny_model("bert")
model.add_adapter("x", config="houlsby")
model.add_tagging_head("x")
write = hub_format.write_tensors

def die(path, tensors):
    if path.name == sys.argv[2]:
        path.write_bytes(b"half")
        os._exit(9)
    write(path, tensors)

hub_format.write_tensors = die
model.save_adapter(sys.argv[1], "x")
"""


def test_a_save_that_is_killed_leaves_the_old_files(target: Path, files: Callable) -> None:
    before = files(target)
    for directory in (target, target.parent / "new"):
        command = [sys.executable, "-c", textwrap.dedent(KILLED), directory, FILES[3]]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
        assert done.returncode == 9, done.stderr[-2000:]
    assert files(target) == before
    assert not (target.parent / "new").exists()
    model = randomise(tiny_model("bert"), std=0.1)
    model.load_adapter(target)
    build("flexible", seed=0).save_adapter(target, "x")
    assert files(target) != before
    model.load_adapter(target, overwrite_ok=True)


# --- whole models ----------------------------------------------------------------------------

SECTIONS: dict[str, dict[str, Any]] = {
    "a list": {"flexheads": [1]},
    "text": {"flexheads": "1.0"},
    "empty": {"flexheads": {}},
    "no heads": {"flexheads__heads": ...},
    "adapters are text": {"flexheads__adapters": "x"},
    "adapters are names": {"flexheads__adapters": ["x"]},
    "an adapter without fields": {"flexheads__adapters": [["x", 5]]},
    "an unknown method": {"flexheads__adapters": [["x", {"architecture": "nothing"}]]},
    "another adapter": {"flexheads__adapters": [["y", {"reduction_factor": 16}]]},
    "a head without a type": {"flexheads__heads": [["x", None, {}]]},
    "an unknown type": {"flexheads__heads": [["x", None, {"head_type": "nothing"}]]},
    "an active adapter that is none": {
        "flexheads__active_adapters": {"type": "Stack", "children": ["y"]}
    },
    "an unknown block": {"flexheads__active_adapters": {"type": "Heap", "children": ["x"]}},
    "active adapters are text": {"flexheads__active_adapters": "x"},
    "an active head that is none": {"flexheads__active_heads": [["y", None]]},
    "active heads are numbers": {"flexheads__active_heads": [5]},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Any]) -> Path:
    directory = tmp_path_factory.mktemp("whole")
    models["flexible"].save_pretrained(directory)
    return directory


@pytest.mark.parametrize("case", SECTIONS)
def test_a_damaged_section_of_a_whole_model(case: str, whole: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(whole, tmp_path / "x"))
    edit(directory / "config.json", **SECTIONS[case])
    with pytest.raises(FlexheadsError) as caught:
        BertModelWithHeads.from_pretrained(directory)
    assert str(directory) in str(caught.value) or "'nothing'" in str(caught.value)


def test_a_whole_model_whose_weights_are_damaged(whole: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(whole, tmp_path / "x"))
    weights = directory / "model.safetensors"
    retensor(weights, lambda t, k: t.pop(k))
    with pytest.raises(CheckpointError, match=r"adapter 'x'.*is missing"):
        BertModelWithHeads.from_pretrained(directory)
    shutil.copy(whole / "model.safetensors", weights)
    retensor(weights, longer)
    with pytest.raises(CheckpointError, match=r"adapter 'x'.*has shape"):
        BertModelWithHeads.from_pretrained(directory)
