"""Traps: gradient checkpointing computes the gradients of the forward that was called."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
import transformers

import flexheads
from flexheads.testing import randomise, tiny_inputs

from .classifiers import COMMON, add, classifier, each_kind

METHODS: dict[str, Any] = {
    **COMMON,
    "adapterplus": flexheads.AdapterPlusConfig(reduction_factor=8, stochastic_depth=0.5),
    "lora": flexheads.LoRAConfig(intermediate_lora=True, output_lora=True, dropout=0.1),
    "prefix": flexheads.PrefixTuningConfig(prefix_length=3, bottleneck_size=8),
}
Gradients = dict[str, torch.Tensor]

each_mode = pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])


def build(kind: str, *methods: str) -> Any:
    """A tiny random model in training mode with frozen backbone and trainable adapters."""
    model = classifier(kind)
    for seed, method in enumerate(methods):
        add(model, METHODS[method], method, seed)
    return prepare(model)


def prepare(model: Any) -> Any:
    """Freezes all but the adapters and heads, and switches to training."""
    model.freeze_model()
    return model.train()


def enable(model: Any, reentrant: bool) -> Any:
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model


def disable(model: Any) -> None:
    """Under its own name of each release, because 5.23 warns about the former one."""
    name = "activation_checkpointing_disable"
    getattr(model, name, model.gradient_checkpointing_disable)()


def loss_of(model: Any, **kwargs: Any) -> torch.Tensor:
    torch.manual_seed(7)
    return model(**tiny_inputs(model.config), labels=torch.tensor([0, 1, 2]), **kwargs).loss


def gradients(model: Any) -> Gradients:
    """The gradients that are there, as copies; and clears them."""
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def run(model: Any, **kwargs: Any) -> Gradients:
    loss_of(model, **kwargs).backward()
    return gradients(model)


def assert_equal(found: Gradients, expected: Gradients) -> None:
    assert found.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(found[name], expected[name])]


def of_adapters(found: Gradients, *names: str) -> set[str]:
    return {n.split(".")[1] for n in found if n.startswith("adapters.")} - set(names)


@each_kind
@each_mode
@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_bit_equal_with_checkpointing(
    kind: str, method: str, reentrant: bool
) -> None:
    model = build(kind, method)
    model.set_active_adapters(method)
    expected = run(model)
    adapter = {n for n, _ in model.named_parameters() if n.startswith("adapters.")}
    assert adapter <= expected.keys()
    assert_equal(run(enable(model, reentrant)), expected)


@each_kind
@each_mode
def test_gradients_of_an_unfrozen_backbone_are_bit_equal(kind: str, reentrant: bool) -> None:
    model = build(kind, "houlsby")
    model.set_active_adapters("houlsby")
    model.freeze_model(False)
    expected = run(model)
    assert any(name.startswith("bert.encoder") for name in expected)
    assert_equal(run(enable(model, reentrant)), expected)


@each_mode
@pytest.mark.parametrize("level", ["model", "backbone", "before"])
def test_checkpointing_may_be_switched_on_anywhere_and_at_any_time(
    level: str, reentrant: bool
) -> None:
    plain = build("flexible", "houlsby")
    expected = run(plain, adapter_names="houlsby")
    model = build("flexible")
    if level == "before":
        enable(model, reentrant)
    model.add_adapter("houlsby", "houlsby")
    model.adapters["houlsby"].load_state_dict(plain.adapters["houlsby"].state_dict())
    model.heads["head"].load_state_dict(plain.heads["head"].state_dict())
    if level != "before":
        enable(model if level == "model" else model.bert, reentrant)
    loss = loss_of(model, adapter_names="houlsby")
    loss.backward()
    assert_equal(gradients(model), expected)
    disable(model)
    assert_equal(run(model, adapter_names="houlsby"), expected)
    enable(model.bert, not reentrant)
    assert_equal(run(model, adapter_names="houlsby"), expected)


@pytest.mark.skipif(
    not hasattr(transformers.PreTrainedModel, "activation_checkpointing_enable"),
    reason="this transformers knows gradient_checkpointing_enable only",
)
@each_kind
def test_activation_checkpointing_enable_is_the_same(kind: str) -> None:
    model = build(kind, "lora")
    model.set_active_adapters("lora")
    expected = run(model)
    model.activation_checkpointing_enable()
    assert_equal(run(model), expected)


@each_kind
def test_the_default_kind_of_checkpointing_trains_every_part_of_the_adapter(kind: str) -> None:
    model = build(kind, "houlsby")
    model.set_active_adapters("houlsby")
    expected = run(model)
    model.gradient_checkpointing_enable()
    assert_equal(run(model), expected)


@each_kind
@each_mode
@pytest.mark.parametrize(("first", "then"), [("houlsby", "lora"), ("parallel", "pfeiffer")])
def test_the_backward_pass_keeps_the_plan_of_its_forward(
    kind: str, reentrant: bool, first: str, then: str
) -> None:
    model = build(kind, first, then)
    expected = run(model, adapter_names=first)
    enable(model, reentrant)
    loss = loss_of(model, adapter_names=first)
    model.set_active_adapters(then)
    loss.backward()
    found = gradients(model)
    assert of_adapters(found) == {first}
    assert_equal(found, expected)
    # The same where what was active, and not the call, named the adapter.
    model.set_active_adapters(first)
    loss = loss_of(model)
    model.set_active_adapters(None)
    loss.backward()
    assert_equal(gradients(model), expected)


@each_kind
@each_mode
def test_two_forwards_under_different_plans_have_both_their_gradients(
    kind: str, reentrant: bool
) -> None:
    model = build(kind, "houlsby", "lora")
    one, two = run(model, adapter_names="houlsby"), run(model, adapter_names="lora")
    enable(model, reentrant)
    losses = [loss_of(model, adapter_names=name) for name in ("houlsby", "lora")]
    losses[0].backward()
    assert_equal(gradients(model), one)
    losses[1].backward()
    assert_equal(gradients(model), two)
    for loss in reversed([loss_of(model, adapter_names=name) for name in ("houlsby", "lora")]):
        loss.backward()
    found = gradients(model)
    assert of_adapters(found) == {"houlsby", "lora"}
    adapters = {n: g for n, g in {**one, **two}.items() if n.startswith("adapters.")}
    assert_equal({n: g for n, g in found.items() if n in adapters}, adapters)


@each_kind
@each_mode
def test_the_backward_pass_may_run_in_another_thread(kind: str, reentrant: bool) -> None:
    model = build(kind, "houlsby", "lora")
    expected = run(model, adapter_names="houlsby")
    enable(model, reentrant)
    model.set_active_adapters("lora")
    loss = loss_of(model, adapter_names="houlsby")
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert_equal(gradients(model), expected)


@each_kind
@each_mode
def test_rows_of_a_mixed_batch_have_their_own_gradients(kind: str, reentrant: bool) -> None:
    rows = flexheads.Rows(["houlsby", None, "lora"])
    model = build(kind, "houlsby", "lora", "parallel")
    head = {"head": "head"} if kind == "flexible" else {}
    expected = run(model, adapter_names=rows, **head)
    assert of_adapters(expected) == {"houlsby", "lora"}
    enable(model, reentrant)
    loss = loss_of(model, adapter_names=rows, **head)
    model.set_active_adapters("parallel")
    loss.backward()
    assert_equal(gradients(model), expected)


@each_kind
def test_a_copy_of_a_checkpointed_model_trains_its_own_adapter(kind: str) -> None:
    model = enable(build(kind, "houlsby"), False)
    model.set_active_adapters("houlsby")
    expected = run(model)
    twin = copy.deepcopy(model)
    assert_equal(run(twin), expected)
    assert not gradients(model)
    randomise(twin.adapters["houlsby"], std=0.5, seed=3)
    assert_equal(run(model), expected)


@each_kind
@each_mode
def test_checkpointing_with_nothing_active_is_bit_equal_to_the_bare_model(
    kind: str, reentrant: bool
) -> None:
    model = build(kind, "houlsby")
    model.freeze_model(False)
    expected = run(model)
    assert of_adapters(expected) == set()
    assert_equal(run(enable(model, reentrant)), expected)
