"""The interface of an adapter method, and the module that holds all of an adapter's parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from flexheads.errors import ConfigError, UnsupportedError
from flexheads.methods.config import AdapterConfig
from flexheads.plugins import registry
from flexheads.sites.base import AttachedSite, Hooks


class AdapterMethod(ABC):
    """How one method adapts a model: which sites it takes, and what it builds there.

    A method is built from its configuration, once for each adapter. It gives a module for every
    site that it takes; what that module is called with is said by the site's kind, see
    `flexheads.sites`.
    """

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def build(
        self, sites: Mapping[str, AttachedSite], model_config: PretrainedConfig
    ) -> dict[str, nn.Module]:
        """Builds the adapter's parts.

        Args:
            sites: The sites of the model by logical address, in order.
            model_config: The model's configuration.

        Returns:
            The part at each site that the adapter takes, by that site's address. What several
            parts use together is a module of its own, under ``"shared.<word>"``; a part holds it
            in a tuple, which keeps it from being the part's own.

        Raises:
            ConfigError: If the configuration does not fit this model.
            UnsupportedError: If the model has no site of a role that the method needs.
        """

    def merged(
        self, part: nn.Module, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """A projection's weight and bias with one part folded in.

        Args:
            part: The part at the projection's site.
            weight: The projection's weight, ``(out_features, in_features)``.
            bias: Its bias, ``(out_features,)``, or None.

        Raises:
            UnsupportedError: If the method, or this configuration of it, cannot be folded in.
        """
        raise UnsupportedError(f"{type(self).__name__} cannot be merged into the backbone.")


class AddressedModules(nn.Module):
    """Modules by logical address (``layers.3.feed_forward``); its state dict is a checkpoint.

    Args:
        parts: The modules by address; see `AdapterMethod.build`.

    Attributes:
        hooks: The hooks that it relies on, as the model has found out that it is in; None before.
    """

    hooks: Hooks | None = None

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self._addresses = tuple(address for address in parts if not is_shared(address))
        for address, part in parts.items():
            *path, last = address.split(".")
            parent: nn.Module = self
            for word in path:
                if word not in parent._modules:
                    parent.add_module(word, nn.Module())
                parent = parent._modules[word]  # type: ignore[assignment]
            parent.add_module(last, part)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The module at each site, by the site's address."""
        return {address: self._at(address) for address in self._addresses}

    def _at(self, address: str) -> Any:
        """The module at an address; `get_submodule`, without what makes that slow."""
        module: Any = self
        for word in address.split("."):
            module = module._modules[word]
        return module

    def __len__(self) -> int:
        return len(self._addresses)

    def __iter__(self) -> Iterator[str]:
        return iter(self._addresses)


class Adapter(AddressedModules):
    """All parameters of one adapter, keyed by logical addresses (``layers.3.feed_forward.down``).

    Args:
        name: The adapter's name.
        config: Its configuration.
        method: The method that built it.
        parts: Its modules by address, as `AdapterMethod.build` gives them.
    """

    def __init__(
        self,
        name: str,
        config: AdapterConfig,
        method: AdapterMethod,
        parts: Mapping[str, nn.Module],
    ) -> None:
        super().__init__(parts)
        self.name, self.config, self.method = name, config, method
        self._described = config, config.to_dict()

    def described(self) -> dict[str, Any]:
        """Its configuration as plain data; made once, so it must not be written to."""
        if self._described[0] is not self.config:
            self._described = self.config, self.config.to_dict()
        return self._described[1]


def is_shared(address: str) -> bool:
    """Whether an address is that of a module which parts of an adapter use together."""
    return address.startswith("shared.")


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Draws what is drawn inside from `seed`, and leaves the global generator as it was."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


_FILLING: ContextVar[bool] = ContextVar("filling", default=False)


@contextmanager
def to_be_filled() -> Iterator[None]:
    """Inside, what is built gets all its values from elsewhere at once, so none are computed.

    A method that computes them all the same is right, only slower.
    """
    token = _FILLING.set(True)
    try:
        yield
    finally:
        _FILLING.reset(token)


def awaits_values() -> bool:
    """Whether values that a method would compute are overwritten at once."""
    return _FILLING.get()


def new_linear(in_features: int, out_features: int, bias: bool = True) -> nn.Linear:
    """A linear layer; where its values are overwritten at once, none are drawn."""
    if not awaits_values():
        return nn.Linear(in_features, out_features, bias=bias)
    layer = _Undrawn(in_features, out_features, bias=bias)
    layer.__class__ = nn.Linear  # type: ignore[assignment]
    return layer


class _Undrawn(nn.Linear):
    """A linear layer whose values are whatever was in memory."""

    def reset_parameters(self) -> None:
        """Draws nothing."""


def lacking(method: str, roles: Sequence[str]) -> UnsupportedError:
    """The error where a model has no site of a role: which it is, and who has one.

    Args:
        method: What needs them, for the message.
        roles: The missing roles, as in `flexheads.specs.LayerSpec`.
    """
    known = registry().architectures.values()
    having = [spec.name for spec in known if spec.roles.issuperset(roles)]
    return UnsupportedError(
        f"{method} needs {', '.join(roles)}, which this architecture does not name. "
        f"Installed architectures that do: {', '.join(having) or 'none'}."
    )


def check_leave_out(leave_out: Sequence[int], sites: Mapping[str, AttachedSite]) -> None:
    """Refuses numbers of layers in ``leave_out`` that the model does not have.

    Raises:
        ConfigError: If there is one.
    """
    check_layers("leave_out", leave_out, sites)


def check_layers(
    field: str, numbers: Iterable[int | str], sites: Mapping[str, AttachedSite]
) -> None:
    """Refuses numbers of layers that the model does not have.

    Args:
        field: The field of the configuration that names them.
        numbers: The numbers, or strings of them.
        sites: The sites of the model.

    Raises:
        ConfigError: If there is one.
    """
    if not (numbers := list(numbers)):
        return
    layers = {str(site.layer) for site in sites.values() if site.layer is not None}
    if wrong := [number for number in numbers if str(number) not in layers]:
        raise ConfigError(
            f"{field} names layers {wrong}, but the model has {len(layers)}, counted from 0."
        )
