"""Activations by the names that transformers and the `adapters` library use."""

from __future__ import annotations

from torch import nn
from transformers.activations import get_activation

from flexheads.errors import ConfigError


def activation(name: str | None) -> nn.Module | None:
    """The activation of that name; None for none.

    Raises:
        ConfigError: If there is none of that name.
    """
    if name is None:
        return None
    if name.lower() == "leakyrelu":
        return nn.LeakyReLU()
    try:
        function: nn.Module = get_activation(name.lower())  # type: ignore[no-untyped-call]
    except KeyError as error:
        raise ConfigError(f"There is no activation {name!r} in transformers.") from error
    return function
