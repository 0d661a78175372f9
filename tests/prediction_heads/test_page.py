"""The page on prediction heads, sentence by sentence: heads, adapters, and single calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndCrossAttentions,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

import flexheads
from flexheads import AutoModelWithHeads, BertModelWithHeads, MultiHeadOutput, Parallel
from flexheads.errors import LabelError, UnknownNameError
from flexheads.testing import randomise

from .pages import IDS, logits, prepare

# --- 1: a model without heads ----------------------------------------------------------------


def test_a_fresh_model_has_no_heads(model: Any, backbone_dir: str) -> None:
    assert type(model).__name__ == "BertModelWithHeads"
    assert not model.training
    assert len(model.heads) == 0
    assert list(model.heads) == []
    assert model.active_head is None
    assert model.active_adapters is None
    assert model.config.prediction_heads == {}
    output = model(IDS)
    assert isinstance(output, BaseModelOutputWithPoolingAndCrossAttentions)
    plain = flexheads.AutoModel.from_pretrained(backbone_dir)
    assert torch.equal(output.last_hidden_state, plain(IDS).last_hidden_state)
    assert torch.equal(output.pooler_output, plain(IDS).pooler_output)


def test_the_auto_class_picks_the_class_by_the_config(backbone_dir: str) -> None:
    found = AutoModelWithHeads.from_pretrained(backbone_dir)
    assert type(found) is BertModelWithHeads
    assert type(AutoModelWithHeads.from_config(found.config)) is BertModelWithHeads
    import flexheads_bert

    assert flexheads_bert.BertModelWithHeads is BertModelWithHeads


def test_labels_without_a_head_are_refused(model: Any) -> None:
    with pytest.raises(LabelError, match="no head is active"):
        model(IDS, labels=torch.tensor([0, 1, 0]))


# --- 2: adding heads -------------------------------------------------------------------------


def test_add_classification_head(model: Any) -> None:
    model.add_classification_head("mrpc", num_labels=2)
    assert list(model.heads) == ["mrpc"]
    assert model.active_head == "mrpc"
    assert model.config.prediction_heads["mrpc"]["head_type"] == "classification"
    assert model.config.num_labels == 2
    output = model(IDS, labels=torch.tensor([0, 1, 0]))
    assert isinstance(output, SequenceClassifierOutput)
    assert output.logits.shape == (3, 2)
    expected = torch.nn.functional.cross_entropy(output.logits, torch.tensor([0, 1, 0]))
    assert torch.equal(output.loss, expected)
    # Two layers with tanh between, on the first token's hidden state, as the page's releases had.
    first, second = (m for m in model.heads["mrpc"].modules() if isinstance(m, torch.nn.Linear))
    by_hand = second(torch.tanh(first(model(IDS, head=[]).last_hidden_state[:, 0])))
    assert torch.allclose(output.logits, by_hand, atol=1e-6)


def test_several_named_heads_stand_side_by_side(model: Any) -> None:
    model.add_classification_head("mrpc", num_labels=2)
    before = logits(model)
    model.add_classification_head("mnli", num_labels=3)
    model.add_tagging_head("ner", num_labels=5)
    assert list(model.heads) == ["mrpc", "mnli", "ner"]
    assert model.active_head == "ner", "the newest head is active"
    assert model.config.num_labels == 5
    model.active_head = "mrpc"
    assert torch.equal(logits(model), before)
    assert model.config.num_labels == 2


def test_config_options_of_a_classification_head(model: Any) -> None:
    names = {0: "no", 1: "yes", 2: "maybe"}
    options: dict[str, Any] = {"layers": 3, "activation_function": "relu", "bias": False}
    model.add_classification_head(
        "a", 3, multilabel=True, id2label=names, use_pooler=True, dropout_prob=0.25, **options
    )
    layers = [m for m in model.heads["a"].modules() if isinstance(m, torch.nn.Linear)]
    assert [tuple(m.weight.shape) for m in layers] == [(32, 32), (32, 32), (3, 32)]
    assert [m.bias is None for m in layers] == [False, False, True]
    assert {m.p for m in model.heads["a"].modules() if isinstance(m, torch.nn.Dropout)} == {0.25}
    assert model.get_labels("a") == ["no", "yes", "maybe"]
    assert model.get_labels_dict("a") == names
    assert model.config.id2label == names
    assert model.config.label2id == {"no": 0, "yes": 1, "maybe": 2}

    hidden = model(IDS, head=[]).pooler_output
    for number, layer in enumerate(layers):
        hidden = layer(torch.relu(hidden) if number else hidden)
    labels = torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1]])
    output = model(IDS, labels=labels)
    assert torch.allclose(output.logits, hidden, atol=1e-6)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(output.logits, labels)
    assert torch.allclose(output.loss, expected, atol=1e-6)


def test_dropout_of_a_head_follows_the_model_by_default(model: Any) -> None:
    model.config.classifier_dropout = 0.37
    model.add_classification_head("a")
    assert {m.p for m in model.heads["a"].modules() if isinstance(m, torch.nn.Dropout)} == {0.37}


def test_add_regression_head(model: Any) -> None:
    model.add_classification_head("sts", num_labels=1)
    scores = torch.tensor([0.5, 1.5, -1.0])
    output = model(IDS, labels=scores)
    assert output.logits.shape == (3, 1)
    assert torch.equal(output.loss, ((output.logits[:, 0] - scores) ** 2).mean())


def test_add_tagging_head(model: Any) -> None:
    model.add_tagging_head("ner", num_labels=4)
    labels = torch.randint(0, 4, IDS.shape, generator=torch.Generator().manual_seed(0))
    labels[0, :3] = -100
    mask = torch.ones_like(IDS)
    mask[2, 3:] = 0
    output = model(IDS, attention_mask=mask, labels=labels)
    assert isinstance(output, TokenClassifierOutput)
    assert output.logits.shape == (3, 6, 4)
    counted = (labels != -100) & (mask == 1)
    expected = torch.nn.functional.cross_entropy(output.logits[counted], labels[counted])
    assert torch.allclose(output.loss, expected, atol=1e-6)
    assert (labels[2] >= 0).all(), "labels were changed in place"


def test_add_qa_head(model: Any) -> None:
    model.add_qa_head("squad")
    starts, ends = torch.tensor([0, 2, 99]), torch.tensor([1, 3, 6])
    output = model(IDS, start_positions=starts, end_positions=ends)
    assert isinstance(output, QuestionAnsweringModelOutput)
    assert output.start_logits.shape == output.end_logits.shape == (3, 6)
    cross = torch.nn.functional.cross_entropy
    expected = cross(output.start_logits[:2], starts[:2]) + cross(output.end_logits[:2], ends[:2])
    assert torch.allclose(output.loss, expected / 2, atol=1e-6)


def test_add_multiple_choice_head(model: Any) -> None:
    model.add_multiple_choice_head("swag", num_choices=3)
    choices = IDS[:, :4].reshape(1, 3, 4).repeat(2, 1, 1)
    output = model(choices, labels=torch.tensor([2, 0]))
    assert isinstance(output, MultipleChoiceModelOutput)
    assert output.logits.shape == (2, 3)
    flat = model(choices.flatten(0, 1), labels=torch.tensor([2, 0]))
    assert torch.equal(flat.logits, output.logits)
    assert torch.equal(flat.loss, output.loss)


def test_the_ancestors_signatures_hold_by_position(model: Any) -> None:
    names = {0: "a", 1: "b", 2: "c"}
    model.add_classification_head("1", 3, 1, None, False, False, names, True)
    model.add_multiple_choice_head("2", 3, 1, None, False, names, True)
    model.add_tagging_head("3", 3, 2, "relu", False, names)
    model.add_qa_head("4", 2, 2, "relu", False, {0: "start", 1: "end"})
    described = model.config.prediction_heads
    assert [described[n]["layers"] for n in "1234"] == [1, 1, 2, 2]
    assert [described[n]["use_pooler"] for n in "12"] == [True, True]
    assert described["4"]["label2id"] == {"start": 0, "end": 1}
    model.add_classification_head("1", 5, overwrite_ok=True)
    assert list(model.heads) == ["1", "2", "3", "4"]
    assert model.config.prediction_heads["1"]["num_labels"] == 5


# --- 3: an adapter and its head --------------------------------------------------------------


def test_set_active_adapters_activates_adapter_and_head(model: Any) -> None:
    model.add_classification_head("mrpc", num_labels=2)
    model.add_adapter("mrpc", config="pfeiffer")
    assert "mrpc" in model.config.adapters
    assert model.active_adapters is None, "adding an adapter does not activate it"
    randomise(model.adapters["mrpc"], std=0.2)
    bare = logits(model)
    model.add_classification_head("other", num_labels=4)
    model.set_active_adapters("mrpc")
    assert model.active_adapters == flexheads.Stack("mrpc")
    assert model.active_head == "mrpc"
    assert model.config.num_labels == 2
    assert logits(model).shape == (3, 2)
    assert not torch.allclose(logits(model), bare, atol=1e-3)
    assert torch.equal(logits(model, adapter_names=[]), bare)
    model.set_active_adapters(None)
    assert (model.active_adapters, model.active_head) == (None, "mrpc")
    assert torch.equal(logits(model), bare)


def test_an_adapter_without_a_head_leaves_the_head_alone(mrpc: Any) -> None:
    mrpc.add_adapter("language", config="pfeiffer")
    mrpc.set_active_adapters("language")
    assert (mrpc.active_adapters, mrpc.active_head) == (flexheads.Stack("language"), "mrpc")
    mrpc.set_active_adapters(["mrpc", "language"])
    assert mrpc.active_head == "mrpc"


def test_the_last_adapter_of_a_stack_chooses_the_head(model: Any) -> None:
    prepare(model, "a", "b")
    model.set_active_adapters(["a", "b"])
    assert model.active_head == "b"
    model.active_adapters = ["b", "a"]
    assert model.active_head == "a"


@pytest.mark.parametrize("setup", ["nope", ["mrpc", "nope"], Parallel("mrpc", "nope")])
def test_a_missing_adapter_raises_and_changes_nothing(
    mrpc: Any, setup: Any, snapshot: Callable
) -> None:
    mrpc.add_classification_head("nope", set_active=False)
    before = snapshot(mrpc)
    for activate in (mrpc.set_active_adapters, mrpc.train_adapter):
        with pytest.raises(UnknownNameError, match=r"no adapter named 'nope'.*Known: 'mrpc'"):
            activate(setup)
        assert snapshot(mrpc) == before


# --- 4: one call -----------------------------------------------------------------------------


def test_a_call_overrides_adapters_and_head(model: Any, snapshot: Callable) -> None:
    prepare(model, "a", "b", "c")
    expected = {}
    for name in "abc":
        model.set_active_adapters(name)
        expected[name] = logits(model)
    model.set_active_adapters("a")
    before = snapshot(model)
    assert torch.equal(logits(model, adapter_names="b", head="b"), expected["b"])
    assert torch.equal(logits(model, adapter_names=["c"], head="c"), expected["c"])
    assert logits(model, head="c").shape == (3, 4)
    assert logits(model, adapter_names="c").shape == (3, 2), "adapter_names leaves the head alone"
    assert not torch.equal(logits(model, adapter_names="c"), expected["a"])
    several = model(IDS, head=["a", "c"])
    assert isinstance(several, MultiHeadOutput)
    assert [o.logits.shape[1] for o in several.ordered] == [2, 4]
    assert torch.equal(several["a"].logits, expected["a"])
    assert model(IDS, head=[]).last_hidden_state.shape == (3, 6, 32)
    assert snapshot(model) == before
    assert torch.equal(logits(model), expected["a"])


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        ({"adapter_names": "mrpx"}, "adapter"),
        ({"adapter_names": ["mrpc", "mrpx"]}, "adapter"),
        ({"head": "mrpx"}, "head"),
        ({"head": ["mrpc", "mrpx"]}, "head"),
    ],
)
def test_unknown_names_in_a_call_raise(
    mrpc: Any, wrong: dict[str, Any], kind: str, snapshot: Callable
) -> None:
    before = snapshot(mrpc)
    for _ in range(2):  # the second call must not find a remembered plan
        with pytest.raises(UnknownNameError, match=rf"no {kind} named 'mrpx'.*Known: 'mrpc'"):
            mrpc(IDS, **wrong)
    assert snapshot(mrpc) == before
