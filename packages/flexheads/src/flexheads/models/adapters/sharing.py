"""Adapters that share parameters, as those of several tasks do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from flexheads.composition import Block
from flexheads.errors import ConfigError, UnknownNameError
from flexheads.methods.lora_configs import MTLLoRAConfig
from flexheads.models.adapters.mixin import AdapterModelMixin

_SHARABLE = ("lora_A", "lora_B")

Names = Block | Sequence[str] | str


class SharingMixin(AdapterModelMixin):
    """``share_parameters`` and ``unshare_parameters``, for MTL-LoRA."""

    _shared_groups: dict[str, tuple[str, ...]]

    def share_parameters(
        self,
        adapter_names: Names,
        name: str | None = None,
        reference_adapter_name: str | None = None,
    ) -> None:
        """Lets MTL-LoRA adapters share their projections; the matrix of each task stays its own.

        Args:
            adapter_names: The adapters: a list, a block of them, or a string with commas.
            name: A name for what they share; None is their names with commas.
            reference_adapter_name: The adapter whose values all take on; None is the first.

        Raises:
            ConfigError: If they are no MTL-LoRA adapters of one configuration, or the reference is
                none of them; nothing is changed then.
            UnknownNameError: If there is no adapter of such a name.
        """
        names = _names(adapter_names)
        reference = names[0] if reference_adapter_name is None else reference_adapter_name
        if reference not in names:
            raise ConfigError(f"The reference {reference!r} is none of {list(names)}.")
        tables = {each: self._sharable(each) for each in names}
        shapes = {each: {k: t.shape for k, t in table.items()} for each, table in tables.items()}
        if wrong := [each for each in names if shapes[each] != shapes[reference]]:
            raise ConfigError(
                f"{wrong} have projections of other shapes than {reference!r}, so they cannot "
                "share them. Give all the same configuration."
            )
        self._share(names, reference)
        group = ",".join(names) if name is None else name
        self._sharing()[group] = names

    def unshare_parameters(self, adapter_names: Names, name: str | None = None) -> None:
        """Gives adapters projections of their own again, with the values that they shared.

        Args:
            adapter_names: The adapters.
            name: The name that was given to `share_parameters`.

        Raises:
            UnknownNameError: If nothing is shared under that name.
        """
        names = _names(adapter_names)
        group = ",".join(names) if name is None else name
        members = self._sharing().pop(group, None)
        if members is None:
            raise UnknownNameError("shared group", group, self._sharing())
        for each in names:
            for address, shared in self._sharable(each).items():
                own = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
                self._put(each, address, own)
        self._sharing()[group] = tuple(each for each in members if each not in names)

    def _share(self, names: Sequence[str], reference: str) -> None:
        """Puts the reference's projections into all."""
        for address, shared in self._sharable(reference).items():
            for each in names:
                self._put(each, address, shared)

    def _sharable(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters of an adapter that others may share, by address."""
        adapter = self.adapters[name]
        if not isinstance(adapter.config, MTLLoRAConfig):
            raise ConfigError(
                f"{name!r} is a {type(adapter.config).__name__}, but only adapters for several "
                "tasks (MTLLoRAConfig) share parameters."
            )
        named = adapter.named_parameters(remove_duplicate=False)
        return {key: p for key, p in named if key.rpartition(".")[2] in _SHARABLE}

    def _put(self, name: str, address: str, parameter: nn.Parameter) -> None:
        module, _, word = address.rpartition(".")
        setattr(self.adapters[name].get_submodule(module), word, parameter)

    def _sharing(self) -> dict[str, tuple[str, ...]]:
        """What is shared: the adapters of each group that are still there and do share it."""
        groups: dict[str, tuple[str, ...]] = self.__dict__.setdefault("_shared_groups", {})
        for group, names in list(groups.items()):
            there = tuple(name for name in names if name in self.adapters)
            first = self._first(there[0]) if there else None
            groups[group] = tuple(name for name in there if self._first(name) is first)
            if len(groups[group]) < 2:
                del groups[group]
        return groups

    def _first(self, name: str) -> nn.Parameter | None:
        named = self.adapters[name].named_parameters(remove_duplicate=False)
        return next((p for key, p in named if key.rpartition(".")[2] in _SHARABLE), None)

    def _unshared_state(self, state: dict[str, Tensor] | None) -> dict[str, Any] | None:
        """The tensors of the model for files, which do not take one tensor twice."""
        if not self._sharing():
            return state
        state = dict(self.state_dict() if state is None else state)
        for names in self._sharing().values():
            for name in names[1:]:
                stem = f"adapters.{self.adapters.key(name)}."
                for address in self._sharable(name):
                    state[stem + address] = state[stem + address].clone()
        return state


def _names(adapter_names: Names) -> tuple[str, ...]:
    if isinstance(adapter_names, str):
        names = tuple(adapter_names.split(","))
    elif isinstance(adapter_names, Block):
        names = tuple(adapter_names.names())
    else:
        names = tuple(adapter_names)
    if len(names) < 2 or len(set(names)) != len(names):
        raise ConfigError(f"Sharing takes two adapters or more, each once, not {list(names)}.")
    return names
