"""Compiled calls in which each branch of a MultiTask has a head of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch._dynamo.testing import CompileCounterWithBackend

from flexheads import MultiTask
from flexheads.errors import CompositionError, LabelError
from flexheads.models.heads import by_row
from flexheads.testing import randomise, tiny_inputs, tiny_model

pytestmark = pytest.mark.skipif(
    int(transformers.__version__.partition(".")[0]) < 5, reason="graphs are promised for 5.x"
)
NAMES = ("a", "b", "c")
TASKS = (*NAMES, "a")
"""Two of the tasks have a branch in common."""
HEADS: dict[str, dict[str, Any]] = {
    "classification": {"num_labels": 3, "layers": 2},
    "tagging": {"num_labels": 4},
    "qa": {},
    "masked_lm": {},
}


def with_tasks(kind: str = "classification", adapter: str = "lora[r=2]", **config: Any) -> Any:
    model = randomise(tiny_model("bert"), std=0.2)
    for name in NAMES:
        model.add_adapter(name, adapter)
        getattr(model, f"add_{kind}_head")(name, **config)
    for seed, name in enumerate(NAMES):
        randomise(model.adapters[name], std=0.3, seed=seed)
        randomise(model.heads[name], std=0.3, seed=seed + 10)
    model.set_active_adapters(MultiTask(*TASKS))
    return model


def compiled(model: Any) -> tuple[Any, CompileCounterWithBackend]:
    counter = CompileCounterWithBackend("eager")
    return torch.compile(model, backend=counter, fullgraph=True), counter


def assert_each_row_has_its_own(found: Any, expected: Any, numbers: list[int]) -> None:
    """Scores in the order of the batch are those that each head gives for its rows."""
    names = [TASKS[number] for number in numbers]
    for row, name in enumerate(names):
        place = names[:row].count(name)
        for key, value in expected[name].items():
            torch.testing.assert_close(found[key][row], value[place], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["classification", "tagging", "qa", "masked_lm"])
def test_each_row_is_scored_by_the_head_of_its_branch(kind: str) -> None:
    adapter = "seq_bn_inv" if kind == "masked_lm" else "lora[r=2]"  # undone before the scores
    model = with_tasks(kind, adapter, **HEADS[kind])
    inputs = tiny_inputs(model.config, batch=4)
    call, counter = compiled(model)
    with torch.no_grad():
        for numbers in ([0, 1, 2, 3], [2, 2, 0, 0], [1, 1, 1, 1]):
            ids = torch.tensor(numbers)
            found = call(**inputs, task_ids=ids)
            assert_each_row_has_its_own(found, model(**inputs, task_ids=ids), numbers)
    assert counter.frame_count == 1


def test_heads_of_linear_layers_are_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    ways: list[str] = []
    stacked, alone = by_row.scores_by_row, by_row._run

    def note(way: str, run: Any) -> Any:
        return lambda *args: (ways.append(way), run(*args))[1]

    monkeypatch.setattr(by_row, "scores_by_row", note("stacked", stacked))
    monkeypatch.setattr(by_row, "_run", note("alone", alone))
    for changes in ({}, {"hook": True}, {"dropout_prob": 0.3}, {"pooling": "attention"}):
        hook = changes.pop("hook", False)
        model = with_tasks(num_labels=3, **changes)
        if hook:
            model.heads["b"].layers.register_forward_hook(lambda *_: None)
        model.train("dropout_prob" in changes)
        by_tensor(model, torch.tensor([0, 1, 2]))
    assert ways == ["stacked", *["alone"] * 9]


def by_tensor(model: Any, ids: torch.Tensor) -> Any:
    """What compiled code does, without a compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        return model(**tiny_inputs(model.config), task_ids=ids)


@pytest.mark.parametrize("layer_norm", [True, False])
def test_gradients_reach_the_head_and_the_adapter_of_each_row(layer_norm: bool) -> None:
    model = with_tasks(num_labels=3, layers=3, layer_norm=layer_norm)
    ids = torch.tensor([0, 2, 2])
    scores = model(**tiny_inputs(model.config), task_ids=ids)
    sum(output.logits.square().sum() for output in scores.ordered).backward()
    trained = [*model.heads.named_parameters(), *model.adapters.named_parameters()]
    expected = {name: p.grad for name, p in trained}
    model.zero_grad(set_to_none=True)
    by_tensor(model, ids).logits.square().sum().backward()
    for name, parameter in trained:
        zeros = torch.zeros_like(parameter)
        one = zeros if expected[name] is None else expected[name]
        other = zeros if parameter.grad is None else parameter.grad
        scale = one.abs().max().clamp(min=1e-6)
        torch.testing.assert_close(other / scale, one / scale, rtol=0, atol=1e-4, msg=name)
    assert expected["a.layers.0.weight"].abs().max() > 0


def test_what_one_output_cannot_hold_is_refused() -> None:
    model = with_tasks(num_labels=3)
    with pytest.raises(LabelError, match="scores without a loss"):
        by_tensor_with_labels(model)
    model.add_classification_head("b", num_labels=5, overwrite_ok=True)
    model.set_active_adapters(MultiTask(*TASKS))
    with pytest.raises(
        CompositionError, match=r"one type and size.*'b' \(classification, 5 scores\)"
    ):
        by_tensor(model, torch.tensor([0, 1, 2]))
    model.set_active_adapters(MultiTask("a", "c", None))
    with pytest.raises(CompositionError, match=r"one head each, or none; \[None\] have not"):
        by_tensor(model, torch.tensor([0, 1, 2]))


def by_tensor_with_labels(model: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        labels = torch.tensor([0, 1, 2])
        model(**tiny_inputs(model.config), task_ids=labels, labels=labels)
