"""Weights that methods make of smaller ones are kept in inference, and are those of training.

Gradients are wanted where nothing is kept, so the same model computes both ways.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import flexheads
from flexheads import Rows
from flexheads.methods.loha import Hadamard
from flexheads.sites.derived import Derived
from flexheads.testing import randomise, tiny_inputs, tiny_model

KEEPING: dict[str, dict[str, Any]] = {
    "compacter": {"config": "compacter", "reduction_factor": 4},
    "compacter, all shared": {
        "config": "compacter++",
        "reduction_factor": 4,
        "shared_W_phm": True,
        "factorized_phm_rule": True,
    },
    "compacter, nothing shared": {
        "config": "compacter",
        "reduction_factor": 4,
        "shared_phm_rule": False,
        "factorized_phm_W": False,
        "phm_bias": False,
    },
    "dora": {"config": "dora", "r": 4},
    "gated dora": {"config": "dora", "r": 4, "use_gating": True},
    "dvora": {"config": "dvora", "r": 4},
    "pissa dora": {"config": "lora", "r": 4, "use_dora": True, "init_weights": "pissa"},
}


def adapted(config: dict[str, Any], architecture: str = "bert") -> Any:
    pytest.importorskip(f"flexheads_{architecture}")
    model, fields = tiny_model(architecture), dict(config)
    kind = fields.pop("config")
    for seed, name in enumerate("ab"):
        model.add_adapter(name, flexheads.load_config(kind, **fields))
        randomise(model.adapters[name], std=0.3, seed=seed)
    model.set_active_adapters("a")
    return model.double().eval()


def kept(model: Any) -> list[bool]:
    """For each value that adapter a may keep, whether it does."""
    own = [vars(module).values() for module in model.adapters["a"].modules()]
    return [v._kept is not None for values in own for v in values if isinstance(v, Derived)]


def computed(model: Any, **call: Any) -> Tensor:
    result: Tensor = model(**tiny_inputs(model.config), **call)[0]
    assert result.requires_grad
    assert not any(kept(model))
    return result.detach()


@torch.inference_mode()
def inferred(model: Any, **call: Any) -> Tensor:
    result: Tensor = model(**tiny_inputs(model.config), **call)[0]
    return result


def check(model: Any) -> None:
    expected, actual = computed(model), inferred(model)
    assert kept(model)
    assert all(kept(model))
    torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(inferred(model), expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("config", KEEPING.values(), ids=KEEPING)
@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_what_is_kept_gives_the_same(config: dict[str, Any], architecture: str) -> None:
    check(adapted(config, architecture))


@pytest.mark.parametrize("config", KEEPING.values(), ids=KEEPING)
def test_steps_of_training_are_seen(config: dict[str, Any]) -> None:
    model = adapted(config)
    before = inferred(model)
    model.train_adapter("a")
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.05, fused=True)
    model.train()(**tiny_inputs(model.config))[0].sin().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    after = inferred(model.eval())
    assert not torch.allclose(after, before, atol=1e-4)
    torch.testing.assert_close(after, computed(model), atol=1e-9, rtol=0)


@pytest.mark.parametrize("config", KEEPING.values(), ids=KEEPING)
def test_every_tensor_that_counts_is_watched(config: dict[str, Any]) -> None:
    """Whichever tensor of the adapter or of the backbone changes, it is as if nothing was kept."""
    model = adapted(config)
    held = {**dict(model.adapters["a"].named_parameters()), **dict(model.named_buffers())}
    held |= {n: p for n, p in model.named_parameters() if "attention.self" in n}
    inferred(model)
    for tensor in held.values():
        if tensor.is_floating_point():
            with torch.no_grad():
                tensor.mul_(1.25)
            found, fresh = inferred(model), inferred(copy.deepcopy(model))
            torch.testing.assert_close(found, fresh, atol=0, rtol=0)


@pytest.mark.parametrize("config", KEEPING.values(), ids=KEEPING)
def test_rows_follow_their_own(config: dict[str, Any]) -> None:
    model = adapted(config)
    rows = inferred(model, adapter_names=Rows(["a", "b", None]))
    for row, name in enumerate(["a", "b", []]):
        alone = inferred(model, adapter_names=name)
        torch.testing.assert_close(rows[row], alone[row], atol=1e-9, rtol=0)


def test_half_precision_keeps_its_own() -> None:
    model = adapted(KEEPING["compacter"])
    exact = inferred(model)
    assert inferred(model.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(inferred(model).double(), exact, atol=0.2, rtol=0.2)


@pytest.mark.parametrize("r", [1, 3, 8])
@pytest.mark.parametrize("shape", [(12, 20), (40, 6), (300, 200)])
def test_a_hadamard_product_acts_as_its_weight(r: int, shape: tuple[int, int]) -> None:
    """FedPara, proposition 1: ``(X1 Y1) * (X2 Y2)``; with the gradients of that."""
    config = flexheads.load_config("loha", r=r, init_weights=False)
    part = Hadamard(*shape, config).double()
    hidden = torch.randn(2, 3, shape[0], dtype=torch.float64, requires_grad=True)
    found, expected = part.product(hidden), hidden @ part.delta().T
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-9)
    inputs = [hidden, *part.parameters()]
    gradients = [torch.autograd.grad(o.sin().sum(), inputs) for o in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-9)
