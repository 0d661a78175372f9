"""Defects of the ancestor and of the adapters library, each as a test that we do not share it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.activations import get_activation

import flexheads
from flexheads import AutoModelWithHeads, BatchSplit, BertModelWithHeads, Parallel, Rows, Stack
from flexheads.errors import CheckpointError, ConfigError, UnknownNameError
from flexheads.testing import randomise, tiny_config, tiny_inputs, tiny_model, tiny_static

POOLED: dict[str, Any] = {"layers": 1, "activation_function": None, "use_pooler": True}


def add(model: Any, name: str, labels: int | None = 2, config: Any = "pfeiffer", **kw: Any) -> None:
    """An adapter and a head of one name, random; no two names alike."""
    seed = sum(map(ord, name))
    model.add_adapter(name, config=config)
    randomise(model.adapters[name], std=0.2, seed=seed)
    if labels is not None:
        model.add_classification_head(name, num_labels=labels, **kw)
        randomise(model.heads[name], std=0.2, seed=seed + 1)


@torch.no_grad()
def logits(model: Any, name: str, rows: slice = slice(None), head: str | None = None) -> Tensor:
    inputs = {key: value[rows] for key, value in tiny_inputs(model.config, batch=4).items()}
    return model(**inputs, adapter_names=name, head=name if head is None else head).logits


@torch.no_grad()
def call(model: Any, **kwargs: Any) -> Any:
    return model(**tiny_inputs(model.config, batch=4), **kwargs)


def change(path: Path, **fields: Any) -> None:
    content = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(content | fields), encoding="utf-8")


def close(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=1e-6)


# --- 1: names that begin alike ---------------------------------------------------------------


def test_saving_a_name_saves_no_longer_name(model: Any, tmp_path: Path) -> None:
    for name in ("mrpc", "mrpc2", "mrpc.b"):
        add(model, name)
    model.save_adapter(tmp_path, "mrpc")
    for file in ("adapter.safetensors", "model_head.safetensors"):
        keys = list(load_file(tmp_path / file))
        assert all(".mrpc." in key for key in keys)
        assert not any("mrpc2" in key or "mrpc.b" in key for key in keys)


def test_loading_a_name_touches_no_longer_name(
    model: Any, tmp_path: Path, backbone_dir: str
) -> None:
    for name in ("mrpc", "mrpc2"):
        add(model, name)
    model.save_adapter(tmp_path, "mrpc")
    other = BertModelWithHeads.from_pretrained(backbone_dir)
    for name in ("mrpc2", "mrpc22", "new2"):
        add(other, name, 3)
    before = {name: logits(other, name) for name in other.heads}
    other.load_adapter(tmp_path)
    other.load_adapter(tmp_path, load_as="new")
    assert all(torch.equal(logits(other, name), value) for name, value in before.items())
    for name in ("mrpc", "new"):
        assert torch.equal(logits(other, name), logits(model, "mrpc"))


def test_a_file_with_two_heads_loads_the_one_that_it_names(
    model: Any, tmp_path: Path, backbone_dir: str
) -> None:
    """As the ancestor wrote them."""
    add(model, "mrpc")
    add(model, "mrpc2")
    model.save_adapter(tmp_path, "mrpc")
    tensors = load_file(tmp_path / "model_head.safetensors")
    tensors |= {k.replace(".mrpc.", ".mrpc2."): t + 1 for k, t in tensors.items()}
    save_file(tensors, tmp_path / "model_head.safetensors")
    expected = {name: logits(model, name) for name in ("mrpc", "mrpc2")}
    model.load_adapter(tmp_path, overwrite_ok=True)
    assert all(torch.equal(logits(model, name), value) for name, value in expected.items())
    fresh = BertModelWithHeads.from_pretrained(backbone_dir)
    fresh.load_adapter(tmp_path, load_as="new")
    assert list(fresh.heads) == ["new"]
    assert torch.equal(logits(fresh, "new"), expected["mrpc"])


# --- 2 and 4: heads where rows go different ways ---------------------------------------------


@pytest.mark.parametrize("pooled", [{}, POOLED], ids=["first token", "pooler"])
def test_each_head_sees_the_rows_of_its_branch(model: Any, pooled: dict[str, Any]) -> None:
    add(model, "a", 2, **pooled)
    add(model, "b", 3, **pooled)
    model.set_active_adapters(Parallel("a", "b"))
    assert model.active_head == ["a", "b"]
    output = call(model)
    close(output["a"].logits, logits(model, "a"))
    close(output["b"].logits, logits(model, "b"))
    model.set_active_adapters(BatchSplit("a", "b", batch_sizes=[1, 3]))
    output = call(model, labels={"a": torch.tensor([0, 1, 0, 1]), "b": torch.tensor([2, 1, 0, 2])})
    close(output["a"].logits, logits(model, "a", slice(1)))
    close(output["b"].logits, logits(model, "b", slice(1, 4)))
    close(
        output["b"].loss,
        torch.nn.functional.cross_entropy(output["b"].logits, torch.tensor([1, 0, 2])),
    )
    output = call(model, adapter_names=Rows(["b", "a", "a", "b"]))
    close(output["a"].logits, logits(model, "a", slice(1, 3)))
    close(output["b"].logits, logits(model, "b", slice(0, None, 3)))


def test_converted_heads_see_the_rows_of_their_branch(tmp_path: Path) -> None:
    """They use the pooler, whose output the ancestor did not split."""
    model = None
    for name in ("a", "b"):
        static = flexheads.init(tiny_static("BertForSequenceClassification", num_labels=3))
        with torch.no_grad():
            static.classifier.weight.normal_(std=0.2 if name == "a" else 0.4)
        static.add_adapter(name)
        static.save_adapter(tmp_path / name, name)
        if model is None:
            static.save_pretrained(tmp_path / "model")
            model = AutoModelWithHeads.from_pretrained(tmp_path / "model")
        model.load_adapter(tmp_path / name, overwrite_ok=True)
    assert model is not None
    output = call(model, adapter_names=Parallel("a", "b"))
    for name in ("a", "b"):
        assert output[name].logits.shape == (4, 3)
        close(output[name].logits, logits(model, name))


@pytest.mark.parametrize(
    "setup", [Parallel("a", "b"), BatchSplit("a", "b", batch_sizes=[1, 3]), Rows(["a", "b"] * 2)]
)
@pytest.mark.parametrize("default", [True, False])
def test_head_is_honoured_where_rows_go_different_ways(
    model: Any, setup: Any, default: bool
) -> None:
    add(model, "a", 2)
    add(model, "b", 3)
    model.add_classification_head("c", num_labels=5)
    if default:
        model.set_active_adapters(setup)
    setup = {} if default else {"adapter_names": setup}
    output = call(model, head="c", **setup)
    expected = {name: logits(model, name, head="c") for name in ("a", "b")}
    if isinstance(model.active_adapters or setup["adapter_names"], Parallel):
        close(output.logits, torch.cat([expected["a"], expected["b"]]))
    elif isinstance(model.active_adapters or setup["adapter_names"], BatchSplit):
        close(output.logits, torch.cat([expected["a"][:1], expected["b"][1:]]))
    else:
        rows = torch.arange(4)[:, None] % 2 == 0
        close(output.logits, torch.where(rows, expected["a"], expected["b"]))
    assert [o.logits.shape[1] for o in call(model, head=["c", "a"], **setup).ordered] == [5, 2]
    assert call(model, head=[], **setup).last_hidden_state.shape[2] == 32


# --- 3: what "gelu" meant --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "written", "meant"),
    [
        (None, "gelu", "gelu_new"),
        (None, "gelu_orig", "gelu"),
        (None, "relu", "relu"),
        ("3.2.1", "gelu", "gelu"),
        ("adapters.1.3.0", "gelu", "gelu"),
    ],
)
def test_activations_mean_what_the_writer_meant(
    model: Any, tmp_path: Path, version: str | None, written: str, meant: str
) -> None:
    for name, word in (("x", "relu"), ("expected", meant)):
        model.add_adapter(name, config=f"pfeiffer[non_linearity={word}]")
        model.add_classification_head(name, activation_function=word)
        randomise(model.adapters[name], std=1.0)
        randomise(model.heads[name], std=1.0)
    model.save_adapter(tmp_path, "x")
    for file, field in (
        ("adapter_config.json", "non_linearity"),
        ("head_config.json", "activation_function"),
    ):
        content = json.loads((tmp_path / file).read_text("utf-8"))
        content["config"][field] = written
        change(tmp_path / file, config=content["config"], version=version, flexheads={})
    model.load_adapter(tmp_path, load_as="found")
    assert model.heads["found"].config.activation_function == meant
    assert model.adapters["found"].config.non_linearity == meant
    assert torch.equal(logits(model, "found"), logits(model, "expected"))
    difference = get_activation("gelu")(torch.ones(1)) - get_activation("gelu_new")(torch.ones(1))
    assert difference.abs() > 1e-5


# --- 5: all or nothing -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["flexible", "static"])
def test_a_failed_head_leaves_no_adapter_behind(
    kind: str, model: Any, tmp_path: Path, snapshot: Callable
) -> None:
    if kind == "flexible":
        add(model, "x", 3)
        model.save_adapter(tmp_path, "x")
        model.delete_adapter("x")
        model.delete_head("x")
    else:
        static = flexheads.init(tiny_static("BertForSequenceClassification", num_labels=3))
        static.add_adapter("x")
        static.save_adapter(tmp_path, "x")
    tensors = load_file(tmp_path / "model_head.safetensors")
    key = next(key for key in tensors if key.endswith("bias"))
    del tensors[key]
    save_file(tensors, tmp_path / "model_head.safetensors")
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=r"bias is missing"):
        model.load_adapter(tmp_path, set_active=True)
    assert snapshot(model) == before
    model.load_adapter(tmp_path, with_head=False)
    assert (list(model.adapters), list(model.heads)) == (["x"], [])


def test_a_head_that_cannot_convert_can_be_left_out(
    model: Any, tmp_path: Path, snapshot: Callable
) -> None:
    static = flexheads.init(tiny_static("BertForSequenceClassification"))
    static.add_adapter("x")
    static.save_adapter(tmp_path, "x")
    change(tmp_path / "head_config.json", model_class="BertForSomethingElse")
    before = snapshot(model)
    with pytest.raises(ValueError, match="BertForSomethingElse"):
        model.load_adapter(tmp_path)
    assert snapshot(model) == before
    model.load_adapter(tmp_path, with_head=False)
    assert list(model.adapters) == ["x"]


# --- 6: another shape ------------------------------------------------------------------------


def test_loading_over_an_adapter_of_another_shape(
    model: Any, tmp_path: Path, backbone_dir: str
) -> None:
    add(model, "x", None, "houlsby[reduction_factor=4, non_linearity=relu]")
    model.save_adapter(tmp_path, "x")
    for config in ("pfeiffer", "lora", "houlsby"):
        other = BertModelWithHeads.from_pretrained(backbone_dir)
        other.add_adapter("x", config=config, set_active=True)
        with pytest.raises(ConfigError, match="overwrite_ok"):
            other.load_adapter(tmp_path)
        other.load_adapter(tmp_path, overwrite_ok=True)
        assert other.adapters["x"].config == model.adapters["x"].config
        state = other.adapters["x"].state_dict()
        assert all(torch.equal(t, state[k]) for k, t in model.adapters["x"].state_dict().items())
        assert torch.equal(call(other)[0], call(model, adapter_names="x")[0])


# --- 7: another architecture or size ---------------------------------------------------------


@pytest.mark.parametrize("what", ["adapter", "head"])
def test_a_file_for_another_architecture_is_refused_by_name(
    what: str, model: Any, tmp_path: Path, snapshot: Callable
) -> None:
    add(model, "x")
    model.save_adapter(tmp_path, "x")
    model.save_head(tmp_path / "head", "x")
    change(tmp_path / f"{what}_config.json", model_type="roberta")
    change(tmp_path / "head" / "head_config.json", model_type="roberta")
    static = flexheads.init(tiny_static("BertForSequenceClassification"))
    for target in (model, static):
        before = snapshot(target)
        message = rf"{what} was made for a 'roberta' model, but this model is 'bert'"
        with pytest.raises(CheckpointError, match=message):
            target.load_adapter(tmp_path, load_as="new")
        with pytest.raises(CheckpointError, match="'roberta'"):
            target.load_head(tmp_path / "head")
        assert snapshot(target) == before


def test_another_hidden_size_is_refused(tmp_path: Path, snapshot: Callable) -> None:
    wide = tiny_model("bert", hidden_size=64)
    add(wide, "x")
    wide.save_adapter(tmp_path, "x")
    model = tiny_model("bert")
    before = snapshot(model)
    for load in (model.load_adapter, model.load_head):
        with pytest.raises(CheckpointError, match=r"hidden size 64, but this model has 32"):
            load(tmp_path)
        assert snapshot(model) == before
    for file in ("adapter_config.json", "head_config.json"):
        change(tmp_path / file, hidden_size=None)
    for load in (model.load_adapter, model.load_head):
        with pytest.raises(CheckpointError, match=r"has shape \(.*64.*\) instead of \(.*32.*\)"):
            load(tmp_path)
        assert snapshot(model) == before


# --- 8: nothing is guessed -------------------------------------------------------------------


@pytest.mark.parametrize("labels", [1, 3, 7])
def test_the_number_of_labels_is_read_off_the_weights(
    labels: int, model: Any, tmp_path: Path
) -> None:
    static = tiny_static("BertForTokenClassification", num_labels=labels)
    flexheads.init(static).add_adapter("x")
    static.save_adapter(tmp_path, "x")
    content = json.loads((tmp_path / "head_config.json").read_text("utf-8"))
    del content["num_labels"], content["label2id"]
    (tmp_path / "head_config.json").write_text(json.dumps(content), encoding="utf-8")
    model.load_adapter(tmp_path)
    assert model.config.prediction_heads["x"]["num_labels"] == labels
    assert model.get_labels("x") == [f"LABEL_{n}" for n in range(labels)]


@pytest.mark.parametrize("choices", [2, 3, 5])
def test_the_number_of_choices_comes_from_the_input(choices: int, tmp_path: Path) -> None:
    static = flexheads.init(tiny_static("BertForMultipleChoice", num_labels=4))
    static.save_pretrained(tmp_path / "model")
    static.add_adapter("x")
    static.save_adapter(tmp_path, "x")
    model = AutoModelWithHeads.from_pretrained(tmp_path / "model")
    model.load_adapter(tmp_path)
    ids = torch.arange(3, 3 + 2 * choices * 6).view(2, choices, 6) % 99
    with torch.no_grad():
        expected = static(ids, adapter_names="x").logits
        found = model(ids, adapter_names="x", head="x").logits
    assert found.shape == (2, choices)
    close(found, expected)


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_the_problem_type_survives_conversion(problem: str, model: Any, tmp_path: Path) -> None:
    changes = {"num_labels": 3, "problem_type": problem}
    static = flexheads.init(tiny_static("BertForSequenceClassification", **changes))
    static.add_adapter("x")
    static.save_adapter(tmp_path, "x")
    model.load_adapter(tmp_path)
    assert model.heads["x"].problem_type == problem


# --- 9: half-applied states ------------------------------------------------------------------


def test_deleting_one_of_several_active_heads(model: Any) -> None:
    for name in ("a", "b", "c"):
        add(model, name)
    model.active_head = ["a", "b", "c"]
    model.delete_head("b")
    assert model.active_head == ["a", "c"]
    assert list(call(model)) == ["a", "c"]
    with pytest.raises(UnknownNameError, match=r"no head named 'b'.*Known: 'a', 'c'"):
        model.delete_head("b")


@pytest.mark.parametrize(
    "setup", [Parallel("a", "b"), BatchSplit("a", Stack("a", "b"), batch_sizes=2), Rows(["a", "b"])]
)
def test_a_missing_head_of_a_branch_changes_nothing(
    setup: Any, model: Any, snapshot: Callable
) -> None:
    add(model, "a")
    add(model, "b", None)
    model.set_active_adapters("a")
    before = snapshot(model)
    with pytest.raises(UnknownNameError, match=r"no head named 'b'.*Known: 'a'"):
        model.set_active_adapters(setup)
    assert snapshot(model) == before
    with pytest.raises(UnknownNameError, match=r"no head named 'b'"):
        call(model, adapter_names=setup)
    assert snapshot(model) == before
    with pytest.raises(UnknownNameError, match=r"no head named 'b'"):
        model.train_adapter(setup)
    assert snapshot(model) == before


def test_active_heads_are_checked(model: Any, snapshot: Callable) -> None:
    add(model, "a")
    before = snapshot(model)
    for wrong in ("b", ["a", "b"], ["b"]):
        with pytest.raises(UnknownNameError, match=r"no head named 'b'.*Known: 'a'"):
            model.active_head = wrong
        assert snapshot(model) == before


def test_a_failed_adapter_leaves_no_trace(model: Any, snapshot: Callable) -> None:
    add(model, "a.b")
    assert list(model.config.adapters) == ["a.b"]
    before = snapshot(model)
    for wrong in ("nope", {"no_such_field": 1}, "pfeiffer[leave_out=[9]]"):
        with pytest.raises(ValueError, match=r"nope|no_such_field|leave_out"):
            model.add_adapter("c.d", config=wrong)
        assert snapshot(model) == before


# --- 10: which head is active ----------------------------------------------------------------


def test_every_way_to_activate_an_adapter_activates_its_head(model: Any, tmp_path: Path) -> None:
    add(model, "a")
    add(model, "b")
    assert model.active_head == "b"
    model.train_adapter("a")
    assert (model.active_adapters, model.active_head) == (Stack("a"), "a")
    model.add_classification_head("c", set_active=False)
    model.add_adapter("c", config="pfeiffer", set_active=True)
    assert (model.active_adapters, model.active_head) == (Stack("c"), "c")
    model.active_adapters = "b"
    assert model.active_head == "b"
    model.save_pretrained(tmp_path)
    again = BertModelWithHeads.from_pretrained(tmp_path)
    assert (again.active_adapters, again.active_head) == (Stack("b"), "b")
    model.set_active_adapters("a")
    model.save_pretrained(tmp_path)
    assert BertModelWithHeads.from_pretrained(tmp_path).active_head == "a"


# --- 11: the one head of a static model ------------------------------------------------------


def test_a_second_adapter_does_not_replace_the_head_silently(tmp_path: Path) -> None:
    for seed, name in enumerate(("a", "b")):
        static = flexheads.init(tiny_static("BertForSequenceClassification"))
        randomise(static.classifier, std=0.2, seed=seed)
        static.add_adapter(name)
        static.save_adapter(tmp_path / name, name)
    model = flexheads.init(tiny_static("BertForSequenceClassification", seed=3))
    model.load_adapter(tmp_path / "a")
    first = model.classifier.weight.clone()
    model.load_adapter(tmp_path / "b", with_head=False)
    assert torch.equal(model.classifier.weight, first)
    model.delete_adapter("b")
    with pytest.warns(UserWarning, match=r"adapter 'a' is replaced.*with_head=False") as caught:
        model.load_adapter(tmp_path / "b")
    assert caught[0].filename == __file__
    assert not torch.equal(model.classifier.weight, first)
    model.load_adapter(tmp_path / "b", overwrite_ok=True)  # the same head once more: no warning


# --- 12: whole models of the first generation ------------------------------------------------


def test_a_whole_model_of_the_first_generation_is_no_type_error(
    tmp_path: Path, backbone_dir: str
) -> None:
    """Its configuration lists pairs where later generations expected tuples."""
    source = transformers.BertModel.from_pretrained(backbone_dir)
    source.config.adapters = {
        "adapters": {"task": ["text_task", "pfeiffer"]},
        "config_map": {"text_task": "pfeiffer"},
    }
    source.config.prediction_heads = {"task": {"head_type": "classification", "num_labels": 3}}
    source.save_pretrained(tmp_path)
    model = BertModelWithHeads.from_pretrained(tmp_path)
    assert (len(model.adapters), len(model.heads)) == (0, 0)
    assert (model.config.adapters, model.config.prediction_heads) == ({}, {})
    assert all(torch.equal(model.bert.state_dict()[k], t) for k, t in source.state_dict().items())
    add(model, "task")
    assert call(model, adapter_names="task").logits.shape == (4, 2)


# --- 14: files that are not there, arguments that are changed --------------------------------


def test_head_weights_without_their_configuration_are_no_silent_no_op(
    model: Any, tmp_path: Path, snapshot: Callable
) -> None:
    add(model, "x")
    model.save_adapter(tmp_path, "x")
    (tmp_path / "head_config.json").unlink()
    before = snapshot(model)
    for arguments in ({"overwrite_ok": True}, {"load_as": "y"}):
        with pytest.raises(CheckpointError, match=r"head_config\.json"):
            model.load_adapter(tmp_path, **arguments)
        with pytest.raises(CheckpointError, match=r"head_config\.json"):
            model.load_head(tmp_path, **arguments)
        assert snapshot(model) == before
    assert model.load_adapter(tmp_path, load_as="y", with_head=False) == "y"


@pytest.mark.parametrize("kind", ["qa", "tagging"])
def test_labels_are_not_changed_in_place(kind: str, model: Any) -> None:
    getattr(model, f"add_{kind}_head")("x")
    if kind == "qa":
        labels = {
            "start_positions": torch.tensor([0, -100, 99, 3]),
            "end_positions": torch.tensor([1, 2, 7, 400]),
        }
    else:
        labels = {"labels": torch.randint(0, 2, (4, 7), generator=torch.Generator().manual_seed(0))}
    before = {key: value.clone() for key, value in labels.items()}
    assert torch.isfinite(call(model, **labels).loss)
    assert all(torch.equal(labels[key], value) for key, value in before.items())


# --- labels of the configuration -------------------------------------------------------------


def test_language_model_heads_leave_the_label_names_alone(model: Any, tmp_path: Path) -> None:
    names = {0: "no", 1: "yes", 2: "maybe"}
    model.add_classification_head("x", id2label=names)
    for add_lm in (model.add_masked_lm_head, model.add_causal_lm_head):
        add_lm(add_lm.__name__)
        assert model.active_head == add_lm.__name__
        assert model.config.id2label == names
        assert model.config.num_labels == 3
    static = flexheads.init(transformers.BertForMaskedLM(tiny_config("bert", id2label=names)))
    static.add_adapter("y")
    static.save_adapter(tmp_path, "y")
    model.load_adapter(tmp_path, set_active=True)
    assert model.active_head == "y"
    assert model.config.id2label == names
    static.load_head(tmp_path)
    assert static.config.id2label == names


def test_label_names_are_checked(model: Any, snapshot: Callable) -> None:
    before = snapshot(model)
    for arguments in (
        {"num_labels": 3, "id2label": {0: "a", 1: "b"}},
        {"id2label": {0: "a", 1: "a"}},
        {"id2label": {1: "a", 2: "b"}},
    ):
        with pytest.raises(ValueError, match="label"):
            model.add_classification_head("x", **arguments)
        assert snapshot(model) == before


def test_label_names_follow_the_active_head(model: Any) -> None:
    add(model, "a", 2)
    add(model, "b", 4)
    for name, count in (("a", 2), ("b", 4)):
        model.set_active_adapters(name)
        assert model.config.num_labels == count
    model.add_classification_head("b", num_labels=5, overwrite_ok=True)
    assert model.config.num_labels == 5
