"""Traps: compiled code does what the model does, whatever was compiled, added and chosen when."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import flexheads
from flexheads.errors import UnsupportedError
from flexheads.testing import tiny_inputs, tiny_static

from . import classifiers
from .classifiers import COMMON, KINDS, NO_DROPOUT, classifier, each_kind

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

GRAPHS = ("houlsby", "adapterplus", "lora")
METHODS = {
    **COMMON,
    "adapterplus": flexheads.AdapterPlusConfig(reduction_factor=8, stochastic_depth=0.0),
}


def build(kind: str, *methods: str, active: str | None = None) -> Any:
    """A tiny random model without dropout, with an adapter of each method."""
    model = classifier(kind, **NO_DROPOUT, num_hidden_layers=1, use_cache=False)
    for method in methods:
        add(model, method)
    model.set_active_adapters(active)
    return model


def add(model: Any, method: str, name: str | None = None) -> None:
    classifiers.add(model, METHODS[method], name or method, seed=len(model.adapters) + 1)


@torch.no_grad()
def logits(call: Callable[..., Any], model: Any, **kwargs: Any) -> torch.Tensor:
    """What `call`, some compilation of `model`, answers."""
    return call(**tiny_inputs(model.config), **kwargs).logits


def assert_answers(call: Callable[..., Any], model: Any, *names: Any) -> None:
    """`call` answers as the model does without compilation, under each of the setups."""
    bare = logits(model, model, adapter_names=[])
    for name in names:
        expected = logits(model, model, adapter_names=name)
        assert torch.equal(logits(call, model, adapter_names=name), expected), name
        assert name == [] or not torch.equal(expected, bare), name


# --- the whole model -------------------------------------------------------------------------


@each_kind
def test_a_compiled_model_is_one_graph_and_each_setup_compiles_once(
    kind: str, counter: CompileCounterWithBackend
) -> None:
    model = build(kind, *GRAPHS)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for count, name in enumerate(GRAPHS, 1):
        model.set_active_adapters(name)
        assert torch.equal(logits(compiled, model), logits(model, model))
        assert counter.frame_count == count
    for name in GRAPHS:
        model.set_active_adapters(name)
        assert torch.equal(logits(compiled, model), logits(model, model))
    assert counter.frame_count == len(GRAPHS)


@each_kind
def test_the_override_of_one_call_compiles_once_and_switches_back(
    kind: str, counter: CompileCounterWithBackend
) -> None:
    model = build(kind, "houlsby", "lora", active="houlsby")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    before = logits(compiled, model)
    assert counter.frame_count == 1
    setups = (["houlsby", "lora"], [])
    assert_answers(compiled, model, *setups)
    assert counter.frame_count == 1 + len(setups)
    assert torch.equal(logits(compiled, model), before)
    assert_answers(compiled, model, *setups)
    assert counter.frame_count == 1 + len(setups)


def test_aot_autograd_sees_the_adapters_too() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    model = build("flexible", "parallel", active="parallel")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    torch.testing.assert_close(logits(compiled, model), logits(model, model))
    assert counter.frame_count == 1


def test_rows_of_a_mixed_batch_compile(counter: CompileCounterWithBackend) -> None:
    model = build("static", "houlsby", "lora")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    assert_answers(compiled, model, flexheads.Rows(["lora", None, "houlsby"]))
    assert counter.frame_count == 1


@each_kind
def test_an_adapter_of_a_hooked_kind_added_after_compiling_acts(
    kind: str, counter: CompileCounterWithBackend
) -> None:
    model = build(kind, "houlsby", active="houlsby")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    first = logits(compiled, model)
    add(model, "houlsby", "later")
    model.set_active_adapters("later")
    assert torch.equal(logits(compiled, model), logits(model, model))
    assert not torch.equal(logits(model, model), first)
    model.set_active_adapters("houlsby")
    assert torch.equal(logits(compiled, model), first)


@pytest.mark.parametrize(("kind", "in_place"), [("flexible", False), ("static", True)])
def test_hooks_of_a_new_kind_added_after_compiling_are_seen(
    kind: str, in_place: bool, counter: CompileCounterWithBackend
) -> None:
    model = build(kind)
    if in_place:
        model.compile(fullgraph=True, backend=counter)
        compiled, eager = model, model.forward
    else:
        compiled, eager = torch.compile(model, fullgraph=True, backend=counter), model
    bare = logits(compiled, model)
    for method in ("lora", "parallel"):
        add(model, method)
        model.set_active_adapters(method)
        found = logits(compiled, model)
        assert torch.equal(found, logits(eager, model))
        assert not torch.equal(found, bare)
    assert counter.frame_count == 3
    for method in ("lora", "parallel"):
        model.delete_adapter(method)
    assert torch.equal(logits(compiled, model), bare)


def test_a_backbone_that_is_the_model_may_be_compiled_in_place_before_adapters_come(
    counter: CompileCounterWithBackend,
) -> None:
    model = flexheads.init(tiny_static("BertForSequenceClassification", num_hidden_layers=1).bert)
    model.compile(fullgraph=True, backend=counter)
    inputs = tiny_inputs(model.config)
    bare = model(**inputs).last_hidden_state
    add(model, "lora")
    model.set_active_adapters("lora")
    found = model(**inputs).last_hidden_state
    assert torch.equal(found, model.forward(**inputs).last_hidden_state)
    assert not torch.equal(found, bare)
    assert counter.frame_count == 2


def test_flexible_heads_are_part_of_the_graph(counter: CompileCounterWithBackend) -> None:
    model = build("flexible", "houlsby", active="houlsby")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    logits(compiled, model)
    model.add_tagging_head("tags", num_labels=5)
    assert logits(compiled, model).shape == (3, 7, 5)
    assert torch.equal(logits(compiled, model), logits(model, model))
    assert counter.frame_count == 2
    call = {**tiny_inputs(model.config), "head": ["head", "tags"]}
    found, expected = compiled(**call), model(**call)
    assert list(found) == ["head", "tags"]
    assert all(torch.equal(found[name].logits, expected[name].logits) for name in found)
    assert counter.frame_count == 3


def gradients(model: Any, call: Any) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    call(**tiny_inputs(model.config), labels=torch.tensor([0, 1, 2])).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


@each_kind
def test_gradients_under_compile_are_those_without(
    kind: str, counter: CompileCounterWithBackend
) -> None:
    model = build(kind, "houlsby", "lora")
    model.train_adapter("houlsby")
    model.train()
    expected = gradients(model, model)
    assert any(name.startswith("adapters.houlsby.") for name in expected)
    assert_close(gradients(model, torch.compile(model, fullgraph=True, backend=counter)), expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize("method", ["lora", "pfeiffer", "parallel"])
def test_gradients_under_compile_and_checkpointing_are_those_without(method: str) -> None:
    model = build("static", method, active=method)
    model.train()
    expected = gradients(model, model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_close(gradients(model, model), expected)  # and binds the checkpoints to the plan
    # What a site hands from one hook to another counts as a side effect of the checkpoint.
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_close(gradients(model, compiled), expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch, of its own resumed frames
def test_checkpoints_that_break_the_graph_keep_the_plan_of_their_forward() -> None:
    model = build("static", "parallel", "lora", active="lora")
    model.train()
    model.freeze_model()
    with_parallel = functools.partial(model, adapter_names="parallel")
    expected = gradients(model, with_parallel)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    compiled = torch.compile(model, backend="aot_eager")
    assert_close(gradients(model, functools.partial(compiled, adapter_names="parallel")), expected)


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler")
def test_inductor_agrees() -> None:
    model = build("static", "houlsby", active="houlsby")
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(logits(compiled, model), logits(model, model))


# --- parts of the model ----------------------------------------------------------------------

PARTS = ("bert", "bert.encoder.layer.0", "bert.encoder.layer.0.intermediate")


def compile_in_place(model: Any, path: str) -> None:
    model.get_submodule(path).compile(backend="eager")


def compile_forward(model: Any, path: str) -> None:
    part = model.get_submodule(path)
    part.forward = torch.compile(part.forward, backend="eager")


def wrap(model: Any, path: str) -> None:
    parent, _, name = path.rpartition(".")
    part = torch.compile(model.get_submodule(path), backend="eager")
    setattr(model.get_submodule(parent), name, part)


@pytest.mark.parametrize(("path", "kind"), [*zip(PARTS, (*KINDS, "static"), strict=True)])
def test_a_compiled_part_follows_the_plan_of_each_call(kind: str, path: str) -> None:
    model = build(kind, "houlsby", "parallel", "lora", active="houlsby")
    names = ("parallel", "lora", [])
    expected = {str(name): logits(model, model, adapter_names=name) for name in names}
    compile_in_place(model, path)
    for name in (*names, *names):
        assert torch.equal(logits(model, model, adapter_names=name), expected[str(name)])
    for name in ("lora", "parallel"):
        model.set_active_adapters(name)
        assert torch.equal(logits(model, model), expected[name])


@pytest.mark.parametrize("how", [compile_in_place, compile_forward, wrap])
@pytest.mark.parametrize("path", PARTS)
def test_hooks_that_a_compiled_part_would_not_see_are_refused_with_the_way_out(
    path: str, how: Callable[[Any, str], None]
) -> None:
    model = build("static", "pfeiffer", active="pfeiffer")
    config, plan = model.config.to_dict(), model._attachment.runtime.active
    how(model, path)
    with pytest.raises(UnsupportedError, match="before compiling, or compile the whole model"):
        model.add_adapter("new", "lora")
    assert model.adapters.keys() == ("pfeiffer",)
    assert model.config.to_dict() == config
    assert model._attachment.runtime.active is plan
    add(model, "pfeiffer", "needs_no_new_hooks")


@pytest.mark.parametrize(("path", "kind"), [*zip(PARTS[1:], KINDS, strict=True)])
def test_a_part_that_breaks_the_graph_follows_the_plan_of_each_call(kind: str, path: str) -> None:
    model = build(kind, "houlsby", "parallel", active="houlsby")
    expected = logits(model, model, adapter_names="parallel")
    part: nn.Module = model.get_submodule(path)
    part.forward = torch.compiler.disable(part.forward)
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(logits(compiled, model, adapter_names="parallel"), expected)


@each_kind
@torch.no_grad()
def test_capturing_hidden_states_under_compile_keeps_the_override(kind: str) -> None:
    model = build(kind, "houlsby", "lora", active="houlsby")
    call = {**tiny_inputs(model.config), "adapter_names": "lora", "output_hidden_states": True}
    expected = model(**call)
    found = torch.compile(model, backend="eager")(**call)
    assert torch.equal(found.logits, expected.logits)
    assert len(found.hidden_states) == 2
    pairs = zip(found.hidden_states, expected.hidden_states, strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)
