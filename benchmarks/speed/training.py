"""A step of training with any library: what it takes, and what it keeps for the way back."""

from __future__ import annotations

from typing import Any

import torch
from benchmarks.speed.pairing import Call
from benchmarks.speed.probe import Probe, hidden
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

Sizes = dict[int, int]


def fine_tuned(probe: Probe) -> Any:
    """A backbone whose weights are all trained."""
    return probe.backbone().train()


def loss(model: Any, inputs: dict[str, Any]) -> Tensor:
    """A number that depends on the last token; behind a layer norm, squares would not do."""
    return hidden(model(**inputs))[:, -1].float().exp().mean()


def step(model: Any, inputs: dict[str, Any]) -> Call:
    """Forward and backward, without what an optimizer does: that would favour small adapters."""
    trained = [each for each in model.parameters() if each.requires_grad]

    def run() -> None:
        for parameter in trained:
            parameter.grad = None
        torch.autograd.backward(loss(model, inputs))

    return run


def kept(model: Any, inputs: dict[str, Any]) -> float:
    """Mebibytes that a forward pass keeps for the backward pass.

    Each storage counts once and whole; parameters and buffers, which are there anyway, do not.
    """
    own = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers())}
    sizes: Sizes = {}

    def keep(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in own:
            sizes[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        found = loss(model, inputs)
    torch.autograd.backward(found)  # so that nothing is left in cycles
    return sum(sizes.values()) / 2**20


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def gradients(model: Any, inputs: dict[str, Any], parameters: list[Tensor]) -> list[Tensor]:
    """What a step gives as gradients of some parameters."""
    for parameter in parameters:
        parameter.grad = None
    with torch.enable_grad():
        step(model, inputs)()
    return [
        parameter.grad.detach().clone() for parameter in parameters if parameter.grad is not None
    ]
