"""What happens to a model's inputs before the backbone sees them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from flexheads.errors import ConfigError

_TOKEN_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


def input_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a forward's arguments in order, without ``self``."""
    return tuple(inspect.signature(forward).parameters)[1:]


def batch_size(inputs: Mapping[str, Any]) -> int:
    """Rows of the batch: the first dimension of the first tensor."""
    return next((int(value.shape[0]) for value in inputs.values() if _batched(value)), 0)


def repeat_rows(inputs: Mapping[str, Any], times: int) -> dict[str, Any]:
    """Repeats the batch, whole after whole, in every tensor that carries it."""
    batch = batch_size(inputs)
    return {
        name: value.repeat(times, *[1] * (value.dim() - 1))
        if _batched(value) and value.shape[0] == batch
        else value
        for name, value in inputs.items()
    }


def flatten_choices(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], int | None]:
    """Turns ``(batch, choices, sequence)`` inputs into ``(batch * choices, sequence)``.

    Returns:
        The inputs, and the number of choices, or None where the input has no such dimension.

    Raises:
        ConfigError: If only some of the inputs have it.
    """
    depth = {name: inputs[name].dim() for name in _TOKEN_INPUTS if _batched(inputs.get(name))}
    if _batched(inputs.get("inputs_embeds")):
        depth["inputs_embeds"] = inputs["inputs_embeds"].dim() - 1
    if 3 not in depth.values():
        return dict(inputs), None
    if set(depth.values()) != {3}:
        raise ConfigError(
            "Some inputs are (batch, choices, sequence) and others are not: "
            + ", ".join(f"{name} has shape {tuple(inputs[name].shape)}" for name in depth)
        )
    choices = int(inputs[next(iter(depth))].shape[1])
    flat = {name: inputs[name].flatten(0, 1) for name in depth}
    return {**inputs, **flat}, choices


def _batched(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0
