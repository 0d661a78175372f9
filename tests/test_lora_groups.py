"""Optimiser groups of LoRA+ and LoRA-FA."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flexheads
from flexheads.errors import ConfigError
from flexheads.testing import randomise, tiny_inputs, tiny_model


@pytest.fixture
def model() -> Any:
    model = tiny_model("bert")
    model.add_classification_head("a", num_labels=2)
    model.add_adapter("a", "lora")
    randomise(model.adapters["a"])
    model.train_adapter("a")
    return model


def step(model: Any, groups: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """How far one step of plain gradient descent moves each parameter, over its gradient."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimiser = torch.optim.SGD(groups)
    model(**tiny_inputs(model.config), labels=torch.tensor([0, 1, 0])).loss.backward()
    optimiser.step()
    named = dict(model.named_parameters())
    return {
        name: (before[name] - p.detach()) / p.grad
        for name, p in named.items()
        if p.grad is not None
    }


def test_lora_plus(model: Any) -> None:
    rates = step(model, flexheads.lora_plus_groups(model, lr=0.01, ratio=8))
    assert any(name.endswith("lora_B") for name in rates)
    assert any(name.startswith("heads.") for name in rates)
    for name, rate in rates.items():
        expected = 0.08 if name.endswith("lora_B") else 0.01
        assert rate.nanmedian().item() == pytest.approx(expected, rel=1e-2), name


def test_lora_fa(model: Any) -> None:
    down = model.adapters["a"].parts["layers.0.query"].lora_A
    before = down.detach().clone()
    rates = step(model, flexheads.lora_fa_groups(model, lr=0.01))
    assert torch.equal(down, before)
    assert down.grad is None
    assert any(name.endswith("lora_B") for name in rates)
    assert not any(name.endswith("lora_A") for name in rates)
    model.train_adapter("a")
    assert down.requires_grad


def test_nothing_to_train(model: Any) -> None:
    model.train_adapter(None)
    for groups in (flexheads.lora_plus_groups, flexheads.lora_fa_groups):
        with pytest.raises(ConfigError, match="train_adapter"):
            groups(model, lr=0.1)
    model.train_adapter("a")
    with pytest.raises(ConfigError, match="ratio"):
        flexheads.lora_plus_groups(model, lr=0.1, ratio=0)
