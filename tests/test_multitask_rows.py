"""Several heads in one call: each gets exactly its rows, with their mask, pooling and labels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.utils.generic import ModelOutput

from flexheads import BatchSplit, MultiHeadOutput, Parallel, Rows, Stack
from flexheads.errors import CompositionError, ConfigError, LabelError, UnknownNameError
from flexheads.models.calls.tasks import Task, Tasks
from flexheads.testing import randomise, tiny_inputs, tiny_model

LENGTH, ROWS = 7, 8


def some(high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(3))


def spans() -> dict[str, Tensor]:
    return {
        "start_positions": torch.tensor([1, 2, 1, 0, 1, 2, 3, 1]),
        "end_positions": torch.tensor([2, 2, 3, 1, 4, 3, 3, 4]),
    }


# Head type: architecture, configuration, and labels of all rows.
TYPES: dict[str, tuple[str, dict[str, Any], dict[str, Tensor]]] = {
    "classification": ("bert", {"num_labels": 3}, {"labels": some(3, ROWS)}),
    "classification, mean": (
        "bert",
        {"num_labels": 3, "pooling": "mean"},
        {"labels": some(3, ROWS)},
    ),
    "classification, attention": (
        "bert",
        {"num_labels": 3, "pooling": "attention"},
        {"labels": some(3, ROWS)},
    ),
    "classification, last_token": (
        "gpt2",
        {"num_labels": 3, "pooling": "last_token"},
        {"labels": some(3, ROWS)},
    ),
    "classification, regression": ("bert", {"num_labels": 1}, {"labels": torch.rand(ROWS)}),
    "classification, mix": (
        "bert",
        {"num_labels": 3, "hidden_layer": "mix", "pooling": "max"},
        {"labels": some(3, ROWS)},
    ),
    "multilabel_classification": ("bert", {"num_labels": 4}, {"labels": some(2, ROWS, 4).float()}),
    "next_sentence": ("bert", {"num_labels": 2}, {"labels": some(2, ROWS)}),
    "tagging": ("bert", {"num_labels": 4}, {"labels": some(4, ROWS, LENGTH)}),
    "question_answering": ("bert", {}, spans()),
    "multiple_choice": ("bert", {"num_choices": 2}, {"labels": some(2, ROWS // 2)}),
    "masked_lm": ("bert", {}, {"labels": some(50, ROWS, LENGTH)}),
    "causal_lm": ("gpt2", {}, {"labels": some(50, ROWS, LENGTH)}),
    "seq2seq_lm": ("bart", {}, {"labels": some(50, ROWS, LENGTH)}),
    "image_classification": ("vit", {"num_labels": 3}, {"labels": some(3, ROWS)}),
}
each_type = pytest.mark.parametrize("name", TYPES)


def build(name: str) -> Any:
    """A model with the adapters and the heads ``one`` and ``two``, and the adapter ``shared``."""
    architecture, config, _ = TYPES[name]
    model = tiny_model(architecture)
    for head in ("one", "two"):
        model.add_head(head, name.partition(",")[0], **config)
        model.add_adapter(head, "double_seq_bn_inv" if architecture == "bert" else "lora")
    model.add_adapter("shared", "lora")
    model.active_head = None
    return randomise(model, std=0.2)


def inputs_of(model: Any) -> dict[str, Tensor]:
    """Rows of different lengths, so that a mask of another row would show."""
    inputs = tiny_inputs(model.config, batch=ROWS, length=LENGTH)
    if "attention_mask" in inputs:
        for row in range(ROWS):
            inputs["attention_mask"][row, LENGTH - row % 3 :] = 0
    return inputs


def of(values: dict[str, Tensor], rows: list[int], name: str) -> dict[str, Tensor]:
    """Some rows; of labels of examples with two choices those of these rows."""
    pairs = name == "multiple_choice"
    return {
        k: v[[r // 2 for r in rows[::2]]] if pairs and len(v) < ROWS else v[rows]
        for k, v in values.items()
    }


def assert_same(found: Any, expected: Any) -> None:
    assert isinstance(found, ModelOutput)
    tensors = [key for key, value in expected.items() if isinstance(value, Tensor)]
    assert "loss" in tensors
    for key in tensors:
        torch.testing.assert_close(found[key], expected[key], atol=2e-6, rtol=1e-5, msg=key)


# Pairs of rows, because of the choices.
ONE, TWO = [0, 1, 4, 5], [2, 3, 6, 7]
NAMES = ["one", "one", "two", "two"] * 2


@each_type
@pytest.mark.parametrize("adapters", ["own", "shared", "crossed", "none"])
def test_heads_by_row_equal_calls_with_these_rows_alone(name: str, adapters: str) -> None:
    model, labels = build(name), TYPES[name][2]
    inputs = inputs_of(model)
    crossed = ["shared", "shared", None, None, "two", "two", "shared", "shared"]
    rows: dict[str, Any] = {"own": NAMES, "crossed": crossed}
    setup = Rows(rows[adapters]) if adapters in rows else {"shared": "shared", "none": []}[adapters]
    own = {"one": of(labels, ONE, name), "two": of(labels, TWO, name)}
    with torch.no_grad():
        output = model(**inputs, adapter_names=setup, head=Rows(NAMES), labels=own)
        for head, which in (("one", ONE), ("two", TWO)):
            part = Rows([setup[row] for row in which]) if isinstance(setup, Rows) else setup
            alone = model(**of(inputs, which, ""), **own[head], adapter_names=part, head=head)
            assert_same(output[head], alone)
    assert output.head_names == ("one", "two")
    torch.testing.assert_close(output.loss, output["one"].loss + output["two"].loss)


@each_type
@pytest.mark.parametrize("block", ["Rows", "BatchSplit", "Parallel", "active_head"])
def test_heads_of_blocks_equal_calls_with_one(name: str, block: str) -> None:
    model, labels = build(name), TYPES[name][2]
    inputs, every = inputs_of(model), list(range(ROWS))
    setups: dict[str, tuple[Any, list[int], list[int]]] = {
        "Rows": (Rows(NAMES), ONE, TWO),
        "BatchSplit": (BatchSplit("one", "two", batch_sizes=[2, 6]), every[:2], every[2:]),
        "Parallel": (Parallel("one", "two"), every, every),
        "active_head": (None, every, every),
    }
    setup, *rows = setups[block]
    if block == "active_head":
        model.active_head = ["one", "two"]
    else:
        model.set_active_adapters(setup)
    own = {head: of(labels, which, name) for head, which in zip(("one", "two"), rows, strict=True)}
    with torch.no_grad():
        output = model(**inputs, labels=own)
        for head, which in zip(("one", "two"), rows, strict=True):
            adapters = [] if setup is None else head
            alone = model(**of(inputs, which, ""), **own[head], adapter_names=adapters, head=head)
            assert_same(output[head], alone)


def test_gradients_reach_exactly_the_heads_and_adapters_of_the_rows() -> None:
    model = build("tagging")
    inputs = inputs_of(model)
    model.requires_grad_(True)
    labels = {"one": some(4, 3, LENGTH)}
    model(**inputs, task=["one"] * 3 + ["two"] * 5, labels=labels).loss.backward()
    touched = {
        part
        for part in ("adapters.one", "adapters.two", "adapters.shared", "heads.one", "heads.two")
        for key, parameter in model.named_parameters()
        if key.startswith(f"{part}.") and parameter.grad is not None and parameter.grad.any()
    }
    assert touched == {"adapters.one", "heads.one"}


# --- task= ------------------------------------------------------------------------------------


def test_a_task_is_the_adapter_and_the_head_of_its_name() -> None:
    model = build("classification")
    inputs = inputs_of(model)
    with torch.no_grad():
        by_hand = model(**inputs, adapter_names=Rows(NAMES), head=Rows(NAMES))
        for task, tasks in (
            (NAMES, None),
            (torch.tensor([1, 1, 0, 0] * 2), ["two", "one"]),
            (torch.tensor([1, 1, 0, 0] * 2), Tasks(["two", "one"])),
        ):
            output = model(**inputs, task=task, tasks=tasks)
            for head in ("one", "two"):
                assert torch.equal(output[head].logits, by_hand[head].logits)
        whole = model(**inputs, task="two")
        assert torch.equal(whole.logits, model(**inputs, adapter_names="two", head="two").logits)


def test_tasks_without_an_adapter_follow_the_active_one_or_what_they_say() -> None:
    model = build("classification")
    model.add_classification_head("third", num_labels=2, set_active=False)
    inputs = inputs_of(model)
    names = ["third"] * 4 + ["two"] * 4
    with torch.no_grad():
        for active, first in (("shared", "shared"), (None, [])):
            model.set_active_adapters(active)
            found = model(**inputs, task=names)["third"].logits
            expected = model(**inputs, adapter_names=first, head="third").logits[:4]
            torch.testing.assert_close(found, expected)
        tasks = Tasks({"third": Task(adapter=[]), "two": Task(head="one", adapter="shared")})
        model.set_active_adapters(Stack("one", "shared"))
        output = model(**inputs, task=names, tasks=tasks)
        bare = model(**inputs, adapter_names=[], head="third").logits[:4]
        shared = model(**inputs, adapter_names="shared", head="one").logits[4:]
    assert output.head_names == ("one", "third")
    torch.testing.assert_close(output["third"].logits, bare)
    torch.testing.assert_close(output["one"].logits, shared)


def test_a_shared_adapter_runs_once_on_the_whole_batch() -> None:
    model = build("classification")
    inputs, seen = inputs_of(model), []
    part = next(iter(model.adapters["shared"].parts.values()))
    part.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[0]))
    tasks = {name: Task(adapter="shared") for name in ("one", "two")}
    with torch.no_grad():
        output = model(**inputs, task=NAMES, tasks=tasks)
    assert set(seen) <= {ROWS}
    assert output.head_names == ("one", "two")


def test_bad_tasks_and_rows_are_refused() -> None:
    model = build("classification")
    inputs = inputs_of(model)
    with pytest.raises(UnknownNameError, match="no head named 'thre"):
        model(**inputs, head=Rows(["one", "three"] * 4))
    with pytest.raises(CompositionError, match="the batch has 8"):
        model(**inputs, head=Rows(["one", "two"]))
    with pytest.raises(CompositionError, match="A row has one head"):
        model(**inputs, head=Rows([Stack("one", "two")] * 8))
    with pytest.raises(CompositionError, match="Parallel repeats the batch"):
        model(**inputs, adapter_names=Parallel("one", "two"), head=Rows(NAMES))
    with pytest.raises(ConfigError, match="not both"):
        model(**inputs, head="one", task="one")
    with pytest.raises(ConfigError, match="is missing"):
        model(**inputs, task=torch.zeros(8).long())
    with pytest.raises(UnknownNameError, match="no task named 2"):
        model(**inputs, task=torch.full((8,), 2), tasks=["one", "two"])
    with pytest.raises(UnknownNameError, match="no task named 'three'"):
        model(**inputs, task=["three"] * 8, tasks=["one", "two"])
    with pytest.raises(LabelError, match="head 'one'"):
        model(**inputs, task=NAMES, labels={"one": some(3, 3)})
    with pytest.raises(ConfigError, match="by name"):
        Tasks("ner")
    with pytest.raises(ConfigError, match="should be a Task"):
        Tasks({"ner": 3})  # type: ignore[dict-item]


def test_a_row_can_have_no_head() -> None:
    model = build("classification")
    inputs = inputs_of(model)
    with torch.no_grad():
        output = model(**inputs, adapter_names=[], head=Rows(["one", None, None, "one"] * 2))
        whole = model(**inputs, adapter_names=[], head="one").logits
    assert isinstance(output, MultiHeadOutput)
    torch.testing.assert_close(output["one"].logits, whole[[0, 3, 4, 7]])
