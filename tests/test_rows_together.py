"""Rows with adapters of one shape run as one product, and give what each gives alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flexheads import BatchSplit, LoRAConfig, Parallel, Rows
from flexheads.sites.banks import ChainBank
from flexheads.sites.linear import LinearOp
from flexheads.testing import randomise, tiny_inputs, tiny_model

CONFIGS = {"a": LoRAConfig(r=4, alpha=8), "b": LoRAConfig(r=4, alpha=4), "c": LoRAConfig(r=4)}


@pytest.fixture(scope="module", params=["bert", "gpt2", "t5"])
def model(request: Any) -> Any:
    found = tiny_model(request.param).eval()
    for name, config in CONFIGS.items():
        found.add_adapter(name, config=config)
    randomise(found.adapters)
    return found


def banks(model: Any, setup: Any) -> list[Any]:
    """What runs all rows at once, at every projection that takes part."""
    ops = model._call_plan(setup).ops.values()
    return [op.bank for op in ops if isinstance(op, LinearOp)]


def hidden(model: Any, setup: Any) -> Tensor:
    found: Tensor = model(**tiny_inputs(model.config, batch=4), adapter_names=setup)[0]
    return found


def loss(states: Tensor) -> Tensor:
    """Something that a layer norm does not make constant."""
    return states.pow(3).sum()


SETUPS: dict[str, Callable[[], Any]] = {
    "rows": lambda: Rows(["a", "b", "a", "c"]),
    "rows-with-none": lambda: Rows([None, "b", "a", None]),
    "batch-split": lambda: BatchSplit("a", "b", batch_sizes=[1, 3]),
}
CHAINS = {
    "rows": ["a", "b", "a", "c"],
    "rows-with-none": [[], "b", "a", []],
    "batch-split": ["a", "b", "b", "b"],
}


@pytest.mark.parametrize("name", SETUPS)
def test_every_row_gets_what_its_adapter_gives_alone(model: Any, name: str) -> None:
    setup = SETUPS[name]()
    assert all(isinstance(bank, ChainBank) for bank in banks(model, setup))
    with torch.no_grad():
        together = hidden(model, setup)
        for row, alone in enumerate(CHAINS[name]):
            torch.testing.assert_close(together[row], hidden(model, alone)[row])


def test_parallel_branches_get_what_they_give_alone(model: Any) -> None:
    with torch.no_grad():
        together = hidden(model, Parallel("a", "b"))
        for branch, name in enumerate("ab"):
            torch.testing.assert_close(together[4 * branch :][:4], hidden(model, name))


def test_gradients_are_those_of_the_rows_alone(model: Any) -> None:
    own = list(model.adapters["a"].parameters())
    loss(hidden(model, Rows(["a", "b", "a", "c"]))).backward()
    together = [parameter.grad.clone() for parameter in own]
    model.zero_grad()
    loss(hidden(model, "a")[[0, 2]]).backward()
    assert any(bool(gradient.any()) for gradient in together)
    for parameter, gradient in zip(own, together, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)
    model.zero_grad()


def test_adapters_of_different_shapes_run_one_by_one(model: Any) -> None:
    model.add_adapter("wide", config=LoRAConfig(r=8))
    randomise(model.adapters["wide"])
    setup = Rows(["a", "wide", "a", "wide"])
    assert not any(banks(model, setup))
    with torch.no_grad():
        together = hidden(model, setup)
        for row, name in enumerate(["a", "wide", "a", "wide"]):
            torch.testing.assert_close(together[row], hidden(model, name)[row])
    model.delete_adapter("wide")


def test_the_same_setup_serves_inference_and_training(model: Any) -> None:
    setup = Rows(["a", "b", "c", "a"])
    with torch.inference_mode():
        hidden(model, setup)
    loss(hidden(model, setup)).backward()
    assert any(bool(p.grad.any()) for p in model.adapters["c"].parameters())
    model.zero_grad()
