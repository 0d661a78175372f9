"""Outputs and gradients of our model and the peer's are the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .pairs import adapted, adapter_keys, inputs, our_model

ATOL = 1e-5


@torch.no_grad()
def call(model: Any, given: Mapping[str, Any] | None = None) -> Any:
    # The peer clamps the positions of question answering in place.
    return model.eval()(**{key: tensor.clone() for key, tensor in (given or inputs()).items()})


def tensors_of(output: Any) -> dict[str, Tensor]:
    return {key: value for key, value in output.items() if isinstance(value, Tensor)}


def assert_close(ours: Tensor, theirs: Tensor, what: str = "") -> None:
    torch.testing.assert_close(
        ours,
        theirs.to(ours.dtype),  # the peer computes some losses in single precision
        atol=ATOL,
        rtol=0,
        msg=lambda text: f"{what}: {text}",
    )


def assert_same_outputs(ours: Any, theirs: Any, given: Mapping[str, Any] | None = None) -> None:
    """Every tensor of the outputs is the same, the loss included."""
    one, other = tensors_of(call(ours, given)), tensors_of(call(theirs, given))
    assert one.keys() == other.keys()
    for key, tensor in other.items():
        assert tensor.isfinite().all()
        assert_close(one[key], tensor, key)


def gradients(model: Any, given: Mapping[str, Any]) -> dict[str, Tensor]:
    """The gradient of every parameter, in training mode, of a sum over the outputs and the loss."""
    model.train().requires_grad_(True)
    model.zero_grad()
    weighted(model(**{key: tensor.clone() for key, tensor in given.items()})).backward()
    named = dict(model.named_parameters(remove_duplicate=False))
    found = {key: p.grad for key, p in named.items() if p.grad is not None}
    model.eval()
    return found


def weighted(output: Any) -> Tensor:
    """A sum over all outputs in which every entry counts differently."""
    total = torch.zeros((), dtype=torch.float64)
    for tensor in tensors_of(output).values():
        total = total + (tensor * torch.linspace(-1, 2, tensor.numel()).view_as(tensor)).sum()
    return total


def assert_same_gradients(
    ours: Any, theirs: Any, keys: Mapping[str, list[str]], given: Mapping[str, Any] | None = None
) -> None:
    """The gradients of the parameters that `keys` names, and of the input embeddings.

    Args:
        ours, theirs: The models.
        keys: The name of a parameter in our model to its names in the peer.
        given: The inputs.
    """
    given = inputs() if given is None else given
    one, other = gradients(ours, given), gradients(theirs, given)
    embeddings = "bert.embeddings.word_embeddings.weight"
    for own, names in {**keys, embeddings: [embeddings]}.items():
        assert one[own].abs().max() > 0, f"{own} has no part in the output"
        assert_close(one[own], other[names[0]], own)


def check_adapter(fields: Any, **changes: Any) -> None:
    """Outputs in eval mode and gradients in training mode are the same."""
    ours, theirs = adapted(fields, **changes)
    bare = call(our_model().double())["last_hidden_state"]
    assert (call(ours)["last_hidden_state"] - bare).abs().max() > 1e-2
    assert_same_outputs(ours, theirs)
    assert_same_gradients(ours, theirs, adapter_keys(ours))
