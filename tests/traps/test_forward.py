"""Traps: what transformers and accelerate do around a forward does not silence adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

import flexheads
from flexheads.testing import tiny_config, tiny_inputs

from . import classifiers
from .classifiers import COMMON, classifier, each_kind, plain

METHODS = {**COMMON, "invertible": "seq_bn_inv"}
CAPTURE = {"output_hidden_states": True, "output_attentions": True}

each_method = pytest.mark.parametrize("method", METHODS)


def add(model: Any, *methods: str) -> None:
    """Adds adapters, each always with the same weights."""
    for method in methods:
        classifiers.add(model, METHODS[method], method, seed=list(METHODS).index(method))


def build(kind: str, *methods: str, active: str | None = None, **changes: Any) -> Any:
    model = classifier(kind, **changes)
    add(model, *methods)
    model.set_active_adapters(active)
    return model


@torch.no_grad()
def call(model: Any, **kwargs: Any) -> Any:
    return model(**tiny_inputs(model.config), **kwargs)


def equal(one: Any, two: Any) -> bool:
    """Whether two tuples of tensors are equal to the bit."""
    return len(one) == len(two) and all(map(torch.equal, one, two))


# --- hidden states and attentions ------------------------------------------------------------


@each_kind
def test_captured_states_without_adapters_are_those_of_the_bare_model(kind: str) -> None:
    model = build(kind, "houlsby", "lora", attn_implementation="eager")
    reference = transformers.BertModel(tiny_config("bert", attn_implementation="eager")).eval()
    reference.load_state_dict(model.bert.state_dict())
    expected, found = call(reference, **CAPTURE), call(model, **CAPTURE)
    assert len(found.hidden_states) == 3
    assert len(found.attentions) == 2
    assert equal(found.hidden_states, expected.hidden_states)
    assert equal(found.attentions, expected.attentions)
    again = call(model)
    assert again.get("hidden_states") is None
    assert again.get("attentions") is None


@each_kind
@each_method
def test_adapters_show_in_captured_hidden_states(kind: str, method: str) -> None:
    model = build(kind, method, attn_implementation="eager")
    without = call(model, **CAPTURE)
    model.set_active_adapters(method)
    found = call(model, **CAPTURE)
    assert len(found.hidden_states) == len(without.hidden_states)
    assert len(found.attentions) == len(without.attentions)
    first = method == "invertible"
    for number, (one, two) in enumerate(
        zip(found.hidden_states, without.hidden_states, strict=True)
    ):
        assert torch.equal(one, two) == (number == 0 and not first)
    assert torch.equal(found.logits, call(model).logits)
    head = {"head": []} if kind == "flexible" else {}
    backbone = model if kind == "flexible" else model.bert
    last = call(backbone, **head).last_hidden_state
    assert torch.equal(found.hidden_states[-1], last)


@each_kind
@each_method
def test_adapters_added_after_a_capturing_call_act_and_show(kind: str, method: str) -> None:
    expected = call(build(kind, method, active=method, attn_implementation="eager"), **CAPTURE)
    model = plain(kind, attn_implementation="eager")
    call(model, **CAPTURE)
    model = flexheads.init(model)
    call(model, **CAPTURE)
    add(model, method)
    model.set_active_adapters(method)
    found = call(model, **CAPTURE)
    assert torch.equal(found.logits, expected.logits)
    assert equal(found.hidden_states, expected.hidden_states)
    assert equal(found.attentions, expected.attentions)
    assert torch.equal(call(model).logits, expected.logits)


# --- forwards that hang on an instance -------------------------------------------------------


def leave_forwards(model: Any) -> Any:
    """What a capturing call leaves behind on some releases: a bound method on each instance."""
    for module in model.modules():
        module.forward = module.forward
    return model


def dispatch(model: Any) -> Any:
    return pytest.importorskip("accelerate").dispatch_model(
        model, device_map={"": "cpu"}, force_hooks=True
    )


def offload(model: Any) -> Any:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def hook(model: Any) -> Any:
    hooks = pytest.importorskip("accelerate").hooks
    aligned = hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True)
    return hooks.add_hook_to_module(model, aligned)


WRAPPERS = (leave_forwards, dispatch, offload, hook)


@each_kind
@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("when", ["before_init", "before_adapters", "after_adapters"])
def test_a_forward_on_the_instance_silences_nothing(
    kind: str, wrap: Callable[[Any], Any], when: str
) -> None:
    names = ("houlsby", "parallel", "lora", "invertible")
    reference = build(kind, *names)
    expected = {name: call(reference, adapter_names=name).logits for name in names}
    without = call(reference).logits
    model = plain(kind)
    if when == "before_init":
        wrap(model)
    model = flexheads.init(model)
    if when == "before_adapters":
        wrap(model)
    add(model, *names)
    if when == "after_adapters":
        wrap(model)
    assert torch.equal(call(model).logits, without)
    for name in names:
        assert torch.equal(call(model, adapter_names=name).logits, expected[name]), name
        model.set_active_adapters(name)
        assert torch.equal(call(model).logits, expected[name]), name
    rows = flexheads.Rows(["lora", None, "parallel"])
    head = {"head": "head"} if kind == "flexible" else {}
    mixed = call(model, adapter_names=rows, **head).logits
    torch.testing.assert_close(mixed[0], expected["lora"][0])
    torch.testing.assert_close(mixed[1], without[1])


@each_kind
def test_adapters_on_an_offloaded_model_hold_values_and_take_gradients(kind: str) -> None:
    model = flexheads.init(offload(plain(kind)))
    assert model.bert.pooler.dense.weight.is_meta
    add(model, "parallel")
    if kind == "flexible":
        model.add_classification_head("parallel", num_labels=3)
        assert not any(p.is_meta for p in model.heads["parallel"].parameters())
    model.set_active_adapters("parallel")
    trained = list(model.adapters["parallel"].parameters())
    assert not any(p.is_meta for p in trained)
    loss = model(**tiny_inputs(model.config), labels=torch.tensor([0, 1, 2])).loss
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(loss, trained))


# --- other ways through the layers -----------------------------------------------------------


@each_kind
@each_method
def test_feed_forward_in_chunks_gives_the_same_output(kind: str, method: str) -> None:
    whole = build(kind, method, active=method)
    chunked = build(kind, method, active=method, chunk_size_feed_forward=1)
    torch.testing.assert_close(call(chunked).logits, call(whole).logits)


@each_kind
@each_method
def test_sdpa_and_eager_attention_agree_with_adapters_active(kind: str, method: str) -> None:
    models = [
        build(kind, method, active=method, attn_implementation=implementation)
        for implementation in ("sdpa", "eager")
    ]
    torch.testing.assert_close(call(models[0]).logits, call(models[1]).logits)
    switched = models[0]
    switched.set_attn_implementation("eager")
    torch.testing.assert_close(call(switched).logits, call(models[1]).logits)


@each_kind
def test_inputs_embeds_and_tuples_work_with_adapters_active(kind: str) -> None:
    model = build(kind, "houlsby", active="houlsby")
    inputs = tiny_inputs(model.config)
    expected = model(**inputs)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    found = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(model(**inputs, return_dict=False)[0], expected.logits)
    positional = model(inputs["input_ids"], inputs["attention_mask"], adapter_names="houlsby")
    assert torch.equal(positional.logits, expected.logits)
