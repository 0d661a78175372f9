"""Compiled code: which adapters the rows of a batch use is an input, and compiles nothing new."""

from __future__ import annotations

import inspect
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import flexheads
from flexheads import Average, Fuse, LoRAConfig, MultiTask, Rows, Stack
from flexheads.testing import randomise, tiny_inputs, tiny_model, tiny_static

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

TASKS = ("a", None, "b", "c")
ORDERS = ([0, 2, 3, 2], [3, 3, 1, 0], [1, 1, 1, 1], [2, 0, 3, 1])
METHODS: dict[str, Any] = {
    "double_seq_bn": "double_seq_bn",
    "lora": "lora",
    "dora": "dora",
    "compacter": "compacter[phm_dim=2, reduction_factor=8]",
    "loreft": "loreft",
    "prefix_tuning": "prefix_tuning[prefix_length=3, bottleneck_size=8]",
}
"""Some have a bank, and the others run every branch on all rows."""


def build(method: str, names: str = "abc") -> Any:
    """A small model with adapters of a method that matter."""
    model = tiny_model("bert", num_hidden_layers=1).eval()
    for seed, name in enumerate(names):
        model.add_adapter(name, METHODS[method])
        randomise(model.adapters[name], seed=seed)
    return model


def hidden(call: Any, model: Any, **kwargs: Any) -> Tensor:
    found: Tensor = call(**tiny_inputs(model.config, batch=4), **kwargs)[0]
    return found


def assert_rows(found: Tensor, alone: list[Tensor], ids: list[int]) -> None:
    for row, task in enumerate(ids):
        torch.testing.assert_close(found[row], alone[task][row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_other_tasks_of_rows_compile_nothing(
    method: str, counter: CompileCounterWithBackend
) -> None:
    model = build(method)
    alone = [hidden(model, model, adapter_names=name or []) for name in TASKS]
    assert not torch.allclose(alone[0], alone[2], atol=1e-3)
    model.set_active_adapters(MultiTask(*TASKS))
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for ids in ORDERS:
        assert_rows(hidden(compiled, model, task_ids=torch.tensor(ids)), alone, ids)
    assert counter.frame_count == 1


@torch.no_grad()
def test_the_block_of_one_call_compiles_once(counter: CompileCounterWithBackend) -> None:
    model = build("lora")
    alone = [hidden(model, model, adapter_names=name or []) for name in TASKS]
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for ids in ORDERS:
        call = {"adapter_names": MultiTask(*TASKS), "task_ids": torch.tensor(ids)}
        assert_rows(hidden(compiled, model, **call), alone, ids)
    assert counter.frame_count == 1


@torch.no_grad()
def test_a_static_model_and_one_head_for_all(counter: CompileCounterWithBackend) -> None:
    static = flexheads.init(tiny_static("BertForSequenceClassification", num_hidden_layers=1))
    flexible = tiny_model("bert", num_hidden_layers=1)
    flexible.add_classification_head("head", num_labels=2)
    for model in (static.eval(), flexible.eval()):
        for seed, name in enumerate("abc"):
            model.add_adapter(name, "double_seq_bn")
            randomise(model.adapters[name], seed=seed)
        alone = [
            model(**tiny_inputs(model.config, batch=4), adapter_names=name or []).logits
            for name in TASKS
        ]
        model.set_active_adapters(MultiTask(*TASKS))
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        before = counter.frame_count
        for ids in ORDERS:
            inputs = tiny_inputs(model.config, batch=4)
            found = compiled(**inputs, task_ids=torch.tensor(ids)).logits
            assert_rows(found, alone, ids)
        assert counter.frame_count == before + 1


@torch.no_grad()
def test_tasks_with_a_branch_in_common(counter: CompileCounterWithBackend) -> None:
    model = build("lora")
    setup = Stack("c", MultiTask("a", "b", "a"))
    branches = [Stack("c", "a"), Stack("c", "b"), Stack("c", "a")]
    alone = [hidden(model, model, adapter_names=branch) for branch in branches]
    model.set_active_adapters(setup)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for ids in ([0, 1, 2, 1], [2, 2, 0, 1]):
        assert_rows(hidden(compiled, model, task_ids=torch.tensor(ids)), alone, ids)
    assert counter.frame_count == 1


def test_gradients() -> None:
    model = build("double_seq_bn")
    model.add_adapter("d", "lora")
    randomise(model.adapters["d"], seed=4)
    model.set_active_adapters(MultiTask(*TASKS, "d"))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = []
    for call in (compiled, model):
        model.zero_grad(set_to_none=True)
        hidden(call, model, task_ids=torch.tensor([0, 3, 1, 4])).pow(3).sum().backward()
        found.append({n: p.grad for n, p in model.adapters.named_parameters()})
    assert any(gradient is not None and bool(gradient.any()) for gradient in found[1].values())
    for name, gradient in found[1].items():
        own = found[0][name]
        if gradient is None:  # the branch of no row
            assert own is None or not own.any(), name
        else:
            torch.testing.assert_close(own, gradient, rtol=1e-3, atol=1e-4, msg=name)


SETUPS: dict[str, Any] = {
    "stacked": Stack("a", "b"),
    "fused": Fuse("a", "b"),
    "averaged": Average("a", "b"),
    "rows": Rows(["b", None, "a", "b"]),
}


@pytest.mark.parametrize("name", SETUPS)
@torch.no_grad()
def test_every_setup_is_one_graph(name: str, counter: CompileCounterWithBackend) -> None:
    model = build("double_seq_bn", "ab")
    if name == "fused":
        model.add_adapter_fusion(Fuse("a", "b"))
        randomise(model.adapter_fusions)
    model.set_active_adapters(SETUPS[name])
    expected = hidden(model, model)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    torch.testing.assert_close(hidden(compiled, model), expected, rtol=1e-5, atol=1e-5)
    model.set_active_adapters(None)
    hidden(compiled, model)
    model.set_active_adapters(SETUPS[name])
    assert torch.equal(hidden(compiled, model), hidden(compiled, model))
    assert counter.frame_count == 2


@torch.no_grad()
def test_twelve_adapters_of_one_shape_share_a_graph(counter: CompileCounterWithBackend) -> None:
    model = build("lora", "abcdefghijkl")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for name in "abcdefghijkl":
        model.set_active_adapters(name)
        assert torch.equal(hidden(compiled, model), hidden(model, model))
    assert counter.frame_count == 1


LIMITED = "recompile_limit" in inspect.signature(torch.compile).parameters


@pytest.mark.skipif(not LIMITED, reason="this torch has one limit for everything")
@torch.no_grad()
def test_twelve_setups_of_different_shapes_compile_once_each(
    counter: CompileCounterWithBackend,
) -> None:
    model = tiny_model("bert", num_hidden_layers=1).eval()
    for rank in range(1, 13):
        model.add_adapter(str(rank), LoRAConfig(r=rank, attn_matrices=["q"]))
    randomise(model.adapters)
    model.compile(fullgraph=True, backend=counter)
    for _ in range(2):
        for rank in range(1, 13):
            model.set_active_adapters(str(rank))
            assert torch.equal(hidden(model, model), hidden(model.forward, model))
    assert counter.frame_count == 12


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler")
@torch.no_grad()
def test_inductor_agrees() -> None:
    model = build("double_seq_bn")
    model.add_adapter("lora", "lora")
    randomise(model.adapters["lora"])
    tasks = ("a", None, "lora", "b")
    alone = [hidden(model, model, adapter_names=name or []) for name in tasks]
    model.set_active_adapters(MultiTask(*tasks))
    compiled = torch.compile(model, fullgraph=True)
    for ids in ORDERS[:2]:
        assert_rows(hidden(compiled, model, task_ids=torch.tensor(ids)), alone, ids)


def test_heads_named_in_the_call_run_on_all_rows() -> None:
    model = build("lora", "ab")
    for name in "ab":
        model.add_classification_head(name, num_labels=2, set_active=False)
    model.set_active_adapters(MultiTask("a", "b"))
    inputs = tiny_inputs(model.config, batch=4)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    output = compiled(**inputs, task_ids=torch.tensor([0, 1, 1, 0]), head=["a", "b"])
    assert output["a"].logits.shape == output["b"].logits.shape == (4, 2)
